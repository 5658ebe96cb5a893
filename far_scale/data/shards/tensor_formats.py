"""Tensors in files of other programs: npy, safetensors, torch.save, and mosaicml-streaming's ndarray.

Of files of torch.save the whole tensor is read, of the others only the requested frames. No pickle is run.
"""

from __future__ import annotations

import functools
import io
import json
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from far_scale.data.shards.adopted import Part
from far_scale.data.shards.adopted_mds import array_header_bytes, parse_array_header
from far_scale.data.shards.errors import Mismatch
from far_scale.data.shards.records import MAX_TENSORS_BYTES
from far_scale.data.shards.sample import Read

_NPY_START = 128  # bytes: the length of numpy's header of an array of few axes
_MAX_HEADER = 1 << 16
_NPY_TYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64, "<i8": torch.int64}
_NPY_TYPES |= {"<i4": torch.int32, "<i2": torch.int16, "|i1": torch.int8, "|u1": torch.uint8}
_SAFETENSORS_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_SAFETENSORS_TYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
# What zipfile, torch.load and its restricted unpickler raise at damaged bytes.
_BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, RuntimeError)
_BROKEN += (ValueError, TypeError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard, not read yet.

    Attributes:
        dtype, shape: as stored.
        offset: of its first byte, from the start of the file.
        fortran: whether the first axis varies fastest, as in some numpy files.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    fortran: bool = False

    def read(self, read: Read, axis: int, start: int, stop: int) -> torch.Tensor:
        """Indices `start` to `stop` of an axis; along the first axis without a copy."""
        if self.fortran:
            axes = tuple(range(len(self.shape)))[::-1]
            data = read(self.offset, math.prod(self.shape) * self.dtype.itemsize)
            whole = _as_tensor(data, self.dtype, self.shape[::-1])
            return whole.permute(axes).narrow(axis, start, stop - start)
        stride = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize  # bytes of one index of the axis
        pieces = [
            read(self.offset + (outer * self.shape[axis] + start) * stride, (stop - start) * stride)
            for outer in range(math.prod(self.shape[:axis]))
        ]
        data = pieces[0] if len(pieces) == 1 else bytearray().join(pieces)
        return _as_tensor(data, self.dtype, (*self.shape[:axis], stop - start, *self.shape[axis + 1 :]))


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of a file that can only be read as a whole."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, read: Read, axis: int, start: int, stop: int) -> torch.Tensor:
        """Indices `start` to `stop` of an axis."""
        return self.tensor.narrow(axis, start, stop - start)


def find_tensor(part: Part, read: Read, offset: int, size: int) -> StoredTensor | LoadedTensor:
    """The tensor of `part` of a sample, with its member of `size` bytes at `offset`.

    Raises:
        Mismatch: there is none, or its size does not fit the member; the text is a predicate of the part.
    """
    if part.kind == "npy":
        return _find_npy(read, offset, size)
    if part.kind == "safetensors":
        entries = safetensors_entries(read, offset, size)
        if part.key not in entries:
            raise Mismatch(f"has no tensor {part.key!r}, but {_list_some(entries)}")
        data = offset + 8 + struct.unpack("<Q", read(offset, 8))[0]
        return _parse_safetensors_entry(entries[part.key], data, size - (data - offset))
    if part.kind == "torch":
        value, stored_bytes = _load_torch(read, offset, size)
        if part.key is not None:
            if not isinstance(value, dict) or part.key not in value:
                content = _list_some(value) if isinstance(value, dict) else type(value).__name__
                raise Mismatch(f"has no tensor {part.key!r}, but {content}")
            value = value[part.key]
        return LoadedTensor(plain_tensor(value, stored_bytes))
    if part.kind.startswith("ndarray"):
        start = bytes(read(offset, array_header_bytes(size)))
        dtype, shape, header_bytes = parse_array_header(part.kind, start, size)
        return StoredTensor(dtype, shape, offset + header_bytes)
    raise Mismatch("is no array or tensor; name a member that is .npy, .safetensors, .pth or .pt")


def torch_keys(read: Read, offset: int, size: int) -> list[str] | None:
    """The names of the tensors in a dict of torch.save; None if the file does not hold a dict.

    Raises:
        Mismatch: it is not a file of torch.save.
    """
    values, _ = _load_torch(read, offset, size)
    if not isinstance(values, dict):
        return None
    return [key for key, value in values.items() if isinstance(key, str) and isinstance(value, torch.Tensor)]


def _load_torch(read: Read, offset: int, size: int) -> tuple[Any, int]:
    try:
        return load_torch(io.BytesIO(read(offset, size)))
    except BrokenFileError as error:
        raise Mismatch(f"is not a file of torch.save as a zip archive ({error})") from None


class BrokenFileError(Mismatch):
    """The bytes are not a file of torch.save, or it holds more than tensors."""


def load_torch(file: Path | BinaryIO) -> tuple[Any, int]:
    """The content of a file of torch.save (a zip archive), and the size of the archive's entries in bytes.

    Raises:
        BrokenFileError: it is not such a file, or holds more than tensors, numbers, texts, lists and dicts.
        Mismatch: it holds more bytes than a sample may have.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch's reader would decompress an entry of any size
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_TENSORS_BYTES:
            raise Mismatch(f"holds {size} bytes, more than the {MAX_TENSORS_BYTES} that a sample may have")
        if not isinstance(file, Path):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True), size
    except _BROKEN as error:
        reason = str(error).strip().partition("\n")[0][:100]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's text recommends to load it without the check
            reason = "the file is broken or holds more than a tensor"
        raise BrokenFileError(reason) from None


def plain_tensor(value: Any, file_bytes: int) -> torch.Tensor:
    """`value`, if it is a dense CPU tensor with all its numbers in the file.

    Raises:
        Mismatch: it is something else, or an expanded view.
    """
    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.is_nested
        or value.device.type != "cpu"
    ):
        raise Mismatch(f"holds {type(value).__name__}, not one dense tensor")
    if value.nbytes > file_bytes:
        raise Mismatch("holds a view of fewer numbers than its shape says; store the tensor itself")
    return value.detach()


def safetensors_entries(read: Read, offset: int, size: int) -> dict[str, Any]:
    """The entries of a safetensors header, by tensor name.

    Raises:
        Mismatch: it is not a safetensors file.
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


def _parse_safetensors_entry(entry: Any, data_offset: int, data_bytes: int) -> StoredTensor:
    """Every number is checked before it is used: it may be anything, such as 10^4000."""
    try:
        dtype, shape, (begin, end) = _SAFETENSORS_TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise Mismatch(f"has a tensor of a type that we do not read ({', '.join(_SAFETENSORS_TYPES)})") from None
    is_range = type(begin) is type(end) is int and 0 <= begin <= end <= data_bytes
    if not is_range or _byte_count(dtype, shape, data_bytes) != end - begin:
        raise Mismatch("has a safetensors header that does not fit its data")
    return StoredTensor(dtype, shape, data_offset + begin)


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
    descr, shape, fortran = _parse_npy_header(header)
    if descr not in _NPY_TYPES:
        raise Mismatch(f"is an array of type {descr!r:.40}, not one of {', '.join(_NPY_TYPES)}")
    if _byte_count(_NPY_TYPES[descr], shape, size) != size - header_bytes:
        raise Mismatch(f"is an array {list(shape)!r:.80} of another size than its data")
    return StoredTensor(_NPY_TYPES[descr], shape, offset + header_bytes, fortran)


@functools.lru_cache(maxsize=1024)
def _parse_npy_header(header: bytes) -> tuple[str, tuple[int, ...], bool]:
    """Type, shape and order. numpy's reader accepts only a dict of literals and creates no objects."""
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        parse = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = parse(file)
    except Exception:  # of damaged bytes numpy raises whatever its tokenizer and literal_eval raise
        raise Mismatch("has a .npy header that is not readable") from None
    return dtype.str, tuple(shape), bool(fortran) and len(shape) > 1


def _byte_count(dtype: torch.dtype, shape: tuple[Any, ...], max_size: int) -> int | None:
    """Bytes of a tensor, in Python's unbounded integers; None if the shape is invalid."""
    if len(shape) > 8 or not all(type(size) is int and 0 < size <= max_size for size in shape):
        return None
    count: int = math.prod(shape) * dtype.itemsize
    return count


def _as_tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _list_some(names: Any) -> str:
    listed = sorted(map(str, names))
    return (", ".join(repr(name)[:40] for name in listed[:8]) or "none") + (", ..." if len(listed) > 8 else "")
