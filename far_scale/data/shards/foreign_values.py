"""Numbers, texts and JSON in the members of adopted samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from far_scale.data.shards.adopted import Part
from far_scale.data.shards.foreign_mds import NUMBERS
from far_scale.data.shards.foreign_tensors import Read
from far_scale.data.shards.members import Member
from far_scale.data.shards.sample import Mismatch
from far_scale.data.shards.typed import MAX_TENSORS_BYTES

_MAX_JSON = 1 << 20  # bytes of a sample's JSON or text
_MAX_LABEL = 1 << 40

Members = Mapping[str, Member]
"""The members of one sample by their extensions, or its columns by their names."""


def label_in(read: Read, members: Members, part: Part, classes: Sequence[str] | None) -> int:
    """A label: a whole number, or the name of one of the classes, where their names are known.

    Raises:
        Mismatch: there is none, it is no whole number from 0, or it may be either.
    """
    text = _found(read, members, part)
    name = text.strip() if isinstance(text, str) else None
    if classes is not None and name is not None and name in classes:
        named = classes.index(name)
        if name.isdecimal() and int(name) != named:
            raise Mismatch(f"its {part} is {name!r}, which is the name of class {named} too; write numbers, not names")
        return named
    value = number(read, members, part)
    if value != int(value) or not 0 <= value < _MAX_LABEL:
        raise Mismatch(f"its {part} is {value}, and a label is a whole number from 0")
    return int(value)


def number(read: Read, members: Members, part: Part) -> float:
    """A finite number that stands in a member.

    Raises:
        Mismatch: there is none.
    """
    value = _found(read, members, part)
    try:
        # Python takes 1_0 for 10.
        if isinstance(value, bool) or "_" in str(value) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise Mismatch(f"its {part} is {value!r:.40}, which is no number") from None


def _found(read: Read, members: Members, part: Part) -> Any:
    """A number, a text, or anything that JSON can say."""
    member = member_of(members, part)
    if part.kind == "json":
        return json_value(read, member.offset, member.size, part)
    if part.kind.startswith("number:"):
        return _stored_number(read, member, part)
    return text_of(read, member.offset, member.size, part).strip()


def _stored_number(read: Read, member: Member, part: Part) -> float:
    dtype = np.dtype(NUMBERS[part.kind.removeprefix("number:")])
    if member.size != dtype.itemsize:
        raise Mismatch(f"its {part} has {member.size} bytes, not {dtype.itemsize}")
    return float(np.frombuffer(read(member.offset, member.size), dtype)[0])


def json_of(read: Read, offset: int, size: int, part: Part) -> Any:
    """What a JSON member says.

    Raises:
        Mismatch: it is no JSON.
    """
    try:
        return json.loads(text_of(read, offset, size, part))
    except (ValueError, RecursionError):
        raise Mismatch(f"its {part.member} is no JSON") from None


def json_value(read: Read, offset: int, size: int, part: Part) -> Any:
    """What a JSON member says, or of an object the value of the part's key.

    Raises:
        Mismatch: it is no JSON, or has no such key.
    """
    found = json_of(read, offset, size, part)
    if part.key is None:
        return found
    if not isinstance(found, dict) or part.key not in found:
        raise Mismatch(f"its {part.member} has no {part.key!r}")
    return found[part.key]


def text_of(read: Read, offset: int, size: int, part: Part) -> str:
    """A text in UTF-8.

    Raises:
        Mismatch: it is none, or longer than any that is read.
    """
    if size > _MAX_JSON:
        raise Mismatch(f"its {part.member} has {size} bytes, {_MAX_JSON} at most")
    try:
        return read(offset, size).decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError:
        raise Mismatch(f"its {part.member} is not in UTF-8") from None


def member_of(members: Members, part: Part) -> Member:
    """The member of a sample in which a part stands.

    Raises:
        Mismatch: the sample has none, an empty one, or one larger than any that is read.
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
