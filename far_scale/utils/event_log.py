"""`events.jsonl` of a run: starts, stops, saves, skipped steps and whatever else an operator asks about afterwards."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

from far_scale.utils.io import JsonlWriter, read_json_lines


class EventLog:
    """Prints events and appends them to `events.jsonl` of a run directory, on the main process alone.

    Args:
        run: the run directory.
        is_main_process: whether this process prints and writes; the others do nothing.
    """

    def __init__(self, run: Path, is_main_process: bool) -> None:
        self._file, self._main = JsonlWriter(run / "events.jsonl"), is_main_process

    def emit(self, event: str, step: int, text: str, **facts: Any) -> None:
        """Print `text` and append one line.

        Args:
            event: one word for what happened, the same for all of its kind.
            step: steps done when it happened.
            text: one line for the console and the file.
            facts: further keys of the line in the file.
        """
        if not self._main:
            return
        _print_line(text)
        time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self._file.append({"time": time, "event": event, "step": step, "text": text, **facts})


def _print_line(text: str) -> None:
    """Print `text` above the progress bar; where nothing has loaded tqdm, as on a job's host, there is no bar."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text)
    else:
        print(text, flush=True)


def read_events(run: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a last line that a crash cut short is left out."""
    path = run / "events.jsonl"
    return [line for line in read_json_lines(path) if line is not None] if path.exists() else []


def lines_up_to(log: Path, step: int) -> list[dict[str, Any]]:
    """The lines of log.jsonl up to that step; one that a crash cut short, or that is of no step, is left out."""
    lines = [line for line in read_json_lines(log) if line is not None] if log.exists() else []
    return [line for line in lines if type(line.get("step")) is int and line["step"] <= step]
