"""The cheapest change of a recipe that makes it fit into the memory, among those that usually help."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from far_scale.config.schema import DataSection, StageSection, TrainSection
from far_scale.train.planner.estimate import RunPlan
from far_scale.utils.errors import UserError

_MOST_HALVINGS = 2


@dataclass(frozen=True)
class Change:
    """A change and what it costs.

    Attributes:
        overrides: recipe keys, as they are typed.
        nodes: of the run.
        plan: with the change.
    """

    overrides: tuple[str, ...]
    nodes: int
    plan: RunPlan

    @property
    def cost(self) -> tuple[float, ...]:
        """What to keep low, the most important first: GPU time of all steps, by its arithmetic where no profile is;
        bytes sent in a step; number of keys; nodes."""
        plan, ranks = self.plan, self.plan.cluster.ranks
        seconds = plan.seconds
        if seconds is None:
            steps = [(stage.work, stage.shapes.stage.steps) for stage in plan.stages]
            seconds = sum((work.products + work.attention) * count for work, count in steps)
        sent = sum(entry.sent for entry in plan.traffic)
        return (float(f"{seconds * ranks:.6g}"), sent, len(self.overrides), self.nodes)


def cheapest_change(
    plan: RunPlan,
    train: TrainSection,
    data: DataSection,
    curriculum: Sequence[StageSection],
    replan: Callable[[tuple[str, ...], int], RunPlan],
) -> Change | None:
    """The change that fits at the lowest cost; None where none of those that are tried fits.

    More nodes are tried only where nothing else fits.

    Args:
        plan: of the recipe as it is.
        train, data, curriculum: the recipe's.
        replan: makes the plan with further overrides and a number of nodes; raises UserError for impossible ones.
    """
    for nodes in (plan.cluster.nodes * times for times in (1, 2, 4)):
        found = []
        for overrides in candidates(plan, train, data, curriculum):
            with contextlib.suppress(UserError):  # such as a budget of tokens that the longest clip exceeds
                found.append(Change(overrides, nodes, replan(overrides, nodes)))
        fitting = [change for change in found if change.plan.fits]
        if fitting:
            return min(fitting, key=lambda change: change.cost)
    return None


def candidates(
    plan: RunPlan, train: TrainSection, data: DataSection, curriculum: Sequence[StageSection]
) -> Iterator[tuple[str, ...]]:
    """Overrides: what is sharded, what is recomputed, the precision, who shares packs, and the packs, in every
    combination."""
    stages = [] if train.zero_stage == "auto" else [f"train.zero_stage={n}" for n in range(plan.sharding.stage + 1, 4)]
    modes = {"none": ["attention-kept", "full"], "attention-kept": ["full"], "full": []}
    kept = [mode for mode in modes[train.activation_checkpointing] if mode == "full" or not plan.flex]
    shared_by = 2 * train.sequence_parallel
    may_share = shared_by <= plan.config.heads and plan.cluster.per_node % shared_by == 0
    halvings = [_halved(data, curriculum, 2**times) for times in range(1, _MOST_HALVINGS + 1)]
    choices: list[list[tuple[str, ...]]] = [
        [(), *((key,) for key in stages)],
        [(), *((f"train.activation_checkpointing={mode}",) for mode in kept)],
        [(), *((("train.precision=bf16",),) if train.precision == "fp32" else ())],
        [(), *(((f"train.sequence_parallel={shared_by}",),) if may_share else ())],
        [(), *(overrides for overrides in halvings if overrides)],
    ]
    for parts in itertools.product(*choices):
        yield tuple(itertools.chain.from_iterable(parts))


def _halved(data: DataSection, curriculum: Sequence[StageSection], divisor: int) -> tuple[str, ...]:
    """Packs of a fraction of the clips or tokens, from as many times the lanes: the same global batch. Empty where a
    number cannot be divided."""
    sections: list[tuple[str, DataSection | StageSection]] = [("data", data)]
    sections += [(f"curriculum.{number}", stage) for number, stage in enumerate(curriculum, start=1)]
    overrides = [f"data.lanes={data.lanes * divisor}"]
    for name, section in sections:
        for key in ("clips_per_pack", "tokens_per_pack"):
            value = getattr(section, key)
            if value is not None and (key == "tokens_per_pack" or value % divisor == 0):
                overrides.append(f"{name}.{key}={value // divisor}")
            elif value is not None:
                return ()
    return tuple(overrides)
