"""Fetching shards before the lanes come to them, so many bytes ahead; nothing of it is part of any state."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from far_scale.data.loader.lanes import LaneOrder
from far_scale.data.remote.fetch import Interrupted, interruptible
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError

_AT_ONCE = 4  # fetches of a rank
_MOST = 256  # shards ahead, where they are small: each time all are asked for


def shards_ahead(order: LaneOrder, lane: int, number: int) -> Iterator[tuple[int, int]]:
    """The shards that a lane comes to, without end.

    Args:
        order: of the lanes.
        lane: which.
        number: of the lane's next sample.

    Yields:
        How many samples the lane reads before, and the shard. Its shuffling is no matter, but for the window that it is
        in: that begins up to `order.shuffle_window` samples earlier.
    """
    epoch, position = order.run_position(number)
    position, _ = order.window(epoch, position)
    begun = order.read_before(epoch) + position
    while True:
        shards, samples = order.shards_from(epoch, lane, position)
        for shard in shards:
            yield max(0, order.read_before(epoch) + position - begun), shard
        position += samples
        if position >= order.run_length(epoch):
            epoch, position = epoch + 1, 0


class ShardPrefetch:
    """Threads that fetch what a rank's lanes come to next. What they cannot fetch is left to who reads it.

    Args:
        shard_set: which comes through the node's cache.
        order: of the lanes.
        lanes: this rank's.
        ahead_bytes: of the shards that are fetched before they are needed, and kept so far by the node's cache.
    """

    def __init__(self, shard_set: ShardSet, order: LaneOrder, lanes: Sequence[int], ahead_bytes: int) -> None:
        self._set, self._order, self._lanes, self._ahead = shard_set, order, list(lanes), ahead_bytes
        self._closed = threading.Event()
        self._wanted: set[int] = set()  # shards that were asked for and are still ahead
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="prefetch")

    def move(self, numbers: dict[int, int]) -> None:
        """The lanes stand at these numbers of samples now: ask for what is ahead of them."""
        ahead, before = self.plan(numbers), self._wanted
        self._wanted = set(ahead)
        for shard in ahead:
            if shard not in before:
                self._threads.submit(self._fetch, shard)

    def plan(self, numbers: dict[int, int]) -> list[int]:
        """The shards that come next, those that are needed first before others, up to the bytes ahead."""
        walks = {lane: shards_ahead(self._order, lane, numbers[lane]) for lane in self._lanes}
        heads = {lane: next(walk) for lane, walk in walks.items()}
        entries, taken, room = self._set.manifest.shards, dict[int, None](), self._ahead
        while len(taken) < min(_MOST, len(entries)):
            lane = min(heads, key=lambda lane: heads[lane][0])
            shard = heads[lane][1]
            if shard not in taken:
                room -= entries[shard].bytes
                if room < 0:
                    break
                taken[shard] = None
            heads[lane] = next(walks[lane])
        return list(taken)

    def close(self) -> None:
        """Give up what is being fetched; returns when the threads have ended."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)

    def _fetch(self, shard: int) -> None:
        if self._closed.is_set() or shard not in self._wanted:
            return
        try:
            with interruptible(self._closed):
                self._set.fetch_ahead(shard)
        except (Interrupted, UserError):
            return  # who reads it meets the same, and tells
