"""Saving beside training: a step waits for the copy to host memory, and for the save before it if that still runs."""

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
from far_scale.train.checkpoint.run_dir import step_folder
from far_scale.train.checkpoint.write import save
from far_scale.utils.errors import UserError, print_error
from far_scale.utils.event_log import EventLog

FAILURES = 3  # saves that fail in a row before the run gives up: a disk may be full for a while, not for days


class CheckpointSaver:
    """Writes the checkpoints of a run, in a thread and with a process group of its own.

    A save that fails (a full disk) does not end the run: it is told, and the next one is tried in its time. Only
    the third in a row, or the one that somebody waits for, raises. Ephemeral ones are not counted.

    Args:
        run: the run directory.
        section: of the recipe.
        processes: who runs it.
        events: where saves are told.
        local_folder: this run's on the node's own disk, or None.
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
        self._group = dist.new_group(
            backend="gloo", timeout=processes.timeout
        )  # by itself, since the thread's messages cross the main thread's
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy = HostCopy()
        self._running: Future[None] | None = None
        self._failures, self._ephemeral = 0, False

    def save(self, step: int, pieces: Mapping[str, FlatPiece], state: dict[str, Any], ephemeral: bool = False) -> None:
        """Begin to save; returns when the pieces are copied. All ranks call this at the same step.

        Args:
            step: steps done.
            pieces: this rank's, by the tensors' names.
            state: what goes into state.json.
            ephemeral: the checkpoint stays only until the next one.

        Raises:
            UserError: this is the third save in a row that failed, on all ranks.
        """
        start = time.perf_counter()
        self._join(raise_after=FAILURES)
        copies = self._copy.of(pieces)
        self._ephemeral = ephemeral
        if ephemeral:
            state = {**state, EPHEMERAL: True}
        self._running = self._thread.submit(self._write, step, copies, state, time.perf_counter() - start)

    @property
    def busy(self) -> bool:
        """Whether a save still runs, on this rank."""
        return self._running is not None and not self._running.done()

    def save_locally(self, step: int, pieces: Mapping[str, FlatPiece], state: dict[str, Any]) -> None:
        """Begin to save on this node's own disk; all ranks call this at the same step, while none is busy.

        Raises:
            UserError: the save before was the third in a row that failed, on all ranks.
        """
        self._join(raise_after=FAILURES)
        self._ephemeral = False
        self._running = self._thread.submit(self._write_locally, step, self._copy.of(pieces), state)

    def finish(self, required: bool) -> None:
        """Wait for the save that runs.

        Args:
            required: raise where it failed; else that was told, and the run has the checkpoint before.

        Raises:
            UserError: it failed, on all ranks.
        """
        self._join(raise_after=1 if required else FAILURES + 1)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        # After an error the other ranks may never come to the messages that a save still waits for.
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
        stays = ", until the next one," if facts else ""
        self._events.emit(
            "saved",
            step,
            f"step {step}: saved {step_folder(self._run, step)}{stays} in {seconds:.1f} s; training waited "
            f"{stall:.2f} s",
            stall_seconds=stall,
            seconds=seconds,
            **facts,
        )

    def _write_locally(self, step: int, copies: Mapping[str, FlatPiece], state: dict[str, Any]) -> None:
        assert self._local_folder is not None
        try:
            who = self._processes.rank, self._processes.world_size
            local.save(self._local_folder, step, *who, copies, state, self._latest)
        except (UserError, OSError) as error:  # of one rank alone, so it must not change what the ranks do together
            print_error(UserError(f"step {step}: no node-local checkpoint: {error}"))
