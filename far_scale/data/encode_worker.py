"""What one worker of `encode_videos` does: take a shard's number, read its videos, encode and write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from far_scale import autoencoder as autoencoders
from far_scale.data.manifest import DTYPES
from far_scale.data.rejects import Reject, rejects_of_shard, write_rejects
from far_scale.data.sample import Sample
from far_scale.data.sources import Source
from far_scale.data.videos import BadVideo, read_actions, read_video
from far_scale.data.writer import SetFacts, write_shard

_FRAMES_AT_ONCE = 32  # fixed, since another batch size may round differently


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

    @property
    def shards(self) -> int:
        """How many shards there are to make."""
        return -(-len(self.sources) // self.samples_per_shard)

    def sources_of(self, number: int) -> tuple[Source, ...]:
        """The videos of shard `number`, among them those that will be rejected."""
        first = number * self.samples_per_shard
        return self.sources[first : first + self.samples_per_shard]


class Worker:
    """Encodes shards of one job on one device, and says after each batch how many frames and whole videos it did."""

    def __init__(self, job: Job, device: str, progress: Callable[[int, int], None]) -> None:
        self._job, self._device, self._progress = job, device, progress
        self._autoencoder = autoencoders.load(job.autoencoder, device)

    def encode_shard(self, number: int) -> list[Reject]:
        """Encode one shard, and write down which of its videos were rejected.

        Raises:
            UserError: a video that does not fit into the set, or a full disk.
        """
        job, rejects = self._job, list[Reject]()
        write_shard(job.out, number, self._samples(job.sources_of(number), rejects), job.facts)
        write_rejects(rejects_of_shard(job.out, number), rejects)
        return rejects

    def _samples(self, sources: Iterable[Source], rejects: list[Reject]) -> Iterator[Sample]:
        for source in sources:
            try:
                sample = self._encode_video(source)
            except BadVideo as error:
                rejects.append(Reject(source.name, source.key, str(error).removeprefix(f"{source.path}: ")))
            else:
                yield sample
            self._progress(0, 1)

    def _encode_video(self, source: Source) -> Sample:
        facts, video = self._job.facts, read_video(source.path)
        count = len(video.frames)
        if count < self._job.min_frames:
            raise BadVideo(f"{source.path}: {count} frames, fewer than the {self._job.min_frames} of --min-frames")
        actions = video.actions if source.actions is None else read_actions(source.actions, count)
        latents = []
        with torch.inference_mode():
            for start in range(0, count, _FRAMES_AT_ONCE):
                part = fit(video.frames[start : start + _FRAMES_AT_ONCE], self._job.size)
                pixels = torch.from_numpy(part).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
                latents.append(self._autoencoder.encode(pixels).to(DTYPES[facts.latent_dtype]).cpu())
                self._progress(len(part), 0)
        given = source.label if source.label is not None else video.label
        label = given if given is not None else source.folder_label
        return Sample(
            key=source.key,
            latents=torch.cat(latents),
            actions=torch.from_numpy(actions) if facts.actions and actions is not None else None,
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
