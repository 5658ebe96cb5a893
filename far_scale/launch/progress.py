"""How far a run has come, as its folder tells."""

from __future__ import annotations

import re
from pathlib import Path

from far_scale.launch.job import Job
from far_scale.train.faults.events import read_events


def checkpoint_step(run: Path) -> int:
    """The step of the run's latest checkpoint, 0 without one; one that is not readable is for training to tell of.

    `far_scale.train.checkpoint` knows this too, but loads torch: seconds that a job which is being killed may not have.
    """
    latest = run / "checkpoints" / "latest"
    match = re.fullmatch(r"step-(\d{8})", latest.read_text().strip()) if latest.exists() else None
    return int(match.group(1)) if match else 0


def reached_step(run: Path) -> int:
    """The highest step that the run has gone on from or could go on from, by node-local checkpoints, too."""
    resumed = (event["step"] for event in read_events(run) if event.get("event") == "resumed")
    return max(checkpoint_step(run), *resumed, 0)


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
