"""One stored sample, and its two members in a shard: KEY.json and KEY.safetensors."""

from __future__ import annotations

import functools
import json
import math
import os
import reprlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from far_scale.data.shards.index import IndexRow
from far_scale.data.shards.mds import MdsWalk
from far_scale.data.shards.members import BadShardError, ForeignMemberError, Member, MemberWalk
from far_scale.data.shards.tar import TarWalk
from far_scale.data.shards.typed import MAX_HEADER_BYTES, MAX_JSON_BYTES, MAX_TENSORS_BYTES
from far_scale.utils.errors import UserError

_TENSOR_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


class Mismatch(Exception):
    """Bytes that are not a sample of ours; whoever knows the file turns it into a UserError."""


@dataclass(frozen=True)
class Sample:
    """A clip out of a shard set.

    Attributes:
        key: the sample's name, one of a kind in its set.
        latents: [F, C, H, W] as stored (bfloat16, float16, or float32 where it was adopted; unscaled).
        actions: [F] int64, the action that led to each frame, or None.
        label: the clip's class, or None.
        fps: frames a second of the video as it was encoded.
        source: the video's path below the folder that was encoded.
    """

    key: str
    latents: torch.Tensor
    actions: torch.Tensor | None
    label: int | None
    fps: float
    source: str


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a safetensors file; `begin` is the offset of its data after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def to_members(sample: Sample) -> dict[str, Any]:
    """The sample as a WebDataset writer takes it: `__key__` and the bytes of its two members."""
    from safetensors.torch import save

    tensors = {"latent": sample.latents.contiguous()}
    if sample.actions is not None:
        tensors["action"] = sample.actions.contiguous()
    facts = {"label": sample.label, "fps": sample.fps, "source": sample.source, "frames": sample.latents.shape[0]}
    return {"__key__": sample.key, "safetensors": save(tensors), "json": json.dumps(facts).encode()}


def from_members(key: str, tensors: bytes, facts: bytes) -> Sample:
    """The inverse of `to_members`.

    Raises:
        Mismatch: the bytes are not what `to_members` makes.
    """
    header_bytes = header_size(tensors[:8], len(tensors))
    places = parse_header(bytes(tensors[:header_bytes]), len(tensors))
    writable = bytearray(tensors)
    data = {name: view(writable, place, header_bytes + place.begin) for name, place in places.items()}
    described = parse_facts(facts, places["latent"].shape[0])
    return Sample(key, data["latent"], data.get("action"), described["label"], described["fps"], described["source"])


def header_size(start: bytes, member_bytes: int) -> int:
    """Size of a safetensors header with its 8 bytes of length, from these 8 bytes and the size of the whole.

    Raises:
        Mismatch: it is longer than the member, or than any header of ours.
    """
    size = 8 + struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 8 < size <= min(member_bytes, MAX_HEADER_BYTES):
        raise Mismatch("its safetensors member is cut off, or not one of ours")
    return size


@functools.lru_cache(maxsize=1024)  # samples of one length share their header, so a whole set has few of them
def parse_header(header: bytes, member_bytes: int) -> dict[str, TensorPlace]:
    """The tensors that a safetensors header names: `latent`, and `action` where there is one.

    Raises:
        Mismatch: it is no header of ours, or names bytes beyond the `member_bytes` of the whole member.
    """
    try:
        if struct.unpack_from("<Q", header)[0] != len(header) - 8:
            raise Mismatch("its safetensors header has another length")
        entries = {name: entry for name, entry in json.loads(header[8:].decode()).items() if name != "__metadata__"}
        if "latent" not in entries or not set(entries) <= {"latent", "action"}:
            raise Mismatch(f"its safetensors member holds {reprlib.repr(sorted(entries))}, not `latent` and `action`")
        places = {name: _parse_place(name, entry, member_bytes - len(header)) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error):
        raise Mismatch("its safetensors header is not readable") from None
    latent, action = places["latent"], places.get("action")
    if len(latent.shape) != 4 or latent.dtype == torch.int64 or latent.shape[0] < 1:
        raise Mismatch(f"its `latent` is {list(latent.shape)}, not [F, C, H, W] in bfloat16, float16 or float32")
    if action is not None and (action.dtype != torch.int64 or action.shape != latent.shape[:1]):
        raise Mismatch("its `action` is not one int64 a frame")
    return places


def _parse_place(name: str, entry: Any, data_bytes: int) -> TensorPlace:
    """One tensor of a header; every number is checked before any is used, since 2 or 10^4000 may stand there."""
    dtype, shape, (begin, end) = _TENSOR_NAMES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    known = len(shape) in (1, 4) and all(type(size) is int and 0 < size <= data_bytes for size in shape)
    place = TensorPlace(dtype, tuple(shape), begin)
    if not (known and type(begin) is type(end) is int and 0 <= begin <= end <= data_bytes):
        raise Mismatch(f"its safetensors header is wrong about `{name}`")
    if byte_count(place) != end - begin:
        raise Mismatch(f"its safetensors header is wrong about `{name}`")
    return place


def parse_facts(text: bytes, frames: int) -> dict[str, Any]:
    """The JSON member of a sample with that many frames.

    Raises:
        Mismatch: it is not what `to_members` makes.
    """
    try:
        facts = json.loads(text.decode())
        facts["source"].encode()  # a lone surrogate could not be printed
        facts["fps"] = float(facts["fps"])
        right = (
            set(facts) == {"label", "fps", "source", "frames"}
            and type(facts["frames"]) is int
            and facts["frames"] == frames
            and (facts["label"] is None or type(facts["label"]) is int)
            and math.isfinite(facts["fps"])
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        right = False
    if not right:
        raise Mismatch(f"its JSON does not tell label, fps, source and {frames} frames")
    return facts


def byte_count(place: TensorPlace) -> int:
    """Size of the tensor's data in bytes, by Python's unbounded integers: a shape from a file may be anything."""
    count = place.dtype.itemsize
    for size in place.shape:
        count *= size
    return count


def view(data: bytearray, place: TensorPlace, offset: int = 0) -> torch.Tensor:
    """The tensor whose bytes begin at `offset` of `data`, without a copy."""
    count = byte_count(place) // place.dtype.itemsize
    return torch.frombuffer(data, dtype=place.dtype, count=count, offset=offset).view(place.shape)


def index_shard(path: Path, name: str | None = None) -> list[IndexRow]:
    """Where each sample of a tar or MDS file lies, found by walking it; the samples' data is not read.

    Args:
        path: of the file.
        name: of the shard, where the file is called otherwise, as in a cache.

    Raises:
        UserError: it is no such file, is cut off, or its members are not samples of ours.
    """
    with open(path, "rb") as file:
        try:
            members = members_of(name or path.name, file)
            rows = [row for row, _, _ in walk(members, data=False)]
            if rows[-1].tensors_offset + rows[-1].tensors_bytes > os.fstat(file.fileno()).st_size:
                raise members.bad("its last member is not all there")
            return rows
        except (Mismatch, ForeignMemberError) as error:
            raise UserError(f"{path}: not a shard of far_scale ({error}); encode the videos again") from None
        except BadShardError as error:
            raise UserError(f"{path}: not {error.format}, or cut off ({error}); copy it again") from None


def members_of(name: str, file: BinaryIO) -> MemberWalk:
    """The members of a shard that is open as `file`; its name tells the format."""
    return MdsWalk(file) if name.endswith(".mds") else TarWalk(file)


def walk(members: MemberWalk, data: bool) -> Iterator[tuple[IndexRow, bytes, bytes]]:
    """The samples of a shard in order: where each lies, its JSON, and its tensors (without `data`, only their header).

    Raises:
        Mismatch: there is none; or a sample of which a member is missing, there twice, too large, or not ours.
        BadShardError, ForeignMemberError: as by MemberWalk.
    """
    seen: set[str] = set()
    found: dict[str, tuple[Member, bytes]] = {}
    for member in members:
        if found and member.key not in {other.key for other, _ in found.values()}:
            raise Mismatch(f"sample {next(iter(found.values()))[0].key!r} lacks its JSON or its safetensors member")
        if member.key in seen or member.kind in found:
            raise Mismatch(f"member '{member.key}.{member.kind}' is there twice, or not beside its other half")
        try:
            found[member.kind] = member, _read_member(members, member, data)
            if len(found) == 2:
                (json_at, facts), (tensors_at, tensors) = found["json"], found["safetensors"]
                header_bytes = header_size(tensors[:8], tensors_at.size)
                frames = parse_header(tensors[:header_bytes], tensors_at.size)["latent"].shape[0]
                parse_facts(facts, frames)
                sizes = json_at.offset, json_at.size, tensors_at.offset, header_bytes, tensors_at.size
                yield IndexRow(member.key, frames, *sizes), facts, tensors
                seen.add(member.key)
                found = {}
        except Mismatch as problem:
            raise Mismatch(f"sample {member.key!r}: {problem}") from None
    if found or not seen:
        raise Mismatch(
            "its last sample lacks its JSON or its safetensors member" if found else "there is no sample in it"
        )


def _read_member(members: MemberWalk, member: Member, data: bool) -> bytes:
    if member.kind == "json":
        if member.size > MAX_JSON_BYTES:
            raise Mismatch(f"its JSON has {member.size} bytes, more than the {MAX_JSON_BYTES} of any of ours")
        return members.read(member.size)
    if member.size > MAX_TENSORS_BYTES:
        raise Mismatch(f"its tensors have {member.size} bytes, more than the {MAX_TENSORS_BYTES} allowed")
    start = members.read(8)
    header = start + members.read(header_size(start, member.size) - 8)
    parse_header(header, member.size)  # refused before the data is read
    return header + members.read(member.size - len(header)) if data else header
