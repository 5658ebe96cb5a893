"""One worker of an encoding: reads the videos of a shard, encodes them and writes the shard.

The next video is read, resized and cropped in a thread while the autoencoder encodes the current one: decoding and
resizing release Python's lock. Extracted latents are stored as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from far_scale import autoencoder as autoencoders
from far_scale.data.encode.fingerprints import (
    SourceFingerprint,
    fingerprint_source,
    shard_fingerprints_path,
    write_fingerprints,
)
from far_scale.data.encode.job import EncodingJob
from far_scale.data.encode.source_reader import LATENTS_SUFFIX, SourceData, SourceReader
from far_scale.data.shards.manifest import DTYPES
from far_scale.data.shards.rejects import Reject, rejects_of_shard, write_rejects
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.writer import write_shard
from far_scale.data.video.containers import BadVideo
from far_scale.data.video.sources import Source
from far_scale.data.video.transforms import to_pixels
from far_scale.utils.errors import UserError
from far_scale.utils.look_ahead import LookAhead

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BATCH_FRAMES = 32  # fixed, since another batch size may round differently


class Worker:
    """Encodes shards of one job on one device.

    Args:
        progress: called with the numbers of frames and of videos that were completed since the last call.
    """

    def __init__(self, job: EncodingJob, device: str, progress: Callable[[int, int], None]) -> None:
        self._job, self._device, self._progress = job, device, progress
        self._reader = SourceReader(job, pin_memory=device.startswith("cuda"))

    @functools.cached_property
    def _autoencoder(self) -> autoencoders.Autoencoder:  # not loaded if there are only latents
        return autoencoders.load(self._job.autoencoder, self._device, _DTYPES[self._job.precision])

    def encode_shard(self, shard: int, sources: Iterable[Source]) -> list[Reject]:
        """Encode these sources to a shard, write their fingerprints and rejects, and return the rejects.

        Raises:
            UserError: a file that cannot be read, or a full disk.
        """
        rejects: list[Reject] = []
        write_shard(self._job.out, shard, self._encode_sources(shard, sources, rejects), self._job.facts)
        write_rejects(rejects_of_shard(self._job.out, shard), rejects)
        return rejects

    def _encode_sources(self, shard: int, sources: Iterable[Source], rejects: list[Reject]) -> Iterator[Sample]:
        fingerprints: list[SourceFingerprint] = []
        with LookAhead(self._read_sources(sources, fingerprints), name="read-ahead") as results:
            for result in results:
                if isinstance(result, Reject):
                    rejects.append(result)
                else:
                    sample = self._make_sample(result)
                    try:
                        self._job.facts.check(sample)
                    except UserError as error:
                        rejects.append(_make_reject(result.source, error))
                    else:
                        yield sample
                self._progress(0, 1)
        # before the shard's index, which completes the shard
        write_fingerprints(shard_fingerprints_path(self._job.out, shard), fingerprints)

    def _read_sources(
        self, sources: Iterable[Source], fingerprints: list[SourceFingerprint]
    ) -> Iterator[SourceData | Reject]:
        for source in sources:
            fingerprints.append(fingerprint_source(source))  # before reading, to detect a change meanwhile
            try:
                data = self._reader.read(source)
                if self._job.classes_from_folders and data.label not in (None, source.folder_label):
                    fingerprints[-1] = fingerprints[-1]._replace(relabelled=True)
                yield data
            except BadVideo as error:
                yield _make_reject(source, error)

    def _make_sample(self, data: SourceData) -> Sample:
        source = data.source
        if source.path.suffix == LATENTS_SUFFIX:
            latents = data.data
            self._progress(len(latents), 0)
        else:
            latents = self._encode(data.data)
        return Sample(
            key=source.key,
            latents=latents,
            actions=data.actions,
            label=data.label,
            fps=data.fps,
            source=source.name,
        )

    def _encode(self, frames: Tensor) -> Tensor:
        """Encode frames to latents [F, C, H, W] on the CPU."""
        latents = []
        with torch.inference_mode():
            for start in range(0, len(frames), _BATCH_FRAMES):
                batch = frames[start : start + _BATCH_FRAMES].to(self._device, non_blocking=True)
                latents.append(self._autoencoder.encode(to_pixels(batch)).to(DTYPES[self._job.facts.latent_dtype]))
                self._progress(len(batch), 0)
            return torch.cat(latents).cpu()  # the only synchronization with a GPU


def _make_reject(source: Source, error: UserError) -> Reject:
    """A reject with the error as its reason, without the name of the source."""
    reason = str(error).removeprefix(f"{source.path}: ").removeprefix(f"{source.name}: ")
    return Reject(source.name, source.key, reason)
