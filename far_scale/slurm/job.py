"""The SLURM job that this process belongs to: what its environment says, and what the controller says of it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass

from far_scale.utils.errors import UserError, print_warning

_PATIENCE = 20
"""Tries, 15 seconds apart, while the controller does not answer."""

_SENT_EARLY = 60
"""Seconds by which SLURM may send the warning ahead of its time, as sbatch's manual says."""

_DEFAULT_LEAD = 60
"""Seconds of a `--signal` that names none."""


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
            raise UserError(
                "SLURM_JOB_ID is not set: this is for inside a job; submit one with sbatch slurm/NAME.sh, and have the "
                "container of slurm/site.sh pass on the environment"
            )
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


@dataclass(frozen=True)
class EarlyWarning:
    """A warning that stops each start of a job at once: it saves after a step and starts again, for ever.

    Attributes:
        text: what is wrong and what to ask for, one line.
        certain: False where a `--signal` on sbatch's command line may have asked for a later one.
    """

    text: str
    certain: bool


def refuse_early_warning(limit: int, lead: int, subject: str) -> None:
    """Refuse a time limit that the warning comes ahead of by all of it, or nearly so.

    Args:
        limit: seconds.
        lead: seconds between warning and limit.
        subject: what the message begins with, up to the limit.

    Raises:
        UserError: the time limit is one.
    """
    if (text := _early(limit, lead, subject)) is not None:
        raise UserError(text)


def check_warning(number: str) -> None:
    """Refuse a job whose warning stops each start at once; print a warning where that is not certain.

    Raises:
        UserError: it is such a job.
    """
    early = early_warning(number)
    if early is None:
        return
    if early.certain:
        raise UserError(early.text)
    unseen = "unless --signal on sbatch's command line asked for a later warning, which cannot be seen here"
    print_warning(f"{early.text} ({unseen})")


def early_warning(number: str) -> EarlyWarning | None:
    """Whether the warning of a job comes too early, as far as can be seen from inside it; None where it does not.

    The controller does not say when it warns (SLURM 22.05). It keeps the batch script, whose `#SBATCH --signal` counts
    unless sbatch's command line had another, which is seen nowhere. SBATCH_SIGNAL, which takes the script's place, is
    in the environment.
    """
    try:
        text = _scontrol("show", "job", "--oneliner", number, tries=1)
        script = _scontrol("write", "batch_script", number, "-", tries=1)
    except (UserError, OSError):  # a check that cannot be made stops nobody
        return None
    from_environment = os.environ.get("SBATCH_SIGNAL")
    limit, warning = _time_limit(text), from_environment or _asked_signal(script)
    if not limit or not warning:
        return None
    signal, _, lead = warning.partition("@")
    early = _early(limit, int(lead or _DEFAULT_LEAD), f"job {number}: --signal={warning} and a time limit of")
    if early is None:
        return None
    fix = f" by --time, or for a later warning submit by SBATCH_SIGNAL={signal}@SECONDS sbatch"
    return EarlyWarning(early + fix, certain=from_environment is not None)


def _early(limit: int, lead: int, subject: str) -> str | None:
    if limit > lead + _SENT_EARLY:
        return None
    return (
        f"{subject} {clock(limit)}: the warning comes {lead} seconds ahead of the time limit, and SLURM may send "
        f"it {_SENT_EARLY} seconds earlier, so it would stop each start at once; "
        f"ask for more than {clock(lead + _SENT_EARLY)}"
    )


def clock(seconds: int) -> str:
    """Seconds as sbatch takes and SLURM shows them: `0:04:00`, `2-00:00:00`."""
    days, rest = divmod(seconds, 86400)
    return f"{f'{days}-' if days else ''}{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"


def _time_limit(shown: str) -> int | None:
    """Seconds of TimeLimit in what `scontrol show job` prints; None where there is no limit."""
    match = re.search(r"(?:^| )TimeLimit=(?:(\d+)-)?(\d+):(\d+):(\d+)(?: |$)", shown)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _asked_signal(script: str) -> str | None:
    """The value of `--signal` in a batch script's `#SBATCH` lines; None without one."""
    value = None
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break  # sbatch reads no further
        if line.startswith("#SBATCH") and (match := re.search(r"\s--signal(?:=|\s+)([\w:]+(?:@\d+)?)", line)):
            value = match[1]
    return value


def _scontrol(*arguments: str, tries: int = _PATIENCE) -> str:
    """Run scontrol; a controller that is just being restarted is waited for, since nobody else may be there to."""
    for tries_left in reversed(range(tries)):
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0 or "pending execution" in done.stdout + done.stderr:  # that is, requeued already
            return done.stdout
        said = " ".join((done.stderr or done.stdout).split())
        if not tries_left or not re.search(r"contact|connect|timed out", said, re.IGNORECASE):
            break
        time.sleep(15)
    raise UserError(f"scontrol {' '.join(arguments)}: {said}")
