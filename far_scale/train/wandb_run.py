"""One Weights & Biases run over all restarts of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from far_scale.errors import UserError
from far_scale.recipe import Recipe


class WandbRun:
    """The run there. A step that an earlier start has logged is not logged again: resumed steps are exact repeats.

    The highest step given away is kept in run_dir/wandb_step, since what an offline run holds cannot be asked for.

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
        self._mark = Path(recipe.run_dir) / f"wandb_step-{identity}"
        self._highest = int(self._mark.read_text() or 0) if self._mark.exists() else 0
        self._run: Any = wandb.init(
            project=settings.project,
            name=settings.name or recipe.name,
            id=identity,
            resume="allow",
            mode=settings.mode,
            dir=recipe.run_dir,
            config=recipe.model_dump(mode="json"),
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values of a step, unless that was done before."""
        if step > self._highest:
            self._highest = step
            self._mark.write_text(f"{step}\n")  # before: a kill in between loses a line, where the other way doubles it
            self._run.log({f"train/{key}": value for key, value in values.items()}, step=step)

    def finish(self) -> None:
        self._run.finish()
