"""The exit statuses of a training process, which the launchers act on, and how a process leaves with one."""

import os
import sys
from typing import NoReturn

DONE = 0
"""All steps are done."""

CRASHED = 1
"""An error that the program does not know: starting again may help, as after a device's."""

REFUSED = 2
"""An input is wrong, or restarting makes no progress: a person must look; starting again would not help."""

REQUEUE = 75
"""Stopped on purpose before the end (a signal, the watchdog): start the same command again. 75 is EX_TEMPFAIL."""


def leave(status: int) -> NoReturn:
    """End this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status in (DONE, REQUEUE):
        sys.exit(status)
    os._exit(status)  # other ranks may wait for this one, so nothing here may wait for them
