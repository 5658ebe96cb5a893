"""The held-out clips of validation: opened, checked, and cut into packs that do not depend on the number of ranks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import far_scale
from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelCard, TrainingCard
from far_scale.data.loader.pack_loader import Pack
from far_scale.data.loader.mixture import MixtureManifest, check_classes
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError
from far_scale.config.recipe import Recipe
from far_scale.data.frame_counts import most
from far_scale.config.schema import ObjectiveSection, ValidationSection
from far_scale.evaluation.rollouts.episodes import Episodes, Wanted, shard_episodes
from far_scale.evaluation.rollouts.evaluate import load_autoencoder
from far_scale.train.curriculum import Stage
from far_scale.utils.event_log import Events
from far_scale.distributed.process_group import Processes, all_ranks_or_raise
from far_scale.train.sets import check_shards, open_set
from far_scale.evaluation.validation_videos import Samples


@dataclass(frozen=True)
class HeldOut:
    """What validation reads and draws; `open_held_out` opens it.

    Attributes:
        section: the recipe's.
        objective: the training's.
        shards: the held-out shard set.
        scaling: of the training's latents.
        seed: of the training.
        samples: what makes videos, or None where none are asked for.
    """

    section: ValidationSection
    objective: ObjectiveSection
    shards: ShardSet
    scaling: LatentScaling
    seed: int
    samples: Samples | None

    @property
    def noise_seed(self) -> int:
        """The seed of all draws: never the training's, whose draws of the same counters are other ones."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/validation".encode()).digest()[:8], "little")

    @property
    def clips(self) -> int:
        """How many there are: as many as asked for, or as the set has."""
        return min(self.section.clips, sum(self.shards.samples_per_shard))

    @property
    def pack_count(self) -> int:
        """Packs that they fill."""
        return -(-self.clips // self.section.clips_per_pack)

    def packs(self, stage: Stage, processes: Processes) -> list[Pack]:
        """This rank's packs as `stage` has them: of each clip the most frames that it trains on, or all there are.

        Every rank has as many: the last of some is one that another rank counts (see `counts`).

        Raises:
            UserError: on all ranks, where a clip cannot be read on one.
        """
        firsts = range(0, self.pack_count, processes.count)
        numbers = [(first + processes.rank) % self.pack_count for first in firsts]
        return all_ranks_or_raise(lambda: self._packs(stage, numbers), processes)

    def counts(self, position: int, processes: Processes) -> bool:
        """Whether this rank's pack at that position of `packs` counts, or is only computed to keep step."""
        return position * processes.count + processes.rank < self.pack_count

    def _packs(self, stage: Stage, numbers: Sequence[int]) -> list[Pack]:
        samples = ((shard, n) for shard, count in enumerate(self.shards.samples_per_shard) for n in range(count))
        places, size = list(itertools.islice(samples, self.clips)), self.section.clips_per_pack
        return [self._pack(stage, number, places[number * size : (number + 1) * size]) for number in numbers]

    def _pack(self, stage: Stage, number: int, places: list[tuple[int, int]]) -> Pack:
        stride, longest, manifest = stage.data.frame_stride, most(stage.data.frames), self.shards.manifest
        frames = [min(longest, -(-self.shards.frames_of(*place) // stride)) for place in places]
        samples = [
            self.shards.read(*place, frames=count, stride=stride) for place, count in zip(places, frames, strict=True)
        ]
        return Pack(
            latents=self.scaling.normalise(torch.cat([sample.latents for sample in samples])),
            actions=torch.cat([s.actions for s in samples if s.actions is not None]) if manifest.actions else None,
            labels=torch.tensor([s.label for s in samples]) if manifest.labels else None,
            clip_frames=tuple(frames),
            keys=tuple(f"{sample.key}@0" for sample in samples),
            lane=number,
            step=0,
            lane_state={},
        )


def open_held_out(
    recipe: Recipe,
    stages: Sequence[Stage],
    manifest: Manifest | MixtureManifest,
    scaling: LatentScaling,
    dtype: torch.dtype,
    processes: Processes,
    events: Events,
    step: int,
) -> HeldOut | None:
    """Open what the recipe validates on, and read all of it once; every rank calls it.

    Args:
        recipe: the run's.
        stages: that are to come, or just over.
        manifest, scaling: of data.shards.
        dtype: of the arithmetic.
        processes: who runs it.
        events: of this process.
        step: steps done before, for the events.

    Returns:
        None where the recipe has no validation.

    Raises:
        UserError: on all ranks alike: the set is not there, not whole, or does not fit the model, or sampling finds
            too few frames.
    """
    where, section = recipe.held_out_shards(), recipe.validation
    if section is None or where is None:
        return None
    shards = open_set(where, recipe.data, processes)
    check_shards(shards, 0, processes, events, step)
    all_ranks_or_raise(lambda: _check(shards, stages, manifest), processes)
    samples = None
    if section.sample_every is not None:
        samples = _samples(recipe, section, stages[-1], shards, scaling, dtype, processes, events)
    held_out = HeldOut(section, recipe.objective, shards, scaling, recipe.seed, samples)
    for stage in stages:
        held_out.packs(stage, processes)
    return held_out


def _check(shards: ShardSet, stages: Sequence[Stage], manifest: Manifest | MixtureManifest) -> None:
    """Refuse a held-out set that is not of the training's kind."""
    own, theirs = shards.manifest.autoencoder, manifest.autoencoder
    if own.weight_hash != theirs.weight_hash:
        raise UserError(
            f"validation: {shards.folder}: the latents are by {own.name} ({own.weight_hash[:12]}), those of "
            f"data.shards by {theirs.name} ({theirs.weight_hash[:12]}); encode them with the same autoencoder"
        )
    try:
        for stage in stages:
            shards.check(stage)
        if stages[0].config.labels:
            check_classes([("data.shards", manifest.classes), (shards.folder, shards.manifest.classes)])
    except UserError as error:
        raise UserError(f"validation: {error}") from None


def _samples(
    recipe: Recipe,
    section: ValidationSection,
    stage: Stage,
    shards: ShardSet,
    scaling: LatentScaling,
    dtype: torch.dtype,
    processes: Processes,
    events: Events,
) -> Samples:
    manifest, sample, frames = shards.manifest, recipe.sample, recipe.sample_frames()
    card = ModelCard(
        autoencoder=manifest.autoencoder,
        scaling=scaling,
        latent_shape=manifest.latent_shape,
        fps=manifest.fps,
        frame_stride=recipe.data.frame_stride,
        classes=manifest.classes,
        training=TrainingCard(step=0, recipe_hash=recipe.hash(), weights="ema", far_scale=far_scale.__version__),
    )
    clips = min(section.sample_clips, sum(shards.samples_per_shard))
    wanted = Wanted(sample.given, frames, clips, conditioned=sample.guidance != -1)

    def open_clips() -> tuple[Autoencoder, Episodes]:
        autoencoder = load_autoencoder(card, processes.device)
        return autoencoder, shard_episodes(shards, stage.config, card, autoencoder, wanted)

    opened = all_ranks_or_raise(lambda: open_clips() if processes.rank < clips else None, processes)
    return Samples(Path(recipe.run_dir), sample, frames, recipe.seed, dtype, card, clips, opened, processes, events)
