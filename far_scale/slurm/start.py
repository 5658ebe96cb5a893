"""The start of a job: recipe checked, snapshot made, start noted, and no further start where none has helped."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from far_scale.distributed.exit_codes import DONE
from far_scale.slurm.job import Job
from far_scale.slurm.progress import checkpoint_step, reached_step, starts_from
from far_scale.slurm.snapshot import ACCEPT, REFUSED_HERE, make_snapshot, read_submission
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog

NOTHING_LEFT = 3
"""Exit status that tells the batch script to end well without training: all steps are done."""


def prepare(link: Path, recipe_name: str, overrides: Sequence[str]) -> int:
    """Make the snapshot of this job, point `link` at it, and note the first start; returns as `start` does.

    Raises:
        UserError: the recipe is wrong, the job's processes cannot share its lanes, or this Python cannot train.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"{sys.executable}: this Python has no DeepSpeed, so it cannot train; set PYTHON, or the environment or "
            "container, in slurm/site.sh"
        )
    from far_scale.config.recipe import check_ranks, load_recipe  # here, for `start` has the standard library alone

    job = Job.this()
    recipe = load_recipe(recipe_name, [override for override in overrides if override != ACCEPT])
    check_ranks(recipe, job.ranks)
    snapshot = make_snapshot(recipe, [recipe_name, *overrides], job.number)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(snapshot)
    return start(snapshot)


def start(snapshot: Path) -> int:
    """Note in the run's events that this job starts now, and from which checkpoint; returns 0 or NOTHING_LEFT.

    Raises:
        UserError: its last starts reached no new checkpoint, so that another would hardly do.
    """
    job, submission = Job.this(), read_submission(snapshot)
    run = Path(submission.run_dir)
    (snapshot / REFUSED_HERE).unlink(missing_ok=True)  # of a start that was killed before it could be read
    events = EventLog(run, is_main_process=True)
    step = checkpoint_step(run)
    if step >= submission.steps:
        text = f"job {job.number}: all {submission.steps} steps are done already"
        events.emit("end", step, text, job=job.number, restarts=job.restarts, status=DONE, requeue=False)
        return NOTHING_LEFT
    step = reached_step(run)
    in_vain = starts_from(run, job, step)
    if in_vain >= submission.starts_without_progress:
        text = (
            f"job {job.number}: {in_vain} starts in a row reached no checkpoint after step {step}, so this one stops; "
            f"look into the log of the last, then submit again"
        )
        events.emit("no-progress", step, text, job=job.number, restarts=job.restarts, nodes=job.nodes)
        raise UserError(text)
    begins = "starts" if not job.restarts else f"starts again (restart {job.restarts})"
    text = f"job {job.number}: {begins} from step {step} of {submission.steps}, {job.ranks} ranks on {job.nodes}"
    events.emit(
        "start", step, text, job=job.number, restarts=job.restarts, nodes=job.nodes, ranks=job.ranks,
        snapshot=str(snapshot),
    )  # fmt: skip
    return 0
