"""Finds the video files in a folder: follows links, skips hidden files and system folders."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

from far_scale.utils.errors import UserError, print_warning

_EXTENSIONS = (
    "mp4 m4v mov qt 3gp 3g2 f4v avi divx mkv mk3d webm ogv flv wmv asf mpg mpeg mpe m1v m2v vob ts m2t mts m2ts mxf"
    " nut rm rmvb ivf h264 264 hevc 265 mjpeg mjpg y4m gif apng"
)
VIDEO_SUFFIXES = frozenset(f".{extension}" for extension in [*_EXTENSIONS.split(), "npz"])
SIDECAR_SUFFIXES = frozenset((".npy", ".csv", ".json", ".jsonl", ".txt"))  # actions and lists beside videos
_SYSTEM_FOLDERS = frozenset(  # deleted files, previews, what a disk check found
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
_MAX_SUFFIXES_LISTED = 10  # in the warning about skipped files


def find_videos(path: str | Path) -> list[Path]:
    """Find the videos at `path`: the file itself, or all videos below the folder, sorted by path.

    Links to files and folders are followed, except a link back to a folder that contains it. Hidden files and folders
    (unless `path` itself is hidden) and system folders are skipped. Other files that are neither videos, lists nor
    actions are counted by suffix in one warning.

    Raises:
        UserError: nothing at `path`; a folder without videos, or one that cannot be read; a broken link that may have
            led to a folder of videos.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder of videos")
    videos, skipped = [], Counter[str]()
    for file in files_below(path):
        suffix = file.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            videos.append(file)
        elif suffix not in SIDECAR_SUFFIXES:
            skipped[suffix] += 1
    if not videos:
        raise UserError(
            f"{path}: no videos in this folder{_describe_skipped(skipped)}; "
            f"they end in {', '.join(sorted(VIDEO_SUFFIXES))}"
        )
    if skipped:
        _warn_once(f"{path}{_describe_skipped(skipped)}")
    return sorted(videos)


def files_below(root: Path, suffixes: Container[str] = VIDEO_SUFFIXES | SIDECAR_SUFFIXES) -> Iterator[Path]:
    """Yield the visible files below a folder, following links; a link to a containing folder is skipped.

    Raises:
        UserError: a folder that cannot be read; a broken link without one of `suffixes`.
    """
    pending = [(root, _ancestors(root))]  # folders, each with the folders that lead to it and itself
    while pending:
        folder, ancestors = pending.pop()
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise unreadable_file(folder, error) from None
        for entry in entries:
            # a name that begins with a dot is a file being written (utils.io.atomic_write), or hidden on purpose
            if entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
                continue
            path = folder / entry.name
            if not entry.is_symlink():  # only links cost a call to the file system: there may be millions of files
                if entry.is_dir():
                    pending.append((path, ancestors | {_identity(path)}))
                else:
                    yield path
            elif path.is_dir():
                if _identity(path) not in ancestors:
                    pending.append((path, ancestors | _ancestors(path)))
            elif path.suffix.lower() in suffixes or path.exists():
                yield path  # a broken link to a file is refused when it is read
            else:
                raise UserError(
                    f"{path}: this link leads nowhere, and may have been to a folder; put back what it "
                    f"leads to ({os.readlink(path)}), or remove it"
                )


def unreadable_file(path: Path, error: OSError) -> UserError:
    """The error to raise where the operating system cannot read a file or folder."""
    return UserError(f"{path}: cannot be read ({error.strerror}); fix that and run again")


def _ancestors(folder: Path) -> frozenset[tuple[int, int]]:
    """The resolved folder and all folders that contain it: a link to one of these would be a cycle."""
    real = folder.resolve()
    return frozenset(map(_identity, (real, *real.parents)))


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise unreadable_file(folder, error) from None
    return status.st_dev, status.st_ino


def _describe_skipped(suffixes: Counter[str]) -> str:
    """`: skipped 3 files (.docx 2, .zip 1)`, or nothing where none were skipped."""
    if not suffixes:
        return ""
    named = Counter[str]()
    for suffix, count in suffixes.items():
        is_plain = suffix.isprintable() and len(suffix) <= 12  # otherwise rather a part of the name
        named[(suffix if is_plain else "other") or "without suffix"] += count
    kinds = sorted(named.items(), key=lambda kind: (-kind[1], kind[0]))
    listed = ", ".join(f"{kind} {count}" for kind, count in kinds[:_MAX_SUFFIXES_LISTED])
    more = f", {len(kinds) - _MAX_SUFFIXES_LISTED} more kinds" if len(kinds) > _MAX_SUFFIXES_LISTED else ""
    files = suffixes.total()
    return f": skipped {files} file{'s' if files > 1 else ''} ({listed}{more})"


@functools.cache
def _warn_once(text: str) -> None:
    """Warn on the first rank only, and once: a folder may be searched several times."""
    if os.environ.get("RANK", "0") == "0":
        print_warning(text)
