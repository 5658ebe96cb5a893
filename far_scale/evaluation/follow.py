"""Evaluates the checkpoints of a run while it trains, in separate processes."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.convert.model_dir import is_model_dir
from far_scale.distributed.process_group import Processes, broadcast_from_main
from far_scale.evaluation.batches import SETTINGS_FILE, Evaluation
from far_scale.evaluation.clip_sets import ClipSource
from far_scale.evaluation.pipeline import check_clip_count, evaluate, open_model_evaluation
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.results import Scores
from far_scale.evaluation.scores_by_step import (
    PLOT,
    check_same_protocol,
    is_evaluated,
    step_folders,
    write_scores_by_step,
)
from far_scale.evaluation.tables import LABELS, format_score
from far_scale.train.checkpoint.export import export_if_needed
from far_scale.train.checkpoint.folders import damage, is_ephemeral
from far_scale.train.lease import NAME as LEASE
from far_scale.train.lease import Lease
from far_scale.train.run_dir import existing_steps, run_identity, step_folder
from far_scale.train.tensorboard_log import write_scores
from far_scale.train.wandb_run import STEP_KEY, ScoreRows, WandbRun
from far_scale.utils.errors import UserError, print_warning

MODEL_FOLDER = "model"
POLL_SECONDS = 30.0
INACTIVITY_HOURS = 12.0
"""A run without any sign of training for this long ends the evaluation."""
_ACTIVITY_FILES = ("log.jsonl", LEASE, "checkpoints/latest")  # what a training writes to


def follow(run: Path, protocol: Protocol, out: Path, clips: ClipSource, once: bool, processes: Processes) -> None:
    """Evaluate each checkpoint of a run, oldest first, until the training is complete; every process calls this.

    Each checkpoint gets a folder `out`/step-XXXXXXXX, which keeps neither model nor samples; after each,
    scores_by_step.json and .png are rewritten. A removed or damaged checkpoint is skipped with a warning. Temporary
    checkpoints (checkpoint.every_minutes) are skipped without a warning.

    Args:
        run: the run directory, which may not exist yet.
        once: end when nothing is left to evaluate now.

    Raises:
        UserError: on all processes: clips, protocol, model and `out` do not fit together; or there was no sign of
            training for `INACTIVITY_HOURS`.
    """
    check_clip_count(protocol)
    follower = _RunFollower(run, protocol, out, clips, processes.device)
    broadcast_from_main(lambda: follower.begin(once), processes)
    while True:
        step = broadcast_from_main(follower.next_step, processes)
        if step is not None:
            evaluate(functools.partial(follower.open, step), processes, None, merge_only=False, keep_samples=False)
            broadcast_from_main(functools.partial(follower.update_results, step), processes)
        elif (broadcast_from_main(follower.is_over, processes) and _log_remaining_scores(follower, processes)) or once:
            return
        else:
            broadcast_from_main(follower.wait, processes)


@dataclass
class _RunFollower:
    """A run and the folder of its evaluations. Only the main process calls methods other than `open`."""

    run: Path
    protocol: Protocol
    out: Path
    clips: ClipSource
    device: torch.device
    started: float = field(default_factory=time.time)
    skipped: set[tuple[int, int]] = field(default_factory=set)  # step, and modification time of its folder
    last_message: str = ""

    def begin(self, once: bool) -> None:
        """Finish the work that a kill interrupted between two checkpoints.

        Raises:
            UserError: with `once`, there is no run; or `out` holds scores by another protocol.
        """
        if once and self.recipe() is None:
            raise UserError(f"{self.run}: there is no run here; give a run directory, which has a recipe.yaml")
        check_same_protocol(self.out, self.protocol, clips_known=False)
        self.update_results()

    def recipe(self) -> Recipe | None:
        """The run's current recipe; None before the training has started."""
        path = self.run / "recipe.yaml"
        return load_recipe(path) if path.is_file() else None

    def next_step(self) -> int | None:
        """The step of the first checkpoint to evaluate, with its model exported into `out`; None if there is none."""
        begun = step_folders(self.out)
        lasting = [step for step in existing_steps(self.run) if not is_ephemeral(step_folder(self.run, step))]
        for step in sorted({*lasting, *begun}):
            if not (step in begun and is_evaluated(begun[step])) and self._export(step):
                return step
        return None

    def open(self, step: int, first: bool) -> Evaluation:
        """The evaluation of a checkpoint that `next_step` returned; every process calls this.

        Raises:
            UserError: `out` holds evaluations by another protocol; and as `open_model_evaluation`.
        """
        folder = self._folder(step)
        evaluation = open_model_evaluation(
            self.run, folder / MODEL_FOLDER, self.protocol, folder, self.clips, self.device
        )
        if first:
            check_same_protocol(self.out, evaluation.protocol, clips_known=True)
            evaluation.begin()
        return evaluation

    def update_results(self, step: int | None = None) -> None:
        """Update scores, plot, wandb rows and TensorBoard from the step folders, and remove models and samples.

        Args:
            step: the one just evaluated; its scores are printed.
        """
        scores_by_step = write_scores_by_step(self.out)
        for folder in step_folders(self.out).values():
            if is_evaluated(folder):
                # with the partial files of killed exports
                for leftover in (folder / MODEL_FOLDER, folder / "samples", *folder.glob(f".{MODEL_FOLDER}.*.part")):
                    shutil.rmtree(leftover, ignore_errors=True)
        if self._uses_wandb():
            try:
                for number, scores in scores_by_step.items():
                    name = f"{scores.protocol}-{scores.protocol_hash[:8]}-step-{number:08d}"
                    ScoreRows(self.run).put(name, _wandb_row(number, scores))
            except OSError as error:  # trouble with wandb must not stop the evaluation
                print_warning(f"{self.run}: cannot queue scores for wandb ({error})")
        if scores_by_step and (recipe := self.recipe()) is not None and recipe.log.tensorboard:
            try:
                rows = {number: _score_values(scores) for number, scores in scores_by_step.items()}
                write_scores(self.run, f"evaluation-{self.protocol.name}", rows)
            except Exception as error:  # of whatever kind its writer gives
                print_warning(f"tensorboard: {type(error).__name__}: {error}; {self.out / PLOT} has the scores")
        if step is not None:
            print(f"step {step}: {_format_scores(scores_by_step[step])}; see {self.out / PLOT}", flush=True)

    def is_over(self) -> bool:
        """Whether the training is complete: its last checkpoint exists or was evaluated."""
        recipe = self.recipe()
        done = max([*existing_steps(self.run), *step_folders(self.out)], default=0)
        return recipe is not None and done >= recipe.train.steps

    def wait(self) -> None:
        """Wait for the next checkpoint for `POLL_SECONDS`.

        Raises:
            UserError: the training shows no activity.
        """
        activity = [self.started]
        for name in _ACTIVITY_FILES:
            with contextlib.suppress(OSError):
                activity.append((self.run / name).stat().st_mtime)
        if time.time() - max(activity) > 3600 * INACTIVITY_HOURS:
            raise UserError(
                f"{self.run}: no sign of training for {INACTIVITY_HOURS:g} hours ({', '.join(_ACTIVITY_FILES)} are "
                "old); run this again when it trains"
            )
        last = max(existing_steps(self.run), default=0)
        text = f"{self.run}: waiting for a checkpoint after step {last}"
        if text != self.last_message:
            print(text, flush=True)
            self.last_message = text
        time.sleep(POLL_SECONDS)

    def log_remaining_scores(self) -> None:
        """Log the scores that the training did not log; trouble with wandb is only a warning."""
        recipe = self.recipe()
        assert recipe is not None
        folder = self.run / "evaluation"
        try:
            config = recipe.model_dump(mode="json")
            identity = run_identity(self.run)[0]
            wandb_run = WandbRun(recipe.log.wandb, recipe.name, config, identity, self.run, folder)
            wandb_run.log_scores(after_step=recipe.train.steps)
        except Exception as error:  # of whatever kind wandb's connection gives
            print_warning(f"wandb: {type(error).__name__}: {error}; run this again to log the scores")

    def has_unlogged_scores(self) -> bool:
        """Whether scores are waiting to be logged to wandb."""
        return self._uses_wandb() and bool(ScoreRows(self.run).waiting())

    def _uses_wandb(self) -> bool:
        recipe = self.recipe()
        return recipe is not None and recipe.log.wandb.mode != "disabled"

    def _folder(self, step: int) -> Path:
        return self.out / f"step-{step:08d}"

    def _export(self, step: int) -> bool:
        """Export a checkpoint if needed; False, with a warning, if it is removed or damaged."""
        source, folder = step_folder(self.run, step), self._folder(step)
        begun = (folder / SETTINGS_FILE).is_file() and is_model_dir(folder / MODEL_FOLDER)
        modified = _modified_ns(source)
        if modified is None and begun:  # removed since the export
            return True
        if (step, modified or 0) in self.skipped:
            return False
        try:
            _, written = export_if_needed(self.run, step, self.protocol.sampling.weights, folder / MODEL_FOLDER)
        except Exception:  # any error that files give when they are removed during reading
            problem: str | None = f"{source}: was removed"
            if _modified_ns(source) is not None:
                if _modified_ns(source) != modified:
                    return False  # rewritten meanwhile: try again
                problem = damage(source)
            if problem is None:
                raise
            if begun:
                return True
            print_warning(f"{problem}; step {step} is not evaluated")
            self.skipped.add((step, _modified_ns(source) or 0))
            return False
        if written and (folder / SETTINGS_FILE).is_file():  # begun with other weights
            shutil.rmtree(folder / "units", ignore_errors=True)
            shutil.rmtree(folder / "samples", ignore_errors=True)
            (folder / SETTINGS_FILE).unlink()
        return True


def _log_remaining_scores(follower: _RunFollower, processes: Processes) -> bool:
    """Log the remaining scores; False while another job holds the run's lease and may write to the wandb run."""
    if not broadcast_from_main(follower.has_unlogged_scores, processes):
        return True
    try:
        with Lease(follower.run, processes):
            broadcast_from_main(follower.log_remaining_scores, processes)
    except UserError:
        return False
    return True


def _modified_ns(folder: Path) -> int | None:
    """Modification time of a folder in nanoseconds; None if it does not exist."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _wandb_row(step: int, scores: Scores) -> dict[str, Any]:
    return {STEP_KEY: step, **_score_values(scores)}


def _score_values(scores: Scores) -> dict[str, float]:
    """The finite scores by their names in wandb and in TensorBoard."""
    return {
        f"evaluation/{scores.protocol}/{metric}": score.mean
        for metric, score in scores.scores.items()
        if score.mean is not None
    }


def _format_scores(scores: Scores) -> str:
    return ", ".join(
        f"{LABELS[metric]} {'not finite' if score.mean is None else format_score(metric, score.mean)}"
        for metric, score in scores.scores.items()
    )
