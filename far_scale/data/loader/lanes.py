"""Lanes: the order in which samples are read, fixed by the recipe and not by the number of ranks.

An epoch lays the shards end to end in the order of a permutation of (seed, epoch), behind the few samples that the
epoch before left over, and cuts this row into equal runs of samples, one a lane. What does not divide is left over
for the next epoch. A lane reads its run window by window, shuffled within each window.

With N samples and L lanes, epoch e begins with (e N) mod L samples left over. These are the last ones of the row of
epoch e - 1, since a row has at least N >= L new samples. So every position of every epoch is found without any
history, from two permutations of the *shards*; nothing here is as long as the number of samples.

Where the number of lanes has changed within a run, the row begins with what the lanes before have left: see rest.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator


class Place(NamedTuple):
    """A sample: the number of its shard, and its number in the shard."""

    shard: int
    sample: int


class Row(Protocol):
    """Samples laid end to end."""

    def place(self, index: int) -> Place:
        """The sample at an index."""
        ...

    def shards_from(self, index: int) -> tuple[list[int], int]:
        """The shards that hold the samples from an index on, and how many samples that covers."""
        ...


class Beginning(NamedTuple):
    """What comes before an order's first whole epoch; nothing, unless the number of lanes has changed.

    Attributes:
        epoch: the first whole one.
        left: samples that come before it.
        number: of each lane's first sample, such that no lane has had it before: clips are drawn by it.
        rest: the `left` samples; None where all lanes are past them.
    """

    epoch: int = 0
    left: int = 0
    number: int = 0
    rest: Row | None = None


FIRST_EPOCH = Beginning()


class LaneOrder:
    """Which sample stands where, for all lanes and epochs; shared by the lanes of a rank.

    What comes before the first whole epoch counts as the epoch before it.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int],
        lanes: int,
        seed: int,
        shuffle_window: int,
        stage: int = 0,
        begin: Beginning = FIRST_EPOCH,
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
        self.lanes, self.seed, self.shuffle_window, self.stage, self.begin = lanes, seed, shuffle_window, stage, begin
        self._counts = np.asarray(samples_per_shard, dtype=np.int64)
        # Lanes are at most one epoch apart, and an epoch looks at the one before it.
        self._shard_row = functools.lru_cache(maxsize=4)(self._make_shard_row)

    def begun_by(self, begin: Beginning) -> LaneOrder:
        """The same epochs behind another beginning."""
        counts = self._counts.tolist()
        return LaneOrder(counts, self.lanes, self.seed, self.shuffle_window, self.stage, begin)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self._counts)

    def left_over(self, epoch: int) -> int:
        """Samples that the epochs before left to this one."""
        return self._row_begin(epoch) % self.lanes

    def run_length(self, epoch: int) -> int:
        """Samples that each lane reads in this epoch."""
        return self._row_begin(epoch + 1) // self.lanes - self._row_begin(epoch) // self.lanes

    def read_before(self, epoch: int) -> int:
        """The number of each lane's first sample of this epoch: without a change of lanes, what it has read before."""
        return self.begin.number + self._row_begin(epoch) // self.lanes

    def run_position(self, number: int) -> tuple[int, int]:
        """Epoch and position in a lane's run of the sample of this number, of which the first is `begin.number`."""
        row_end = (number - self.begin.number + 1) * self.lanes - self.begin.left
        epoch = self.begin.epoch + max(-1, (row_end - 1) // self.samples)
        return epoch, number - self.read_before(epoch)

    def place(self, epoch: int, lane: int, position: int) -> Place:
        """The sample at an (unshuffled) position of a lane's run."""
        return self.at(self._row_index(epoch, lane, position))

    def at(self, index: int) -> Place:
        """The sample at an index of the endless row: what comes before the first whole epoch, and then all epochs."""
        if index < self.begin.left:
            assert self.begin.rest is not None, "all lanes are past it"
            return self.begin.rest.place(index)
        epoch, position = divmod(index - self.begin.left, self.samples)
        return self._in_shards(self.begin.epoch + epoch, position)

    def window(self, epoch: int, position: int) -> tuple[int, int]:
        """First position and length of the window of a lane's run in which this position is shuffled."""
        if epoch < self.begin.epoch:  # the rest keeps the order that it had
            return position, 1
        first = position // self.shuffle_window * self.shuffle_window
        return first, min(self.shuffle_window, self.run_length(epoch) - first)

    def shuffle(self, epoch: int, lane: int, first: int, length: int) -> NDArray[np.int64]:
        """Where in a window, from its first position on, the samples are that come one after another: `[length]`."""
        if length == 1:
            return np.zeros(1, np.int64)
        draw = generator(self.seed, in_stage(f"shuffle from {first}", self.stage), epoch, lane)
        return draw.permutation(length)

    def shards_from(self, epoch: int, lane: int, position: int) -> tuple[list[int], int]:
        """The shards that hold a run's samples from a position on, and how many samples that covers.

        How the run is shuffled is left aside, but not how the lanes before a change have shuffled theirs.
        """
        return self.shards_at(self._row_index(epoch, lane, position))

    def shards_at(self, index: int) -> tuple[list[int], int]:
        """As `shards_from`, at an index of the endless row."""
        if index < self.begin.left and self.begin.rest is not None:
            return self.begin.rest.shards_from(index)
        place = self.at(index)
        return [place.shard], int(self._counts[place.shard]) - place.sample

    def row_end(self, epoch: int) -> int:
        """The index in the endless row at which the lanes' runs of the epochs before this one end."""
        return self._row_begin(epoch) // self.lanes * self.lanes

    def _row_begin(self, epoch: int) -> int:
        """The index in the endless row of an epoch's first own sample, behind what the epoch before left over."""
        epochs = epoch - self.begin.epoch
        return self.begin.left + epochs * self.samples if epochs >= 0 else 0

    def _row_index(self, epoch: int, lane: int, position: int) -> int:
        return self.row_end(epoch) + lane * self.run_length(epoch) + position

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
        self.epoch, self.position = order.run_position(order.begin.number)
        self._window: tuple[int, int] = (-1, -1)  # epoch and first position of the window that is shuffled now
        self._shuffled: NDArray[np.int64] = np.empty(0, np.int64)

    def __iter__(self) -> Iterator[Place]:
        return self

    @property
    def parts(self) -> list[Lane]:
        """The lanes of single sets that this one is made of: itself."""
        return [self]

    @property
    def first(self) -> int:
        """The number of this lane's first sample."""
        return self.order.begin.number

    @property
    def number(self) -> int:
        """The number of this lane's next sample: without a change of lanes, how many it has read so far."""
        return self.order.read_before(self.epoch) + self.position

    def __next__(self) -> Place:
        place = self.order.place(self.epoch, self.lane, self._shuffled_position())
        self.position += 1
        if self.position == self.order.run_length(self.epoch):
            self.epoch, self.position = self.epoch + 1, 0
        return place

    def _shuffled_position(self) -> int:
        first, length = self.order.window(self.epoch, self.position)
        if self._window != (self.epoch, first):
            self._window = (self.epoch, first)
            self._shuffled = self.order.shuffle(self.epoch, self.lane, first, length)
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

    def parts_of(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Which of `parts` gives the samples of these numbers, and their numbers there."""
        return [(0, number) for number in numbers]
