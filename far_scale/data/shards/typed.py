"""What the typed papers of a shard set share: limits, numbers and names that are taken, and how errors are told."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from far_scale.data.remote.cache import MAX_UNSIZED_BYTES
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

# Limits that are kept before anything is read or allocated, each far above what our own writer makes.
MAX_MANIFEST_BYTES = 1 << 27  # 300,000 shards
MAX_INDEX_BYTES = MAX_UNSIZED_BYTES  # 300,000 samples in one shard
MAX_JSON_BYTES = 1 << 16  # of a sample; ours have about 100
MAX_HEADER_BYTES = 1 << 16  # of a sample's safetensors; ours have about 150
MAX_TENSORS_BYTES = 1 << 32  # of a sample

# Sums of these over any manifest stay within 64 bits, in which numpy counts.
_MOST = 1 << 40
Count = Annotated[int, pydantic.Field(ge=0, le=_MOST)]
Positive = Annotated[int, pydantic.Field(ge=1, le=_MOST)]
Digest = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
# The name is joined to the folder, so nothing but our own pattern may pass: no slashes, no "..".
ShardName = Annotated[str, pydantic.Field(pattern=r"^(shard-[0-9]{6,12}\.tar|shard\.[0-9]{5,12}\.mds)$")]
ShardFormat = Literal["tar", "mds"]
# Where a shard of an adopted set lies: a path or a URL. Without braces, by which a manifest is read in pieces.
Place = Annotated[str, pydantic.Field(pattern=r"^(/|s3://|gs://|https?://|pipe:)[^{}\x00-\x1f\x7f]+$", max_length=4000)]
Key = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]


class StrictModel(pydantic.BaseModel):
    """A frozen record that refuses unknown keys, implicit conversions, infinities and NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelWithClasses(StrictModel):
    """A record that may name the classes of its labels: files that do not, as all before there were names, stay so.

    Attributes:
        classes: the names of classes 0, 1, ..., or None where they are not known.
    """

    OMITTED: ClassVar[tuple[str, ...]] = ("classes",)
    """Fields that are left out of the file where they are None."""
    classes: tuple[Annotated[str, pydantic.Field(min_length=1)], ...] | None = None

    @pydantic.model_serializer(mode="wrap")
    def _without_unknown(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        for name in self.OMITTED:
            if getattr(self, name) is None:
                values.pop(name, None)
        return values


def classes_differ(own: Sequence[str] | None, other: Sequence[str] | None) -> str | None:
    """How the names of two sets' classes differ, for an error: `class 1 is 'c', there 'b'`.

    Returns:
        None where they are the same, or one of them is not known.
    """
    if own is None or other is None or list(own) == list(other):
        return None
    for number, (one, two) in enumerate(itertools.zip_longest(own, other)):
        if one != two:
            own_name, other_name = (f"{name!r:.80}" if name else "missing" for name in (one, two))
            return f"class {number} is {own_name}, there {other_name}"
    return None


def read_small(path: Path, most: int) -> bytes:
    """All of a file that is meant to be small.

    Raises:
        UserError: it is larger than `most` bytes, or no plain file (a pipe would be waited on for ever).
        FileNotFoundError: it is not there.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: not a plain file; copy the shard set again")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path}: {size} bytes, and more than {most} are never read; encode the set again")
        return file.read(size)  # not `most`: a read allocates at once what it is asked for


def write_small(path: Path, text: str, most: int, excess: str, mend: str) -> None:
    """Write a file that `read_small` takes, atomically.

    Args:
        most: bytes that are read.
        excess, mend: for the error, what there is too much of.

    Raises:
        UserError: it would be larger than any that is read, or the disk is full.
    """
    if len(text) > most:
        raise UserError(f"{path}: {excess} ({len(text)} bytes, at most {most}); {mend}")
    with atomic_write(path) as beside:
        beside.write_text(text)


def first_problem(error: pydantic.ValidationError) -> str:
    """The first of pydantic's complaints in one phrase: the key and what is wrong with it."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A key of the file itself may be part of it: of any length, and with line breaks.
    key = ".".join(str(part) for part in problem["loc"])[:80].encode("unicode_escape").decode()
    return f"{key}: {problem['msg']}" if key else str(problem["msg"])
