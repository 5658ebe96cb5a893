"""The files of a shard set: in a folder, in a folder copied through the node's cache, or at a URL."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple, Protocol

from far_scale.data.remote.cache import CacheError, NodeCache
from far_scale.data.remote.compression import compression_of
from far_scale.data.remote.fetch import FetchError, fetch_bytes
from far_scale.data.shards.errors import DamagedError, NotReadableError
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.shards.records import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, read_small
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.urls import is_file_url, is_remote, join_url, redact_url

PIPES_VARIABLE = "FAR_SCALE_PIPES"  # 1 allows to run a manifest's pipe: commands


def missing_file(name: str, kind: str, rebuild_hint: str) -> DamagedError:
    """The error of a shard or index that does not exist; `rebuild_hint` is what to do if there is no copy."""
    return DamagedError(name, f"this {kind} is missing; copy it again, or {rebuild_hint}")


class Store(Protocol):
    """The files of one shard set."""

    def display_name(self, file: str) -> str:
        """Path or URL of a file for messages."""
        ...

    def path(self, file: str, size: int, digest: str) -> Path:
        """Local path of a shard, valid temporarily: a cache may evict it."""
        ...

    def open(self, file: str, size: int, digest: str) -> int:
        """A descriptor of a shard; a copy has been checked against size and SHA-256."""
        ...

    def read_index(self, file: str, digest: str) -> bytes:
        """A shard's index; a copy has been checked against the SHA-256."""
        ...

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        """Fetch a file into the node's cache before it is needed, unless there is no room.

        Files that cannot be fetched are left to `open`, which raises the error.
        """
        ...


class LocalStore:
    """A folder of this machine; files in it, or at absolute paths, are read in place.

    Args:
        folder: of the files.
        rebuild_hint: for messages, what to do about a missing file without a copy.
    """

    def __init__(self, folder: Path, rebuild_hint: str) -> None:
        self._folder, self._rebuild_hint = folder, rebuild_hint

    def display_name(self, file: str) -> str:
        return str(self._folder / file)

    def path(self, file: str, size: int, digest: str) -> Path:
        return self._folder / file

    def open(self, file: str, size: int, digest: str) -> int:
        try:
            return os.open(self._folder / file, os.O_RDONLY)
        except FileNotFoundError:
            raise missing_file(self.display_name(file), "shard", self._rebuild_hint) from None

    def read_index(self, file: str, digest: str) -> bytes:
        try:
            return read_small(self._folder / file, MAX_INDEX_BYTES)
        except FileNotFoundError:
            raise missing_file(self.display_name(file), "shard's index", self._rebuild_hint) from None

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        pass


class StagingCounts(NamedTuple):
    """Where a staged set has read its files (shards and indexes).

    Attributes:
        copied_files, copied_bytes: copied from the source to the node's disk.
        opened_on_node: opened on the node's disk.
        opened_at_source: opened at the source, because the node's disk had no room.
    """

    copied_files: int
    copied_bytes: int
    opened_on_node: int
    opened_at_source: int


class StagedStore(LocalStore):
    """A folder, usually on Lustre or NFS, with files that are copied into the node's cache when they are read.

    A copy has the manifest's size and SHA-256. Files without room on the node's disk are read at the source, with one
    warning.
    """

    def __init__(self, folder: Path, cache: NodeCache, rebuild_hint: str) -> None:
        super().__init__(folder, rebuild_hint)
        self._cache, self._lock = cache, threading.Lock()
        self._first_use_ns: int | None = None
        self._has_disk_failed = self._has_warned = False
        self._opened_on_node = self._opened_at_source = 0

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
        if not self._has_disk_failed and digest not in self._cache:
            try:
                self._cache.fetch_ahead(self.display_name(file), digest, size, self._first_use())
            except CacheError as problem:
                self._stop_staging(problem)
            except FetchError:
                return

    def counts(self) -> StagingCounts:
        """The counts of this process so far."""
        cache = self._cache
        return StagingCounts(cache.fetched_files, cache.fetched_bytes, self._opened_on_node, self._opened_at_source)

    def _stage(self, file: str, size: int | None, digest: str) -> int | None:
        """A descriptor of the copy; None if there is none, because of missing room or a missing source."""
        name = self.display_name(file)
        try:
            if self._has_disk_failed:
                descriptor = self._cache.open_cached(digest, size)
            elif (descriptor := self._cache.open_if_room(name, digest, size, self._first_use())) is None:
                limit = f"data.cache_gb={self._cache.max_bytes / 1e9:g} is full"
                self._warn_once(f"{limit}; raise it to stage the rest of the set as well")
        except CacheError as problem:
            self._stop_staging(problem)
            return None
        except FetchError as problem:
            if not os.path.exists(name):
                return None
            raise _fetch_damage(name, problem) from None
        if descriptor is not None:
            with self._lock:
                self._opened_on_node += 1
        return descriptor

    def _first_use(self) -> int:
        """Time of the first request for a file of the set, in ns: what was read since then stays in the cache.

        A second earlier, because file times lag behind the clock by a tick.
        """
        with self._lock:
            if self._first_use_ns is None:
                self._first_use_ns = time.time_ns() - 10**9
            return self._first_use_ns

    def _stop_staging(self, problem: CacheError) -> None:
        self._has_disk_failed = True
        self._warn_once(str(problem))

    def _warn_once(self, problem: str) -> None:
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:
            print_warning(
                f"data.stage_local={self._cache.folder}: what is not copied yet is read from {self._folder}: {problem}"
            )

    def _count_source(self) -> None:
        with self._lock:
            self._opened_at_source += 1


class RemoteStore:
    """A URL; each file is fetched into the node's cache as a whole, and checked on the way."""

    def __init__(self, url: str, cache: NodeCache) -> None:
        self._url, self._cache = url, cache

    def display_name(self, file: str) -> str:
        return redact_url(self._url_of(file))

    def path(self, file: str, size: int, digest: str) -> Path:
        os.close(self.open(file, size, digest))
        return self._cache.folder / digest

    def open(self, file: str, size: int, digest: str) -> int:
        return self._open(file, digest, size)

    def read_index(self, file: str, digest: str) -> bytes:
        with os.fdopen(self._open(file, digest, None), "rb") as index:
            return index.read(MAX_INDEX_BYTES)

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        if digest not in self._cache:
            with contextlib.suppress(FetchError):
                self._cache.fetch_ahead(self._url_of(file), digest, size)

    def _url_of(self, file: str) -> str:
        return join_url(self._url, file)

    def _open(self, file: str, digest: str, size: int | None) -> int:
        try:
            return self._cache.open(self._url_of(file), digest, size)
        except FetchError as problem:
            raise _fetch_damage(self.display_name(file), problem) from None


class _UrlStore(RemoteStore):
    """Files that are named by their URLs."""

    def __init__(self, cache: NodeCache) -> None:
        super().__init__("", cache)

    def _url_of(self, file: str) -> str:
        return file


class AdoptedStore:
    """The files of an adopted set: each shard has a path or URL; the indexes are beside the manifest.

    Args:
        manifest_store: of the manifest's folder or URL.
        cache: for remote and compressed shards, which cannot be read without it.
        rebuild_hint: for messages, what to do about a missing file without a copy.
    """

    def __init__(self, manifest_store: Store, cache: NodeCache | None, rebuild_hint: str) -> None:
        self._manifest_store = manifest_store
        is_local = isinstance(manifest_store, LocalStore)
        self._path_store = manifest_store if is_local else LocalStore(Path("/"), rebuild_hint)
        self._url_store = None if cache is None else _UrlStore(cache)

    def display_name(self, file: str) -> str:
        if file.startswith("/") or is_file_url(file):
            return redact_url(file)
        return self._manifest_store.display_name(file)

    def path(self, file: str, size: int, digest: str) -> Path:
        return self._store_of(file).path(file, size, digest)

    def open(self, file: str, size: int, digest: str) -> int:
        return self._store_of(file).open(file, size, digest)

    def read_index(self, file: str, digest: str) -> bytes:
        return self._manifest_store.read_index(file, digest)

    def fetch_ahead(self, file: str, digest: str, size: int | None) -> None:
        self._store_of(file).fetch_ahead(file, digest, size)

    def _store_of(self, file: str) -> Store:
        is_compressed = compression_of(file) is not None
        if file.startswith("/") and not is_compressed:
            return self._path_store
        if not is_compressed and not is_file_url(file):
            return self._manifest_store
        if file.startswith("pipe:") and os.environ.get(PIPES_VARIABLE) != "1":
            raise NotReadableError(
                f"{file}: a manifest names this command, and whoever wrote the manifest could have it do anything; set "
                f"{PIPES_VARIABLE}=1 if that was you"
            )
        if self._url_store is None:
            raise NotReadableError(
                f"{redact_url(file)}: this shard is remote or compressed, and is read through a cache; name a folder "
                "for it by --cache-dir (of a recipe: data.cache_dir)"
            )
        return self._url_store


def _fetch_damage(name: str, problem: FetchError) -> DamagedError:
    return DamagedError(name, str(problem).removeprefix(f"{name}: "))


def read_manifest_bytes(location: str | Path) -> bytes:
    """The manifest file of the shard set at a folder or URL.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    if is_remote(location):
        return fetch_bytes(join_url(str(location), MANIFEST_NAME), MAX_MANIFEST_BYTES)
    return Manifest.text(location)


def display_name(location: str | Path, file: str) -> str:
    """Path or URL of a file of the shard set at `location`, for messages."""
    return redact_url(join_url(str(location), file)) if is_remote(location) else str(Path(location) / file)


def open_store(
    location: str | Path, cache: NodeCache | None, rebuild_hint: str = "encode the set again"
) -> LocalStore | RemoteStore:
    """The store of the shard set at `location`; a folder's files are copied into the cache if there is one.

    Args:
        location: folder or URL.
        cache: of the node.
        rebuild_hint: for messages, what to do about a missing file without a copy.

    Raises:
        UserError: it is a URL, and there is no cache.
    """
    if not is_remote(location):
        folder = Path(location)
        return LocalStore(folder, rebuild_hint) if cache is None else StagedStore(folder, cache, rebuild_hint)
    if cache is None:
        raise UserError(
            f"{redact_url(str(location))}: a remote shard set is read in training only, through data.cache_dir; "
            "copy it here"
        )
    return RemoteStore(str(location), cache)
