"""How a training job begins and ends: its starts, when they stop, and whether it is requeued.

All of it but `prepare` runs on the node itself, with the standard library only.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from far_scale.distributed.exit_codes import DONE, REFUSED, REQUEUE
from far_scale.slurm.job import Job, JobState, early_warning, query_state, requeue
from far_scale.slurm.snapshot import ACCEPT, REFUSED_MARKER, make_snapshot, read_submission
from far_scale.train.run_dir import latest_step
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.event_log import EventLog, read_events

NOTHING_LEFT = 3
"""Exit status on which the batch script ends successfully without training: all steps are done."""


def prepare(link: Path, recipe_name: str, overrides: Sequence[str]) -> int:
    """Make the snapshot of this job, point `link` at it, and start; returns what `start` returns.

    Raises:
        UserError: the recipe is wrong, the job's processes cannot share its lanes, or this Python cannot train.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"{sys.executable}: this Python has no DeepSpeed, so it cannot train; set PYTHON, or the environment or "
            "container, in slurm/site.sh"
        )
    # Late: the node may have no third-party packages.
    from far_scale.config.recipe import check_ranks, groups_cross_nodes, load_recipe

    job = Job.this()
    recipe = load_recipe(recipe_name, [override for override in overrides if override != ACCEPT])
    check_ranks(recipe, job.ranks)
    if job.ranks_per_node and (warning := groups_cross_nodes(recipe, job.ranks_per_node)) is not None:
        print_warning(warning)
    snapshot = make_snapshot(recipe, [recipe_name, *overrides], job.number)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(snapshot)
    return start(snapshot)


def start(snapshot: Path) -> int:
    """Log a start of this job in the run's events; returns 0, or NOTHING_LEFT where all steps are done.

    Raises:
        UserError: the job's last starts reached no new checkpoint, so another start would hardly help.
    """
    job, submission = Job.this(), read_submission(snapshot)
    run = Path(submission.run_dir)
    (snapshot / REFUSED_MARKER).unlink(missing_ok=True)  # left by a start that was killed before `after` read it
    events = EventLog(run, is_main_process=True)
    step = checkpoint_step(run)
    if step >= submission.steps:
        text = f"job {job.number}: all {submission.steps} steps are done already"
        events.emit("end", step, text, job=job.number, restarts=job.restarts, status=DONE, requeue=False)
        return NOTHING_LEFT
    step = _highest_step(run)
    without_progress = count_starts(run, job, step)
    if without_progress >= submission.starts_without_progress:
        text = (
            f"job {job.number}: {without_progress} starts in a row reached no checkpoint after step {step}, so this "
            "one stops; look at the log of the last one, then submit again"
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


@dataclass(frozen=True)
class Decision:
    """What happens after training ended.

    Attributes:
        requeue: whether the job starts again.
        status: exit status of the batch script.
        text: the reason, for the log.
    """

    requeue: bool
    status: int
    text: str


def after(snapshot: Path, status: int | None) -> int:
    """Requeue the job where that helps; returns the exit status for the batch script.

    Args:
        snapshot: of this job.
        status: exit status of srun; None where SLURM is ending the job and srun still runs.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing signals the whole job, this process included
    job, submission = Job.this(), read_submission(snapshot)
    state = query_state(job.number)
    if status is None:
        if state.state == "COMPLETING" and state.reason == "TimeLimit" and state.may_requeue:
            # Now, while this script still runs: if the processes do not end in time, SLURM kills it with them.
            requeue(job.number)
            print(f"job {job.number}: the time limit is reached; it starts again", flush=True)
        return 0

    run = Path(submission.run_dir)
    step = checkpoint_step(run)
    refused = (snapshot / REFUSED_MARKER).exists()
    (snapshot / REFUSED_MARKER).unlink(missing_ok=True)
    decision = decide(REFUSED if refused else status, step >= submission.steps, state)
    stopped_at_once = decision.requeue and status == REQUEUE and step <= _first_step(run, job) + 1
    if stopped_at_once and (early := early_warning(job.number)):
        decision = Decision(False, REFUSED, f"a signal stopped training after at most one step. {early.text}")
    facts = {"job": job.number, "restarts": job.restarts, "status": status, "requeue": decision.requeue}
    text = f"job {job.number}: {decision.text} (step {step} of {submission.steps})"
    EventLog(run, is_main_process=True).emit("end", step, text, **facts)
    if decision.requeue:
        requeue(job.number)
    return decision.status


def decide(status: int, done: bool, state: JobState) -> Decision:
    """Whether to requeue a job.

    Args:
        status: exit status of srun, or REFUSED where any training process refused to continue.
        done: whether all steps are done; used only where the status is DONE.
        state: of the job, from the controller.
    """
    if status == DONE and done:
        return Decision(False, DONE, "all steps are done")
    if status == REFUSED:
        return Decision(False, REFUSED, "training refused to continue (see the error above); fix that and submit again")
    if status == DONE:
        why, status = "srun saw no error, but not all steps are done, as after a node's failure", REQUEUE
    elif status == REQUEUE:
        why = "training stopped before its last step"
    else:
        why = f"training crashed (status {status})"
    if state.state != "RUNNING" and state.reason != "TimeLimit":
        # Cancelled, or requeued by SLURM itself. Requeueing would bring a cancelled job back.
        return Decision(False, status, f"{why}; SLURM is ending the job")
    if not state.may_requeue:
        return Decision(False, status, f"{why}; this job may not be requeued, submit it again to continue")
    return Decision(True, status, f"{why}; it starts again")


def checkpoint_step(run: Path) -> int:
    """The step of the latest checkpoint; 0 if there is none or it is damaged, which training itself reports."""
    try:
        return latest_step(run) or 0
    except UserError:
        return 0


def count_starts(run: Path, job: Job, step: int) -> int:
    """How many starts of `job` in a row, up to now, resumed from `step`."""
    count = 0
    for event in reversed(read_events(run)):
        if event.get("event") != "start" or event.get("job") != job.number:
            continue
        # The first start of a job ends the row: an older event is of another job that had the same number.
        if not job.restarts or event["step"] != step:
            break
        count += 1
        if event["restarts"] == 0:
            break
    return count


def _highest_step(run: Path) -> int:
    """The highest step that the run has resumed from or could resume from, node-local checkpoints included."""
    resumed = (int(event["step"]) for event in read_events(run) if event.get("event") == "resumed")
    return max(checkpoint_step(run), *resumed, 0)


def _first_step(run: Path, job: Job) -> int:
    """The step that the last start of `job` resumed from."""
    starts = (event for event in reversed(read_events(run)) if event.get("event") == "start")
    return next((int(event["step"]) for event in starts if event.get("job") == job.number), 0)
