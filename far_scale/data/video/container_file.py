"""What the readers of containers share: a file read by place, what a container says, and what may be wrong with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

MOST_BEHIND = 17  # frames that may be predicted from one that is stored before them but shown after them


@dataclass(frozen=True)
class Edits:
    """Seconds of a track in an MP4 or MOV file, as said in four places; its edit list may hide samples.

    Attributes:
        media: of all samples, by the media's header.
        samples: the same, summed over the samples.
        end: when the last sample ends that is shown.
        track: of what is shown, by the track's header.
        shown: the same, summed over the edits; None without an edit list.
        offsets_agree: as many samples have a time to be shown at as there are.
    """

    media: float
    samples: float
    end: float
    track: float
    shown: float | None
    offsets_agree: bool


@dataclass(frozen=True)
class Said:
    """What a container says of one stream.

    Attributes:
        packets: how many packets with data it has; None if that is not said.
        edits: of MP4 and MOV files that are not fragmented.
    """

    packets: int | None = None
    edits: Edits | None = None


class Cut(Exception):
    """The file ends before what it says it has."""


class Damaged(Exception):
    """The structure of the file contradicts itself."""


class File:
    """A file, read at given places.

    Attributes:
        size: bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def at(self, place: int, count: int) -> bytes:
        """`count` bytes from `place` on.

        Raises:
            Cut: the file ends before.
        """
        if place < 0 or place + count > self.size:
            raise Cut
        self._file.seek(place)
        return self._file.read(count)

    def number(self, place: int, count: int) -> int:
        """A big-endian number of `count` bytes."""
        return int.from_bytes(self.at(place, count), "big")
