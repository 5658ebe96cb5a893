"""Saves in the background: a step waits only for the copy to host memory, and for a save that is still running."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from far_scale.config.schema import CheckpointSection
from far_scale.distributed.process_group import Processes
from far_scale.train.checkpoint import local
from far_scale.train.checkpoint.folders import EPHEMERAL
from far_scale.train.checkpoint.pieces import FlatPiece, HostCopy
from far_scale.train.checkpoint.write import save
from far_scale.train.run_dir import step_folder
from far_scale.utils.errors import UserError, print_error
from far_scale.utils.event_log import EventLog

MAX_FAILURES = 3  # failed saves in a row before the run ends: a disk may be full for a while, not for days


class CheckpointSaver:
    """Writes the checkpoints of a run, in a thread and with a process group of its own.

    A failed save (a full disk) does not end the run: it is an event, and the next save is tried when due. Only the
    third failure in a row, or that of a required save, raises. Ephemeral saves are not counted.

    Args:
        run: the run directory.
        section: of the recipe.
        processes: the run's.
        events: gets an event for each save.
        local_folder: this run's folder on the node's own disk, or None.
        latest: `latest_stamp` of the run now, the same on all ranks.
    """

    def __init__(
        self,
        run: Path,
        section: CheckpointSection,
        processes: Processes,
        events: EventLog,
        local_folder: Path | None = None,
        latest: str | None = None,
    ) -> None:
        self._run, self._section, self._processes, self._events = run, section, processes, events
        self._local_folder, self._latest = local_folder, latest
        # A group of its own, since the thread's messages interleave with the main thread's.
        self._group = dist.new_group(backend="gloo", timeout=processes.timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host_copy = HostCopy()
        self._running: Future[None] | None = None
        self._failures, self._ephemeral = 0, False

    def save(self, step: int, pieces: Mapping[str, FlatPiece], state: dict[str, Any], ephemeral: bool = False) -> None:
        """Start a save; returns when the pieces are copied. All ranks call this at the same step.

        Args:
            step: steps done.
            pieces: this rank's, by the tensors' names.
            state: for state.json.
            ephemeral: remove the checkpoint after the next one.

        Raises:
            UserError: the save before was the third failure in a row, on all ranks.
        """
        start = time.perf_counter()
        self._join(raise_after=MAX_FAILURES)
        copies = self._host_copy.copy(pieces)
        self._ephemeral = ephemeral
        if ephemeral:
            state = {**state, EPHEMERAL: True}
        self._running = self._thread.submit(self._write, step, copies, state, time.perf_counter() - start)

    @property
    def busy(self) -> bool:
        """Whether a save is still running on this rank."""
        return self._running is not None and not self._running.done()

    def save_locally(self, step: int, pieces: Mapping[str, FlatPiece], state: dict[str, Any]) -> None:
        """Start a save on this node's own disk; all ranks call this at the same step, while none is busy.

        Raises:
            UserError: the save before was the third failure in a row, on all ranks.
        """
        self._join(raise_after=MAX_FAILURES)
        self._ephemeral = False
        self._running = self._thread.submit(self._write_locally, step, self._host_copy.copy(pieces), state)

    def finish(self, required: bool) -> None:
        """Wait for the running save.

        Args:
            required: raise if it failed; otherwise the run keeps the checkpoint before.

        Raises:
            UserError: it failed, on all ranks.
        """
        self._join(raise_after=1 if required else MAX_FAILURES + 1)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        # After an error the other ranks may never send the messages that a save still waits for.
        self._thread.shutdown(wait=error is None, cancel_futures=True)

    def _join(self, raise_after: int) -> None:
        if self._running is None:
            return
        try:
            self._running.result()
            self._failures = 0
        except UserError:
            if not self._ephemeral:
                self._failures += 1
            if self._failures >= raise_after:
                raise
        finally:
            self._running = None

    def _write(self, step: int, copies: Mapping[str, FlatPiece], state: dict[str, Any], stall: float) -> None:
        start = time.perf_counter()
        try:
            self._latest = save(self._run, step, copies, state, self._section.keep, self._group)
        except UserError as error:
            self._events.emit("save-failed", step, f"step {step}: no checkpoint: {error}", stall_seconds=stall)
            raise
        seconds = time.perf_counter() - start
        facts = {EPHEMERAL: True} if EPHEMERAL in state else {}
        until = ", until the next one," if facts else ""
        self._events.emit(
            "saved",
            step,
            f"step {step}: saved {step_folder(self._run, step)}{until} in {seconds:.1f} s; training waited "
            f"{stall:.2f} s",
            stall_seconds=stall,
            seconds=seconds,
            **facts,
        )

    def _write_locally(self, step: int, copies: Mapping[str, FlatPiece], state: dict[str, Any]) -> None:
        assert self._local_folder is not None
        try:
            ranks = self._processes.rank, self._processes.world_size
            local.save(self._local_folder, step, *ranks, copies, state, self._latest)
        except (UserError, OSError) as error:  # of one rank only, so it must not change what the ranks do together
            print_error(UserError(f"step {step}: no node-local checkpoint: {error}"))
