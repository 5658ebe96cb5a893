"""What a user of tools/submit.py asks SLURM for: the size of a job, and further options of sbatch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from far_scale.utils.errors import UserError

_REPLACED_OPTIONS = {
    "--nodes": ("--nodes", "-N"),
    "--time": ("--time", "-t"),
    "--partition": ("--partition", "-p"),
    "--gpus-per-node": (
        "--gpus-per-node", "--gpus-per-task", "--gpus-per-socket", "--gpus", "-G", "--ntasks-per-node",
        "--ntasks-per-gpu", "--ntasks", "-n",
    ),
    "--cpus-per-task": ("--cpus-per-task", "--cpus-per-gpu", "-c"),
    "--dry-run": ("--test-only",),
    "": (
        "--signal", "--array", "-a", "--output", "-o", "--error", "-e", "--open-mode", "--parsable", "--wrap",
        "--chdir", "-D",  # relative paths of the recipe start where it was submitted
        "--quiet", "-Q", "--wait", "-W",  # submitit reads the job's number from what sbatch prints
        "--help", "-h", "--usage", "--version", "-V",  # submit nothing
    ),
}  # fmt: skip
"""Options of sbatch that a job sets itself or cannot have, by the option of tools/submit.py to use; "" for none."""

_FLAGS = (
    "--contiguous", "--exclusive", "--get-user-env", "--hold", "--ignore-pbs", "--nice", "--no-kill", "--no-requeue",
    "--overcommit", "--oversubscribe", "--propagate", "--reboot", "--requeue", "--spread-job", "--use-min-nodes",
    "--verbose", "-H", "-k", "-O", "-s", "-u", "-v",
)  # fmt: skip
"""Options without a value, or with one only after `=`: sbatch takes a word after them as the name of a script."""


WARNING_SECONDS = 300
"""Seconds before the time limit at which SLURM warns a job."""


@dataclass(frozen=True)
class JobSize:
    """The resources of a job.

    Attributes:
        nodes: how many.
        gpus_per_node: GPUs of each, with one process per GPU; 0 for one process on the CPU.
        cpus_per_task: cores of a process.
        minutes: time limit of one start; 0 for none, as sbatch takes it.
        partition: None for the cluster's default.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    minutes: int
    partition: str | None

    @property
    def tasks_per_node(self) -> int:
        """Processes on a node."""
        return max(1, self.gpus_per_node)


def parse_minutes(text: str) -> int:
    """Minutes of a time as sbatch takes it: `90`, `12:00:00`, `2-00`, `2-12:30:00`.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?", text)
    if match is None:
        raise UserError(f"--time {text}: write minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (int(match[name] or 0) for name in ("days", "first", "second", "third"))
    if match["days"] is None and match["third"] is None:  # minutes, or minutes:seconds
        return first + (second > 0)
    return days * 1440 + first * 60 + second + (third > 0)


def check_options(options: Sequence[str], chain: int | None) -> None:
    """Refuse options of sbatch that would contradict the job's own; sbatch itself checks all others.

    Args:
        options: as on sbatch's command line: `--account=x`, `--account x`, `-A x`, `--exclusive`.
        chain: as for `far_scale.slurm.submit.submit`.

    Raises:
        UserError: names the option.
    """
    previous = ""
    for option in options:
        if not option.startswith("-") or not option.strip("-"):
            if not _takes_value(previous):
                raise UserError(
                    f"-- {shlex.quote(option)}: is not an option of sbatch; write it with dashes, such as --account=x"
                )
        elif (replacement := _replacement(option)) is not None:
            use = f"use {replacement} before the --" if replacement else "does not go with this tool; leave it out"
            raise UserError(f"-- {option}: {use}")
        elif chain and _matches(option, ("--dependency", "-d")):
            raise UserError(f"-- {option}: the jobs of a --chain depend on each other; leave it out")
        elif option[:2] in _FLAGS and len(option) > 2:
            raise UserError(f"-- {option}: write each option by itself, -{option[1]} -{option[2:]}")
        previous = option


def _takes_value(option: str) -> bool:
    """Whether the word after `option` is its value."""
    if not option.startswith("-") or "=" in option or (option[1] != "-" and len(option) > 2):
        return False
    return not _matches(option, _FLAGS)


def _replacement(option: str) -> str | None:
    """The option of tools/submit.py that replaces `option`, "" for none; None if sbatch may have it."""
    return next((tool for tool, names in _REPLACED_OPTIONS.items() if _matches(option, names)), None)


def _matches(option: str, names: Sequence[str]) -> bool:
    """Whether `option` is one of `names`, also in short (`-N4`) or abbreviated as sbatch takes it (`--sig=...`)."""
    name = option.partition("=")[0] if option.startswith("--") else option[:2]
    return any(full.startswith(name) for full in names)
