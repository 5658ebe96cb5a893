"""The options of sbatch that a user of tools/submit.py adds after `--`."""

from __future__ import annotations

from collections.abc import Sequence

from far_scale.errors import UserError

_OWN = {
    "--nodes": ("--nodes", "-N"),
    "--time": ("--time", "-t"),
    "--partition": ("--partition", "-p"),
    "--gpus-per-node": ("--gpus-per-node", "--gpus-per-task", "--gpus", "-G", "--ntasks-per-node", "--ntasks", "-n"),
    "--cpus-per-task": ("--cpus-per-task", "--cpus-per-gpu", "-c"),
    "": ("--signal", "--array", "-a", "--output", "-o", "--error", "-e", "--open-mode", "--parsable", "--wrap"),
}
"""Options of sbatch that a job has already, by the option of tools/submit.py that sets them; "" where none does."""


def check_options(options: Sequence[str], chain: int | None) -> None:
    """Refuse options for sbatch that would contradict the job's own; sbatch judges all others.

    Args:
        options: as on sbatch's command line: `--account=x`, `--account x`, `-A x`, `--exclusive`.
        chain: as for `far_scale.launch.submit.submit`.

    Raises:
        UserError: names the option.
    """
    before = ""
    for option in options:
        if not option.startswith("-"):
            # The value of the option before it, or a word that sbatch would take as the name of a script.
            if not before.startswith("-") or "=" in before:
                raise UserError(f"-- {option}: is no option of sbatch; write it with its dashes, such as --account=x")
        elif (own := _own(option)) is not None:
            use = f"use {own} before the --" if own else "jobs of this tool have their own; leave it out"
            raise UserError(f"-- {option}: {use}")
        elif chain and option.startswith(("--dependency", "-d")):
            raise UserError(f"-- {option}: the jobs of a --chain depend on each other; leave it out")
        before = option


def _own(option: str) -> str | None:
    """The key of `_OWN` for `option`, which may be short (`-N4`) or abbreviated, as sbatch takes it (`--sig=...`)."""
    name = option.partition("=")[0] if option.startswith("--") else option[:2]
    return next((tool for tool, names in _OWN.items() if any(own.startswith(name) for own in names)), None)
