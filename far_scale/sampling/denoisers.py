"""The velocity of a clip's newest frame given all earlier ones, with and without the multi-level KV cache.

Both denoisers follow the training layout, so the cache changes only the speed: `UncachedDenoiser` runs the whole clip
through the model at every denoising step, `CachedDenoiser` caches keys and values of the clean frames.

    shape letters   B clips   R rows of the model's batch: each clip `copies` times (twice with guidance)
                    f clean frames   S denoising steps   C/H/W latent channels/height/width
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from far_scale.model import FAR
from far_scale.model.far import patchify, unpatchify
from far_scale.model.layers import Block, Tokens, gated_residual, modulated_norm
from far_scale.model.layout import AttentionPlan, FrameGroup, Prefix, Spans
from far_scale.sampling.cache import MultiLevelCache
from far_scale.sampling.cuda_graphs import CUDAGraphRunner, GraphPool
from far_scale.train.flow_matching import CLEAN, CLEAN_CONTEXT

SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, which PyTorch prefers on H100s: it builds a plan for each new number of keys, that is for each frame,
in 0.3 s (benchmarks/results/2026-11-26-gpu-h100.md)."""


class Denoiser(Protocol):
    """Computes the velocity of one frame after another, at each noise level."""

    def begin_frame(self, clean: Tensor, seen: Tensor, actions: Tensor | None, labels: Tensor | None) -> None:
        """Begin the frame that follows the frames of `clean`.

        Args:
            clean: `[B, f, C, H, W]` finished frames, the input of coarse context.
            seen: the same frames as the input of the window: clean, or with context noise.
            actions: `[R, f + 1]` or None.
            labels: `[R]` or None.
        """
        ...

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """The velocity `[R, C, H, W]` float32 of the frame's noisy latent x `[B, C, H, W]` at denoising step `step`."""
        ...


class UncachedDenoiser:
    """Runs the new frame and all frames that it attends to through the model at every step."""

    def __init__(self, model: FAR, timesteps: Tensor, copies: int, seen_timestep: float = CLEAN) -> None:
        """
        Args:
            timesteps: `[S]`, those of the denoising steps.
            copies: rows of the model's batch for each clip.
            seen_timestep: timestep of the window's other frames.
        """
        self._model, self._timesteps, self._copies, self._seen_timestep = model, timesteps, copies, seen_timestep
        self._dtype = model.patch_embedding.weight.dtype

    def begin_frame(self, clean: Tensor, seen: Tensor, actions: Tensor | None, labels: Tensor | None) -> None:
        config = self._model.config
        first = max(0, clean.shape[1] + 1 - config.window)  # the new frame is the window's last
        self._earlier = torch.cat([clean[:, :first], seen[:, first:]], dim=1)
        self._actions, self._labels = actions, labels
        self._frame_timesteps = clean.new_full((self._copies * len(clean), clean.shape[1] + 1), self._seen_timestep)
        self._frame_timesteps[:, :first] = CLEAN_CONTEXT
        if not config.context_patch:
            # A sliding window: frame indices restart with its oldest frame.
            self._earlier, self._frame_timesteps = self._earlier[:, first:], self._frame_timesteps[:, first:]
            self._actions = None if actions is None else actions[:, first:]

    def velocity(self, x: Tensor, step: int) -> Tensor:
        self._frame_timesteps[:, -1] = self._timesteps[step]
        latents = torch.cat([self._earlier, x[:, None]], dim=1).to(self._dtype).repeat(self._copies, 1, 1, 1, 1)
        velocity: Tensor = self._model(latents, self._frame_timesteps, self._actions, self._labels)
        return velocity[:, -1].float()


class CachedDenoiser:
    """Runs only the new frame through the model at a denoising step.

    While the clip fits the window, a finished frame is appended to level 1. Then the window slides by one frame at a
    time: the frame that leaves it is encoded once, coarsely, into level 2, and the window's frames, which now attend to
    it as coarse context, are encoded again. A window-only model drops that frame and restarts the frame indices of its
    window at 0.
    """

    def __init__(
        self,
        model: FAR,
        timesteps: Tensor,
        copies: int,
        clips: int,
        frames: int,
        size: tuple[int, int],
        seen_timestep: float = CLEAN,
    ) -> None:
        """
        Args:
            timesteps: `[S]`, those of the denoising steps.
            copies: rows of the model's batch for each clip.
            clips: B.
            frames: number of frames of a finished clip.
            size: H, W.
            seen_timestep: timestep of the window's other frames.
        """
        weight = model.patch_embedding.weight
        self._model, self._timesteps, self._copies, self._size = model, timesteps, copies, size
        self._seen_timestep = seen_timestep
        self._rows, self._dtype = copies * clips, weight.dtype
        self._blocks = [cast(Block, block) for block in model.blocks]
        self._kernel = model.kernel(compiled=False)
        self._cache = MultiLevelCache(model.config, self._rows, frames, size, weight.device, weight.dtype)
        self._pool = GraphPool() if weight.device.type == "cuda" else None
        self._first = 0  # index in the clip of the window's first frame
        self._window_frames, self._context_frames = 0, 0  # clean frames in the cache

    def begin_frame(self, clean: Tensor, seen: Tensor, actions: Tensor | None, labels: Tensor | None) -> None:
        config, frame = self._model.config, clean.shape[1]
        first = max(0, frame + 1 - config.window)  # the new frame is the window's last
        if config.context_patch and first > self._context_frames:
            self._encode_context(*self._select_frames(clean, actions, labels, self._context_frames, first))
        if first > self._first:
            self._first, self._window_frames = first, 0
        if frame > first + self._window_frames:
            self._encode_window(*self._select_frames(seen, actions, labels, first + self._window_frames, frame))
        classes = actions[:, frame] if actions is not None else labels
        self._prepare_steps(classes, self._group(1, coarse=False, first_frame=self._next_frame_index()))

    def _select_frames(
        self, latents: Tensor, actions: Tensor | None, labels: Tensor | None, start: int, stop: int
    ) -> tuple[Tensor, Tensor | None]:
        """Frames start ... stop - 1 of every row: latents `[R, n, C, H, W]`, classes `[R * n]`."""
        frames = latents[:, start:stop].to(self._dtype).repeat(self._copies, 1, 1, 1, 1)
        if actions is not None:
            return frames, actions[:, start:stop].flatten()
        return frames, None if labels is None else labels.repeat_interleave(stop - start)

    def _next_frame_index(self) -> int:
        """The frame index of the next frame in the window."""
        return self._window_frames + (self._first if self._model.config.context_patch else 0)

    def _group(self, frames: int, coarse: bool, first_frame: int) -> FrameGroup:
        config = self._model.config
        patch = config.context_patch if coarse else config.patch
        grid = (self._size[0] // patch, self._size[1] // patch)
        return FrameGroup.of((frames,) * self._rows, grid, (first_frame,) * self._rows, patch // config.patch)

    def _encode_context(self, clean: Tensor, classes: Tensor | None) -> None:
        """Append frames `[R, n, C, H, W]` to level 2."""
        model, cache, cached_frames, frames = self._model, self._cache, self._context_frames, clean.shape[1]
        group = self._group(frames, coarse=True, first_frame=cached_frames)
        rotation = model.rotary_embedding(group)
        condition = model.condition(clean.new_full((group.frames,), CLEAN_CONTEXT), classes)
        x = model.context_patch_embedding(patchify(clean.flatten(0, 1), model.config.context_patch))
        plan = AttentionPlan(group, self._full_prefix(cached_frames * cache.coarse, frames * cache.coarse))
        for layer, block in enumerate(self._blocks):
            k, v = (part.flatten(0, 1) for part in cache.context(layer, cached_frames))
            new, k, v = block.context(Tokens(x, condition, rotation, plan.handle), k, v, self._kernel)
            cache.write_context(layer, cached_frames, k, v)
            x = x if new is None else new
        self._context_frames += frames

    def _encode_window(self, seen: Tensor, classes: Tensor | None) -> None:
        """Append frames `[R, n, C, H, W]` to level 1. They attend to those cached there, or else to the context."""
        model, cache, cached_frames, frames = self._model, self._cache, self._window_frames, seen.shape[1]
        group = self._group(frames, coarse=False, first_frame=self._next_frame_index())
        rotation = model.rotary_embedding(group)
        condition = model.condition(seen.new_full((group.frames,), self._seen_timestep), classes)
        x = model.patch_embedding(patchify(seen.flatten(0, 1), model.config.patch))
        cached_tokens = cached_frames * cache.fine + self._context_frames * cache.coarse
        plan = AttentionPlan(group, self._full_prefix(cached_tokens, frames * cache.fine))
        for layer, block in enumerate(self._blocks):
            if layer == len(self._blocks) - 1:
                k, v = block.window_kv(x, condition, rotation)  # the outputs of clean frames are unused here
            else:
                k, v = (
                    cache.window(layer, cached_frames) if cached_frames else cache.context(layer, self._context_frames)
                )
                k, v = k.flatten(0, 1), v.flatten(0, 1)
                x, k, v = block.window(Tokens(x, condition, rotation, plan.handle), k, v, self._kernel)
            cache.write_window(layer, cached_frames, k, v)
        self._window_frames += frames

    def _full_prefix(self, keys: int, queries: int) -> Prefix | None:
        """The prefix in which each row's queries attend to all prefix keys of the row; None without keys."""
        return Prefix(None, Spans((queries,) * self._rows), Spans((keys,) * self._rows)) if keys else None

    def _prepare_steps(self, classes: Tensor | None, group: FrameGroup) -> None:
        """Compute in advance: the modulations of all steps, in one product, and the frame's rotary embedding."""
        steps = len(self._timesteps)
        timesteps = self._timesteps.repeat_interleave(self._rows)
        condition = self._model.condition(timesteps, None if classes is None else classes.repeat(steps))
        self._condition = condition.unflatten(0, (steps, self._rows))  # [S, R, E]
        by_layer = [(b.attention_modulation(self._condition), b.mlp_modulation(self._condition)) for b in self._blocks]
        self._modulations = torch.stack([torch.stack(pair, 1) for pair in by_layer], 1)  # [S, layers, 2, R, 3 E]
        self._rotation = self._model.rotary_embedding(group)
        self._compute = self._velocity if self._pool is None else CUDAGraphRunner(self._velocity, self._pool)

    def velocity(self, x: Tensor, step: int) -> Tensor:
        return self._compute(x, self._condition[step], self._modulations[step])

    def _velocity(self, x: Tensor, condition: Tensor, modulations: Tensor) -> Tensor:
        """`velocity` of x `[B, C, H, W]`, from a step's condition `[R, E]` and modulations `[layers, 2, R, 3 E]`."""
        model, config, slot = self._model, self._model.config, self._window_frames
        tokens = model.patch_embedding(patchify(x.to(self._dtype), config.patch).repeat(self._copies, 1, 1))
        with sdpa_kernel(SDPA_BACKENDS):
            for layer, (block, (attention, mlp)) in enumerate(zip(self._blocks, modulations, strict=True)):
                shift, scale, gate = attention.chunk(3, dim=-1)
                q, k, v = block.attention.project(modulated_norm(tokens, scale, shift), self._rotation)
                self._cache.write_window(layer, slot, k, v)
                keys, values = self._cache.visible(layer, slot + 1, self._context_frames)
                q, keys, values = (part.transpose(1, 2) for part in (q.unflatten(0, (self._rows, -1)), keys, values))
                seen = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
                tokens = block.add_mlp(gated_residual(tokens, gate, block.attention.out(seen)), mlp)
        return unpatchify(model.output(tokens, condition), self._size, config.patch).float()
