"""Walking a tar front to back and believing nothing in it: what is not a plain member of ours is refused.

Python's tarfile is made for archives of every kind: it unpacks compressed ones, follows what extended headers say of
sizes and names, and allocates what they claim. A shard needs none of this, and may come from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from far_scale.data.shards.members import BadShardError, ForeignMemberError, Member, MemberWalk

BLOCK = 512
# A name stays below the shard's own samples: no slash, no "..". WebDataset splits it at its first dot.
_NAME = re.compile(r"([A-Za-z0-9_-]{1,80})\.(json|safetensors)")
_SIZE = re.compile(rb"[0-7]{1,11}[ \0]?")
# Extended headers that say when, not what: writers add them where a time is not a whole number of seconds.
_TIMES = re.compile(rb"(?:\d{1,3} [acm]time=[0-9.]{1,40}\n)+")


class BadTarError(BadShardError):
    """Bytes that are no tar, or not all of one: it has to end with a block of zeros."""

    format = "a tar file"


class TarWalk(MemberWalk):
    """The members of a tar: plain files KEY.json and KEY.safetensors."""

    bad = BadTarError

    def __iter__(self) -> Iterator[Member]:
        while True:
            header = self._header()
            if not any(header):
                return
            size, kind = _parse(header)
            if kind == b"x":
                self._skip_times(size)
                continue
            yield from self._offer(*_name(header, kind), size)

    def _header(self) -> bytes:
        self._take(-self._at % BLOCK)
        return self._take(BLOCK)

    def _skip_times(self, size: int) -> None:
        if size > BLOCK or not _TIMES.fullmatch(self._take(size)):
            raise ForeignMemberError("an extended header says more of a member than its times")


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


def _name(header: bytes, kind: bytes) -> tuple[str, str]:
    """Sample key and kind of the member that follows a header."""
    name = header[:100].rstrip(b"\0").decode("latin-1")
    known = _NAME.fullmatch(name)
    if not (known and kind in (b"0", b"\0") and not header[345]):  # from 345 on: a folder to put before the name
        raise ForeignMemberError(f"member {name!r} is neither KEY.json nor KEY.safetensors")
    return known[1], known[2]
