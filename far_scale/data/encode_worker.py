"""What one worker of `encode_videos` does: take a shard's number, read its videos, encode and write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from far_scale import autoencoder as autoencoders
from far_scale.data.manifest import DTYPES
from far_scale.data.sample import Sample
from far_scale.data.videos import read_video
from far_scale.data.writer import SetFacts, write_shard
from far_scale.errors import UserError

_FRAMES_AT_ONCE = 32  # fixed, since another batch size may round differently


@dataclass(frozen=True)
class Source:
    """A video to encode: its path, its path below the folder of all (as stored), its key, and its folder's class."""

    path: Path
    name: str
    key: str
    folder_label: int


@dataclass(frozen=True)
class Job:
    """All that a worker must know; the shards' numbers are handed out one by one."""

    out: Path
    sources: tuple[Source, ...]
    samples_per_shard: int
    facts: SetFacts
    autoencoder: str
    device: str
    size: int
    min_frames: int


class Worker:
    """Encodes shards of one job on one device, and says after each batch how many frames and whole videos it did."""

    def __init__(self, job: Job, device: str, progress: Callable[[int, int], None]) -> None:
        self._job, self._device, self._progress = job, device, progress
        self._autoencoder = autoencoders.load(job.autoencoder, device)

    def encode_shard(self, number: int) -> None:
        """Encode one shard.

        Raises:
            UserError: a video that cannot be used, or a full disk.
        """
        first = number * self._job.samples_per_shard
        sources = self._job.sources[first : first + self._job.samples_per_shard]
        write_shard(self._job.out, number, map(self._encode_video, sources), self._job.facts)

    def _encode_video(self, source: Source) -> Sample:
        facts, video = self._job.facts, read_video(source.path)
        count = len(video.frames)
        if count < self._job.min_frames:
            raise UserError(
                f"{source.path}: {count} frames, fewer than the {self._job.min_frames} of --min-frames; "
                "lower it, or take the video away"
            )
        latents = []
        with torch.inference_mode():
            for start in range(0, count, _FRAMES_AT_ONCE):
                part = fit(video.frames[start : start + _FRAMES_AT_ONCE], self._job.size)
                pixels = torch.from_numpy(part).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
                latents.append(self._autoencoder.encode(pixels).to(DTYPES[facts.latent_dtype]).cpu())
                self._progress(len(part), 0)
        self._progress(0, 1)
        label = video.label if video.label is not None else source.folder_label
        return Sample(
            key=source.key,
            latents=torch.cat(latents),
            actions=torch.from_numpy(video.actions) if facts.actions and video.actions is not None else None,
            label=label if facts.labels else None,
            fps=float(video.fps),
            source=source.name,
        )


def fit(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Frames `[F, H, W, 3]` as `[F, size, size, 3]`: the shorter side scaled to `size`, the centre cropped."""
    from PIL import Image

    height, width = frames.shape[1:3]
    if (height, width) == (size, size):
        return np.ascontiguousarray(frames)
    scaled = (max(size, round(width * size / min(height, width))), max(size, round(height * size / min(height, width))))
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    box = (left, top, left + size, top + size)
    images = (Image.fromarray(frame).resize(scaled, Image.Resampling.BILINEAR).crop(box) for frame in frames)
    return np.stack([np.asarray(image) for image in images])
