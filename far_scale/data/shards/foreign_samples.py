"""The samples of adopted shards: finding them, and reading any frames of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from far_scale.data.shards.adopted import AXES, MAX_NAME, AdoptedRow, Adoption, Part
from far_scale.data.shards.foreign_mds import check_encodings, walk_mds
from far_scale.data.shards.foreign_tar import ForeignTarWalk, refuse_compressed
from far_scale.data.shards.foreign_tensors import LoadedTensor, Read, StoredTensor, find_tensor
from far_scale.data.shards.foreign_values import Members, json_value, label_in, member_of, number, text_of
from far_scale.data.shards.index import ChannelSums, LatentSums
from far_scale.data.shards.manifest import DTYPES, LatentDtype, Manifest
from far_scale.data.shards.members import BadShardError, ForeignMemberError, Member
from far_scale.data.shards.sample import Mismatch, Sample
from far_scale.utils.errors import UserError


class Scanned(NamedTuple):
    """What is in an adopted shard.

    Attributes:
        rows: of the sound samples, in the order in which the shard first names them.
        sums: of their latents; None where there are none.
        rejects: name and problem of the others.
    """

    rows: list[AdoptedRow]
    sums: ChannelSums | None
    rejects: list[tuple[str, str]]

    @property
    def fps(self) -> float | None:
        """The frame rate of all samples; None where they differ."""
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
        """That of a set that was adopted."""
        assert manifest.adopted is not None
        m = manifest
        return SampleReader(manifest.adopted, m.latent_shape, m.latent_dtype, m.actions, m.labels, m.classes)

    def scan(self, path: Path, name: str, file: str) -> Scanned:
        """Read every sample of a shard.

        Args:
            path: of the shard, or of a copy of it.
            name: of the shard, as messages call it.
            file: what its manifest calls it; its format and number follow from it.

        Raises:
            UserError: it is no shard, or cut off; one broken sample is no error.
        """
        rows, rejects, sums = [], [], LatentSums(self.latent_shape[0])
        with open(path, "rb") as opened:
            read = reader_of(opened.fileno())
            for sample, members in samples_of(path, name, file, self.adoption):
                try:
                    row = self._row(sample, members, read)
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
            Mismatch: it is not what its row and the manifest say.
        """
        stop = row.frames if stop is None else stop
        latents = self._latents(read, row, start, stop)[::stride]
        actions = self._actions(read, row)
        if not (0 <= row.label < self.labels if row.label is not None else self.labels == 0):
            raise Mismatch(f"its label is {row.label}, and the set has the labels 0 to {self.labels - 1}")
        taken = None if actions is None else actions[start:stop:stride]
        return Sample(row.key, latents, taken, row.label, row.fps, row.name)

    def _row(self, name: str, members: Members, read: Read) -> AdoptedRow:
        """The row of the index of a sample with these members."""
        adoption = self.adoption
        latents = member_of(members, adoption.latents)
        frames = self._found(read, latents.offset, latents.size).shape[AXES[adoption.layout][0]]
        label = None if adoption.label is None else label_in(read, members, adoption.label, self.classes)
        rate = number(read, members, adoption.fps) if isinstance(adoption.fps, Part) else adoption.fps
        if rate <= 0:
            raise Mismatch(f"its {adoption.fps} is {rate}, and a frame rate is above 0")
        acts = None if adoption.actions is None else member_of(members, adoption.actions)
        at, size = (acts.offset, acts.size) if acts is not None else (0, 0)
        return AdoptedRow(name, frames, label, rate, latents.offset, latents.size, at, size)

    def _found(self, read: Read, offset: int, size: int) -> StoredTensor | LoadedTensor:
        """The latents as stored, whose shape and type have been checked."""
        part, layout = self.adoption.latents, self.adoption.layout
        try:
            found = find_tensor(part, read, offset, size)
        except Mismatch as problem:
            raise Mismatch(f"its {part} {problem}") from None
        if len(found.shape) != 4 or tuple(found.shape[axis] for axis in AXES[layout][1:]) != self.latent_shape:
            channels, height, width = self.latent_shape
            raise Mismatch(f"its {part} is {list(found.shape)}, not {layout} with C={channels}, H={height}, W={width}")
        if (known := read_as(found.dtype, self.adoption.scale_factor)) != self.latent_dtype:
            raise Mismatch(f"its {part} is read as {known}, and the set's latents are {self.latent_dtype}")
        return found

    def _latents(self, read: Read, row: AdoptedRow, start: int, stop: int) -> torch.Tensor:
        found, axes = self._found(read, row.latents_offset, row.latents_bytes), AXES[self.adoption.layout]
        if found.shape[axes[0]] != row.frames:
            raise Mismatch(f"its {self.adoption.latents} has {found.shape[axes[0]]} frames, not {row.frames}")
        latents = found.read(read, axes[0], start, stop).permute(axes).to(DTYPES[self.latent_dtype])
        if self.adoption.scale_factor != 1:
            latents = latents / self.adoption.scale_factor
        return latents

    def _actions(self, read: Read, row: AdoptedRow) -> torch.Tensor | None:
        """All actions of a sample `[F]`, int64."""
        part = self.adoption.actions
        if part is None:
            return None
        if part.kind == "json":
            values = json_value(read, row.actions_offset, row.actions_bytes, part)
            if not isinstance(values, list) or not all(type(v) is int and 0 <= v < self.actions for v in values):
                raise Mismatch(f"its {part} is no list of whole numbers from 0 to {self.actions - 1}")
            actions = torch.tensor(values, dtype=torch.int64)
        else:
            try:
                found = find_tensor(part, read, row.actions_offset, row.actions_bytes)
            except Mismatch as problem:
                raise Mismatch(f"its {part} {problem}") from None
            if len(found.shape) != 1 or found.dtype.is_floating_point:
                raise Mismatch(f"its {part} is {list(found.shape)} {found.dtype}, not one whole number a frame")
            actions = found.read(read, 0, 0, found.shape[0]).to(torch.int64)
        if len(actions) != row.frames:
            raise Mismatch(
                f"its {part} has {len(actions)} actions for {row.frames} frames; each has one, that led to it"
            )
        if not 0 <= int(actions.min()) <= int(actions.max()) < self.actions:
            raise Mismatch(f"its {part} has actions beyond 0 to {self.actions - 1}")
        return actions


def samples_of(path: Path, name: str, file: str, adoption: Adoption | None) -> Iterator[tuple[str, Members]]:
    """The samples of a shard, in the order in which it first names them: name and members, or columns.

    Args:
        path, name, file: as of `SampleReader.scan`.
        adoption: what the parts must be; None where that is not known yet.

    Raises:
        UserError: it is no shard, is cut off, or has something in it twice.
    """
    try:
        if file.endswith(".mds"):
            yield from _mds_samples(path, int(file.split(".")[1]), adoption)
        else:
            yield from _tar_samples(path).items()
    except ForeignMemberError as problem:
        raise UserError(
            f"{name}: not a shard that can be adopted ({problem}); leave it out, or write it again"
        ) from None
    except BadShardError as problem:
        raise UserError(
            f"{name}: not {problem.format}, or cut off ({problem}); copy it again, or leave it out"
        ) from None


def _tar_samples(path: Path) -> dict[str, dict[str, Member]]:
    """The members of one sample may stand in any order, and apart."""
    samples: dict[str, dict[str, Member]] = {}
    with open(path, "rb") as opened:
        refuse_compressed(opened)
        for member in ForeignTarWalk(opened):
            members = samples.setdefault(member.key, {})
            if member.kind in members:
                raise ForeignMemberError(f"member '{member.key}.{member.kind}' is there twice")
            members[member.kind] = member
    if not samples:
        raise ForeignMemberError("there is no sample in it")
    return samples


def _mds_samples(path: Path, number: int, adoption: Adoption | None) -> Iterator[tuple[str, Members]]:
    """Samples have the names of the column that is said to hold them, or else the numbers of shard and sample."""
    seen = set()
    with open(path, "rb") as opened:
        read = reader_of(opened.fileno())
        columns, samples = walk_mds(read, os.fstat(opened.fileno()).st_size)
        if adoption is not None:
            check_encodings(columns.encodings, {part.member: part.kind for part in adoption.parts})
        for count, members in enumerate(samples):
            name = f"{number:05d}-{count:06d}"
            if adoption is not None and adoption.name is not None:
                name = _name_in(read, members, adoption.name)
            if name in seen:
                raise ForeignMemberError(f"sample {name!r} is there twice")
            seen.add(name)
            yield name, members


def encodings_of(read: Read, path: Path) -> Mapping[str, str]:
    """The columns of an MDS file that `samples_of` has gone into, and how they are encoded."""
    return walk_mds(read, path.stat().st_size)[0].encodings


def _name_in(read: Read, members: Members, part: Part) -> str:
    try:
        name = text_of(read, members[part.member].offset, members[part.member].size, part)
    except Mismatch as problem:
        raise ForeignMemberError(str(problem)) from None
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ForeignMemberError(f"the name {name!r:.100} is empty, longer than {MAX_NAME}, or not printable")
    return name


def reader_of(descriptor: int) -> Read:
    """Reads of an open file; a part beyond its end is refused before anything is allocated."""
    end = os.fstat(descriptor).st_size

    def read(offset: int, size: int) -> bytearray:
        if offset < 0 or size < 0 or offset + size > end:
            raise Mismatch("reaches beyond the end of the file")
        data, filled = bytearray(size), 0
        while filled < size:
            count = os.preadv(descriptor, [memoryview(data)[filled:]], offset + filled)
            if count == 0:
                raise Mismatch("the file ends early")
            filled += count
        return data

    return read


def read_as(stored: torch.dtype, scale_factor: float) -> LatentDtype | None:
    """The type in which latents of a stored type are read; None where it is none of latents.

    What must be divided, and float64, which nobody needs, is read as float32.
    """
    if stored == torch.float64 or (scale_factor != 1 and stored.is_floating_point):
        return "float32"
    types: dict[torch.dtype, LatentDtype] = {
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
        torch.float32: "float32",
    }
    return types.get(stored)
