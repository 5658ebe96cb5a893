"""Fetches shards before the lanes need them, up to a number of bytes; independent of all checkpointed state."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from far_scale.data.loader.lanes import LaneOrder
from far_scale.data.remote.fetch import Interrupted, interruptible
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError

_THREADS = 4  # parallel fetches of a rank
_MAX_SHARDS = 256  # that are planned ahead if shards are small: each step plans all of them


def shards_ahead(order: LaneOrder, lane: int, number: int) -> Iterator[tuple[int, int]]:
    """The shards that a lane will read, without end.

    Args:
        order: order of the lanes.
        lane: index of the lane.
        number: number of the lane's next sample.

    Yields:
        The number of samples that the lane reads before the shard, and the shard. Ignores shuffling, except that it
        starts at the beginning of the current shuffle window, up to `order.shuffle_window` samples earlier.
    """
    epoch, position = order.segment_position(number)
    position, _ = order.window(epoch, position)
    start = order.first_number(epoch) + position
    while True:
        shards, samples = order.shards_in_segment(epoch, lane, position)
        for shard in shards:
            yield max(0, order.first_number(epoch) + position - start), shard
        position += samples
        if position >= order.segment_length(epoch):
            epoch, position = epoch + 1, 0


class ShardPrefetch:
    """Threads that fetch the next shards of a rank's lanes. Errors are ignored: reading the shard raises them again."""

    def __init__(self, shard_set: ShardSet, order: LaneOrder, lanes: Sequence[int], ahead_bytes: int) -> None:
        """Start the threads.

        Args:
            shard_set: a shard set that is read through the node's cache.
            order: order of the lanes.
            lanes: indices of this rank's lanes.
            ahead_bytes: size of the shards to fetch before they are needed.
        """
        self._shard_set, self._order, self._lanes, self._ahead_bytes = shard_set, order, list(lanes), ahead_bytes
        self._closed = threading.Event()
        self._planned: set[int] = set()  # shards that were asked for and are still ahead
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prefetch")

    def move_to(self, numbers: dict[int, int]) -> None:
        """Fetch the shards ahead of the lanes, given the number of each lane's next sample."""
        planned, before = self.plan(numbers), self._planned
        self._planned = set(planned)
        for shard in planned:
            if shard not in before:
                self._threads.submit(self._fetch, shard)

    def plan(self, numbers: dict[int, int]) -> list[int]:
        """The next shards, in the order in which they are needed, up to `ahead_bytes`."""
        walks = {lane: shards_ahead(self._order, lane, numbers[lane]) for lane in self._lanes}
        heads = {lane: next(walk) for lane, walk in walks.items()}
        entries, planned, room = self._shard_set.manifest.shards, dict[int, None](), self._ahead_bytes
        while len(planned) < min(_MAX_SHARDS, len(entries)):
            lane = min(heads, key=lambda lane: heads[lane][0])
            shard = heads[lane][1]
            if shard not in planned:
                room -= entries[shard].bytes
                if room < 0:
                    break
                planned[shard] = None
            heads[lane] = next(walks[lane])
        return list(planned)

    def close(self) -> None:
        """Give up what is being fetched; returns when the threads have ended."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)

    def _fetch(self, shard: int) -> None:
        if self._closed.is_set() or shard not in self._planned:
            return
        try:
            with interruptible(self._closed):
                self._shard_set.fetch_ahead(shard)
        except (Interrupted, UserError):
            return  # reading the shard raises the same error
