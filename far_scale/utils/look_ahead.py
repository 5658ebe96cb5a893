"""A thread that makes the next items of an iterable while the caller works with the current one."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _End(NamedTuple):
    """The last message of the thread; `error` is StopIteration where the items were exhausted."""

    error: BaseException


class LookAhead(Generic[T]):
    """Iterates over `items` in order; a thread makes the next items in advance.

    - At most `ahead` items wait for the caller; only when one is taken does the thread make another.
    - Neither the thread nor this object keeps a reference to an item that was taken.
    - An error of `items` is raised by `next` after the items before it, and again by every later `next`.
    - `close` ends the thread and drops the items that wait. It waits for the item that is being made: if that can
      block, interrupt it first.
    - After `close`, `next` raises ValueError; so does a `next` that is blocked in another thread, unless `items` fail
      at that moment.
    """

    def __init__(self, items: Iterable[T], ahead: int = 1, name: str = "look-ahead") -> None:
        """Start the thread, with this name.

        Raises:
            ValueError: `ahead` is below 1.
        """
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: must be at least 1")
        self._ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()  # the end stays queued for every later `next`
        self._room = threading.Semaphore(ahead)
        self._closed = threading.Event()
        # The items are an argument, not an attribute, so that they are freed when the thread ends.
        self._thread = threading.Thread(target=self._make_items, args=(items,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise self._closed_error()
        item = self._ready.get()
        if isinstance(item, _End):
            self._ready.put(item)
            raise item.error
        self._room.release()
        return item

    def close(self) -> None:
        """End the thread and drop its pending items; may be called again."""
        self._closed.set()
        self._room.release()
        self._thread.join()
        end = _End(self._closed_error())
        with contextlib.suppress(queue.Empty):  # not up to the end: a `next` may be interrupted before it puts it back
            while True:
                if isinstance(item := self._ready.get_nowait(), _End):
                    end = item
        self._ready.put(end)  # for a `next` that is blocked in another thread

    def __enter__(self) -> LookAhead[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_items(self, items: Iterable[T]) -> None:
        try:
            iterator = iter(items)
            while self._room.acquire() and not self._closed.is_set():
                self._ready.put(next(iterator))
            self._ready.put(_End(self._closed_error()))
        except BaseException as error:  # re-raised by the caller's `next`
            self._ready.put(_End(error))

    def _closed_error(self) -> ValueError:
        return ValueError(f"the look-ahead of thread {self._thread.name!r} is closed")
