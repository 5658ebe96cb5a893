"""The watchdog: a run that ends no step for too long writes every rank's Python stacks and ends, to be started again.

Each rank watches itself, since a stuck collective keeps all of them. The ranks that still run a thread write their
stacks to `run_dir/stacks/`; a rank that is stopped or dead writes none, and by that the others can name it.
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
"""What the first step may take beyond the set time: building, loading, NCCL's first contact and the compiler, which
together take minutes on a large job, whatever a step takes afterwards."""

GRACE_SECONDS = 5.0
"""How long a rank waits, beyond a step's time, for the stacks of the others before it ends and so ends them."""

_STDERR = 2


def collective_timeout(seconds: float) -> datetime.timedelta:
    """How long a collective may take, for a watchdog of `seconds`: longer than the watchdog takes to end the process.

    Otherwise NCCL (10 minutes by default) would abort the process first, without stacks and with another exit status.
    A day where there is no watchdog.
    """
    if not seconds:
        return datetime.timedelta(days=1)
    # At most the first step's time, and a step's time more until the other ranks have written their stacks.
    return datetime.timedelta(seconds=START_SECONDS + 2 * seconds + 12 * GRACE_SECONDS)


class Watchdog:
    """Ends this process with status 75 where no `beat` comes for `seconds`. A context manager.

    A thread of Python's counts, as a collective or a copy that hangs lets it run. Code that hangs and holds Python's
    lock stops that thread, too; then a timer of faulthandler's in C writes the stacks to standard error and ends the
    process with status 1. The same timer ends a report that hangs itself, such as on a dead file system.

    Time in which this process was stopped (a suspended job or machine) does not count, so that it goes on when it is
    resumed; only faulthandler's timer cannot tell, and ends a process that was stopped for longer than `seconds`.

    Args:
        run_dir: the run directory.
        rank: this process's number.
        seconds: without a step after which it ends; 0 for never.
        events: of this process.
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
        """Step number `step` (from 1) is done."""
        now = time.monotonic()
        self._step_seconds, self._last_beat = now - self._last_beat, now
        self._step = step
        self._beats += 1

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / 20)
        beats, without, before = self._beats, 0.0, time.monotonic()
        try:
            # The timer in C starts anew with every tick, so it only runs out where this thread is stuck as well.
            while not self._over.wait(tick):
                self._arm(self._seconds + GRACE_SECONDS)
                now = time.monotonic()
                # A tick that took far longer was a stop of the whole process.
                without, before = without + min(now - before, tick + 1), now
                if beats != self._beats:
                    beats, without = self._beats, 0.0
                if without > self._seconds + (START_SECONDS if beats == 0 else 0):
                    self._end()
        finally:
            faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _arm(seconds: float) -> None:
        """Set the timer in C anew."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _end(self) -> None:
        """Write the stacks, give the others time for theirs, say who wrote none, and end the process."""
        wait = GRACE_SECONDS + min(self._step_seconds, self._seconds)  # they may have begun up to a step later
        self._arm(wait + GRACE_SECONDS)
        try:
            own = self._write_stacks()
            time.sleep(wait)
            self._tell(own)
            sys.stdout.flush()
        except OSError as error:  # a full disk, where the others fail likewise
            os.write(_STDERR, f"watchdog: {self._what()}; the stacks cannot be written ({error}):\n".encode())
            faulthandler.dump_traceback(_STDERR)
        finally:
            # Nothing of Python's or torch's own end, which would wait for the group or the stuck thread.
            os._exit(REQUEUE)

    def _write_stacks(self) -> Path:
        folder = self._run / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        time_now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        path = folder / f"{time_now}-rank-{self._rank:05d}.txt"
        with path.open("w") as file:
            file.write(f"{self._what()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        # Not by way of sys.stderr, whose lock the stuck thread may hold.
        os.write(_STDERR, f"watchdog: {self._what()}; Python stacks in {path}\n".encode())
        return path

    def _tell(self, own: Path) -> None:
        """The lowest rank that wrote its stacks says which ranks did, and which did not."""
        wrote = _writers(own.parent, own.stat().st_mtime - self._seconds)
        if min(wrote) != self._rank:
            return
        missing = sorted(set(range(len(self._hosts))) - wrote)
        text = f"watchdog: {self._silence()}; Python stacks of {rank_list(sorted(wrote))} in {own.parent}"
        if missing:
            where = ranks_on_hosts(missing, self._hosts)
            text += f"; {where} wrote none: stopped, dead, or stuck in code that holds Python's lock"
        text += f"; ending with status {REQUEUE}, to be started again"
        # The process that usually tells may be the one that is stuck.
        events = self._events if self._rank == 0 else EventLog(self._run, is_main_process=True)
        events.emit("watchdog", self._step or 0, text, missing=missing, wrote=sorted(wrote))

    def _what(self) -> str:
        return f"rank {self._rank} on {self._hosts[self._rank]}: {self._silence()}"

    def _silence(self) -> str:
        seconds = self._seconds + (START_SECONDS if self._step is None else 0)
        return f"no step for {seconds:g} s after {'the start' if self._step is None else f'step {self._step}'}"


def _writers(folder: Path, since: float) -> set[int]:
    """The ranks that wrote stacks since `since`, by the clock of the file system.

    Stacks of an earlier start of the run are older than the last step of this one, so older than the watchdog's time.
    """
    found = set()
    for path in folder.iterdir():
        match = re.fullmatch(r"\w+-rank-(\d+)\.txt", path.name)
        if match and path.stat().st_mtime >= since:
            found.add(int(match.group(1)))
    return found
