"""What the packs of a stage cost: arithmetic, and memory for what backward needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from far_scale.config.recipe import Recipe
from far_scale.data.loader.mixture import Mixture
from far_scale.data.shards.shard_set import ShardSet
from far_scale.model.layout import FrameLayout
from far_scale.train.curriculum import Stage
from far_scale.train.flops import train_flops

_PACKS = 256  # drawn of each stage


@dataclass(frozen=True)
class StageCosts:
    """What drawn packs of a stage come to.

    Attributes:
        stage: which.
        layouts: of the packs.
    """

    stage: Stage
    layouts: list[FrameLayout]

    @staticmethod
    def of(stage: Stage, shard_set: ShardSet | Mixture, seed: int) -> StageCosts:
        """Draw some hundred packs, as training will, without reading them."""
        lanes = stage.packing(seed).make_lanes(shard_set, range(min(stage.data.lanes, _PACKS)))
        rounds = -(-_PACKS // len(lanes))
        drawn = [next(lane) for _ in range(rounds) for lane in lanes.values()]
        return StageCosts(stage, [stage.layout(tuple(clip.frames for clip in pack)) for pack in drawn])

    @property
    def step_flops(self) -> float:
        """Arithmetic of a mean step, all ranks together."""
        flops = [train_flops(self.stage.config, layout) for layout in self.layouts]
        return self.stage.data.lanes * sum(flops) / len(flops)

    @property
    def largest(self) -> FrameLayout:
        """The pack of most tokens."""
        return max(self.layouts, key=lambda layout: layout.tokens)

    def mean_and_most(self, number: Callable[[FrameLayout], int]) -> str:
        """Mean and largest `number` of a pack, as text."""
        numbers = [number(layout) for layout in self.layouts]
        mean, most = sum(numbers) / len(numbers), max(numbers)
        return f"{_short(mean)} / {_short(most)}"


def activation_bytes(recipe: Recipe, layout: FrameLayout) -> float:
    """Roughly what a forward pass keeps for backward: some 34 numbers a token, layer and channel of width.

    With activation checkpointing one number a layer (with attention kept, two) and one layer's worth in full.
    """
    number = 2 if recipe.train.precision == "bf16" else 4
    config = recipe.far_config()
    a_layer = 34 * layout.tokens * config.width * number
    kept = {"none": 0, "attention-kept": 2, "full": 1}[recipe.train.activation_checkpointing]
    if not kept:
        return config.layers * a_layer
    return a_layer + kept * config.layers * layout.tokens * config.width * number


def most_activation_bytes(recipe: Recipe, plan: Sequence[Stage], shard_sets: Mapping[int, ShardSet | Mixture]) -> float:
    """`activation_bytes` of the largest drawn pack of all stages; `shard_sets` by the stage's index."""
    costs = [StageCosts.of(stage, shard_sets[stage.index], recipe.seed) for stage in plan]
    return max(activation_bytes(recipe, cost.largest) for cost in costs)


def _short(number: float) -> str:
    """A number with a unit where it is long."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e5, "K")):
        if number >= size:
            return f"{number / (1e3 if unit == 'K' else size):.3g}{unit}"
    return f"{number:.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"
