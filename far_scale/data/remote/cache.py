"""Files of another place on the node's own disk, shared by all of its ranks, never more than a set number of bytes.

    FOLDER/SHA256          a whole file, by what is in it: two sets, or two versions of one, never get mixed up
    FOLDER/SHA256.part     one that is being fetched; who fetches it holds a lock on it, which ends with the process
    FOLDER/lock            held for moments, by who counts the bytes and makes room

A file's time of change is when it was read last: the oldest goes first. It goes even while somebody reads it: on
Linux an open file stays whole after its name is gone, and its bytes are free when the last reader lets go.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from far_scale.data.remote.fetch import fetch_bytes, fetch_file, fetch_packed, pause
from far_scale.data.remote.unpack import compression_of
from far_scale.utils.errors import UserError

CACHE_BYTES = 200 * 10**9  # the limit where no recipe says another
_NAME = re.compile(r"[0-9a-f]{64}(\.part)?")
_ASK_AGAIN = 0.1  # seconds, while another process fetches the same file


class CacheError(UserError):
    """A file that the node's disk cannot keep: it is full, or not writable."""


MAX_UNSIZED_BYTES = 1 << 25
"""Of a file whose size is not known beforehand, such as a shard's index."""


class NodeCache:
    """A cache folder; any number of processes and threads may use it at once.

    What is fetched may lie above the limit by one file a process, where the files that are being fetched fill it.

    Args:
        folder: on the node's own disk; made where it is missing.
        most_bytes: the limit.
        key: of the recipe, which names the folder.

    Attributes:
        fetched_files, fetched_bytes: that this object has brought into the folder.

    Raises:
        UserError: the folder cannot be made, or not be written to.
    """

    def __init__(self, folder: str | Path, most_bytes: int, key: str = "data.cache_dir") -> None:
        self.folder, self.most_bytes, self._key = Path(folder), most_bytes, key
        self.fetched_files = self.fetched_bytes = 0
        self._counting = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666))
        except OSError as error:
            raise UserError(f"{key}={folder}: {error.strerror}; give a folder on the node's disk") from None

    def open(self, url: str, digest: str, size: int | None) -> int:
        """A descriptor of the file with this SHA-256, fetched from `url` where it is not there yet, and unpacked.

        Args:
            size: in bytes; None of a small file, whose size nobody has told.

        Raises:
            FetchError: it cannot be fetched.
            CacheError: it cannot be kept.
        """
        descriptor = self._open(url, digest, size, evict=True)
        assert descriptor is not None
        return descriptor

    def open_if_room(self, url: str, digest: str, size: int | None, since: int) -> int | None:
        """As `open`, but None where there is no room beside the files that were read after `since`, in ns of the epoch.

        So a set that is larger than the cache, and can be read where it lies as well, fills it once: if each epoch's
        first files made room for its last ones, every epoch would fetch all of them again.
        """
        return self._open(url, digest, size, evict=False, since=since)

    def find(self, digest: str, size: int | None) -> int | None:
        """A descriptor of the file with this SHA-256; None where it is not there."""
        return _resident(self.folder / digest, size)

    def fetch_ahead(self, url: str, digest: str, size: int | None, since: int | None = None) -> None:
        """Fetch a file that will be wanted, unless there is no room for it beside those that are being fetched.

        Args:
            since: nor beside those that were read after it, see `open_if_room`.

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
                if (found := _resident(path, size)) is not None:
                    return found
                with _lock(part) as own:
                    if not _is_named(own, part):
                        continue  # who held the lock before has fetched it, or given up
                    if (found := _resident(path, size)) is not None:
                        part.unlink()
                        return found
                    try:
                        if not self._fill(own, part, url, digest, size, evict, since):
                            part.unlink()
                            return None
                        os.fsync(own)
                        found = os.open(part, os.O_RDONLY)
                        os.replace(part, path)
                        with self._counting:
                            self.fetched_files += 1
                            self.fetched_bytes += os.fstat(found).st_size
                        return found
                    except BaseException:
                        part.unlink(missing_ok=True)
                        raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                fix = f"lower data.cache_gb, or give another {self._key}"
                raise CacheError(f"{self.folder}: no space left on this disk; {fix}") from None
            raise CacheError(f"{self.folder}: {error.strerror}; {self._key} must be writable") from None

    def _fill(
        self, own: int, part: Path, url: str, digest: str, size: int | None, evict: bool, since: int | None
    ) -> bool:
        os.ftruncate(own, 0)  # a killed process may have left some of it
        if size is not None:
            if not self._reserve(own, part, size, evict, since):
                return False
            if (compression := compression_of(url)) is not None:
                fetch_packed(url, compression, own, size, digest)
            else:
                fetch_file(url, own, size, digest)
            return True
        data = fetch_bytes(url, MAX_UNSIZED_BYTES, digest)
        if not self._reserve(own, part, len(data), evict, since):
            return False
        while data:
            data = data[os.write(own, data) :]
        return True

    def _reserve(self, own: int, part: Path, size: int, evict: bool, since: int | None) -> bool:
        """Make room for a file: it has its full size, as a hole, before the next one counts the bytes."""
        with _lock(self.folder / "lock"):
            whole: list[tuple[int, int, Path]] = []  # when it was read last, bytes, where
            fetched = 0
            for entry in os.scandir(self.folder):
                if not _NAME.fullmatch(entry.name) or entry.name == part.name:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    if not entry.name.endswith(".part"):
                        whole.append((facts.st_mtime_ns, facts.st_size, Path(entry.path)))
                    elif not _removed_if_left_behind(Path(entry.path)):
                        fetched += facts.st_size
            if fetched + size > self.most_bytes and not evict:
                return False
            total = fetched + size + sum(there for _, there, _ in whole)
            if since is not None:
                whole = [each for each in whole if each[0] < since]
                if total - sum(there for _, there, _ in whole) > self.most_bytes:
                    return False
            for _, there, path in sorted(whole):
                if total <= self.most_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= there
            os.ftruncate(own, size)
            return True


def touch(descriptor: int) -> None:
    """The file was read now."""
    os.utime(descriptor)


def is_evicted(descriptor: int) -> bool:
    """Whether an open file has left the cache, so that its bytes are free once it is closed."""
    return os.fstat(descriptor).st_nlink == 0


def _resident(path: Path, size: int | None) -> int | None:
    """A descriptor of a file that is there in its size; one of another size is removed."""
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
    """A descriptor of the file, made where it is missing, that nobody else holds a lock on meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not _try_lock(descriptor):
            pause(_ASK_AGAIN)  # and not a lock that blocks, which could not be interrupted
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _removed_if_left_behind(part: Path) -> bool:
    """Remove what a killed process was fetching: nobody holds its lock any more."""
    descriptor = os.open(part, os.O_RDWR)
    try:
        left_behind = _try_lock(descriptor) and _is_named(descriptor, part)
        if left_behind:
            part.unlink()
        return left_behind
    finally:
        os.close(descriptor)
