"""What a run reads its samples from: one shard set, or a mixture of several with weights."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from far_scale.data.shards.manifest import AutoencoderInfo, Manifest
from far_scale.data.shards.records import classes_differ
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError


@dataclass(frozen=True)
class MixtureManifest:
    """What the sets of a mixture have in common; the names are the manifest's.

    Attributes:
        mean, std: per channel, of the latents as the mixture gives them: each set's count by its share.
        fps: None where the sets differ.
        classes: the names of the labels' classes, where one of the sets has them.
        parts: fingerprint and share of each set.
    """

    latent_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder: AutoencoderInfo
    actions: int
    labels: int
    fps: float | None
    classes: tuple[str, ...] | None
    parts: tuple[tuple[str, float], ...]

    @staticmethod
    def of(folders: Sequence[Path | str], manifests: Sequence[Manifest], parts: Sequence[float]) -> MixtureManifest:
        """That of these sets, of which each gives its part of the clips.

        Raises:
            UserError: two sets that do not fit one another.
        """
        first = manifests[0]
        for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
            _check_alike(folders[0], first, folder, manifest)
        classes = check_classes(zip(folders, (manifest.classes for manifest in manifests), strict=True))
        # The variance of a mixture: the mean of the squares less the square of the mean.
        mean = [math.fsum(p * m.mean[c] for p, m in zip(parts, manifests, strict=True)) for c in range(len(first.mean))]
        square = [
            math.fsum(p * (m.std[c] ** 2 + m.mean[c] ** 2) for p, m in zip(parts, manifests, strict=True))
            for c in range(len(first.mean))
        ]
        rates = {manifest.fps for manifest in manifests}
        return MixtureManifest(
            latent_shape=first.latent_shape,
            mean=tuple(mean),
            std=tuple(math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)),
            autoencoder=first.autoencoder,
            actions=first.actions,
            labels=first.labels,
            fps=first.fps if len(rates) == 1 else None,
            classes=classes,
            parts=tuple((manifest.fingerprint(), part) for manifest, part in zip(manifests, parts, strict=True)),
        )

    def fingerprint(self) -> str:
        """SHA-256 of the sets' fingerprints and shares."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()


class Mixture:
    """Several shard sets read as one: its shards are those of all sets, one set after the other.

    A sample's key begins with the number of its set, from 1.
    """

    def __init__(self, sets: Sequence[ShardSet], parts: Sequence[float]) -> None:
        """`parts` are the sets' shares of the clips; they add up to 1.

        Raises:
            UserError: two sets that do not fit one another.
        """
        self.sets, self.parts = list(sets), list(parts)
        self.manifest = MixtureManifest.of([s.folder for s in sets], [s.manifest for s in sets], parts)
        self._first_shards = list(itertools.accumulate((len(s.manifest.shards) for s in sets[:-1]), initial=0))

    def frames_of(self, shard: int, sample: int) -> int:
        """Frame count of a sample."""
        number, shard = self._find(shard)
        return self.sets[number].frames_of(shard, sample)

    def read(self, shard: int, sample: int, start: int = 0, frames: int | None = None, stride: int = 1) -> Sample:
        """A sample or some of its frames, as by `ShardSet.read`."""
        number, shard = self._find(shard)
        found = self.sets[number].read(shard, sample, start, frames, stride)
        return replace(found, key=f"{number + 1}/{found.key}")

    def name_of(self, shard: int) -> str:
        """A shard as messages call it."""
        number, shard = self._find(shard)
        return self.sets[number].name_of(shard)

    def check(self, data: Any, model: Any) -> None:
        """Refuse recipe sections that one of the sets cannot serve.

        Raises:
            UserError: as by `ShardSet.check`.
        """
        for shard_set in self.sets:
            shard_set.check(data, model)

    def _find(self, shard: int) -> tuple[int, int]:
        """Number of a shard's set, and the shard's number in it."""
        number = bisect.bisect_right(self._first_shards, shard) - 1
        return number, shard - self._first_shards[number]


def check_classes(sets: Iterable[tuple[Path | str, tuple[str, ...] | None]]) -> tuple[str, ...] | None:
    """The names of the classes that all sets have, of which each is given with what messages call it.

    Sets without names are not asked; None where no set has any.

    Raises:
        UserError: two sets have different names.
    """
    named = [(folder, classes) for folder, classes in sets if classes is not None]
    for folder, classes in named[1:]:
        if (difference := classes_differ(classes, named[0][1])) is not None:
            raise UserError(
                f"{folder} does not fit {named[0][0]}, with which it is trained on: {difference}; encode one of them "
                f"with --classes-of the other, or train on one of them"
            )
    return named[0][1] if named else None


def sets_of(source: ShardSet | Mixture) -> list[tuple[ShardSet, float]]:
    """The sets with their shares of the clips."""
    return [(source, 1.0)] if isinstance(source, ShardSet) else list(zip(source.sets, source.parts, strict=True))


def summary(source: ShardSet | Mixture) -> list[str]:
    """The sets in a line each, with their shares."""
    if isinstance(source, ShardSet):
        return [_line(source)]
    return [f"{part:.1%} of the clips from {_line(s)}" for s, part in zip(source.sets, source.parts, strict=True)]


def _line(shard_set: ShardSet) -> str:
    return f"{shard_set.folder}: {len(shard_set.manifest.shards)} shards, {shard_set.manifest.samples} samples"


def _check_alike(first_folder: Path | str, first: Manifest, folder: Path | str, manifest: Manifest) -> None:
    def told(info: AutoencoderInfo) -> str:
        return f"{info.name} (weights {info.weight_hash[:12]}, factor {info.scaling_factor:g})"

    same_encoder = "encode the videos of one of them with the other's autoencoder"
    for what, one, other, mend in (
        ("autoencoder", told(first.autoencoder), told(manifest.autoencoder), same_encoder),
        ("latent shape", list(first.latent_shape), list(manifest.latent_shape), "encode both with the same --size"),
        ("number of actions", first.actions, manifest.actions, "encode both with the same actions and --actions"),
        ("number of labels", first.labels, manifest.labels, "encode both with the same classes and --labels"),
    ):
        if one != other:
            raise UserError(
                f"{folder} does not fit {first_folder}, with which it is mixed: its {what} is {other}, there {one}; "
                f"{mend}, or take one out of data.shards"
            )
