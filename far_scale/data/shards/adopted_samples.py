"""The samples of adopted shards: listing them, and reading any frames of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from far_scale.data.shards.adopted import AXES, MAX_NAME, AdoptedRow, Adoption, Part
from far_scale.data.shards.adopted_mds import check_encodings, read_mds
from far_scale.data.shards.adopted_tar import AdoptedTarReader, refuse_compressed
from far_scale.data.shards.adopted_values import (
    Members,
    find_member,
    read_json_value,
    read_label,
    read_number,
    read_text,
)
from far_scale.data.shards.errors import BadShardError, Mismatch, UnexpectedMemberError
from far_scale.data.shards.index import ChannelSums, LatentSums
from far_scale.data.shards.manifest import DTYPES, LatentDtype, Manifest
from far_scale.data.shards.members import Member
from far_scale.data.shards.sample import Read, Sample, read_at
from far_scale.data.shards.tensor_formats import LoadedTensor, StoredTensor, find_tensor
from far_scale.utils.errors import UserError


class Scanned(NamedTuple):
    """The samples of an adopted shard.

    Attributes:
        rows: of the valid samples, in the order in which they first appear in the shard.
        sums: of their latents; None if there are none.
        rejects: name and problem of the others.
    """

    rows: list[AdoptedRow]
    sums: ChannelSums | None
    rejects: list[tuple[str, str]]

    @property
    def fps(self) -> float | None:
        """The frame rate of all samples; None if they differ."""
        rates = {row.fps for row in self.rows}
        return rates.pop() if len(rates) == 1 else None


@dataclass(frozen=True)
class SampleReader:
    """Reads samples of an adopted set; the fields are those of its manifest."""

    adoption: Adoption
    latent_shape: tuple[int, int, int]
    latent_dtype: LatentDtype
    actions: int
    labels: int
    classes: tuple[str, ...] | None = None

    @staticmethod
    def of(manifest: Manifest) -> SampleReader:
        """The reader of an adopted set."""
        assert manifest.adopted is not None
        m = manifest
        return SampleReader(manifest.adopted, m.latent_shape, m.latent_dtype, m.actions, m.labels, m.classes)

    def scan(self, path: Path, name: str, file: str) -> Scanned:
        """Read every sample of a shard.

        Args:
            path: of the shard or a copy of it.
            name: of the shard in messages.
            file: name of the shard in the manifest; gives format and number.

        Raises:
            UserError: it is not a shard, or cut off. Broken samples are returned as rejects.
        """
        rows, rejects, sums = [], [], LatentSums(self.latent_shape[0])
        with open(path, "rb") as shard:
            read = reader_of(shard.fileno())
            for sample, members in samples_of(path, name, file, self.adoption):
                try:
                    row = self._make_row(sample, members, read)
                    latents = self.read(read, row).latents
                    if not torch.isfinite(latents).all():
                        raise Mismatch(f"its {self.adoption.latents} is not finite")
                    sums.add(latents)
                    rows.append(row)
                except Mismatch as problem:
                    rejects.append((sample, str(problem)))
        return Scanned(rows, sums.result() if rows else None, rejects)

    def read(self, read: Read, row: AdoptedRow, start: int = 0, stop: int | None = None, stride: int = 1) -> Sample:
        """Frames `start`, `start + stride`, ... before `stop` of a sample.

        Raises:
            Mismatch: it does not fit its row or the manifest.
        """
        stop = row.frames if stop is None else stop
        latents = self._read_latents(read, row, start, stop)[::stride]
        actions = self._read_actions(read, row)
        if not (0 <= row.label < self.labels if row.label is not None else self.labels == 0):
            raise Mismatch(f"its label is {row.label}, and the set has the labels 0 to {self.labels - 1}")
        frame_actions = None if actions is None else actions[start:stop:stride]
        return Sample(row.key, latents, frame_actions, row.label, row.fps, row.name)

    def _make_row(self, name: str, members: Members, read: Read) -> AdoptedRow:
        adoption = self.adoption
        latents = find_member(members, adoption.latents)
        frames = self._find_latents(read, latents.offset, latents.size).shape[AXES[adoption.layout][0]]
        label = None if adoption.label is None else read_label(read, members, adoption.label, self.classes)
        fps = read_number(read, members, adoption.fps) if isinstance(adoption.fps, Part) else adoption.fps
        if fps <= 0:
            raise Mismatch(f"its {adoption.fps} is {fps}, and a frame rate is above 0")
        actions = None if adoption.actions is None else find_member(members, adoption.actions)
        actions_range = (0, 0) if actions is None else (actions.offset, actions.size)
        return AdoptedRow(name, frames, label, fps, latents.offset, latents.size, *actions_range)

    def _find_latents(self, read: Read, offset: int, size: int) -> StoredTensor | LoadedTensor:
        """The stored latents, with shape and type checked."""
        part, layout = self.adoption.latents, self.adoption.layout
        tensor = self._find_tensor(part, read, offset, size)
        if len(tensor.shape) != 4 or tuple(tensor.shape[axis] for axis in AXES[layout][1:]) != self.latent_shape:
            channels, height, width = self.latent_shape
            raise Mismatch(f"its {part} is {list(tensor.shape)}, not {layout} with C={channels}, H={height}, W={width}")
        if (dtype := read_as(tensor.dtype, self.adoption.scale_factor)) != self.latent_dtype:
            raise Mismatch(f"its {part} is read as {dtype}, and the set's latents are {self.latent_dtype}")
        return tensor

    @staticmethod
    def _find_tensor(part: Part, read: Read, offset: int, size: int) -> StoredTensor | LoadedTensor:
        try:
            return find_tensor(part, read, offset, size)
        except Mismatch as problem:
            raise Mismatch(f"its {part} {problem}") from None

    def _read_latents(self, read: Read, row: AdoptedRow, start: int, stop: int) -> torch.Tensor:
        tensor, axes = self._find_latents(read, row.latents_offset, row.latents_bytes), AXES[self.adoption.layout]
        if tensor.shape[axes[0]] != row.frames:
            raise Mismatch(f"its {self.adoption.latents} has {tensor.shape[axes[0]]} frames, not {row.frames}")
        latents = tensor.read(read, axes[0], start, stop).permute(axes).to(DTYPES[self.latent_dtype])
        if self.adoption.scale_factor != 1:
            latents = latents / self.adoption.scale_factor
        return latents

    def _read_actions(self, read: Read, row: AdoptedRow) -> torch.Tensor | None:
        """All actions of a sample `[F]`, int64."""
        part = self.adoption.actions
        if part is None:
            return None
        if part.kind == "json":
            values = read_json_value(read, row.actions_offset, row.actions_bytes, part)
            if not isinstance(values, list) or not all(type(v) is int and 0 <= v < self.actions for v in values):
                raise Mismatch(f"its {part} is not a list of whole numbers from 0 to {self.actions - 1}")
            actions = torch.tensor(values, dtype=torch.int64)
        else:
            tensor = self._find_tensor(part, read, row.actions_offset, row.actions_bytes)
            if len(tensor.shape) != 1 or tensor.dtype.is_floating_point:
                raise Mismatch(f"its {part} is {list(tensor.shape)} {tensor.dtype}, not one whole number a frame")
            actions = tensor.read(read, 0, 0, tensor.shape[0]).to(torch.int64)
        if len(actions) != row.frames:
            raise Mismatch(
                f"its {part} has {len(actions)} actions for {row.frames} frames; each has one, that led to it"
            )
        if not 0 <= int(actions.min()) <= int(actions.max()) < self.actions:
            raise Mismatch(f"its {part} has actions beyond 0 to {self.actions - 1}")
        return actions


def samples_of(path: Path, name: str, file: str, adoption: Adoption | None) -> Iterator[tuple[str, Members]]:
    """Name and members (or columns) of each sample of a shard, in the order in which they first appear.

    Args:
        path, name, file: as of `SampleReader.scan`.
        adoption: the expected parts; None if they are not known yet.

    Raises:
        UserError: it is not a shard, is cut off, or has duplicates.
    """
    try:
        if file.endswith(".mds"):
            yield from _mds_samples(path, int(file.split(".")[1]), adoption)
        else:
            yield from _tar_samples(path).items()
    except UnexpectedMemberError as problem:
        raise UserError(
            f"{name}: not a shard that can be adopted ({problem}); leave it out, or write it again"
        ) from None
    except BadShardError as problem:
        raise UserError(
            f"{name}: not {problem.format}, or cut off ({problem}); copy it again, or leave it out"
        ) from None


def _tar_samples(path: Path) -> dict[str, dict[str, Member]]:
    """The members of one sample may be in any order, and apart."""
    samples: dict[str, dict[str, Member]] = {}
    with open(path, "rb") as shard:
        refuse_compressed(shard)
        for member in AdoptedTarReader(shard):
            members = samples.setdefault(member.key, {})
            if member.kind in members:
                raise UnexpectedMemberError(f"member '{member.key}.{member.kind}' is there twice")
            members[member.kind] = member
    if not samples:
        raise UnexpectedMemberError("there is no sample in it")
    return samples


def _mds_samples(path: Path, number: int, adoption: Adoption | None) -> Iterator[tuple[str, Members]]:
    """Samples are named by the name column, or else by the numbers of shard and sample."""
    seen = set()
    with open(path, "rb") as shard:
        read = reader_of(shard.fileno())
        columns, samples = read_mds(read, os.fstat(shard.fileno()).st_size)
        if adoption is not None:
            check_encodings(columns.encodings, {part.member: part.kind for part in adoption.parts})
        for count, members in enumerate(samples):
            name = f"{number:05d}-{count:06d}"
            if adoption is not None and adoption.name is not None:
                name = _read_name(read, members, adoption.name)
            if name in seen:
                raise UnexpectedMemberError(f"sample {name!r} is there twice")
            seen.add(name)
            yield name, members


def encodings_of(read: Read, path: Path) -> Mapping[str, str]:
    """Encodings of an MDS file by column; `samples_of` has checked the file."""
    return read_mds(read, path.stat().st_size)[0].encodings


def _read_name(read: Read, members: Members, part: Part) -> str:
    try:
        name = read_text(read, members[part.member].offset, members[part.member].size, part)
    except Mismatch as problem:
        raise UnexpectedMemberError(str(problem)) from None
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise UnexpectedMemberError(f"the name {name!r:.100} is empty, longer than {MAX_NAME}, or not printable")
    return name


def reader_of(descriptor: int) -> Read:
    """A function that reads from an open file; a range beyond its end is refused before anything is allocated."""
    end = os.fstat(descriptor).st_size

    def read(offset: int, size: int) -> bytearray:
        if offset < 0 or size < 0 or offset + size > end:
            raise Mismatch("reaches beyond the end of the file")
        data = read_at(descriptor, offset, size)
        if len(data) < size:
            raise Mismatch("the file ends early")
        return data

    return read


def read_as(stored: torch.dtype, scale_factor: float) -> LatentDtype | None:
    """The type in which stored latents are read: scaled ones and float64 as float32.

    Returns:
        None if latents cannot have the stored type.
    """
    if stored == torch.float64 or (scale_factor != 1 and stored.is_floating_point):
        return "float32"
    types: dict[torch.dtype, LatentDtype] = {
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
        torch.float32: "float32",
    }
    return types.get(stored)
