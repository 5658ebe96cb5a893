"""What the walks of both shard formats share: reading front to back and believing nothing that stands in the file.

A shard is a tar (tar.py) or an MDS file (mds.py). Either holds the very same two members of each sample: its JSON and
its safetensors.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

# WebDataset splits a member's name at its first dot, and a USTAR name holds 100 characters.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")


class BadShardError(Exception):
    """Bytes that are no file of the format, or not all of one."""

    format = "a shard"


class ForeignMemberError(Exception):
    """A member that no shard of ours has."""


class Member(NamedTuple):
    """A member of a shard: sample key, "json" or "safetensors", and where its data lies, in bytes."""

    key: str
    kind: str
    offset: int
    size: int


class MemberWalk(ABC):
    """Iterating yields the members in order; `read` reads on in the data of the member that came last.

    What is not asked for is passed by seeking; a file that cannot seek will do where all of each member is read.
    """

    bad: type[BadShardError]
    """What is raised where the file ends too early."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at, self._end = file, 0, 0

    @abstractmethod
    def __iter__(self) -> Iterator[Member]:
        """The members.

        Raises:
            BadShardError: it is no file of the format, or not all of one.
            ForeignMemberError: a member that no shard of ours has.
        """

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the member, or what is left of them in it.

        Raises:
            BadShardError: the file ends before.
        """
        return self._take(min(size, self._end - self._at))

    def _offer(self, key: str, kind: str, size: int) -> Iterator[Member]:
        """The member whose data begins here; what is left of it is passed afterwards."""
        self._end = self._at + size
        yield Member(key, kind, self._at, size)
        if self._at < self._end:
            self._file.seek(self._end - self._at, 1)
            self._at = self._end

    def _take(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            part = self._file.read(min(missing, 1 << 24))  # never more at once than a small piece of what is claimed
            if not part:
                raise self.bad(f"it ends in the middle, after {self._at + size - missing} bytes")
            parts.append(part)
            missing -= len(part)
        self._at += size
        return parts[0] if len(parts) == 1 else b"".join(parts)
