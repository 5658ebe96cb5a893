"""TensorBoard as a second log of a training, by torch's own writer: the numbers of log.jsonl under RUN/tensorboard.

Every start writes a file of its own. It begins with the step that the start resumes from, after which TensorBoard
drops the later steps of earlier files; so no step is shown twice. The scores of an evaluation beside the training are
in a folder of their own, which only the evaluation writes to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from far_scale.train.wandb_run import row_of
from far_scale.utils.errors import UserError

FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """Check that the package is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard: tensorboard is not installed; pip install 'far_scale[tensorboard]'")


class TensorBoardLog:
    """Writes lines of log.jsonl as scalars, with the same names as in wandb: `train/KEY` and `validation/KEY/KEY`.

    Each line is on the disk as soon as it is in log.jsonl, so a killed run has the same steps in both. Errors are
    reported once and never end the training.

    Args:
        run: the run directory.
        start: steps done before.
        lines: those of log.jsonl up to `start`; written if nothing was logged to TensorBoard before.
    """

    def __init__(self, run: Path, start: int, lines: Sequence[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here: slow, and an optional package

        folder, self._failed = run / FOLDER, False
        is_new = not any(folder.glob("events.out.tfevents.*"))
        with self._report_errors():
            self._writer = SummaryWriter(str(folder), purge_step=start + 1)
            for line in lines if is_new else ():
                self._add(line)
            self._writer.flush()

    def log(self, line: dict[str, Any]) -> None:
        """Log a line of training or of validation."""
        if not self._failed:
            with self._report_errors():
                self._add(line)
                self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        if not self._failed:
            with self._report_errors():
                self._writer.close()

    def _add(self, line: dict[str, Any]) -> None:
        for key, value in row_of(line).items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, line["step"])

    @contextlib.contextmanager
    def _report_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type: its writer's thread keeps an error for the next call
            print(f"tensorboard: {type(error).__name__}: {error}; logging continues without it", file=sys.stderr)
            self._failed = True


def write_scores(run: Path, name: str, scores_by_step: Mapping[int, Mapping[str, float]]) -> None:
    """Write the scores of a run's checkpoints into RUN/tensorboard/NAME, and remove earlier ones.

    Args:
        run: the run directory.
        name: of the folder, which TensorBoard shows as a run of its own.
        scores_by_step: values by their names in TensorBoard, by step.
    """
    from torch.utils.tensorboard import SummaryWriter

    earlier = list((run / FOLDER / name).glob("events.out.tfevents.*"))
    with SummaryWriter(str(run / FOLDER / name), purge_step=0) as writer:
        for step, scores in scores_by_step.items():
            for key, value in scores.items():
                writer.add_scalar(key, value, step)
    for path in earlier:
        path.unlink(missing_ok=True)
