"""Lanes: the order in which samples are read, fixed by the recipe and not by the number of ranks.

An epoch is a sequence of samples: the few that the previous epoch has carried over, then the shards in the order of a
permutation of (seed, epoch). It is cut into equal segments, one per lane; the remainder of this division is carried
over to the next epoch. A lane reads its segment window by window, shuffled within each window.

With N samples and L lanes, epoch e begins with (e N) mod L samples carried over. These are the last ones of epoch
e - 1, which has N >= L new samples. So every position of every epoch is computed without any history, from two
permutations of the *shards*; no array here is as long as the number of samples.

A lane numbers its samples consecutively over all epochs; clips are drawn at these numbers.

After a change of the number of lanes, the first epoch begins with what the old lanes have not read: see
epoch_remainder.py. All epochs together form the *endless sequence*, to which the indices here refer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator


class SampleRef(NamedTuple):
    """The number of a shard, and a sample's number in it."""

    shard: int
    sample: int


class SampleSequence(Protocol):
    """An indexed sequence of samples, stored in shards."""

    def sample_at(self, index: int) -> SampleRef:
        """The sample at an index."""
        ...

    def shards_at(self, index: int) -> tuple[list[int], int]:
        """The shards that hold the samples from an index on, and the number of samples covered."""
        ...


class Beginning(NamedTuple):
    """What an order reads before its first whole epoch; nothing, unless the number of lanes has changed.

    Attributes:
        epoch: the first whole one.
        remaining: samples that come before it.
        number: of each lane's first sample; higher than any number used before, so that no random draw is repeated.
        remainder: the `remaining` samples; None if all lanes have read them.
    """

    epoch: int = 0
    remaining: int = 0
    number: int = 0
    remainder: SampleSequence | None = None


FIRST_EPOCH = Beginning()


class LaneOrder:
    """The position of every sample, for all lanes and epochs; shared by the lanes of a rank.

    Samples before the first whole epoch count as the epoch before it.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int],
        lanes: int,
        seed: int,
        shuffle_window: int,
        stage: int = 0,
        beginning: Beginning = FIRST_EPOCH,
    ) -> None:
        """`shuffle_window` is in samples; 1 does not shuffle a segment. Each `stage` has another order.

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
        self.beginning = beginning
        self._counts = np.asarray(samples_per_shard, dtype=np.int64)
        # Lanes are at most one epoch apart, and an epoch looks at the one before it.
        self._shard_order = functools.lru_cache(maxsize=4)(self._order_shards)

    def with_beginning(self, beginning: Beginning) -> LaneOrder:
        """The same epochs after another beginning."""
        counts = self._counts.tolist()
        return LaneOrder(counts, self.lanes, self.seed, self.shuffle_window, self.stage, beginning)

    @property
    def shards(self) -> int:
        """The number of shards."""
        return len(self._counts)

    def carried_over(self, epoch: int) -> int:
        """Samples of earlier epochs that are read in this one."""
        return self._epoch_begin(epoch) % self.lanes

    def segment_length(self, epoch: int) -> int:
        """Samples that each lane reads in this epoch."""
        return self._epoch_begin(epoch + 1) // self.lanes - self._epoch_begin(epoch) // self.lanes

    def first_number(self, epoch: int) -> int:
        """The number of each lane's first sample of this epoch."""
        return self.beginning.number + self._epoch_begin(epoch) // self.lanes

    def segment_position(self, number: int) -> tuple[int, int]:
        """Epoch and position in a lane's segment of a sample, by its number (`beginning.number` or higher)."""
        end = (number - self.beginning.number + 1) * self.lanes - self.beginning.remaining
        epoch = self.beginning.epoch + max(-1, (end - 1) // self.samples)
        return epoch, number - self.first_number(epoch)

    def sample_in_segment(self, epoch: int, lane: int, position: int) -> SampleRef:
        """The sample at an (unshuffled) position of a lane's segment."""
        return self.sample_at(self._sequence_index(epoch, lane, position))

    def sample_at(self, index: int) -> SampleRef:
        """The sample at an index of the endless sequence: the remainder of old lanes, if any, then all whole epochs."""
        if index < self.beginning.remaining:
            assert self.beginning.remainder is not None, "all lanes have read it"
            return self.beginning.remainder.sample_at(index)
        epoch, position = divmod(index - self.beginning.remaining, self.samples)
        return self._in_shards(self.beginning.epoch + epoch, position)

    def window(self, epoch: int, position: int) -> tuple[int, int]:
        """First position and length of the shuffle window around this position of a lane's segment."""
        if epoch < self.beginning.epoch:  # the remainder is shuffled already
            return position, 1
        first = position // self.shuffle_window * self.shuffle_window
        return first, min(self.shuffle_window, self.segment_length(epoch) - first)

    def shuffle(self, epoch: int, lane: int, first: int, length: int) -> NDArray[np.int64]:
        """The order of the window that begins at position `first`, as offsets from there: `[length]`."""
        if length == 1:
            return np.zeros(1, np.int64)
        draw = generator(self.seed, in_stage(f"shuffle from {first}", self.stage), epoch, lane)
        return draw.permutation(length)

    def shards_in_segment(self, epoch: int, lane: int, position: int) -> tuple[list[int], int]:
        """The shards that hold a segment's samples from a position on, and the number of samples covered.

        Ignores the shuffling of this lane, but not the shuffling of a remainder by the old lanes.
        """
        return self.shards_at(self._sequence_index(epoch, lane, position))

    def shards_at(self, index: int) -> tuple[list[int], int]:
        """Like `shards_in_segment`, from an index of the endless sequence on."""
        if index < self.beginning.remaining and self.beginning.remainder is not None:
            return self.beginning.remainder.shards_at(index)
        sample = self.sample_at(index)
        return [sample.shard], int(self._counts[sample.shard]) - sample.sample

    def segments_begin(self, epoch: int) -> int:
        """The index in the endless sequence at which the lanes' segments of this epoch begin."""
        return self._epoch_begin(epoch) // self.lanes * self.lanes

    def _epoch_begin(self, epoch: int) -> int:
        """The index in the endless sequence of an epoch's first new sample, after those carried over to it."""
        epochs = epoch - self.beginning.epoch
        return self.beginning.remaining + epochs * self.samples if epochs >= 0 else 0

    def _sequence_index(self, epoch: int, lane: int, position: int) -> int:
        return self.segments_begin(epoch) + lane * self.segment_length(epoch) + position

    def _in_shards(self, epoch: int, position: int) -> SampleRef:
        order, ends = self._shard_order(epoch)
        slot = int(np.searchsorted(ends, position, side="right"))
        shard = int(order[slot])
        return SampleRef(shard, position - int(ends[slot] - self._counts[shard]))

    def _order_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in this epoch's order, and the index in the epoch at which each one ends."""
        order = generator(self.seed, in_stage("shard order", self.stage), epoch).permutation(len(self._counts))
        return order, np.cumsum(self._counts[order])


def in_stage(purpose: str, stage: int) -> str:
    """The purpose of a random draw in a stage of a curriculum; in the first stage the same as without a curriculum."""
    return f"{purpose} in stage {stage}" if stage else purpose


class Lane:
    """One endless stream of samples of a shard set: an iterator with a state of two integers.

    Attributes:
        order: of the shard set's samples.
        index: which lane.
        epoch, position: those of the next sample; the position is in this lane's segment.
    """

    def __init__(self, order: LaneOrder, index: int) -> None:
        if not 0 <= index < order.lanes:
            raise ValueError(f"lane {index} of {order.lanes}")
        self.order, self.index = order, index
        self.epoch, self.position = order.segment_position(order.beginning.number)
        self._window: tuple[int, int] = (-1, -1)  # epoch and first position of the window in `_shuffled`
        self._shuffled: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def set_lanes(self) -> list[Lane]:
        """The lanes of single shard sets that this one reads: only itself."""
        return [self]

    @property
    def first_number(self) -> int:
        """The number of this lane's first sample; 0, unless the number of lanes has changed."""
        return self.order.beginning.number

    @property
    def next_number(self) -> int:
        """The number of this lane's next sample."""
        return self.order.first_number(self.epoch) + self.position

    def __iter__(self) -> Iterator[SampleRef]:
        return self

    def __next__(self) -> SampleRef:
        sample = self.order.sample_in_segment(self.epoch, self.index, self._shuffled_position())
        self.position += 1
        if self.position == self.order.segment_length(self.epoch):
            self.epoch, self.position = self.epoch + 1, 0
        return sample

    def _shuffled_position(self) -> int:
        first, length = self.order.window(self.epoch, self.position)
        if self._window != (self.epoch, first):
            self._window = (self.epoch, first)
            self._shuffled = self.order.shuffle(self.epoch, self.index, first, length)
        return first + int(self._shuffled[self.position - first])

    def state_dict(self) -> dict[str, int]:
        """The next sample's epoch and position in the lane's segment."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state; no sample is read again.

        Raises:
            UserError: there is no such position, as in a state of another shard set or number of lanes.
        """
        epoch: Any = state.get("epoch")
        position: Any = state.get("position")
        well_formed = set(state) == {"epoch", "position"} and isinstance(epoch, int) and isinstance(position, int)
        if not (well_formed and epoch >= 0 and 0 <= position < self.order.segment_length(epoch)):
            raise UserError(
                f"lane {self.index}: there is no position {state} for {self.order.samples} samples in "
                f"{self.order.lanes} lanes; resume with the shard set and the data.lanes of the checkpoint"
            )
        self.epoch, self.position = epoch, position

    def go_to(self, number: int) -> None:
        """Make the sample of this number the next one."""
        self.epoch, self.position = self.order.segment_position(number)

    def locate(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """For the samples of these numbers: the index in `set_lanes`, and the sample's number in that lane."""
        return [(0, number) for number in numbers]
