"""Labels, numbers, texts and JSON in the members of adopted samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from far_scale.data.shards.adopted import Part
from far_scale.data.shards.adopted_mds import NUMBERS
from far_scale.data.shards.errors import Mismatch
from far_scale.data.shards.members import Member
from far_scale.data.shards.records import MAX_TENSORS_BYTES
from far_scale.data.shards.sample import Read

_MAX_JSON = 1 << 20  # bytes of a sample's JSON or text
_MAX_LABEL = 1 << 40

Members = Mapping[str, Member]
"""The members of one sample by extension, or its columns by name."""


def read_label(read: Read, members: Members, part: Part, classes: Sequence[str] | None) -> int:
    """A label: a whole number, or the name of a class if the names are known.

    Raises:
        Mismatch: it is missing, not a whole number from 0, or ambiguous.
    """
    text = _read_value(read, members, part)
    name = text.strip() if isinstance(text, str) else None
    if classes is not None and name is not None and name in classes:
        label = classes.index(name)
        if name.isdecimal() and int(name) != label:
            raise Mismatch(f"its {part} is {name!r}, which is the name of class {label} too; write numbers, not names")
        return label
    value = read_number(read, members, part)
    if value != int(value) or not 0 <= value < _MAX_LABEL:
        raise Mismatch(f"its {part} is {value}, and a label is a whole number from 0")
    return int(value)


def read_number(read: Read, members: Members, part: Part) -> float:
    """A finite number in a member.

    Raises:
        Mismatch: it is missing, or not a finite number.
    """
    value = _read_value(read, members, part)
    try:
        # Python parses 1_0 as 10.
        if isinstance(value, bool) or "_" in str(value) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise Mismatch(f"its {part} is {value!r:.40}, which is no number") from None


def _read_value(read: Read, members: Members, part: Part) -> Any:
    """A number, a text, or any JSON value."""
    member = find_member(members, part)
    if part.kind == "json":
        return read_json_value(read, member.offset, member.size, part)
    if part.kind.startswith("number:"):
        return _read_binary_number(read, member, part)
    return read_text(read, member.offset, member.size, part).strip()


def _read_binary_number(read: Read, member: Member, part: Part) -> float:
    dtype = np.dtype(NUMBERS[part.kind.removeprefix("number:")])
    if member.size != dtype.itemsize:
        raise Mismatch(f"its {part} has {member.size} bytes, not {dtype.itemsize}")
    return float(np.frombuffer(read(member.offset, member.size), dtype)[0])


def read_json(read: Read, offset: int, size: int, part: Part) -> Any:
    """The value of a JSON member.

    Raises:
        Mismatch: it is not JSON.
    """
    try:
        return json.loads(read_text(read, offset, size, part))
    except (ValueError, RecursionError):
        raise Mismatch(f"its {part.member} is no JSON") from None


def read_json_value(read: Read, offset: int, size: int, part: Part) -> Any:
    """The value of a JSON member, or of the part's key in it.

    Raises:
        Mismatch: it is not JSON, or has no such key.
    """
    value = read_json(read, offset, size, part)
    if part.key is None:
        return value
    if not isinstance(value, dict) or part.key not in value:
        raise Mismatch(f"its {part.member} has no {part.key!r}")
    return value[part.key]


def read_text(read: Read, offset: int, size: int, part: Part) -> str:
    """A text in UTF-8.

    Raises:
        Mismatch: it is not UTF-8, or longer than the limit.
    """
    if size > _MAX_JSON:
        raise Mismatch(f"its {part.member} has {size} bytes, {_MAX_JSON} at most")
    try:
        return read(offset, size).decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError:
        raise Mismatch(f"its {part.member} is not in UTF-8") from None


def find_member(members: Members, part: Part) -> Member:
    """The member of a sample that holds a part.

    Raises:
        Mismatch: it is missing, empty, or larger than the limit.
    """
    if part.member not in members:
        raise Mismatch(f"it has no member {part.member}, but {', '.join(sorted(members))[:100]}")
    if not members[part.member].size:
        raise Mismatch(
            f"its {part.member} is empty, as a link in a tar is (see tar's --dereference, --hard-dereference)"
        )
    if members[part.member].size > MAX_TENSORS_BYTES:
        raise Mismatch(f"its {part.member} has more than {MAX_TENSORS_BYTES} bytes; cut the sample into shorter ones")
    return members[part.member]
