"""Chooses the clips of a pack: a fixed number, or those that best fill a token budget.

To fill a budget, a lane chooses from a pool of its next clips, drawn but not yet read. A pack always takes the oldest
clip, so that none waits forever, and those others that leave the least of the budget unused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_scale.data.frame_counts import FrameCounts, draw_frames, min_frames
from far_scale.data.loader.epoch_remainder import load_beginning
from far_scale.data.loader.lanes import FIRST_EPOCH, Lane, LaneOrder, SampleRef, in_stage
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.mixture_lane import MixtureLane
from far_scale.data.shards.errors import DamagedError, SkippedClip, over_budget
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

POOL_SIZE = 12  # 2048 combinations with the oldest clip: they leave less than 1% of a budget of five long clips unused


@dataclass(frozen=True)
class PackingConfig:
    """How clips are cut from samples and put into packs.

    Attributes:
        lanes: number of sample streams.
        frames: frame counts of a clip.
        frame_stride: take every n-th frame of the video.
        shuffle_window: samples among which a lane shuffles.
        seed: seed of the order and of all draws.
        clips_per_pack: a fixed number of clips; None with `tokens_per_pack`.
        tokens_per_pack: the token budget of a pack; None with `clips_per_pack`.
        tokens_of: tokens of a clip by its number of frames; one per frame by default.
        stage: index of the curriculum's stage; each has another order and other draws.
        max_damaged: clips of damaged samples that may be skipped; with 0 the first is an error.
        beginnings: the `beginning_state` of each shard set's lanes; empty if their number has never changed.
    """

    lanes: int
    frames: FrameCounts
    frame_stride: int
    shuffle_window: int
    seed: int
    clips_per_pack: int | None
    tokens_per_pack: int | None = None
    tokens_of: Callable[[int], int] = int
    stage: int = 0
    max_damaged: int = 0
    beginnings: tuple[Mapping[str, Any], ...] = ()

    def make_lanes(
        self, source: ShardSet | Mixture, indices: Iterable[int], weights: Sequence[float] | None = None
    ) -> dict[int, PackedLane]:
        """The lanes with these indices, each at its beginning.

        Args:
            source: what they read.
            indices: indices of lanes, from 0.
            weights: weights of a mixture's sets, if not its own.

        Raises:
            UserError: there are more lanes than samples.
        """
        orders = self.lane_orders(source)
        if not isinstance(source, Mixture):
            return {index: PackedLane(Lane(orders[0], index), source, self) for index in sorted(indices)}
        weights = weights or source.weights
        return {index: PackedLane(MixtureLane(orders, weights, index), source, self) for index in sorted(indices)}

    def lane_orders(self, source: ShardSet | Mixture) -> list[LaneOrder]:
        """The order of each shard set.

        Raises:
            UserError: there are more lanes than samples.
        """
        sets = source.sets if isinstance(source, Mixture) else [source]
        if len(self.beginnings) not in (0, len(sets)):
            raise UserError(
                f"data.shards: {len(sets)} shard sets, but the checkpoint was made with {len(self.beginnings)}; resume "
                "with those"
            )
        orders = []
        for set_index, shard_set in enumerate(sets):
            try:
                orders.append(self._lane_order(shard_set.samples_per_shard, set_index))
            except UserError as error:
                if not isinstance(source, Mixture):
                    raise
                raise UserError(f"{shard_set.folder}: {error}") from None
        return orders

    def _lane_order(self, samples_per_shard: list[int], set_index: int) -> LaneOrder:
        beginning = FIRST_EPOCH
        if self.beginnings:
            beginning = load_beginning(self.beginnings[set_index], samples_per_shard, self.stage)
        return LaneOrder(samples_per_shard, self.lanes, self.seed, self.shuffle_window, self.stage, beginning)


@dataclass(frozen=True)
class Clip:
    """A clip that was drawn but not read.

    Attributes:
        number: number of its sample in the lane.
        sample: the sample that it is cut from.
        start: its first frame in the sample.
        frames: its number of frames.
    """

    number: int
    sample: SampleRef
    start: int
    frames: int


class PackedLane:
    """One endless stream of packs, as lists of clips: an iterator with a state of plain numbers.

    A clip's frame count and start are drawn with the counter (number of the sample in the lane, lane). Damaged samples
    are skipped and counted. Both depend only on the shard set, so they are the same on any number of ranks.

    Attributes:
        sample_lane: the stream of samples, positioned after the last drawn clip.
        damaged: number of clips skipped so far.
    """

    def __init__(self, sample_lane: Lane | MixtureLane, source: ShardSet | Mixture, packing: PackingConfig) -> None:
        self.sample_lane, self._source, self._packing = sample_lane, source, packing
        self._pending: list[Clip] = []
        self.damaged = 0
        self._skipped: list[SkippedClip] = []

    def __iter__(self) -> Iterator[list[Clip]]:
        return self

    def __next__(self) -> list[Clip]:
        """The clips of the next pack, older ones first.

        Raises:
            UserError: a sample has fewer frames than the shortest clip; or more are damaged than may be skipped.
        """
        if self._packing.tokens_per_pack is None:
            return [self._draw_undamaged() for _ in range(self._packing.clips_per_pack or 0)]
        pack: list[Clip] = []
        room = self._packing.tokens_per_pack
        while True:
            self._pending += (self._draw_undamaged() for _ in range(POOL_SIZE - len(self._pending)))
            tokens = [self._packing.tokens_of(clip.frames) for clip in self._pending]
            if 2 * room <= sum(tokens) or tokens[0] > room:
                break
            # More than half of the pool fits: take the oldest clip and draw another one, since most combinations are
            # possible if about half of the pool fits.
            pack.append(self._pending.pop(0))
            room -= tokens[0]
        chosen = best_subset(tuple(tokens), room, with_first=not pack)
        pack += (self._pending[index] for index in chosen)
        self._pending = [clip for index, clip in enumerate(self._pending) if index not in chosen]
        return pack

    def replace_damaged(self, clip: Clip, error: DamagedError) -> list[Clip]:
        """Count a clip that cannot be read.

        Returns:
            Its replacement in the pack: the lane's next clip; none with a token budget, since the clips of the pack
            were chosen together.

        Raises:
            UserError: more clips are damaged than may be skipped.
        """
        self._skip(clip.sample, error)
        return [self._draw_undamaged()] if self._packing.tokens_per_pack is None else []

    def pop_skipped(self) -> tuple[SkippedClip, ...]:
        """The clips that were skipped since the last call."""
        skipped, self._skipped = tuple(self._skipped), []
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """The state of the sample lane, the count of damaged clips and, with a token budget, the pending clips."""
        state: dict[str, Any] = self.sample_lane.state_dict()
        if self.damaged:
            state["damaged"] = self.damaged
        if self._packing.tokens_per_pack is not None:
            state["pending"] = [clip.number for clip in self._pending]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state; its pending clips are drawn again, with the same results.

        Raises:
            UserError: the state is not one of such a lane.
        """
        pending, drawn = self.load_position(state), []
        position = self.sample_lane.state_dict()
        for number in pending:
            self.sample_lane.go_to(number)
            if (clip := self._try_draw()) is not None:  # its index may have become damaged
                drawn.append(clip)
        self.sample_lane.load_state_dict(position)
        self._pending = drawn

    def load_position(self, state: dict[str, Any]) -> list[int]:
        """Go to a state without drawing clips; returns the numbers of its pending clips.

        Raises:
            UserError: the state is not one of such a lane.
        """
        position = {key: value for key, value in state.items() if key not in ("pending", "damaged")}
        self.sample_lane.load_state_dict(position)
        pending, damaged = state.get("pending"), state.get("damaged", 0)
        if type(damaged) is not int or damaged < 0:
            raise UserError(
                f"lane {self.sample_lane.index}: {damaged!r} is not a count of damaged clips; take an older checkpoint"
            )
        self.damaged = damaged
        if (pending is None) != (self._packing.tokens_per_pack is None) or not self._is_valid_pending(pending or []):
            raise UserError(
                f"lane {self.sample_lane.index}: {pending} cannot be the pending clips at {position}; resume with the "
                "shard set and the data section that the checkpoint was made with"
            )
        return pending or []

    def _is_valid_pending(self, pending: Any) -> bool:
        first = self.sample_lane.first_number
        numbers = isinstance(pending, list) and all(type(number) is int and number >= first for number in pending)
        rising = numbers and sorted(set(pending)) == pending and len(pending) < POOL_SIZE
        return rising and (not pending or pending[-1] < self.sample_lane.next_number)

    def _draw_undamaged(self) -> Clip:
        while (clip := self._try_draw()) is None:
            pass
        return clip

    def _try_draw(self) -> Clip | None:
        """The lane's next clip; None if its shard's index is damaged, which is counted."""
        number, sample = self.sample_lane.next_number, next(self.sample_lane)
        try:
            return self._draw(number, sample)
        except DamagedError as error:
            self._skip(sample, error)
            return None

    def _skip(self, sample: SampleRef, error: DamagedError) -> None:
        if self._packing.max_damaged == 0:
            raise error
        self.damaged += 1
        key = error.key or f"{sample.sample} of shard {sample.shard}"
        self._skipped.append(SkippedClip(self.sample_lane.index, key, error.file, error.problem))
        if self.damaged > self._packing.max_damaged:
            raise over_budget(self.damaged, self._packing.max_damaged, self._skipped)

    def _draw(self, number: int, sample: SampleRef) -> Clip:
        packing, shortest = self._packing, min_frames(self._packing.frames)
        draw = generator(packing.seed, in_stage("clip", packing.stage), number, self.sample_lane.index)
        sample_frames = self._source.frames_of(*sample)
        frames = min(draw_frames(packing.frames, draw), (sample_frames - 1) // packing.frame_stride + 1)
        if frames < shortest:
            raise UserError(
                f"{self._source.name_of(sample.shard)}: sample {sample.sample} is too short for data.frames={shortest} "
                f"with data.frame_stride={packing.frame_stride}; lower them, or encode with --min-frames"
            )
        # As in the official code, all starts at which the clip fits are equally likely.
        start = int(draw.integers(sample_frames - (frames - 1) * packing.frame_stride))
        return Clip(number, sample, start, frames)


def best_subset(tokens: tuple[int, ...], room: int, with_first: bool) -> list[int]:
    """The indices (rising) of the tokens with the largest sum that is at most `room`.

    Of equal sums, the one with older clips wins.

    Args:
        tokens: at most POOL_SIZE numbers, the oldest clip's first.
        room: tokens left in the pack.
        with_first: whether index 0 must be chosen; it fits by itself.
    """
    masks = _subset_masks(len(tokens))  # [2^n, n]
    sums = masks @ np.asarray(tokens)
    sums[sums > room] = -1
    if with_first:
        sums[~masks[:, 0].astype(bool)] = -1
    return np.flatnonzero(masks[int(sums.argmax())]).tolist()


@functools.lru_cache(maxsize=POOL_SIZE)
def _subset_masks(count: int) -> NDArray[np.int64]:
    """All subsets of `count` items as 0 and 1, `[2^count, count]`, those that `best_subset` prefers first."""
    subsets = np.arange(2**count)[::-1, None]
    return subsets >> np.arange(count)[::-1] & 1
