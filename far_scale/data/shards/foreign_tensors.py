"""Tensors in adopted shards: of npy, safetensors and ndarray the frames asked for are read, of torch.save all."""

from __future__ import annotations

import functools
import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from far_scale.data.shards.adopted import Part
from far_scale.data.shards.foreign_mds import array_place, start_bytes
from far_scale.data.shards.sample import Mismatch
from far_scale.data.shards.torch_file import BrokenFileError, load_torch, plain_tensor

Read = Callable[[int, int], bytearray]
"""Bytes of a shard, by offset and size; raises Mismatch where they are not there."""

_NPY_START = 128  # bytes; numpy writes headers as long as this for arrays of few axes
_MAX_HEADER = 1 << 16
_NPY_TYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64, "<i8": torch.int64}
_NPY_TYPES |= {"<i4": torch.int32, "<i2": torch.int16, "|i1": torch.int8, "|u1": torch.uint8}
_SAFETENSORS_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_SAFETENSORS_TYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a shard.

    Attributes:
        dtype, shape: as stored.
        offset: of its first byte, from the start of the file.
        fortran: whether the first axis varies fastest, as numpy may store arrays.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    fortran: bool = False

    def read(self, read: Read, axis: int, start: int, stop: int) -> torch.Tensor:
        """Places `start` to `stop` of an axis; along the first one a view of the bytes read, without a copy."""
        if self.fortran:
            axes = tuple(range(len(self.shape)))[::-1]
            whole = _tensor(
                read(self.offset, math.prod(self.shape) * self.dtype.itemsize), self.dtype, self.shape[::-1]
            )
            return whole.permute(axes).narrow(axis, start, stop - start)
        inner = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        runs = [
            read(self.offset + (run * self.shape[axis] + start) * inner, (stop - start) * inner)
            for run in range(math.prod(self.shape[:axis]))
        ]
        data = runs[0] if len(runs) == 1 else bytearray().join(runs)
        return _tensor(data, self.dtype, (*self.shape[:axis], stop - start, *self.shape[axis + 1 :]))


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of a file that can only be read whole."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, read: Read, axis: int, start: int, stop: int) -> torch.Tensor:
        """Places `start` to `stop` of an axis."""
        return self.tensor.narrow(axis, start, stop - start)


def find_tensor(part: Part, read: Read, offset: int, size: int) -> StoredTensor | LoadedTensor:
    """The tensor that is `part` of a sample; its member lies at `offset` with `size` bytes.

    Raises:
        Mismatch: there is none, or it does not fill the member as it says; what is wrong with the part, as a predicate.
    """
    if part.kind == "npy":
        return _find_npy(read, offset, size)
    if part.kind == "safetensors":
        entries = safetensors_entries(read, offset, size)
        if part.key not in entries:
            raise Mismatch(f"has no tensor {part.key!r}, but {_few(entries)}")
        data = offset + 8 + struct.unpack("<Q", read(offset, 8))[0]
        return _safetensors_place(entries[part.key], data, size - (data - offset))
    if part.kind == "torch":
        found, stored_bytes = _load_torch(read, offset, size)
        if part.key is not None:
            if not isinstance(found, dict) or part.key not in found:
                has = _few(found) if isinstance(found, dict) else type(found).__name__
                raise Mismatch(f"has no tensor {part.key!r}, but {has}")
            found = found[part.key]
        return LoadedTensor(plain_tensor(found, stored_bytes))
    if part.kind.startswith("ndarray"):
        dtype, shape, begin = array_place(part.kind, bytes(read(offset, start_bytes(size))), size)
        return StoredTensor(dtype, shape, offset + begin)
    raise Mismatch("is no array or tensor; name a member that is .npy, .safetensors, .pth or .pt")


def torch_keys(read: Read, offset: int, size: int) -> list[str] | None:
    """The names of the tensors in a dict of torch.save; None where the file is no dict.

    Raises:
        Mismatch: it is no file of torch.save.
    """
    found, _ = _load_torch(read, offset, size)
    if not isinstance(found, dict):
        return None
    return [key for key, value in found.items() if isinstance(key, str) and isinstance(value, torch.Tensor)]


def _load_torch(read: Read, offset: int, size: int) -> tuple[Any, int]:
    try:
        return load_torch(io.BytesIO(read(offset, size)))
    except BrokenFileError as error:
        raise Mismatch(f"is no file of torch.save as a zip archive ({error})") from None


def safetensors_entries(read: Read, offset: int, size: int) -> dict[str, Any]:
    """What the header of a safetensors file says of each of its tensors.

    Raises:
        Mismatch: it is no such file.
    """
    length = struct.unpack("<Q", read(offset, 8))[0] if size >= 8 else 0
    if not 0 < length <= min(size - 8, _MAX_HEADER):
        raise Mismatch("is no safetensors file, or cut off")
    return _safetensors_header(bytes(read(offset + 8, length)))


@functools.lru_cache(maxsize=1024)  # samples of one length share their header
def _safetensors_header(header: bytes) -> dict[str, Any]:
    try:
        entries = dict(json.loads(header.decode()))
    except (TypeError, ValueError, RecursionError):
        raise Mismatch("has a safetensors header that is not readable") from None
    entries.pop("__metadata__", None)
    return entries


def _safetensors_place(entry: Any, data: int, data_bytes: int) -> StoredTensor:
    """Every number is checked before any is used: 2 or 10^4000 may stand there."""
    try:
        dtype, shape, (begin, end) = _SAFETENSORS_TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise Mismatch(f"has a tensor of a type that we do not read ({', '.join(_SAFETENSORS_TYPES)})") from None
    known = type(begin) is type(end) is int and 0 <= begin <= end <= data_bytes
    if not known or _byte_count(dtype, shape, data_bytes) != end - begin:
        raise Mismatch("has a safetensors header that does not fit its data")
    return StoredTensor(dtype, shape, data + begin)


def _find_npy(read: Read, offset: int, size: int) -> StoredTensor:
    start = bytes(read(offset, min(size, _NPY_START)))
    if len(start) < 12 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2):
        raise Mismatch("is no .npy file")
    header_bytes = (
        10 + struct.unpack_from("<H", start, 8)[0] if start[6] == 1 else 12 + struct.unpack_from("<I", start, 8)[0]
    )
    if header_bytes > min(size, _MAX_HEADER):
        raise Mismatch("is cut off within its .npy header")
    header = start[:header_bytes] if header_bytes <= len(start) else bytes(read(offset, header_bytes))
    descr, shape, fortran = _npy_header(header)
    if descr not in _NPY_TYPES:
        raise Mismatch(f"is an array of type {descr!r:.40}, not one of {', '.join(_NPY_TYPES)}")
    if _byte_count(_NPY_TYPES[descr], shape, size) != size - header_bytes:
        raise Mismatch(f"is an array {list(shape)!r:.80} of another size than its data")
    return StoredTensor(_NPY_TYPES[descr], shape, offset + header_bytes, fortran)


@functools.lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[str, tuple[int, ...], bool]:
    """Type, shape and order; numpy's reader takes nothing but a dict of literals, and of no object is anything made."""
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        parse = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = parse(file)
    except Exception:  # at damaged bytes numpy raises what its tokenizer and its evaluator of literals raise
        raise Mismatch("has a .npy header that is not readable") from None
    return dtype.str, tuple(shape), bool(fortran) and len(shape) > 1


def _byte_count(dtype: torch.dtype, shape: tuple[Any, ...], most: int) -> int | None:
    """Bytes of a tensor, by Python's unbounded integers; None where the shape is none."""
    if len(shape) > 8 or not all(type(size) is int and 0 < size <= most for size in shape):
        return None
    return math.prod(shape) * dtype.itemsize


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _few(names: Any) -> str:
    listed = sorted(map(str, names))
    return (", ".join(repr(name)[:40] for name in listed[:8]) or "none") + (", ..." if len(listed) > 8 else "")
