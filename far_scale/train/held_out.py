"""The held-out clips of validation: opened, checked, and put into packs that do not depend on the number of ranks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from far_scale.config.schema import DataSection, ObjectiveSection, ValidationSection
from far_scale.data.frame_counts import max_frames
from far_scale.data.loader.mixture import MixtureManifest, check_classes
from far_scale.data.loader.pack_loader import Pack
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes, all_ranks_or_raise
from far_scale.train.curriculum import Stage
from far_scale.train.ema import ShardedEMA
from far_scale.train.shard_sets import check_shards, open_set
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog


class ValidationVideos(Protocol):
    """Samples videos with the EMA's weights, see `far_scale.evaluation.validation_videos`.

    Attributes:
        without_lpips: why LPIPS is not available, and the fix; None if it is.
    """

    without_lpips: str | None

    def write(
        self, step: int, stage: Stage, engine: Any, ema: ShardedEMA, beat: Callable[[], None]
    ) -> dict[str, Any] | None:
        """Sample and write the videos of a step; all ranks call it. Rank 0 gets their scores."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out clips, from `open_held_out`.

    Attributes:
        section: the recipe's.
        objective: the recipe's objective section.
        shards: the held-out shard set.
        scaling: scaling of the training's latents.
        seed: seed of the training.
        videos: samples videos, or None.
    """

    section: ValidationSection
    objective: ObjectiveSection
    shards: ShardSet
    scaling: LatentScaling
    seed: int
    videos: ValidationVideos | None

    @property
    def noise_seed(self) -> int:
        """The seed of all draws; differs from the training's, so that draws with the same counters differ."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/validation".encode()).digest()[:8], "little")

    @property
    def clips(self) -> int:
        """Number of clips: as many as the recipe asks for, or as the set has."""
        return min(self.section.clips, sum(self.shards.samples_per_shard))

    @property
    def pack_count(self) -> int:
        """Number of packs."""
        return -(-self.clips // self.section.clips_per_pack)

    def packs(self, stage: Stage, processes: Processes) -> list[Pack]:
        """This rank's packs for `stage`: each clip with the maximum frames of the stage, or all that it has.

        All ranks have equally many packs; the last one of some ranks is counted by another rank (see `counts`).

        Raises:
            UserError: on all ranks, where a clip cannot be read on one.
        """
        firsts = range(0, self.pack_count, processes.world_size)
        numbers = [(first + processes.rank) % self.pack_count for first in firsts]
        return all_ranks_or_raise(lambda: self._read_packs(stage, numbers), processes)

    def counts(self, position: int, processes: Processes) -> bool:
        """Whether this rank counts the pack at a position of `packs`; otherwise it only joins the collectives."""
        return position * processes.world_size + processes.rank < self.pack_count

    def _read_packs(self, stage: Stage, numbers: Sequence[int]) -> list[Pack]:
        samples = ((shard, n) for shard, count in enumerate(self.shards.samples_per_shard) for n in range(count))
        positions, size = list(itertools.islice(samples, self.clips)), self.section.clips_per_pack
        return [self._read_pack(stage, number, positions[number * size : (number + 1) * size]) for number in numbers]

    def _read_pack(self, stage: Stage, number: int, positions: list[tuple[int, int]]) -> Pack:
        stride, longest, manifest = stage.data.frame_stride, max_frames(stage.data.frames), self.shards.manifest
        frames = [min(longest, -(-self.shards.frames_of(*position) // stride)) for position in positions]
        samples = [
            self.shards.read(*position, frames=count, stride=stride)
            for position, count in zip(positions, frames, strict=True)
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
    section: ValidationSection | None,
    url: str | None,
    objective: ObjectiveSection,
    data: DataSection,
    seed: int,
    stages: Sequence[Stage],
    manifest: Manifest | MixtureManifest,
    scaling: LatentScaling,
    processes: Processes,
    events: EventLog,
    step: int,
    open_videos: Callable[[ShardSet], ValidationVideos],
) -> HeldOut | None:
    """Open the held-out shard set, and read all of it once; every rank calls it.

    Args:
        section: the recipe's validation section; None for no validation.
        url: folder or URL of the held-out shard set.
        objective, data, seed: of the recipe.
        stages: the remaining ones, and one that has just ended.
        manifest, scaling: of data.shards.
        processes: the run's.
        events: of this process.
        step: steps done before, for the events.
        open_videos: called where the recipe asks for videos.

    Returns:
        None for no validation.

    Raises:
        UserError: on all ranks alike: the set is missing, incomplete or does not fit the model, or sampling finds too
            few frames.
    """
    if section is None or url is None:
        return None
    shards = open_set(url, data, processes)
    check_shards(shards, 0, processes, events, step)
    all_ranks_or_raise(lambda: _check(shards, stages, manifest), processes)
    videos = None if section.sample_every is None else open_videos(shards)
    held_out = HeldOut(section, objective, shards, scaling, seed, videos)
    for stage in stages:
        held_out.packs(stage, processes)
    return held_out


def _check(shards: ShardSet, stages: Sequence[Stage], manifest: Manifest | MixtureManifest) -> None:
    """Refuse a held-out set that does not match the training's."""
    ours, theirs = shards.manifest.autoencoder, manifest.autoencoder
    if ours.weight_hash != theirs.weight_hash:
        raise UserError(
            f"validation: {shards.folder}: the latents are by {ours.name} ({ours.weight_hash[:12]}), those of "
            f"data.shards by {theirs.name} ({theirs.weight_hash[:12]}); encode them with the same autoencoder"
        )
    try:
        for stage in stages:
            shards.check(stage.data, stage.model)
        if stages[0].config.labels:
            check_classes([("data.shards", manifest.classes), (shards.folder, shards.manifest.classes)])
    except UserError as error:
        raise UserError(f"validation: {error}") from None
