"""Reading adopted MDS files of mosaicml-streaming: the offset and size of each column of each sample.

The format is that of mds.py with any columns; a column of fixed size has no size field in the samples. Nothing in the
file is trusted. No column is decoded here, and pickled ones never are.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from far_scale.data.shards.adopted import MAX_NAME, PartKind
from far_scale.data.shards.errors import Mismatch, UnexpectedMemberError
from far_scale.data.shards.mds import MAX_SAMPLES, BadMdsError
from far_scale.data.shards.members import Member
from far_scale.data.shards.sample import Read

_MAX_CONFIG, _MAX_COLUMNS = 1 << 20, 256
# mosaicml-streaming 0.13, streaming/base/format/mds/encodings.py: numbers, array types, and their codes.
NUMBERS = {"int": "<i8", "int8": "<i1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "float16": "<f2"}
NUMBERS |= {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "float32": "<f4", "float64": "<f8"}
_TYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_TYPE_CODES = {8: "uint8", 9: "int8", 17: "int16", 18: "float16", 33: "int32", 34: "float32", 65: "int64"}
_TYPE_CODES |= {66: "float64"}
_SHAPE_TYPES = ("<u1", "<u2", "<u4", "<u8")  # by the lowest two bits of the byte before an array's shape
_MAX_ARRAY_HEADER = 2 + 8 * 8


class MdsColumns:
    """The columns of an MDS file.

    Attributes:
        encodings: by name, in order of the columns.
        sizes: in bytes; None for a column of variable size.
    """

    def __init__(self, config: bytes) -> None:
        """`config` is the JSON between the offsets and the samples.

        Raises:
            BadMdsError: it does not describe columns.
        """
        try:
            values = json.loads(config.decode())
            names, encodings, sizes = (values[f"column_{what}"] for what in ("names", "encodings", "sizes"))
            self.encodings = dict(zip(names, encodings, strict=True))
            self.sizes: list[int | None] = [size or None for size in sizes]
            texts = names + encodings
            is_valid = (
                values["format"] == "mds"
                and len(self.sizes) == len(self.encodings) == len(names) <= _MAX_COLUMNS
                and all(type(text) is str and text.isprintable() and len(text) <= MAX_NAME for text in texts)
                and all(size is None or (type(size) is int and size > 0) for size in self.sizes)
            )
            if not is_valid:
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise BadMdsError("its header does not describe columns") from None

    @property
    def header_bytes(self) -> int:
        """Size of the sample's header: the sizes of its variable columns."""
        return 4 * self.sizes.count(None)

    def locate(self, offset: int, size: int, header: bytes) -> dict[str, Member]:
        """The columns of the sample of `size` bytes at `offset`, which begins with `header`."""
        variable_sizes = iter(struct.unpack_from(f"<{self.sizes.count(None)}I", header))
        column_offset, members = offset + self.header_bytes, {}
        for name, fixed_size in zip(self.encodings, self.sizes, strict=True):
            column_size = next(variable_sizes) if fixed_size is None else fixed_size
            members[name] = Member("", name, column_offset, column_size)
            column_offset += column_size
        if column_offset != offset + size:
            raise BadMdsError(f"the sizes of the sample at {offset} do not add up to its {size} bytes")
        return members


def read_mds(read: Read, file_bytes: int) -> tuple[MdsColumns, Iterator[dict[str, Member]]]:
    """The columns of an MDS file, and an iterator over its samples: column name -> Member.

    Args:
        read: reads bytes of the file by offset and size.
        file_bytes: size of the file.

    Raises:
        BadMdsError: it is not a complete MDS file; the iterator raises it, too.
    """
    try:
        (count,) = struct.unpack("<I", read(0, 4))
        if not 0 < count <= MAX_SAMPLES:
            raise BadMdsError(f"{count} samples, and 1 to {MAX_SAMPLES} may be in it")
        offsets = np.frombuffer(read(4, 4 * (count + 1)), "<u4").tolist()
        config_offset = 4 + 4 * (count + 1)
        if not config_offset < offsets[0] <= config_offset + _MAX_CONFIG or offsets[-1] != file_bytes:
            raise BadMdsError("its offsets do not fit its size")
        columns = MdsColumns(bytes(read(config_offset, offsets[0] - config_offset)))
    except Mismatch as problem:
        raise BadMdsError(str(problem)) from None

    def samples() -> Iterator[dict[str, Member]]:
        header_bytes = columns.header_bytes
        for begin, end in itertools.pairwise(offsets):
            if end - begin < header_bytes:
                raise BadMdsError("its offsets do not rise")
            yield columns.locate(begin, end - begin, bytes(read(begin, header_bytes)))

    return columns, samples()


def kind_of(encoding: str, start: bytes) -> PartKind | None:
    """How a column is stored, by its encoding and, of plain bytes, by its first bytes.

    Returns:
        None if it cannot hold a part of a sample, or is a pickle.
    """
    if encoding in NUMBERS:
        return f"number:{encoding}"
    if re.fullmatch(r"ndarray(:[a-z0-9]+(:\d+(,\d+)*)?)?", encoding):
        return encoding
    if encoding in ("str_int", "str_float", "str_decimal"):
        return "text"
    if encoding == "json" or (encoding in ("str", "bytes") and start.lstrip()[:1] in (b"{", b"[")):
        return "json"
    if encoding == "str":
        return "text"
    if encoding != "bytes":
        return None
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    return "safetensors" if start[8:9] == b"{" else "text"


def check_encodings(encodings: Mapping[str, str], parts: Mapping[str, PartKind]) -> None:
    """Refuse a file with columns that are encoded otherwise than in the set's first shard.

    Args:
        encodings: of the file, by column.
        parts: kinds of the set's parts, by column.

    Raises:
        UnexpectedMemberError: names the column.
    """
    for column, kind in parts.items():
        encoding = encodings.get(column)
        expected = kind if kind.startswith("ndarray") else kind.removeprefix("number:") if ":" in kind else None
        is_text_or_bytes = encoding in ("bytes", "str", "json", "str_int", "str_float", "str_decimal")
        if encoding != expected and not (expected is None and is_text_or_bytes):
            raise UnexpectedMemberError(f"its column {column!r} is encoded as {encoding}, not as in the first shard")


def parse_array_header(encoding: str, start: bytes, size: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Type and shape of an encoded array, and the offset of its data.

    Args:
        encoding: `ndarray`, `ndarray:TYPE` or `ndarray:TYPE:SHAPE`.
        start: the first `array_header_bytes(size)` bytes.
        size: of header and data, in bytes.

    Raises:
        Mismatch: the header does not fit the size.
    """
    _, type_name, shape_text = [*encoding.split(":"), "", ""][:3]
    header_bytes = 0
    try:
        if not type_name:
            type_name, header_bytes = _TYPE_CODES[start[0]], 1
        if shape_text:
            shape = tuple(map(int, shape_text.split(",")))
        else:
            axes, size_type = start[header_bytes] >> 2, _SHAPE_TYPES[start[header_bytes] & 3]
            header_bytes += 1
            sizes = start[header_bytes : header_bytes + axes * np.dtype(size_type).itemsize]
            shape = tuple(np.frombuffer(sizes, size_type, axes).tolist())
            header_bytes += len(sizes)
        dtype = _TYPES[type_name]
    except (KeyError, IndexError, ValueError):
        raise Mismatch("is no array that we read") from None
    if len(shape) > 8 or not all(shape) or math.prod(shape) * dtype.itemsize != size - header_bytes:
        raise Mismatch(f"is an array {list(shape)!r:.80} of another size than its data")
    return dtype, shape, header_bytes


def array_header_bytes(size: int) -> int:
    """How many bytes `parse_array_header` needs of an array of `size` bytes."""
    return min(size, _MAX_ARRAY_HEADER)
