"""The lanes' states at a resume, also where the number of lanes or the packs have changed since the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from far_scale.config.recipe import Recipe
from far_scale.config.schema import DataSection, mixture_weights
from far_scale.data.loader.lane_change import UnreadSamples, change_lanes, continue_lanes
from far_scale.data.loader.mixture import Mixture
from far_scale.data.shards.shard_set import ShardSet
from far_scale.train.curriculum import Stage, stage_of, stages
from far_scale.utils.errors import UserError

LaneStates = dict[int, dict[str, Any]]
"""Each lane's state, by its number."""


class ResumedLanes(NamedTuple):
    """The lanes at a resume.

    Attributes:
        states: of all lanes.
        beginnings: as in `PackingConfig`.
        change: a line that begins with data.lanes, if their number changed, or their packs from a number of clips to a
            number of tokens or back; else None.
    """

    states: LaneStates
    beginnings: tuple[Mapping[str, Any], ...] = ()
    change: str | None = None


def resume_lanes(
    where: Path,
    state: Mapping[str, Any],
    plan: list[Stage],
    seed: int,
    sources: Mapping[int, ShardSet | Mixture],
) -> ResumedLanes:
    """The states from which the run's lanes continue.

    Args:
        where: the checkpoint, for messages.
        state: its state.
        plan: the run's stages.
        seed: the run's.
        sources: what the stages to come read, by the stage's index.

    Raises:
        UserError: the checkpoint's lanes do not fit the recipe or the shard sets.
    """
    states: LaneStates = {int(lane): lane_state for lane, lane_state in state["lanes"].items()}
    old_lanes, beginnings = state["recipe"]["data"]["lanes"], tuple(state.get("beginnings", ()))
    stage = stage_of(plan, state["step"] - 1)
    lanes, stage_is_over = stage.data.lanes, state["step"] == stage.end
    by_tokens = stage.data.tokens_per_pack is not None
    packs_changed = not stage_is_over and any(("pending" in lane) != by_tokens for lane in states.values())
    if old_lanes == lanes and not packs_changed:
        if stage_is_over or not beginnings:
            return ResumedLanes(states)
        unchanged = continue_lanes(replace(stage.packing(seed), beginnings=beginnings), sources[stage.index], states)
        return ResumedLanes(unchanged.states, unchanged.packing.beginnings)
    old_recipe = _read_recipe(where, state)
    old_stage = stages(old_recipe)[stage.index]
    what = ", filled otherwise" if old_lanes == lanes else f" -> {lanes}"
    change = f"data.lanes {old_lanes}{what} ({_batch_change(old_stage.data, stage.data)}; "
    if stage_is_over:
        return ResumedLanes(states, change=f"{change}the next stage begins with them)")
    old_packing = replace(old_stage.packing(old_recipe.seed), beginnings=beginnings)
    weights = None if isinstance(old_stage.data.shards, str) else mixture_weights(old_stage.data.shards)
    changed = change_lanes(old_packing, stage.packing(seed), sources[stage.index], states, weights)
    return ResumedLanes(changed.states, changed.packing.beginnings, f"{change}{_describe_rest(changed.unread)})")


def _read_recipe(where: Path, state: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(state["recipe"])
    except ValidationError:
        raise UserError(
            f"{where}/state.json: this version cannot read the recipe in it, by which it would change data.lanes, or "
            f"packs of clips to packs of tokens; set data.lanes to {state['recipe']['data']['lanes']} and the packs to "
            "those of that recipe, save a checkpoint, and then change them"
        ) from None


def _batch_change(old: DataSection, new: DataSection) -> str:
    (old_size, old_unit), (new_size, new_unit) = _global_batch(old), _global_batch(new)
    return f"global batch {old_size}{'' if old_unit == new_unit else f' {old_unit}'} -> {new_size} {new_unit}"


def _global_batch(data: DataSection) -> tuple[int, str]:
    """Size and unit."""
    if data.clips_per_pack is not None:
        return data.lanes * data.clips_per_pack, "clips"
    return data.lanes, f"packs of at most {data.tokens_per_pack} tokens"


def _describe_rest(left: Sequence[UnreadSamples]) -> str:
    """The samples left of the epochs begun, which are read first."""
    if not any(epoch.remaining for epoch in left):
        return "no epoch begun has anything left"
    counts = [
        f"{epoch.remaining} of {epoch.samples}" if epoch.remaining <= epoch.samples else f"{epoch.remaining}"
        for epoch in left
    ]
    epochs = f"epoch {left[0].epoch}" if len(left) == 1 else "the sets' epochs"
    return f"the rest of {epochs}, {' and '.join(counts)} samples, is read first: nothing is trained twice"
