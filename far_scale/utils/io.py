"""Files: atomic writes, text, JSON, JSON lines and digests."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from far_scale.utils.errors import UserError

NO_SPACE = "no space left on this disk"


def sync_folder(folder: str | Path) -> None:
    """Sync a folder, which makes renames inside it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_disk(error: OSError) -> str | None:
    """The reason for an error of writing, if it is a full disk or a full quota; else None."""
    if error.errno == errno.ENOSPC:
        return NO_SPACE
    return "your quota on this disk is used up" if error.errno == errno.EDQUOT else None


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; then sync it and rename it to `path`, or on an error remove it.

    It has the suffix of `path`, by which encoders choose their format.

    Raises:
        UserError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not the process id, which may be the same on two hosts
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if (reason := full_disk(error)) is not None:
            raise UserError(f"{path}: {reason}; free some space, or write elsewhere") from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class JsonlWriter:
    """Appends JSON lines to a file, and survives a full disk.

    Lines that do not fit on the disk are written later, with another one; no line is written partially. Thread-safe.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._lock = Path(path), threading.Lock()
        self._pending: list[str] = []

    def append(self, value: Any) -> None:
        """Append a line."""
        with self._lock:
            self._pending.append(_json(value) + "\n")
            data = "".join(self._pending).encode()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(self._path, "ab", buffering=0) as file:  # a buffer would try again when it is closed
                    end = file.tell()
                    if file.write(data) < len(data):
                        os.truncate(self._path, end)
                        return
            except OSError as error:
                if full_disk(error) is None:
                    raise
                return
            self._pending.clear()


def text_lines(path: str | Path, what: str) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a UTF-8 file with their numbers, stripped of spaces and byte order marks.

    Only line feeds and carriage returns end lines: U+2028 and others may be part of a string.

    Raises:
        UserError: as `read_text`.
    """
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        if stripped := line.strip(" \t\ufeff"):  # concatenated files have byte order marks inside
            yield number, stripped


def read_text(path: str | Path, what: str) -> str:
    """Read a UTF-8 file, with line feeds as line ends and without byte order mark.

    Args:
        what: the kind of file, for errors.

    Raises:
        UserError: it does not exist, or is not UTF-8.
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
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason}); save it in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_json(path: str | Path, value: Any) -> str:
    """Write `value` as JSON, atomically, with non-finite numbers as null; returns the text."""
    text = _json(value, indent=2) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text)
    return text


def _json(value: Any, indent: int | None = None) -> str:
    """JSON without NaN and Infinity: Python writes them, but other readers refuse them."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_lines(path: str | Path) -> list[dict[str, Any] | None]:
    """The objects in a file of JSON lines; None for other lines, such as one that a crash cut short.

    Only line feeds end lines: other line separators may be part of a JSON string.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return [_json_object(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or nested too deep for Python.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def check_writable(path: str | Path) -> None:
    """Check before long work that its output file can be written; creates nothing.

    Raises:
        UserError: it cannot.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file to write")
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place") from None
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        what: the kind of file, for errors.

    Raises:
        UserError: it does not exist, cannot be read, or is not JSON.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {what} here") from None
    except OSError as error:
        raise UserError(f"{path}: this {what} cannot be read ({error.strerror}); put the file back") from None
    except ValueError as error:
        raise UserError(f"{path}: this {what} is not readable JSON ({error}); write it again") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return file_digest(path, "sha256")


def file_digest(path: str | Path, name: str) -> str:
    """The digest of a file by the hash function `name`, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, name).hexdigest() if hasattr(hashlib, "file_digest") else _digest(file, name)


def _digest(file: Any, name: str) -> str:
    digest = hashlib.new(name)  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys: `{"a": {"b": 1}}` to `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if isinstance(value, dict) else None
        flat |= flatten(inner, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
