"""The rest: what the lanes have left of the epochs begun when their number changes.

The samples that no lane has trained on are laid end to end. Each lane gives those of its clips that wait for a pack,
then what it had still to read, in the order in which it would have read it; last comes what the last epoch would have
left over to the next. This row is cut over the new lanes as an epoch is, and what does not divide goes into the next
epoch as always. So every sample of every epoch is read once, also where the number changes again before the rest is
read: then the new rest holds a part of the old one.

Nothing is listed but a number or so for each of the lanes before; a sample of the rest is found by position.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from far_scale.data.loader.lanes import FIRST_EPOCH, Beginning, LaneOrder, Place
from far_scale.utils.errors import UserError

_WINDOWS = 64  # shuffles kept: new lanes of a rank that each read a part of some lane before


@dataclass(frozen=True)
class Standing:
    """Where the lanes of one shard set stand.

    Attributes:
        numbers: of each lane's next sample.
        waiting: numbers, rising, of the samples that a lane has drawn clips from which no pack has taken yet; of the
            lanes that have any.
    """

    numbers: Sequence[int]
    waiting: Mapping[int, Sequence[int]]

    @property
    def lowest(self) -> int:
        """The number below which no lane needs a sample any more."""
        return min([*self.numbers, *(number for numbers in self.waiting.values() for number in numbers)])


class Rest:
    """What lanes that stood so have left, see above; a `Row`.

    Attributes:
        order: of these lanes.
        standing: where they stood.
        epoch: the first that none of them had begun.
    """

    def __init__(self, order: LaneOrder, standing: Standing) -> None:
        self.order, self.standing = order, standing
        begun = [order.run_position(number - 1)[0] for number in standing.numbers if number > order.begin.number]
        self.epoch = max(begun, default=order.begin.epoch - 1) + 1
        end = order.read_before(self.epoch)
        counts = [end - number + len(self._waiting(lane)) for lane, number in enumerate(standing.numbers)]
        self._ends = np.cumsum([*counts, order.left_over(self.epoch)])
        self._shuffle = functools.lru_cache(maxsize=_WINDOWS)(order.shuffle)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, index: int) -> Place:
        """The sample at an index of the rest."""
        lane, offset, _ = self._find(index)
        if lane == self.order.lanes:
            return self.order.at(self.order.row_end(self.epoch) + offset)
        epoch, position = self.order.run_position(self._number(lane, offset))
        first, length = self.order.window(epoch, position)
        shuffled = first + int(self._shuffle(epoch, lane, first, length)[position - first])
        return self.order.place(epoch, lane, shuffled)

    def shards_from(self, index: int) -> tuple[list[int], int]:
        """The shards that hold the samples from an index on, and how many samples that covers."""
        lane, offset, to_end = self._find(index)
        if lane == self.order.lanes:
            shards, length = self.order.shards_at(self.order.row_end(self.epoch) + offset)
            return shards, min(length, to_end)
        if offset < len(self._waiting(lane)):
            return [self.place(index).shard], 1
        epoch, position = self.order.run_position(self._number(lane, offset))
        first, length = self.order.window(epoch, position)
        at, shards = first, []
        while at < first + length:
            found, samples = self.order.shards_from(epoch, lane, at)
            shards += found
            at += samples
        at = first + (at - first) // length * length  # up to the window that needs another shard, too
        return shards, min(at, self.order.run_length(epoch)) - position

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers from which `load_beginning` makes it again."""
        order, waiting = self.order, self.standing.waiting
        state = {
            "lanes": order.lanes,
            "seed": order.seed,
            "shuffle_window": order.shuffle_window,
            "numbers": list(self.standing.numbers),
            "waiting": {str(lane): list(numbers) for lane, numbers in waiting.items()},
        }
        return state if order.begin == FIRST_EPOCH else {**state, "begin": beginning_state(order.begin)}

    def _find(self, index: int) -> tuple[int, int, int]:
        """The lane that had to read the sample at an index (or how many there were, for what none had to), the index
        among what the lane has left, and how much of that there is from here on."""
        lane = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[lane - 1]) if lane else 0
        return lane, index - before, int(self._ends[lane]) - index

    def _number(self, lane: int, offset: int) -> int:
        waiting = self._waiting(lane)
        return waiting[offset] if offset < len(waiting) else self.standing.numbers[lane] + offset - len(waiting)

    def _waiting(self, lane: int) -> Sequence[int]:
        return self.standing.waiting.get(lane, ())


def after_change(order: LaneOrder, standing: Standing) -> Beginning:
    """How an order begins whose lanes take the place of these, which stood so."""
    rest = Rest(without_rest_if_read(order, standing), standing)
    return Beginning(rest.epoch, len(rest), max(standing.numbers), rest if len(rest) else None)


def without_rest_if_read(order: LaneOrder, standing: Standing) -> LaneOrder:
    """The same order, but without its rest where no lane that stands so needs anything of it any more."""
    begin, left_over = order.begin, order.begin.left % order.lanes
    if begin.rest is None or standing.lowest < order.read_before(begin.epoch + (left_over > 0)):
        return order
    return order.begun_by(Beginning(begin.epoch, left_over, begin.number + begin.left // order.lanes))


def beginning_state(begin: Beginning) -> dict[str, Any]:
    """A beginning in plain numbers, for JSON."""
    if isinstance(begin.rest, Rest):
        return begin.rest.state_dict()
    return {"epoch": begin.epoch, "left": begin.left, "number": begin.number}


def load_beginning(state: Mapping[str, Any], samples_per_shard: Sequence[int], stage: int) -> Beginning:
    """The inverse of `beginning_state`, for a shard set of these shards in a stage.

    Raises:
        UserError: it is no such state.
    """
    try:
        if "lanes" not in state:
            return Beginning(_count(state["epoch"]), _count(state["left"]), _count(state["number"]))
        begin = load_beginning(state["begin"], samples_per_shard, stage) if "begin" in state else FIRST_EPOCH
        lanes, seed, window = (_count(state[key]) for key in ("lanes", "seed", "shuffle_window"))
        order = LaneOrder(samples_per_shard, lanes, seed, window, stage, begin)
        standing = Standing(
            [_count(number) for number in state["numbers"]],
            {int(lane): [_count(number) for number in numbers] for lane, numbers in state["waiting"].items()},
        )
        if len(standing.numbers) != lanes or standing.lowest < begin.number or set(standing.waiting) - {*range(lanes)}:
            raise ValueError(f"these are no numbers of {lanes} lanes")
        return after_change(order, standing)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(
            f"the checkpoint's state does not say how the lanes began after their number changed ({problem}); "
            "take an older checkpoint"
        ) from None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a count should be")
    return value
