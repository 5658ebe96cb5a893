"""The shards of a manifest: one entry each, stored in columns and parsed in pieces."""

from __future__ import annotations

import array
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, overload

import numpy as np
import pydantic
from numpy.typing import NDArray

from far_scale.data.remote.compression import compression_of
from far_scale.data.shards.records import Location, Positive, ShardName
from far_scale.utils.strict_model import Digest, StrictModel, first_problem

_LIST_END, _COMMA = re.compile(r"\}\s*\]"), re.compile(r"\s*,")
_PIECE_CHARACTERS = 1 << 20


class ShardEntry(StrictModel):
    """One shard.

    Attributes:
        file: name of the shard; in an adopted set it only gives the name of the index.
        samples, frames: counts.
        min_frames: of the shortest sample.
        bytes, sha256: of the shard (of a compressed one, after decompression).
        index_sha256: of the index.
        source: path or URL of the shard in an adopted set.
    """

    file: ShardName
    samples: Positive
    frames: Positive
    min_frames: Positive
    bytes: Positive
    sha256: Digest
    index_sha256: Digest
    source: Location | None = None

    @property
    def location(self) -> str:
        """For the set's store: the file name, or the source of an adopted shard."""
        return self.file if self.source is None else self.source


class ShardTable(Sequence[ShardEntry]):
    """The shards of a set in columns: about 110 bytes each, where an object would have more than a thousand.

    Attributes:
        samples, frames, min_frames, bytes: int64 `[shards]`, as in ShardEntry.
    """

    def __init__(self, entries: Iterable[ShardEntry]) -> None:
        names, sources, digests, numbers = [], [], bytearray(), array.array("q")
        for entry in entries:  # never all in memory at once
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
            return [self[index] for index in range(*number.indices(len(self)))]
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
    def has_duplicates(self) -> bool:
        """Whether two shards have the same file name."""
        return len(np.unique(self._names)) != len(self)

    @property
    def has_mixed_formats(self) -> bool:
        """Whether there are both tars and MDS files."""
        return len(np.unique(np.char.endswith(self._names, b".mds"))) > 1

    @property
    def is_adopted(self) -> bool | None:
        """Whether the shards have sources; None if only some have."""
        return _all_or_none(self._sources != b"")

    @property
    def needs_cache(self) -> bool | None:
        """Whether the sources are URLs or compressed, and so are read through a cache; None if only some are."""
        flags = [bool(s) and (not s.startswith(b"/") or compression_of(s.decode()) is not None) for s in self._sources]
        return _all_or_none(np.array(flags))


def _all_or_none(flags: NDArray[np.bool_]) -> bool | None:
    return bool(flags.all()) if flags.all() or not flags.any() else None


ENTRIES = pydantic.TypeAdapter(Annotated[list[ShardEntry], pydantic.FailFast()])


def read_shards(text: str, begin: int) -> tuple[ShardTable, int]:
    """The shards in a JSON list with its bracket just before `begin`, and the offset of its closing bracket.

    The text is parsed in pieces, because all entries as objects need many times its size. Pieces end at a brace, since
    entries have none inside.

    Raises:
        ValueError: an entry is not a shard, or the text is not JSON.
    """
    end = _LIST_END.search(text, begin)
    if end is None:
        raise ValueError("shards: this list does not end")
    stop = end.start() + 1

    def entries() -> Iterator[ShardEntry]:
        offset, number = begin, 0
        while offset < stop:
            is_last = stop - offset <= _PIECE_CHARACTERS
            cut = stop if is_last else text.rfind("}", offset, offset + _PIECE_CHARACTERS) + 1
            if cut <= offset:
                raise ValueError(f"shards.{number}: it is longer than any of ours")
            try:
                piece = ENTRIES.validate_json(f"[{text[offset:cut]}]")
            except pydantic.ValidationError as error:
                index, _, problem = first_problem(error).partition(".")  # the index in this piece comes first
                key = f"{number + int(index)}.{problem}" if index.isdigit() else f"{number}: {index}.{problem}"
                raise ValueError(f"shards.{key}") from None
            yield from piece
            comma = _COMMA.match(text, cut)
            if comma is None and cut < stop:
                raise ValueError(f"shards.{number + len(piece)}: there is no comma before it")
            offset, number = stop if comma is None else comma.end(), number + len(piece)

    return ShardTable(entries()), end.end() - 1
