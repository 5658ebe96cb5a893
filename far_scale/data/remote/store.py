"""Where the files of a shard set come from: a folder of this machine, or a URL by way of the node's cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

from far_scale.data.remote.cache import NodeCache
from far_scale.data.remote.fetch import FetchError, fetch_bytes, is_remote, join, shown
from far_scale.data.shards.damage import DamagedError
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.shards.typed import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, read_small
from far_scale.errors import UserError


def missing(name: str, what: str) -> DamagedError:
    """The error of a shard, or of its index, that is not there."""
    return DamagedError(name, f"this {what} is missing; copy it again, or encode the set again")


class Store(Protocol):
    """The files of one shard set."""

    def name(self, file: str) -> str:
        """A file as messages call it."""
        ...

    def path(self, file: str, size: int, digest: str) -> Path:
        """A shard as a file of this machine, for now."""
        ...

    def open(self, file: str, size: int, digest: str) -> int:
        """A descriptor of a shard; where it comes from far away, it has this size and SHA-256."""
        ...

    def read_index(self, file: str, digest: str) -> bytes:
        """A shard's index; where it comes from far away, it has this SHA-256."""
        ...


class Folder:
    """A folder of this machine; what lies there is read as it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def name(self, file: str) -> str:
        return str(self._folder / file)

    def path(self, file: str, size: int, digest: str) -> Path:
        return self._folder / file

    def open(self, file: str, size: int, digest: str) -> int:
        try:
            return os.open(self._folder / file, os.O_RDONLY)
        except FileNotFoundError:
            raise missing(self.name(file), "shard") from None

    def read_index(self, file: str, digest: str) -> bytes:
        try:
            return read_small(self._folder / file, MAX_INDEX_BYTES)
        except FileNotFoundError:
            raise missing(self.name(file), "shard's index") from None


class FarAway:
    """A URL; each file comes into the node's cache whole, and is checked on the way."""

    def __init__(self, url: str, node: NodeCache) -> None:
        self._url, self._node = url, node

    def name(self, file: str) -> str:
        return shown(join(self._url, file))

    def path(self, file: str, size: int, digest: str) -> Path:
        os.close(self.open(file, size, digest))
        return self._node.folder / digest

    def open(self, file: str, size: int, digest: str) -> int:
        return self._open(file, digest, size)

    def read_index(self, file: str, digest: str) -> bytes:
        with os.fdopen(self._open(file, digest, None), "rb") as index:
            return index.read(MAX_INDEX_BYTES)

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        """Have a file in the cache before it is asked for, unless there is no room.

        What cannot be fetched is left to whoever asks for it.
        """
        if digest not in self._node:
            with contextlib.suppress(FetchError):
                self._node.fetch_ahead(join(self._url, file), digest, size)

    def _open(self, file: str, digest: str, size: int | None) -> int:
        try:
            return self._node.open(join(self._url, file), digest, size)
        except FetchError as problem:
            name = self.name(file)
            raise DamagedError(name, str(problem).removeprefix(f"{name}: ")) from None


def manifest_text(where: str | Path) -> bytes:
    """What stands in a shard set's manifest, here or far away.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    if is_remote(where):
        return fetch_bytes(join(str(where), MANIFEST_NAME), MAX_MANIFEST_BYTES)
    return Manifest.text(where)


def store_of(where: str | Path, node: NodeCache | None) -> Store:
    """The files of the shard set at `where`.

    Raises:
        UserError: it is a URL, and there is no cache.
    """
    if not is_remote(where):
        return Folder(Path(where))
    if node is None:
        raise UserError(
            f"{shown(str(where))}: a shard set far away is read in training alone, through data.cache_dir; copy it here"
        )
    return FarAway(str(where), node)
