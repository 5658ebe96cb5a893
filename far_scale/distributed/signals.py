"""Signals that ask a run to stop. Loaded before torch, whose threads must inherit what is set here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from far_scale.distributed.exit_codes import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SAME = 3.0
"""Seconds within which signals are one request: a launcher forwards what the process may have got already."""
SAME_KEY = 0.7
"""The same for Ctrl-C, which a person may press again. The terminal sends it to torchrun as well, which forwards it."""


class StopSignals:
    """Takes `SIGNALS` from now on: the first asks for a stop, a second one ends the process at once.

    Call this first of all, before anything makes threads or processes: the signals are blocked, threads and child
    processes inherit that, and so data workers and helpers do not see them (unless they ask for one, as wandb's does
    for SIGTERM). A thread of its own waits for them, so that
    the second signal works even while the main thread is stuck in a collective.

    A library may unblock some of them again in the thread that calls it: Python's own multiprocessing does so with
    SIGINT and SIGTERM when it starts its first process. A handler then blocks them again and passes the signal on.

    SIGHUP is left alone where it is ignored: nohup asks for that.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._signals = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
        self._process = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        for number in self._signals:
            signal.signal(number, self._pass_on)
        threading.Thread(target=self._take, name="signals", daemon=True).start()

    def _pass_on(self, number: int, _: object) -> None:
        if os.getpid() == self._process:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        else:  # a process forked from this one has no thread that takes it
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _take(self) -> None:
        number = signal.sigwait(self._signals)
        self.wanted, first = signal.Signals(number).name, time.monotonic()
        rank = os.environ.get("RANK", "0")
        if number == signal.SIGINT and rank == "0":
            print("Ctrl-C: finishing the step, then saving; again to end at once", file=sys.stderr, flush=True)
        while time.monotonic() - first < (SAME_KEY if number == signal.SIGINT else SAME):
            number = signal.sigwait(self._signals)
        print(f"[rank {rank}] {signal.Signals(number).name} again: ending at once", file=sys.stderr, flush=True)
        os._exit(REQUEUE)
