"""The held-out clips of validation: opened, checked, and cut into packs that do not depend on the number of ranks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from far_scale.config.recipe import Recipe
from far_scale.config.schema import ObjectiveSection, ValidationSection
from far_scale.data.frame_counts import max_frames
from far_scale.data.loader.mixture import MixtureManifest, check_classes
from far_scale.data.loader.pack_loader import Pack
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes, all_ranks_or_raise
from far_scale.train.curriculum import Stage
from far_scale.train.ema import ShardedEMA
from far_scale.train.sets import check_shards, open_set
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog


class ValidationVideos(Protocol):
    """Samples videos of the EMA's weights, see `far_scale.evaluation.validation_videos`.

    Attributes:
        without_lpips: why there is no LPIPS, and the fix; None where there is.
    """

    without_lpips: str | None

    def write(
        self, step: int, stage: Stage, engine: Any, ema: ShardedEMA, beat: Callable[[], None]
    ) -> dict[str, Any] | None:
        """Sample and write the videos of a step; all ranks call it. Rank 0 gets their scores."""


OpenVideos = Callable[[Recipe, ShardSet, Stage, LatentScaling, torch.dtype, Processes, EventLog], ValidationVideos]
"""Opens what samples the videos of a recipe from held-out clips. It is given to the training, since sampling and its
scores are built on top of the training's code."""


@dataclass(frozen=True)
class HeldOut:
    """What validation reads and draws; `open_held_out` opens it.

    Attributes:
        section: the recipe's.
        objective: the training's.
        shards: the held-out shard set.
        scaling: of the training's latents.
        seed: of the training.
        videos: what samples them, or None where none are asked for.
    """

    section: ValidationSection
    objective: ObjectiveSection
    shards: ShardSet
    scaling: LatentScaling
    seed: int
    videos: ValidationVideos | None

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
        firsts = range(0, self.pack_count, processes.world_size)
        numbers = [(first + processes.rank) % self.pack_count for first in firsts]
        return all_ranks_or_raise(lambda: self._packs(stage, numbers), processes)

    def counts(self, position: int, processes: Processes) -> bool:
        """Whether this rank's pack at that position of `packs` counts, or is only computed to keep step."""
        return position * processes.world_size + processes.rank < self.pack_count

    def _packs(self, stage: Stage, numbers: Sequence[int]) -> list[Pack]:
        samples = ((shard, n) for shard, count in enumerate(self.shards.samples_per_shard) for n in range(count))
        places, size = list(itertools.islice(samples, self.clips)), self.section.clips_per_pack
        return [self._pack(stage, number, places[number * size : (number + 1) * size]) for number in numbers]

    def _pack(self, stage: Stage, number: int, places: list[tuple[int, int]]) -> Pack:
        stride, longest, manifest = stage.data.frame_stride, max_frames(stage.data.frames), self.shards.manifest
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
    events: EventLog,
    step: int,
    open_videos: OpenVideos,
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
        open_videos: called where the recipe asks for videos.

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
    videos = None
    if section.sample_every is not None:
        videos = open_videos(recipe, shards, stages[-1], scaling, dtype, processes, events)
    held_out = HeldOut(section, recipe.objective, shards, scaling, recipe.seed, videos)
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
            shards.check(stage.data, stage.model)
        if stages[0].config.labels:
            check_classes([("data.shards", manifest.classes), (shards.folder, shards.manifest.classes)])
    except UserError as error:
        raise UserError(f"validation: {error}") from None
