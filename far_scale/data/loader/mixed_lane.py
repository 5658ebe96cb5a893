"""A lane that reads several shard sets, each as a lane of that set alone would read it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from far_scale.data.loader.lanes import Lane, LaneOrder, Place, in_stage
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator


class MixtureLane:
    """One endless stream of samples out of several sets. Its state is how many samples it has read of each.

    Which set a sample comes from is drawn at the counter (number of the sample in the lane, lane), so it depends on
    neither ranks nor history. A `Place` counts the shards of all sets, one set after the other.

    Attributes:
        lane: its number.
        parts: its lane of each set.
    """

    def __init__(self, orders: Sequence[LaneOrder], shares: Sequence[float], lane: int) -> None:
        """`orders` of the sets, of equal lanes, seed and stage; `shares` of the samples that each set gives."""
        self.lane, self._order = lane, orders[0]
        self.parts = [Lane(order, lane) for order in orders]
        self._first_shards = list(itertools.accumulate((order.shards for order in orders[:-1]), initial=0))
        self._sums = list(itertools.accumulate(shares))

    def __iter__(self) -> Iterator[Place]:
        return self

    @property
    def first(self) -> int:
        """The number of this lane's first sample."""
        return sum(lane.first for lane in self.parts)

    @property
    def number(self) -> int:
        """The number of this lane's next sample: without a change of lanes, how many it has read so far."""
        return sum(lane.number for lane in self.parts)

    def __next__(self) -> Place:
        chosen = self._set_of(self.number)
        place = next(self.parts[chosen])
        return Place(self._first_shards[chosen] + place.shard, place.sample)

    def state_dict(self) -> dict[str, list[int]]:
        """The number of the next sample of each set: without a change of lanes, how many were read."""
        return {"read": [lane.number for lane in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state.

        Raises:
            UserError: it is that of a single set, or of another number of sets.
        """
        read = state.get("read")
        known = set(state) == {"read"} and isinstance(read, list) and len(read) == len(self.parts)
        firsts = [lane.first for lane in self.parts]
        if not (known and all(type(n) is int and n >= first for n, first in zip(read or [], firsts, strict=True))):
            raise UserError(
                f"lane {self.lane}: {state} is no place in a mixture of {len(self.parts)} shard sets; resume with the "
                "data.shards that the checkpoint was made with"
            )
        self._go_to(read or [])

    def go_to(self, number: int) -> None:
        """Make the sample of this number the next one; one draw is done again for each sample that lies between.

        Raises:
            UserError: the samples read so far were drawn with other weights.
        """
        read = [lane.number for lane in self.parts]
        now = sum(read)
        for before in range(now - 1, number - 1, -1):
            read[self._set_of(before)] -= 1
        for after in range(now, number):
            read[self._set_of(after)] += 1
        if any(count < lane.first for count, lane in zip(read, self.parts, strict=True)):
            raise UserError(
                f"lane {self.lane}: sample {number} of the mixture is not to be found by these weights; resume with "
                "the data.shards that the checkpoint was made with"
            )
        self._go_to(read)

    def parts_of(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Which of `parts` gives the samples of these numbers, and their numbers there; draws as `go_to`.

        Raises:
            UserError: as `go_to`.
        """
        here, found = [lane.number for lane in self.parts], []
        for number in numbers:
            self.go_to(number)
            chosen = self._set_of(number)
            found.append((chosen, self.parts[chosen].number))
        self._go_to(here)
        return found

    def _go_to(self, read: Sequence[int]) -> None:
        for lane, count in zip(self.parts, read, strict=True):
            lane.go_to(count)

    def _set_of(self, number: int) -> int:
        draw = generator(self._order.seed, in_stage("mixture", self._order.stage), number, self.lane).random()
        return min(bisect.bisect_right(self._sums, draw * self._sums[-1]), len(self._sums) - 1)
