"""A rollout: frames sampled after given ones, scored against the truth and drawn, one frame at a time.

Memory hardly grows with the number of frames. Of a whole clip only the latents, the KV cache and the recorded truth
as bytes are held; a frame's decoded pixels are scored, drawn and dropped.
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
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.sampler import cache_bytes, predict_frames
from far_scale.utils.io import atomic_write
from far_scale.utils.tensor_files import save_tensors

EPISODES_PER_BATCH = 8  # sampled together; only the first batch is drawn, all of them are scored


@dataclass(frozen=True)
class RolloutFrame:
    """One frame of some clips, given or new.

    Attributes:
        index: in the clip.
        latents: `[b, C, H, W]`, scaled.
        pixels: `[b, 3, h, w]` in 0..1, the decoded latents.
        truth: the true frame as pixels, where it is known.
        baseline: of a new frame with a truth, the last given frame's true pixels; None of others.
    """

    index: int
    latents: Tensor
    pixels: Tensor
    truth: Tensor | None
    baseline: Tensor | None


@dataclass(frozen=True)
class Rollout:
    """Model, episodes and settings of a rollout; `runner.prepare_rollout` makes it.

    Attributes:
        model: its device and dtype are those of the computation.
        metadata: of the model.
        autoencoder: the model's.
        episodes: what is given and, as far as it is known, what really followed.
        sampling: the settings.
    """

    model: FAR
    metadata: ModelMetadata
    autoencoder: Autoencoder
    episodes: Episodes
    sampling: SamplingConfig

    @property
    def given(self) -> int:
        """Frames given of each episode."""
        return self.episodes.context.shape[1]

    @property
    def truth_frames(self) -> int:
        """New frames with a known truth. 0 where no frame is given: then any continuation is right."""
        return len(self.episodes.truth) - self.given if self.given else 0

    def settings(self) -> dict[str, Any]:
        """The settings as reports name them."""
        sampling = self.sampling
        return {
            "given": self.given,
            "frames": sampling.frames,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "seed": sampling.seed,
        }

    def truth_settings(self) -> dict[str, Any]:
        """What the truth is, as reports name it."""
        kind = self.episodes.truth.kind if self.truth_frames else None
        return {"truth": kind, "truth_frames": self.truth_frames}

    def summary(self) -> str:
        """What will be sampled and the memory of its cache, in one line."""
        config, sampling, clips = self.model.config, self.sampling, len(self.episodes.keys)
        batch = min(clips, EPISODES_PER_BATCH)
        _, height, width = self.metadata.latent_shape
        cache = cache_bytes(self.model, sampling, batch, self.given + sampling.frames, (height, width))
        context = f"context patch {config.context_patch}" if config.context_patch else "no context"
        return (
            f"{config.layers} layers, {config.heads} heads, window {config.window}, {context}: "
            f"{clips} clips" + (f", {batch} at once" if batch < clips else "") + f", {self.given} frames given "
            f"+ {sampling.frames} new, {sampling.steps} steps, guidance {sampling.guidance:g}, "
            + (f"context noise {sampling.context_noise:g}, " if sampling.context_noise else "")
            + f"cache {cache / 1e6:.1f} MB"
        )

    def frames(self, clips: slice, progress: bool = True) -> Iterator[RolloutFrame]:
        """Sample some clips: every frame, given ones first. A clip does not depend on the others.

        Raises:
            UserError: settings or conditions that do not fit the model, or frames that are not finite.
        """
        episodes = self.episodes
        predicted = predict_frames(
            self.model,
            episodes.context[clips],
            self.sampling,
            actions=None if episodes.actions is None else episodes.actions[clips],
            labels=None if episodes.labels is None else episodes.labels[clips],
            clip_ids=range(len(episodes.keys))[clips],
            progress=progress,
        )
        first = next(predicted)  # errors come now, before a caller has written anything
        given = (episodes.context[clips, index] for index in range(self.given))
        last_given: Tensor | None = None
        for index, latents in enumerate(itertools.chain(given, [first], predicted)):
            pixels = decode_frame(self.autoencoder, self.metadata.scaling.restore(latents))
            truth = episodes.truth.frame(clips, index) if index < self.given + self.truth_frames else None
            if index < self.given:
                last_given = truth
            baseline = last_given if index >= self.given and truth is not None else None
            yield RolloutFrame(index, latents, pixels, truth, baseline)

    def run(self, video: Path, contact_sheet: Path, latents: Path | None = None) -> dict[str, Any]:
        """Sample all frames; write the MP4, the PNG and, if asked for, a safetensors file of the new latents.

        Each file is written atomically. The metrics are over the new frames with a known truth.

        Returns:
            The settings, the episodes' keys, the kind of truth ("recorded pixels", "decoded latents" or None),
            `truth_frames` and, with a truth, `prediction` and `repeat_last` (see `psnr_ssim.Comparison`).
        """
        metrics = MetricAccumulator(self.truth_frames)
        all_latents: list[Tensor] = []
        for first in range(0, len(self.episodes.keys), EPISODES_PER_BATCH):
            clips = slice(first, min(first + EPISODES_PER_BATCH, len(self.episodes.keys)))
            new_latents: list[Tensor] = []
            frames = self._scored_frames(clips, metrics, None if latents is None else new_latents)
            if first == 0:
                pictures = (
                    (f.index, None if f.truth is None else to_uint8(f.truth), to_uint8(f.pixels)) for f in frames
                )
                write_pictures(self.grid_spec(clips.stop), pictures, self.episodes.fps, video, contact_sheet)
            deque(frames, maxlen=0)
            all_latents.extend([torch.stack(new_latents, dim=1)] if new_latents else [])
        if latents is not None:
            with atomic_write(latents) as temporary:
                save_tensors(
                    {"latents": torch.cat(all_latents)}, temporary, {"episodes": json.dumps(self.episodes.keys)}
                )
        report = {
            "episodes": self.episodes.keys,
            **self.settings(),
            "model": self.metadata.training.model_dump(),
            **self.truth_settings(),
        }
        if self.sampling.context_noise:
            report["context_noise"] = self.sampling.context_noise
        return report | metrics.comparison() if self.truth_frames else report

    def _scored_frames(
        self, clips: slice, metrics: MetricAccumulator, new_latents: list[Tensor] | None
    ) -> Iterator[RolloutFrame]:
        """The frames of some clips; scores and, if asked for, latents of new ones are collected on the way."""
        for frame in self.frames(clips):
            if frame.truth is not None and frame.baseline is not None:
                metrics.add(frame.index - self.given, frame.pixels, frame.truth, frame.baseline)
            if frame.index >= self.given and new_latents is not None:
                new_latents.append(frame.latents.cpu())
            yield frame

    def grid_spec(self, episodes: int) -> GridSpec:
        """The layout of pictures of the first `episodes` clips."""
        _, height, width = self.metadata.latent_shape
        return GridSpec(
            episodes=episodes,
            frames=self.given + self.sampling.frames,
            given=self.given,
            window=self.model.config.window,
            size=(height * self.autoencoder.downsample, width * self.autoencoder.downsample),
            truth=self.truth_frames > 0,
        )


def write_pictures(
    grid: GridSpec,
    frames: Iterable[tuple[int, Pixels | None, Pixels]],
    fps: float,
    video: Path,
    contact_sheet: Path,
) -> None:
    """Write an MP4 and a PNG, each atomically, of frames that come one by one.

    Args:
        grid: layout of the pictures.
        frames: index, truth where it is known, and prediction, both uint8 `[B, H, W, 3]`.
    """
    sheet, video_grid = ContactSheet(grid), VideoGrid(grid)

    def pictures() -> Iterator[Pixels]:
        for frame in frames:
            sheet.add(*frame)
            yield video_grid.picture(*frame)

    write_mp4(video, pictures(), fps)
    sheet.write(contact_sheet)
