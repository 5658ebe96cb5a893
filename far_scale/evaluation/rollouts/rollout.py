"""A roll-out from given frames to pictures and figures, in memory that the number of frames hardly changes.

Of a clip there are its latents, the KV cache and the recorded truth as bytes; in decoded pixels there is one frame at
a time, which is judged, drawn and forgotten.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelMetadata
from far_scale.data.video.videos import write_mp4
from far_scale.evaluation.rollouts.episodes import Episodes, decode_frame
from far_scale.evaluation.rollouts.psnr_ssim import MetricAccumulator
from far_scale.evaluation.rollouts.video_grid import ContactSheet, GridSpec, Pixels, VideoGrid, to_uint8
from far_scale.model import FAR
from far_scale.sampling.sampler import cache_bytes, predict_frames
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write
from far_scale.utils.tensor_files import save_tensors

EPISODES_PER_BATCH = 8  # through the model; the first of them are in the pictures, all count in the figures


@dataclass(frozen=True)
class RolloutFrame:
    """One frame of some clips, given or new."""

    index: int
    latents: Tensor  # [b, C, H, W], scaled
    pixels: Tensor  # [b, 3, h, w] in 0..1
    truth: Tensor | None  # as pixels


@dataclass(frozen=True)
class Rollout:
    """What is to be sampled, ready to run; `evaluate.prepare` makes it and says what is in it."""

    model: FAR
    card: ModelMetadata
    autoencoder: Autoencoder
    data: Episodes
    frames: int
    steps: int
    guidance: float
    seed: int
    context_noise: float = 0.0

    @property
    def given(self) -> int:
        """Frames given of each episode."""
        return self.data.context.shape[1]

    @property
    def truth_frames(self) -> int:
        """Of how many new frames the truth is known. Of none where none was given: then nothing has to follow."""
        return len(self.data.truth) - self.given if self.given else 0

    def summary(self) -> str:
        """One line that says what will be sampled, and in how much memory."""
        config, clips = self.model.config, len(self.data.keys)
        at_once = min(clips, EPISODES_PER_BATCH)
        _, height, width = self.card.latent_shape
        cache = cache_bytes(self.model, at_once, self.given + self.frames, (height, width), self.guidance)
        context = f"context patch {config.context_patch}" if config.context_patch else "no context"
        return (
            f"{config.layers} layers, {config.heads} heads, window {config.window}, {context}: "
            f"{clips} clips" + (f", {at_once} at once" if at_once < clips else "") + f", {self.given} frames given "
            f"+ {self.frames} new, {self.steps} steps, guidance {self.guidance:g}, "
            + (f"context noise {self.context_noise:g}, " if self.context_noise else "")
            + f"cache {cache / 1e6:.1f} MB"
        )

    def run(self, video: Path, sheet: Path, latents: Path | None = None) -> dict[str, Any]:
        """Sample all frames; write the MP4, the PNG and, where it is wanted, a safetensors file of the new latents.

        Each file is written atomically. The figures are over those new frames whose truth is known.

        Returns:
            The settings, the episodes' keys, what the truth is ("recorded pixels", "decoded latents" or None),
            `truth_frames` and, with a truth, `prediction` and `repeat_last` (see `metrics.Comparison`).
        """
        judge = MetricAccumulator(self.truth_frames)
        kept: list[Tensor] = []
        for first in range(0, len(self.data.keys), EPISODES_PER_BATCH):
            clips = slice(first, min(first + EPISODES_PER_BATCH, len(self.data.keys)))
            new: list[Tensor] = []
            frames = self._judged(clips, judge, None if latents is None else new)
            if first == 0:
                pictures = (
                    (f.index, None if f.truth is None else to_uint8(f.truth), to_uint8(f.pixels)) for f in frames
                )
                write_pictures(self.shown(clips.stop), pictures, self.data.fps, video, sheet)
            deque(frames, maxlen=0)
            kept.extend([torch.stack(new, dim=1)] if new else [])
        if latents is not None:
            with atomic_write(latents) as beside:
                save_tensors({"latents": torch.cat(kept)}, beside, {"episodes": json.dumps(self.data.keys)})
        report = {
            "episodes": self.data.keys,
            "given": self.given,
            "frames": self.frames,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "model": self.card.training.model_dump(),
            "truth": self.data.truth.kind if self.truth_frames else None,
            "truth_frames": self.truth_frames,
        }
        if self.context_noise:
            report["context_noise"] = self.context_noise
        return report | judge.comparison() if self.truth_frames else report

    def frames_of(self, clips: slice, progress: bool = True) -> Iterator[RolloutFrame]:
        """Every frame of some clips, the given ones first; what a clip becomes does not depend on the others.

        Raises:
            UserError: the model gives numbers that are not finite.
        """
        data = self.data
        predicted = predict_frames(
            self.model,
            data.context[clips],
            self.frames,
            self.steps,
            self.guidance,
            actions=None if data.actions is None else data.actions[clips],
            labels=None if data.labels is None else data.labels[clips],
            seed=self.seed,
            clip_ids=range(len(data.keys))[clips],
            progress=progress,
            context_noise=self.context_noise,
        )
        first = next(predicted)  # what does not fit the model is refused now, before anything is written
        given = (data.context[clips, index] for index in range(self.given))
        for index, latents in enumerate(itertools.chain(given, [first], predicted)):
            if not latents.isfinite().all():
                raise UserError(
                    f"frame {index}: the model gives numbers that are not finite at guidance {self.guidance:g}; lower "
                    "the guidance, or take the weights of an earlier step"
                )
            pixels = decode_frame(self.autoencoder, self.card.scaling.restore(latents))
            known = index < self.given + self.truth_frames
            yield RolloutFrame(index, latents, pixels, data.truth.frame(clips, index) if known else None)

    def _judged(self, clips: slice, judge: MetricAccumulator, new: list[Tensor] | None) -> Iterator[RolloutFrame]:
        """Every frame of some clips, counted by `judge`; the latents of new ones are put into `new`."""
        last_given = self.data.truth.frame(clips, self.given - 1) if self.given else None
        for frame in self.frames_of(clips):
            if frame.index >= self.given:
                if frame.truth is not None and last_given is not None:
                    judge.add(frame.index - self.given, frame.pixels, frame.truth, last_given)
                if new is not None:
                    new.append(frame.latents.cpu())
            yield frame

    def shown(self, episodes: int) -> GridSpec:
        """What a picture of the first `episodes` clips shows."""
        _, height, width = self.card.latent_shape
        return GridSpec(
            episodes=episodes,
            frames=self.given + self.frames,
            given=self.given,
            window=self.model.config.window,
            size=(height * self.autoencoder.downsample, width * self.autoencoder.downsample),
            truth=self.truth_frames > 0,
        )


def write_pictures(
    shown: GridSpec, frames: Iterable[tuple[int, Pixels | None, Pixels]], fps: float, video: Path, sheet: Path
) -> None:
    """Write the MP4 and the PNG of frames that come one by one: index, truth where it is known, and prediction, both
    uint8 `[B, H, W, 3]`. Each file is written atomically."""
    some_frames, film = ContactSheet(shown), VideoGrid(shown)

    def pictures() -> Iterator[Pixels]:
        for frame in frames:
            some_frames.add(*frame)
            yield film.picture(*frame)

    write_mp4(video, pictures(), fps)
    some_frames.write(sheet)
