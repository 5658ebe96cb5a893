"""One Weights & Biases run over all restarts of a training, and evaluation scores on their way into it.

Offline, each start has a folder and file of its own, which a kill cuts short at an unknown row. So a start that ends in
order writes a cursor: the last step, and the names of the complete folders. The next start renames all other folders,
such as those of killed starts, and logs their steps again from log.jsonl. `wandb sync` then finds every step once.

    RUN/wandb/IDENTITY.cursor.json          {"step": 1200, "folders": ["offline-run-...", ...]}
    RUN/wandb/unfinished-offline-run-*      incomplete folders, which `wandb sync` ignores

Two processes that write to one wandb run overwrite each other's lines (github.com/wandb/wandb/issues/12269), and the
shared mode of wandb has neither steps nor a resume. So the evaluation beside a training does not write there: it puts
rows into a folder, and the training logs each of them together with one of its own lines. Rows that come when the
training is over are logged by the evaluation, see `WandbRun.log_scores`.

    RUN/evaluation/for_wandb/NAME.json               a row to log
    RUN/evaluation/for_wandb/NAME.logged-00001200    logged at this wandb step
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from far_scale.config.schema import WandbSection
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import flatten, read_json, write_json

STEP_KEY = "evaluation/step"
"""The training step of the evaluated checkpoint: the x axis of all keys `evaluation/...`."""
_LOGGED = re.compile(r"(.+)\.logged-(\d{8})")


def row_of(line: dict[str, Any]) -> dict[str, Any]:
    """A line of log.jsonl as names and values without its step: `train/KEY`, or `validation/KEY/KEY` if known."""
    if "validation" not in line:
        return {f"train/{key}": value for key, value in line.items() if key != "step"}
    return {key.replace(".", "/"): v for key, v in flatten(line).items() if v is not None and key != "step"}


class WandbRun:
    """The wandb run of a training. Each step is logged once; a step and the validation after it are one row.

    Steps that the run has already are skipped, since resumed steps are exact repeats. Lines that it lacks after a kill
    come from log.jsonl when the training starts again.

    Errors of wandb are reported once and never end the training: wandb's own process dies of a SIGTERM that goes to all
    processes of a job (other signals do not reach it, see `StopSignals`), and log.jsonl has everything.

    Args:
        settings: the recipe's log.wandb section.
        name: the run's name if the settings have none.
        config: the recipe's values.
        identity: the wandb id; differs from that of an earlier training in the same run directory.
        run: the run directory.
        folder: folder for wandb's files; None for `run`, which the training uses.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(
        self,
        settings: WandbSection,
        name: str,
        config: dict[str, Any],
        identity: str,
        run: Path,
        folder: Path | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb.mode: wandb is not installed; pip install 'far_scale[wandb]'") from None
        self._wandb, self._run_dir, self._failed = wandb, run, False
        self._is_offline = settings.mode == "offline"
        self._cursor = OfflineCursor(folder or run, identity)
        self._cursor.set_incomplete_aside()
        steps_offline = max(self._cursor.step, OfflineCursor(run, identity).step)
        self._run: Any = wandb.init(
            project=settings.project,
            name=settings.name or name,
            id=identity,
            resume="allow",
            mode=settings.mode,
            dir=folder or run,
            config=config,
        )
        # An online run that is resumed begins with the step after the last one that the server has.
        self._first_missing = max(steps_offline, self._run.step - 1) + 1
        self._last_logged = self._first_missing - 1
        self._scores = ScoreRows(run)
        with self._report_errors():
            self._run.define_metric("evaluation/*", step_metric=STEP_KEY)
            self._scores.requeue_after(self._last_logged)

    def log(self, line: dict[str, Any], is_resumed: bool = False) -> None:
        """Log a line of log.jsonl, unless the run had its step at the start.

        A line of training takes the first waiting row of scores with it.

        Args:
            line: of training or of validation.
            is_resumed: the line was made at the start, for the step that training resumes from: if the run has the row
                of that step, which can no longer change, the line goes into the next row.
        """
        step = max(line["step"], self._first_missing) if is_resumed else line["step"]
        if step >= self._first_missing:
            self._last_logged = max(self._last_logged, step)
            with self._report_errors():
                scores = {} if "validation" in line else self._scores.take(step)
                self._run.log(self._to_row(line) | scores, step=step)

    def log_scores(self, after_step: int = 0) -> None:
        """Log all waiting rows of scores, each at a step of its own after the training's, and end the run.

        Args:
            after_step: the training's last step, which an incomplete offline file may hold.
        """
        rows = self._scores.waiting()
        with self._report_errors():
            for step, row in enumerate(rows, max(self._last_logged, after_step) + 1):
                self._run.log(row.values, step=step)
                self._last_logged = step
            self._finish()
            for row in rows:
                self._scores.mark_logged(row, 0)  # step 0: a longer training need not log it again, wherever it resumes

    def finish(self) -> None:
        """End the run of this start; a later start continues it."""
        if not self._failed:
            with self._report_errors():
                self._finish()

    def _finish(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # waits for wandb's process, so that the file is complete
        if self._is_offline:
            self._cursor.advance(self._last_logged)

    def _to_row(self, line: dict[str, Any]) -> dict[str, Any]:
        """The keys of a line in wandb: those of `row_of`, and the video."""
        row = row_of(line)
        video = row.pop("validation/samples/video", None)
        if video is not None and (self._run_dir / video).exists():
            row["validation/video"] = self._wandb.Video(str(self._run_dir / video), format="mp4")
        return row

    @contextlib.contextmanager
    def _report_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type: wandb's connection raises many
            if not self._failed:
                print(f"wandb: {type(error).__name__}: {error}; logging continues without it", file=sys.stderr)
            self._failed = True


class OfflineCursor:
    """The complete offline folders of a wandb run.

    Args:
        folder: where wandb's files go.
        identity: the wandb id.

    Attributes:
        step: the last step in the complete folders; 0 without any.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder / "wandb", identity
        self._path = self._folder / f"{identity}.cursor.json"
        self.step = 0
        self._complete: set[str] = set()
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):  # none yet, or damaged: log all again
            cursor = read_json(self._path, "wandb cursor")
            self.step, self._complete = int(cursor["step"]), set(cursor["folders"])

    def set_incomplete_aside(self) -> None:
        """Rename folders that are not complete, or of a version without a cursor, so that `wandb sync` ignores them."""
        for path in self._offline_folders():
            if path.name not in self._complete:
                try:
                    path.rename(path.with_name(f"unfinished-{path.name}"))
                except OSError as error:
                    print_warning(f"{path}: cannot be renamed ({error.strerror}); wandb gets its steps twice")

    def advance(self, step: int) -> None:
        """All folders are complete up to `step`."""
        self.step = step
        write_json(self._path, {"step": step, "folders": [path.name for path in self._offline_folders()]})

    def _offline_folders(self) -> list[Path]:
        return sorted(self._folder.glob(f"offline-run-*-{self._identity}*"))


class Row(NamedTuple):
    """Values to log in one step, and the name of their file."""

    name: str
    values: dict[str, Any]


class ScoreRows:
    """The rows of scores of a run.

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
        """The rows to log; unreadable files are skipped."""
        rows = []
        for path in sorted(self._folder.glob("[!.]*.json")):
            with contextlib.suppress(UserError):
                values = read_json(path, "row of scores")
                if isinstance(values, dict):
                    rows.append(Row(path.name.removesuffix(".json"), values))
        return rows

    def take(self, step: int) -> dict[str, Any]:
        """The values of the first waiting row, to be logged at `step`; empty without one.

        One only, since wandb keeps one value a key and step. Errors of the file system never end a training.
        """
        with contextlib.suppress(OSError):
            for row in self.waiting()[:1]:
                self.mark_logged(row, step)  # before it is logged: `requeue_after` finds it, should that fail
                return row.values
        return {}

    def mark_logged(self, row: Row, step: int) -> None:
        """Record that `row` is in the wandb run at `step`."""
        os.replace(self._path(row.name), self._folder / f"{row.name}.logged-{step:08d}")

    def requeue_after(self, step: int) -> None:
        """Log rows again that were logged after `step`, the last one that the wandb run has after a kill."""
        for path in self._folder.glob("*.logged-*"):
            match = _LOGGED.fullmatch(path.name)
            if match and int(match.group(2)) > step:
                os.replace(path, self._path(match.group(1)))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
