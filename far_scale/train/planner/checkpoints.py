"""How often to save: the interval that loses the least time to saves and failures.

With a save that training waits C seconds for, and failures M seconds apart on average, an interval of t seconds loses
about C / t to saves and t / (2 M) to steps that are computed again. The sum is smallest at t = sqrt(2 C M) (Young, A
first order approximation to the optimum checkpoint interval, CACM 17(9), 1974). Daly's estimate of higher order (FGCS
22(3), 2006), for C < 2 M: t = sqrt(2 C M) (1 + sqrt(C / (2 M)) / 3 + C / (18 M)) - C; otherwise M.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from far_scale.utils.errors import UserError
from far_scale.utils.event_log import read_events


@dataclass(frozen=True)
class SaveTime:
    """How long a save takes.

    Attributes:
        waiting: seconds that training waits for it.
        seconds: until it is on disk.
        source: where the numbers come from.
    """

    waiting: float
    seconds: float
    source: str


@dataclass(frozen=True)
class Interval:
    """When to save.

    Attributes:
        young, daly: seconds of computing between saves, by the two formulas.
        seconds: the larger of Daly's and the time that a save takes.
        goodput: fraction of the time that is neither waited for saves nor lost to failures, without the restarts.
    """

    young: float
    daly: float
    seconds: float
    goodput: float


def best_interval(save: SaveTime, between_failures: float) -> Interval:
    """The interval for a save and the mean seconds between failures of the whole job."""
    waiting, mean = save.waiting, between_failures
    young = math.sqrt(2 * waiting * mean)
    daly = mean
    if waiting < 2 * mean:
        daly = young * (1 + math.sqrt(waiting / (2 * mean)) / 3 + waiting / (18 * mean)) - waiting
    seconds = max(daly, save.seconds)
    # The checkpoint that counts is the last one whose write has ended.
    lost = waiting / (seconds + waiting) + (seconds / 2 + save.seconds) / mean
    return Interval(young, daly, seconds, max(0.0, 1 - lost))


def measured_save(run: Path) -> SaveTime:
    """The median of the saves in the events of a run.

    Raises:
        UserError: there are none.
    """
    saves = [event for event in read_events(run) if event.get("event") == "saved"]
    if not saves:
        raise UserError(f"{run}: no checkpoint was saved according to its events.jsonl; name a run that has saved one")
    waiting, seconds = (
        statistics.median(float(event[name]) for event in saves) for name in ("stall_seconds", "seconds")
    )
    return SaveTime(waiting, seconds, f"median of {len(saves)} saves in {run}")


def save_by_disk(checkpoint_bytes: float, bytes_per_second: float, source: str) -> SaveTime:
    """The time of writing a checkpoint at a measured speed, for all of which training is assumed to wait."""
    seconds = checkpoint_bytes / bytes_per_second
    return SaveTime(seconds, seconds, source)
