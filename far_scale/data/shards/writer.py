"""Writing shard sets: one shard with its index, and a whole set with its manifest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from far_scale.data.shards.index import AdoptedIndex, LatentSums, ShardIndex, parse_index, statistics
from far_scale.data.shards.manifest import DTYPES, AutoencoderInfo, LatentDtype, Manifest
from far_scale.data.shards.records import KEY_PATTERN, MAX_JSON_BYTES, MAX_TENSORS_BYTES, ShardFormat
from far_scale.data.shards.sample import Sample, to_members
from far_scale.data.shards.stream import index_shard
from far_scale.data.shards.table import ShardEntry, ShardTable
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, sha256


def shard_name(number: int, shard_format: ShardFormat = "tar") -> str:
    """File name of shard `number`; MDS files have mosaicml-streaming's names."""
    return f"shard-{number:06d}.tar" if shard_format == "tar" else f"shard.{number:05d}.mds"


@dataclass(frozen=True)
class ShardSetSpec:
    """What all samples of a shard set share; the fields are the manifest's."""

    latent_shape: tuple[int, int, int]
    latent_dtype: LatentDtype
    autoencoder: AutoencoderInfo
    actions: int
    labels: int
    classes: tuple[str, ...] | None = None

    def check(self, sample: Sample) -> None:
        """Refuse a sample that does not fit the set.

        Raises:
            UserError: its key, latents, actions or label do not fit.
        """
        if not KEY_PATTERN.fullmatch(sample.key):
            raise UserError(f"{sample.source}: the key {sample.key!r} must be 1 to 80 of A-Z a-z 0-9 _ -")
        latents, actions, label = sample.latents, sample.actions, sample.label
        if tuple(latents.shape[1:]) != self.latent_shape or latents.dtype != DTYPES[self.latent_dtype]:
            raise UserError(
                f"{sample.source}: its latents are {list(latents.shape)} {latents.dtype}, "
                f"the set holds [F, *{self.latent_shape}] {self.latent_dtype}"
            )
        if not torch.isfinite(latents).all():
            raise UserError(
                f"{sample.source}: its latents are not finite in {self.latent_dtype}; "
                "look at the video, or store bfloat16, which has the wider range"
            )
        if (actions is not None and not self.actions) or (label is not None and not self.labels):
            raise UserError(f"{sample.source}: it has actions or a label, but the set holds none; drop them")
        if self.actions and (actions is None or actions.dtype != torch.int64 or actions.shape != latents.shape[:1]):
            raise UserError(f"{sample.source}: it has no action for each frame; give them, or encode with actions 0")
        if self.actions and actions is not None and not 0 <= int(actions.min()) <= int(actions.max()) < self.actions:
            raise UserError(
                f"{sample.source}: its actions go from {int(actions.min())} to {int(actions.max())}, "
                f"but the set has the actions 0 to {self.actions - 1}; raise the number of actions"
            )
        if self.labels and not (label is not None and 0 <= label < self.labels):
            raise UserError(
                f"{sample.source}: its label is {label}, but the set has the labels 0 to {self.labels - 1}; "
                "give it one of them, or raise the number of labels"
            )

    @staticmethod
    def check_members(sample: Sample, metadata: bytes, tensors: bytes) -> None:
        """Refuse a sample with members above the reader's limits.

        Raises:
            UserError: names the member and its size.
        """
        for member, size, limit, fix in (
            ("JSON", len(metadata), MAX_JSON_BYTES, "give the video a shorter name"),
            ("tensors", len(tensors), MAX_TENSORS_BYTES, "cut the video into shorter ones"),
        ):
            if size > limit:
                raise UserError(f"{sample.source[:80]}: its {member} would have {size} bytes, {limit} at most; {fix}")


def write_shard(folder: Path, number: int, samples: Iterable[Sample], spec: ShardSetSpec) -> None:
    """Write shard `number` and then its index, or nothing without samples; the same samples give the same bytes.

    Raises:
        UserError: a sample does not fit the set (no file is left), or the disk is full.
    """
    rest = iter(samples)
    if (first := next(rest, None)) is None:
        return
    path = folder / shard_name(number)
    sums, rates = LatentSums(spec.latent_shape[0]), set()

    def members() -> Iterator[tuple[str, bytes, bytes]]:
        for sample in itertools.chain([first], rest):
            spec.check(sample)
            member = to_members(sample)
            spec.check_members(sample, member["json"], member["safetensors"])
            yield sample.key, member["json"], member["safetensors"]
            sums.add(sample.latents)
            rates.add(sample.fps)

    with atomic_write(path) as temporary:
        write_tar(temporary, members())
        rows = index_shard(temporary)
        size, digest = temporary.stat().st_size, sha256(temporary)
    ShardIndex(
        file=path.name,
        bytes=size,
        sha256=digest,
        fps=rates.pop() if len(rates) == 1 else None,
        sums=sums.result(),
        samples=rows,
    ).write(folder)


def write_tar(path: Path, samples: Iterable[tuple[str, bytes, bytes]]) -> None:
    """Write samples (key, JSON, safetensors) to a tar; the same samples give the same bytes."""
    import webdataset

    # An open file, because the writer takes a name with a colon for a URL.
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0, compress=False) as tar:
        for key, metadata, tensors in samples:
            tar.write({"__key__": key, "json": metadata, "safetensors": tensors})


def finished_index(folder: Path, number: int, shard_format: ShardFormat = "tar") -> ShardIndex | None:
    """The index of a finished shard; None if either file is missing or incomplete (judged by its size)."""
    path = ShardIndex.path_of(folder, shard_name(number, shard_format))
    try:
        index = parse_index(path.read_bytes(), path, ShardIndex)
        return index if (folder / index.file).stat().st_size == index.bytes else None
    except (FileNotFoundError, UserError):
        return None


def build_manifest(folder: Path, indexes: list[ShardIndex], spec: ShardSetSpec) -> Manifest:
    """The manifest of the set with these indexes; mean and std come from their sums."""
    mean, std = statistics([index.sums for index in indexes])
    rates = {index.fps for index in indexes}
    return Manifest(
        latent_shape=spec.latent_shape,
        latent_dtype=spec.latent_dtype,
        mean=mean,
        std=std,
        autoencoder=spec.autoencoder,
        actions=spec.actions,
        labels=spec.labels,
        classes=spec.classes,
        fps=rates.pop() if len(rates) == 1 else None,
        shards=ShardTable(shard_entry(folder, index) for index in indexes),
    )


def shard_entry(folder: Path, index: ShardIndex | AdoptedIndex, source: str | None = None) -> ShardEntry:
    """The manifest's entry of a shard with a written index; `source` is the location of an adopted shard."""
    return ShardEntry(
        file=index.file,
        samples=len(index.samples),
        frames=sum(row.frames for row in index.samples),
        min_frames=min(row.frames for row in index.samples),
        bytes=index.bytes,
        sha256=index.sha256,
        index_sha256=sha256(ShardIndex.path_of(folder, index.file)),
        source=source,
    )


class ShardWriter:
    """Writes a new shard set, sample by sample; the manifest is written on close without an error.

    `with ShardWriter(folder, spec, samples_per_shard) as writer: writer.write(sample)`
    """

    def __init__(self, folder: str | Path, spec: ShardSetSpec, samples_per_shard: int) -> None:
        self.folder, self.spec, self.samples_per_shard = Path(folder), spec, samples_per_shard
        self._buffer: list[Sample] = []
        self._indexes: list[ShardIndex] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.glob("shard-*")):
            raise UserError(f"{self.folder}: there are shards here already; choose another folder, or remove them")

    def write(self, sample: Sample) -> None:
        """Add one sample; a shard is written when it is full."""
        self._buffer.append(sample)
        if len(self._buffer) == self.samples_per_shard:
            self._flush()

    def close(self) -> Manifest:
        """Write the remaining samples and the manifest.

        Raises:
            UserError: nothing was written.
        """
        if self._buffer:
            self._flush()
        if not self._indexes:
            raise UserError(f"{self.folder}: no sample was written, so there is no shard set")
        manifest = build_manifest(self.folder, self._indexes, self.spec)
        manifest.write(self.folder)
        return manifest

    def _flush(self) -> None:
        number = len(self._indexes)
        write_shard(self.folder, number, self._buffer, self.spec)
        index = finished_index(self.folder, number)
        assert index is not None
        self._indexes.append(index)
        self._buffer = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
