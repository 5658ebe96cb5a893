"""The packs of a stage: drawn as training draws them, from its shard set or, without one, from the recipe alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from far_scale.config.schema import shard_urls
from far_scale.data.frame_counts import max_frames
from far_scale.data.loader.mixture import Mixture
from far_scale.data.shards.manifest import MANIFEST_NAME
from far_scale.data.shards.shard_set import ShardSet
from far_scale.model.layout import FrameLayout
from far_scale.train.costs import train_flops
from far_scale.train.curriculum import Stage
from far_scale.train.shard_sets import open_source
from far_scale.utils.urls import is_remote

_SAMPLED_PACKS = 256  # of each stage
_ASSUMED_SAMPLES = 2**20


class _AssumedSet:
    """Takes the place of a `ShardSet` that is not there, for drawing packs: its videos are as long as any clip."""

    samples_per_shard = (_ASSUMED_SAMPLES,)

    def __init__(self, frames: int) -> None:
        self._frames = frames

    def frames_of(self, shard: int, sample: int) -> int:
        return self._frames


@dataclass(frozen=True)
class StageShapes:
    """Packs of a stage.

    Attributes:
        stage: the stage.
        layouts: of the drawn packs.
        assumed: whether the lengths of the videos are unknown, so that all clips have the frames that are drawn.
    """

    stage: Stage
    layouts: list[FrameLayout]
    assumed: bool = False

    @staticmethod
    def draw(stage: Stage, source: ShardSet | Mixture | None, seed: int) -> StageShapes:
        """Draw a few hundred packs as training will, without reading them.

        Args:
            stage: the stage.
            source: its shard set; None where it is not there.
            seed: of the recipe.
        """
        data = stage.data
        assumed = _AssumedSet((max_frames(data.frames) - 1) * data.frame_stride + 1)
        samples = cast("ShardSet", assumed) if source is None else source  # it has all that drawing uses
        lanes = stage.packing(seed).make_lanes(samples, range(min(data.lanes, _SAMPLED_PACKS)))
        rounds = -(-_SAMPLED_PACKS // len(lanes))
        packs = [next(lane) for _ in range(rounds) for lane in lanes.values()]
        layouts = [stage.layout(tuple(clip.frames for clip in pack)) for pack in packs]
        return StageShapes(stage, layouts, assumed=source is None)

    @property
    def step_flops(self) -> float:
        """Floating-point operations of a mean step on all ranks together, without recomputation."""
        return self.stage.data.lanes * self.mean(lambda layout: train_flops(self.stage.config, layout))

    @property
    def largest(self) -> FrameLayout:
        """The pack with the most tokens."""
        return max(self.layouts, key=lambda layout: layout.tokens)

    def mean(self, measure: Callable[[FrameLayout], float]) -> float:
        """Mean of `measure` over the packs."""
        return sum(map(measure, self.layouts)) / len(self.layouts)


def draw_stages(
    plan: Sequence[Stage], sources: Mapping[int, ShardSet | Mixture | None], seed: int
) -> list[StageShapes]:
    """`StageShapes.draw` for each stage; `sources` by the stage's index."""
    return [StageShapes.draw(stage, sources[stage.index], seed) for stage in plan]


def local_sources(plan: Sequence[Stage]) -> dict[int, ShardSet | Mixture | None]:
    """The shard sets of the stages, by the stage's index; None where a set is remote or not there.

    Raises:
        UserError: a set is there but damaged, or does not fit the recipe.
    """
    return {stage.index: _local_source(stage) for stage in plan}


def _local_source(stage: Stage) -> ShardSet | Mixture | None:
    for url in shard_urls(stage.data.shards):
        if is_remote(url) or not (Path(url) / MANIFEST_NAME).is_file():
            return None
    source = open_source(stage.data.shards)
    source.check(stage.data, stage.model)
    return source
