"""The manifest of a shard set, `manifest.json`.

    FOLDER/manifest.json               what all shards share, and counts, size and checksums of each
    FOLDER/shard-000000.tar            samples: KEY.json and KEY.safetensors, readable by WebDataset
    FOLDER/shard-000000.index.json     offsets of the samples in the tar; the manifest holds its SHA-256

The same members may be in the columns of MDS files, which mosaicml-streaming's datasets read:

    FOLDER/shard.00000.mds
    FOLDER/shard.00000.index.json
    FOLDER/index.json                  of that library; we do not read it

An adopted set (adopted.py) uses shards of other programs in place:

    FOLDER/shard-000000.index.json     the manifest holds the shard's path or URL

The offsets are in the indexes because a manifest of 100,000 shards with all offsets would be too large.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch

from far_scale.data.shards.adopted import Adoption
from far_scale.data.shards.records import (
    MAX_MANIFEST_BYTES,
    Count,
    ModelWithClasses,
    Positive,
    ShardFormat,
    read_small,
    write_small,
)
from far_scale.data.shards.table import ENTRIES, ShardEntry, ShardTable, read_shards
from far_scale.utils.errors import UserError
from far_scale.utils.strict_model import StrictModel, first_problem

MANIFEST_NAME = "manifest.json"
LatentDtype = Literal["bfloat16", "float16", "float32"]  # float32 in adopted sets only: encoding rounds
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# In a JSON string a quote follows a backslash, so this matches a key only.
_SHARDS_KEY = re.compile(r'(?<!\\)"shards"\s*:\s*\[(?!\s*\])')


def _validate_table(shards: Any, info: pydantic.ValidationInfo) -> ShardTable:
    """The shards of a new manifest; for one that is read, `Manifest.parse` passes the checked table as context."""
    parsed: ShardTable | None = (info.context or {}).get("shards")
    table = parsed if parsed is not None else shards
    if not isinstance(table, ShardTable) or not len(table):
        raise ValueError("there must be a list of one shard at least")
    return table


def _dump_table(shards: Sequence[ShardEntry]) -> list[dict[str, Any]]:
    return [shard.model_dump(exclude_none=True) for shard in shards]


class AutoencoderInfo(StrictModel):
    """The autoencoder that made the latents: its name, the SHA-256 of its weights, its official scaling factor."""

    name: str
    weight_hash: str
    scaling_factor: float


class Manifest(ModelWithClasses):
    """Description of a shard set.

    Attributes:
        latent_shape: (C, H, W) of a frame latent.
        latent_dtype: type in which latents are read.
        mean, std: per channel, over all stored latents (std of the population).
        autoencoder: that made the latents.
        actions: number of action classes; 0 if frames have no actions.
        labels: number of label classes; 0 if clips have no labels.
        classes: names of the label classes, or of the first ones; None if unknown.
        fps: frames per second; None if the videos differ.
        adopted: how the samples are read in an adopted set; None in a set of our own.
        shards: one entry each.
    """

    OMITTED = ("classes", "adopted")
    format: Literal["far_scale.shards/1"] = "far_scale.shards/1"
    latent_shape: tuple[Positive, Positive, Positive]
    latent_dtype: LatentDtype
    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder: AutoencoderInfo
    actions: Count
    labels: Count
    fps: float | None
    adopted: Adoption | None = None
    shards: Annotated[ShardTable, pydantic.PlainValidator(_validate_table), pydantic.PlainSerializer(_dump_table)]

    @pydantic.model_validator(mode="after")
    def _check_consistency(self) -> Manifest:
        if not len(self.mean) == len(self.std) == self.latent_shape[0]:
            raise ValueError(f"mean and std must have {self.latent_shape[0]} channels")
        if self.shards.has_duplicates:
            raise ValueError("a shard file is named twice")
        if self.shards.has_mixed_formats:
            raise ValueError("some shards are tars and some are MDS files")
        if self.shards.is_adopted is not (self.adopted is not None) or self.shards.needs_cache is None:
            raise ValueError("all shards must lie here, or with `adopted` all at paths, all at URLs or all compressed")
        if self.classes is not None and not len(set(self.classes)) == len(self.classes) <= self.labels:
            raise ValueError(f"classes must be different names, {self.labels} at most")
        return self

    @property
    def shard_format(self) -> ShardFormat:
        """Format of the shards, from their names."""
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
        """SHA-256 of the manifest without the shards' locations: independent of where the shards are."""
        # The text of `model_dump_json` in pieces: as a whole it is as large as the file.
        digest = hashlib.sha256(self.model_dump_json(exclude={"shards"}).encode()[:-1] + b',"shards":[')
        for number in range(0, len(self.shards), 1000):
            piece = ENTRIES.dump_json(self.shards[number : number + 1000], exclude={"__all__": {"source"}})
            digest.update(b"," * (number > 0) + piece[1:-1])
        digest.update(b"]}")
        return digest.hexdigest()

    @staticmethod
    def read(folder: str | Path) -> Manifest:
        """Read and check `folder/manifest.json`.

        Raises:
            UserError: it does not exist, or is not a manifest of this format.
        """
        return Manifest.parse(Manifest.text(folder), Path(folder) / MANIFEST_NAME)

    @staticmethod
    def text(folder: str | Path) -> bytes:
        """The content of `folder/manifest.json`.

        Raises:
            UserError: it does not exist, or is too large.
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
        """Parse a manifest.

        Args:
            text: content of the file.
            path: of the file, for errors.

        Raises:
            UserError: it is not a manifest of this format.
        """
        try:
            document = text.decode("utf-8-sig")
            key = _SHARDS_KEY.search(document)
            if key is None:
                return Manifest.model_validate_json(document)
            shards, end = read_shards(document, key.end())
            return Manifest.model_validate_json(document[: key.end()] + document[end:], context={"shards": shards})
        except pydantic.ValidationError as error:
            problem = first_problem(error)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        raise UserError(f"{path}: not a valid manifest ({problem}); encode the set again")

    def write(self, folder: str | Path) -> None:
        """Write `folder/manifest.json`, atomically.

        Raises:
            UserError: it is larger than the reader's limit.
        """
        path = Path(folder) / MANIFEST_NAME
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        excess = f"{len(self.shards)} shards are more than a manifest may name"
        write_small(path, text, MAX_MANIFEST_BYTES, excess, "make fewer and larger ones: raise --samples-per-shard")
