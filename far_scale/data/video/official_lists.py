"""The official code's lists of data (`data_list` of showlab/FAR's options): JSON, with or without latents.

A list is an array of objects: `video_path` or, for latents extracted before, `latent_path` (a .pt file, see
`far_scale.data.encode.latent_files`); `label` for UCF-101; `action_path` for BAIR, Minecraft and all latents (.npz with
`actions`). Whatever else an object holds is not read, as officially.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_scale.utils.errors import UserError

MAX_LIST_BYTES = 1 << 30  # a million videos take some 200 MB
_KINDS = ("video_path", "latent_path")
_NUMBER = re.compile(r"[0-9]{1,18}(\.0*)?")  # pandas writes 3.0 where a column has gaps


@dataclass(frozen=True)
class Listed:
    """One line of a list: a file to encode, with the class and the file of actions that the list gives it."""

    path: Path
    label: int | None
    actions: Path | None


def read_official_list(path: Path) -> list[Listed]:
    """The entries of an official list, in its order.

    The official code opens paths from where it is started, and its lists lie below that folder: so paths are taken
    from the first folder, going up from the list's own, in which the first entry's file lies.

    Raises:
        UserError: it is no such list, or its first file is nowhere above it.
    """
    rows = _rows(path)
    kind = next((kind for kind in _KINDS if kind in rows[0]), _KINDS[0])
    listed = [_checked(path, number, row, kind) for number, row in enumerate(rows)]
    first = rows[0][kind]
    root = next((folder for folder in path.absolute().parents if os.path.isfile(folder / first)), None)
    if root is None:
        raise UserError(f"{path}: its first file, {first:.200}, is in no folder above the list; put the list there")
    return [Listed(root / row.path, row.label, None if row.actions is None else root / row.actions) for row in listed]


def is_path(value: Any) -> bool:
    """Whether a value out of a file can be a path at all: a text that can be encoded, and holds no NUL."""
    try:
        return isinstance(value, str) and bool(value) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def label_number(label: Any, where: str) -> int | None:
    """The class that a list gives a video at `where`, None where that is empty; `3`, `" 3"` and `3.0` are one.

    Raises:
        UserError: it is no number of a class.
    """
    number = label
    if isinstance(number, str):
        text = number.strip()
        number = int(text.partition(".")[0]) if _NUMBER.fullmatch(text) else text or None
    elif isinstance(number, float) and number.is_integer():
        number = int(number)
    if number is not None and (type(number) is not int or number < 0):
        raise UserError(f"{where}: `label` is {label!r:.80}; it must be the number of a class, from 0")
    return number


def _rows(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"{path}: is larger than {MAX_LIST_BYTES} bytes; divide it")
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fix that and run again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({str(error)[:80]}); give one of the official code's data lists") from None
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise UserError(f"{path}: not a list of objects with `video_path` or `latent_path`, as the official code's are")
    return rows


def _checked(path: Path, number: int, row: Any, kind: str) -> Listed:
    where = f"{path}: entry {number}"
    if not isinstance(row, dict) or not is_path(row.get(kind)):
        raise UserError(f"{where} has no path under `{kind}`, as the others have; give it one, or take it out")
    label, actions = label_number(row.get("label"), where), row.get("action_path")
    if actions is not None and not is_path(actions):
        raise UserError(f"{where}: `action_path` is {actions!r:.40}; it must be the path of a file")
    return Listed(Path(row[kind]), label, None if actions is None else Path(actions))
