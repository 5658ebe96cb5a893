"""One stored sample, and its two members in a tar: KEY.json and KEY.safetensors."""

from __future__ import annotations

import functools
import json
import os
import re
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from far_scale.data.manifest import IndexRow
from far_scale.errors import UserError

# WebDataset splits a member's name at its first dot, and a USTAR name holds 100 characters.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
MAX_HEADER_BYTES = 1 << 16  # ours have about 150: more is no sample of ours, and is never read
_TENSOR_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


class Mismatch(Exception):
    """Bytes that are not a sample of ours; whoever knows the file turns it into a UserError."""


@dataclass(frozen=True)
class Sample:
    """A clip out of a shard set.

    Attributes:
        key: the sample's name, one of a kind in its set.
        latents: [F, C, H, W] as stored (bfloat16 or float16, unscaled).
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
        entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
        if "latent" not in entries or not set(entries) <= {"latent", "action"}:
            raise Mismatch(f"its safetensors member holds {sorted(entries)}, not `latent` and maybe `action`")
        places = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            place = TensorPlace(_TENSOR_NAMES[entry["dtype"]], tuple(int(size) for size in entry["shape"]), int(begin))
            if not 0 <= begin <= end <= member_bytes - len(header) or byte_count(place) != end - begin:
                raise Mismatch(f"its safetensors header is wrong about `{name}`")
            places[name] = place
    except (KeyError, TypeError, ValueError, AttributeError, struct.error):
        raise Mismatch("its safetensors header is not readable") from None
    latent, action = places["latent"], places.get("action")
    if len(latent.shape) != 4 or latent.dtype == torch.int64 or latent.shape[0] < 1:
        raise Mismatch(f"its `latent` is {list(latent.shape)}, not [F, C, H, W] in bfloat16 or float16")
    if action is not None and (action.dtype != torch.int64 or action.shape != latent.shape[:1]):
        raise Mismatch("its `action` is not one int64 a frame")
    return places


def parse_facts(text: bytes, frames: int) -> dict[str, Any]:
    """The JSON member of a sample with that many frames.

    Raises:
        Mismatch: it is not what `to_members` makes.
    """
    try:
        facts = json.loads(text)
        right = (
            set(facts) == {"label", "fps", "source", "frames"}
            and facts["frames"] == frames
            and (facts["label"] is None or type(facts["label"]) is int)
            and isinstance(facts["source"], str)
        )
        facts["fps"] = float(facts["fps"])
    except (KeyError, TypeError, ValueError):
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


def index_tar(path: Path) -> list[IndexRow]:
    """Where each sample of a tar lies, found by walking its headers; the samples' data is not read.

    Raises:
        UserError: it is not a tar, is cut off, or its members are not samples of ours.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if not (member.isreg() and KEY_PATTERN.fullmatch(key) and kind in ("json", "safetensors")):
                    raise Mismatch(f"member {member.name!r} is neither KEY.json nor KEY.safetensors")
                if member.offset_data + member.size > size:
                    raise Mismatch(f"member {member.name!r} is cut off")
                if members.setdefault(key, {}).setdefault(kind, member) is not member:
                    raise Mismatch(f"member {member.name!r} is there twice")
            return [_index_row(file, key, kinds) for key, kinds in members.items()]
    except Mismatch as error:
        raise UserError(f"{path}: not a shard of far_scale ({error}); encode the videos again") from None
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a tar file, or cut off ({error}); encode the videos again") from None


def _index_row(file: Any, key: str, kinds: dict[str, tarfile.TarInfo]) -> IndexRow:
    if len(kinds) != 2:
        raise Mismatch(f"sample {key!r} lacks its JSON or its safetensors member")
    facts, tensors = kinds["json"], kinds["safetensors"]
    file.seek(tensors.offset_data)
    start = file.read(8)
    header_bytes = header_size(start, tensors.size)
    places = parse_header(start + file.read(header_bytes - 8), tensors.size)
    frames = places["latent"].shape[0]
    file.seek(facts.offset_data)
    parse_facts(file.read(facts.size), frames)
    return IndexRow(key, frames, facts.offset_data, facts.size, tensors.offset_data, header_bytes, tensors.size)
