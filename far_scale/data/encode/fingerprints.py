"""What the videos of a shard set were when they were encoded, so that changed ones are found: `videos.jsonl`.

A task takes the fingerprints of its own shards' videos as it reads them, and keeps a file a shard
(`videos-000003.jsonl`) until the manifest is built; then they are one file, in the order of the sources. Whether a
file is still the same takes one look at its size and time; only where the time differs, as in a copy, its ends are
read. So no task opens another one's videos, however many there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from far_scale.data.video.sources import Source
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

VIDEOS_NAME = "videos.jsonl"
_END_BYTES = 1 << 16


class FilePrint(NamedTuple):
    """A file's size, the time of its last change, and a hash of its first and last 64 KB; of none, `_MISSING`."""

    bytes: int
    mtime_ns: int
    ends: str


_MISSING = FilePrint(0, 0, "")


class SourcePrint(NamedTuple):
    """The fingerprints of a source's video, or latents, and of its file of actions, where it has one.

    `relabelled`: its own label is not its folder's, so in its set the folders do not name the classes.
    """

    key: str
    video: FilePrint
    actions: FilePrint | None
    relabelled: bool = False


def take_print(source: Source) -> SourcePrint:
    """What the source's files are now.

    Raises:
        UserError: one cannot be read.
    """
    return SourcePrint(source.key, _of_file(source.path), None if source.actions is None else _of_file(source.actions))


def changed_file(source: Source, before: SourcePrint) -> Path | None:
    """The first of the source's files that is not what it was, or None.

    Raises:
        UserError: one is not there any more or cannot be read.
    """
    if _differs(source.path, before.video):
        return source.path
    if source.actions is not None and (before.actions is None or _differs(source.actions, before.actions)):
        return source.actions
    return None


def prints_of_shard(folder: Path, number: int) -> Path:
    """The file of one shard's fingerprints, there while the manifest is not built."""
    return folder / f"videos-{number:06d}.jsonl"


def write_prints(path: Path, prints: Iterable[SourcePrint]) -> None:
    """Write fingerprints a line each, atomically; a file that is right already is left."""
    text = "".join(json.dumps(one if one.relabelled else one[:3]) + "\n" for one in prints)
    if not path.exists() or path.read_text() != text:
        with atomic_write(path) as beside:
            beside.write_text(text)


def read_prints(path: Path) -> dict[str, SourcePrint]:
    """The fingerprints in a file by the sources' keys; none where there is no file.

    Raises:
        UserError: it is spoilt.
    """
    try:
        found = [_parse(line) for line in path.read_text().split("\n") if line]
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{path}: not what was written when its videos were encoded; remove it, and they are encoded anew"
        ) from None
    return {one.key: one for one in found}


def _parse(line: str) -> SourcePrint:
    key, video, actions, *relabelled = json.loads(line)
    if not isinstance(key, str) or relabelled not in ([], [True]):
        raise TypeError
    return SourcePrint(key, FilePrint(*video), None if actions is None else FilePrint(*actions), bool(relabelled))


def _of_file(path: Path) -> FilePrint:
    if not path.is_file():  # a pipe would be waited on for ever
        return _MISSING
    status = _status(path)
    return FilePrint(status.st_size, status.st_mtime_ns, _ends(path))


def _differs(path: Path, before: FilePrint) -> bool:
    if before == _MISSING:
        return path.is_file()
    status = _status(path)
    if status.st_size != before.bytes:
        return True
    return status.st_mtime_ns != before.mtime_ns and _ends(path) != before.ends


def _status(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; put it back, or take it out of the list") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited on for ever
        raise UserError(f"{path}: is no plain file; take it out of the videos")
    return status


def _ends(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(_END_BYTES))
            file.seek(max(_END_BYTES, os.fstat(file.fileno()).st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from None
    return digest.hexdigest()[:16]


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); fix that and run again")
