"""Items made ahead in a thread: bounded, in order, with their errors, and no thread or item outlives `close`."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from far_scale.utils.errors import UserError
from far_scale.utils.look_ahead import LookAhead


class Item:
    """Something that a weak reference can watch."""


class Source:
    """Yields 0 to `count` - 1, counts what it made, and can be held up before an item or fail at one."""

    def __init__(self, count: int = 100, fail_at: int = -1, hold_at: int = -1) -> None:
        self.count, self.fail_at, self.hold_at = count, fail_at, hold_at
        self.made: list[int] = []
        self.held, self.go = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            if number == self.hold_at:
                self.held.set()
                self.go.wait()
            if number == self.fail_at:
                raise UserError("no more")
            self.made.append(number)
            yield number


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def thread_ended(name: str) -> bool:
    return all(thread.name != name for thread in threading.enumerate())


def test_makes_one_while_another_is_used() -> None:
    assert list(LookAhead(Source(5))) == [0, 1, 2, 3, 4]
    received = []
    with pytest.raises(UserError, match="no more"):
        for number in LookAhead(Source(fail_at=3)):
            received.append(number)
    assert received == [0, 1, 2]
    source = Source(5)
    early = LookAhead(source)
    assert next(early) == 0
    early.close()
    assert source.made in ([0], [0, 1])  # never more than one beyond the one in use


@pytest.mark.parametrize("ahead", [1, 4])
def test_at_most_so_many_items_wait(ahead: int) -> None:
    source = Source()
    with LookAhead(source, ahead, "bounded") as items:
        for number in range(10):
            wait_for(lambda number=number: len(source.made) == number + ahead)  # type: ignore[misc]
            time.sleep(0.002)
            assert len(source.made) == number + ahead
            assert next(items) == number
    assert thread_ended("bounded")
    with pytest.raises(ValueError, match="ahead=0"):
        LookAhead(source, 0)


def test_the_end_and_errors_come_in_order_and_again() -> None:
    with LookAhead(Source(2), 8) as items:
        assert list(items) == [0, 1] and list(items) == []
    with LookAhead(Source(fail_at=2), 8, "failed") as failing:
        wait_for(lambda: thread_ended("failed"))
        assert [next(failing), next(failing)] == [0, 1]
        for _ in range(2):
            with pytest.raises(UserError, match="no more"):
                next(failing)
    with pytest.raises(ValueError, match="closed"):
        next(failing)


def test_errors_of_every_kind_reach_the_caller() -> None:
    def interrupted() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with LookAhead(interrupted()) as items, pytest.raises(KeyboardInterrupt):
        list(items)
    with LookAhead(3) as items, pytest.raises(TypeError, match="not iterable"):  # type: ignore[arg-type]
        next(items)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_while_the_thread_waits_for_room(taken: int) -> None:
    source = Source()
    items = LookAhead(source, 2, "full")
    assert [next(items) for _ in range(taken)] == list(range(taken))
    wait_for(lambda: len(source.made) == taken + 2)
    items.close()
    items.close()
    assert thread_ended("full") and len(source.made) == taken + 2
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'full' is closed"):
            next(items)


def test_close_waits_for_the_item_that_is_being_made_and_makes_no_other() -> None:
    source = Source(hold_at=1)
    items = LookAhead(source, 4, "busy")
    source.held.wait()
    closing = threading.Thread(target=items.close)
    closing.start()
    time.sleep(0.02)
    assert closing.is_alive()
    source.go.set()
    closing.join(20)
    assert not closing.is_alive() and thread_ended("busy") and source.made == [0, 1]


@pytest.mark.parametrize(("fail_at", "error"), [(-1, ValueError), (0, UserError)])
def test_a_caller_that_waits_while_another_closes_gets_an_error(fail_at: int, error: type[Exception]) -> None:
    """The error that ended the items, where there is one."""
    source = Source(hold_at=0, fail_at=fail_at)
    items = LookAhead(source, 1, "awaited")
    errors: list[BaseException] = []

    def take_all() -> None:
        try:
            for _ in range(3):
                next(items)
        except BaseException as raised:
            errors.append(raised)

    callers = [threading.Thread(target=take_all) for _ in range(2)]
    for caller in callers:
        caller.start()
    source.held.wait()
    time.sleep(0.02)
    closing = threading.Thread(target=items.close)
    closing.start()
    wait_for(items._closed.is_set)
    source.go.set()
    for thread in (*callers, closing):
        thread.join(20)
        assert not thread.is_alive()
    # A caller that was so late that it found the look-ahead closed gets a ValueError.
    assert len(errors) == 2 and {type(raised) for raised in errors} <= {error, ValueError}
    assert thread_ended("awaited")


def test_close_after_an_interrupt_in_next_does_not_wait_for_the_end() -> None:
    """Ctrl-C may come when `next` has taken the end and not yet put it back."""

    class InterruptedOnce(queue.SimpleQueue):  # type: ignore[type-arg]
        def put(self, item: object, *_: object) -> None:
            if threading.current_thread() is caller:
                raise KeyboardInterrupt
            super().put(item)

    go = threading.Event()

    def nothing() -> Iterator[int]:
        go.wait()
        yield from ()

    items = LookAhead(nothing(), 1, "interrupted")
    items._ready = InterruptedOnce()

    def take() -> None:
        with pytest.raises(KeyboardInterrupt):
            next(items)

    caller = threading.Thread(target=take)
    go.set()
    caller.start()
    caller.join(20)
    assert not caller.is_alive()
    closing = threading.Thread(target=items.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive() and thread_ended("interrupted")


def test_items_are_freed_when_they_are_taken_or_dropped() -> None:
    watched: list[weakref.ref[Item]] = []

    def make(_: int) -> Item:
        item = Item()
        watched.append(weakref.ref(item))
        return item

    items = LookAhead(map(make, range(100)), 2)
    first = next(items)
    wait_for(lambda: len(watched) == 3)
    assert watched[0]() is first
    del first
    assert [ref() is None for ref in watched] == [True, False, False]
    items.close()
    gc.collect()
    assert all(ref() is None for ref in watched)


def test_the_source_is_freed_when_the_thread_ends() -> None:
    source = Source(hold_at=2)
    watch = weakref.ref(source)
    with LookAhead(source) as items:
        assert next(items) == 0
        source.go.set()
        del source
    gc.collect()
    assert watch() is None
