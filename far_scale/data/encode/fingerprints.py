"""Fingerprints of the videos of a shard set when they were encoded, to detect changed files: `videos.jsonl`.

A task takes the fingerprints of its own shards' videos as it reads them, and writes a file per shard
(`videos-000003.jsonl`). Building the manifest joins these to one file, in the order of the sources. A file is compared
by size and modification time; its ends are read only if the time differs, as in a copy. So no task opens the videos of
another task.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from far_scale.data.video.find import unreadable_file
from far_scale.data.video.sources import Source
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

VIDEOS_NAME = "videos.jsonl"
_END_BYTES = 1 << 16


class FileFingerprint(NamedTuple):
    """Size, modification time, and a hash of the first and last 64 KB of a file; `_MISSING` for a missing file."""

    bytes: int
    mtime_ns: int
    ends: str


_MISSING = FileFingerprint(0, 0, "")


class SourceFingerprint(NamedTuple):
    """Fingerprints of a source's video or latents, and of its file of actions.

    Attributes:
        key: key of the sample.
        actions: None without a file of actions.
        relabelled: whether its label is not that of its folder, so that folder names do not name the set's classes.
    """

    key: str
    video: FileFingerprint
    actions: FileFingerprint | None
    relabelled: bool = False


def fingerprint_source(source: Source) -> SourceFingerprint:
    """Take the fingerprints of the source's files.

    Raises:
        UserError: one cannot be read.
    """
    actions = None if source.actions is None else _fingerprint_file(source.actions)
    return SourceFingerprint(source.key, _fingerprint_file(source.path), actions)


def find_changed_file(source: Source, previous: SourceFingerprint) -> Path | None:
    """The first of the source's files that differs from its fingerprint, or None.

    Raises:
        UserError: one is missing or cannot be read.
    """
    if _has_changed(source.path, previous.video):
        return source.path
    if source.actions is not None and (previous.actions is None or _has_changed(source.actions, previous.actions)):
        return source.actions
    return None


def shard_fingerprints_path(folder: Path, shard: int) -> Path:
    """The file of one shard's fingerprints, which exists until the manifest is built."""
    return folder / f"videos-{shard:06d}.jsonl"


def write_fingerprints(path: Path, fingerprints: Iterable[SourceFingerprint]) -> None:
    """Write fingerprints as JSON lines, atomically, unless the file has this content already."""
    text = "".join(
        json.dumps(fingerprint if fingerprint.relabelled else fingerprint[:3]) + "\n" for fingerprint in fingerprints
    )
    if not path.exists() or path.read_text() != text:
        with atomic_write(path) as part:
            part.write_text(text)


def read_fingerprints(path: Path) -> dict[str, SourceFingerprint]:
    """Read fingerprints by the sources' keys; empty if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        fingerprints = [_parse(line) for line in path.read_text().split("\n") if line]
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{path}: not what was written when its videos were encoded; remove it, and they are encoded again"
        ) from None
    return {fingerprint.key: fingerprint for fingerprint in fingerprints}


def _parse(line: str) -> SourceFingerprint:
    key, video, actions, *relabelled = json.loads(line)
    if not isinstance(key, str) or relabelled not in ([], [True]):
        raise TypeError
    return SourceFingerprint(
        key,
        FileFingerprint(*video),
        None if actions is None else FileFingerprint(*actions),
        bool(relabelled),
    )


def _fingerprint_file(path: Path) -> FileFingerprint:
    if not path.is_file():  # reading a pipe would block
        return _MISSING
    status = _stat(path)
    return FileFingerprint(status.st_size, status.st_mtime_ns, _hash_ends(path))


def _has_changed(path: Path, previous: FileFingerprint) -> bool:
    if previous == _MISSING:
        return path.is_file()
    status = _stat(path)
    if status.st_size != previous.bytes:
        return True
    return status.st_mtime_ns != previous.mtime_ns and _hash_ends(path) != previous.ends


def _stat(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; put it back, or take it out of the list") from None
    except OSError as error:
        raise unreadable_file(path, error) from None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise UserError(f"{path}: is no plain file; take it out of the videos")
    return status


def _hash_ends(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(_END_BYTES))
            file.seek(max(_END_BYTES, os.fstat(file.fileno()).st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    except OSError as error:
        raise unreadable_file(path, error) from None
    return digest.hexdigest()[:16]
