"""The samples of the begun epochs that the lanes have not read when the number of lanes changes.

These samples form one sequence: for each old lane its pending clips (drawn, but not in a pack yet), then the rest of
its segment, in its order; at the end the samples that the last epoch would have carried over. The sequence is cut into
segments of the new lanes like an epoch, and the remainder of this division is carried over as usual. So every sample of
every epoch is read once, even if the number of lanes changes again before then: the new remainder then contains a part
of the old one.

Only a few numbers per old lane are stored; a sample of the remainder is computed from its index.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from far_scale.data.loader.lanes import FIRST_EPOCH, Beginning, LaneOrder, SampleRef
from far_scale.utils.errors import UserError

_CACHED_SHUFFLES = 64  # enough for the new lanes of a rank: each reads a part of an old lane


@dataclass(frozen=True)
class LanePositions:
    """The positions of the lanes of one shard set.

    Attributes:
        numbers: the number of each lane's next sample.
        waiting: by lane, the rising numbers of samples drawn but not yet in a pack; lanes without any are absent.
    """

    numbers: Sequence[int]
    waiting: Mapping[int, Sequence[int]]

    @property
    def lowest(self) -> int:
        """The lowest number of a sample that a lane still needs."""
        return min([*self.numbers, *(number for numbers in self.waiting.values() for number in numbers)])


class EpochRemainder:
    """The `SampleSequence` that lanes at these positions have not read, see above.

    Attributes:
        order, positions: those of the old lanes.
        epoch: the first epoch that no lane had begun.
    """

    def __init__(self, order: LaneOrder, positions: LanePositions) -> None:
        self.order, self.positions = order, positions
        begun = [
            order.segment_position(number - 1)[0] for number in positions.numbers if number > order.beginning.number
        ]
        self.epoch = max(begun, default=order.beginning.epoch - 1) + 1
        end = order.first_number(self.epoch)
        counts = [end - number + len(self._waiting(lane)) for lane, number in enumerate(positions.numbers)]
        self._ends = np.cumsum([*counts, order.carried_over(self.epoch)])
        self._shuffle = functools.lru_cache(maxsize=_CACHED_SHUFFLES)(order.shuffle)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample_at(self, index: int) -> SampleRef:
        """The sample at an index of the remainder."""
        lane, offset, _ = self._locate(index)
        if lane == self.order.lanes:
            return self.order.sample_at(self.order.segments_begin(self.epoch) + offset)
        epoch, position = self.order.segment_position(self._number(lane, offset))
        first, length = self.order.window(epoch, position)
        shuffled = first + int(self._shuffle(epoch, lane, first, length)[position - first])
        return self.order.sample_in_segment(epoch, lane, shuffled)

    def shards_at(self, index: int) -> tuple[list[int], int]:
        """The shards that hold the samples from an index on, and the number of samples covered."""
        lane, offset, to_end = self._locate(index)
        if lane == self.order.lanes:
            shards, length = self.order.shards_at(self.order.segments_begin(self.epoch) + offset)
            return shards, min(length, to_end)
        if offset < len(self._waiting(lane)):
            return [self.sample_at(index).shard], 1
        epoch, position = self.order.segment_position(self._number(lane, offset))
        first, length = self.order.window(epoch, position)
        covered, shards = first, []
        while covered < first + length:
            more, samples = self.order.shards_in_segment(epoch, lane, covered)
            shards += more
            covered += samples
        # Only whole windows: the window in which a shard ends also has samples of the next shard.
        covered = first + (covered - first) // length * length
        return shards, min(covered, self.order.segment_length(epoch)) - position

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_beginning`."""
        order, waiting = self.order, self.positions.waiting
        state = {
            "lanes": order.lanes,
            "seed": order.seed,
            "shuffle_window": order.shuffle_window,
            "numbers": list(self.positions.numbers),
            "waiting": {str(lane): list(numbers) for lane, numbers in waiting.items()},
        }
        return state if order.beginning == FIRST_EPOCH else {**state, "begin": beginning_state(order.beginning)}

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Find the old lane of the sample at an index.

        Returns:
            The lane (the number of lanes for a sample carried over), the index among the lane's unread samples, and
            the number of them from there on.
        """
        lane = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[lane - 1]) if lane else 0
        return lane, index - before, int(self._ends[lane]) - index

    def _number(self, lane: int, offset: int) -> int:
        waiting = self._waiting(lane)
        return waiting[offset] if offset < len(waiting) else self.positions.numbers[lane] + offset - len(waiting)

    def _waiting(self, lane: int) -> Sequence[int]:
        return self.positions.waiting.get(lane, ())


def beginning_after(order: LaneOrder, positions: LanePositions) -> Beginning:
    """The beginning of the order that replaces this one when its lanes are at these positions."""
    remainder = EpochRemainder(drop_finished_remainder(order, positions), positions)
    last_number = max(positions.numbers)
    return Beginning(remainder.epoch, len(remainder), last_number, remainder if len(remainder) else None)


def drop_finished_remainder(order: LaneOrder, positions: LanePositions) -> LaneOrder:
    """The same order, without its remainder if no lane at these positions still needs a sample of it."""
    beginning = order.beginning
    carried_over = beginning.remaining % order.lanes
    if beginning.remainder is None or positions.lowest < order.first_number(beginning.epoch + (carried_over > 0)):
        return order
    number = beginning.number + beginning.remaining // order.lanes
    return order.with_beginning(Beginning(beginning.epoch, carried_over, number))


def beginning_state(beginning: Beginning) -> dict[str, Any]:
    """A beginning in plain numbers, for JSON."""
    if isinstance(beginning.remainder, EpochRemainder):
        return beginning.remainder.state_dict()
    return {"epoch": beginning.epoch, "left": beginning.remaining, "number": beginning.number}


def load_beginning(state: Mapping[str, Any], samples_per_shard: Sequence[int], stage: int) -> Beginning:
    """The inverse of `beginning_state`, for a shard set with these shards in a stage.

    Raises:
        UserError: the state is invalid.
    """
    try:
        if "lanes" not in state:
            epoch, remaining, number = (_check_count(state[key]) for key in ("epoch", "left", "number"))
            return Beginning(epoch, remaining, number)
        beginning = load_beginning(state["begin"], samples_per_shard, stage) if "begin" in state else FIRST_EPOCH
        lanes, seed, window = (_check_count(state[key]) for key in ("lanes", "seed", "shuffle_window"))
        order = LaneOrder(samples_per_shard, lanes, seed, window, stage, beginning)
        positions = LanePositions(
            [_check_count(number) for number in state["numbers"]],
            {int(lane): [_check_count(number) for number in numbers] for lane, numbers in state["waiting"].items()},
        )
        known_lanes = not set(positions.waiting) - set(range(lanes))
        if len(positions.numbers) != lanes or positions.lowest < beginning.number or not known_lanes:
            raise ValueError(f"these are not positions of {lanes} lanes")
        return beginning_after(order, positions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the checkpoint's `beginnings`, the state after a change of data.lanes, cannot be read ({error}); "
            "take an older checkpoint"
        ) from None


def _check_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
