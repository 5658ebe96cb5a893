"""One Weights & Biases run over all restarts of a training."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from far_scale.config.recipe import Recipe
from far_scale.train.wandb_offline import last_step
from far_scale.train.wandb_scores import STEP_KEY, ScoreRows
from far_scale.utils.errors import UserError
from far_scale.utils.io import flatten


class WandbRun:
    """The run there. Every step is in it once: one that it held at the start is not logged again, since resumed steps
    are exact repeats, and lines that a kill has kept from it come from log.jsonl when the training starts again. A
    step and the validation after it are one row there.

    Trouble with wandb is told and never ends the training: its own process dies of a SIGTERM that goes to all processes
    of a job (other signals it does not see, see `StopSignals`), and log.jsonl has everything.

    Args:
        recipe: the training's.
        identity: tells this training from an earlier one in the same run directory.
        run: the run directory.
        folder: where wandb's files go, apart from the training's; None for the training, which has them in `run`.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, recipe: Recipe, identity: str, run: Path, folder: Path | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb.mode: wandb is not installed; pip install 'far_scale[wandb]'") from None
        settings = recipe.log.wandb
        offline = max(last_step(where, identity) for where in (run, folder or run))
        self._gone = False
        self._wandb, self._folder = wandb, run
        self._run: Any = wandb.init(
            project=settings.project,
            name=settings.name or recipe.name,
            id=identity,
            resume="allow",
            mode=settings.mode,
            dir=folder or run,
            config=recipe.model_dump(mode="json"),
        )
        # An online run that is resumed begins with the step after the last one that the server has.
        self._held = self._highest = max(offline, self._run.step - 1)
        self._scores = ScoreRows(run)
        with self._telling_trouble():
            self._run.define_metric("evaluation/*", step_metric=STEP_KEY)
            self._scores.log_again_after(self._held)

    def log(self, line: dict[str, Any], late: bool = False) -> None:
        """Log a line of log.jsonl, unless the run held its step at the start.

        With a line of training goes the first row of scores that waits.

        Args:
            line: of training or of validation.
            late: the line was made at the start, for the step that the training goes on from: where the run holds the
                row of that step, which cannot change any more, the line comes into the next one.
        """
        step = max(line["step"], self._held + 1) if late else line["step"]
        if step > self._held:
            self._highest = max(self._highest, step)
            with self._telling_trouble():
                scores = {} if "validation" in line else self._scores.take(step)
                self._run.log(self._values(line) | scores, step=step)

    def log_scores(self) -> None:
        """Log all rows of scores that wait, each in a step of its own after the training's, and end the run."""
        rows = self._scores.waiting()
        with self._telling_trouble():
            for number, row in enumerate(rows, 1):
                self._run.log(row.values, step=self._highest + number)
            self._run.finish()
            for row in rows:
                self._scores.mark_logged(row, 0)  # from whatever step a longer training goes on, it is logged

    def _values(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line as wandb has it: `train/KEY`, or `validation/KEY/KEY` and the video."""
        if "validation" not in line:
            return {f"train/{key}": value for key, value in line.items() if key != "step"}
        values = {key.replace(".", "/"): value for key, value in flatten(line).items() if value is not None}
        del values["step"]
        video = values.pop("validation/samples/video", None)
        if video is not None and (self._folder / video).exists():
            values["validation/video"] = self._wandb.Video(str(self._folder / video), format="mp4")
        return values

    def finish(self) -> None:
        """End the run of this start; a later start goes on with it."""
        if not self._gone:
            with self._telling_trouble():
                self._run.finish()

    @contextlib.contextmanager
    def _telling_trouble(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind wandb's connection gives
            if not self._gone:
                print(f"wandb: {type(error).__name__}: {error}; the log goes on without it", file=sys.stderr)
            self._gone = True
