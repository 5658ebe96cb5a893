"""Which files of a folder are videos, through links and past what is hidden."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NoReturn

from far_scale.utils.errors import UserError, print_warning

_MOVIES = (
    "mp4 m4v mov qt 3gp 3g2 f4v avi divx mkv mk3d webm ogv flv wmv asf mpg mpeg mpe m1v m2v vob ts m2t mts m2ts mxf"
    " nut rm rmvb ivf h264 264 hevc 265 mjpeg mjpg y4m gif apng"
)
SUFFIXES = frozenset(f".{name}" for name in [*_MOVIES.split(), "npz"])
BESIDE = frozenset((".npy", ".csv", ".json", ".jsonl", ".txt"))  # actions and lists, which may lie beside videos
# of systems: what was deleted, previews, what a check of the disk found
_OF_SYSTEMS = frozenset(
    (
        "$RECYCLE.BIN",
        "RECYCLER",
        "#recycle",
        "@Recycle",
        "System Volume Information",
        "lost+found",
        "__MACOSX",
        "@eaDir",
    )
)
_KINDS = 10  # of files that are passed over are named


def find_videos(path: str | Path) -> list[Path]:
    """The videos at `path`: itself, if it is a file, or those in the folder and its folders, sorted by path.

    Links to files and folders are followed, but for a link back to a folder that it lies in. Hidden files and folders
    are not looked at, unless `path` itself is one, nor folders of the system, such as that of deleted files. Files that
    are neither videos nor lists nor actions are counted by suffix in one warning.

    Raises:
        UserError: there is nothing at `path`, a folder without videos, or one that cannot be read; a link that leads
            nowhere and may have been to a folder of videos.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder of videos")
    found, others = [], Counter[str]()
    for file in files_below(path):
        suffix = file.suffix.lower()
        if suffix in SUFFIXES:
            found.append(file)
        elif suffix not in BESIDE:
            others[suffix] += 1
    if not found:
        raise UserError(
            f"{path}: no videos in this folder{_passed_over(others)}; they end in {', '.join(sorted(SUFFIXES))}"
        )
    if others:
        _warn_once(f"{path}{_passed_over(others)}")
    return sorted(found)


def files_below(root: Path, suffixes: Container[str] = SUFFIXES | BESIDE) -> Iterator[Path]:
    """Files below a folder that are not hidden, through links too, each folder once on any way down.

    Raises:
        UserError: a folder that cannot be read; a link that leads nowhere and does not end in one of `suffixes`.
    """
    waiting = [(root, _ways_up(root))]  # folders, each with itself and all folders that lead to it
    while waiting:
        folder, above = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                seen = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            _refuse(error)
        for entry in seen:
            # a name that begins with a dot is a file in the making (files.atomic_write), or hidden on purpose
            if entry.name.startswith(".") or entry.name in _OF_SYSTEMS:
                continue
            path = folder / entry.name
            if not entry.is_symlink():  # the system is asked about links alone: there may be millions of files
                if entry.is_dir():
                    waiting.append((path, above | {_identity(path)}))
                else:
                    yield path
            elif path.is_dir():
                if _identity(path) not in above:
                    waiting.append((path, above | _ways_up(path)))
            elif path.suffix.lower() in suffixes or path.exists():
                yield path  # a file's link that leads nowhere is found, and refused when it is read
            else:
                raise UserError(
                    f"{path}: this link leads nowhere, and may have been to a folder; put back what it "
                    f"leads to ({os.readlink(path)}), or remove it"
                )


def _ways_up(folder: Path) -> frozenset[tuple[int, int]]:
    """A folder and all that it really lies in: a link to one of these would lead back here."""
    real = folder.resolve()
    return frozenset(map(_identity, (real, *real.parents)))


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        _refuse(error)
    return status.st_dev, status.st_ino


def _passed_over(suffixes: Counter[str]) -> str:
    """`: passed over: 3 files (.docx 2, .zip 1)`, or nothing where there are none."""
    if not suffixes:
        return ""
    named = Counter[str]()
    for suffix, count in suffixes.items():
        plain = suffix.isprintable() and len(suffix) <= 12  # part of a name may look like one
        named[(suffix if plain else "other") or "without suffix"] += count
    kinds = sorted(named.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = ", ".join(f"{kind} {count}" for kind, count in kinds[:_KINDS])
    more = f", {len(kinds) - _KINDS} more kinds" if len(kinds) > _KINDS else ""
    files = suffixes.total()
    return f": passed over: {files} file{'s' if files > 1 else ''} ({shown}{more})"


@functools.cache
def _warn_once(text: str) -> None:
    """Of all ranks the first one says it, once: a folder may be looked at several times."""
    if os.environ.get("RANK", "0") == "0":
        print_warning(text)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); fix that and run again")
