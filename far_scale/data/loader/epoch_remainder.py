"""What the lanes have not yet read of the epochs begun when their number changes.

The samples that no lane has trained on are laid end to end: for each lane those of its clips that wait for a pack, then
what it had still to read, in its order; last comes what the last epoch would have carried over to the next. This row is
cut over the new lanes as an epoch is, and a remainder of the division goes into the next epoch as always. So every
sample of every epoch is read once, also where the number of lanes changes again before the remainder is read: the new
remainder then holds a part of the old one.

Only a few numbers for each old lane are stored; a sample of the remainder is found by its index.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from far_scale.data.loader.lanes import FIRST_EPOCH, Beginning, LaneOrder, SampleRef
from far_scale.utils.errors import UserError

_CACHED_SHUFFLES = 64  # enough for a rank's new lanes, which each read a part of an old one


@dataclass(frozen=True)
class LanePositions:
    """Where the lanes of one shard set are.

    Attributes:
        numbers: of each lane's next sample.
        waiting: by lane, the numbers (rising) of samples drawn but not yet in a pack; lanes without any are absent.
    """

    numbers: Sequence[int]
    waiting: Mapping[int, Sequence[int]]

    @property
    def lowest(self) -> int:
        """The lowest number of a sample that a lane still needs."""
        return min([*self.numbers, *(number for numbers in self.waiting.values() for number in numbers)])


class EpochRemainder:
    """The samples that lanes at these positions have not read, as described above; a `SampleSequence`.

    Attributes:
        order: of these lanes.
        positions: of these lanes.
        epoch: the first that no lane had begun.
    """

    def __init__(self, order: LaneOrder, positions: LanePositions) -> None:
        self.order, self.positions = order, positions
        begun = [order.run_position(number - 1)[0] for number in positions.numbers if number > order.beginning.number]
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
            return self.order.sample_at(self.order.row_end(self.epoch) + offset)
        epoch, position = self.order.run_position(self._number(lane, offset))
        first, length = self.order.window(epoch, position)
        shuffled = first + int(self._shuffle(epoch, lane, first, length)[position - first])
        return self.order.sample_of_run(epoch, lane, shuffled)

    def shards_at(self, index: int) -> tuple[list[int], int]:
        """The shards that hold the samples from an index on, and how many samples that covers."""
        lane, offset, to_end = self._locate(index)
        if lane == self.order.lanes:
            shards, length = self.order.shards_at(self.order.row_end(self.epoch) + offset)
            return shards, min(length, to_end)
        if offset < len(self._waiting(lane)):
            return [self.sample_at(index).shard], 1
        epoch, position = self.order.run_position(self._number(lane, offset))
        first, length = self.order.window(epoch, position)
        covered, shards = first, []
        while covered < first + length:
            more, samples = self.order.shards_of_run(epoch, lane, covered)
            shards += more
            covered += samples
        # Only whole windows: the one in which a shard ends is shuffled with the next shard.
        covered = first + (covered - first) // length * length
        return shards, min(covered, self.order.run_length(epoch)) - position

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
        """Where the sample at an index comes from.

        Returns:
            The lane that had to read it (the number of lanes for a sample carried over), the index within what
            that lane has not read, and how many samples of it there are from here on.
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
    """The same order, without its remainder where no lane at these positions needs a sample of it any more."""
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
    """The inverse of `beginning_state`, for a shard set of these shards in a stage.

    Raises:
        UserError: it is no such state.
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
            raise ValueError(f"these are no numbers of {lanes} lanes")
        return beginning_after(order, positions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the checkpoint's `beginnings`, the state after a change of data.lanes, cannot be read ({error}); "
            "take an older checkpoint"
        ) from None


def _check_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a count should be")
    return value
