"""The SLURM job that this process belongs to: what its environment says, and what the controller says of it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass

from far_scale.errors import UserError

_PATIENCE = 20
"""Tries, 15 seconds apart, while the controller does not answer."""


@dataclass(frozen=True)
class Job:
    """A job, as its environment describes it.

    Attributes:
        number: its id.
        restarts: how often it was requeued and started again.
        nodes: the nodes that it runs on, as SLURM writes them.
        ranks: training processes that it will start.
    """

    number: str
    restarts: int
    nodes: str
    ranks: int

    @staticmethod
    def this() -> Job:
        """The job around this process.

        Raises:
            UserError: there is none.
        """
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("SLURM_JOB_ID is not set: this is for inside a job; submit one with sbatch slurm/NAME.sh")
        variable = os.environ.get
        nodes = int(variable("SLURM_JOB_NUM_NODES", "1"))
        # SLURM_NTASKS is not set where the job does not say how many tasks a node gets; then it is one.
        ranks = int(variable("SLURM_NTASKS", str(nodes)))
        restarts = int(variable("SLURM_RESTART_COUNT", "0"))
        return Job(variable("SLURM_JOB_ID", ""), restarts, variable("SLURM_JOB_NODELIST", ""), ranks)


@dataclass(frozen=True)
class JobState:
    """What the controller says of a job.

    Attributes:
        state: RUNNING while it is the job's own to decide; COMPLETING when SLURM is ending it.
        reason: TimeLimit where that is why.
        may_requeue: whether the job was submitted so that it may be started again.
    """

    state: str
    reason: str
    may_requeue: bool


def ask_state(number: str) -> JobState:
    """The controller's word on a job.

    Raises:
        UserError: it does not answer for minutes.
    """
    text = _scontrol("show", "job", "--oneliner", number)
    found = dict(re.findall(r"(?:^| )(JobState|Reason|Requeue)=(\S+)", text))
    return JobState(found.get("JobState", "UNKNOWN"), found.get("Reason", "None"), found.get("Requeue") == "1")


def requeue(number: str) -> None:
    """Have the job started again, on the nodes that SLURM then gives it. SLURM ends what is left of this start.

    Raises:
        UserError: the controller refuses, or does not answer for minutes.
    """
    _scontrol("requeue", number)


def _scontrol(*arguments: str) -> str:
    """Run scontrol; a controller that is just being restarted is waited for, since nobody else may be there to."""
    for tries_left in reversed(range(_PATIENCE)):
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0 or "pending execution" in done.stdout + done.stderr:  # that is, requeued already
            return done.stdout
        said = " ".join((done.stderr or done.stdout).split())
        if not tries_left or not re.search(r"contact|connect|timed out", said, re.IGNORECASE):
            break
        time.sleep(15)
    raise UserError(f"scontrol {' '.join(arguments)}: {said}")
