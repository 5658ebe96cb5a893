"""Where the files of a shard set come from: a folder of this machine, directly or by way of the node's cache, or a URL
by way of it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple, Protocol

from far_scale.data.remote.cache import CacheError, NodeCache
from far_scale.data.remote.fetch import FetchError, fetch_bytes, is_file_url, is_remote, join, shown
from far_scale.data.remote.unpack import compression_of
from far_scale.data.shards.damage import DamagedError
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.shards.typed import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, read_small
from far_scale.utils.errors import UserError, print_warning

PIPES_VARIABLE = "FAR_SCALE_PIPES"  # with 1 a manifest's pipe: commands are run


class NoWayError(UserError):
    """A shard that cannot be asked for, whatever it is: something is missing on the command line."""


def missing(name: str, what: str, again: str) -> DamagedError:
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


class LocalStore:
    """A folder of this machine; what lies there, or at an absolute path, is read as it is.

    Args:
        folder: where.
        again: what to do about a missing file that is nowhere else, for messages.
    """

    def __init__(self, folder: Path, again: str) -> None:
        self._folder, self._again = folder, again

    def name(self, file: str) -> str:
        return str(self._folder / file)

    def path(self, file: str, size: int, digest: str) -> Path:
        return self._folder / file

    def open(self, file: str, size: int, digest: str) -> int:
        try:
            return os.open(self._folder / file, os.O_RDONLY)
        except FileNotFoundError:
            raise missing(self.name(file), "shard", self._again) from None

    def read_index(self, file: str, digest: str) -> bytes:
        try:
            return read_small(self._folder / file, MAX_INDEX_BYTES)
        except FileNotFoundError:
            raise missing(self.name(file), "shard's index", self._again) from None

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        pass


class StagingCounts(NamedTuple):
    """Shards and their indexes: what a staged set has read where.

    Attributes:
        copied_files, copied_bytes: from the source to the node's disk.
        opened_on_node: opened on the node's disk.
        opened_at_source: opened where they lie, since the node's disk had no room.
    """

    copied_files: int
    copied_bytes: int
    opened_on_node: int
    opened_at_source: int


class StagedStore(LocalStore):
    """A folder of this machine, on Lustre or NFS as a rule, whose files come into the node's cache as they are read.

    A copy has the manifest's size and SHA-256. Files that the node's disk has no room for are read where they lie,
    which is said once.
    """

    def __init__(self, folder: Path, node: NodeCache, again: str) -> None:
        super().__init__(folder, again)
        self._node, self._lock = node, threading.Lock()
        self._since: int | None = None
        self._disk_fails = self._said = False
        self._on_node = self._at_source = 0

    def open(self, file: str, size: int, digest: str) -> int:
        if (staged := self._stage(file, size, digest)) is not None:
            return staged
        descriptor = super().open(file, size, digest)
        self._count_source()
        return descriptor

    def read_index(self, file: str, digest: str) -> bytes:
        if (staged := self._stage(file, None, digest)) is not None:
            with os.fdopen(staged, "rb") as index:
                return index.read(MAX_INDEX_BYTES)
        text = super().read_index(file, digest)
        self._count_source()
        return text

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        """Have a file on the node's disk before it is asked for, unless there is no room."""
        if not self._disk_fails and digest not in self._node:
            try:
                self._node.fetch_ahead(self.name(file), digest, size, self._first_use())
            except CacheError as problem:
                self._give_up(problem)
            except FetchError:
                return  # left to whoever asks for it

    def counts(self) -> StagingCounts:
        """Of this process so far."""
        return StagingCounts(self._node.fetched_files, self._node.fetched_bytes, self._on_node, self._at_source)

    def _stage(self, file: str, size: int | None, digest: str) -> int | None:
        """A descriptor of the copy; None where there is none and no room for it, or no source."""
        name = self.name(file)
        try:
            if self._disk_fails:
                found = self._node.find(digest, size)
            elif (found := self._node.open_if_room(name, digest, size, self._first_use())) is None:
                limit = f"data.cache_gb={self._node.most_bytes / 1e9:g} is full"
                self._say(f"{limit}; raise it to stage the rest of the set as well")
        except CacheError as problem:
            self._give_up(problem)
            return None
        except FetchError as problem:
            if not os.path.exists(name):
                return None
            raise DamagedError(name, str(problem).removeprefix(f"{name}: ")) from None
        if found is not None:
            with self._lock:
                self._on_node += 1
        return found

    def _first_use(self) -> int:
        """When the set's first file was asked for, in ns: what was read after it is kept in the cache.

        A second earlier, since file times are behind the clock by a tick.
        """
        with self._lock:
            if self._since is None:
                self._since = time.time_ns() - 10**9
            return self._since

    def _give_up(self, problem: CacheError) -> None:
        self._disk_fails = True
        self._say(str(problem))

    def _say(self, problem: str) -> None:
        with self._lock:
            said, self._said = self._said, True
        if not said:
            print_warning(
                f"data.stage_local={self._node.folder}: what is not copied yet is read from {self._folder}: {problem}"
            )

    def _count_source(self) -> None:
        with self._lock:
            self._at_source += 1


class RemoteStore:
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


class _ByUrl(RemoteStore):
    """Files at URLs of their own."""

    def __init__(self, node: NodeCache) -> None:
        super().__init__("", node)

    def _url_of(self, file: str) -> str:
        return file


class _Adopted:
    """An adopted set: its shards lie at paths or URLs of their own, their indexes where the manifest does."""

    def __init__(self, own: Store, node: NodeCache | None, again: str) -> None:
        self._own = own
        self._paths = own if isinstance(own, LocalStore) else LocalStore(Path("/"), again)
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
            raise NoWayError(
                f"{file}: a manifest names this command, and whoever wrote the manifest could have it do anything; set "
                f"{PIPES_VARIABLE}=1 if that was you"
            )
        if self._urls is None:
            raise NoWayError(
                f"{shown(file)}: this shard is remote or compressed, and is read through a cache; name a folder for it "
                "by --cache-dir (of a recipe: data.cache_dir)"
            )
        return self._urls


def adopted_store(own: Store, node: NodeCache | None, again: str) -> Store:
    """The files of an adopted set, whose indexes come from `own`; without `node` remote shards cannot be read."""
    return _Adopted(own, node, again)


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


def store_of(where: str | Path, node: NodeCache | None, again: str = "encode the set again") -> Store:
    """The files of the shard set at `where`; those of a folder come through the node's cache where there is one.

    Args:
        where: folder or URL.
        node: the cache.
        again: what to do about a missing file that is nowhere else, for messages.

    Raises:
        UserError: it is a URL, and there is no cache.
    """
    if not is_remote(where):
        return LocalStore(Path(where), again) if node is None else StagedStore(Path(where), node, again)
    if node is None:
        raise UserError(
            f"{shown(str(where))}: a shard set far away is read in training alone, through data.cache_dir; copy it here"
        )
    return RemoteStore(str(where), node)
