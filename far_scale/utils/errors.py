"""How far_scale tells a user that an input is wrong: one line that names the file, the key and the mend."""

from __future__ import annotations

import os
import sys

from far_scale.utils.hosts import host_name


class UserError(Exception):
    """An input (a recipe, shard, checkpoint, video or disk) cannot be used; the message says where and the mend."""


class ReportedByMain(UserError):
    """The same on another rank, whose main process says it: this one ends with the same status and is silent."""


def file_problem(error: OSError) -> str | None:
    """One line for an error that the operating system gave of a file; None where it is of none."""
    return None if error.errno is None or error.filename is None else f"{error.filename}: {error.strerror}"


def print_error(error: BaseException) -> None:
    """Print `error: ...` on standard error in one piece, with rank and host where there are several ranks."""
    print(f"{rank_prefix()}error: {error}", file=sys.stderr, flush=True)


def print_warning(text: str) -> None:
    """Print `warning: ...` on standard error in one piece, for what goes on all the same."""
    print(f"{rank_prefix()}warning: {text}", file=sys.stderr, flush=True)


def rank_prefix() -> str:
    """`[rank 3 on n2] ` where there are several ranks, otherwise nothing: what a line of one of them begins with."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f"[rank {os.environ['RANK']} on {host_name()}] "
