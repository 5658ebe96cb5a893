"""Signals that stop a run. Imported before torch, since its threads must inherit the signal mask."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from far_scale.distributed.exit_codes import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
DUPLICATE_SECONDS = 3.0
"""Further signals within this time are the same request: launchers forward signals that the process also got itself."""
DUPLICATE_CTRL_C_SECONDS = 0.7
"""The same for Ctrl-C, which a user may press twice. The terminal sends it to torchrun, too, which forwards it."""


class StopSignals:
    """Handles `SIGNALS` from now on: the first one requests a stop, a second one ends the process at once.

    Create it first, before any thread or process: it blocks the signals, and threads and child processes inherit that,
    so data workers do not receive them (unless they unblock them, as wandb's process does with SIGTERM). A separate
    thread waits for the signals, so the second one works even while the main thread hangs in a collective.

    A library may unblock signals in the thread that calls it: Python's multiprocessing does so with SIGINT and SIGTERM
    when it starts its first process. A handler then blocks them again and forwards the signal.

    SIGHUP stays ignored if it was, as under nohup.

    Attributes:
        received: name of the first signal; None before.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._signals = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
        self._process = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        for number in self._signals:
            signal.signal(number, self._forward)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _forward(self, number: int, _: object) -> None:
        if os.getpid() == self._process:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        else:  # a forked process has no thread that waits for it
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _wait(self) -> None:
        number = signal.sigwait(self._signals)
        self.received, first = signal.Signals(number).name, time.monotonic()
        rank = os.environ.get("RANK", "0")
        if number == signal.SIGINT and rank == "0":
            print("Ctrl-C: finishing the step, then saving; again to end at once", file=sys.stderr, flush=True)
        while time.monotonic() - first < (DUPLICATE_CTRL_C_SECONDS if number == signal.SIGINT else DUPLICATE_SECONDS):
            number = signal.sigwait(self._signals)
        print(f"[rank {rank}] {signal.Signals(number).name} again: ending at once", file=sys.stderr, flush=True)
        os._exit(REQUEUE)
