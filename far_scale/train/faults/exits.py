"""The exit statuses of a training process, which the launchers act on."""

DONE = 0
"""All steps are done."""

CRASHED = 1
"""An error that the program does not know: starting again may help, as after a device's."""

REFUSED = 2
"""An input is wrong, or restarting makes no progress: a person must look; starting again would not help."""

REQUEUE = 75
"""Stopped on purpose before the end (a signal, the watchdog): start the same command again. 75 is EX_TEMPFAIL."""
