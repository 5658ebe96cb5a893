"""One stored sample, and its two members in a shard: KEY.json and KEY.safetensors."""

from __future__ import annotations

import functools
import json
import math
import os
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from far_scale.data.shards.errors import Mismatch
from far_scale.data.shards.records import MAX_HEADER_BYTES

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


@dataclass(frozen=True)
class Sample:
    """A clip out of a shard set.

    Attributes:
        key: name of the sample, unique in its set.
        latents: [F, C, H, W] as stored (bfloat16, float16, or float32 if adopted; unscaled).
        actions: [F] int64, the action that led to each frame, or None.
        label: class of the clip, or None.
        fps: frames per second of the encoded video.
        source: path of the video below the encoded folder.
    """

    key: str
    latents: torch.Tensor
    actions: torch.Tensor | None
    label: int | None
    fps: float
    source: str


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file; `offset` is that of its data, from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def to_members(sample: Sample) -> dict[str, Any]:
    """The sample as a WebDataset writer takes it: `__key__` and the bytes of its two members."""
    from safetensors.torch import save

    tensors = {"latent": sample.latents.contiguous()}
    if sample.actions is not None:
        tensors["action"] = sample.actions.contiguous()
    metadata = {"label": sample.label, "fps": sample.fps, "source": sample.source, "frames": sample.latents.shape[0]}
    return {"__key__": sample.key, "safetensors": save(tensors), "json": json.dumps(metadata).encode()}


def from_members(key: str, tensors: bytes, metadata: bytes) -> Sample:
    """The inverse of `to_members`.

    Raises:
        Mismatch: the bytes are not those of a sample.
    """
    header_bytes = header_size(tensors[:8], len(tensors))
    infos = parse_header(bytes(tensors[:header_bytes]), len(tensors))
    writable = bytearray(tensors)
    data = {name: view_tensor(writable, info, header_bytes + info.offset) for name, info in infos.items()}
    values = parse_metadata(metadata, infos["latent"].shape[0])
    return Sample(key, data["latent"], data.get("action"), values["label"], values["fps"], values["source"])


def header_size(start: bytes, member_bytes: int) -> int:
    """Size of a safetensors header including its 8 bytes of length.

    Args:
        start: the member's first 8 bytes.
        member_bytes: size of the member.

    Raises:
        Mismatch: the header is longer than the member, or than the limit.
    """
    size = 8 + struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 8 < size <= min(member_bytes, MAX_HEADER_BYTES):
        raise Mismatch("its safetensors member is cut off, or not one of ours")
    return size


@functools.lru_cache(maxsize=1024)  # samples of one length share their header, so a set has few of them
def parse_header(header: bytes, member_bytes: int) -> dict[str, TensorInfo]:
    """The tensors in a safetensors header: `latent`, and `action` if there is one.

    Raises:
        Mismatch: the header is not of a sample, or its tensors reach beyond the `member_bytes` of the member.
    """
    try:
        if struct.unpack_from("<Q", header)[0] != len(header) - 8:
            raise Mismatch("its safetensors header has another length")
        entries = {name: entry for name, entry in json.loads(header[8:].decode()).items() if name != "__metadata__"}
        if "latent" not in entries or not set(entries) <= {"latent", "action"}:
            raise Mismatch(f"its safetensors member holds {reprlib.repr(sorted(entries))}, not `latent` and `action`")
        infos = {name: _parse_entry(name, entry, member_bytes - len(header)) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error):
        raise Mismatch("its safetensors header is not readable") from None
    latent, action = infos["latent"], infos.get("action")
    if len(latent.shape) != 4 or latent.dtype == torch.int64 or latent.shape[0] < 1:
        raise Mismatch(f"its `latent` is {list(latent.shape)}, not [F, C, H, W] in bfloat16, float16 or float32")
    if action is not None and (action.dtype != torch.int64 or action.shape != latent.shape[:1]):
        raise Mismatch("its `action` is not one int64 a frame")
    return infos


def _parse_entry(name: str, entry: Any, data_bytes: int) -> TensorInfo:
    """One tensor of a header. Every number is checked before it is used: it may be anything, such as 10^4000."""
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    is_valid = len(shape) in (1, 4) and all(type(size) is int and 0 < size <= data_bytes for size in shape)
    info = TensorInfo(dtype, tuple(shape), begin)
    if not (is_valid and type(begin) is type(end) is int and 0 <= begin <= end <= data_bytes):
        raise Mismatch(f"its safetensors header is wrong about `{name}`")
    if byte_count(info) != end - begin:
        raise Mismatch(f"its safetensors header is wrong about `{name}`")
    return info


def parse_metadata(text: bytes, frames: int) -> dict[str, Any]:
    """The JSON member of a sample with `frames` frames.

    Raises:
        Mismatch: it is not of a sample, or of another length.
    """
    metadata: dict[str, Any] = {}
    try:
        metadata = json.loads(text.decode())
        metadata["source"].encode()  # a lone surrogate could not be printed
        metadata["fps"] = float(metadata["fps"])
        is_valid = (
            set(metadata) == {"label", "fps", "source", "frames"}
            and type(metadata["frames"]) is int
            and metadata["frames"] == frames
            and (metadata["label"] is None or type(metadata["label"]) is int)
            and math.isfinite(metadata["fps"])
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        is_valid = False
    if not is_valid:
        raise Mismatch(f"its JSON does not hold label, fps, source and {frames} frames")
    return metadata


def byte_count(info: TensorInfo) -> int:
    """Size of the tensor's data in bytes, in Python's unbounded integers: the shape comes from a file."""
    return info.dtype.itemsize * math.prod(info.shape)


def view_tensor(data: bytearray, info: TensorInfo, offset: int = 0) -> torch.Tensor:
    """The tensor at `offset` of `data`, without a copy."""
    return torch.frombuffer(data, dtype=info.dtype, count=math.prod(info.shape), offset=offset).view(info.shape)


Read = Callable[[int, int], bytearray]
"""Reads bytes of a shard by offset and size; raises Mismatch beyond its end."""


def read_at(descriptor: int, offset: int, size: int) -> bytearray:
    """`size` bytes of an open file from `offset`, fewer if the file ends before."""
    data, filled = bytearray(size), 0
    rest = memoryview(data)
    while filled < size and (count := os.preadv(descriptor, [rest[filled:]], offset + filled)):
        filled += count
    return data if filled == size else data[:filled]
