"""A shard to adopt as a plain file of this machine: where it lies, or fetched and unpacked for a while."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from far_scale.data.adopt.sources import FoundShard
from far_scale.data.remote.compression import DecompressionError, compression_of, decompress, max_compressed_bytes
from far_scale.data.remote.fetch import fetch_and_hash, fetch_bytes
from far_scale.data.shards.records import read_small
from far_scale.utils.errors import UserError
from far_scale.utils.io import file_digest, sha256
from far_scale.utils.urls import is_file_url, redact_url


class LocalCopy(NamedTuple):
    """A shard as a file of this machine: its path, size and SHA-256, unpacked.

    Attributes:
        lies: size and time of its file where it lies; None of a remote one.
    """

    path: Path
    bytes: int
    sha256: str
    lies: list[int] | None


def lies_as(shard: FoundShard) -> list[int] | None:
    """Size and time of a shard's file; None of a remote one."""
    if is_file_url(shard.place):
        return None
    facts = os.stat(shard.place)
    return [facts.st_size, facts.st_mtime_ns]


@contextlib.contextmanager
def local_copy(shard: FoundShard, out: Path, number: int) -> Iterator[LocalCopy]:
    """The shard as a file of this machine; a remote one is fetched, a packed one unpacked, and removed afterwards.

    Raises:
        UserError: it is not there, cannot be fetched, does not unpack or has another digest than its `index.json` says.
    """
    lies, compression = lies_as(shard), compression_of(shard.place)
    if lies is not None and compression is None:
        _check_digest(shard, Path(shard.place))
        yield LocalCopy(Path(shard.place), lies[0], sha256(shard.place), lies)
        return
    path = out / f".fetched-{number:06d}.part"
    try:
        size, digest = _fetch(shard, compression, path)
        _check_digest(shard, path)
        yield LocalCopy(path, size, digest, lies)
    finally:
        path.unlink(missing_ok=True)


def _check_digest(shard: FoundShard, path: Path) -> None:
    if shard.digest is None:
        return
    name, digest = shard.digest
    if file_digest(path, name) != digest:
        raise UserError(f"{redact_url(shard.place)}: its {name} is not that in its index.json; copy it again")


def _fetch(shard: FoundShard, compression: str | None, path: Path) -> tuple[int, str]:
    """Write the shard, unpacked, to `path`; returns its size and SHA-256."""
    try:
        with open(path, "wb") as file:
            if compression is None:
                return fetch_and_hash(shard.place, file.fileno())
            unpacked = _unpacked(shard, compression)
            return file.write(unpacked), hashlib.sha256(unpacked).hexdigest()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path.parent}: no space left on this disk for a copy of {redact_url(shard.place)}"
            ) from None
        raise


def _unpacked(shard: FoundShard, compression: str) -> bytearray:
    if shard.bytes is None:
        raise UserError(f"{redact_url(shard.place)}: is packed; name its index.json, which says how large it is")
    most = max_compressed_bytes(shard.bytes)
    data = fetch_bytes(shard.place, most) if is_file_url(shard.place) else read_small(Path(shard.place), most)
    try:
        return decompress(data, compression, shard.bytes)
    except DecompressionError as problem:
        raise UserError(f"{redact_url(shard.place)}: {problem}; copy it again") from None
