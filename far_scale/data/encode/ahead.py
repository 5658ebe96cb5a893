"""Work done ahead in a thread, for whoever would otherwise wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class _End(NamedTuple):
    """The last message: there are no more, or making the next one failed."""

    error: BaseException | None


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The same items in the same order, of which one is made in a thread while the caller works with the one before.

    No more than one waits, so the memory is that of two items. What making one raises is raised here, in its turn.
    Close the iterator (`contextlib.closing`) to end the thread early.
    """
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room, closed = threading.Semaphore(1), threading.Event()

    def make() -> None:
        error: BaseException | None = None
        try:
            rest = iter(items)
            while room.acquire() and not closed.is_set():
                ready.put(next(rest))
        except StopIteration:
            pass
        except BaseException as raised:  # the thread has nobody to tell but the one who asks for the next item
            error = raised
        ready.put(_End(error))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        room.release()
        thread.join()
