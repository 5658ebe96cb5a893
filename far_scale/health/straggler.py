"""Detects stragglers: ranks that wait longer for data than others, or have a slower device."""

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

MEDIANS = 1.5
"""A slow rank takes more than this multiple of the median of all ranks."""

MADS = 8.0
"""It is also more than this many median absolute deviations above the median, since ranks may always differ widely."""

LOG_LINES = 5
"""A rank's time is its median over this many log lines: with thousands of ranks, single delays are common."""

MIN_LOG_LINES = 3
"""Slow ranks are reported only after this many log lines."""

_WAIT_FRACTION = 0.1  # of a step's time: a wait for data less than this above the median does not delay the others
_BATCHES = 5  # of the GEMM probe: a few milliseconds per log line


@dataclass(frozen=True)
class SlowRank:
    """A slow rank.

    Attributes:
        rank: the rank.
        times: its time divided by the median (infinite if the median is 0).
    """

    rank: int
    times: float


class StragglerDetector:
    """Compares the ranks at every log line; logs each slow rank once until it recovers.

    Args:
        dtype: of the training's computation.
        hosts: every rank's host, by rank.
    """

    def __init__(self, processes: Processes, dtype: torch.dtype, events: EventLog, hosts: Sequence[str]) -> None:
        self._processes, self._events, self._hosts = processes, events, hosts
        self._probe = GemmProbe(processes.device, dtype)
        self._waits: deque[list[float]] = deque(maxlen=LOG_LINES)
        self._gemms: deque[list[float]] = deque(maxlen=LOG_LINES)
        self._reported: set[tuple[str, int]] = set()
        self._last: tuple[int, float] | None = None

    def report(self, step: int, waited: float) -> None:
        """Compare the ranks; collective, at a log line.

        Args:
            step: steps done.
            waited: seconds per step that this rank waited for data since the last line.
        """
        local_times = torch.tensor([waited, self._probe.seconds(_BATCHES)], dtype=torch.float64)
        all_ranks = [torch.empty_like(local_times) for _ in self._hosts]
        dist.all_gather(all_ranks, local_times, group=self._processes.host_group)
        waits, gemms = torch.stack(all_ranks).T.tolist()

        now = time.monotonic()
        if self._last is not None and step > self._last[0]:  # the first waits are the start of the loader
            step_seconds = (now - self._last[1]) / (step - self._last[0])
            self._waits.append(waits)
            self._report_slow("waits for data", step, self._waits, _WAIT_FRACTION * step_seconds)
        self._last = step, now
        self._gemms.append(gemms)
        self._report_slow("calculates", step, self._gemms, 0.0)

    def _report_slow(self, what: str, step: int, lines: deque[list[float]], min_excess: float) -> None:
        if len(lines) < MIN_LOG_LINES:
            return
        stragglers = slow_ranks([median_low(seconds) for seconds in zip(*lines, strict=True)], min_excess)
        for slow in stragglers:
            if (what, slow.rank) not in self._reported:
                host = self._hosts[slow.rank]
                text = f"step {step}: rank {slow.rank} on {host} is slow: it {what} {slow.times:.1f} times the median"
                self._events.emit("slow", step, text, rank=slow.rank, host=host, what=what, times=slow.times)
        others = {key for key in self._reported if key[0] != what}
        self._reported = others | {(what, slow.rank) for slow in stragglers}


def slow_ranks(seconds: Sequence[float], min_excess: float = 0.0) -> list[SlowRank]:
    """The ranks far above the median; of two ranks the faster one is the median.

    Args:
        seconds: by rank.
        min_excess: a slow rank is at least this many seconds above the median.
    """
    median = median_low(seconds)
    mad = median_low([abs(value - median) for value in seconds])
    limit = max(MEDIANS * median, median + MADS * mad, median + min_excess)
    times = [value / median if median else float("inf") for value in seconds]
    return [SlowRank(rank, times[rank]) for rank, value in enumerate(seconds) if value > limit]
