"""Adopted sets: shards written by other programs, read in place by means of our manifest and indexes.

    FOLDER/manifest.json               as of any set, with `adopted` (how samples are read) and each shard's `source`
    FOLDER/shard-000000.index.json     offsets of the samples' parts in the shard, their labels and frame rates

As in our own shards nothing is trusted: sizes are checked before anything is allocated, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal, NamedTuple

import pydantic

from far_scale.data.shards.records import KEY_PATTERN, MAX_TENSORS_BYTES, Count, Key, Positive
from far_scale.utils.strict_model import StrictModel

MAX_NAME = 400  # characters of a sample's name in its shard

Layout = Literal["FCHW", "CFHW", "FHWC"]
# Frame, channel, height and width among the axes of a stored tensor.
AXES: dict[Layout, tuple[int, int, int, int]] = {"FCHW": (0, 1, 2, 3), "CFHW": (1, 0, 2, 3), "FHWC": (0, 3, 1, 2)}

PartKind = Annotated[
    str,
    pydantic.Field(
        pattern=r"^(npy|torch|safetensors|json|text|number:[a-z0-9]{3,7}|ndarray(:[a-z0-9]{4,7}(:\d{1,9}(,\d{1,9}){0,7})?)?)$"
    ),
]
"""How a part is stored: a file format, a text, or mosaicml-streaming's encoding of a number or an array."""
Name = Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
PartBytes = Annotated[int, pydantic.Field(ge=0, le=MAX_TENSORS_BYTES)]


class Part(StrictModel):
    """Where one part of each sample is stored.

    Attributes:
        member: of a tar, the extension: all after the first dot of the file's name, in lower case; of an MDS file, the
            column.
        kind: format of the member.
        key: name of the part in the member; None if the part is the whole member.
    """

    member: Name
    kind: PartKind
    key: Name | None = None

    def __str__(self) -> str:
        return self.member if self.key is None else f"{self.member}:{self.key}"


class Adoption(StrictModel):
    """How the samples of adopted shards are read.

    Attributes:
        layout: order of the axes of the stored latents.
        scale_factor: factor in the stored latents; reading divides by it.
        latents: an array or tensor of four axes.
        actions: F integers; None if the set has none.
        label: an integer; None if the set has none.
        fps: a part of each sample, or one number for all.
        name: the column of MDS files that names samples; None for tars, and if samples are numbered.
    """

    layout: Layout
    scale_factor: Annotated[float, pydantic.Field(gt=0)]
    latents: Part
    actions: Part | None
    label: Part | None
    fps: Part | float
    name: Part | None = None

    @property
    def parts(self) -> list[Part]:
        """All parts that are read of a sample."""
        parts = self.latents, self.actions, self.label, self.fps, self.name
        return [part for part in parts if isinstance(part, Part)]


class AdoptedRow(NamedTuple):
    """One sample of an adopted shard; offsets and sizes are of whole members, in bytes.

    `actions_bytes` is 0 if the set has no actions. Label and frame rate are here so that reads need not parse them.
    """

    name: Name
    frames: Positive
    label: Count | None
    fps: Annotated[float, pydantic.Field(gt=0)]
    latents_offset: Count
    latents_bytes: PartBytes
    actions_offset: Count
    actions_bytes: PartBytes

    @property
    def key(self) -> Key:
        """The sample's name, or one made from it if it has characters that keys may not have."""
        if KEY_PATTERN.fullmatch(self.name):
            return self.name
        allowed = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name).strip("_")[:60]
        return f"{allowed}-{hashlib.sha256(self.name.encode()).hexdigest()[:12]}"
