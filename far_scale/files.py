"""Files that are either whole or not there: written beside, synced, renamed."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from far_scale.errors import UserError


def sync_folder(folder: str | Path) -> None:
    """Make the names inside `folder` durable (a rename is only safe once its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success sync it and rename it to `path`, on any error remove it.

    The path yielded keeps the suffix of `path`, since encoders choose their format by it.

    Raises:
        UserError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not by the process id: two hosts may write to one folder with the same one
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise UserError(f"{path}: no space left on this disk; free some, or write elsewhere") from error
        raise
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


class LineFile:
    """A file of JSON lines that is only appended to, and that outlives a full disk.

    Lines that do not fit are kept and written with a later one, when there is room again; no line is ever written in
    part. May be used from several threads.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._lock = Path(path), threading.Lock()
        self._kept: list[str] = []

    def append(self, value: Any) -> None:
        """Add a line, once it fits."""
        with self._lock:
            self._kept.append(json.dumps(value) + "\n")
            data = "".join(self._kept).encode()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(self._path, "ab", buffering=0) as file:  # a buffer would try again when it is closed
                    end = file.tell()
                    if file.write(data) < len(data):
                        os.truncate(self._path, end)
                        return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                return
            self._kept.clear()


def text_lines(path: str | Path, what: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file in UTF-8 that are not empty, with their numbers, without space and marks around them.

    Lines end at line feeds and carriage returns alone: U+2028 and others may stand in a string.

    Raises:
        UserError: the file, which is `what`, is not there, or is no text in UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fix that and run again") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: is in UTF-16, as Excel's Unicode text; save it in UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no text in UTF-8 ({error.reason}); write it anew") from None
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if stripped := line.strip(" \t\ufeff"):  # files that were joined have byte order marks inside
            yield number, stripped


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file that is `what` (for the error).

    Raises:
        UserError: the file is not there or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {what} here") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this {what} is not readable JSON ({error}); write it again") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
