"""The shards of a manifest: one line of facts each, held in columns, and read piece by piece."""

from __future__ import annotations

import array
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, overload

import numpy as np
import pydantic
from numpy.typing import NDArray

from far_scale.data.remote.unpack import compression_of
from far_scale.data.shards.typed import Digest, Place, Positive, ShardName, StrictModel, first_problem

_LIST_END, _COMMA = re.compile(r"\}\s*\]"), re.compile(r"\s*,")
_PIECE = 1 << 20  # characters


class ShardEntry(StrictModel):
    """One shard: its file, samples, frames in all, the fewest frames of a sample, its size and checksums.

    Attributes:
        source: of an adopted set, where the shard lies; its `file` is then no file but the name of its index.
    """

    file: ShardName
    samples: Positive
    frames: Positive
    min_frames: Positive
    bytes: Positive
    sha256: Digest
    index_sha256: Digest
    source: Place | None = None

    @property
    def place(self) -> str:
        """Where the shard lies, for the set's store: its file's name, or the source of an adopted one."""
        return self.file if self.source is None else self.source


class ShardTable(Sequence[ShardEntry]):
    """The shards of a set in columns: some 110 bytes each, where as many objects have more than a thousand.

    Attributes:
        samples, frames, min_frames, bytes: int64 `[shards]`, as in ShardEntry.
    """

    def __init__(self, entries: Iterable[ShardEntry]) -> None:
        names, sources, digests, numbers = [], [], bytearray(), array.array("q")
        for entry in entries:  # one at a time: all at once is what must not lie in memory
            names.append(entry.file.encode())
            sources.append((entry.source or "").encode())
            digests += bytes.fromhex(entry.sha256) + bytes.fromhex(entry.index_sha256)
            numbers.extend((entry.samples, entry.frames, entry.min_frames, entry.bytes))
        self._names = np.array(names, dtype=np.bytes_)
        self._sources = np.array(sources, dtype=np.bytes_)
        self._digests = bytes(digests)
        self.samples, self.frames, self.min_frames, self.bytes = np.array(numbers, np.int64).reshape(-1, 4).T.copy()

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, number: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardEntry]: ...
    def __getitem__(self, number: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        digests = self._digests[64 * number : 64 * (number + 1)]
        return ShardEntry.model_construct(
            file=self._names[number].decode(),
            samples=int(self.samples[number]),
            frames=int(self.frames[number]),
            min_frames=int(self.min_frames[number]),
            bytes=int(self.bytes[number]),
            sha256=digests[:32].hex(),
            index_sha256=digests[32:].hex(),
            source=self._sources[number].decode() or None,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def has_twins(self) -> bool:
        """Whether two shards have the same file."""
        return len(np.unique(self._names)) != len(self)

    @property
    def has_both_formats(self) -> bool:
        """Whether there are tars as well as MDS files."""
        return len(np.unique(np.char.endswith(self._names, b".mds"))) > 1

    @property
    def adopted(self) -> bool | None:
        """Whether the shards lie elsewhere; None where some do and some do not."""
        return _all_or_none(self._sources != b"")

    @property
    def cached(self) -> bool | None:
        """Whether the shards lie at URLs, or are compressed, so that they are read in a cache; None where some do."""
        each = [bool(s) and (not s.startswith(b"/") or compression_of(s.decode()) is not None) for s in self._sources]
        return _all_or_none(np.array(each))


def _all_or_none(each: NDArray[np.bool_]) -> bool | None:
    return bool(each.all()) if each.all() or not each.any() else None


ENTRIES = pydantic.TypeAdapter(Annotated[list[ShardEntry], pydantic.FailFast()])


def read_shards(text: str, begin: int) -> tuple[ShardTable, int]:
    """The shards in a JSON list that begins before `begin`, and where it ends.

    They are checked piece by piece, since all together they are objects of many times the size of the text. A shard has
    no braces within its own, so pieces end with one; text in which that is not so is no manifest of ours.

    Raises:
        ValueError: an entry is no shard, or the text no JSON.
    """
    end = _LIST_END.search(text, begin)
    if end is None:
        raise ValueError("shards: this list does not end")
    stop = end.start() + 1

    def entries() -> Iterator[ShardEntry]:
        at, number = begin, 0
        while at < stop:
            cut = stop if stop - at <= _PIECE else text.rfind("}", at, at + _PIECE) + 1
            if cut <= at:
                raise ValueError(f"shards.{number}: it is longer than any of ours")
            try:
                piece = ENTRIES.validate_json(f"[{text[at:cut]}]")
            except pydantic.ValidationError as error:
                within, _, problem = first_problem(error).partition(".")  # the place in this piece comes first
                where = f"{number + int(within)}.{problem}" if within.isdigit() else f"{number}: {within}.{problem}"
                raise ValueError(f"shards.{where}") from None
            yield from piece
            comma = _COMMA.match(text, cut)
            if comma is None and cut < stop:
                raise ValueError(f"shards.{number + len(piece)}: there is no comma before it")
            at, number = stop if comma is None else comma.end(), number + len(piece)

    return ShardTable(entries()), end.end() - 1
