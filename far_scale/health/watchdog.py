"""The watchdog: if a run hangs, it writes the Python stacks of every rank and exits, to be restarted.

Each rank watches itself, since a stuck collective stops all of them. Ranks write their stacks to `run_dir/stacks/`; a
stopped or dead rank writes none, which identifies it.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from far_scale.distributed.exit_codes import REQUEUE
from far_scale.utils.event_log import EventLog
from far_scale.utils.hosts import rank_list, ranks_on_hosts

START_SECONDS = 1800.0
"""Additional time for the first step: building, loading, NCCL's first contact and compilation take minutes."""

GRACE_SECONDS = 5.0
"""Time that a rank waits, beyond a step's time, for the stacks of the others; its exit ends them."""

_STDERR_FD = 2


def collective_timeout(seconds: float) -> datetime.timedelta:
    """The timeout of collectives for a watchdog of `seconds`: later than the watchdog ends the process.

    Otherwise NCCL (10 minutes by default) would abort the process first, without stacks and with another exit status.
    A day without a watchdog.
    """
    if not seconds:
        return datetime.timedelta(days=1)
    # The longest wait is that of the first step, plus a step until the other ranks have written their stacks.
    return datetime.timedelta(seconds=START_SECONDS + 2 * seconds + 12 * GRACE_SECONDS)


class Watchdog:
    """Ends this process with status 75 if there is no `beat` for `seconds`. A context manager.

    A Python thread measures the time, since collectives and copies that hang release the GIL. Code that hangs and holds
    the GIL stops that thread, too; then faulthandler's timer, in C, writes the stacks to standard error and ends the
    process with status 1. The same timer ends a report that hangs, such as on a dead file system.

    Time in which this process was stopped (a suspended job or machine) does not count, so it continues when it is
    resumed. faulthandler's timer cannot know this, and ends a process that was stopped for longer than `seconds`.

    Args:
        seconds: maximum time of a step; 0 for no watchdog.
        hosts: every rank's host, by rank.
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float, events: EventLog, hosts: Sequence[str]) -> None:
        self._run, self._rank, self._seconds, self._events, self._hosts = run_dir, rank, seconds, events, hosts
        self._step: int | None = None
        self._beats = 0
        self._step_seconds, self._last_beat = 0.0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._arm(self._seconds + GRACE_SECONDS)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds:
            self._over.set()
            self._thread.join()

    def beat(self, step: int) -> None:
        """Report that step `step` (from 1) is done."""
        now = time.monotonic()
        self._step_seconds, self._last_beat = now - self._last_beat, now
        self._step = step
        self._beats += 1

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / 20)
        beats, silent, last_tick = self._beats, 0.0, time.monotonic()
        try:
            # Every tick restarts the timer in C, so it expires only if this thread hangs as well.
            while not self._over.wait(tick):
                self._arm(self._seconds + GRACE_SECONDS)
                now = time.monotonic()
                # If a tick takes much longer, the whole process was suspended.
                silent, last_tick = silent + min(now - last_tick, tick + 1), now
                if beats != self._beats:
                    beats, silent = self._beats, 0.0
                if silent > self._seconds + (START_SECONDS if beats == 0 else 0):
                    self._end()
        finally:
            faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _arm(seconds: float) -> None:
        """Restart the timer in C."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR_FD)

    def _end(self) -> None:
        """Write the stacks, wait for those of other ranks, report ranks without stacks, and exit."""
        wait = GRACE_SECONDS + min(self._step_seconds, self._seconds)  # they may time out up to a step later
        self._arm(wait + GRACE_SECONDS)
        try:
            stacks = self._write_stacks()
            time.sleep(wait)
            self._report(stacks)
            sys.stdout.flush()
        except OSError as error:  # a full disk; the other ranks fail in the same way
            os.write(_STDERR_FD, f"watchdog: {self._description()}; the stacks cannot be written ({error}):\n".encode())
            faulthandler.dump_traceback(_STDERR_FD)
        finally:
            # Without Python's and torch's cleanup, which would wait for the process group or the stuck thread.
            os._exit(REQUEUE)

    def _write_stacks(self) -> Path:
        folder = self._run / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        time_now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        path = folder / f"{time_now}-rank-{self._rank:05d}.txt"
        with path.open("w") as file:
            file.write(f"{self._description()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        # Not through sys.stderr: the stuck thread may hold its lock.
        os.write(_STDERR_FD, f"watchdog: {self._description()}; Python stacks in {path}\n".encode())
        return path

    def _report(self, stacks: Path) -> None:
        """Log which ranks wrote stacks; done by the lowest of them."""
        wrote = _writers(stacks.parent, stacks.stat().st_mtime - self._seconds)
        if min(wrote) != self._rank:
            return
        missing = sorted(set(range(len(self._hosts))) - wrote)
        text = f"watchdog: {self._silence()}; Python stacks of {rank_list(sorted(wrote))} in {stacks.parent}"
        if missing:
            where = ranks_on_hosts(missing, self._hosts)
            text += f"; {where} wrote none: stopped, dead, or stuck in code that holds Python's lock (GIL)"
        text += f"; ending with status {REQUEUE}, to be started again"
        # The main process, which logs events otherwise, may be the stuck one.
        events = self._events if self._rank == 0 else EventLog(self._run, is_main_process=True)
        events.emit("watchdog", self._step or 0, text, missing=missing, wrote=sorted(wrote))

    def _description(self) -> str:
        return f"rank {self._rank} on {self._hosts[self._rank]}: {self._silence()}"

    def _silence(self) -> str:
        seconds = self._seconds + (START_SECONDS if self._step is None else 0)
        return f"no step for {seconds:g} s after {'the start' if self._step is None else f'step {self._step}'}"


def _writers(folder: Path, since: float) -> set[int]:
    """The ranks that wrote stacks after `since`, a time of the file system's clock.

    This excludes stacks of earlier starts of the run, which are older than the last step.
    """
    ranks = set()
    for path in folder.iterdir():
        match = re.fullmatch(r"\w+-rank-(\d+)\.txt", path.name)
        if match and path.stat().st_mtime >= since:
            ranks.add(int(match.group(1)))
    return ranks
