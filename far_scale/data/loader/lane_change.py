"""How the lanes go on from a checkpoint's states, also where their number is another one now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from far_scale.data.loader.filling import ClipLane, PackingConfig
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.rest import Standing, after_change, beginning_state, without_rest_if_read
from far_scale.data.shards.shard_set import ShardSet


class Left(NamedTuple):
    """What a change of lanes has left of a shard set.

    Attributes:
        epoch: the last one begun, from 0.
        rest: samples of it, and of earlier ones, that are read first.
        samples: of the whole set.
    """

    epoch: int
    rest: int
    samples: int


class GoingOn(NamedTuple):
    """Where the lanes of a run go on.

    Attributes:
        packing: with the beginnings that the lanes have from now on.
        states: of all lanes, by their numbers.
        left: of each shard set, after a change.
    """

    packing: PackingConfig
    states: dict[int, dict[str, Any]]
    left: list[Left]


def go_on(packing: PackingConfig, source: ShardSet | Mixture, states: Mapping[int, dict[str, Any]]) -> GoingOn:
    """Go on with as many lanes as before, after a change that may be long ago: a rest that all have read is dropped.

    Args:
        packing: with the beginnings that the checkpoint has.
        source: what the lanes read.
        states: the checkpoint's, of all lanes.

    Raises:
        UserError: a state does not fit the source.
    """
    orders = packing.orders(source)
    stood = _standings(packing.clip_lanes(source, range(packing.lanes)), states)
    kept = [without_rest_if_read(order, standing) for order, standing in zip(orders, stood, strict=True)]
    beginnings = tuple(beginning_state(order.begin) for order in kept)
    return GoingOn(replace(packing, beginnings=beginnings), dict(states), [])


def change_lanes(
    before: PackingConfig,
    packing: PackingConfig,
    source: ShardSet | Mixture,
    states: Mapping[int, dict[str, Any]],
    weights: Sequence[float] | None = None,
) -> GoingOn:
    """Go on with another number of lanes, which first read what those before have left of the epochs begun.

    The lanes before had left out some damaged clips; lane 0 goes on with the count of all.

    Args:
        before: how samples became packs up to the checkpoint, with the beginnings that it has.
        packing: how they do from now on.
        source: what the lanes read.
        states: the checkpoint's, of all lanes.
        weights: that a mixture's sets had.

    Raises:
        UserError: a state does not fit the source, or there are more lanes than samples.
    """
    orders, lanes = before.orders(source), before.clip_lanes(source, range(before.lanes), weights)
    begins = [after_change(order, standing) for order, standing in zip(orders, _standings(lanes, states), strict=True)]
    now = replace(packing, beginnings=tuple(beginning_state(begin) for begin in begins))
    new = now.clip_lanes(source, range(now.lanes))
    new[0].damaged = sum(lane.damaged for lane in lanes.values())
    left = [Left(begin.epoch - 1, begin.left, order.samples) for begin, order in zip(begins, orders, strict=True)]
    return GoingOn(now, {number: lane.state_dict() for number, lane in new.items()}, left)


def _standings(lanes: Mapping[int, ClipLane], states: Mapping[int, dict[str, Any]]) -> list[Standing]:
    """Where the lanes of each shard set stand; moves the lanes there."""
    numbers: list[list[int]] = [[] for _ in lanes[0].lane.parts]
    waiting: list[dict[int, list[int]]] = [{} for _ in numbers]
    for lane, clips in lanes.items():
        pending = clips.load_place(states[lane])
        for part, own in enumerate(clips.lane.parts):
            numbers[part].append(own.number)
        for part, number in clips.lane.parts_of(pending):
            waiting[part].setdefault(lane, []).append(number)
    return [Standing(*each) for each in zip(numbers, waiting, strict=True)]
