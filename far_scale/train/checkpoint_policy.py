"""When a run saves a checkpoint, and when it rolls back to the last one."""

from __future__ import annotations

import time
from typing import Any

from far_scale.config.schema import CheckpointSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.consensus import StepFlags
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.train.checkpoint.saver import CheckpointSaver
from far_scale.train.ema import ShardedEMA
from far_scale.train.resume import Resume
from far_scale.train.resume_lanes import LaneStates
from far_scale.train.run_state import training_pieces
from far_scale.train.step_guard import StepGuard


class CheckpointPolicy:
    """Saves when a checkpoint is due, but never after a skipped step, and rolls back after too many skipped steps.

    Args:
        section: the recipe's.
        last_step: steps of the whole run.
        max_skipped: skipped steps in a row after which it rolls back.
        engine, ema: what to save.
        guard: detects skipped steps.
        saver: writes checkpoints.
        resume: loads them.
        metadata: `run_metadata`, for every checkpoint of the run.
        processes: the run's.
    """

    def __init__(
        self,
        section: CheckpointSection,
        last_step: int,
        max_skipped: int,
        engine: Any,
        ema: ShardedEMA,
        guard: StepGuard,
        saver: CheckpointSaver,
        resume: Resume,
        metadata: dict[str, Any],
        processes: Processes,
    ) -> None:
        self._section, self._last_step, self._max_skipped = section, last_step, max_skipped
        self._engine, self._ema, self._guard = engine, ema, guard
        self._saver, self._resume, self._metadata, self._processes = saver, resume, metadata, processes
        self._save_pending, self._last_save = False, time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save, by this rank's clock."""
        minutes = self._section.every_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def after_step(self, done: int, packs: list[Pack], stage_metadata: dict[str, Any], flags: StepFlags) -> None:
        """Save or roll back, if due; all ranks do the same, by the agreed flags.

        Args:
            done: steps done.
            packs: this rank's packs of the last step.
            stage_metadata: `stage_metadata`, for every checkpoint of the stage.
            flags: agreed on after the step.

        Raises:
            UserError: too many steps were skipped and a roll-back did not help, or saves failed too often.
        """
        is_last = done == self._last_step
        # Uses only the verdicts of earlier steps, even if a save waits for this step's verdict below: so a run that was
        # stopped and resumed rolls back at the same step.
        rolled_back = self._guard.in_row >= self._max_skipped
        if rolled_back:
            self._saver.finish(required=False)
            self._resume.roll_back(done, self._engine, self._ema, self._guard)
        self._save_pending = (
            self._save_pending or rolled_back or flags.stop or is_last or done % self._section.every == 0
        )
        save_by_time = flags.save_due and not flags.saving
        save_locally = (
            self._section.local_dir is not None and done % self._section.local_every == 0 and not flags.saving
        )
        if not (self._save_pending or save_by_time or save_locally):
            return
        self._guard.settle()  # a checkpoint records whether its last step was skipped
        if self._guard.in_row and not is_last:
            return  # the weights may be bad and must not replace good ones: save after the next good step
        state = {**self._metadata, **stage_metadata, "guard": self._guard.state(), "went_back": rolled_back}
        state["lanes"] = gather_lane_states(packs, self._processes)
        pieces = training_pieces(self._engine, self._ema)
        if self._save_pending or save_by_time:
            self._saver.save(done, pieces, state, ephemeral=not self._save_pending)
            self._save_pending, self._last_save = False, time.monotonic()
        else:
            self._saver.save_locally(done, pieces, state)


def gather_lane_states(packs: list[Pack], processes: Processes) -> LaneStates:
    """All lanes' states after these packs of this rank, on every process."""
    parts = all_gather_objects({pack.lane: pack.lane_state for pack in packs}, processes.host_group)
    return {lane: state for part in parts for lane, state in sorted(part.items())}
