"""Walking a tar front to back and believing nothing in it: what is not a plain member of ours is refused.

Python's tarfile is made for archives of every kind: it unpacks compressed ones, follows what extended headers say of
sizes and names, and allocates what they claim. A shard needs none of this, and may come from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
# A name stays below the shard's own samples: no slash, no "..". WebDataset splits it at its first dot.
_NAME = re.compile(r"([A-Za-z0-9_-]{1,80})\.(json|safetensors)")
_SIZE = re.compile(rb"[0-7]{1,11}[ \0]?")
# Extended headers that say when, not what: writers add them where a time is not a whole number of seconds.
_TIMES = re.compile(rb"(?:\d{1,3} [acm]time=[0-9.]{1,40}\n)+")


class BadTarError(Exception):
    """Bytes that are no tar, or not all of one."""


class ForeignMemberError(Exception):
    """A member that no shard of ours has."""


class Member(NamedTuple):
    """A member of a tar: sample key, "json" or "safetensors", and where its data lies, in bytes."""

    key: str
    kind: str
    offset: int
    size: int


class TarWalk:
    """Iterating yields the members in order; `read` reads on in the data of the member that came last.

    What is not asked for is passed by seeking; a file that cannot seek will do where all of each member is read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at, self._end = file, 0, 0

    def __iter__(self) -> Iterator[Member]:
        """The members.

        Raises:
            BadTarError: it is no tar, or ends before the block of zeros that ends every tar.
            ForeignMemberError: a member that is neither KEY.json nor KEY.safetensors, or not a plain file.
        """
        while True:
            header = self._header()
            if not any(header):
                return
            size, kind = _parse(header)
            if kind == b"x":
                self._skip_times(size)
                continue
            self._end = self._at + size
            yield _member(header, kind, self._at, size)
            if self._at < self._end:
                self._file.seek(self._end - self._at, 1)
                self._at = self._end

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the member, or what is left of them in it.

        Raises:
            BadTarError: the file ends before.
        """
        return self._take(min(size, self._end - self._at))

    def _header(self) -> bytes:
        self._take(-self._at % BLOCK)
        return self._take(BLOCK)

    def _skip_times(self, size: int) -> None:
        if size > BLOCK or not _TIMES.fullmatch(self._take(size)):
            raise ForeignMemberError("an extended header says more of a member than its times")

    def _take(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            part = self._file.read(min(missing, 1 << 24))  # never more at once than a small piece of what is claimed
            if not part:
                raise BadTarError(f"it ends in the middle, after {self._at + size - missing} bytes")
            parts.append(part)
            missing -= len(part)
        self._at += size
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _parse(header: bytes) -> tuple[int, bytes]:
    """Size of the data and kind of the entry that follows a header."""
    stored, size = header[148:156].strip(b" \0"), header[124:136]
    if header[257:262] != b"ustar" or not _SIZE.fullmatch(stored):
        raise BadTarError("there is no tar header where one should be")
    if int(stored, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise BadTarError("a header's checksum is wrong")
    if not _SIZE.fullmatch(size):
        raise BadTarError("a header's size is not readable")
    return int(size.strip(b" \0"), 8), header[156:157]


def _member(header: bytes, kind: bytes, offset: int, size: int) -> Member:
    name = header[:100].rstrip(b"\0").decode("latin-1")
    known = _NAME.fullmatch(name)
    if not (known and kind in (b"0", b"\0") and not header[345]):  # from 345 on: a folder to put before the name
        raise ForeignMemberError(f"member {name!r} is neither KEY.json nor KEY.safetensors")
    return Member(known[1], known[2], offset, size)
