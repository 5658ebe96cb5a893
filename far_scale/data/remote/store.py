"""Where the files of a shard set come from: a folder of this machine, or a URL by way of the node's cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

from far_scale.data.remote.cache import NodeCache
from far_scale.data.remote.fetch import FetchError, fetch_bytes, is_file_url, is_remote, join, shown
from far_scale.data.remote.unpack import compression_of
from far_scale.data.shards.damage import DamagedError
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.shards.typed import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, read_small
from far_scale.errors import UserError

PIPES_VARIABLE = "FAR_SCALE_PIPES"  # with 1 a manifest's pipe: commands are run


def missing(name: str, what: str, again: str = "encode the set again") -> DamagedError:
    """The error of a shard, or of its index, that is not there; `again` is what to do if it is nowhere else."""
    return DamagedError(name, f"this {what} is missing; copy it again, or {again}")


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

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        """Have a remote file in the node's cache before it is asked for, unless there is no room.

        What cannot be fetched is left to whoever asks for it.
        """
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

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        pass


class FarAway:
    """A URL; each file comes into the node's cache whole, and is checked on the way."""

    def __init__(self, url: str, node: NodeCache) -> None:
        self._url, self._node = url, node

    def name(self, file: str) -> str:
        return shown(self._url_of(file))

    def path(self, file: str, size: int, digest: str) -> Path:
        os.close(self.open(file, size, digest))
        return self._node.folder / digest

    def open(self, file: str, size: int, digest: str) -> int:
        return self._open(file, digest, size)

    def read_index(self, file: str, digest: str) -> bytes:
        with os.fdopen(self._open(file, digest, None), "rb") as index:
            return index.read(MAX_INDEX_BYTES)

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        if digest not in self._node:
            with contextlib.suppress(FetchError):
                self._node.fetch_ahead(self._url_of(file), digest, size)

    def _url_of(self, file: str) -> str:
        return join(self._url, file)

    def _open(self, file: str, digest: str, size: int | None) -> int:
        try:
            return self._node.open(self._url_of(file), digest, size)
        except FetchError as problem:
            name = self.name(file)
            raise DamagedError(name, str(problem).removeprefix(f"{name}: ")) from None


class _ByUrl(FarAway):
    """Files at URLs of their own."""

    def __init__(self, node: NodeCache) -> None:
        super().__init__("", node)

    def _url_of(self, file: str) -> str:
        return file


class _ByPath(Folder):
    """Files at absolute paths of their own."""

    def __init__(self) -> None:
        super().__init__(Path("/"))

    def open(self, file: str, size: int, digest: str) -> int:
        try:
            return os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            raise missing(file, "shard", "adopt the shards again") from None


class _Adopted:
    """An adopted set: its shards lie at paths or URLs of their own, their indexes where the manifest does."""

    def __init__(self, own: Store, node: NodeCache | None) -> None:
        self._own, self._paths = own, _ByPath()
        self._urls = None if node is None else _ByUrl(node)

    def name(self, file: str) -> str:
        return shown(file) if file.startswith("/") or is_file_url(file) else self._own.name(file)

    def path(self, file: str, size: int, digest: str) -> Path:
        return self._of(file).path(file, size, digest)

    def open(self, file: str, size: int, digest: str) -> int:
        return self._of(file).open(file, size, digest)

    def read_index(self, file: str, digest: str) -> bytes:
        return self._own.read_index(file, digest)

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        self._of(file).fetch_ahead(file, digest, size)

    def _of(self, file: str) -> Store:
        packed = compression_of(file) is not None
        if file.startswith("/") and not packed:
            return self._paths
        if not packed and not is_file_url(file):
            return self._own
        if file.startswith("pipe:") and os.environ.get(PIPES_VARIABLE) != "1":
            raise UserError(
                f"{file}: a manifest names this command, and whoever wrote the manifest could have it do anything; set "
                f"{PIPES_VARIABLE}=1 if that was you"
            )
        if self._urls is None:
            raise UserError(
                f"{shown(file)}: this shard comes through a cache, as it is remote or compressed; name its folder"
            )
        return self._urls


def adopted_store(own: Store, node: NodeCache | None) -> Store:
    """The files of an adopted set, whose indexes come from `own`; without `node` remote shards cannot be read."""
    return _Adopted(own, node)


def manifest_text(where: str | Path) -> bytes:
    """What stands in a shard set's manifest, here or far away.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    if is_remote(where):
        return fetch_bytes(join(str(where), MANIFEST_NAME), MAX_MANIFEST_BYTES)
    return Manifest.text(where)


def name_of(where: str | Path, file: str) -> str:
    """A file of the shard set at `where`, as messages call it."""
    return shown(join(str(where), file)) if is_remote(where) else str(Path(where) / file)


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
