"""Scores of a run's checkpoints on their way into its wandb run.

Two processes that write to one wandb run overwrite each other's lines (github.com/wandb/wandb/issues/12269), and the
shared mode of wandb knows neither steps nor a resume. So the evaluation beside a training does not write there: it puts
rows into a folder, and the training logs each of them together with one of its own lines. Rows that come when the
training is over are logged by the evaluation, see `WandbRun.log_scores`.

    RUN/evaluation/for_wandb/NAME.json               a row to log
    RUN/evaluation/for_wandb/NAME.logged-00001200    it is logged, at this wandb step
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, write_json

STEP_KEY = "evaluation/step"
"""The training step of the evaluated checkpoint: the x axis of all keys `evaluation/...`."""
_LOGGED = re.compile(r"(.+)\.logged-(\d{8})")


class Row(NamedTuple):
    """Values to log in one step, and the name of their file."""

    name: str
    values: dict[str, Any]


class ScoreRows:
    """The rows of a run.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / "evaluation" / "for_wandb"

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Add a row, unless one of this name was added before; rows are logged in the order of their names."""
        if not (self._path(name).exists() or any(self._folder.glob(f"{name}.logged-*"))):
            write_json(self._path(name), values)

    def waiting(self) -> list[Row]:
        """The rows to log; files that cannot be read are passed over."""
        rows = []
        for path in sorted(self._folder.glob("[!.]*.json")):
            with contextlib.suppress(UserError):
                values = read_json(path, "row of scores")
                if isinstance(values, dict):
                    rows.append(Row(path.name.removesuffix(".json"), values))
        return rows

    def take(self, step: int) -> dict[str, Any]:
        """The values of the first row that waits, to be logged at `step`; none where none waits.

        One only, since wandb keeps one value a key and step. Nothing here may trouble a training.
        """
        with contextlib.suppress(OSError):
            for row in self.waiting()[:1]:
                self.mark_logged(row, step)  # before it is logged: `log_again_after` finds it, should that fail
                return row.values
        return {}

    def mark_logged(self, row: Row, step: int) -> None:
        """Row `row` is in the wandb run, at its step `step`."""
        os.replace(self._path(row.name), self._folder / f"{row.name}.logged-{step:08d}")

    def log_again_after(self, step: int) -> None:
        """Let rows wait again that were logged after `step`, the last one that a kill has left in the wandb run."""
        for path in self._folder.glob("*.logged-*"):
            match = _LOGGED.fullmatch(path.name)
            if match and int(match.group(2)) > step:
                os.replace(path, self._path(match.group(1)))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
