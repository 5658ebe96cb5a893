"""The exit statuses of a training process, on which the launchers act."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from far_scale.utils.errors import ReportedByMain, UserError, file_problem, print_error, rank_prefix

DONE = 0
"""All steps are done."""

CRASHED = 1
"""An unexpected error, such as of a device: a restart may help."""

REFUSED = 2
"""A wrong input, or restarts without progress: a restart would not help; a user must fix it."""

REQUEUE = 75
"""Stopped on purpose before the last step (signal, watchdog): restart the same command. 75 is EX_TEMPFAIL."""


def exit_status_of(work: Callable[[], int]) -> int:
    """Run `work` and return its exit status, or that of its error, which is printed; never raises."""
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
    """Exit with `status`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status in (DONE, REQUEUE):
        sys.exit(status)
    os._exit(status)  # without cleanup, which could wait for ranks that wait for this one
