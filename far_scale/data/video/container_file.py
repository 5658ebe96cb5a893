"""Common parts of the container parsers: random access to a file, what a container declares, and the errors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

MAX_REORDER = 17  # frames that may be stored after a frame and presented before it


@dataclass(frozen=True)
class EditDurations:
    """Durations of an MP4 or MOV track in seconds, from the places that store them; an edit list may hide samples.

    Attributes:
        media: all samples, by the media header.
        samples: all samples, by the sum over the sample table.
        last_end: end of the sample that is presented last.
        track: what is presented, by the track header.
        presented: what is presented, by the sum over the edit list; None without an edit list.
        offsets_agree: whether every sample has a presentation offset.
    """

    media: float
    samples: float
    last_end: float
    track: float
    presented: float | None
    offsets_agree: bool


@dataclass(frozen=True)
class StreamInfo:
    """What a container declares about one stream.

    Attributes:
        packets: number of packets with data; None if it is not declared.
        edits: only for MP4 and MOV files without fragments.
    """

    packets: int | None = None
    edits: EditDurations | None = None


class TruncatedFile(Exception):
    """The file is shorter than its structure declares."""


class CorruptFile(Exception):
    """The structure of the file contradicts itself."""


class BinaryReader:
    """Random access to a file with bounds checks.

    Attributes:
        size: bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes at `offset`.

        Raises:
            TruncatedFile: the file ends before.
        """
        if offset < 0 or offset + count > self.size:
            raise TruncatedFile
        self._file.seek(offset)
        return self._file.read(count)

    def read_uint(self, offset: int, count: int) -> int:
        """Read a big-endian unsigned integer of `count` bytes."""
        return int.from_bytes(self.read(offset, count), "big")

    def read_uint_le(self, offset: int, count: int) -> int:
        """Read a little-endian unsigned integer of `count` bytes."""
        return int.from_bytes(self.read(offset, count), "little")
