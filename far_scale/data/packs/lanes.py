"""Lanes: the order in which samples are read, fixed by the recipe and not by the number of ranks.

An epoch lays the shards end to end in the order of a permutation of (seed, epoch), behind the few samples that the
epoch before left over, and cuts this row into equal runs of samples, one a lane. What does not divide is left over
for the next epoch. A lane reads its run window by window, shuffled within each window.

With N samples and L lanes, epoch e begins with (e N) mod L samples left over. These are the last ones of the row of
epoch e - 1, since a row has at least N >= L new samples. So every position of every epoch is found without any
history, from two permutations of the *shards*; nothing here is as long as the number of samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from far_scale.errors import UserError
from far_scale.randomness import generator


class Place(NamedTuple):
    """A sample: the number of its shard, and its number in the shard."""

    shard: int
    sample: int


class LaneOrder:
    """Which sample stands where, for all lanes and epochs; shared by the lanes of a rank."""

    def __init__(
        self, samples_per_shard: Sequence[int], lanes: int, seed: int, shuffle_window: int, stage: int = 0
    ) -> None:
        """`shuffle_window` is in samples; 1 reads each run in its order. Each `stage` has an order of its own.

        Raises:
            UserError: there are more lanes than samples.
        """
        self.samples = int(sum(samples_per_shard))
        if lanes < 1 or shuffle_window < 1:
            raise UserError(f"data.lanes={lanes} and data.shuffle_window={shuffle_window} must be at least 1")
        if lanes > self.samples:
            raise UserError(
                f"data.lanes={lanes} is more than the {self.samples} samples of the shard set; "
                "lower data.lanes, or encode more videos"
            )
        self.lanes, self.seed, self.shuffle_window, self.stage = lanes, seed, shuffle_window, stage
        self._counts = np.asarray(samples_per_shard, dtype=np.int64)
        # Lanes are at most one epoch apart, and an epoch looks at the one before it.
        self._shard_row = functools.lru_cache(maxsize=4)(self._make_shard_row)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self._counts)

    def left_over(self, epoch: int) -> int:
        """Samples that the epochs before left to this one."""
        return epoch * self.samples % self.lanes

    def run_length(self, epoch: int) -> int:
        """Samples that each lane reads in this epoch."""
        return (self.left_over(epoch) + self.samples) // self.lanes

    def read_before(self, epoch: int) -> int:
        """Samples that each lane has read when this epoch begins."""
        return epoch * self.samples // self.lanes

    def run_position(self, number: int) -> tuple[int, int]:
        """Epoch and position in a lane's run of the sample that the lane reads as its `number`-th, from 0."""
        epoch = ((number + 1) * self.lanes - 1) // self.samples
        return epoch, number - self.read_before(epoch)

    def place(self, epoch: int, lane: int, position: int) -> Place:
        """The sample at an (unshuffled) position of a lane's run."""
        row_position = lane * self.run_length(epoch) + position
        left_over = self.left_over(epoch)
        if row_position < left_over:
            return self._in_shards(epoch - 1, self.samples - left_over + row_position)
        return self._in_shards(epoch, row_position - left_over)

    def _in_shards(self, epoch: int, position: int) -> Place:
        order, ends = self._shard_row(epoch)
        slot = int(np.searchsorted(ends, position, side="right"))
        shard = int(order[slot])
        return Place(shard, position - int(ends[slot] - self._counts[shard]))

    def _make_shard_row(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in this epoch's order, and where in the row each one ends."""
        order = generator(self.seed, in_stage("shard order", self.stage), epoch).permutation(len(self._counts))
        return order, np.cumsum(self._counts[order])


def in_stage(purpose: str, stage: int) -> str:
    """The purpose of a random draw in a stage of a curriculum; the first stage's is that of a run without stages."""
    return f"{purpose} in stage {stage}" if stage else purpose


class Lane:
    """One endless stream of samples. Its whole state is two integers, and restoring it replays nothing."""

    def __init__(self, order: LaneOrder, lane: int) -> None:
        if not 0 <= lane < order.lanes:
            raise ValueError(f"lane {lane} of {order.lanes}")
        self.order, self.lane = order, lane
        self.epoch, self.position = 0, 0
        self._window: tuple[int, int] = (-1, -1)  # epoch and first position of the window that is shuffled now
        self._shuffled: NDArray[np.int64] = np.empty(0, np.int64)

    def __iter__(self) -> Iterator[Place]:
        return self

    @property
    def parts(self) -> list[Lane]:
        """The lanes of single sets that this one is made of: itself."""
        return [self]

    @property
    def number(self) -> int:
        """How many samples this lane has read so far, which is the number of the next one."""
        return self.order.read_before(self.epoch) + self.position

    def __next__(self) -> Place:
        place = self.order.place(self.epoch, self.lane, self._shuffled_position())
        self.position += 1
        if self.position == self.order.run_length(self.epoch):
            self.epoch, self.position = self.epoch + 1, 0
        return place

    def _shuffled_position(self) -> int:
        size = self.order.shuffle_window
        first = self.position // size * size
        if self._window != (self.epoch, first):
            length = min(size, self.order.run_length(self.epoch) - first)
            purpose = in_stage(f"shuffle from {first}", self.order.stage)
            draw = generator(self.order.seed, purpose, self.epoch, self.lane)
            self._window, self._shuffled = (self.epoch, first), draw.permutation(length)
        return first + int(self._shuffled[self.position - first])

    def state_dict(self) -> dict[str, int]:
        """The next sample's epoch and position in the lane's run."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state.

        Raises:
            UserError: there is no such position, as with the state of another shard set or number of lanes.
        """
        epoch: Any = state.get("epoch")
        position: Any = state.get("position")
        known = set(state) == {"epoch", "position"} and isinstance(epoch, int) and isinstance(position, int)
        if not (known and epoch >= 0 and 0 <= position < self.order.run_length(epoch)):
            raise UserError(
                f"lane {self.lane}: there is no place {state} among {self.order.samples} samples in {self.order.lanes} "
                "lanes; resume with the shard set and the data.lanes that the checkpoint was made with"
            )
        self.epoch, self.position = epoch, position

    def go_to(self, number: int) -> None:
        """Make the sample of this number the next one."""
        self.epoch, self.position = self.order.run_position(number)
