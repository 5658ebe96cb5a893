"""What is to be encoded: a folder of videos, one with a split list, or a list of paths; always in one order.

In a folder, an .npz file beside a video of the same name holds that video's actions, as in TECO's Minecraft, and its
label. The folders that hold videos are the classes, see `Found`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from far_scale.data.video.find import SUFFIXES, find_videos
from far_scale.data.video.official_lists import is_path, label_number, read_official_list
from far_scale.data.video.videos import read_label
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import read_text, text_lines

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
        folder_label: the class of its folder, see `Found`; None where that is none of the classes that were given, and
            it must have a label of its own.
        label: the class that a list gives it, which goes before all others, or None.
        actions: the file of its actions of a list, or that lies beside it, which goes before its own, or None.
        flip: mirror its frames, left to right.
    """

    path: Path
    name: str
    key: str
    folder_label: int | None
    label: int | None = None
    actions: Path | None = None
    flip: bool = False

    @property
    def label_file(self) -> Path | None:
        """The .npz file that may hold its label: its own, or the one of its actions."""
        return next((path for path in (self.path, self.actions) if path and path.suffix.lower() == ".npz"), None)


class Found(NamedTuple):
    """Videos and the names of their classes.

    Each folder that holds videos is a class, and its name is its path below the folder that was named. Where all of
    these are numbers, but for a beginning that all share, a class has the number of its folder, and else 0, 1, ... in
    the order of the names.

    Attributes:
        sources: the videos, in their order.
        classes: the names by class, or None where there are only numbers.
        by_folder: whether the names are those of the folders.
    """

    sources: list[Source]
    classes: tuple[str, ...] | None = None
    by_folder: bool = False


def find_sources(path: str | Path, split: str | Path | None = None) -> list[Source]:
    """The videos of a folder, of one file, or of a list, as by `find_labelled`, where no labels are wanted."""
    return find_labelled(path, split).sources


def find_labelled(
    path: str | Path,
    split: str | Path | None = None,
    labels: int = 0,
    classes: Sequence[str] | None = None,
    as_listed: bool = False,
) -> Found:
    """The videos of a folder, of one file, or of a list.

    A list is a .csv file with a header, or a .jsonl file of objects: `video`, and for each where wanted `label` (a
    number from 0) and `actions` (integers [F], a .npy file, or an .npz file that has them under `actions`). Its paths
    start at its own folder. Or it is one of the official code's, see `far_scale.data.video.official_lists`.

    Args:
        split: one of UCF-101's lists (trainlist01.txt, testlist01.txt, ...): only these videos of the folder are
            taken. The class is that of the classInd.txt beside the list.
        labels: how many classes are wanted; 0 where labels are not.
        classes: their names; folders with these names are these classes.
        as_listed: keep the order of a list; otherwise its videos come in the order of their names.

    Raises:
        UserError: no videos; a list or a split with a line that cannot be used; two videos with one key. With labels:
            a list that gives some videos a label and others none; a folder that is none of the classes.
    """
    path = Path(path)
    if classes is not None and len(classes) > labels:
        raise UserError(f"--labels {labels}: there are {len(classes)} class names; leave --labels out, or raise it")
    if path.suffix.lower() in LISTS and path.is_file():
        if split is not None:
            raise UserError(f"--split {split}: goes with a folder of videos, not with the list {path}; leave it out")
        found = (_official if path.suffix.lower() == OFFICIAL_LIST else _listed)(path, labels, classes)
        if not as_listed:
            found = found._replace(sources=_in_order(found.sources))
    else:
        _refuse_text(path)
        videos = find_videos(path)
        if split is not None:
            return _of_split(path, _of_folder(videos, path, 0, None).sources, Path(split), classes)
        found = _of_folder(videos, path, labels, classes)
    return check_folders(path, found, labels, classes) if labels else found


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names of classes 0, 1, ... in a text file, one a line.

    Raises:
        UserError: there is no such file, or a name stands in it twice.
    """
    numbers: dict[str, int] = {}
    for number, line in text_lines(path, "list"):
        name = unicodedata.normalize("NFC", line)
        if numbers.setdefault(name, number) != number:
            raise UserError(f"{path}:{number}: class {name} stands on line {numbers[name]} already; take one out")
    if not numbers:
        raise UserError(f"{path}: names no class; write one a line")
    return tuple(numbers)


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


def describe(
    paths: Sequence[Path], root: Path | None = None, labels: int = 0, classes: Sequence[str] | None = None
) -> Found:
    """Keys, names and folders' classes of videos.

    Names are paths below the folder that all videos share. Those of the classes are paths below `root`, or that folder
    where some videos do not lie in `root`.

    Raises:
        UserError: there are none, two have the same key, or a name is no text; with labels, two folders have one name.
    """
    if not paths:
        raise UserError("--videos: there is no video here that can be read (.mp4, .avi, .mkv, .npz, ...)")
    parents = [path.absolute().parent for path in paths]
    shared, folders = Path(os.path.commonpath(parents)), sorted(set(parents))
    above = shared if root is None else root.absolute()
    if not shared.is_relative_to(above) or ".." in shared.relative_to(above).parts:
        above = shared
    numbers, names = _numbered(folders, above, shared, labels, classes)
    taken: dict[str, Path] = {}
    sources = []
    for path, parent in zip(paths, parents, strict=True):
        name = parent.relative_to(shared) / path.name
        if not is_path(name.as_posix()):
            raise UserError(f"{str(path)!a}: its name is not in UTF-8; rename it")
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", str(name.with_suffix("")))[-_KEY_CHARACTERS:]
        if (other := taken.setdefault(key, path)) is not path:
            raise UserError(f"{path}: its sample would have the key {key}, as that of {other}; rename one of them")
        sources.append(Source(path, name.as_posix(), key, numbers[parent]))
    return Found(sources, names, by_folder=names is not None and classes is None)


def _numbered(
    folders: Sequence[Path], root: Path, shared: Path, labels: int, given: Sequence[str] | None
) -> tuple[dict[Path, int | None], tuple[str, ...] | None]:
    """The classes of folders below `root`, where all lie in its folder `shared`, and the names of all classes."""
    names = {folder: _class_name(folder.relative_to(root)) for folder in folders}
    if given is None and list(names.values()) == ["."]:  # the videos lie side by side, and nothing names their class
        return {folders[0]: 0}, None
    # without what all have before their names, as `train/` where only that lies in the folder
    before = shared if len(folders) > 1 else shared.parent
    short = {folder: _class_name(folder.relative_to(before)) for folder in folders}
    found: dict[Path, int | None] = {}
    if given is not None:
        known = {name: number for number, name in enumerate(given)}
        for folder in folders:
            own = _class_name(Path(folder.name)) if names[folder] == "." else short[folder]
            fitting = (name for name in (names[folder], own, _plain_number(own)) if name in known)
            found[folder] = known.get(next(fitting, ""))
        classes = tuple(given)
    elif all(_NUMBER.fullmatch(name) for name in short.values()):
        found.update((folder, int(name)) for folder, name in short.items())
        classes = tuple(map(str, range(labels)))
    else:
        classes = tuple(dict.fromkeys(names.values()))
        known = {name: number for number, name in enumerate(classes)}
        found.update((folder, known[name]) for folder, name in names.items())
    first: dict[int, Path] = {}
    for folder, number in found.items():
        if labels and number is not None and (other := first.setdefault(number, folder)) is not folder:
            raise UserError(f"{other} and {folder}: are both class {number}, {names[folder]}; rename one, or join them")
    return found, classes


def _class_name(folder: Path) -> str:
    """A folder's path as the class is called, the same for letters that macOS and others compose differently."""
    return unicodedata.normalize("NFC", folder.as_posix())


def _plain_number(name: str) -> str:
    """`7` for `007`; what is no number as it is."""
    return str(int(name)) if _NUMBER.fullmatch(name) else name


def check_folders(where: str | Path, found: Found, labels: int, given: Sequence[str] | None = None) -> Found:
    """What was found, without names that are no classes' where labels come from the files.

    Where their number is another than that of the labels, a warning says so.

    Args:
        where: what was looked at, for the warning.
        labels: how many classes there are, above 0.
        given: the names of the classes that were given.

    Raises:
        UserError: a folder that is none of the classes, where nothing else can give its videos a label.
    """
    of_folder = [source for source in found.sources if source.label is None]
    for source in of_folder:
        if source.label_file is not None:
            continue
        number, folder = source.folder_label, source.path.parent
        if number is None:
            raise UserError(
                f"{folder}: this folder's name is none of the {len(given or ())} class names; add it to them, or take "
                "its videos out"
            )
        if number >= labels:
            fix = "raise --labels, or give --classes, a file of the folders' names, one a line"
            raise UserError(f"{folder}: is class {number}, and --labels {labels} has 0 to {labels - 1}; {fix}")
    folders = len({source.path.parent for source in of_folder})
    own = found.classes is None and all(source.label_file for source in of_folder)
    if given is not None and len(given) != labels:
        print_warning(f"{where}: {len(given)} class names, but --labels {labels}")
    elif given is None and of_folder and folders != labels and not own:
        what = "class folder" if folders == 1 else "class folders"
        print_warning(f"{where}: {folders} {what}, but --labels {labels}; are all folders there?")
    if found.classes is not None and len(found.classes) > labels:  # then labels in the files are what counts
        return found._replace(classes=None, by_folder=False)
    return found


def _refuse_text(path: Path) -> None:
    """Refuse a text file, which FFmpeg would call a video that does not decode."""
    if path.suffix.lower() in SUFFIXES or not path.is_file():
        return
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (start.strip() and b"\0" not in start and _is_text(start)):
        raise UserError(
            f"{path}: is a text file, no video; a list of videos is a .csv file with the header video,label,actions, "
            "or a .jsonl file, and one of UCF-101's lists goes to --split beside --videos FOLDER"
        )


def _is_text(start: bytes) -> bool:
    try:
        start[:-4].decode()  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return True


def _of_folder(paths: Sequence[Path], root: Path, labels: int, classes: Sequence[str] | None) -> Found:
    """The videos of a folder; .npz files beside a video of the same name are its actions."""
    videos = {path.with_suffix("") for path in paths if path.suffix.lower() != ".npz"}
    actions = {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".npz"}
    own = [path for path in paths if path.suffix.lower() != ".npz" or path.with_suffix("") not in videos]
    found = describe(own, root if root.is_dir() else root.parent, labels, classes)
    sources = [
        source
        if source.path.suffix.lower() == ".npz"
        else replace(source, actions=actions.get(source.path.with_suffix("")))
        for source in found.sources
    ]
    return found._replace(sources=sources)


def _official(path: Path, labels: int, classes: Sequence[str] | None) -> Found:
    listed = read_official_list(path)
    first: dict[Path, int] = {}
    for number, row in enumerate(listed):
        if first.setdefault(row.path, number) != number:
            raise UserError(f"{path}: entry {number}: {row.path} is entry {first[row.path]} already; take one out")
    rows = [
        _Row(f"{path}: entry {number}", row.path, row.label, row.actions, None) for number, row in enumerate(listed)
    ]
    return _of_rows(path, rows, labels, classes)


def _listed(path: Path, labels: int, classes: Sequence[str] | None) -> Found:
    rows = []
    first: dict[Path, int] = {}
    for line, row in _rows(path):
        file = path.parent / row["video"]
        if first.setdefault(file, line) != line:
            raise UserError(f"{path}:{line}: {file} stands on line {first[file]} already; take one of them out")
        actions = path.parent / row["actions"] if row.get("actions") else None
        rows.append(_Row(f"{path}:{line}", file, row.get("label"), actions, file.with_suffix(".npz")))
    if not rows:
        raise UserError(f"{path}: lists no video; write one a line")
    return _of_rows(path, rows, labels, classes)


class _Row(NamedTuple):
    """A video of a list: where it stands there, and the .npz file beside it, which may not be there."""

    where: str
    path: Path
    label: int | None
    actions: Path | None
    beside: Path | None


def _of_rows(path: Path, rows: Sequence[_Row], labels: int, classes: Sequence[str] | None) -> Found:
    """The videos of a list, in its order."""
    if labels and all(row.label is None for row in rows):  # those in files beside videos go before the folders
        rows = [
            row._replace(label=read_label(row.beside))
            if row.beside not in (None, row.path) and row.beside.is_file()
            else row
            for row in rows
        ]
    labelled = any(row.label is not None for row in rows)
    if labels and labelled:
        rows = [row if row.label is not None else row._replace(label=_label_beside(row)) for row in rows]
    described = describe([row.path for row in rows], path.parent, 0 if labelled else labels, classes)
    sources = [
        replace(source, label=row.label, actions=row.actions)
        for source, row in zip(described.sources, rows, strict=True)
    ]
    # Labels that are numbers of a list have names only where these are given.
    names = described.classes if classes is not None or not labelled else None
    return Found(sources, names, described.by_folder and not labelled)


def _label_beside(row: _Row) -> int:
    """The label of a video whose list gives it none, though it gives others theirs.

    Raises:
        UserError: there is none beside the video either.
    """
    problem = "has no label, and other videos of the list have one"
    for file in (row.path, row.actions, row.beside):
        if file is not None and file.suffix.lower() == ".npz" and file.is_file():
            try:
                label = read_label(file)
            except UserError as error:
                problem += f" ({error})"
                break
            if label is not None:
                return label
    raise UserError(f"{row.where}: {row.path.name} {problem}; give it one, or take the line out")


def _in_order(sources: Iterable[Source]) -> list[Source]:
    return sorted(sources, key=lambda source: source.name)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a list with their numbers, checked."""
    if path.suffix.lower() == ".csv":
        parsed: Iterable[tuple[int, Any]] = _csv(path)
    else:
        parsed = ((number, _json(path, number, line)) for number, line in text_lines(path, "list"))
    for number, row in parsed:
        if not isinstance(row, dict) or not set(row) <= _COLUMNS or not is_path(row.get("video")):
            if isinstance(row, dict) and set(row) <= _COLUMNS and row.get("video", 0) in ("", None):
                raise UserError(f"{path}:{number}: `video` is empty; write the path of a video, or take the line out")
            keys = sorted(map(str, row)) if isinstance(row, dict) else repr(row)
            raise UserError(f"{path}:{number}: has {keys!s:.200}; a line has `video` and maybe `label` and `actions`")
        row["label"] = label_number(row.get("label"), f"{path}:{number}")
        actions = row.get("actions")
        if actions not in (None, "") and not is_path(actions):  # of a CSV, an empty field is none
            raise UserError(f"{path}:{number}: `actions` is {actions!r:.80}; it must be the path of a .npy file")
        yield number, row


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    lines = (line.strip(" \t\ufeff") + "\n" for line in read_text(path, "list").split("\n"))
    # strictly: a quote that is not closed would take the rows behind it into its own
    table = csv.DictReader(lines, skipinitialspace=True, strict=True)
    try:
        columns = [column.strip() for column in table.fieldnames or ()]
        if twice := {column for column in columns if columns.count(column) > 1}:
            raise UserError(f"{path}: has the column `{twice.pop()}` twice; take one out")
        for row in table:
            cells = {key and key.strip(): cell.strip() if isinstance(cell, str) else cell for key, cell in row.items()}
            yield table.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num + 1}: no CSV ({error}); look for a quote that is not closed") from None


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: no JSON ({error}); write one object a line") from None


def _of_split(root: Path, sources: list[Source], split: Path, given: Sequence[str] | None) -> Found:
    """The sources that one of UCF-101's lists names, with the classes of the classInd.txt beside it.

    The order of the folders' names would not do: classInd.txt has JumpingJack before JumpRope, whatever the case.
    """
    classes: dict[str, int] = {}
    classes_file = split.with_name(CLASSES_NAME)
    for number, line in text_lines(classes_file, "list"):
        label, _, name = line.partition(" ")
        if not _NUMBER.fullmatch(label) or int(label) < 1 or not name:
            raise UserError(f"{classes_file}:{number}: {line!r:.80} is no number from 1 and a name")
        classes[name] = int(label) - 1
    # One that leaves classes out says nothing of their names.
    whole = sorted(classes.values()) == list(range(len(classes)))
    names = tuple(sorted(classes, key=classes.__getitem__)) if whole else None
    if given is not None and names != tuple(given):
        raise UserError(
            f"{classes_file}: its classes are not those that were given; leave out --classes and --classes-of"
        )
    known = {source.path.relative_to(root).as_posix(): source for source in sources}
    wanted = {}
    for number, line in text_lines(split, "list"):
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
    return Found([wanted[name] for name in sorted(wanted)], names)
