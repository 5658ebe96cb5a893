"""Standard output and error that never end a process."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


class _LossyFile(io.FileIO):
    """A file descriptor to which writing always succeeds: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        written = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def never_fail_to_print() -> None:
    """Make standard output and error drop what they cannot write, instead of raising.

    A full disk, a reader that is gone, a terminal that was closed, or a character that the locale does not have then
    costs lines of output and no more. Call it first of all, for loggers and progress bars keep the streams that they
    find. Streams that something else has replaced, such as a test's capture, are left alone.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get this number, and be printed to
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        # By python -u or PYTHONUNBUFFERED. Line by line is enough; a second call finds it in the first one's stream.
        unbuffered = stream is not None and (stream.write_through or stream.line_buffering)
        file = _LossyFile(number, "wb", closefd=False)
        lossy = io.TextIOWrapper(
            io.BufferedWriter(file),
            encoding=None if stream is None else stream.encoding,
            errors="backslashreplace",
            line_buffering=name == "stderr" or file.isatty() or unbuffered,
        )
        setattr(sys, name, lossy)
        setattr(sys, f"__{name}__", lossy)  # so that it is flushed once, and a second call finds its own
