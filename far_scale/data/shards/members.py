"""Reading a shard's members front to back, with the tar format. Nothing in the file is trusted.

A shard is a tar or an MDS file (mds.py). Both hold the same two members of each sample: its JSON and its safetensors.

Python's tarfile is made for archives of every kind: it decompresses, applies sizes and names of extended headers, and
allocates what they claim. Shards need none of this, and may come from anyone.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from far_scale.data.shards.errors import BadShardError, UnexpectedMemberError
from far_scale.data.shards.records import KEY_PATTERN

_BLOCK = 512
_READ_BYTES = 1 << 24  # at once, however much the file claims to have
# No slash and no "..". WebDataset splits the name at its first dot.
_NAME = re.compile(rf"({KEY_PATTERN.pattern})\.(json|safetensors)")
_SIZE = re.compile(rb"[0-7]{1,11}[ \0]?")
# Extended headers with times only: writers add them where a time is not a whole number of seconds.
_TIMES = re.compile(rb"(?:\d{1,3} [acm]time=[0-9.]{1,40}\n)+")


class Member(NamedTuple):
    """A member of a shard: sample key, "json" or "safetensors", and its data's offset and size in bytes."""

    key: str
    kind: str
    offset: int
    size: int


class MemberReader(ABC):
    """Iterates over a shard's members in order; `read` reads the data of the current one.

    Unread data is skipped by seeking. A file without seek works if every member is read in full.
    """

    truncated: type[BadShardError]
    """Raised where the file ends too early."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._offset, self._end = file, 0, 0

    @abstractmethod
    def __iter__(self) -> Iterator[Member]:
        """The members.

        Raises:
            BadShardError: the bytes are not a complete file of the format.
            UnexpectedMemberError: a member that our shards do not have.
        """

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the member, fewer at its end.

        Raises:
            BadShardError: the file ends before.
        """
        return self._take(min(size, self._end - self._offset))

    def _offer(self, key: str, kind: str, size: int) -> Iterator[Member]:
        """Yield the member that begins here, then skip its unread data."""
        self._end = self._offset + size
        yield Member(key, kind, self._offset, size)
        if self._offset < self._end:
            self._file.seek(self._end - self._offset, 1)
            self._offset = self._end

    def _take(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            part = self._file.read(min(missing, _READ_BYTES))
            if not part:
                raise self.truncated(f"it ends in the middle, after {self._offset + size - missing} bytes")
            parts.append(part)
            missing -= len(part)
        self._offset += size
        return parts[0] if len(parts) == 1 else b"".join(parts)


class BadTarError(BadShardError):
    """The bytes are not a complete tar, which ends with a block of zeros."""

    format = "a tar file"


class TarReader(MemberReader):
    """The members of a tar of ours: plain files KEY.json and KEY.safetensors."""

    truncated = BadTarError

    def __iter__(self) -> Iterator[Member]:
        while True:
            header = self._header()
            if not any(header):
                return
            size, kind = _parse_header(header)
            if kind == b"x":
                self._skip_times(size)
                continue
            yield from self._offer(*_parse_name(header, kind), size)

    def _header(self) -> bytes:
        self._take(-self._offset % _BLOCK)
        return self._take(_BLOCK)

    def _skip_times(self, size: int) -> None:
        if size > _BLOCK or not _TIMES.fullmatch(self._take(size)):
            raise UnexpectedMemberError("an extended header has more than a member's times")


def check_header_checksum(header: bytes) -> None:
    """Check the checksum of a tar header.

    Raises:
        BadTarError: there is none, or it is wrong.
    """
    stored = header[148:156].strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,8}", stored):
        raise BadTarError("there is no tar header where one should be")
    if int(stored, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise BadTarError("a header's checksum is wrong")


def _parse_header(header: bytes) -> tuple[int, bytes]:
    """Data size and kind of the entry that follows a header."""
    if header[257:262] != b"ustar":
        raise BadTarError("there is no tar header where one should be")
    check_header_checksum(header)
    size = header[124:136]
    if not _SIZE.fullmatch(size):
        raise BadTarError("a header's size is not readable")
    return int(size.strip(b" \0"), 8), header[156:157]


def _parse_name(header: bytes, kind: bytes) -> tuple[str, str]:
    """Sample key and kind of the member that follows a header."""
    name = header[:100].rstrip(b"\0").decode("latin-1")
    match = _NAME.fullmatch(name)
    if not (match and kind in (b"0", b"\0") and not header[345]):  # from 345 on: a folder before the name
        raise UnexpectedMemberError(f"member {name!r} is neither KEY.json nor KEY.safetensors")
    return match[1], match[2]
