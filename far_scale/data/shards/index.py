"""A shard's index: offsets of its samples, and the sums from which the manifest's statistics are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import pydantic
import torch

from far_scale.data.shards.adopted import AdoptedRow
from far_scale.data.shards.records import (
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    MAX_JSON_BYTES,
    MAX_TENSORS_BYTES,
    Count,
    Key,
    Positive,
    ShardName,
    write_small,
)
from far_scale.utils.errors import UserError
from far_scale.utils.strict_model import Digest, StrictModel, first_problem


class IndexRow(NamedTuple):
    """Location of one sample in its shard; offsets (from the start of the file) and sizes in bytes.

    `header_bytes` is the size of the safetensors header with its 8 bytes of length; the tensors' data follows it.
    """

    key: Key
    frames: Positive
    json_offset: Count
    json_bytes: Annotated[int, pydantic.Field(ge=1, le=MAX_JSON_BYTES)]
    tensors_offset: Count
    header_bytes: Annotated[int, pydantic.Field(ge=9, le=MAX_HEADER_BYTES)]
    tensors_bytes: Annotated[int, pydantic.Field(ge=9, le=MAX_TENSORS_BYTES)]


class ChannelSums(StrictModel):
    """Float64 sums per channel over the stored latents, `values` of them in each channel; they add up over shards."""

    values: Positive
    total: tuple[float, ...]
    squares: tuple[float, ...]


class LatentSums:
    """Accumulates ChannelSums."""

    def __init__(self, channels: int) -> None:
        self._total, self._squares, self._values = np.zeros(channels), np.zeros(channels), 0

    def add(self, latents: torch.Tensor) -> None:
        """Add latents `[F, C, H, W]`."""
        stored = latents.double().contiguous()  # the order of the sum must not depend on the memory layout
        self._total += stored.sum(dim=(0, 2, 3)).numpy()
        self._squares += stored.square().sum(dim=(0, 2, 3)).numpy()
        self._values += stored[:, 0].numel()

    def result(self) -> ChannelSums:
        """The sums so far."""
        total, squares = tuple(self._total.tolist()), tuple(self._squares.tolist())
        return ChannelSums(values=self._values, total=total, squares=squares)


def statistics(sums: Sequence[ChannelSums]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel; independent of the order of `sums`."""
    values = sum(shard.values for shard in sums)
    mean = [math.fsum(channel) / values for channel in zip(*(shard.total for shard in sums), strict=True)]
    square = [math.fsum(channel) / values for channel in zip(*(shard.squares for shard in sums), strict=True)]
    return tuple(mean), tuple(math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True))


class BaseIndex(StrictModel):
    """A shard's `.index.json`.

    Attributes:
        file: name of the shard.
        bytes, sha256: of the shard.
        fps: of all samples; None if they differ.
        sums: of the shard's latents.
        samples: one row each, in the shard's order.
    """

    format: str
    file: ShardName
    bytes: Positive
    sha256: Digest
    fps: float | None
    sums: ChannelSums
    samples: list[Any]

    @staticmethod
    def path_of(folder: str | Path, file: str) -> Path:
        """Path of the index of shard `file`."""
        return Path(folder) / (file.rpartition(".")[0] + ".index.json")

    def write(self, folder: str | Path) -> None:
        """Write the index beside its shard, atomically.

        Raises:
            UserError: it is larger than the reader's limit.
        """
        path, text = self.path_of(folder, self.file), self.model_dump_json() + "\n"
        excess = f"{len(self.samples)} samples are more than the index of a shard may name"
        write_small(path, text, MAX_INDEX_BYTES, excess, "lower --samples-per-shard, or write smaller shards")


class ShardIndex(BaseIndex):
    """The index of a shard of our own."""

    format: Literal["far_scale.index/1"] = "far_scale.index/1"
    samples: Annotated[list[IndexRow], pydantic.Field(min_length=1), pydantic.FailFast()]


class AdoptedIndex(BaseIndex):
    """The index of an adopted shard."""

    format: Literal["far_scale.adopted-index/1"] = "far_scale.adopted-index/1"
    samples: Annotated[list[AdoptedRow], pydantic.Field(min_length=1), pydantic.FailFast()]


AnyIndex = TypeVar("AnyIndex", ShardIndex, AdoptedIndex)


def parse_index(text: bytes, path: str | Path, kind: type[AnyIndex]) -> AnyIndex:
    """Parse an index.

    Args:
        text: content of the file.
        path: of the file, for errors.
        kind: class of the index.

    Raises:
        UserError: it is not an index of this kind.
    """
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as error:
        fix = "encode the set again" if kind is ShardIndex else "adopt the shards again"
        raise UserError(f"{path}: not a valid shard index ({first_problem(error)}); {fix}") from None
