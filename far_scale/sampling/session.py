"""Stand-in for the session, slow and simple: every step runs all frames through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from far_scale.model import FAR
from far_scale.sampling.config import TRAIN_TIMESTEPS, SamplingConfig
from far_scale.sampling.denoisers import UncachedDenoiser
from far_scale.sampling.sampler import _condition_rows, _guided, cache_bytes, euler_sigmas, frame_noise
from far_scale.train.flow_matching import CLEAN
from far_scale.utils.errors import UserError


@dataclass(frozen=True)
class Snapshot:
    """The state of a session."""

    clean: Tensor
    classes: Tensor | None


class Session:
    """Predicts frames one at a time, each from an action or label that is given with it."""

    def __init__(
        self, model: FAR, sampling: SamplingConfig, size: tuple[int, int], clip_ids: Sequence[int] = (0,)
    ) -> None:
        self.sampling = sampling
        self._model, self._size, self._clips = model, size, list(clip_ids)
        self._device = model.patch_embedding.weight.device
        self.start()

    @property
    def frame(self) -> int:
        return self._clean.shape[1]

    @property
    def cache_bytes(self) -> int:
        frames = min(self.frame + 1, self._model.config.window)
        return cache_bytes(self._model, len(self._clips), frames, self._size, self.sampling.guidance)

    def start(self, frames: Tensor | None = None, classes: Tensor | None = None) -> None:
        if frames is None:
            frames = torch.empty(len(self._clips), 0, self._model.config.channels, *self._size)
        self._clean = frames.to(self._device, torch.float32)
        self._classes = classes
        if classes is None and (self._model.config.actions or self._model.config.labels):
            self._classes = torch.empty(len(self._clips), 0, dtype=torch.int64)

    def snapshot(self) -> Snapshot:
        return Snapshot(self._clean, self._classes)

    def restore(self, snapshot: Snapshot) -> None:
        self._clean, self._classes = snapshot.clean, snapshot.classes

    @torch.no_grad()
    def step(self, classes: Tensor | None = None) -> Tensor:
        config, sampling = self._model.config, self.sampling
        SamplingConfig(1, sampling.steps, sampling.guidance, sampling.seed, sampling.context_noise).check(config)
        all_classes = None
        if classes is not None and self._classes is not None:
            all_classes = torch.cat([self._classes, classes[:, None].long()], dim=1)
        kind, count = ("actions", config.actions) if config.actions else ("labels", config.labels)
        shape = (len(self._clips), self.frame + 1)
        rows = _condition_rows(kind, all_classes, count, shape, sampling.guidance, self._device)
        sigmas = euler_sigmas(sampling.steps)
        timesteps = (sigmas[:-1] * TRAIN_TIMESTEPS).to(self._device)
        noise_level, frame_shape = sampling.context_noise, (config.channels, *self._size)

        def noise(frame: int, purpose: str) -> Tensor:
            drawn = [frame_noise(sampling.seed, clip, frame, frame_shape, purpose) for clip in self._clips]
            return torch.stack(drawn).to(self._device)

        seen = self._clean
        if noise_level:
            noises = [noise(frame, "context noise") for frame in range(self.frame)]
            seen = noise_level * torch.stack(noises, 1) + (1 - noise_level) * seen if noises else seen
        seen_timestep = TRAIN_TIMESTEPS * noise_level if noise_level else CLEAN
        denoiser = UncachedDenoiser(self._model, timesteps, sampling.batch_copies, seen_timestep)
        actions, labels = (rows, None) if config.actions else (None, None if rows is None else rows[:, -1])
        denoiser.begin_frame(self._clean, seen, actions, labels)
        x = noise(self.frame, "sample")
        for step, sigma_step in enumerate((sigmas[1:] - sigmas[:-1]).tolist()):
            x = x + sigma_step * _guided(denoiser.velocity(x, step), sampling.guidance)
        if not x.isfinite().all():
            raise UserError(
                f"frame {self.frame}: the predicted latents are not finite at guidance {sampling.guidance:g}; lower "
                "the guidance, or take the weights of an earlier step"
            )
        self._clean = torch.cat([self._clean, x[:, None]], dim=1)
        self._classes = all_classes
        return x
