"""What follows when the training processes of a job have ended, or when SLURM ends the job."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from far_scale.distributed.exit_codes import DONE, REFUSED, REQUEUE
from far_scale.slurm.job import Job, JobState, ask_state, early_warning, requeue
from far_scale.slurm.progress import began_at, checkpoint_step
from far_scale.slurm.snapshot import REFUSED_HERE, read_submission
from far_scale.utils.event_log import EventLog


@dataclass(frozen=True)
class Next:
    """What follows.

    Attributes:
        requeue: whether the job starts again.
        status: the batch script's exit status.
        text: why, for a person.
    """

    requeue: bool
    status: int
    text: str


def after(snapshot: Path, status: int | None) -> int:
    """Say what follows, do it, and return the exit status for the batch script.

    Args:
        snapshot: the job's.
        status: srun's exit status; None where it still runs, while SLURM tells the job to end.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing signals all of the job, and so this process
    job, submission = Job.this(), read_submission(snapshot)
    state = ask_state(job.number)
    if status is None:
        if state.state == "COMPLETING" and state.reason == "TimeLimit" and state.may_requeue:
            # Now, while it can be said: processes that do not end in time are killed, and the batch script with them.
            requeue(job.number)
            print(f"job {job.number}: the time limit is reached; it starts again", flush=True)
        return 0

    run = Path(submission.run_dir)
    step = checkpoint_step(run)
    refused = (snapshot / REFUSED_HERE).exists()
    (snapshot / REFUSED_HERE).unlink(missing_ok=True)
    follows = decide(REFUSED if refused else status, step >= submission.steps, state)
    stopped_at_once = follows.requeue and status == REQUEUE and step <= began_at(run, job) + 1
    if stopped_at_once and (early := early_warning(job.number)):
        follows = Next(False, REFUSED, f"a signal stopped training after a step at most. {early.text}")
    facts = {"job": job.number, "restarts": job.restarts, "status": status, "requeue": follows.requeue}
    text = f"job {job.number}: {follows.text} (step {step} of {submission.steps})"
    EventLog(run, is_main_process=True).emit("end", step, text, **facts)
    if follows.requeue:
        requeue(job.number)
    return follows.status


def decide(status: int, done: bool, state: JobState) -> Next:
    """What follows.

    Args:
        status: how training ended: srun's exit status, REFUSED where any process refused to go on.
        done: whether all steps are done; only looked at where the status says so.
        state: the job's, as the controller has it.
    """
    if status == DONE and done:
        return Next(False, DONE, "all steps are done")
    if status == REFUSED:
        return Next(False, REFUSED, "training refused to go on (see the error above); mend that and submit again")
    if status == DONE:
        why, status = "srun saw no error, but not all steps are done, as after a node's failure", REQUEUE
    elif status == REQUEUE:
        why = "training stopped before its last step"
    else:
        why = f"training crashed (status {status})"
    if state.state != "RUNNING" and state.reason != "TimeLimit":
        # Cancelled, or requeued by SLURM itself. Requeueing would bring a cancelled job back.
        return Next(False, status, f"{why}; SLURM is ending the job")
    if not state.may_requeue:
        return Next(False, status, f"{why}; this job may not be requeued, submit it again to go on")
    return Next(True, status, f"{why}; it starts again")
