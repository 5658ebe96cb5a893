"""A cache of remote files on the node's disk, shared by its ranks and limited in bytes.

    FOLDER/SHA256          a complete file, named by its content: sets and their versions never mix
    FOLDER/SHA256.part     a file being fetched; the fetching process holds a lock on it, which ends with the process
    FOLDER/lock            held briefly while bytes are counted and room is made

A file's mtime is the time of its last read: the least recently used file is evicted first, even while it is read. On
Linux an open file stays readable after it is unlinked, and its bytes are freed when the last reader closes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from far_scale.data.remote.compression import compression_of
from far_scale.data.remote.fetch import fetch_bytes, fetch_compressed, fetch_file, pause
from far_scale.utils.errors import UserError
from far_scale.utils.io import full_disk

CACHE_BYTES = 200 * 10**9  # default limit
_NAME = re.compile(r"[0-9a-f]{64}(\.part)?")
_LOCK_POLL_SECONDS = 0.1  # while another process fetches the same file


class CacheError(UserError):
    """The node's disk is full or not writable."""


MAX_UNSIZED_BYTES = 1 << 25
"""Limit of a file of unknown size, such as a shard's index."""


class NodeCache:
    """A cache folder; any number of processes and threads may use it at once.

    If files being fetched fill the cache, it may exceed the limit by one file a process.

    Args:
        folder: on the node's disk; made if missing.
        max_bytes: the limit.
        key: recipe key of the folder, for messages.

    Attributes:
        fetched_files, fetched_bytes: what this object has fetched into the folder.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, max_bytes: int, key: str = "data.cache_dir") -> None:
        self.folder, self.max_bytes, self._key = Path(folder), max_bytes, key
        self.fetched_files = self.fetched_bytes = 0
        self._counter_lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666))
        except OSError as error:
            raise UserError(f"{key}={folder}: {error.strerror}; give a folder on the node's disk") from None

    def open(self, url: str, digest: str, size: int | None) -> int:
        """A descriptor of the file with this SHA-256, fetched from `url` and decompressed if it is not cached.

        Args:
            url: URL or path of the file.
            digest: its SHA-256, after decompression.
            size: in bytes, after decompression; None for a small file of unknown size.

        Raises:
            FetchError: it cannot be fetched.
            CacheError: it cannot be stored.
        """
        descriptor = self._open(url, digest, size, evict=True)
        assert descriptor is not None
        return descriptor

    def open_if_room(self, url: str, digest: str, size: int | None, since: int) -> int | None:
        """As `open`, but None if the files read after `since` (ns since the epoch) leave no room.

        Thus a set larger than the cache, which can also be read at its source, fills the cache once. With eviction,
        every epoch would copy all files again.
        """
        return self._open(url, digest, size, evict=False, since=since)

    def open_cached(self, digest: str, size: int | None) -> int | None:
        """A descriptor of the file with this SHA-256; None if it is not cached."""
        return _open_complete(self.folder / digest, size)

    def fetch_ahead(self, url: str, digest: str, size: int | None, since: int | None = None) -> None:
        """Fetch a file that will be needed, unless the files being fetched leave no room.

        Args:
            url, digest, size: as of `open`.
            since: files read after this time are not evicted either, see `open_if_room`.

        Raises:
            FetchError, CacheError: as by `open`.
        """
        descriptor = self._open(url, digest, size, evict=False, since=since)
        if descriptor is not None:
            os.close(descriptor)

    def __contains__(self, digest: str) -> bool:
        return (self.folder / digest).exists()

    def _open(self, url: str, digest: str, size: int | None, evict: bool, since: int | None = None) -> int | None:
        path, part = self.folder / digest, self.folder / f"{digest}.part"
        try:
            while True:
                if (complete := _open_complete(path, size)) is not None:
                    return complete
                with _lock(part) as part_descriptor:
                    if not _is_linked(part_descriptor, part):
                        continue  # the process that held the lock before has fetched the file, or failed
                    if (complete := _open_complete(path, size)) is not None:
                        part.unlink()
                        return complete
                    try:
                        if not self._fetch(part_descriptor, part, url, digest, size, evict, since):
                            part.unlink()
                            return None
                        os.fsync(part_descriptor)
                        complete = os.open(part, os.O_RDONLY)
                        os.replace(part, path)
                        with self._counter_lock:
                            self.fetched_files += 1
                            self.fetched_bytes += os.fstat(complete).st_size
                        return complete
                    except BaseException:
                        part.unlink(missing_ok=True)
                        raise
        except OSError as error:
            if (reason := full_disk(error)) is not None:
                fix = f"lower data.cache_gb, or give another {self._key}"
                raise CacheError(f"{self.folder}: {reason}; {fix}") from None
            raise CacheError(f"{self.folder}: {error.strerror}; {self._key} must be writable") from None

    def _fetch(
        self, descriptor: int, part: Path, url: str, digest: str, size: int | None, evict: bool, since: int | None
    ) -> bool:
        """Fetch a file into the open `part`; returns whether there was room."""
        os.ftruncate(descriptor, 0)  # a killed process may have left a piece
        if size is not None:
            if not self._reserve(descriptor, part, size, evict, since):
                return False
            if (compression := compression_of(url)) is not None:
                fetch_compressed(url, compression, descriptor, size, digest)
            else:
                fetch_file(url, descriptor, size, digest)
            return True
        data = fetch_bytes(url, MAX_UNSIZED_BYTES, digest)
        if not self._reserve(descriptor, part, len(data), evict, since):
            return False
        while data:
            data = data[os.write(descriptor, data) :]
        return True

    def _reserve(self, descriptor: int, part: Path, size: int, evict: bool, since: int | None) -> bool:
        """Make room for a file, and give it its full size (as a hole) before another process counts the bytes."""
        with _lock(self.folder / "lock"):
            complete: list[tuple[int, int, Path]] = []  # time of the last read, bytes, path
            fetching_bytes = 0
            for entry in os.scandir(self.folder):
                if not _NAME.fullmatch(entry.name) or entry.name == part.name:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if not entry.name.endswith(".part"):
                        complete.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                    elif not _remove_if_abandoned(Path(entry.path)):
                        fetching_bytes += status.st_size
            if fetching_bytes + size > self.max_bytes and not evict:
                return False
            total = fetching_bytes + size + sum(file_bytes for _, file_bytes, _ in complete)
            if since is not None:
                complete = [(read_ns, file_bytes, path) for read_ns, file_bytes, path in complete if read_ns < since]
                if total - sum(file_bytes for _, file_bytes, _ in complete) > self.max_bytes:
                    return False
            for _, file_bytes, path in sorted(complete):
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= file_bytes
            os.ftruncate(descriptor, size)
            return True


def touch(descriptor: int) -> None:
    """Record that the file was read now."""
    os.utime(descriptor)


def is_evicted(descriptor: int) -> bool:
    """Whether an open file was evicted, so that closing it frees its bytes."""
    return os.fstat(descriptor).st_nlink == 0


def _open_complete(path: Path, size: int | None) -> int | None:
    """A descriptor of a file of this size, or None; one of another size is removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if size is not None and os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    touch(descriptor)
    return descriptor


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Hold an exclusive lock on a file, which is made if missing; gives its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not _try_lock(descriptor):
            pause(_LOCK_POLL_SECONDS)  # a blocking lock could not be interrupted
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_linked(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(part: Path) -> bool:
    """Remove the partial file of a killed process, which no longer holds its lock; returns whether it was one."""
    descriptor = os.open(part, os.O_RDWR)
    try:
        is_abandoned = _try_lock(descriptor) and _is_linked(descriptor, part)
        if is_abandoned:
            part.unlink()
        return is_abandoned
    finally:
        os.close(descriptor)
