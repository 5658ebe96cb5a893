"""Fetching one remote file with the programs of WebDataset's `gopen`, and retries up to a limit.

A path of a file system (such as Lustre or NFS) is copied with the same checks.

`gopen` itself does not suffice: its curl retries 30 times silently, a transfer that hangs blocks forever, and `s3://`
is missing. So the programs are started here, with limits on time and bytes, and checks of what they send.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import select
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from far_scale.data.remote.compression import MAX_MDS_BYTES, DecompressionError, decompress, max_compressed_bytes
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.urls import is_file_url, redact_url

T = TypeVar("T")
ATTEMPTS = 6
TOTAL_SECONDS = 900.0  # after which no further attempt begins
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts; doubled each time
STALL_SECONDS = 60.0  # an attempt without a byte for so long fails
MIN_BYTES_PER_SECOND = 200_000  # a slower attempt fails; a copy from a file system may be slower
_BLOCK = 1 << 20
_LOCAL_BLOCK = 1 << 22
_MAX_UNKNOWN_BYTES = 1 << 42  # of a file of unknown size
_REFUSED = re.compile(r"returned error: (401|403|404|410)\b")  # retrying is pointless


class FetchError(UserError):
    """A file could not be fetched after all attempts: missing, unreachable, or with other content."""


class Interrupted(Exception):
    """The fetch was cancelled, see `interruptible`."""


class _AttemptFailed(Exception):
    """One attempt failed; `is_final` if another attempt is pointless."""

    def __init__(self, reason: str, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


_thread_local = threading.local()  # .event interrupts the thread's fetches


@contextlib.contextmanager
def interruptible(event: threading.Event) -> Iterator[None]:
    """Let fetches of this thread raise `Interrupted` soon after `event` is set."""
    _thread_local.event = event
    try:
        yield
    finally:
        del _thread_local.event


def pause(seconds: float) -> None:
    """Sleep until the thread's fetch is interrupted.

    Raises:
        Interrupted: it is, see `interruptible`.
    """
    event: threading.Event | None = getattr(_thread_local, "event", None)
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise Interrupted


def command_of(url: str) -> list[str]:
    """The command that writes the file to its standard output."""
    if url.startswith("pipe:"):
        return ["sh", "-c", url.removeprefix("pipe:")]
    if url.startswith("s3:"):
        return ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    if url.startswith("gs:"):
        return ["gsutil", "-q", "cat", url]
    return ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30", url]


def fetch_bytes(url: str, max_bytes: int, digest: str | None = None) -> bytes:
    """Fetch a small file into memory.

    Args:
        url: URL or path of the file.
        max_bytes: limit of its size.
        digest: its SHA-256, if known.

    Raises:
        FetchError: it cannot be fetched, after all attempts.
        Interrupted: see `interruptible`.
    """

    def attempt() -> bytes:
        data = bytearray()
        _receive(url, max_bytes, data.extend)
        if digest is not None:
            check(hashlib.sha256(data).hexdigest())
        return bytes(data)

    check = _digest_checker(digest)
    return _retry(url, attempt)


def fetch_file(url: str, descriptor: int, size: int, digest: str) -> None:
    """Fetch a file of known size and SHA-256 into an open file.

    Args:
        url: URL or path of the file.
        descriptor: of the open file, which is written from its beginning.
        size: in bytes.
        digest: its SHA-256.

    Raises:
        FetchError: it cannot be fetched, after all attempts.
        Interrupted: see `interruptible`.
        OSError: the open file cannot be written.
    """

    def attempt() -> None:
        hashed = hashlib.sha256()
        os.lseek(descriptor, 0, os.SEEK_SET)

        def take(block: bytes) -> None:
            hashed.update(block)
            _write(descriptor, block)

        received = _receive(url, size, take)
        if received < size:
            check(hashed.hexdigest(), f"cut off after {received} of {size} bytes")
        check(hashed.hexdigest())

    check = _digest_checker(digest)
    _retry(url, attempt)


def fetch_compressed(url: str, compression: str, descriptor: int, size: int, digest: str) -> None:
    """Fetch and decompress a file into an open file.

    Args:
        url: URL or path of the compressed file.
        compression: as of `compression_of`.
        descriptor: of the open file, which is written from its beginning.
        size, digest: bytes and SHA-256 after decompression.

    Raises:
        FetchError, Interrupted, OSError: as by `fetch_file`.
    """

    def attempt() -> None:
        if size > MAX_MDS_BYTES:
            raise _AttemptFailed(f"it should have {size} bytes, an MDS file has {MAX_MDS_BYTES} at most", is_final=True)
        data = bytearray()
        _receive(url, max_compressed_bytes(size), data.extend)
        try:
            decompressed = decompress(bytes(data), compression, size)
        except DecompressionError as problem:
            raise _AttemptFailed(str(problem), is_final=not is_file_url(url)) from None
        check(hashlib.sha256(decompressed).hexdigest())
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write(descriptor, decompressed)

    check = _digest_checker(digest)
    _retry(url, attempt)


def fetch_and_hash(url: str, descriptor: int) -> tuple[int, str]:
    """Fetch a file of unknown size and content into an open file.

    Returns:
        Size and SHA-256 of the file.

    Raises:
        FetchError, Interrupted, OSError: as by `fetch_file`.
    """

    def attempt() -> tuple[int, str]:
        hashed = hashlib.sha256()
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)

        def take(block: bytes) -> None:
            hashed.update(block)
            _write(descriptor, block)

        return _receive(url, _MAX_UNKNOWN_BYTES, take), hashed.hexdigest()

    return _retry(url, attempt)


def _write(descriptor: int, block: bytes | bytearray) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _digest_checker(expected: str | None) -> Callable[..., None]:
    """A check of each attempt's SHA-256; the same wrong one twice means that the source is wrong."""
    wrong_digests: set[str] = set()

    def check(digest: str, problem: str = "its SHA-256 is not the manifest's") -> None:
        if digest != expected:
            is_repeated = digest in wrong_digests
            wrong_digests.add(digest)
            raise _AttemptFailed(f"{problem}, twice alike" if is_repeated else problem, is_final=is_repeated)

    return check


def _retry(url: str, attempt: Callable[[], T]) -> T:
    jitter, begin = random.Random(f"{os.getpid()} {url}"), time.monotonic()
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except _AttemptFailed as problem:
            # Jitter, so that a thousand ranks do not retry at the same moment.
            seconds = min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * jitter.uniform(0.5, 1.5)
            elapsed = time.monotonic() - begin
            if number == ATTEMPTS or problem.is_final or elapsed + seconds > TOTAL_SECONDS:
                suspect = "URL and whether it is reachable" if is_file_url(url) else "file system"
                raise FetchError(
                    f"{redact_url(url)}: cannot be fetched ({problem}; attempt {number}, {elapsed:.0f} s in all); "
                    f"check the {suspect}, or copy the file there again"
                ) from None
            print_warning(f"{redact_url(url)}: attempt {number} of {ATTEMPTS}: {problem}; the next in {seconds:.1f} s")
        pause(seconds)
    raise AssertionError("the last attempt ends in an error")


def _receive(url: str, max_bytes: int, take: Callable[[bytes], Any]) -> int:
    """Pass the file block by block to `take`; returns its size."""
    if not is_file_url(url):
        return _receive_local(url, max_bytes, take)
    command = command_of(url)
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        except FileNotFoundError:
            raise UserError(
                f"{redact_url(url)}: needs the command `{command[0]}`, which is not installed here"
            ) from None
        assert process.stdout is not None
        with process.stdout:
            try:
                received = _receive_pipe(process.stdout.fileno(), max_bytes, take)
                status = process.wait(STALL_SECONDS)
            except subprocess.TimeoutExpired:
                raise _AttemptFailed(f"{command[0]} sent all but does not end") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that a pipe's shell has started
                    process.wait()
        if status != 0:
            stderr.seek(0)
            lines = stderr.read(1 << 16).decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
            is_refused = command[0] == "curl" and _REFUSED.search(last) is not None
            raise _AttemptFailed(f"{command[0]} ended with status {status}: {last[:200]}", is_final=is_refused)
    return received


def _receive_local(path: str, max_bytes: int, take: Callable[[bytes], Any]) -> int:
    """As `_receive`, from a file. A read that hangs in the file server cannot be stopped here; the watchdog does it."""
    received = 0
    for block in _read_blocks(path):
        pause(0)
        received += len(block)
        _check_limit(received, max_bytes)
        take(block)
    return received


def _check_limit(received: int, max_bytes: int) -> None:
    if received > max_bytes:
        raise _AttemptFailed(f"it has more than the {max_bytes} bytes that it should have")


def _read_blocks(path: str) -> Iterator[bytes]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise _AttemptFailed("not a plain file", is_final=True)
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_LOCAL_BLOCK):
                yield block
    except FileNotFoundError:
        raise _AttemptFailed("it is missing", is_final=True) from None
    except OSError as error:
        raise _AttemptFailed(f"reading fails: {error.strerror}") from None


def _receive_pipe(descriptor: int, max_bytes: int, take: Callable[[bytes], Any]) -> int:
    """As `_receive`, from a pipe, with limits on time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    begin = last = time.monotonic()
    received = 0
    while True:
        now = time.monotonic()
        if now - last > STALL_SECONDS:
            raise _AttemptFailed(f"nothing came for {STALL_SECONDS:g} s, after {received} bytes")
        if now - begin > STALL_SECONDS + max_bytes / MIN_BYTES_PER_SECOND:
            raise _AttemptFailed(f"too slow: {received} bytes in {now - begin:.0f} s")
        pause(0)
        if not poll.poll(min(1000.0, 1000 * STALL_SECONDS)):
            continue
        block = os.read(descriptor, _BLOCK)
        if not block:
            return received
        last, received = time.monotonic(), received + len(block)
        _check_limit(received, max_bytes)
        take(block)
