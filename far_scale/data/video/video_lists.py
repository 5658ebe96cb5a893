"""Files that list videos: .csv and .jsonl, the official code's .json, UCF-101's splits, and lists of class names.

A .csv file with a header, or a .jsonl file of objects, has `video` and optionally `label` (an integer from 0) and
`actions` (integers [F], a .npy file, or an .npz file with `actions`). Its paths are relative to its own folder.

The official code's lists (`data_list` of showlab/FAR's options) are .json arrays of objects: `video_path` or, for
extracted latents, `latent_path` (a .pt file, see `far_scale.data.encode.source_reader`); `label` for UCF-101;
`action_path` for BAIR, Minecraft and all latents (.npz with `actions`). Other keys are ignored, as officially.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from far_scale.data.video.find import unreadable_file
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_text, text_lines

_OFFICIAL_SUFFIX = ".json"
LIST_SUFFIXES = frozenset((".jsonl", ".csv", _OFFICIAL_SUFFIX))
CLASSES_NAME = "classInd.txt"  # of UCF-101: a line per class, its number from 1 and its name
_COLUMNS = {"video", "label", "actions"}
_OFFICIAL_PATH_KEYS = ("video_path", "latent_path")
_MAX_OFFICIAL_BYTES = 1 << 30  # a million videos take some 200 MB
_CLASS_NUMBER = re.compile(r"[0-9]{1,18}")
_LABEL = re.compile(r"[0-9]{1,18}(\.0*)?")  # pandas writes 3.0 where a column has gaps


class ListEntry(NamedTuple):
    """One video (or latents) of a list.

    Attributes:
        where: file and line, for messages.
        label: class that the list gives, or None.
        actions: file of actions that the list gives, or None.
        sidecar: an .npz file beside the video that may hold its label; it need not exist. None for official lists.
    """

    where: str
    path: Path
    label: int | None
    actions: Path | None
    sidecar: Path | None


def read_list(path: Path) -> list[ListEntry]:
    """Read the entries of a list in their order; the format follows from the suffix.

    Raises:
        UserError: not a list of that format, no entries, or a video that is listed twice.
    """
    if path.suffix.lower() == _OFFICIAL_SUFFIX:
        entries = _read_official_list(path)
    else:
        entries = [_parse_row(path, number, row) for number, row in _read_rows(path)]
        if not entries:
            raise UserError(f"{path}: lists no video; write one per line")
    first: dict[Path, ListEntry] = {}
    for entry in entries:
        if (other := first.setdefault(entry.path, entry)) is not entry:
            raise UserError(f"{entry.where}: {entry.path} is listed already ({other.where}); take one out")
    return entries


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes 0, 1, ... from a text file with one name per line.

    Raises:
        UserError: the file is missing or empty, or a name is in it twice.
    """
    lines: dict[str, int] = {}
    for number, line in text_lines(path, "list"):
        name = unicodedata.normalize("NFC", line)
        if lines.setdefault(name, number) != number:
            raise UserError(f"{path}:{number}: class {name} is on line {lines[name]} already; take one out")
    if not lines:
        raise UserError(f"{path}: names no class; write one per line")
    return tuple(lines)


def read_class_index(path: Path) -> dict[str, int]:
    """Read UCF-101's classInd.txt: class numbers from 0 by class name.

    Raises:
        UserError: the file is missing, or a line is no number from 1 and a name.
    """
    classes = {}
    for line_number, line in text_lines(path, "list"):
        number, _, name = line.partition(" ")
        if not is_class_number(number) or int(number) < 1 or not name:
            raise UserError(f"{path}:{line_number}: {line!r:.80} is no number from 1 and a name")
        classes[name] = int(number) - 1
    return classes


def read_split(split: Path, root: Path, videos: Container[str], classes: Mapping[str, int]) -> dict[str, int]:
    """Read one of UCF-101's split lists: class numbers by video name.

    Args:
        root: the folder of the videos, for messages.
        videos: names of the videos below it.
        classes: see `read_class_index`.

    Raises:
        UserError: no entries, a video that is missing, or a class that contradicts `classes`.
    """
    labels = {}
    for line_number, line in text_lines(split, "list"):
        name, _, number = line.partition(" ")
        if name not in videos:
            raise UserError(
                f"{split}:{line_number}: {name} is not in {root}; complete the folder, or give the split's own"
            )
        label = classes.get(name.partition("/")[0])
        # a train list repeats the class, a test list does not
        if label is None or (number and number != str(label + 1)):
            raise UserError(
                f"{split}:{line_number}: {line!r:.200} does not fit {CLASSES_NAME} beside it; take both of one archive"
            )
        labels[name] = label
    if not labels:
        raise UserError(f"--split {split}: names no video")
    return labels


def is_class_number(text: str) -> bool:
    """Whether a text is a class number in decimal digits."""
    return _CLASS_NUMBER.fullmatch(text) is not None


def is_valid_path(value: Any) -> bool:
    """Whether a value from a file can be a path: a non-empty text that can be encoded and has no NUL."""
    try:
        return isinstance(value, str) and bool(value) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _parse_label(value: Any, where: str) -> int | None:
    """Parse the class of a list entry, None where it is empty; `3`, `" 3"` and `3.0` are the same.

    Raises:
        UserError: it is no class number.
    """
    number = value
    if isinstance(number, str):
        text = number.strip()
        number = int(text.partition(".")[0]) if _LABEL.fullmatch(text) else text or None
    elif isinstance(number, float) and number.is_integer():
        number = int(number)
    if number is not None and (type(number) is not int or number < 0):
        raise UserError(f"{where}: `label` is {value!r:.80}; it must be the number of a class, from 0")
    return number


def _parse_row(path: Path, number: int, row: Any) -> ListEntry:
    where = f"{path}:{number}"
    if not isinstance(row, dict) or not set(row) <= _COLUMNS or not is_valid_path(row.get("video")):
        if isinstance(row, dict) and set(row) <= _COLUMNS and row.get("video", 0) in ("", None):
            raise UserError(f"{where}: `video` is empty; write the path of a video, or take the line out")
        keys = sorted(map(str, row)) if isinstance(row, dict) else repr(row)
        raise UserError(f"{where}: has {keys!s:.200}; a line has `video` and maybe `label` and `actions`")
    label, actions = _parse_label(row.get("label"), where), row.get("actions")
    if actions not in (None, "") and not is_valid_path(actions):  # "": an empty field of a CSV
        raise UserError(f"{where}: `actions` is {actions!r:.80}; it must be the path of a .npy file")
    video = path.parent / row["video"]
    return ListEntry(where, video, label, path.parent / actions if actions else None, video.with_suffix(".npz"))


def _read_rows(path: Path) -> Iterable[tuple[int, Any]]:
    """The rows of a .csv or .jsonl list with their line numbers, unchecked."""
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    return ((number, _parse_json_line(path, number, line)) for number, line in text_lines(path, "list"))


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    lines = (line.strip(" \t\ufeff") + "\n" for line in read_text(path, "list").split("\n"))
    # strict: an unclosed quote would swallow the rows after it
    table = csv.DictReader(lines, skipinitialspace=True, strict=True)
    try:
        columns = [column.strip() for column in table.fieldnames or ()]
        if repeated := {column for column in columns if columns.count(column) > 1}:
            raise UserError(f"{path}: has the column `{repeated.pop()}` twice; take one out")
        for row in table:
            cells = {key and key.strip(): cell.strip() if isinstance(cell, str) else cell for key, cell in row.items()}
            yield table.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num + 1}: no CSV ({error}); look for a quote that is not closed") from None


def _parse_json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: no JSON ({error}); write one object a line") from None


def _read_official_list(path: Path) -> list[ListEntry]:
    """Read an official list.

    The official code resolves paths against its working directory, and its lists are below that folder. So paths are
    resolved against the closest folder above the list in which the first entry's file exists.

    Raises:
        UserError: it is no such list, or its first file is in no folder above it.
    """
    rows = _read_official_rows(path)
    key = next((key for key in _OFFICIAL_PATH_KEYS if key in rows[0]), _OFFICIAL_PATH_KEYS[0])
    entries = [_parse_official_row(path, number, row, key) for number, row in enumerate(rows)]
    first = rows[0][key]
    root = next((folder for folder in path.absolute().parents if os.path.isfile(folder / first)), None)
    if root is None:
        raise UserError(f"{path}: its first file, {first:.200}, is in no folder above the list; put the list there")
    return [
        entry._replace(path=root / entry.path, actions=None if entry.actions is None else root / entry.actions)
        for entry in entries
    ]


def _read_official_rows(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > _MAX_OFFICIAL_BYTES:
            raise UserError(f"{path}: is larger than {_MAX_OFFICIAL_BYTES} bytes; divide it")
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable_file(path, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({str(error)[:80]}); give one of the official code's data lists") from None
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise UserError(f"{path}: not a list of objects with `video_path` or `latent_path`, as the official code's are")
    return rows


def _parse_official_row(path: Path, number: int, row: Any, key: str) -> ListEntry:
    where = f"{path}: entry {number}"
    if not isinstance(row, dict) or not is_valid_path(row.get(key)):
        raise UserError(f"{where} has no path under `{key}`, as the others have; give it one, or take it out")
    label, actions = _parse_label(row.get("label"), where), row.get("action_path")
    if actions is not None and not is_valid_path(actions):
        raise UserError(f"{where}: `action_path` is {actions!r:.40}; it must be the path of a file")
    return ListEntry(where, Path(row[key]), label, None if actions is None else Path(actions), None)
