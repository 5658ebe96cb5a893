"""Names the ranks that keep the others waiting: by their wait for data, and by a known product on their device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
import torch.distributed as dist

from far_scale.distributed.process_group import Processes
from far_scale.health.gemm_probe import GemmProbe
from far_scale.utils.event_log import EventLog

TIMES = 1.5
"""A slow rank takes so many times the median."""

DEVIATIONS = 8.0
"""And lies so many median absolute deviations above it: where the ranks differ widely, being far off is usual."""

LINES = 5
"""Log lines of which each rank's median counts, as one hiccup among thousands of ranks is usual."""

FEWEST_LINES = 3
"""And as many there must be."""

_SHARE = 0.1  # of a step's time that a rank must wait for data longer than the median, or it delays nobody
_BATCHES = 5  # of the known product, of which the best counts: a few milliseconds a log line


@dataclass(frozen=True)
class Slow:
    """A rank that is slow at something.

    Attributes:
        rank: its number.
        times: of the median (infinite where that is 0).
    """

    rank: int
    times: float


class StragglerDetector:
    """Compares the ranks at every log line and tells, once until it recovers, which one is slow and at what.

    Args:
        processes: who runs.
        dtype: that training computes in.
        events: of this process.
        hosts: every rank's host, by rank.
    """

    def __init__(self, processes: Processes, dtype: torch.dtype, events: EventLog, hosts: Sequence[str]) -> None:
        self._processes, self._events, self._hosts = processes, events, hosts
        self._product = GemmProbe(processes.device, dtype)
        self._waits: deque[list[float]] = deque(maxlen=LINES)
        self._products: deque[list[float]] = deque(maxlen=LINES)
        self._told: set[tuple[str, int]] = set()
        self._last: tuple[int, float] | None = None

    def report(self, step: int, waited: float) -> None:
        """At a log line, on all ranks together.

        Args:
            step: steps done.
            waited: seconds that this rank waited for data, per step since the last line.
        """
        own = torch.tensor([waited, self._product.seconds(_BATCHES)], dtype=torch.float64)
        all_ranks = [torch.empty_like(own) for _ in self._hosts]
        dist.all_gather(all_ranks, own, group=self._processes.host_group)
        waits, products = torch.stack(all_ranks).T.tolist()

        now = time.monotonic()
        if self._last is not None and step > self._last[0]:  # the first line's waits are the loader's start
            step_seconds = (now - self._last[1]) / (step - self._last[0])
            self._waits.append(waits)
            self._name("waits for data", step, self._waits, _SHARE * step_seconds)
        self._last = step, now
        self._products.append(products)
        self._name("calculates", step, self._products, 0.0)

    def _name(self, what: str, step: int, lines: deque[list[float]], at_least: float) -> None:
        if len(lines) < FEWEST_LINES:
            return
        slow = slow_ranks([median_low(of_rank) for of_rank in zip(*lines, strict=True)], at_least)
        for one in slow:
            if (what, one.rank) not in self._told:
                host = self._hosts[one.rank]
                text = f"step {step}: rank {one.rank} on {host} is slow: it {what} {one.times:.1f} times the median"
                self._events.emit("slow", step, text, rank=one.rank, host=host, what=what, times=one.times)
        others = {key for key in self._told if key[0] != what}
        self._told = others | {(what, one.rank) for one in slow}


def slow_ranks(seconds: Sequence[float], at_least: float = 0.0) -> list[Slow]:
    """Who is far above the median.

    The median is the lower of two in the middle, so that of two ranks the faster one is the measure.

    Args:
        seconds: of each rank.
        at_least: seconds above the median below which nobody is slow.
    """
    median = median_low(seconds)
    deviation = median_low([abs(value - median) for value in seconds])
    limit = max(TIMES * median, median + DEVIATIONS * deviation, median + at_least)
    return [
        Slow(rank, value / median if median else float("inf")) for rank, value in enumerate(seconds) if value > limit
    ]
