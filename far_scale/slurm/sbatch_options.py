"""The options of sbatch that a user of tools/submit.py adds after `--`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from far_scale.utils.errors import UserError

_OWN = {
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
        "--quiet", "-Q", "--wait", "-W",  # the number of the job is read from what sbatch prints, and at once
        "--help", "-h", "--usage", "--version", "-V",  # submit nothing
    ),
}  # fmt: skip
"""Options of sbatch that a job has already or cannot have, by the option of tools/submit.py to take; "" for none."""

_WITHOUT_VALUE = (
    "--contiguous", "--exclusive", "--get-user-env", "--hold", "--ignore-pbs", "--nice", "--no-kill", "--no-requeue",
    "--overcommit", "--oversubscribe", "--propagate", "--reboot", "--requeue", "--spread-job", "--use-min-nodes",
    "--verbose", "-H", "-k", "-O", "-s", "-u", "-v",
)  # fmt: skip
"""Options that take no value, or only one behind a `=`: a word that follows them would be the name of a script."""


def check_options(options: Sequence[str], chain: int | None) -> None:
    """Refuse options for sbatch that would contradict the job's own; sbatch judges all others.

    Args:
        options: as on sbatch's command line: `--account=x`, `--account x`, `-A x`, `--exclusive`.
        chain: as for `far_scale.slurm.submit.submit`.

    Raises:
        UserError: names the option.
    """
    before = ""
    for option in options:
        if not option.startswith("-") or not option.strip("-"):
            if not _takes_a_word(before):  # it is no value: sbatch would take it as the name of a script
                raise UserError(
                    f"-- {shlex.quote(option)}: is no option of sbatch; write it with its dashes, such as --account=x"
                )
        elif (own := _own(option)) is not None:
            use = f"use {own} before the --" if own else "does not go with this tool; leave it out"
            raise UserError(f"-- {option}: {use}")
        elif chain and _is_one(option, ("--dependency", "-d")):
            raise UserError(f"-- {option}: the jobs of a --chain depend on each other; leave it out")
        elif option[:2] in _WITHOUT_VALUE and len(option) > 2:
            raise UserError(f"-- {option}: write each option by itself, -{option[1]} -{option[2:]}")
        before = option


def _takes_a_word(option: str) -> bool:
    """Whether the value of `option` is the word that follows it."""
    if not option.startswith("-") or "=" in option or (option[1] != "-" and len(option) > 2):
        return False
    return not _is_one(option, _WITHOUT_VALUE)


def _own(option: str) -> str | None:
    """The key of `_OWN` for `option`."""
    return next((tool for tool, names in _OWN.items() if _is_one(option, names)), None)


def _is_one(option: str, names: Sequence[str]) -> bool:
    """Whether `option` is one of `names`; it may be short (`-N4`) or abbreviated, as sbatch takes it (`--sig=...`)."""
    name = option.partition("=")[0] if option.startswith("--") else option[:2]
    return any(each.startswith(name) for each in names)
