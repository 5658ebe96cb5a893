"""Which clips go into a pack: a fixed number of them, or as many as fill a budget of tokens best.

To fill a budget a lane looks at a pool of its next clips, drawn but not yet read. A pack always takes the oldest of
them, so that none waits for ever, and of the others those that together leave the least of the budget unused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_scale.data.frame_counts import FrameCounts, draw_frames, fewest
from far_scale.data.loader.lanes import FIRST_EPOCH, Lane, LaneOrder, Place, in_stage
from far_scale.data.loader.mixed_lane import MixtureLane
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.rest import load_beginning
from far_scale.data.shards.errors import DamagedError, SkippedClip, over_budget
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

POOL = 12  # 2048 choices beside the oldest: of a budget of five long clips less than 1% stays empty


@dataclass(frozen=True)
class PackingConfig:
    """How samples become clips, and clips packs.

    Attributes:
        lanes: sample streams.
        frames: of a clip.
        frame_stride: take every n-th frame of the video.
        shuffle_window: samples among which a lane shuffles.
        seed: of the order and of all draws.
        clips_per_pack: how many; or None, and
        tokens_per_pack: the most tokens of a pack.
        tokens_of: tokens of a clip of so many frames; by default one a frame.
        stage: of a curriculum, from 0; each has an order and draws of its own.
        max_damaged: clips of damaged samples that may be left out; with 0 the first is an error.
        beginnings: how the lanes of each shard set began after their number had changed, by `beginning_state`; empty
            where it never has.
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

    def clip_lanes(
        self, source: ShardSet | Mixture, lanes: Iterable[int], weights: Sequence[float] | None = None
    ) -> dict[int, ClipLane]:
        """Those of the lanes, each at its beginning.

        Args:
            source: what they read.
            lanes: their numbers.
            weights: of a mixture's sets, where they are others than its own.

        Raises:
            UserError: there are more lanes than samples.
        """
        orders = self.orders(source)
        if not isinstance(source, Mixture):
            return {lane: ClipLane(Lane(orders[0], lane), source, self) for lane in sorted(lanes)}
        parts = weights or source.parts
        return {lane: ClipLane(MixtureLane(orders, parts, lane), source, self) for lane in sorted(lanes)}

    def orders(self, source: ShardSet | Mixture) -> list[LaneOrder]:
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
        for number, shard_set in enumerate(sets):
            try:
                orders.append(self._order(shard_set.samples_per_shard, number))
            except UserError as problem:
                if not isinstance(source, Mixture):
                    raise
                raise UserError(f"{shard_set.folder}: {problem}") from None
        return orders

    def _order(self, samples_per_shard: list[int], number: int) -> LaneOrder:
        begin = FIRST_EPOCH
        if self.beginnings:
            begin = load_beginning(self.beginnings[number], samples_per_shard, self.stage)
        return LaneOrder(samples_per_shard, self.lanes, self.seed, self.shuffle_window, self.stage, begin)


@dataclass(frozen=True)
class Clip:
    """A clip that was drawn but not read.

    Attributes:
        number: the clips that its lane drew before it.
        place: the sample that it is cut from.
        start: its first frame in the sample.
        frames: how many it has.
    """

    number: int
    place: Place
    start: int
    frames: int


class ClipLane:
    """A lane's endless clips: the lane's samples, each with a frame count and a start of its own.

    Both are drawn at the counter (number, lane), so they depend on nothing but which clip it is. What is damaged is
    left out and counted; that depends on the shard set alone, so it is the same on any number of ranks.

    Attributes:
        lane: of samples, which stands behind the last clip that was drawn.
        damaged: clips that were left out so far.
    """

    def __init__(self, lane: Lane | MixtureLane, source: ShardSet | Mixture, packing: PackingConfig) -> None:
        self.lane, self._source, self._packing = lane, source, packing
        self._pending: list[Clip] = []
        self.damaged = 0
        self._skipped: list[SkippedClip] = []

    def next_pack(self) -> list[Clip]:
        """The clips of the next pack, older ones first.

        Raises:
            UserError: a sample has fewer frames than the shortest clip; or more is damaged than may be left out.
        """
        if self._packing.tokens_per_pack is None:
            return [self._draw_sound() for _ in range(self._packing.clips_per_pack or 0)]
        taken: list[Clip] = []
        room = self._packing.tokens_per_pack
        while True:
            self._pending += (self._draw_sound() for _ in range(POOL - len(self._pending)))
            tokens = [self._packing.tokens_of(clip.frames) for clip in self._pending]
            if 2 * room <= sum(tokens) or tokens[0] > room:
                break
            # There is room for more than half of the pool: the oldest goes in and another clip comes up, since the
            # choice is widest where about half of the pool fits.
            taken.append(self._pending.pop(0))
            room -= tokens[0]
        chosen = best_subset(tuple(tokens), room, first=not taken)
        taken += (self._pending[index] for index in chosen)
        self._pending = [clip for index, clip in enumerate(self._pending) if index not in chosen]
        return taken

    def in_place_of(self, clip: Clip, problem: DamagedError) -> list[Clip]:
        """A clip cannot be read: count it, and say what goes into the pack instead.

        Returns:
            The lane's next clip; nothing with a token budget, which the clip was chosen to fill among others.

        Raises:
            UserError: more is damaged than may be left out.
        """
        self._skip(clip.place, problem)
        return [self._draw_sound()] if self._packing.tokens_per_pack is None else []

    def take_skipped(self) -> tuple[SkippedClip, ...]:
        """What was left out since this was asked last."""
        taken, self._skipped = tuple(self._skipped), []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the lane stands, with a token budget the numbers of the clips that wait, and what was left out."""
        state: dict[str, Any] = self.lane.state_dict()
        if self.damaged:
            state["damaged"] = self.damaged
        if self._packing.tokens_per_pack is not None:
            state["pending"] = [clip.number for clip in self._pending]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state; the clips that wait are drawn again, as they were.

        Raises:
            UserError: it is no state of such a lane.
        """
        pending, here, drawn = self.load_place(state), self.lane.state_dict(), []
        for number in pending:
            self.lane.go_to(number)
            if (clip := self._try_to_draw()) is not None:  # its index may have been damaged since
                drawn.append(clip)
        self.lane.load_state_dict(here)
        self._pending = drawn

    def load_place(self, state: dict[str, Any]) -> list[int]:
        """Go to a state, but draw nothing; returns the numbers of the clips that wait.

        Raises:
            UserError: it is no state of such a lane.
        """
        place = {key: value for key, value in state.items() if key not in ("pending", "damaged")}
        self.lane.load_state_dict(place)
        pending, damaged = state.get("pending"), state.get("damaged", 0)
        if type(damaged) is not int or damaged < 0:
            raise UserError(
                f"lane {self.lane.lane}: {damaged!r} is no count of damaged clips; take an older checkpoint"
            )
        self.damaged = damaged
        if (pending is None) != (self._packing.tokens_per_pack is None) or not self._possible(pending or []):
            raise UserError(
                f"lane {self.lane.lane}: {pending} are no clips that wait at {place}; resume with the shard set and "
                "the data section that the checkpoint was made with"
            )
        return pending or []

    def _possible(self, pending: Any) -> bool:
        first = self.lane.first
        numbers = isinstance(pending, list) and all(type(number) is int and number >= first for number in pending)
        rising = numbers and sorted(set(pending)) == pending and len(pending) < POOL
        return rising and (not pending or pending[-1] < self.lane.number)

    def _draw_sound(self) -> Clip:
        while (clip := self._try_to_draw()) is None:
            pass
        return clip

    def _try_to_draw(self) -> Clip | None:
        """The lane's next clip; nothing, and counted, where its shard's index is damaged."""
        number, place = self.lane.number, next(self.lane)
        try:
            return self._draw(number, place)
        except DamagedError as problem:
            self._skip(place, problem)
            return None

    def _skip(self, place: Place, problem: DamagedError) -> None:
        if self._packing.max_damaged == 0:
            raise problem
        self.damaged += 1
        key = problem.key or f"{place.sample} of shard {place.shard}"
        self._skipped.append(SkippedClip(self.lane.lane, key, problem.file, problem.problem))
        if self.damaged > self._packing.max_damaged:
            raise over_budget(self.damaged, self._packing.max_damaged, self._skipped)

    def _draw(self, number: int, place: Place) -> Clip:
        packing = self._packing
        draw = generator(packing.seed, in_stage("clip", packing.stage), number, self.lane.lane)
        there = self._source.frames_of(*place)
        count = min(draw_frames(packing.frames, draw), (there - 1) // packing.frame_stride + 1)
        if count < fewest(packing.frames):
            raise UserError(
                f"{self._source.name_of(place.shard)}: sample {place.sample} is too short for "
                f"data.frames={fewest(packing.frames)} with data.frame_stride={packing.frame_stride}; lower them, or "
                "encode with --min-frames"
            )
        # Any start from which the clip still fits, each as likely, as officially.
        return Clip(number, place, int(draw.integers(there - (count - 1) * packing.frame_stride)), count)


def best_subset(tokens: tuple[int, ...], room: int, first: bool) -> list[int]:
    """The places in `tokens`, rising, whose sum comes nearest to `room` without passing it.

    Among sums that are equal, older clips go before younger ones.

    Args:
        tokens: at most POOL numbers, the oldest clip's first.
        first: whether place 0 must be among them; it fits by itself.
    """
    masks = _masks(len(tokens))  # [2^n, n]
    sums = masks @ np.asarray(tokens)
    sums[sums > room] = -1
    if first:
        sums[~masks[:, 0].astype(bool)] = -1
    return np.flatnonzero(masks[int(sums.argmax())]).tolist()


@functools.lru_cache(maxsize=POOL)
def _masks(count: int) -> NDArray[np.int64]:
    """All subsets of `count` things `[2^count, count]` as 0 and 1, the one with the most of the first things first."""
    subsets = np.arange(2**count)[::-1, None]
    return subsets >> np.arange(count)[::-1] & 1
