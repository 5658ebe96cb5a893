"""A lane of a mixture: it reads several shard sets, each in the order of a lane of that set."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from far_scale.data.loader.lanes import Lane, LaneOrder, SampleRef, in_stage
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator


class MixtureLane:
    """One endless stream of samples of several sets: an iterator with a state of one integer per set.

    The set of a sample is drawn with the counter (number of the sample in the lane, lane), so it depends on neither
    ranks nor history. A `SampleRef` numbers the shards of all sets consecutively.

    Attributes:
        index: index of the lane.
        set_lanes: the lane of each set that it reads.
    """

    def __init__(self, orders: Sequence[LaneOrder], weights: Sequence[float], index: int) -> None:
        """`orders` of the sets, with equal lanes, seed and stage; `weights` of the sets, in samples."""
        self.index, self._order = index, orders[0]
        self.set_lanes = [Lane(order, index) for order in orders]
        self._first_shards = list(itertools.accumulate((order.shards for order in orders[:-1]), initial=0))
        self._cumulative_weights = list(itertools.accumulate(weights))

    @property
    def first_number(self) -> int:
        """The number of this lane's first sample; 0, unless the number of lanes has changed."""
        return sum(lane.first_number for lane in self.set_lanes)

    @property
    def next_number(self) -> int:
        """The number of this lane's next sample."""
        return sum(lane.next_number for lane in self.set_lanes)

    def __iter__(self) -> Iterator[SampleRef]:
        return self

    def __next__(self) -> SampleRef:
        chosen = self._draw_set(self.next_number)
        sample = next(self.set_lanes[chosen])
        return SampleRef(self._first_shards[chosen] + sample.shard, sample.sample)

    def state_dict(self) -> dict[str, list[int]]:
        """The number of the next sample of each set: how many were read, unless the number of lanes has changed."""
        return {"read": [lane.next_number for lane in self.set_lanes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state; no draw is repeated.

        Raises:
            UserError: the state is one of a single set, or of another number of sets.
        """
        read: Any = state.get("read")
        firsts = [lane.first_number for lane in self.set_lanes]
        well_formed = set(state) == {"read"} and isinstance(read, list) and len(read) == len(firsts)
        if not (well_formed and all(type(n) is int and n >= first for n, first in zip(read, firsts, strict=True))):
            raise UserError(
                f"lane {self.index}: {state} is not a position in a mixture of {len(self.set_lanes)} shard sets; "
                "resume with the data.shards that the checkpoint was made with"
            )
        self._set_numbers(read)

    def go_to(self, number: int) -> None:
        """Make the sample of this number the next one; the draws in between are repeated.

        Raises:
            UserError: the samples read so far were drawn with other weights.
        """
        read = [lane.next_number for lane in self.set_lanes]
        current = sum(read)
        for before in range(current - 1, number - 1, -1):
            read[self._draw_set(before)] -= 1
        for after in range(current, number):
            read[self._draw_set(after)] += 1
        if any(count < lane.first_number for count, lane in zip(read, self.set_lanes, strict=True)):
            raise UserError(
                f"lane {self.index}: sample {number} of the mixture cannot be found with these weights; resume with "
                "the data.shards that the checkpoint was made with"
            )
        self._set_numbers(read)

    def locate(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """For the samples of these numbers: the index in `set_lanes`, and the sample's number in that lane.

        Raises:
            UserError: as by `go_to`.
        """
        current = [lane.next_number for lane in self.set_lanes]
        located = []
        for number in numbers:
            self.go_to(number)
            chosen = self._draw_set(number)
            located.append((chosen, self.set_lanes[chosen].next_number))
        self._set_numbers(current)
        return located

    def _set_numbers(self, numbers: Sequence[int]) -> None:
        for lane, number in zip(self.set_lanes, numbers, strict=True):
            lane.go_to(number)

    def _draw_set(self, number: int) -> int:
        draw = generator(self._order.seed, in_stage("mixture", self._order.stage), number, self.index).random()
        sums = self._cumulative_weights
        return min(bisect.bisect_right(sums, draw * sums[-1]), len(sums) - 1)
