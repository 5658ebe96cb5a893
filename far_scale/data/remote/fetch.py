"""Fetching one file from far away: by the programs that WebDataset's `gopen` uses, tried again until a limit.
A file of this machine (on Lustre or NFS, say) is copied in the same way, by reading it.

`gopen` itself will not do: its curl tries 30 times over without a word, it waits for ever for a transfer that hangs,
and it has no `s3://`. So the programs are started here; what they send is watched and checked.
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
from urllib.parse import urlsplit, urlunsplit

from far_scale.data.remote.unpack import PackedError, most_packed, unpack
from far_scale.utils.errors import UserError, print_warning

T = TypeVar("T")
ATTEMPTS = 6
TOTAL_SECONDS = 900.0  # after which no further attempt begins
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts, doubled each time
STALL_SECONDS = 60.0  # without a byte, after which an attempt is given up
SLOWEST = 200_000  # bytes a second, or an attempt is given up; a copy from a file system may take its time
_BLOCK = 1 << 20
_LOCAL_BLOCK = 1 << 22
_MOST_UNPACKED = (1 << 32) - 1  # bytes of an MDS file, whose offsets have 32 bits
_MOST_UNKNOWN = 1 << 42  # bytes of a file whose size nobody knows
_FAR = re.compile(r"(s3|gs|http|https|pipe):")
_REFUSED = re.compile(r"returned error: (401|403|404|410)\b")  # what a server would say again
_SOME = re.compile(r"[a-z][a-z0-9+.-]+://")


class FetchError(UserError):
    """A file that could not be fetched for good: not there, not reachable, or not what it should be."""


class Interrupted(Exception):
    """A fetch that nobody wants any more."""


class _Failed(Exception):
    """One attempt failed; `final` where another cannot do better."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


_own = threading.local()  # of this thread: the event that interrupts its fetches


@contextlib.contextmanager
def interruptible(event: threading.Event) -> Iterator[None]:
    """Fetches of this thread end with `Interrupted` soon after `event` is set."""
    _own.event = event
    try:
        yield
    finally:
        del _own.event


def pause(seconds: float) -> None:
    """Wait, but no longer than anybody wants what this thread fetches.

    Raises:
        Interrupted: nobody does.
    """
    event: threading.Event | None = getattr(_own, "event", None)
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise Interrupted


def is_remote(where: object) -> bool:
    """Whether `where` is a URL, and no folder of this machine.

    Raises:
        UserError: it is a URL of a kind that is not known.
    """
    text = str(where)
    if not isinstance(where, str) or not (_SOME.match(text) or text.startswith("pipe:")):
        return False
    if not _FAR.match(text):
        raise UserError(f"{shown(text)}: shard sets are read from a folder, s3://, gs://, http(s):// or pipe:")
    if text.startswith("pipe:") and "{file}" not in text:
        raise UserError(f"{text}: a pipe: needs {{file}} where the file's name goes in, as in pipe:cat /far/{{file}}")
    return True


def is_file_url(place: str) -> bool:
    """Whether `place` is the URL of a single file, by which it can be fetched, and no path."""
    return _FAR.match(place) is not None


def join(url: str, file: str) -> str:
    """The URL of a file of the shard set at `url`: before its query, or in place of a pipe's {file}."""
    if url.startswith("pipe:"):
        return url.replace("{file}", file)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{file}"))


def shown(url: str) -> str:
    """A URL as it may stand in a log: without the user, password or query that may give access; a path as it is."""
    if not _SOME.match(url):  # a path, or a pipe:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def command_of(url: str) -> list[str]:
    """The command whose standard output is the file."""
    if url.startswith("pipe:"):
        return ["sh", "-c", url.removeprefix("pipe:")]
    if url.startswith("s3:"):
        return ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    if url.startswith("gs:"):
        return ["gsutil", "-q", "cat", url]
    return ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30", url]


def fetch_bytes(url: str, most: int, digest: str | None = None) -> bytes:
    """A small file.

    Args:
        url: of the file, or its path.
        most: bytes that it may have.
        digest: its SHA-256, where that is known.

    Raises:
        FetchError: it cannot be fetched, after all attempts.
        Interrupted: see `interruptible`.
    """

    def attempt() -> bytes:
        data = bytearray()
        _receive(url, most, data.extend)
        if digest is not None:
            check(hashlib.sha256(data).hexdigest())
        return bytes(data)

    check = _check_of(digest)
    return _until_it_works(url, attempt)


def fetch_file(url: str, descriptor: int, size: int, digest: str) -> None:
    """Write a file of known size and SHA-256 into an open one, from its beginning.

    Args:
        url: of the file, or its path.
        descriptor: of the open one.
        size, digest: that it has.

    Raises:
        FetchError: it cannot be fetched, after all attempts.
        Interrupted: see `interruptible`.
        OSError: it cannot be written.
    """

    def attempt() -> None:
        hashed = hashlib.sha256()
        os.lseek(descriptor, 0, os.SEEK_SET)

        def take(block: bytes) -> None:
            hashed.update(block)
            _write(descriptor, block)

        got = _receive(url, size, take)
        if got < size:
            check(hashed.hexdigest(), f"cut off after {got} of {size} bytes")
        check(hashed.hexdigest())

    check = _check_of(digest)
    _until_it_works(url, attempt)


def fetch_packed(place: str, compression: str, descriptor: int, size: int, digest: str) -> None:
    """Write what a packed file, at a path or URL, unpacks to into an open one; its size and SHA-256 are known.

    Raises:
        FetchError: it cannot be fetched, after all attempts, or is damaged.
        Interrupted: see `interruptible`.
        OSError: it cannot be written.
    """

    def attempt() -> None:
        if size > _MOST_UNPACKED:
            raise _Failed(f"it should have {size} bytes, and an MDS file has {_MOST_UNPACKED} at most", final=True)
        data, most = bytearray(), most_packed(size)
        _receive(place, most, data.extend)
        try:
            unpacked = unpack(bytes(data), compression, size)
        except PackedError as problem:
            raise _Failed(str(problem), final=not is_file_url(place)) from None
        check(hashlib.sha256(unpacked).hexdigest())
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write(descriptor, unpacked)

    check = _check_of(digest)
    _until_it_works(place, attempt)


def fetch_unknown(url: str, descriptor: int) -> tuple[int, str]:
    """Write a file of which nothing is known yet into an open one, from its beginning.

    Returns:
        Its size and SHA-256.

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

        return _receive(url, _MOST_UNKNOWN, take), hashed.hexdigest()

    return _until_it_works(url, attempt)


def _write(descriptor: int, block: bytes | bytearray) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _check_of(digest: str | None) -> Callable[..., None]:
    """A check of each attempt's SHA-256; the same wrong one twice says that the file is wrong where it lies."""
    seen: set[str] = set()

    def check(found: str, what: str = "its SHA-256 is not the manifest's") -> None:
        if found != digest:
            again = found in seen
            seen.add(found)
            raise _Failed(f"{what}, twice alike" if again else what, final=again)

    return check


def _until_it_works(url: str, attempt: Callable[[], T]) -> T:
    dice, begun = random.Random(f"{os.getpid()} {url}"), time.monotonic()
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except _Failed as problem:
            # Drawn from half to one and a half, so that a thousand ranks do not come back in the same moment.
            seconds = min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * dice.uniform(0.5, 1.5)
            taken = time.monotonic() - begun
            if number == ATTEMPTS or problem.final or taken + seconds > TOTAL_SECONDS:
                look = "URL and whether it is in reach" if is_file_url(url) else "file system"
                raise FetchError(
                    f"{shown(url)}: cannot be fetched ({problem}; attempt {number}, {taken:.0f} s in all); look at the "
                    f"{look}, or copy the file there again"
                ) from None
            print_warning(f"{shown(url)}: attempt {number} of {ATTEMPTS}: {problem}; the next in {seconds:.1f} s")
        pause(seconds)
    raise AssertionError("the last attempt ends in an error")


def _receive(url: str, most: int, take: Callable[[bytes], Any]) -> int:
    """Give all that comes, block by block, to `take`; returns how many bytes came."""
    if not is_file_url(url):
        return _receive_local(url, most, take)
    command = command_of(url)
    with tempfile.TemporaryFile() as told:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told, start_new_session=True
            )
        except FileNotFoundError:
            raise UserError(f"{shown(url)}: needs the command `{command[0]}`, which is not installed here") from None
        assert process.stdout is not None
        with process.stdout:
            try:
                got = _pour(process.stdout.fileno(), most, take)
                status = process.wait(STALL_SECONDS)
            except subprocess.TimeoutExpired:
                raise _Failed(f"{command[0]} sent all but does not end") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with whatever a pipe's shell has started
                    process.wait()
        if status != 0:
            told.seek(0)
            lines = told.read(1 << 16).decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
            refused = command[0] == "curl" and _REFUSED.search(last) is not None
            raise _Failed(f"{command[0]} ended with status {status}: {last[:200]}", final=refused)
    return got


def _receive_local(path: str, most: int, take: Callable[[bytes], Any]) -> int:
    """As `_receive`, from a file. A read that a file server lets hang cannot be given up: the watchdog sees to that."""
    got = 0
    for block in _blocks(path):
        pause(0)
        got += len(block)
        if got > most:
            raise _Failed(f"it has more than the {most} bytes that it should have")
        take(block)
    return got


def _blocks(path: str) -> Iterator[bytes]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited on for ever
            raise _Failed("not a plain file", final=True)
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_LOCAL_BLOCK):
                yield block
    except FileNotFoundError:
        raise _Failed("it is missing", final=True) from None
    except OSError as error:
        raise _Failed(f"reading fails: {error.strerror}") from None


def _pour(descriptor: int, most: int, take: Callable[[bytes], Any]) -> int:
    """From a pipe to `take`, until its end; bounded in bytes and in time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    begun = last = time.monotonic()
    got = 0
    while True:
        now = time.monotonic()
        if now - last > STALL_SECONDS:
            raise _Failed(f"nothing came for {STALL_SECONDS:g} s, after {got} bytes")
        if now - begun > STALL_SECONDS + most / SLOWEST:
            raise _Failed(f"too slow: {got} bytes in {now - begun:.0f} s")
        pause(0)
        if not poll.poll(min(1000.0, 1000 * STALL_SECONDS)):
            continue
        block = os.read(descriptor, _BLOCK)
        if not block:
            return got
        last, got = time.monotonic(), got + len(block)
        if got > most:
            raise _Failed(f"it has more than the {most} bytes that it should have")
        take(block)
