"""Evaluates the checkpoints of a run one after the other while it trains, and so never holds it up."""

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
from far_scale.evaluation.by_step import PLOT, is_evaluated, refuse_other_protocols, step_folders, write_scores_by_step
from far_scale.evaluation.clips import ClipSource
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.run import check_count, evaluate, open_model
from far_scale.evaluation.scores import Scores
from far_scale.evaluation.tables import LABELS, in_digits
from far_scale.evaluation.units import SETTINGS, Evaluation
from far_scale.train.checkpoint.export import export_if_needed
from far_scale.train.checkpoint.folders import damage, is_ephemeral
from far_scale.train.checkpoint.run_dir import existing_steps, run_identity, step_folder
from far_scale.train.lease import NAME as LEASE
from far_scale.train.lease import Lease
from far_scale.train.wandb_run import STEP_KEY, ScoreRows, WandbRun
from far_scale.utils.errors import UserError, print_warning

MODEL = "model"
POLL_SECONDS = 30.0
PATIENCE_HOURS = 12.0
"""How long a run may show no sign of a training before this ends."""
_SIGNS = ("log.jsonl", LEASE, "checkpoints/latest")  # what a training writes to


def follow(run: Path, protocol: Protocol, out: Path, clips: ClipSource, once: bool, processes: Processes) -> None:
    """Evaluate every checkpoint of a run that is not evaluated yet, oldest first, until all its steps are done.

    Every process calls this. Each checkpoint gets a folder `out`/step-XXXXXXXX, which keeps neither model nor samples;
    after each, scores_by_step.json and .png are written anew. A checkpoint that is removed or damaged is skipped with
    one line, those that stay only until the next one (checkpoint.every_minutes) without.

    Args:
        run: the run directory, which may not be there yet.
        once: end where there is nothing to do now.

    Raises:
        UserError: on all processes: clips, protocol, model and `out` do not fit together; or for `PATIENCE_HOURS` there
            was no sign of a training.
    """
    check_count(protocol)
    following = _Following(run, protocol, out, clips, processes.device)
    broadcast_from_main(lambda: following.begin(once), processes)
    while True:
        step = broadcast_from_main(following.next_step, processes)
        if step is not None:
            evaluate(functools.partial(following.open, step), processes, None, merge_only=False, keep_samples=False)
            broadcast_from_main(functools.partial(following.settle, step), processes)
        elif (broadcast_from_main(following.is_over, processes) and _log_rest(following, processes)) or once:
            return
        else:
            broadcast_from_main(following.wait, processes)


@dataclass
class _Following:
    """A run, and the folder of its evaluations. The main process alone calls what is not `open`."""

    run: Path
    protocol: Protocol
    out: Path
    clips: ClipSource
    device: torch.device
    started: float = field(default_factory=time.time)
    skipped: set[tuple[int, int]] = field(default_factory=set)  # step, and when its folder was last changed
    said: str = ""

    def begin(self, once: bool) -> None:
        """Finish what a kill has left between two checkpoints.

        Raises:
            UserError: there is no run, and nobody waits for it; `out` holds scores by another protocol.
        """
        if once and self.recipe() is None:
            raise UserError(f"{self.run}: there is no run here; give a run directory, which has a recipe.yaml")
        refuse_other_protocols(self.out, self.protocol, clips_known=False)
        self.settle()

    def recipe(self) -> Recipe | None:
        """The run's recipe as it is now; None where no training has started yet."""
        path = self.run / "recipe.yaml"
        return load_recipe(path) if path.is_file() else None

    def next_step(self) -> int | None:
        """The first checkpoint that is not evaluated and can be, with its model in `out`; None where there is none."""
        begun = step_folders(self.out)
        lasting = [step for step in existing_steps(self.run) if not is_ephemeral(step_folder(self.run, step))]
        for step in sorted({*lasting, *begun}):
            if not (step in begun and is_evaluated(begun[step])) and self._export(step):
                return step
        return None

    def open(self, step: int, first: bool) -> Evaluation:
        """The evaluation of a checkpoint that `next_step` returned; every process calls this.

        Raises:
            UserError: `out` holds evaluations by another protocol; and as `open_model`.
        """
        folder = self._folder(step)
        evaluation = open_model(self.run, folder / MODEL, self.protocol, folder, self.clips, self.device)
        if first:
            refuse_other_protocols(self.out, evaluation.protocol, clips_known=True)
            evaluation.begin()
        return evaluation

    def settle(self, step: int | None = None) -> None:
        """Bring all that follows from the step folders up to date.

        Args:
            step: was just evaluated, and is reported.
        """
        found = write_scores_by_step(self.out)
        for folder in step_folders(self.out).values():
            if is_evaluated(folder):
                # a killed export has left its part
                for big in (folder / MODEL, folder / "samples", *folder.glob(f".{MODEL}.*.part")):
                    shutil.rmtree(big, ignore_errors=True)
        if self._asks_for_wandb():
            try:
                for number, scores in found.items():
                    name = f"{scores.protocol}-{scores.protocol_hash[:8]}-step-{number:08d}"
                    ScoreRows(self.run).put(name, _row(number, scores))
            except OSError as error:  # scores in wandb are never worth an evaluation
                print_warning(f"{self.run}: scores cannot be left for wandb ({error})")
        if step is not None:
            print(f"step {step}: {_in_words(found[step])}; see {self.out / PLOT}", flush=True)

    def is_over(self) -> bool:
        """Whether all steps are done: the last checkpoint is there, or was."""
        recipe = self.recipe()
        done = max([*existing_steps(self.run), *step_folders(self.out)], default=0)
        return recipe is not None and done >= recipe.train.steps

    def wait(self) -> None:
        """Wait a while for the next checkpoint.

        Raises:
            UserError: the training seems to be dead.
        """
        signs = [self.started]
        for name in _SIGNS:
            with contextlib.suppress(OSError):
                signs.append((self.run / name).stat().st_mtime)
        if time.time() - max(signs) > 3600 * PATIENCE_HOURS:
            raise UserError(
                f"{self.run}: no sign of a training for {PATIENCE_HOURS:g} hours ({', '.join(_SIGNS)} are old); "
                "run this again when it trains"
            )
        last = max(existing_steps(self.run), default=0)
        text = f"{self.run}: waiting for a checkpoint after step {last}"
        if text != self.said:
            print(text, flush=True)
            self.said = text
        time.sleep(POLL_SECONDS)

    def log_rest(self) -> None:
        """Log the scores that the training did not log any more; trouble with wandb is only reported."""
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

    def rows_wait(self) -> bool:
        """Whether there are scores to log."""
        return self._asks_for_wandb() and bool(ScoreRows(self.run).waiting())

    def _asks_for_wandb(self) -> bool:
        recipe = self.recipe()
        return recipe is not None and recipe.log.wandb.mode != "disabled"

    def _folder(self, step: int) -> Path:
        return self.out / f"step-{step:08d}"

    def _export(self, step: int) -> bool:
        """Export a checkpoint, unless it was before; False, with one line, where it is removed or damaged."""
        source, folder = step_folder(self.run, step), self._folder(step)
        begun = (folder / SETTINGS).is_file() and is_model_dir(folder / MODEL)
        changed = _changed(source)
        if changed is None and begun:  # removed since
            return True
        if (step, changed or 0) in self.skipped:
            return False
        try:
            _, written = export_if_needed(self.run, step, self.protocol.sampling.weights, folder / MODEL)
        except Exception:  # of whatever kind files give that are removed while they are read
            problem: str | None = f"{source}: was removed"
            if _changed(source) is not None:
                if _changed(source) != changed:
                    return False  # written anew: it is tried again
                problem = damage(source)
            if problem is None:
                raise
            if begun:
                return True
            print_warning(f"{problem}; step {step} is not evaluated")
            self.skipped.add((step, _changed(source) or 0))
            return False
        if written and (folder / SETTINGS).is_file():  # begun with other weights
            shutil.rmtree(folder / "units", ignore_errors=True)
            shutil.rmtree(folder / "samples", ignore_errors=True)
            (folder / SETTINGS).unlink()
        return True


def _log_rest(following: _Following, processes: Processes) -> bool:
    """Log what is left for wandb; False while another job has the run's lease, and so may write to the wandb run."""
    if not broadcast_from_main(following.rows_wait, processes):
        return True
    try:
        with Lease(following.run, processes):
            broadcast_from_main(following.log_rest, processes)
    except UserError:
        return False
    return True


def _changed(folder: Path) -> int | None:
    """When a folder got or lost a file, in nanoseconds; None where there is no such folder."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _row(step: int, scores: Scores) -> dict[str, Any]:
    values = {f"evaluation/{scores.protocol}/{metric}": score.mean for metric, score in scores.scores.items()}
    return {STEP_KEY: step, **{key: value for key, value in values.items() if value is not None}}


def _in_words(scores: Scores) -> str:
    return ", ".join(
        f"{LABELS[metric]} {'not finite' if score.mean is None else in_digits(metric, score.mean)}"
        for metric, score in scores.scores.items()
    )
