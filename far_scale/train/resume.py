"""Resuming a run from a checkpoint, and rolling back to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_scale.config.recipe import Recipe
from far_scale.data.loader.mixture import Mixture
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes, all_gather_objects, broadcast_from_main
from far_scale.train import checkpoint
from far_scale.train.checkpoint import local
from far_scale.train.curriculum import Stage
from far_scale.train.deepspeed_adapter import use_loaded_weights
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import set_adam_step
from far_scale.train.resume_checks import check_fits, check_same_classes, find_changes
from far_scale.train.resume_lanes import LaneStates, resume_lanes
from far_scale.train.run_dir import existing_steps, latest_stamp, no_step_up_to, read_latest, run_identity
from far_scale.train.run_state import training_pieces
from far_scale.train.step_guard import StepGuard
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog

_ALL_DAMAGED = (
    "{}/checkpoints: every checkpoint is damaged; repair one and take .damaged off its name, or remove this folder to "
    "train from the start"
)


@dataclass(frozen=True)
class ResumePoint:
    """The state that a run resumes from.

    Attributes:
        step: steps done.
        lanes: the lanes' states after them; None where each lane begins.
        guard: the guard's state after them, or None.
        beginnings: how the lanes began after their number changed in this stage, as in `PackingConfig`.
        lanes_changed: whether the number of lanes changes now, or how their packs are filled.
    """

    step: int = 0
    lanes: LaneStates | None = None
    guard: dict[str, Any] | None = None
    beginnings: tuple[Mapping[str, Any], ...] = ()
    lanes_changed: bool = False


class Resume:
    """Finds the checkpoint that a run resumes from, checks that the run may do so, and loads it.

    Args:
        recipe: the run's.
        plan: its stages.
        processes: the run's.
        events: gets an event for damage and for changes.
    """

    def __init__(self, recipe: Recipe, plan: list[Stage], processes: Processes, events: EventLog) -> None:
        self._recipe, self._plan, self._processes, self._events = recipe, plan, processes, events
        self._run = Path(recipe.run_dir)
        self.latest = broadcast_from_main(lambda: latest_stamp(self._run), processes)
        """`latest_stamp` of the run when it started, before damage could change it."""

    def newest_undamaged(self) -> int:
        """The step of the newest checkpoint in the run directory that is not damaged; 0 where there is none yet.

        The ranks share the check. A damaged one is an event and is quarantined.

        Raises:
            UserError: all checkpoints are damaged, or all up to the one that `latest` names.
        """
        group = self._processes.host_group
        steps, named = broadcast_from_main(self._steps_to_try, self._processes)
        for number, step in enumerate(steps):
            folder = checkpoint.step_folder(self._run, step)
            problems = all_gather_objects(
                checkpoint.damage(folder, self._processes.rank, self._processes.world_size), group
            )
            problem = next((line for line in problems if line is not None), None)
            if problem is None:
                if self._processes.is_main_process and step != named:
                    if number == 0:
                        path = f"{self._run}/checkpoints/latest"
                        what = f"{path} is missing" if named is None else f"the checkpoint that {path} names is gone"
                        self._events.emit("latest", step, f"{what}; resuming from the newest, step {step}")
                    checkpoint.point_at(folder)
                return step
            next_try = f"resuming from step {steps[number + 1]}" if number + 1 < len(steps) else "there is none before"
            if self._processes.is_main_process:
                quarantined = checkpoint.quarantine(folder)
                self._events.emit("damaged", step, f"damaged checkpoint: {problem}; now {quarantined.name}; {next_try}")
        if steps:
            later = broadcast_from_main(lambda: existing_steps(self._run), self._processes)
            raise UserError(no_step_up_to(self._run, steps[0], later) if later else _ALL_DAMAGED.format(self._run))
        return 0

    def _steps_to_try(self) -> tuple[list[int], int | None]:
        """`steps_to_try`, and the step that `latest` names.

        Raises:
            UserError: `latest` is not readable, or all checkpoints are gone or damaged.
        """
        steps, named = checkpoint.steps_to_try(self._run), read_latest(self._run)
        if not steps and any((self._run / "checkpoints").glob("step-*.damaged")):
            raise UserError(_ALL_DAMAGED.format(self._run))
        return steps, named

    def check_start_from(self, step: int, accept_changes: bool) -> None:
        """Refuse start weights for a run that has checkpoints and started from other weights: they would not be read.

        Args:
            step: of the newest whole checkpoint, or 0.
            accept_changes: emit an event instead.

        Raises:
            UserError: names what the run started from.
        """
        folder = self._recipe.train.start_from
        if folder is None or step == 0:
            return
        where = checkpoint.step_folder(self._run, step)
        before = checkpoint.read_state(where)["recipe"]["train"].get("start_from")
        if before is not None and Path(before).resolve() == Path(folder).resolve():
            return
        what = "random weights" if before is None else before
        problem = f"train.start_from={folder}: not read, since {where} exists and the run started from {what}"
        if not accept_changes:
            fix = "use another run_dir to start from these weights, or leave the key as it was to resume"
            raise UserError(f"{problem}; {fix}")
        self._events.emit("accepted-changes", step, problem, changes=[f"train.start_from {before} -> {folder}"])

    def restore(
        self,
        step: int,
        engine: Any,
        ema: ShardedEMA,
        local_folder: Path | None,
        run_metadata: dict[str, Any],
        stage_metadata: dict[int, dict[str, Any]],
        sources: Mapping[int, ShardSet | Mixture],
        accept_changes: bool,
    ) -> ResumePoint:
        """Load a checkpoint into engine and EMA: that of `step` in the run directory, or a later node-local one.

        Args:
            step: of the newest whole checkpoint, or 0.
            engine, ema: what to load into.
            local_folder: this run's folder on the node's own disk, or None.
            run_metadata, stage_metadata: those of this run's checkpoints; of stages, those that are not over.
            sources: what the stages to come read, by the stage's index.
            accept_changes: resume even if something that affects the result has changed.

        Raises:
            UserError: it was written by another model, or by another recipe and that is not accepted.
        """
        pieces, ranks = training_pieces(engine, ema), (self._processes.rank, self._processes.world_size)
        local_step = None
        if local_folder is not None:
            local_step = local.newest(local_folder, step, *ranks, pieces, self.latest, self._processes.host_group)
        if local_step is not None and local_folder is not None:
            where, state = local_folder, local.read_state(local_folder, local_step, *ranks)
        elif step:
            where = checkpoint.step_folder(self._run, step)
            state = checkpoint.read_state(where)
        else:
            return ResumePoint()
        check_fits(where, state, self._plan)
        now = {**run_metadata, **stage_metadata.get(state["stage"], {})}
        if self._recipe.model.condition == "label":
            check_same_classes(where, state, now)
        lanes = resume_lanes(where, state, self._plan, self._recipe.seed, sources)
        self._check_changes(where, state, now, lanes.change, accept_changes)
        if local_step is not None:
            local.load(where, local_step, *ranks, pieces)
        else:
            checkpoint.load(where, pieces)
        guard = state.get("guard")
        set_adam_step(engine, state["step"] if guard is None else guard["updates"])
        use_loaded_weights(engine)
        self._events.emit("resumed", state["step"], f"resuming from step {state['step']} of {where}")
        return ResumePoint(state["step"], lanes.states, guard, lanes.beginnings, lanes.change is not None)

    def roll_back(self, done: int, engine: Any, ema: ShardedEMA, guard: StepGuard) -> None:
        """After too many skipped steps: load weights, moments and EMA of the newest checkpoint.

        Steps and data continue after the skipped batches.

        Args:
            done: steps done.
            engine, ema: what to load into.
            guard: reset.

        Raises:
            UserError: there is no checkpoint, or no step was good since the last roll-back wrote it.
        """
        row = f"step {done}: {guard.in_row} steps in a row were skipped"
        hint = f"{self._run}/events.jsonl names them and their samples; lower optimizer.learning_rate or fix the data"
        step = self.newest_undamaged()
        if step == 0:
            raise UserError(f"{row}, and there is no checkpoint to go back to: {hint}")
        folder = checkpoint.step_folder(self._run, step)
        state = checkpoint.read_state(folder)
        saved_guard: dict[str, Any] = state.get("guard") or {"updates": step}
        if state.get("went_back") and saved_guard["updates"] == guard.updates:
            raise UserError(f"{row}, straight after going back for the same reason: {hint}")
        checkpoint.load(folder, training_pieces(engine, ema))
        guard.updates = saved_guard["updates"]
        guard.reset_after_rollback()
        set_adam_step(engine, guard.updates)
        use_loaded_weights(engine)
        self._events.emit("rolled-back", done, f"{row}; continuing with the weights of step {step}", weights_of=step)

    def _check_changes(
        self, where: Path, state: dict[str, Any], now: dict[str, Any], lanes_change: str | None, accept: bool
    ) -> None:
        """Emit what has changed since the checkpoint; raises UserError unless changes of the result are accepted."""
        changes = find_changes(state, now, self._recipe)
        important = changes.affecting_result
        if lanes_change is not None:
            important = [
                lanes_change,
                *(line for line in important if not line.startswith("data.lanes ")),
            ]
        if important and not accept:
            raise UserError(
                f"{where}: since this checkpoint has changed, and would change the result: "
                f"{'; '.join(important)}; start with --accept-changes to continue nevertheless, or use another "
                "run_dir"
            )
        for event, lines in (("accepted-changes", important), ("harmless-changes", changes.harmless)):
            if lines:
                what = "other results accepted" if event == "accepted-changes" else "the same result but for rounding"
                text = f"changed since the checkpoint ({what}): {'; '.join(lines)}"
                self._events.emit(event, state["step"], text, changes=lines)


def find_identity(run: Path, processes: Processes, events: EventLog) -> str:
    """`run_identity` on all processes; emits an event if the directory is a copy."""
    identity, copied = broadcast_from_main(lambda: run_identity(run), processes)
    if copied is not None:
        events.emit("copied", 0, copied)
    return identity
