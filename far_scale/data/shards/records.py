"""Typed records of shard sets (manifest, indexes): field types, size limits, reading and writing of small files."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from far_scale.data.remote.cache import MAX_UNSIZED_BYTES
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write
from far_scale.utils.strict_model import StrictModel

# Checked before anything is read or allocated; each is far above what our own writer makes.
MAX_MANIFEST_BYTES = 1 << 27  # 300,000 shards
MAX_INDEX_BYTES = MAX_UNSIZED_BYTES  # 300,000 samples in one shard
MAX_JSON_BYTES = 1 << 16  # of a sample; ours have about 100
MAX_HEADER_BYTES = 1 << 16  # of a sample's safetensors; ours have about 150
MAX_TENSORS_BYTES = 1 << 32  # of a sample

_MAX_COUNT = 1 << 40  # sums over any manifest fit into numpy's int64
Count = Annotated[int, pydantic.Field(ge=0, le=_MAX_COUNT)]
Positive = Annotated[int, pydantic.Field(ge=1, le=_MAX_COUNT)]
# The name is joined to the folder, so only our own pattern may pass: no slashes, no "..".
ShardName = Annotated[str, pydantic.Field(pattern=r"^(shard-[0-9]{6,12}\.tar|shard\.[0-9]{5,12}\.mds)$")]
ShardFormat = Literal["tar", "mds"]
# Path or URL of a shard of an adopted set. No braces: the manifest is cut into pieces at them.
Location = Annotated[
    str, pydantic.Field(pattern=r"^(/|s3://|gs://|https?://|pipe:)[^{}\x00-\x1f\x7f]+$", max_length=4000)
]
# WebDataset splits a member's name at its first dot, and a USTAR name holds 100 characters.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
Key = Annotated[str, pydantic.Field(pattern=f"^{KEY_PATTERN.pattern}$")]


class ModelWithClasses(StrictModel):
    """A record that may name the classes of its labels; a file without names is written without the key.

    Attributes:
        classes: names of the classes 0, 1, ..., or None if unknown.
    """

    OMITTED: ClassVar[tuple[str, ...]] = ("classes",)
    """Fields that are left out of the file if they are None."""
    classes: tuple[Annotated[str, pydantic.Field(min_length=1)], ...] | None = None

    @pydantic.model_serializer(mode="wrap")
    def _omit_unknown(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        for name in self.OMITTED:
            if getattr(self, name) is None:
                values.pop(name, None)
        return values


def classes_differ(first: Sequence[str] | None, second: Sequence[str] | None) -> str | None:
    """The first difference between the class names of two sets, for an error: `class 1 is 'c', there 'b'`.

    Returns:
        None if they are the same, or those of one set are unknown.
    """
    if first is None or second is None or list(first) == list(second):
        return None
    for number, names in enumerate(itertools.zip_longest(first, second)):
        if names[0] != names[1]:
            first_name, second_name = (f"{name!r:.80}" if name else "missing" for name in names)
            return f"class {number} is {first_name}, there {second_name}"
    return None


def read_small(path: Path, max_bytes: int) -> bytes:
    """The content of a file that should be small.

    Raises:
        UserError: it is larger than `max_bytes`, or not a plain file (reading a pipe would block).
        FileNotFoundError: it does not exist.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: not a plain file; copy the shard set again")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size} bytes, and more than {max_bytes} are never read; encode the set again")
        return file.read(size)  # not `max_bytes`: a read allocates its argument at once


def write_small(path: Path, text: str, max_bytes: int, excess: str, fix: str) -> None:
    """Write a file that `read_small` accepts, atomically.

    Args:
        path: of the file.
        text: its content.
        max_bytes: the reader's limit.
        excess: for the error: what there is too much of.
        fix: for the error: what to do about it.

    Raises:
        UserError: the text is longer than the limit, or the disk is full.
    """
    if len(text) > max_bytes:
        raise UserError(f"{path}: {excess} ({len(text)} bytes, at most {max_bytes}); {fix}")
    with atomic_write(path) as temporary:
        temporary.write_text(text)
