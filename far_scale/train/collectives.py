"""The collectives of a run: what a step is expected to send, and what one step of each stage does send."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from far_scale.distributed.ledger import Ledger, table
from far_scale.train.engine import communication_backend
from far_scale.train.faults.events import Events
from far_scale.train.processes import Processes

_STEADY = 3
"""The step, of those that are done in one go, from which on ZeRO-3 knows the order of the modules: steps are alike."""


class StepLedger:
    """Notes the collectives of one step of each stage on the main process, prints them and makes them an event.

    Nothing is noted in a stage of fewer than three steps, or where the process is alone.

    Args:
        hosts: every rank's host, by rank.
        processes: who runs.
        events: of this process.
        say: prints a text.
    """

    def __init__(self, hosts: Sequence[str], processes: Processes, events: Events, say: Callable[[str], None]) -> None:
        self._ledger = Ledger(hosts) if processes.main and processes.count > 1 else None
        self._events, self._say, self._step = events, say, 0

    def begin_stage(self, done: int) -> None:
        """A stage begins, or is gone on with, after so many steps of the run."""
        self._step = done + _STEADY

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around all that a step sends, which is step number `step` (from 1)."""
        if self._ledger is None or step != self._step:
            yield
            return
        with self._ledger.recording(communication_backend()):
            yield
        entries = self._ledger.entries()
        calls, within, between = (
            sum(values) for values in zip(*((e.calls, e.within, e.between) for e in entries), strict=True)
        )
        self._events.tell(
            "collectives",
            step,
            f"step {step}: {calls} collectives, of which a rank sends {within / 1e6:,.1f} MB in its node and "
            f"{between / 1e6:,.1f} MB to other nodes",
            within=within,
            between=between,
            collectives=[
                {
                    **entry.key._asdict(),
                    "calls": entry.calls,
                    "message_bytes": entry.message_bytes,
                    "within": entry.within,
                    "between": entry.between,
                }
                for entry in entries
            ],
        )
        self._say("\n".join(table(entries)))
