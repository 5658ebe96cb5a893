"""A shard's index: where its samples lie, and the facts that the manifest is made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pydantic

from far_scale.data.shards.typed import (
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    MAX_JSON_BYTES,
    MAX_TENSORS_BYTES,
    Count,
    Digest,
    Key,
    Positive,
    ShardName,
    Typed,
    first_problem,
    write_small,
)
from far_scale.errors import UserError


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
        excess = f"{len(self.samples)} samples are more than the index of a shard may name"
        write_small(path, text, MAX_INDEX_BYTES, excess, "lower --samples-per-shard")


def parse_index(text: bytes, path: str | Path) -> ShardIndex:
    """The index in `text`, which was read from `path`.

    Raises:
        UserError: it is not an index of this format.
    """
    try:
        return ShardIndex.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: not a valid shard index ({first_problem(error)}); encode the set again") from None
