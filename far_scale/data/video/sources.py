"""What is to be encoded: a folder of videos, one with a split list, or a list of paths; always in one order.

In a folder, an .npz file beside a video of the same name holds that video's actions, as in TECO's Minecraft.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from far_scale.data.video.official_lists import is_path, read_official_list
from far_scale.data.video.videos import find_videos
from far_scale.errors import UserError

OFFICIAL_LIST = ".json"
LISTS = frozenset((".jsonl", ".csv", OFFICIAL_LIST))
CLASSES_NAME = "classInd.txt"  # of UCF-101: a line a class, its number from 1 and its name
_COLUMNS = {"video", "label", "actions"}
_NUMBER = re.compile(r"[0-9]{1,18}")  # of a class
_KEY_CHARACTERS = 80
_FLIPPED = "-flip"  # at the end of a mirrored sample's key


@dataclass(frozen=True)
class Source:
    """A video to encode, or latents that were extracted from one before.

    Attributes:
        path: where it lies.
        name: its path below the folder that all videos share, as stored.
        key: its sample's key.
        folder_label: the class of its folder: the folders' classes are 0, 1, ... in the order of their names.
        label: the class that a list gives it, which goes before all others, or None.
        actions: the file of its actions of a list, or that lies beside it, which goes before its own, or None.
        flip: mirror its frames, left to right.
    """

    path: Path
    name: str
    key: str
    folder_label: int
    label: int | None = None
    actions: Path | None = None
    flip: bool = False


def find_sources(path: str | Path, split: str | Path | None = None) -> list[Source]:
    """The videos of a folder, of one file, or of a list.

    A list is a .csv file with a header, or a .jsonl file of objects: `video`, and for each where wanted `label` (a
    number from 0) and `actions` (integers [F], a .npy file, or an .npz file that has them under `actions`). Its paths
    start at its own folder. Or it is one of the official code's, see `far_scale.data.video.official_lists`.

    Args:
        split: one of UCF-101's lists (trainlist01.txt, testlist01.txt, ...): only these videos of the folder are
            taken. The class is that of the classInd.txt beside the list.

    Raises:
        UserError: no videos; a list or a split with a line that cannot be used; two videos with one key.
    """
    path = Path(path)
    if path.suffix.lower() in LISTS and path.is_file():
        if split is not None:
            raise UserError(f"--split {split}: goes with a folder of videos, not with the list {path}; leave it out")
        return _official(path) if path.suffix.lower() == OFFICIAL_LIST else _listed(path)
    sources = _of_folder(find_videos(path))
    return sources if split is None else list(_of_split(path, sources, Path(split)))


def with_flips(sources: Sequence[Source]) -> list[Source]:
    """Every source, and after it the same one mirrored, a sample of its own.

    Raises:
        UserError: two samples would have the same key.
    """
    found = []
    for source in sources:
        found += [source, replace(source, flip=True, key=source.key[-_KEY_CHARACTERS + len(_FLIPPED) :] + _FLIPPED)]
    taken: dict[str, Source] = {}
    for source in found:
        if (other := taken.setdefault(source.key, source)) is not source:
            raise UserError(f"{source.path}: its sample would have the key {source.key}, as {other.path}; rename one")
    return found


def describe(paths: Sequence[Path]) -> list[Source]:
    """Keys, names and folders' classes of videos, from their paths below the folder that they share.

    Raises:
        UserError: there are none, two have the same key, or a name is no text.
    """
    if not paths:
        raise UserError("--videos: there is no video here that can be read (.mp4, .avi, .mkv, .npz, ...)")
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    folders = {folder: number for number, folder in enumerate(sorted({path.absolute().parent for path in paths}))}
    taken: dict[str, Path] = {}
    sources = []
    for path in paths:
        name = path.absolute().relative_to(root)
        if not is_path(name.as_posix()):
            raise UserError(f"{str(path)!a}: its name is not in UTF-8; rename it")
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", str(name.with_suffix("")))[-_KEY_CHARACTERS:]
        if (other := taken.setdefault(key, path)) is not path:
            raise UserError(f"{path}: its sample would have the key {key}, as that of {other}; rename one of them")
        sources.append(Source(path, name.as_posix(), key, folders[path.absolute().parent]))
    return sources


def _of_folder(paths: Sequence[Path]) -> list[Source]:
    """The videos of a folder; .npz files beside a video of the same name are its actions."""
    videos = {path.with_suffix("") for path in paths if path.suffix.lower() != ".npz"}
    actions = {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".npz"}
    sources = describe([path for path in paths if path.suffix.lower() != ".npz" or path.with_suffix("") not in videos])
    return [
        source
        if source.path.suffix.lower() == ".npz"
        else replace(source, actions=actions.get(source.path.with_suffix("")))
        for source in sources
    ]


def _official(path: Path) -> list[Source]:
    listed = read_official_list(path)
    first: dict[Path, int] = {}
    for number, row in enumerate(listed):
        if first.setdefault(row.path, number) != number:
            raise UserError(f"{path}: entry {number}: {row.path} is entry {first[row.path]} already; take one out")
    described = zip(describe([row.path for row in listed]), listed, strict=True)
    return _in_order(replace(source, label=row.label, actions=row.actions) for source, row in described)


def _listed(path: Path) -> list[Source]:
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path}: lists no video; write one a line")
    files = [path.parent / row["video"] for _, row in rows]
    first: dict[Path, int] = {}
    for file, (line, _) in zip(files, rows, strict=True):
        if first.setdefault(file, line) != line:
            raise UserError(f"{path}:{line}: {file} stands on line {first[file]} already; take one of them out")
    sources = []
    for source, (_, row) in zip(describe(files), rows, strict=True):
        actions = path.parent / row["actions"] if row.get("actions") else None
        sources.append(replace(source, label=row.get("label"), actions=actions))
    return _in_order(sources)


def _in_order(sources: Iterable[Source]) -> list[Source]:
    return sorted(sources, key=lambda source: source.name)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a list with their numbers, checked."""
    if path.suffix.lower() == ".csv":
        lines = list(_lines(path))
        parsed: Iterable[tuple[int, Any]] = _csv(path, lines)
    else:
        parsed = ((number, _json(path, number, line)) for number, line in _lines(path))
    for number, row in parsed:
        if not isinstance(row, dict) or not set(row) <= _COLUMNS or not is_path(row.get("video")):
            keys = sorted(map(str, row)) if isinstance(row, dict) else repr(row)
            raise UserError(f"{path}:{number}: has {keys!s:.200}; a line has `video` and maybe `label` and `actions`")
        label, actions = row.get("label"), row.get("actions")
        if isinstance(label, str):  # of a CSV, where an empty field is no label
            row["label"] = label = int(label) if _NUMBER.fullmatch(label) else label or None
        if label is not None and (type(label) is not int or label < 0):
            raise UserError(f"{path}:{number}: `label` is {label!r:.80}; it must be the number of a class, from 0")
        if actions not in (None, "") and not is_path(actions):  # of a CSV, an empty field is none
            raise UserError(f"{path}:{number}: `actions` is {actions!r:.80}; it must be the path of a .npy file")
        yield number, row


def _csv(path: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    table = csv.DictReader(line for _, line in lines)
    try:
        for row in table:
            yield lines[table.line_num - 1][0], row
    except csv.Error as error:
        raise UserError(f"{path}: no CSV ({error}, at its line {table.line_num}); write it anew") from None


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: no JSON ({error}); write one object a line") from None


def _of_split(root: Path, sources: list[Source], split: Path) -> Iterator[Source]:
    """The sources that one of UCF-101's lists names, with the classes of the classInd.txt beside it.

    The order of the folders' names would not do: classInd.txt has JumpingJack before JumpRope, whatever the case.
    """
    classes = {}
    for number, line in _lines(split.with_name(CLASSES_NAME)):
        label, _, name = line.partition(" ")
        if not _NUMBER.fullmatch(label) or int(label) < 1 or not name:
            raise UserError(f"{split.with_name(CLASSES_NAME)}:{number}: {line!r:.80} is no number from 1 and a name")
        classes[name] = int(label) - 1
    known = {source.path.relative_to(root).as_posix(): source for source in sources}
    wanted = {}
    for number, line in _lines(split):
        name, _, label = line.partition(" ")
        if name not in known:
            raise UserError(f"{split}:{number}: {name} is not in {root}; complete the folder, or give the split's own")
        own = classes.get(name.partition("/")[0])
        if own is None or (label and label != str(own + 1)):  # a train list repeats the class, a test list does not
            raise UserError(
                f"{split}:{number}: {line!r:.200} does not fit {CLASSES_NAME} beside it; take both of one archive"
            )
        wanted[name] = replace(known[name], label=own)
    if not wanted:
        raise UserError(f"--split {split}: names no video")
    yield from (wanted[name] for name in sorted(wanted))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such list") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no text in UTF-8 ({error.reason}); write it anew") from None
    yield from ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())
