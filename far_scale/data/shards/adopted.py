"""Adopted sets: shards that others wrote, read where and as they lie, by a manifest and indexes of ours.

    FOLDER/manifest.json               as of any set, with `adopted`, how samples are read, and each shard's `source`
    FOLDER/shard-000000.index.json     the places of the samples' parts in the shard, their labels and frame rates

Nothing is believed that stands in such a shard, as in our own: sizes are checked before anything is allocated, and
nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal, NamedTuple

import pydantic

from far_scale.data.shards.members import KEY_PATTERN
from far_scale.data.shards.typed import MAX_TENSORS_BYTES, Count, Key, Positive, StrictModel

MAX_NAME = 400  # characters of a sample's name in its shard

Layout = Literal["FCHW", "CFHW", "FHWC"]
# The axes of a tensor as it is stored that are frame, channel, height and width.
AXES: dict[Layout, tuple[int, int, int, int]] = {"FCHW": (0, 1, 2, 3), "CFHW": (1, 0, 2, 3), "FHWC": (0, 3, 1, 2)}

PartKind = Annotated[
    str,
    pydantic.Field(
        pattern=r"^(npy|torch|safetensors|json|text|number:[a-z0-9]{3,7}|ndarray(:[a-z0-9]{4,7}(:\d{1,9}(,\d{1,9}){0,7})?)?)$"
    ),
]
"""What a part is: a file of that kind, a number in text, or by mosaicml-streaming's encoding a number or an array."""
Name = Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
PartBytes = Annotated[int, pydantic.Field(ge=0, le=MAX_TENSORS_BYTES)]


class Part(StrictModel):
    """Where one part of each sample stands.

    Attributes:
        member: the extension of its member of a tar, all after the first dot of the file's name, in lower case; or its
            column of an MDS file.
        kind: what the member is.
        key: the part's name in it; None where it is all of it.
    """

    member: Name
    kind: PartKind
    key: Name | None = None

    def __str__(self) -> str:
        return self.member if self.key is None else f"{self.member}:{self.key}"


class Adoption(StrictModel):
    """How the samples of adopted shards are read.

    Attributes:
        layout: the order of the axes in which latents are stored.
        scale_factor: what they were multiplied by before they were stored; reading divides by it.
        latents: an array or tensor of four axes.
        actions: F whole numbers; None where the set has none.
        label: a whole number; None where the set has none.
        fps: a number that stands in each sample, or one for all.
        name: the column of MDS files that names samples; None where they are numbered, and of tars.
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
        """All parts of a sample that are read."""
        return [
            each for each in (self.latents, self.actions, self.label, self.fps, self.name) if isinstance(each, Part)
        ]


class AdoptedRow(NamedTuple):
    """One sample of an adopted shard; offsets and sizes are those of whole members, in bytes.

    `actions_bytes` is 0 where the set has no actions. Label and frame rate stand here, not to be read anew each time.
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
        """What we call the sample: its name, or one made from it where that has characters that our keys have not."""
        if KEY_PATTERN.fullmatch(self.name):
            return self.name
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name).strip("_")[:60]
        return f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:12]}"
