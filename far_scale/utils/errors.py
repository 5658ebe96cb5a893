"""How far_scale tells a user that an input is wrong: one line that names the file, the key and the mend."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from far_scale.utils.hosts import host_name
from far_scale.utils.streams import never_fail_to_print


class UserError(Exception):
    """An input (a recipe, shard, checkpoint, video or disk) cannot be used; the message says where and the mend."""


class SaidByMain(UserError):
    """The same on another rank, whose main process says it: this one ends with the same status and is silent."""


def file_problem(error: OSError) -> str | None:
    """One line for an error that the operating system gave of a file; None where it is of none."""
    return None if error.errno is None or error.filename is None else f"{error.filename}: {error.strerror}"


def say_error(error: BaseException) -> None:
    """Print `error: ...` on standard error in one piece, with rank and host where there are several ranks."""
    print(f"{speaker()}error: {error}", file=sys.stderr, flush=True)


def say_warning(text: str) -> None:
    """Print `warning: ...` on standard error in one piece, for what goes on all the same."""
    print(f"{speaker()}warning: {text}", file=sys.stderr, flush=True)


def speaker() -> str:
    """`[rank 3 on n2] ` where there are several ranks, otherwise nothing: what a line of one of them begins with."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f"[rank {os.environ['RANK']} on {host_name()}] "


def command_line(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command's main function: a UserError becomes one line and exit status 2, Ctrl-C exit status 130.

    A full disk, found by the operating system in mid-write, is reported the same way. Printing never fails, see
    `never_fail_to_print`.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        never_fail_to_print()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            say_error(error)
            sys.exit(2)
        except OSError as error:
            if (problem := file_problem(error)) is None:
                raise
            say_error(UserError(problem))
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapped
