"""Where the lanes go on after a checkpoint, also where the recipe has another number or other packs of them by now."""

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
"""Where each lane stands, by its number."""


class ResumedLanes(NamedTuple):
    """Where the lanes go on.

    Attributes:
        states: of all lanes.
        beginnings: as in `PackingConfig`.
        change: of their number, or from packs of so many clips to packs of so many tokens or back, in words that begin
            with data.lanes; None without one.
    """

    states: LaneStates
    beginnings: tuple[Mapping[str, Any], ...] = ()
    change: str | None = None


def resume_lanes(
    where: Path,
    state: Mapping[str, Any],
    recipe: Recipe,
    plan: list[Stage],
    sources: Mapping[int, ShardSet | Mixture],
) -> ResumedLanes:
    """Where the lanes of the run go on.

    Args:
        where: the checkpoint, for messages.
        state: its state.
        recipe: the run's.
        plan: its stages.
        sources: what the stages read that are to come.

    Raises:
        UserError: the checkpoint's lanes do not fit the recipe or the shard sets.
    """
    states: LaneStates = {int(lane): place for lane, place in state["lanes"].items()}
    lanes_before, beginnings = state["recipe"]["data"]["lanes"], tuple(state.get("beginnings", ()))
    stage = stage_of(plan, state["step"] - 1)
    over = state["step"] == stage.end
    by_tokens = stage.data.tokens_per_pack is not None
    filled_otherwise = not over and any(("pending" in place) != by_tokens for place in states.values())
    if lanes_before == recipe.data.lanes and not filled_otherwise:
        if over or not beginnings:
            return ResumedLanes(states)
        kept = continue_lanes(replace(stage.packing(recipe.seed), beginnings=beginnings), sources[stage.index], states)
        return ResumedLanes(kept.states, kept.packing.beginnings)
    recipe_before = _recipe_of(where, state)
    before = stages(recipe_before)[stage.index]
    now = ", filled otherwise" if lanes_before == recipe.data.lanes else f" -> {recipe.data.lanes}"
    key = f"data.lanes {lanes_before}{now} ({_batches(before.data, stage.data)}; "
    if over:
        return ResumedLanes(states, change=f"{key}the next stage begins with them)")
    packing_before = replace(before.packing(recipe_before.seed), beginnings=beginnings)
    weights = None if isinstance(before.data.shards, str) else mixture_weights(before.data.shards)
    going = change_lanes(packing_before, stage.packing(recipe.seed), sources[stage.index], states, weights)
    return ResumedLanes(going.states, going.packing.beginnings, f"{key}{_words(going.unread)})")


def _recipe_of(where: Path, state: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(state["recipe"])
    except ValidationError:
        raise UserError(
            f"{where}/state.json: this version cannot read the recipe in it, by which it would change data.lanes, or "
            f"packs of clips to packs of tokens; set data.lanes to {state['recipe']['data']['lanes']} and the packs to "
            "those of that recipe, save a checkpoint, and then change them"
        ) from None


def _batches(before: DataSection, now: DataSection) -> str:
    """The global batch before and now."""
    (count, unit), (new_count, new_unit) = _batch(before), _batch(now)
    return f"global batch {count}{'' if unit == new_unit else f' {unit}'} -> {new_count} {new_unit}"


def _batch(data: DataSection) -> tuple[int, str]:
    if data.clips_per_pack is not None:
        return data.lanes * data.clips_per_pack, "clips"
    return data.lanes, f"packs of at most {data.tokens_per_pack} tokens"


def _words(left: Sequence[UnreadSamples]) -> str:
    """What is left of the epochs begun, and comes first."""
    if not any(each.remaining for each in left):
        return "no epoch begun has anything left"
    counts = [f"{each.remaining}" + (f" of {each.samples}" if each.remaining <= each.samples else "") for each in left]
    whose = f"epoch {left[0].epoch}" if len(left) == 1 else "the sets' epochs"
    return f"the rest of {whose}, {' and '.join(counts)} samples, is read first: nothing is trained twice"
