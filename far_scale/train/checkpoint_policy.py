"""What becomes of the weights after a step: nothing, a checkpoint, or back to the last one."""

from __future__ import annotations

import time
from typing import Any

from far_scale.config.recipe import Recipe
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.consensus import StepFlags
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.train.checkpoint.saver import CheckpointSaver
from far_scale.train.ema import ShardedEMA
from far_scale.train.lanes_again import LaneStates
from far_scale.train.resume import Resume, pieces
from far_scale.train.step_guard import StepGuard


class CheckpointPolicy:
    """Saves when a checkpoint is due, never what may be spoilt, and goes back after too many skipped steps.

    Args:
        recipe: the run's.
        engine, ema: what to keep.
        guard: which knows how the steps went.
        saver: what writes.
        resume: what reads.
        card: what stands in every checkpoint of the run, by `describe`.
        processes: who runs it.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Any,
        ema: ShardedEMA,
        guard: StepGuard,
        saver: CheckpointSaver,
        resume: Resume,
        card: dict[str, Any],
        processes: Processes,
    ) -> None:
        self._recipe, self._engine, self._ema, self._guard = recipe, engine, ema, guard
        self._saver, self._resume, self._card, self._processes = saver, resume, card, processes
        self._owed, self._saved = False, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save, by this rank's clock."""
        minutes = self._recipe.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def after_step(self, done: int, packs: list[Pack], stage_card: dict[str, Any], outcome: StepFlags) -> None:
        """Do what is due; all ranks do the same, by what they agree on.

        Args:
            done: steps done.
            packs: that this rank trained on in the last one.
            stage_card: what stands in every checkpoint of the stage, by `describe_stage`.
            outcome: of the vote after the step.

        Raises:
            UserError: too many steps were skipped, and going back does not help; or saves failed too often.
        """
        section, last = self._recipe.checkpoint, done == self._recipe.train.steps
        # By what is known of the steps before this one, whether or not a save asks about this one below: so a run that
        # was stopped and resumed goes back at the same step.
        went_back = self._guard.in_row >= self._recipe.faults.skipped_in_row
        if went_back:
            self._saver.finish(required=False)
            self._resume.roll_back(done, self._engine, self._ema, self._guard)
        self._owed = self._owed or went_back or outcome.stop or last or done % section.every == 0
        timed = outcome.save_due and not outcome.saving
        locally = section.local_dir is not None and done % section.local_every == 0 and not outcome.saving
        if not (self._owed or timed or locally):
            return
        self._guard.settle()  # a checkpoint says how its own step went
        if self._guard.in_row and not last:
            return  # it may be the weights that are bad, and must not push out good ones: after the next good step
        state = {**self._card, **stage_card, "guard": self._guard.state(), "went_back": went_back}
        state["lanes"] = gather_lane_states(packs, self._processes)
        if self._owed or timed:
            self._saver.save(done, pieces(self._engine, self._ema), state, ephemeral=not self._owed)
            self._owed, self._saved = False, time.monotonic()
        else:
            self._saver.save_locally(done, pieces(self._engine, self._ema), state)


def gather_lane_states(packs: list[Pack], processes: Processes) -> LaneStates:
    """All lanes' states after these packs, this rank's, on every process."""
    parts = all_gather_objects({pack.lane: pack.lane_state for pack in packs}, processes.host_group)
    return {lane: state for part in parts for lane, state in sorted(part.items())}
