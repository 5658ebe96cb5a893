"""A shard to adopt as a local, uncompressed file: the file itself, or a temporary copy."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from far_scale.data.adopt.sources import SourceShard
from far_scale.data.remote.compression import DecompressionError, compression_of, decompress, max_compressed_bytes
from far_scale.data.remote.fetch import fetch_and_hash, fetch_bytes
from far_scale.data.shards.records import read_small
from far_scale.utils.errors import UserError
from far_scale.utils.io import file_digest, full_disk, sha256
from far_scale.utils.urls import is_file_url, redact_url


class LocalCopy(NamedTuple):
    """A local, uncompressed shard.

    Attributes:
        stamp: size and modification time of the original file; None if it is remote.
    """

    path: Path
    bytes: int
    sha256: str
    stamp: list[int] | None


def file_stamp(shard: SourceShard) -> list[int] | None:
    """Size and modification time (ns) of a shard's file; None if it is remote."""
    if is_file_url(shard.location):
        return None
    status = os.stat(shard.location)
    return [status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def local_copy(shard: SourceShard, out: Path, number: int) -> Iterator[LocalCopy]:
    """Provide a shard as a local file. A remote or compressed shard is copied to `out` and removed afterwards.

    Raises:
        UserError: it is missing, cannot be fetched or unpacked, or its digest is not that of its `index.json`.
    """
    stamp, compression = file_stamp(shard), compression_of(shard.location)
    if stamp is not None and compression is None:
        _check_digest(shard, Path(shard.location))
        yield LocalCopy(Path(shard.location), stamp[0], sha256(shard.location), stamp)
        return
    path = out / f".fetched-{number:06d}.part"
    try:
        size, digest = _fetch(shard, compression, path)
        _check_digest(shard, path)
        yield LocalCopy(path, size, digest, stamp)
    finally:
        path.unlink(missing_ok=True)


def _check_digest(shard: SourceShard, path: Path) -> None:
    if shard.digest is None:
        return
    name, digest = shard.digest
    if file_digest(path, name) != digest:
        raise UserError(f"{redact_url(shard.location)}: its {name} is not that in its index.json; copy it again")


def _fetch(shard: SourceShard, compression: str | None, path: Path) -> tuple[int, str]:
    """Write the uncompressed shard to `path`; returns its size and SHA-256."""
    try:
        with open(path, "wb") as file:
            if compression is None:
                return fetch_and_hash(shard.location, file.fileno())
            unpacked = _read_unpacked(shard, compression)
            return file.write(unpacked), hashlib.sha256(unpacked).hexdigest()
    except OSError as error:
        if (reason := full_disk(error)) is not None:
            copy = f"a copy of {redact_url(shard.location)}"
            raise UserError(f"{path.parent}: {reason}, and {copy} does not fit; free some space") from None
        raise


def _read_unpacked(shard: SourceShard, compression: str) -> bytearray:
    if shard.bytes is None:
        raise UserError(f"{redact_url(shard.location)}: is compressed; name its index.json, which has its size")
    max_bytes = max_compressed_bytes(shard.bytes)
    data = (
        fetch_bytes(shard.location, max_bytes)
        if is_file_url(shard.location)
        else read_small(Path(shard.location), max_bytes)
    )
    try:
        return decompress(data, compression, shard.bytes)
    except DecompressionError as problem:
        raise UserError(f"{redact_url(shard.location)}: {problem}; copy it again") from None
