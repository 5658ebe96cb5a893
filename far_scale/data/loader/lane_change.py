"""Continues the lanes from the states in a checkpoint, also if the number of lanes changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from far_scale.data.loader.epoch_remainder import (
    LanePositions,
    beginning_after,
    beginning_state,
    drop_finished_remainder,
)
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.packing import PackedLane, PackingConfig
from far_scale.data.shards.shard_set import ShardSet


class UnreadSamples(NamedTuple):
    """Counts of unread samples of a shard set when the number of lanes changes.

    Attributes:
        epoch: the last epoch begun, from 0.
        remaining: unread samples of this and earlier epochs, which are read first.
        samples: samples of the whole set.
    """

    epoch: int
    remaining: int
    samples: int


class Continuation(NamedTuple):
    """How the lanes of a run continue.

    Attributes:
        packing: the packing with the new beginnings of the lanes.
        states: states of all lanes, by their index.
        unread: one for each shard set; empty without a change.
    """

    packing: PackingConfig
    states: dict[int, dict[str, Any]]
    unread: list[UnreadSamples]


def continue_lanes(
    packing: PackingConfig, source: ShardSet | Mixture, states: Mapping[int, dict[str, Any]]
) -> Continuation:
    """Continue with as many lanes as before; the remainder of an earlier change is dropped if all lanes have read it.

    Args:
        packing: with the beginnings of the checkpoint.
        source: what the lanes read.
        states: states of all lanes in the checkpoint.

    Raises:
        UserError: a state does not fit the source.
    """
    orders = packing.lane_orders(source)
    positions = _restore_positions(packing.make_lanes(source, range(packing.lanes)), states)
    orders = [drop_finished_remainder(*pair) for pair in zip(orders, positions, strict=True)]
    beginnings = tuple(beginning_state(order.beginning) for order in orders)
    return Continuation(replace(packing, beginnings=beginnings), dict(states), [])


def change_lanes(
    before: PackingConfig,
    packing: PackingConfig,
    source: ShardSet | Mixture,
    states: Mapping[int, dict[str, Any]],
    weights: Sequence[float] | None = None,
) -> Continuation:
    """Continue with another number of lanes, which first read the rest of the epochs that the old lanes have begun.

    The new lane 0 starts with the number of damaged clips that all old lanes have skipped.

    Args:
        before: the packing up to the checkpoint, with its beginnings.
        packing: the packing from now on.
        source: what the lanes read.
        states: states of all lanes in the checkpoint.
        weights: weights of a mixture's sets up to the checkpoint.

    Raises:
        UserError: a state does not fit the source, or there are more lanes than samples.
    """
    orders, old_lanes = before.lane_orders(source), before.make_lanes(source, range(before.lanes), weights)
    positions = _restore_positions(old_lanes, states)
    beginnings = [beginning_after(*pair) for pair in zip(orders, positions, strict=True)]
    packing = replace(packing, beginnings=tuple(map(beginning_state, beginnings)))
    new_lanes = packing.make_lanes(source, range(packing.lanes))
    new_lanes[0].damaged = sum(lane.damaged for lane in old_lanes.values())
    unread = [
        UnreadSamples(beginning.epoch - 1, beginning.remaining, order.samples)
        for beginning, order in zip(beginnings, orders, strict=True)
    ]
    return Continuation(packing, {index: lane.state_dict() for index, lane in new_lanes.items()}, unread)


def _restore_positions(lanes: Mapping[int, PackedLane], states: Mapping[int, dict[str, Any]]) -> list[LanePositions]:
    """Move all lanes to their states; returns their positions in each shard set."""
    sets = len(lanes[0].sample_lane.set_lanes)
    numbers: list[list[int]] = [[] for _ in range(sets)]
    waiting: list[dict[int, list[int]]] = [{} for _ in range(sets)]
    for index, lane in lanes.items():
        pending = lane.load_position(states[index])
        for set_numbers, set_lane in zip(numbers, lane.sample_lane.set_lanes, strict=True):
            set_numbers.append(set_lane.next_number)
        for set_index, number in lane.sample_lane.locate(pending):
            waiting[set_index].setdefault(index, []).append(number)
    return [LanePositions(*pair) for pair in zip(numbers, waiting, strict=True)]
