"""What one worker of `encode_videos` does: take a shard's number, read its videos, encode and write them.

A video is read, scaled and cropped in a thread while the autoencoder encodes the one before: decoding and scaling let
Python's lock go. Latents that were extracted before are taken as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from far_scale import autoencoder as autoencoders
from far_scale.data.encode.ahead import ahead
from far_scale.data.encode.fingerprints import SourcePrint, prints_of_shard, take_print, write_prints
from far_scale.data.encode.latent_files import LATENTS_SUFFIX, read_latents
from far_scale.data.shards.manifest import DTYPES
from far_scale.data.shards.rejects import Reject, rejects_of_shard, write_rejects
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.writer import ShardSetSpec, write_shard
from far_scale.data.video.pictures import Framing, to_pixels
from far_scale.data.video.sources import Source
from far_scale.data.video.videos import DEFAULT_FPS, BadVideo, Video, read_actions, read_label, read_video
from far_scale.utils.errors import UserError

Precision = Literal["fp32", "bf16"]
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FRAMES_AT_ONCE = 32  # fixed, since another batch size may round differently


@dataclass(frozen=True)
class Job:
    """All that a worker must know; the shards' numbers and their sources are handed out one by one.

    `named_by_folder`: the classes have the names of the videos' folders.
    """

    out: Path
    sources: tuple[Source, ...]
    samples_per_shard: int
    facts: ShardSetSpec
    autoencoder: str
    device: str
    framing: Framing
    min_frames: int
    precision: Precision
    named_by_folder: bool = False

    @property
    def shards(self) -> int:
        """How many shards there are to make."""
        return -(-len(self.sources) // self.samples_per_shard)

    def sources_of(self, number: int) -> tuple[Source, ...]:
        """The videos of shard `number`, among them those that will be rejected."""
        first = number * self.samples_per_shard
        return self.sources[first : first + self.samples_per_shard]


@dataclass(frozen=True)
class _Read:
    """What was read of one source: pictures (`far_scale.data.video.pictures.Frames`) or latents [F, C, H, W]."""

    source: Source
    frames: Tensor
    actions: Tensor | None
    label: int | None
    fps: float


class Worker:
    """Encodes shards of one job on one device, and says after each batch how many frames and whole videos it did."""

    def __init__(self, job: Job, device: str, progress: Callable[[int, int], None]) -> None:
        self._job, self._device, self._progress = job, device, progress
        self._last: tuple[Path, Video] | None = None  # a video's mirrored sample comes right after its own

    @functools.cached_property
    def _autoencoder(self) -> autoencoders.Autoencoder:  # not loaded where there are only latents
        return autoencoders.load(self._job.autoencoder, self._device, _PRECISIONS[self._job.precision])

    def encode_shard(self, number: int, sources: Iterable[Source]) -> list[Reject]:
        """Encode one shard of these sources; write down what their files were, and which of them were rejected.

        Raises:
            UserError: a file that cannot be read, or a full disk.
        """
        job, rejects = self._job, list[Reject]()
        write_shard(job.out, number, self._samples(number, sources, rejects), job.facts)
        write_rejects(rejects_of_shard(job.out, number), rejects)
        return rejects

    def _samples(self, number: int, sources: Iterable[Source], rejects: list[Reject]) -> Iterator[Sample]:
        prints: list[SourcePrint] = []

        def read() -> Iterator[_Read | Reject]:
            for source in sources:
                prints.append(take_print(source))  # before it is read: what changes from now on is found
                try:
                    for path in (source.path, source.actions):
                        if path is not None and not path.is_file():
                            what = (
                                "is no plain file; put one there"
                                if path.exists()
                                else "there is no such file; put it back"
                            )
                            raise BadVideo(f"{path}: {what}, or leave the video out")
                    one = self._read_latents(source) if source.path.suffix == LATENTS_SUFFIX else self._read(source)
                    if self._job.named_by_folder and one.label not in (None, source.folder_label):
                        prints[-1] = prints[-1]._replace(relabelled=True)
                    yield one
                except BadVideo as error:
                    yield _reject(source, error)

        with contextlib.closing(ahead(read())) as found:
            for one in found:
                if isinstance(one, Reject):
                    rejects.append(one)
                else:
                    sample = self._sample(one)
                    try:
                        self._job.facts.check(sample)
                    except UserError as error:
                        rejects.append(_reject(one.source, error))
                    else:
                        yield sample
                self._progress(0, 1)
        write_prints(prints_of_shard(self._job.out, number), prints)  # before the shard's index, which ends the shard

    def _read(self, source: Source) -> _Read:
        framing, actions = self._job.framing, self._job.facts.actions > 0
        if self._last is None or self._last[0] != source.path:
            self._last = None  # frees its memory first
            video = read_video(source.path, actions, source.actions, framing.stride, framing.scale)
            self._last = source.path, video
        video = self._last[1]
        self._check_length(source, len(video.frames))
        frames = framing.cut(video.frames, source.key)
        if source.flip:
            frames = frames[:, :, ::-1]
        pictures = torch.from_numpy(np.ascontiguousarray(frames))
        if self._device.startswith("cuda"):
            pictures = pictures.pin_memory()  # so that the copy to the GPU waits for nothing
        kept = None if video.actions is None else torch.from_numpy(video.actions)
        return _Read(source, pictures, kept, self._label(source, video.label), float(video.fps))

    def _read_latents(self, source: Source) -> _Read:
        facts, stride = self._job.facts, self._job.framing.stride
        latents = read_latents(source.path, facts.latent_shape, facts.latent_dtype)
        actions = None
        if facts.actions and source.actions is not None:
            actions = torch.from_numpy(read_actions(source.actions, len(latents)))[::stride]
        self._check_length(source, len(latents[::stride]))
        return _Read(source, latents[::stride], actions, self._label(source, None), DEFAULT_FPS / stride)

    def _label(self, source: Source, own: int | None) -> int | None:
        """The class of a source: of the list, else the video's own, else that beside it, else its folder's.

        Raises:
            BadVideo: it has none.
        """
        if not self._job.facts.labels:
            return None
        if source.label is not None:
            return source.label
        if own is None and source.actions is not None and source.label_file == source.actions:
            own = read_label(source.actions)
        if own is None and source.folder_label is None:
            raise BadVideo(f"{source.path}: has no label, and its folder's name is none of the classes; give it one")
        return own if own is not None else source.folder_label

    def _check_length(self, source: Source, frames: int) -> None:
        if frames < self._job.min_frames:
            raise BadVideo(f"{source.path}: {frames} frames, fewer than the {self._job.min_frames} of --min-frames")

    def _sample(self, read: _Read) -> Sample:
        source = read.source
        if source.path.suffix == LATENTS_SUFFIX:
            latents = read.frames
            self._progress(len(latents), 0)
        else:
            latents = self._encode(read.frames)
        return Sample(
            key=source.key,
            latents=latents,
            actions=read.actions,
            label=read.label,
            fps=read.fps,
            source=source.name,
        )

    def _encode(self, frames: Tensor) -> Tensor:
        """The latents [F, C, H, W] of pictures, on the CPU."""
        latents = []
        with torch.inference_mode():
            for start in range(0, len(frames), _FRAMES_AT_ONCE):
                part = frames[start : start + _FRAMES_AT_ONCE].to(self._device, non_blocking=True)
                latents.append(self._autoencoder.encode(to_pixels(part)).to(DTYPES[self._job.facts.latent_dtype]))
                self._progress(len(part), 0)
            return torch.cat(latents).cpu()  # only here it waits for a GPU


def _reject(source: Source, error: UserError) -> Reject:
    """A reject for what is wrong with a source, said without its name."""
    reason = str(error).removeprefix(f"{source.path}: ").removeprefix(f"{source.name}: ")
    return Reject(source.name, source.key, reason)
