"""Denoising of a clip's newest frame given all earlier ones, with and without the multi-level KV cache.

Both denoisers follow the training layout, so the cache changes only the speed: `UncachedDenoiser` runs the whole clip
through the model at every denoising step, `CachedDenoiser` caches keys and values of the clean frames.

    shape letters   B clips   R rows of the model's batch: each clip `copies` times (twice with guidance)
                    S denoising steps   C/H/W latent channels/height/width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from far_scale.model import FAR
from far_scale.model.far import patchify, unpatchify
from far_scale.model.layers import Block, Tokens, gated_residual, modulated_norm
from far_scale.model.layout import AttentionPlan, FrameGroup, FrameLayout, Prefix, Spans
from far_scale.sampling.cache import MultiLevelCache, first_window_frame
from far_scale.sampling.config import TRAIN_TIMESTEPS, SamplingConfig
from far_scale.sampling.cuda_graphs import CUDAGraphRunner, GraphPool
from far_scale.train.flow_matching import CLEAN, CLEAN_CONTEXT

SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, which PyTorch prefers on H100s: it builds a plan for each new number of keys, that is for each frame,
in 0.3 s (benchmarks/results/2026-11-26-gpu-h100.md)."""

_KEY_BUCKET = {"cpu": 1, "cuda": 512}  # numbers of keys are rounded up to multiples: one CUDA graph for each


class FinishedFrame(NamedTuple):
    """A frame that was given or predicted.

    Attributes:
        clean: `[B, C, H, W]` its latents, the input of coarse context.
        seen: the same as the input of the window: clean, or with context noise.
        classes: `[R]` its action or label; None in a model without.
    """

    clean: Tensor
    seen: Tensor
    classes: Tensor | None


class Schedule:
    """The denoising steps of a frame: noise levels and their timesteps.

    Args:
        sigmas: `[S + 1]` float32, from 1 to 0.
        sampling: guidance and context noise.
        device: of the tensors.
    """

    def __init__(self, sigmas: Tensor, sampling: SamplingConfig, device: torch.device) -> None:
        self.steps = len(sigmas) - 1
        self.timesteps = (sigmas[:-1] * TRAIN_TIMESTEPS).to(device)
        self.sigma_steps = (sigmas[1:] - sigmas[:-1]).to(device)
        self.seen_timestep = TRAIN_TIMESTEPS * sampling.context_noise if sampling.context_noise else CLEAN
        self._guidance = sampling.guidance

    def euler_step(self, x: Tensor, velocity: Tensor, step: Tensor) -> Tensor:
        """x `[B, C, H, W]` after the step of number `step` `[1]`, with the velocity `[R, C, H, W]`."""
        # Indexing by a tensor would make the host wait for it.
        return x + self.sigma_steps.index_select(0, step) * guided(velocity, self._guidance)


def guided(velocity: Tensor, guidance: float) -> Tensor:
    """One velocity per clip, combined from those of the null class and of the condition; unchanged without guidance."""
    if guidance <= 1:
        return velocity
    null, conditioned = velocity.chunk(2)
    return null + guidance * (conditioned - null)


class Denoiser(Protocol):
    """Denoises one frame after another."""

    def set_schedule(self, schedule: Schedule) -> None:
        """Denoise by this schedule from the next frame on."""
        ...

    def begin_frame(self, history: Sequence[FinishedFrame], frame: int, classes: Tensor | None) -> None:
        """Begin a frame.

        Args:
            history: the finished frames before it, or at least the last `history_frames`.
            frame: its index in the clip.
            classes: `[R]` its action or label; None in a model without.
        """
        ...

    def denoise(self, x: Tensor, step: int) -> Tensor:
        """The frame's latents x `[B, C, H, W]` float32 after denoising step number `step`."""
        ...

    def state(self) -> Any:
        """A copy of what `begin_frame` needs of earlier frames, for `restore`."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to an earlier `state`."""
        ...

    @property
    def history_frames(self) -> int | None:
        """How many finished frames `begin_frame` needs; None for all."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Memory of the cached keys and values."""
        ...


class UncachedDenoiser:
    """Runs the new frame and all frames that it attends to through the model at every step."""

    history_frames, cache_bytes = None, 0

    def __init__(self, model: FAR, schedule: Schedule, copies: int, stride: int = 1) -> None:
        """
        Args:
            copies: rows of the model's batch for each clip.
            stride: see `first_window_frame`.
        """
        self._model, self._schedule, self._copies, self._stride = model, schedule, copies, stride
        self._dtype = model.patch_embedding.weight.dtype

    def set_schedule(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def state(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass

    def begin_frame(self, history: Sequence[FinishedFrame], frame: int, classes: Tensor | None) -> None:
        config = self._model.config
        first = first_window_frame(frame, config.window, self._stride)
        # A window-only model slides: frame indices restart with its oldest frame.
        start = 0 if config.context_patch else first
        attended = history[start:frame]
        latents = [(f.clean if number < first else f.seen) for number, f in enumerate(attended, start)]
        self._earlier = torch.stack(latents, 1) if latents else None
        frames, self._classes = len(attended) + 1, None
        if classes is not None:
            per_frame = [f.classes for f in attended if f.classes is not None] + [classes]
            self._classes = torch.stack(per_frame, 1)  # [R, frames]
        self._timesteps = self._schedule.timesteps.new_full((frames,), self._schedule.seen_timestep)
        self._timesteps[: first - start] = CLEAN_CONTEXT
        self._window = frames - (first - start)

    def denoise(self, x: Tensor, step: int) -> Tensor:
        number = torch.tensor([step], device=x.device)
        return self._schedule.euler_step(x, self.velocity(x, step), number)

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """The velocity `[R, C, H, W]` float32 of x `[B, C, H, W]`."""
        config, frames = self._model.config, len(self._timesteps)
        clips = x[:, None] if self._earlier is None else torch.cat([self._earlier, x[:, None]], dim=1)
        latents = clips.to(self._dtype).repeat(self._copies, 1, 1, 1, 1)
        timesteps = self._timesteps.clone()
        timesteps[-1] = self._schedule.timesteps[step]
        rows, grid = len(latents), (x.shape[2] // config.patch, x.shape[3] // config.patch)
        coarsening = config.context_patch // config.patch
        layout = FrameLayout.of((frames,) * rows, grid, self._window, coarsening)
        actions = labels = None
        if self._classes is not None and config.actions:
            actions = self._classes.flatten()
        elif self._classes is not None:
            labels = self._classes[:, -1]  # a clip has one
        velocity = self._model(latents.flatten(0, 1), timesteps.repeat(rows), actions, labels, layout)
        newest: Tensor = velocity.unflatten(0, (rows, -1))[:, -1].float()
        return newest


class CachedDenoiser:
    """Runs only the new frame through the model at a denoising step.

    While the clip fits the window, a finished frame is appended to level 1. Then the window slides by `stride` frames
    at a time: the frames that leave it are encoded once, coarsely, into level 2, and the window's frames, which now
    attend to them as coarse context, are encoded again. A window-only model drops those frames and restarts the frame
    indices of its window at 0.

    A denoising step and the pass that appends a frame have static shapes: everything that differs from frame to frame
    is in tensors on the device. On a GPU they are captured once for each number of keys, rounded up, and replayed.
    """

    def __init__(
        self,
        model: FAR,
        schedule: Schedule,
        copies: int,
        cache: MultiLevelCache,
        size: tuple[int, int],
        stride: int = 1,
    ) -> None:
        """
        Args:
            copies: rows of the model's batch for each clip.
            cache: an empty one, for all rows.
            size: H, W.
            stride: see `first_window_frame`.
        """
        weight = model.patch_embedding.weight
        self._model, self._cache, self._copies, self._size, self._stride = model, cache, copies, size, stride
        self._dtype, self._device = weight.dtype, weight.device
        self._blocks = [cast(Block, block) for block in model.blocks]
        self._kernel = model.kernel(compiled=False)
        self._bucket = _KEY_BUCKET.get(weight.device.type, 1)
        self._pool = GraphPool() if weight.device.type == "cuda" else None
        self._first = 0  # index in the clip of the window's first frame
        self._window_frames = 0  # clean frames in level 1
        self._prepared: int | None = None  # the frame that the static tensors are for
        self._masks: dict[int, Tensor] = {}  # by the number of keys
        self.set_schedule(schedule)

    def set_schedule(self, schedule: Schedule) -> None:
        self._schedule, self._prepared = schedule, None
        self._static: _StaticTensors | None = None
        self._numbers = torch.arange(schedule.steps + 1, device=self._device).split(1)  # of the passes, `[1]` each
        self._runners: dict[tuple[str, int, bool], CUDAGraphRunner] = {}

    def state(self) -> Any:
        return self._first, self._window_frames, self._cache.state()

    def restore(self, state: Any) -> None:
        self._first, self._window_frames, cached = state
        self._cache.restore(cached)
        self._prepared = None

    @property
    def history_frames(self) -> int | None:
        return self._model.config.window

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    def begin_frame(self, history: Sequence[FinishedFrame], frame: int, classes: Tensor | None) -> None:
        config = self._model.config
        first = first_window_frame(frame, config.window, self._stride)
        if first > self._first:
            if config.context_patch:
                self._encode_context(_frames_before(history, frame, self._first, first), self._first)
            self._first, self._window_frames, self._prepared = first, 0, None
        missing = _frames_before(history, frame, first + self._window_frames, frame)
        if len(missing) == 1:
            if self._prepared != frame - 1:
                self._prepare(missing[0].classes, frame - 1)
            self._run(self._append, missing[0].seen)
            self._window_frames += 1
        elif missing:
            self._encode_window(missing)
        self._prepare(classes, frame)

    def denoise(self, x: Tensor, step: int) -> Tensor:
        return self._run(self._denoise, x, self._numbers[step])

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """The velocity `[R, C, H, W]` float32 of x `[B, C, H, W]`."""
        return self._velocity(x, self._numbers[step])

    def _rows_of(self, frames: Sequence[FinishedFrame], clean: bool) -> tuple[Tensor, Tensor | None]:
        """Frames of every row: latents `[R, n, C, H, W]`, classes `[R * n]`."""
        latents = torch.stack([frame.clean if clean else frame.seen for frame in frames], 1)
        classes = [frame.classes for frame in frames if frame.classes is not None]
        per_frame = torch.stack(classes, 1).flatten() if classes else None
        return latents.to(self._dtype).repeat(self._copies, 1, 1, 1, 1), per_frame

    def _next_frame_index(self) -> int:
        """The frame index of the next frame in the window."""
        return self._window_frames + (self._first if self._model.config.context_patch else 0)

    def _group(self, frames: int, rows: int, coarse: bool, first_frame: int) -> FrameGroup:
        config = self._model.config
        patch = config.context_patch if coarse else config.patch
        grid = (self._size[0] // patch, self._size[1] // patch)
        return FrameGroup.of((frames,) * rows, grid, (first_frame,) * rows, patch // config.patch)

    def _encode_context(self, frames: Sequence[FinishedFrame], first_frame: int) -> None:
        """Append the frames to level 2; of more than it holds the last ones."""
        model, cache = self._model, self._cache
        if cache.context_limit is not None and len(frames) > cache.context_limit:
            first_frame += len(frames) - cache.context_limit
            frames = frames[len(frames) - cache.context_limit :]
        if not frames:
            return
        clean, classes = self._rows_of(frames, clean=True)
        rows, count = clean.shape[:2]
        if cache.reserve_context(count):
            self._runners.clear()  # they read the cache at its old address
        group = self._group(count, rows, coarse=True, first_frame=first_frame)
        rotation = model.rotary_embedding(group)
        condition = model.condition(clean.new_full((group.frames,), CLEAN_CONTEXT), classes)
        x = model.context_patch_embedding(patchify(clean.flatten(0, 1), model.config.context_patch))
        plan = AttentionPlan(group, _full_prefix(rows, cache.kept_context(count) * cache.coarse, count * cache.coarse))
        for layer, block in enumerate(self._blocks):
            k, v = (part.flatten(0, 1) for part in cache.context_prefix(layer, count))
            new, k, v = block.context(Tokens(x, condition, rotation, plan.handle), k, v, self._kernel)
            cache.append_context(layer, k, v)
            x = x if new is None else new
        cache.commit_context(count)

    def _encode_window(self, frames: Sequence[FinishedFrame]) -> None:
        """Append the frames to level 1. They attend to those there and to the context."""
        model, cache, cached_frames = self._model, self._cache, self._window_frames
        seen, classes = self._rows_of(frames, clean=False)
        rows, count = seen.shape[:2]
        group = self._group(count, rows, coarse=False, first_frame=self._next_frame_index())
        rotation = model.rotary_embedding(group)
        condition = model.condition(seen.new_full((group.frames,), self._schedule.seen_timestep), classes)
        x = model.patch_embedding(patchify(seen.flatten(0, 1), model.config.patch))
        cached_tokens = cached_frames * cache.fine + cache.context_frames * cache.coarse
        plan = AttentionPlan(group, _full_prefix(rows, cached_tokens, count * cache.fine))
        for layer, block in enumerate(self._blocks):
            if layer == len(self._blocks) - 1:
                k, v = block.window_kv(x, condition, rotation)  # the outputs of clean frames are unused here
            else:
                k, v = (part.flatten(0, 1) for part in cache.window_prefix(layer, cached_frames))
                x, k, v = block.window(Tokens(x, condition, rotation, plan.handle), k, v, self._kernel)
            cache.write_window(layer, cached_frames, k, v)
        self._window_frames += count

    def _prepare(self, classes: Tensor | None, frame: int) -> None:
        """Fill the static tensors for a frame: modulations of all its passes, rotary embedding, places and mask."""
        schedule, rows, cache = self._schedule, self._cache.clips, self._cache
        timesteps = torch.cat([schedule.timesteps, schedule.timesteps.new_full((1,), schedule.seen_timestep)])
        passes = len(timesteps)  # S denoising steps, and the one that appends the frame
        classes_of_passes = None if classes is None else classes.repeat(passes)
        condition = self._model.condition(timesteps.repeat_interleave(rows), classes_of_passes)
        condition = condition.unflatten(0, (passes, rows))  # [S + 1, R, E]
        by_layer = [(b.attention_modulation(condition), b.mlp_modulation(condition)) for b in self._blocks]
        modulations = torch.stack([torch.stack(pair, 1) for pair in by_layer], 1)  # [S + 1, layers, 2, R, 3 E]
        rotation = self._model.rotary_embedding(self._group(1, rows, False, self._next_frame_index()))
        places = torch.arange(cache.fine, device=self._device) + self._window_frames * cache.fine
        self._static = _StaticTensors(condition, modulations, rotation, places).stored_in(self._static)

        window_end, context_start, end = cache.visible_ranges(self._window_frames + 1)
        used = window_end if end == context_start else end
        self._visible = min(-(-used // self._bucket) * self._bucket, cache.tokens)
        self._mask = None
        if self._visible > window_end and (window_end < context_start or self._visible > end):
            token = torch.arange(self._visible)
            seen = (token < window_end) | ((token >= context_start) & (token < end))
            bias = torch.zeros(self._visible).masked_fill(~seen, -torch.inf).to(self._device, self._dtype)
            self._mask = self._masks.setdefault(self._visible, torch.empty_like(bias)).copy_(bias)
        self._prepared = frame

    def _run(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Call `function`, on a GPU by a CUDA graph for its present shapes."""
        if self._pool is None:
            return function(*args)
        key = (function.__name__, self._visible, self._mask is None)
        if key not in self._runners:
            self._runners[key] = CUDAGraphRunner(function, self._pool)
        return self._runners[key](*args)

    def _denoise(self, x: Tensor, step: Tensor) -> Tensor:
        """x `[B, C, H, W]` after the denoising step of this number `[1]`."""
        return self._schedule.euler_step(x, self._velocity(x, step), step)

    def _velocity(self, x: Tensor, step: Tensor) -> Tensor:
        tokens, condition = self._through_blocks(x, step, append_only=False)
        return unpatchify(self._model.output(tokens, condition), self._size, self._model.config.patch).float()

    def _append(self, seen: Tensor) -> Tensor:
        """Write the keys and values of the finished frame `seen` `[B, C, H, W]` over those of its last step."""
        tokens, _ = self._through_blocks(seen, self._numbers[-1], append_only=True)
        return tokens

    def _through_blocks(self, x: Tensor, number: Tensor, append_only: bool) -> tuple[Tensor, Tensor]:
        """The tokens `[R, P, E]` of x `[B, C, H, W]` after all blocks, and their condition `[R, E]`.

        Args:
            number: of the pass, `[1]`.
            append_only: leave out what only the output needs.
        """
        config, cache, static = self._model.config, self._cache, self._static
        assert static is not None
        condition = static.condition.index_select(0, number).squeeze(0)
        modulations = static.modulations.index_select(0, number).squeeze(0)
        tokens = self._model.patch_embedding(patchify(x.to(self._dtype), config.patch).repeat(self._copies, 1, 1))
        mask = None if self._mask is None else self._mask.expand(1, 1, tokens.shape[1], -1)
        with sdpa_kernel(SDPA_BACKENDS):
            for layer, (block, (attention, mlp)) in enumerate(zip(self._blocks, modulations, strict=True)):
                shift, scale, gate = attention.chunk(3, dim=-1)
                q, k, v = block.attention.project(modulated_norm(tokens, scale, shift), static.rotation)
                cache.write_tokens(layer, static.places, k, v)
                if append_only and layer == len(self._blocks) - 1:
                    break
                keys, values = cache.visible(layer, self._visible)
                q, keys, values = (y.transpose(1, 2) for y in (q.unflatten(0, (cache.clips, -1)), keys, values))
                attended = F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2).flatten(2)
                tokens = block.add_mlp(gated_residual(tokens, gate, block.attention.out(attended)), mlp)
        return tokens, condition


class _StaticTensors(NamedTuple):
    """What differs from frame to frame, at addresses that captured graphs know.

    Attributes:
        condition: `[S + 1, R, E]` of each denoising step, then of the finished frame.
        modulations: `[S + 1, layers, 2, R, 3 E]` of attention and MLP.
        rotation: `[R * P, D/2, 2]` rotary cosine and sine.
        places: `[P]` places of the frame's tokens in the cache.
    """

    condition: Tensor
    modulations: Tensor
    rotation: Tensor
    places: Tensor

    def stored_in(self, buffers: _StaticTensors | None) -> _StaticTensors:
        """`buffers` with these values; these tensors themselves where there are none yet."""
        if buffers is None:
            return self
        return _StaticTensors(*(buffer.copy_(x) for buffer, x in zip(buffers, self, strict=True)))


def _full_prefix(rows: int, keys: int, queries: int) -> Prefix | None:
    """The prefix in which each row's queries attend to all prefix keys of the row; None without keys."""
    return Prefix(None, Spans((queries,) * rows), Spans((keys,) * rows)) if keys else None


def _frames_before(history: Sequence[FinishedFrame], frame: int, start: int, stop: int) -> list[FinishedFrame]:
    """The frames with the indices start ... stop - 1, of a history that ends before `frame`."""
    offset = frame - len(history)
    assert start >= offset, "the history is too short"
    return [history[number - offset] for number in range(start, stop)]
