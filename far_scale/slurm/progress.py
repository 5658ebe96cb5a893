"""How far a run has come, as its folder tells."""

from __future__ import annotations

from pathlib import Path

from far_scale.slurm.job import Job
from far_scale.train.checkpoint.run_dir import latest_step
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import read_events


def checkpoint_step(run: Path) -> int:
    """The step of the checkpoint that the run goes on from, 0 without one; training reports one that is damaged."""
    try:
        return latest_step(run) or 0
    except UserError:
        return 0


def reached_step(run: Path) -> int:
    """The highest step that the run has gone on from or could go on from, by node-local checkpoints, too."""
    resumed = (event["step"] for event in read_events(run) if event.get("event") == "resumed")
    return max(checkpoint_step(run), *resumed, 0)


def began_at(run: Path, job: Job) -> int:
    """The step that the last start of `job` went on from."""
    starts = (event for event in reversed(read_events(run)) if event.get("event") == "start")
    return next((event["step"] for event in starts if event.get("job") == job.number), 0)


def starts_from(run: Path, job: Job, step: int) -> int:
    """How many starts of `job` in a row, up to now, found the checkpoint of `step` to be the latest."""
    count = 0
    for event in reversed(read_events(run)):
        if event.get("event") != "start" or event.get("job") != job.number:
            continue
        # A first start counts nothing, nor does what is before one: an older job had the same number.
        if not job.restarts or event["step"] != step:
            break
        count += 1
        if event["restarts"] == 0:
            break
    return count
