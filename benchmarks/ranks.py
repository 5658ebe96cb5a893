"""A training over several starts of its ranks, each begun as a launcher would, and the files that it writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from measure import REPOSITORY

from far_scale.distributed.exit_codes import DONE, REQUEUE
from far_scale.utils.event_log import read_events

GRACE_SECONDS = 10.0
"""Seconds that the other ranks have to end after one has ended as it should."""

PATIENCE_SECONDS = 600.0
"""A training without any output for so long hangs."""

_LOOK_SECONDS = 0.01


class FailedError(Exception):
    """A training made no progress."""


class Ranks:
    """One start of a training's processes. A context manager that kills what is left of them.

    Like srun with --kill-on-bad-exit it kills the others when one ends badly; and when one has ended otherwise, after
    a while.

    Args:
        count: how many ranks.
        arguments: of `python -m far_scale.train`.
        output: file that all of them write into.
        ranks_a_node: so many each on nodes n0, n1, ... by name; None for this machine's own.
    """

    def __init__(self, count: int, arguments: Sequence[str], output: Path, ranks_a_node: int | None = None) -> None:
        self.output = output
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        common = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common.setdefault("OMP_NUM_THREADS", "1")
        common["WORLD_SIZE"] = str(count)
        nodes = [
            {} if ranks_a_node is None else {"SLURMD_NODENAME": f"n{rank // ranks_a_node}"} for rank in range(count)
        ]
        command = [sys.executable, "-m", "far_scale.train", *arguments]
        with output.open("wb") as file:
            self._processes = [
                subprocess.Popen(
                    command,
                    env={**common, **nodes[rank], "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(count)
            ]
        self._first_end: float | None = None

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send one rank a signal."""
        self._processes[rank].send_signal(number)

    def kill(self) -> None:
        """Kill all that still run."""
        for process in self._processes:
            process.kill()

    def ended(self) -> list[int] | None:
        """Exit statuses by rank (negative: the signal that ended it) when all have ended."""
        statuses = [process.poll() for process in self._processes]
        over = [status for status in statuses if status is not None]
        if len(over) == len(statuses):
            return over
        if over:
            now = time.monotonic()
            self._first_end = self._first_end or now
            if any(status not in (DONE, REQUEUE) for status in over) or now - self._first_end > GRACE_SECONDS:
                self.kill()
        return None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for process in self._processes:
            process.wait()


class Training:
    """A training in one run directory, over all its starts.

    Attributes:
        run: the run directory.
        starts: how many there were.
        origin: the step that the latest start went on from; None before it has said so.
        reached: the last step of the latest start, `origin` before its first; None before it has opened its log.
        high: the last step that any start has reached.

    Args:
        run: the run directory.
        arguments: of `python -m far_scale.train`, but for the run directory; log.every must be 1.
        outputs: an existing folder for what the ranks print, a file a start.
    """

    def __init__(self, run: Path, arguments: Sequence[str], outputs: Path) -> None:
        self.run, self._arguments, self._outputs = run, [*arguments, f"run_dir={run}"], outputs
        self._log = run / "log.jsonl"
        self.starts, self.high = 0, 0
        self.origin: int | None = None
        self.reached: int | None = None

    def start(self, ranks: int) -> Ranks:
        """Start the ranks."""
        self.starts += 1
        self.origin = self.reached = None
        self._begun_before, self._file_before = len(self._begun()), self._file()
        self._news = time.monotonic()
        return Ranks(ranks, self._arguments, self._outputs / f"{self.run.name}-start-{self.starts:03d}.txt")

    def look(self) -> None:
        """Bring the attributes up to date."""
        before = (self.origin, self.reached)
        if self.origin is None and len(begun := self._begun()) > self._begun_before:
            self.origin = begun[-1]["step"]
        # Each start writes the log anew without what was past its checkpoint, as another file of the same name.
        if self.origin is not None and self._file() not in (None, self._file_before):
            self.reached = max(self.origin, self._last_logged())
            self.high = max(self.high, self.reached)
        if (self.origin, self.reached) != before:
            self._news = time.monotonic()

    @property
    def done(self) -> int:
        """Steps that the latest start has done."""
        return 0 if self.origin is None or self.reached is None else self.reached - self.origin

    @property
    def saving(self) -> bool:
        """Whether a checkpoint lies half-written."""
        return any((self.run / "checkpoints").glob("step-*.part"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of one kind."""
        return [event for event in read_events(self.run) if event["event"] == kind]

    def until(self, ranks: Ranks, happened: Callable[[], bool]) -> bool:
        """Wait for something; returns whether it happened before all ranks had ended.

        Raises:
            FailedError: there were no news for long.
        """
        while True:
            self.look()
            if happened():
                return True
            if ranks.ended() is not None:
                return False
            if time.monotonic() - self._news > PATIENCE_SECONDS:
                raise FailedError(f"start {self.starts}: no news for {PATIENCE_SECONDS:g} s{tail(ranks.output)}")
            time.sleep(_LOOK_SECONDS)

    def end(self, ranks: Ranks) -> list[int]:
        """Wait until all ranks have ended; returns their exit statuses."""
        self.until(ranks, lambda: False)
        self.look()
        statuses = ranks.ended()
        assert statuses is not None
        return statuses

    def _begun(self) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run) if event["event"] in ("began", "resumed")]

    def _file(self) -> int | None:
        try:
            return self._log.stat().st_ino
        except FileNotFoundError:
            return None

    def _last_logged(self) -> int:
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]  # one without its end is still being written
        return json.loads(lines[-1])["step"] if lines else 0


def tail(output: Path) -> str:
    """The last lines that the ranks printed, for an error."""
    return f"; they said last:\n{output.read_text(errors='replace')[-2000:]}"
