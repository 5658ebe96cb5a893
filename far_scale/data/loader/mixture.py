"""The source of a run's samples: one shard set, or a mixture of several with weights."""

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
    """The common properties of the sets of a mixture, under the names of `Manifest`.

    Attributes:
        mean, std: per channel, of the mixture's latents: those of the sets, merged by weight.
        fps: frame rate; None if the sets differ.
        classes: names of the labels' classes; None if no set has any.
        weighted_sets: fingerprint and weight of each set.
    """

    latent_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder: AutoencoderInfo
    actions: int
    labels: int
    fps: float | None
    classes: tuple[str, ...] | None
    weighted_sets: tuple[tuple[str, float], ...]

    @staticmethod
    def of(folders: Sequence[Path | str], manifests: Sequence[Manifest], weights: Sequence[float]) -> MixtureManifest:
        """Merge the manifests of these sets; the weights add up to 1.

        Raises:
            UserError: two sets do not fit together.
        """
        first = manifests[0]
        for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
            _check_alike(folders[0], first, folder, manifest)
        classes = check_classes(zip(folders, (manifest.classes for manifest in manifests), strict=True))
        # The variance of a mixture: the mean of the squares minus the square of the mean.
        weighted = list(zip(weights, manifests, strict=True))
        channels = range(len(first.mean))
        mean = [math.fsum(w * m.mean[c] for w, m in weighted) for c in channels]
        mean_square = [math.fsum(w * (m.std[c] ** 2 + m.mean[c] ** 2) for w, m in weighted) for c in channels]
        rates = {manifest.fps for manifest in manifests}
        return MixtureManifest(
            latent_shape=first.latent_shape,
            mean=tuple(mean),
            std=tuple(math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, mean_square, strict=True)),
            autoencoder=first.autoencoder,
            actions=first.actions,
            labels=first.labels,
            fps=first.fps if len(rates) == 1 else None,
            classes=classes,
            weighted_sets=tuple((manifest.fingerprint(), weight) for weight, manifest in weighted),
        )

    def fingerprint(self) -> str:
        """SHA-256 of the sets' fingerprints and weights."""
        return hashlib.sha256(json.dumps(self.weighted_sets).encode()).hexdigest()


class Mixture:
    """Several shard sets read as one: its shards are those of all sets, one set after the other.

    A sample's key begins with the number of its set, from 1.
    """

    def __init__(self, sets: Sequence[ShardSet], weights: Sequence[float]) -> None:
        """`weights` of the sets in clips; they add up to 1.

        Raises:
            UserError: two sets do not fit together.
        """
        self.sets, self.weights = list(sets), list(weights)
        self.manifest = MixtureManifest.of([s.folder for s in sets], [s.manifest for s in sets], weights)
        self._first_shards = list(itertools.accumulate((len(s.manifest.shards) for s in sets[:-1]), initial=0))

    def frames_of(self, shard: int, sample: int) -> int:
        """Frame count of a sample."""
        set_index, shard = self._locate(shard)
        return self.sets[set_index].frames_of(shard, sample)

    def read(self, shard: int, sample: int, start: int = 0, frames: int | None = None, stride: int = 1) -> Sample:
        """Read a sample or some of its frames, as `ShardSet.read` does."""
        set_index, shard = self._locate(shard)
        read = self.sets[set_index].read(shard, sample, start, frames, stride)
        return replace(read, key=f"{set_index + 1}/{read.key}")

    def name_of(self, shard: int) -> str:
        """A shard's name in messages."""
        set_index, shard = self._locate(shard)
        return self.sets[set_index].name_of(shard)

    def check(self, data: Any, model: Any) -> None:
        """Check that every set fits a recipe, as `ShardSet.check` does.

        Raises:
            UserError: one does not.
        """
        for shard_set in self.sets:
            shard_set.check(data, model)

    def _locate(self, shard: int) -> tuple[int, int]:
        """The index of a shard's set, and the shard's number in it."""
        set_index = bisect.bisect_right(self._first_shards, shard) - 1
        return set_index, shard - self._first_shards[set_index]


def check_classes(sets: Iterable[tuple[Path | str, tuple[str, ...] | None]]) -> tuple[str, ...] | None:
    """Check that all sets with class names have the same ones.

    Args:
        sets: each set's folder and class names.

    Returns:
        The names; None where no set has any.

    Raises:
        UserError: two sets have different names.
    """
    named = [(folder, classes) for folder, classes in sets if classes is not None]
    for folder, classes in named[1:]:
        if (difference := classes_differ(classes, named[0][1])) is not None:
            raise UserError(
                f"{folder} does not fit {named[0][0]}, with which it is trained on: {difference}; encode one of them "
                "with --classes-of the other, or train on only one of them"
            )
    return named[0][1] if named else None


def sets_of(source: ShardSet | Mixture) -> list[tuple[ShardSet, float]]:
    """The sets with their weights."""
    return [(source, 1.0)] if isinstance(source, ShardSet) else list(zip(source.sets, source.weights, strict=True))


def summary(source: ShardSet | Mixture) -> list[str]:
    """A line for each set, with its weight."""
    if isinstance(source, ShardSet):
        return [_describe(source)]
    return [f"{weight:.1%} of the clips from {_describe(shard_set)}" for shard_set, weight in sets_of(source)]


def _describe(shard_set: ShardSet) -> str:
    return f"{shard_set.folder}: {len(shard_set.manifest.shards)} shards, {shard_set.manifest.samples} samples"


def _check_alike(first_folder: Path | str, first: Manifest, folder: Path | str, manifest: Manifest) -> None:
    def describe(info: AutoencoderInfo) -> str:
        return f"{info.name} (weights {info.weight_hash[:12]}, factor {info.scaling_factor:g})"

    same_encoder = "encode the videos of one of them with the other's autoencoder"
    for name, expected, actual, fix in (
        ("autoencoder", describe(first.autoencoder), describe(manifest.autoencoder), same_encoder),
        ("latent shape", list(first.latent_shape), list(manifest.latent_shape), "encode both with the same --size"),
        ("number of actions", first.actions, manifest.actions, "encode both with the same actions and --actions"),
        ("number of labels", first.labels, manifest.labels, "encode both with the same classes and --labels"),
    ):
        if expected != actual:
            raise UserError(
                f"{folder} does not fit {first_folder}, with which it is mixed: its {name} is {actual}, not "
                f"{expected}; {fix}, or remove one of them from data.shards"
            )
