"""Walking MDS files that others wrote with mosaicml-streaming: where each column of each sample lies.

The format is that of mds.py with any columns: one of a fixed size has no size in the samples. Nothing in it is
believed, and no column is decoded here; one that is pickled never is.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from far_scale.data.shards.adopted import MAX_NAME, PartKind
from far_scale.data.shards.mds import MAX_SAMPLES, BadMdsError
from far_scale.data.shards.members import ForeignMemberError, Member
from far_scale.data.shards.sample import Mismatch

_MAX_CONFIG, _MAX_COLUMNS = 1 << 20, 256
# mosaicml-streaming 0.13, streaming/base/format/mds/encodings.py: of its numbers, and of the types of its arrays.
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
_TYPE_NUMBERS = {8: "uint8", 9: "int8", 17: "int16", 18: "float16", 33: "int32", 34: "float32", 65: "int64"}
_TYPE_NUMBERS |= {66: "float64"}
_SIZES = ("<u1", "<u2", "<u4", "<u8")  # of an array's shape, by the lowest two bits of the byte before it
_MOST_START = 2 + 8 * 8


class MdsColumns:
    """The columns of an MDS file.

    Attributes:
        encodings: by name, in their order.
    """

    def __init__(self, config: bytes) -> None:
        """`config` is the JSON that stands in the file before its samples.

        Raises:
            BadMdsError: it does not describe columns.
        """
        try:
            values = json.loads(config.decode())
            names, encodings, sizes = (values[f"column_{what}"] for what in ("names", "encodings", "sizes"))
            self.encodings = dict(zip(names, encodings, strict=True))
            self.sizes: list[int | None] = [size or None for size in sizes]
            known = values["format"] == "mds" and len(self.sizes) == len(self.encodings) == len(names) <= _MAX_COLUMNS
            texts = all(
                type(each) is str and each.isprintable() and len(each) <= MAX_NAME for each in names + encodings
            )
            if not (known and texts and all(each is None or (type(each) is int and each > 0) for each in self.sizes)):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise BadMdsError("its header does not describe columns") from None

    def places(self, offset: int, size: int, starts: bytes) -> dict[str, Member]:
        """Where the columns of the sample at `offset` lie, which begins with the bytes `starts`."""
        given = iter(struct.unpack_from(f"<{self.sizes.count(None)}I", starts))
        at, members = offset + 4 * self.sizes.count(None), {}
        for name, fixed in zip(self.encodings, self.sizes, strict=True):
            part = next(given) if fixed is None else fixed
            members[name] = Member("", name, at, part)
            at += part
        if at != offset + size:
            raise BadMdsError(f"the sizes of the sample at {offset} do not add up to its {size} bytes")
        return members


def walk_mds(read: Any, file_bytes: int) -> tuple[MdsColumns, Iterator[dict[str, Member]]]:
    """The columns of an MDS file, and where they lie in each of its samples.

    Args:
        read: bytes of the file by offset and size.
        file_bytes: its size.

    Raises:
        BadMdsError: it is none, or not all of one; also while the samples are gone through.
    """
    try:
        (samples,) = struct.unpack("<I", read(0, 4))
        if not 0 < samples <= MAX_SAMPLES:
            raise BadMdsError(f"{samples} samples, and 1 to {MAX_SAMPLES} may be in it")
        offsets = np.frombuffer(read(4, 4 * (samples + 1)), "<u4").tolist()
        begin = 4 + 4 * (samples + 1)
        if not begin < offsets[0] <= begin + _MAX_CONFIG or offsets[-1] != file_bytes:
            raise BadMdsError("its offsets do not fit its size")
        columns = MdsColumns(bytes(read(begin, offsets[0] - begin)))
    except Mismatch as problem:
        raise BadMdsError(str(problem)) from None
    least = 4 * columns.sizes.count(None)

    def places() -> Iterator[dict[str, Member]]:
        for first, last in itertools.pairwise(offsets):
            if last - first < least:
                raise BadMdsError("its offsets do not rise")
            yield columns.places(first, last - first, bytes(read(first, least)))

    return columns, places()


def kind_of(encoding: str, start: bytes) -> PartKind | None:
    """What a column is, by its encoding and, where that says only that it is bytes, by its first bytes.

    None of what cannot hold a part of a sample, and of pickles.
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
    """Refuse a file in which columns are encoded in another way than in the set's first one.

    Args:
        encodings: of the file's columns.
        parts: what the set's parts are, by column.

    Raises:
        ForeignMemberError: which one.
    """
    for column, kind in parts.items():
        encoding = encodings.get(column)
        expected = kind if kind.startswith("ndarray") else kind.removeprefix("number:") if ":" in kind else None
        free = encoding in ("bytes", "str", "json", "str_int", "str_float", "str_decimal")
        if encoding != expected and not (expected is None and free):
            raise ForeignMemberError(f"its column {column!r} is encoded as {encoding}, not as in the first shard")


def array_place(encoding: str, start: bytes, size: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Type and shape of an array of `size` bytes in all, and where in it its numbers begin.

    Args:
        encoding: `ndarray`, `ndarray:TYPE` or `ndarray:TYPE:SHAPE`.
        start: the first bytes, as many as `start_bytes` says.

    Raises:
        Mismatch: its header does not fit its size.
    """
    _, type_name, shape_text = [*encoding.split(":"), "", ""][:3]
    at = 0
    try:
        if not type_name:
            type_name, at = _TYPE_NUMBERS[start[0]], 1
        if shape_text:
            shape = tuple(map(int, shape_text.split(",")))
        else:
            axes, kind = start[at] >> 2, _SIZES[start[at] & 3]
            sizes = start[at + 1 : at + 1 + axes * np.dtype(kind).itemsize]
            shape, at = tuple(np.frombuffer(sizes, kind, axes).tolist()), at + 1 + len(sizes)
        dtype = _TYPES[type_name]
    except (KeyError, IndexError, ValueError):
        raise Mismatch("is no array that we read") from None
    if len(shape) > 8 or not all(shape) or math.prod(shape) * dtype.itemsize != size - at:
        raise Mismatch(f"is an array {list(shape)!r:.80} of another size than its data")
    return dtype, shape, at


def start_bytes(size: int) -> int:
    """How many bytes of an array `array_place` needs."""
    return min(size, _MOST_START)
