"""The typed papers of a shard set: `manifest.json` for the whole, one small index beside each shard.

    FOLDER/manifest.json               what every shard has in common, and one line of facts a shard
    FOLDER/shard-000000.tar            samples: KEY.json and KEY.safetensors, in any WebDataset reader's order
    FOLDER/shard-000000.index.json     where each sample lies in the tar; the manifest holds its SHA-256

or, with the same members in the columns of MDS files, for mosaicml-streaming's datasets as well,

    FOLDER/shard.00000.mds
    FOLDER/shard.00000.index.json
    FOLDER/index.json                  that library's own; we do not read it

The offsets stand in the indexes and not in the manifest, which would be unreadable with 100,000 shards in it.
"""

from __future__ import annotations

import array
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, overload

import numpy as np
import pydantic
import torch

from far_scale.errors import UserError
from far_scale.files import atomic_write

MANIFEST_NAME = "manifest.json"
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Limits that are kept before anything is read or allocated, each far above what our own writer makes.
MAX_MANIFEST_BYTES = 1 << 27  # 300,000 shards
MAX_INDEX_BYTES = 1 << 25  # 300,000 samples in one shard
MAX_JSON_BYTES = 1 << 16  # of a sample; ours have about 100
MAX_HEADER_BYTES = 1 << 16  # of a sample's safetensors; ours have about 150
MAX_TENSORS_BYTES = 1 << 32  # of a sample

# Within a JSON string a quote has a backslash before it, so this is a key.
_SHARDS = re.compile(r'(?<!\\)"shards"\s*:\s*\[(?!\s*\])')
_LIST_END, _COMMA = re.compile(r"\}\s*\]"), re.compile(r"\s*,")
_PIECE = 1 << 20  # characters

# Sums of these over any manifest stay within 64 bits, in which numpy counts.
_MOST = 1 << 40
Count = Annotated[int, pydantic.Field(ge=0, le=_MOST)]
Positive = Annotated[int, pydantic.Field(ge=1, le=_MOST)]
Digest = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
# The name is joined to the folder, so nothing but our own pattern may pass: no slashes, no "..".
ShardName = Annotated[str, pydantic.Field(pattern=r"^(shard-[0-9]{6,12}\.tar|shard\.[0-9]{5,12}\.mds)$")]
ShardFormat = Literal["tar", "mds"]
Key = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]


class Typed(pydantic.BaseModel):
    """A frozen record that refuses unknown keys, implicit conversions, infinities and NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AutoencoderInfo(Typed):
    """The autoencoder that made the latents: its name, the SHA-256 of its weights, its official scaling factor."""

    name: str
    weight_hash: str
    scaling_factor: float


class ShardEntry(Typed):
    """One shard: its file, samples, frames in all, the fewest frames of a sample, its size and checksums."""

    file: ShardName
    samples: Positive
    frames: Positive
    min_frames: Positive
    bytes: Positive
    sha256: Digest
    index_sha256: Digest


class ShardTable(Sequence[ShardEntry]):
    """The shards of a set in columns: some 110 bytes each, where as many objects have more than a thousand.

    Attributes:
        samples, frames, min_frames, bytes: int64 `[shards]`, as in ShardEntry.
    """

    def __init__(self, entries: Iterable[ShardEntry]) -> None:
        names, digests, numbers = [], bytearray(), array.array("q")
        for entry in entries:  # one at a time: all at once is what must not lie in memory
            names.append(entry.file.encode())
            digests += bytes.fromhex(entry.sha256) + bytes.fromhex(entry.index_sha256)
            numbers.extend((entry.samples, entry.frames, entry.min_frames, entry.bytes))
        self._names = np.array(names, dtype=np.bytes_)
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


_ENTRIES = pydantic.TypeAdapter(Annotated[list[ShardEntry], pydantic.FailFast()])


def _table(shards: Any, info: pydantic.ValidationInfo) -> ShardTable:
    """The shards of a manifest that is made; of one that is read `Manifest.parse` has checked them, one by one."""
    read: ShardTable | None = (info.context or {}).get("shards")
    table = read if read is not None else shards
    if not isinstance(table, ShardTable) or not len(table):
        raise ValueError("there must be a list of one shard at least")
    return table


def _read_shards(text: str, begin: int) -> tuple[ShardTable, int]:
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
                piece = _ENTRIES.validate_json(f"[{text[at:cut]}]")
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


def _dump_table(shards: Sequence[ShardEntry]) -> list[dict[str, Any]]:
    return [shard.model_dump() for shard in shards]


class Manifest(Typed):
    """What a shard set is.

    Attributes:
        latent_shape: (C, H, W) of a frame latent.
        latent_dtype: "bfloat16" or "float16", as stored.
        mean, std: per channel, over all stored latents (population deviation).
        actions: number of action classes, 0 where frames have no action.
        labels: number of label classes, 0 where clips have no label.
        fps: frames a second, or None where the videos differ.
    """

    format: Literal["far_scale.shards/1"] = "far_scale.shards/1"
    latent_shape: tuple[Positive, Positive, Positive]
    latent_dtype: Literal["bfloat16", "float16"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder: AutoencoderInfo
    actions: Count
    labels: Count
    fps: float | None
    shards: Annotated[ShardTable, pydantic.PlainValidator(_table), pydantic.PlainSerializer(_dump_table)]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if not len(self.mean) == len(self.std) == self.latent_shape[0]:
            raise ValueError(f"mean and std must have {self.latent_shape[0]} channels")
        if self.shards.has_twins:
            raise ValueError("a shard file is named twice")
        if self.shards.has_both_formats:
            raise ValueError("some shards are tars and some are MDS files")
        return self

    @property
    def shard_format(self) -> ShardFormat:
        """What its shards are; the manifest tells it by their names."""
        return "mds" if self.shards[0].file.endswith(".mds") else "tar"

    @property
    def samples(self) -> int:
        return int(self.shards.samples.sum())

    @property
    def frames(self) -> int:
        return int(self.shards.frames.sum())

    @property
    def min_frames(self) -> int:
        return int(self.shards.min_frames.min())

    def fingerprint(self) -> str:
        """SHA-256 of all that this manifest says: the same for the same latents in the same shards."""
        # The text of `model_dump_json`, shard by shard: as a whole it is as large as the file.
        digest = hashlib.sha256(self.model_dump_json(exclude={"shards"}).encode()[:-1] + b',"shards":[')
        for number in range(0, len(self.shards), 1000):
            piece = _ENTRIES.dump_json(self.shards[number : number + 1000])
            digest.update(b"," * (number > 0) + piece[1:-1])
        digest.update(b"]}")
        return digest.hexdigest()

    @staticmethod
    def read(folder: str | Path) -> Manifest:
        """Read and check `folder/manifest.json`.

        Raises:
            UserError: it is not there, or is not a manifest of this format.
        """
        return Manifest.parse(Manifest.text(folder), Path(folder) / MANIFEST_NAME)

    @staticmethod
    def text(folder: str | Path) -> bytes:
        """What stands in `folder/manifest.json`.

        Raises:
            UserError: it is not there, or too large.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"{path}: there is no shard set's manifest here; make the set with tools/encode_latents.py, "
                "or run the same encoding again where it was cut off"
            )
        return read_small(path, MAX_MANIFEST_BYTES)

    @staticmethod
    def parse(text: bytes, path: str | Path) -> Manifest:
        """The manifest in `text`, which was read from `path`.

        Raises:
            UserError: it is not a manifest of this format.
        """
        try:
            words = text.decode()
            found = _SHARDS.search(words)
            if found is None:
                return Manifest.model_validate_json(words)
            shards, end = _read_shards(words, found.end())
            return Manifest.model_validate_json(words[: found.end()] + words[end:], context={"shards": shards})
        except pydantic.ValidationError as error:
            problem = first_problem(error)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        raise UserError(f"{path}: not a valid manifest ({problem}); encode the set again")

    def write(self, folder: str | Path) -> None:
        """Write `folder/manifest.json`, atomically.

        Raises:
            UserError: it would be larger than any that is read.
        """
        path = Path(folder) / MANIFEST_NAME
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        if len(text) > MAX_MANIFEST_BYTES:
            raise UserError(
                f"{path}: {len(self.shards)} shards are more than a manifest may name ({len(text)} bytes, at most "
                f"{MAX_MANIFEST_BYTES}); make fewer and larger ones: raise --samples-per-shard"
            )
        with atomic_write(path) as beside:
            beside.write_text(text)


class IndexRow(NamedTuple):
    """Where one sample lies in its shard; offsets and sizes in bytes, offsets from the start of the file.

    `header_bytes` is the safetensors header with its 8 bytes of length: the tensors' data begins after it.
    """

    key: Key
    frames: Positive
    json_offset: Count
    json_bytes: Annotated[int, pydantic.Field(ge=1, le=MAX_JSON_BYTES)]
    tensors_offset: Count
    header_bytes: Annotated[int, pydantic.Field(ge=9, le=MAX_HEADER_BYTES)]
    tensors_bytes: Annotated[int, pydantic.Field(ge=9, le=MAX_TENSORS_BYTES)]


class ChannelSums(Typed):
    """Float64 sums per channel over `values` stored latent values a channel; they add up over shards."""

    values: Positive
    total: tuple[float, ...]
    squares: tuple[float, ...]


def statistics(sums: Sequence[ChannelSums]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population deviation per channel of the latents that all these sums are of; their order is no matter."""
    values = sum(each.values for each in sums)
    mean = [math.fsum(channel) / values for channel in zip(*(each.total for each in sums), strict=True)]
    square = [math.fsum(channel) / values for channel in zip(*(each.squares for each in sums), strict=True)]
    return tuple(mean), tuple(math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True))


class ShardIndex(Typed):
    """What stands in a shard's `.index.json`: the samples' places, and the facts the manifest is made from."""

    format: Literal["far_scale.index/1"] = "far_scale.index/1"
    file: ShardName
    bytes: Positive
    sha256: Digest
    fps: float | None
    sums: ChannelSums
    samples: Annotated[list[IndexRow], pydantic.Field(min_length=1), pydantic.FailFast()]

    @staticmethod
    def path_of(folder: str | Path, file: str) -> Path:
        """The index that belongs to the shard `file`."""
        return Path(folder) / (file.rpartition(".")[0] + ".index.json")

    def write(self, folder: str | Path) -> None:
        """Write the index beside its shard, atomically.

        Raises:
            UserError: it would be larger than any that is read.
        """
        path, text = self.path_of(folder, self.file), self.model_dump_json() + "\n"
        if len(text) > MAX_INDEX_BYTES:
            raise UserError(
                f"{path}: {len(self.samples)} samples are more than a shard may hold (an index of {len(text)} bytes, "
                f"at most {MAX_INDEX_BYTES}); lower --samples-per-shard"
            )
        with atomic_write(path) as beside:
            beside.write_text(text)


def parse_index(text: bytes, path: str | Path) -> ShardIndex:
    """The index in `text`, which was read from `path`.

    Raises:
        UserError: it is not an index of this format.
    """
    try:
        return ShardIndex.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: not a valid shard index ({first_problem(error)}); encode the set again") from None


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


def first_problem(error: pydantic.ValidationError) -> str:
    """The first of pydantic's complaints in one phrase: the key and what is wrong with it."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A key of the file itself may be part of it: of any length, and with line breaks.
    key = ".".join(str(part) for part in problem["loc"])[:80].encode("unicode_escape").decode()
    return f"{key}: {problem['msg']}" if key else str(problem["msg"])
