"""The typed papers of a shard set: `manifest.json` for the whole, one small index beside each shard.

    FOLDER/manifest.json               what every shard has in common, and one line of facts a shard
    FOLDER/shard-000000.tar            samples: KEY.json and KEY.safetensors, in any WebDataset reader's order
    FOLDER/shard-000000.index.json     where each sample lies in the tar; the manifest holds its SHA-256

or, with the same members in the columns of MDS files, for mosaicml-streaming's datasets as well,

    FOLDER/shard.00000.mds
    FOLDER/shard.00000.index.json
    FOLDER/index.json                  that library's own; we do not read it

or, with shards of others, which lie elsewhere and stay as they are (see adopted.py),

    FOLDER/shard-000000.index.json     the manifest says where the shard itself lies

The offsets stand in the indexes and not in the manifest, which would be unreadable with 100,000 shards in it.
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
from far_scale.data.shards.table import ENTRIES, ShardEntry, ShardTable, read_shards
from far_scale.data.shards.typed import (
    MAX_MANIFEST_BYTES,
    Count,
    ModelWithClasses,
    Positive,
    ShardFormat,
    StrictModel,
    first_problem,
    read_small,
    write_small,
)
from far_scale.utils.errors import UserError

MANIFEST_NAME = "manifest.json"
LatentDtype = Literal["bfloat16", "float16", "float32"]  # float32 of adopted sets alone: encoding rounds
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Within a JSON string a quote has a backslash before it, so this is a key.
_SHARDS = re.compile(r'(?<!\\)"shards"\s*:\s*\[(?!\s*\])')


def _table(shards: Any, info: pydantic.ValidationInfo) -> ShardTable:
    """The shards of a manifest that is made; of one that is read `Manifest.parse` has checked them, one by one."""
    read: ShardTable | None = (info.context or {}).get("shards")
    table = read if read is not None else shards
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
    """What a shard set is.

    Attributes:
        latent_shape: (C, H, W) of a frame latent.
        latent_dtype: "bfloat16", "float16" or "float32", as read.
        mean, std: per channel, over all stored latents (population deviation).
        actions: number of action classes, 0 where frames have no action.
        labels: number of label classes, 0 where clips have no label.
        classes: the names of the first of them or of all, or None where they are not known.
        fps: frames a second, or None where the videos differ.
        adopted: how the samples of shards that others wrote are read, which lie elsewhere; None in a set of our own.
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
    shards: Annotated[ShardTable, pydantic.PlainValidator(_table), pydantic.PlainSerializer(_dump_table)]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if not len(self.mean) == len(self.std) == self.latent_shape[0]:
            raise ValueError(f"mean and std must have {self.latent_shape[0]} channels")
        if self.shards.has_twins:
            raise ValueError("a shard file is named twice")
        if self.shards.has_both_formats:
            raise ValueError("some shards are tars and some are MDS files")
        if self.shards.adopted is not (self.adopted is not None) or self.shards.cached is None:
            raise ValueError("all shards must lie here, or with `adopted` all at paths, all at URLs or all compressed")
        if self.classes is not None and not len(set(self.classes)) == len(self.classes) <= self.labels:
            raise ValueError(f"classes must be different names, {self.labels} at most")
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
        """SHA-256 of all that this manifest says, but for where shards lie: the same for the same latents in them."""
        # The text of `model_dump_json`, shard by shard: as a whole it is as large as the file.
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
            words = text.decode("utf-8-sig")
            found = _SHARDS.search(words)
            if found is None:
                return Manifest.model_validate_json(words)
            shards, end = read_shards(words, found.end())
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
        excess = f"{len(self.shards)} shards are more than a manifest may name"
        write_small(path, text, MAX_MANIFEST_BYTES, excess, "make fewer and larger ones: raise --samples-per-shard")
