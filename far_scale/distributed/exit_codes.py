"""The exit statuses of a training process, which the launchers act on, and how a process leaves with one."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from far_scale.utils.errors import ReportedByMain, UserError, file_problem, print_error, rank_prefix

DONE = 0
"""All steps are done."""

CRASHED = 1
"""An error that the program does not know: starting again may help, as after a device's."""

REFUSED = 2
"""An input is wrong, or restarting makes no progress: a person must look; starting again would not help."""

REQUEUE = 75
"""Stopped on purpose before the end (a signal, the watchdog): start the same command again. 75 is EX_TEMPFAIL."""


def exit_status_of(work: Callable[[], int]) -> int:
    """The exit status that `work` returns, or that of the error that ends it, which is told; raises nothing."""
    try:
        return work()
    except UserError as error:
        if not isinstance(error, ReportedByMain):
            print_error(error)
        return REFUSED
    except OSError as error:
        if (problem := file_problem(error)) is None:
            return _crash()
        print_error(UserError(problem))
        return REFUSED
    except KeyboardInterrupt:
        return 130
    except Exception:
        return _crash()


def _crash() -> int:
    print(f"{rank_prefix()}{traceback.format_exc()}", file=sys.stderr, flush=True)
    return CRASHED


def exit_process(status: int) -> NoReturn:
    """End this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status in (DONE, REQUEUE):
        sys.exit(status)
    os._exit(status)  # other ranks may wait for this one, so nothing here may wait for them
