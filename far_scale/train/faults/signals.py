"""Signals that ask a run to stop. Loaded before torch, whose threads must inherit what is set here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from far_scale.train.faults.exits import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SAME = 3.0
"""Seconds within which signals are one request: a launcher forwards what the process may have got already."""


class StopSignals:
    """Takes SIGTERM, SIGUSR1 and SIGUSR2 from now on: the first asks for a stop, a second one ends the process at once.

    Call this first of all, before anything makes threads or processes: the signals are blocked, threads and child
    processes inherit that, and so data workers and helpers do not see them (unless they ask for one, as wandb's does
    for SIGTERM). A thread of its own waits for them, so that
    the second signal works even while the main thread is stuck in a collective.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._take, name="signals", daemon=True).start()

    def _take(self) -> None:
        number = signal.sigwait(SIGNALS)
        self.wanted, first = signal.Signals(number).name, time.monotonic()
        while time.monotonic() - first < SAME:
            number = signal.sigwait(SIGNALS)
        rank = os.environ.get("RANK", "0")
        print(f"[rank {rank}] {signal.Signals(number).name} again: ending at once", file=sys.stderr, flush=True)
        os._exit(REQUEUE)
