"""The typed papers of a shard set: `manifest.json` for the whole, one small index beside each shard.

    FOLDER/manifest.json               what every shard has in common, and one line of facts a shard
    FOLDER/shard-000000.tar            samples: KEY.json and KEY.safetensors, in any WebDataset reader's order
    FOLDER/shard-000000.index.json     where each sample lies in the tar; the manifest holds its SHA-256

The offsets stand in the indexes and not in the manifest, which would be unreadable with 100,000 shards in it.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pydantic
import torch

from far_scale.errors import UserError
from far_scale.files import atomic_write, write_json

MANIFEST_NAME = "manifest.json"
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Limits that are kept before anything is read or allocated, each far above what our own writer makes.
MAX_MANIFEST_BYTES = 1 << 27  # 300,000 shards
MAX_INDEX_BYTES = 1 << 25  # 300,000 samples in one shard
MAX_JSON_BYTES = 1 << 16  # of a sample; ours have about 100
MAX_HEADER_BYTES = 1 << 16  # of a sample's safetensors; ours have about 150
MAX_TENSORS_BYTES = 1 << 32  # of a sample

# Sums of these over any manifest stay within 64 bits, in which numpy counts.
_MOST = 1 << 40
Count = Annotated[int, pydantic.Field(ge=0, le=_MOST)]
Positive = Annotated[int, pydantic.Field(ge=1, le=_MOST)]
Digest = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
# The name is joined to the folder, so nothing but our own pattern may pass: no slashes, no "..".
ShardName = Annotated[str, pydantic.Field(pattern=r"^shard-[0-9]{6,12}\.tar$")]
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
    # At the first bad entry it stops: a list of complaints about each of millions would not fit into memory.
    shards: Annotated[tuple[ShardEntry, ...], pydantic.Field(min_length=1), pydantic.FailFast()]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if not len(self.mean) == len(self.std) == self.latent_shape[0]:
            raise ValueError(f"mean and std must have {self.latent_shape[0]} channels")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard file is named twice")
        return self

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def frames(self) -> int:
        return sum(shard.frames for shard in self.shards)

    @property
    def min_frames(self) -> int:
        return min(shard.min_frames for shard in self.shards)

    def fingerprint(self) -> str:
        """SHA-256 of all that this manifest says: the same for the same latents in the same shards."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

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
            return Manifest.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise UserError(f"{path}: not a valid manifest ({first_problem(error)}); encode the set again") from None

    def write(self, folder: str | Path) -> None:
        """Write `folder/manifest.json`, atomically."""
        write_json(Path(folder) / MANIFEST_NAME, self.model_dump(mode="json"))


class IndexRow(NamedTuple):
    """Where one sample lies in its tar; offsets and sizes in bytes, offsets from the start of the tar.

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
        return Path(folder) / (file.removesuffix(".tar") + ".index.json")

    def write(self, folder: str | Path) -> None:
        """Write the index beside its shard, atomically."""
        with atomic_write(self.path_of(folder, self.file)) as beside:
            beside.write_text(self.model_dump_json() + "\n")


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
