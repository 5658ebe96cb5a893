"""Frame after frame without a known end: `Session` predicts the next frame from an action that is just given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from far_scale.model import FAR, FARConfig
from far_scale.sampling.cache import MultiLevelCache, levels
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.denoisers import CachedDenoiser, Denoiser, FinishedFrame, Schedule, UncachedDenoiser
from far_scale.sampling.noise import euler_sigmas, frame_noise
from far_scale.utils.errors import UserError


@dataclass(frozen=True)
class Snapshot:
    """A state of a session, to go back to. It holds a copy of the KV cache."""

    frame: int
    history: tuple[FinishedFrame, ...]
    denoiser: Any


class Session:
    """Clips that grow by one frame a call.

    Memory does not grow with the clips, unless `sampling.context_frames` leaves the context of a FAR-Long without a
    maximum. A window-only model slides its window.

    Args:
        model: computes in its parameters' dtype and on their device; latents stay in float32.
        sampling: the settings; `frames` is not used.
        size: height and width of a latent.
        clip_ids: a number for each of the B clips, which with the seed determines its noise.
        max_frames: frames that a clip will have at most, which saves memory; None for no end.

    Raises:
        UserError: the settings do not fit the model, or it is not causal.
    """

    def __init__(
        self,
        model: FAR,
        sampling: SamplingConfig,
        size: tuple[int, int],
        clip_ids: Sequence[int] = (0,),
        max_frames: int | None = None,
    ) -> None:
        if not model.config.causal:
            raise UserError("a session needs a causal model; this one denoises all frames of a clip together")
        sampling.check(model.config)
        self._model, self._sampling, self._size, self._clips = model, sampling, size, list(clip_ids)
        self._device = model.patch_embedding.weight.device
        self._max_frames = max_frames
        self.start()

    @property
    def frame(self) -> int:
        """Index of the next frame."""
        return self._frame

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache."""
        return self._opened_denoiser().cache_bytes

    @property
    def sampling(self) -> SamplingConfig:
        """The settings. Steps, grid, seed and guidance can be set between frames.

        Raises:
            UserError: another setting differs, or the guidance needs other rows: from 1 to more, or back.
        """
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        sampling.check(self._model.config)
        before = self._sampling
        free = replace(
            sampling, frames=before.frames, steps=before.steps, grid=before.grid, seed=before.seed,
            guidance=before.guidance,
        )  # fmt: skip
        if free != before:
            raise UserError("of a session's settings only steps, grid, seed and guidance can be changed; start another")
        if (sampling.guidance > 1, sampling.guidance == -1) != (before.guidance > 1, before.guidance == -1):
            raise UserError(
                f"guidance: a session cannot go from {before.guidance:g} to {sampling.guidance:g}, whose keys and "
                "values it does not have; start another"
            )
        self._sampling = sampling
        self._opened_denoiser().set_schedule(self._schedule())

    @torch.no_grad()
    def start(self, frames: Tensor | None = None, classes: Tensor | None = None) -> None:
        """Begin anew after given frames.

        Args:
            frames: `[B, G, C, H, W]` their scaled latents; None for no frames.
            classes: `[B, G]` integers, the action that led to each or its clip's label; only for a model with actions
                or labels.

        Raises:
            UserError: shapes do not fit the model or the session.
        """
        config = self._model.config
        if frames is None:
            frames = torch.zeros(len(self._clips), 0, config.channels, *self._size)
        check_frames(config, frames)
        if frames.shape[0] != len(self._clips) or frames.shape[3:] != self._size:
            raise UserError(
                f"frames: {list(frames.shape)} are not those of {len(self._clips)} clips with latents of {self._size}"
            )
        given = frames.shape[1]
        rows = self._rows(classes, (len(self._clips), given)) if given else None
        self._denoiser: Denoiser | None = None  # made when it is needed: its cache is large
        self._history: list[FinishedFrame] = []
        self._frame = 0
        for number in range(given):
            self._finish(frames[:, number].to(self._device).float(), None if rows is None else rows[:, number])

    @torch.no_grad()
    def step(self, classes: Tensor | None = None) -> Tensor:
        """Predict the next frame.

        Args:
            classes: `[B]` integers, the action that leads to it or its clip's label; only for a model with actions or
                labels.

        Returns:
            `[B, C, H, W]` float32 scaled latents on the model's device.

        Raises:
            UserError: classes do not fit the model, the clips have `max_frames` already, or the latents are not finite.
        """
        if self._max_frames is not None and self._frame >= self._max_frames:
            raise UserError(f"frame {self._frame}: the session was made for clips of {self._max_frames} frames")
        rows = self._rows(classes, (len(self._clips),))
        denoiser = self._opened_denoiser()
        denoiser.begin_frame(self._history, self._frame, rows)
        if denoiser.history_frames is not None:
            del self._history[: -denoiser.history_frames]
        x = self._noise("sample")
        for step in range(self._sampling.steps):
            x = denoiser.denoise(x, step)
        check_finite(x, self._frame, self._sampling.guidance)
        self._finish(x, rows)
        return x

    def snapshot(self) -> Snapshot:
        """The present state."""
        return Snapshot(self._frame, tuple(self._history), self._opened_denoiser().state())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state of this session: the same actions then give the same frames."""
        self._frame, self._history = snapshot.frame, list(snapshot.history)
        self._opened_denoiser().restore(snapshot.denoiser)

    def _finish(self, clean: Tensor, rows: Tensor | None) -> None:
        noise = self._sampling.context_noise
        seen = noise * self._noise("context noise") + (1 - noise) * clean if noise else clean
        self._history.append(FinishedFrame(clean, seen, rows))
        self._frame += 1

    def _noise(self, purpose: str) -> Tensor:
        """`[B, C, H, W]` of the next frame."""
        shape = (self._model.config.channels, *self._size)
        seed = self._sampling.seed
        return torch.stack([frame_noise(seed, c, self._frame, shape, purpose) for c in self._clips]).to(self._device)

    def _schedule(self) -> Schedule:
        return Schedule(euler_sigmas(self._sampling.steps, self._sampling.grid), self._sampling, self._device)

    def _opened_denoiser(self) -> Denoiser:
        if self._denoiser is None:
            self._denoiser = self._new_denoiser()
        return self._denoiser

    def _new_denoiser(self) -> Denoiser:
        model, sampling, config = self._model, self._sampling, self._model.config
        schedule, copies, stride = self._schedule(), sampling.batch_copies, sampling.window_stride
        if not sampling.use_cache:
            return UncachedDenoiser(model, schedule, copies, stride)
        window, context = config.window, sampling.context_frames
        if self._max_frames is not None:
            window, context = levels(config, self._max_frames, stride, sampling.context_frames)
        weight = model.patch_embedding.weight
        cache = MultiLevelCache(
            config,
            copies * len(self._clips),
            self._size,
            window,
            context if config.context_patch else 0,
            weight.device,
            weight.dtype,
        )
        return CachedDenoiser(model, schedule, copies, cache, self._size, stride)

    def _rows(self, classes: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        config = self._model.config
        name = "labels" if config.labels else "actions"
        return class_rows(name, classes, config.actions or config.labels, shape, self._sampling.guidance, self._device)


def class_rows(
    name: str, classes: Tensor | None, count: int, shape: tuple[int, ...], guidance: float, device: torch.device
) -> Tensor | None:
    """The class indices of the model's batch, rows of the null class before conditioned ones; None without classes.

    Args:
        name: "actions" or "labels", for errors.
        classes: of `shape`.
        count: the model's number of classes, which is also the index of its null class.
        guidance: see `SamplingConfig`.

    Raises:
        UserError: classes are missing, not expected, of another shape or dtype, or out of range.
    """
    if count == 0:
        if classes is not None:
            raise UserError(f"{name}: the model was trained without {name}; leave them out")
        return None
    null = torch.full(shape, count, dtype=torch.int64, device=device)
    if guidance == -1:
        return null
    if classes is None:
        raise UserError(f"{name}: the model needs {name} of shape {list(shape)}; give them, or sample with guidance -1")
    if tuple(classes.shape) != shape:
        raise UserError(f"{name}: the shape is {list(classes.shape)}, needed is {list(shape)}")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise UserError(f"{name}: the dtype is {classes.dtype}, needed are integers (torch.int64)")
    if classes.min() < 0 or classes.max() >= count:
        raise UserError(
            f"{name}: classes {int(classes.min())} to {int(classes.max())} were given; the model has 0 to {count - 1}"
        )
    conditioned = classes.to(device, torch.int64)
    return torch.cat([null, conditioned]) if guidance > 1 else conditioned


def check_frames(config: FARConfig, frames: Tensor) -> None:
    """Raises UserError where the latents of given frames do not fit the model."""
    if frames.ndim != 5 or frames.shape[0] < 1 or frames.shape[2] != config.channels:
        expected = f"[clips, given frames, {config.channels}, height, width]"
        raise UserError(f"context: the shape is {list(frames.shape)}, needed is {expected}")
    largest = max(config.patch, config.context_patch)
    if frames.shape[3] % largest or frames.shape[4] % largest:
        raise UserError(f"context: {list(frames.shape[3:])} cannot be cut into patches of {largest}")


def check_finite(latents: Tensor, frame: int, guidance: float) -> None:
    """Raises UserError where predicted latents are not finite."""
    if not latents.isfinite().all():
        raise UserError(
            f"frame {frame}: the predicted latents are not finite at guidance {guidance:g}; lower the guidance, or "
            "take the weights of an earlier step"
        )
