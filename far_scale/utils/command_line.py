"""Helpers of the command lines: exit statuses, output that never fails, and argument types."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from far_scale.utils.errors import UserError, file_problem, print_error


def command_line(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a main function: a UserError is printed in one line with exit status 2; Ctrl-C exits with 130.

    Errors of the operating system about a file, such as a full disk, count as UserErrors. Printing never fails, see
    `never_fail_to_print`.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        never_fail_to_print()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print_error(error)
            sys.exit(2)
        except OSError as error:
            if (problem := file_problem(error)) is None:
                raise
            print_error(UserError(problem))
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapped


class _LossyFile(io.FileIO):
    """A file descriptor that drops what cannot be written instead of raising."""

    def write(self, data: Any) -> int:
        written = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def never_fail_to_print() -> None:
    """Make standard output and error drop what they cannot write, instead of raising.

    A full disk, a reader that has exited, a closed terminal, or a character that the locale lacks then only costs lines
    of output. Lines are written at once, also into a file. Call it first, since loggers and progress bars keep
    references to the streams. Streams that something else has replaced, such as a test's capture, stay.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next opened file would get this number, and the output
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        file = _LossyFile(number, "wb", closefd=False)
        lossy = io.TextIOWrapper(
            io.BufferedWriter(file),
            encoding=None if stream is None else stream.encoding,
            errors="backslashreplace",
            line_buffering=True,  # so that the output of a killed process is complete
        )
        setattr(sys, name, lossy)
        setattr(sys, f"__{name}__", lossy)  # flushed only once, and found by a second call


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def at_least(minimum: int) -> Callable[[str], int]:
    """The argument type of integers of at least `minimum`."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return number
