"""One Weights & Biases run over all restarts of a training."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from far_scale.errors import UserError
from far_scale.recipe import Recipe
from far_scale.train.changes import flat
from far_scale.train.wandb_offline import last_step


class WandbRun:
    """The run there. Every step is in it once: one that it held at the start is not logged again, since resumed steps
    are exact repeats, and lines that a kill has kept from it come from log.jsonl when the training starts again. A
    step and the validation after it are one row there.

    Trouble with wandb is told and never ends the training: its own process dies of a SIGTERM that goes to all processes
    of a job (other signals it does not see, see `StopSignals`), and log.jsonl has everything.

    Args:
        recipe: the training's.
        identity: tells this training from an earlier one in the same run directory.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, recipe: Recipe, identity: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb.mode: wandb is not installed; pip install 'far_scale[wandb]'") from None
        settings = recipe.log.wandb
        offline = last_step(Path(recipe.run_dir), identity)
        self._gone = False
        self._wandb, self._folder = wandb, Path(recipe.run_dir)
        self._run: Any = wandb.init(
            project=settings.project,
            name=settings.name or recipe.name,
            id=identity,
            resume="allow",
            mode=settings.mode,
            dir=recipe.run_dir,
            config=recipe.model_dump(mode="json"),
        )
        # An online run that is resumed begins with the step after the last one that the server has.
        self._held = max(offline, self._run.step - 1)

    def log(self, line: dict[str, Any], late: bool = False) -> None:
        """Log a line of log.jsonl, unless the run held its step at the start.

        Args:
            line: of training or of validation.
            late: the line was made at the start, for the step that the training goes on from: where the run holds the
                row of that step, which cannot change any more, the line comes into the next one.
        """
        step = max(line["step"], self._held + 1) if late else line["step"]
        if step > self._held:
            with self._telling_trouble():
                self._run.log(self._values(line), step=step)

    def _values(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line as wandb has it: `train/KEY`, or `validation/KEY/KEY` and the video."""
        if "validation" not in line:
            return {f"train/{key}": value for key, value in line.items() if key != "step"}
        values = {key.replace(".", "/"): value for key, value in flat(line).items() if value is not None}
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
