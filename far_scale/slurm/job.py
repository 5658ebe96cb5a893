"""The SLURM job that this process belongs to, from its environment and from the controller."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass

from far_scale.utils.errors import UserError, print_warning

_CONTROLLER_TRIES = 20
"""Tries, 15 seconds apart, while the controller does not answer."""

_SENT_EARLY = 60
"""Seconds that SLURM may send the warning too early, according to sbatch's manual."""

_DEFAULT_LEAD = 60
"""Seconds before the time limit of a `--signal` that gives none."""


@dataclass(frozen=True)
class Job:
    """A job, as the environment describes it.

    Attributes:
        number: its id.
        restarts: how often it was requeued and started again.
        nodes: as SLURM writes them, such as `n[1-4]`.
        ranks: training processes that it will start.
        ranks_per_node: of these, on each node; 0 if the nodes do not have equally many.
    """

    number: str
    restarts: int
    nodes: str
    ranks: int
    ranks_per_node: int = 0

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
        # SLURM_NTASKS is not set where the job leaves the tasks of a node to the default, one.
        ranks = int(variable("SLURM_NTASKS", str(nodes)))
        restarts = int(variable("SLURM_RESTART_COUNT", "0"))
        ranks_per_node = 0 if ranks % nodes else ranks // nodes
        return Job(variable("SLURM_JOB_ID", ""), restarts, variable("SLURM_JOB_NODELIST", ""), ranks, ranks_per_node)


@dataclass(frozen=True)
class JobState:
    """The controller's state of a job.

    Attributes:
        state: RUNNING, or COMPLETING when SLURM is ending the job.
        reason: TimeLimit where the job reached it.
        may_requeue: whether the job was submitted as one that may be requeued.
    """

    state: str
    reason: str
    may_requeue: bool


def query_state(number: str) -> JobState:
    """Ask the controller for the state of a job.

    Raises:
        UserError: it does not answer for minutes.
    """
    text = _scontrol("show", "job", "--oneliner", number)
    fields = dict(re.findall(r"(?:^| )(JobState|Reason|Requeue)=(\S+)", text))
    return JobState(fields.get("JobState", "UNKNOWN"), fields.get("Reason", "None"), fields.get("Requeue") == "1")


def requeue(number: str) -> None:
    """Requeue the job; SLURM ends its processes, and starts it on the nodes that it then gets.

    Raises:
        UserError: the controller refuses, or does not answer for minutes.
    """
    _scontrol("requeue", number)


@dataclass(frozen=True)
class EarlyWarning:
    """A warning so early that each start of a job stops after a step, saves and starts again, forever.

    Attributes:
        text: what is wrong and the fix, one line.
        certain: False if sbatch's command line may have had a `--signal` with a later warning.
    """

    text: str
    certain: bool


def refuse_early_warning(limit: int, lead: int, subject: str) -> None:
    """Refuse a time limit so short that the warning comes as soon as the job runs.

    Args:
        limit: seconds.
        lead: seconds between warning and limit.
        subject: the beginning of the message, up to the limit.

    Raises:
        UserError: it is so short.
    """
    if (text := _early_text(limit, lead, subject)) is not None:
        raise UserError(text)


def check_warning(number: str) -> None:
    """Refuse a job if its warning stops each start at once; only print a warning if that is not certain.

    Raises:
        UserError: it does.
    """
    early = early_warning(number)
    if early is None:
        return
    if early.certain:
        raise UserError(early.text)
    unseen = "unless --signal on sbatch's command line asked for a later warning, which cannot be seen here"
    print_warning(f"{early.text} ({unseen})")


def early_warning(number: str) -> EarlyWarning | None:
    """Whether the warning of a job comes too early, as far as the job itself can find out; None where it does not.

    The controller does not show when it warns (SLURM 22.05), but it keeps the batch script with its `#SBATCH --signal`.
    SBATCH_SIGNAL overrides that, and is in the environment. A `--signal` on sbatch's command line overrides both, and
    is recorded nowhere.
    """
    try:
        description = _scontrol("show", "job", "--oneliner", number, tries=1)
        script = _scontrol("write", "batch_script", number, "-", tries=1)
    except (UserError, OSError):  # a check that cannot be made stops no job
        return None
    from_environment = os.environ.get("SBATCH_SIGNAL")
    limit, warning = _time_limit(description), from_environment or _script_signal(script)
    if not limit or not warning:
        return None
    signal, _, lead = warning.partition("@")
    text = _early_text(limit, int(lead or _DEFAULT_LEAD), f"job {number}: --signal={warning} and a time limit of")
    if text is None:
        return None
    fix = f" by --time, or for a later warning submit by SBATCH_SIGNAL={signal}@SECONDS sbatch"
    return EarlyWarning(text + fix, certain=from_environment is not None)


def _early_text(limit: int, lead: int, subject: str) -> str | None:
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


def _time_limit(description: str) -> int | None:
    """The TimeLimit in the output of `scontrol show job`, in seconds; None where there is no limit."""
    match = re.search(r"(?:^| )TimeLimit=(?:(\d+)-)?(\d+):(\d+):(\d+)(?: |$)", description)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _script_signal(script: str) -> str | None:
    """The value of `--signal` in a batch script's `#SBATCH` lines; None without one."""
    value = None
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break  # sbatch reads no further
        if line.startswith("#SBATCH") and (match := re.search(r"\s--signal(?:=|\s+)([\w:]+(?:@\d+)?)", line)):
            value = match[1]
    return value


def _scontrol(*arguments: str, tries: int = _CONTROLLER_TRIES) -> str:
    """Run scontrol; wait for a controller that is being restarted, since without an answer the run would end."""
    for tries_left in reversed(range(tries)):
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0 or "pending execution" in done.stdout + done.stderr:  # requeued already
            return done.stdout
        message = " ".join((done.stderr or done.stdout).split())
        if not tries_left or not re.search(r"contact|connect|timed out", message, re.IGNORECASE):
            break
        time.sleep(15)
    raise UserError(f"scontrol {' '.join(arguments)}: {message}")
