"""Errors of the user's input, reported in one line with file, key and fix."""

from __future__ import annotations

import os
import sys

from far_scale.utils.hosts import host_name


class UserError(Exception):
    """An input (recipe, shard, checkpoint, video, disk) cannot be used; the message has the location and the fix."""


class ReportedByMain(UserError):
    """A UserError that only the main process prints; other ranks just exit with its status."""


def file_problem(error: OSError) -> str | None:
    """One line for an operating system error about a file; None for other errors."""
    return None if error.errno is None or error.filename is None else f"{error.filename}: {error.strerror}"


def print_error(error: BaseException) -> None:
    """Print `error: ...` on standard error in one write, with rank and host if there are several ranks."""
    print(f"{rank_prefix()}error: {error}", file=sys.stderr, flush=True)


def print_warning(text: str) -> None:
    """Print `warning: ...` on standard error in one write."""
    print(f"{rank_prefix()}warning: {text}", file=sys.stderr, flush=True)


def rank_prefix() -> str:
    """The prefix of a rank's lines, `[rank 3 on n2] `; empty for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f"[rank {os.environ['RANK']} on {host_name()}] "
