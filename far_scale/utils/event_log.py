"""`events.jsonl` of a run: starts, stops, saves, skipped steps and other events for operators."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

from far_scale.utils.io import JsonlWriter, read_json_lines


class EventLog:
    """Prints events and appends them to `events.jsonl` of a run directory, on the main process only.

    Args:
        run: the run directory.
        is_main_process: whether this process prints and writes; the others do nothing.
    """

    def __init__(self, run: Path, is_main_process: bool) -> None:
        self._file, self._main = JsonlWriter(run / "events.jsonl"), is_main_process

    def emit(self, event: str, step: int, text: str, **facts: Any) -> None:
        """Print `text` and append one line.

        Args:
            event: the kind of event, one word.
            step: steps done at that time.
            text: one line, for the console and the file.
            facts: further keys for the file.
        """
        if not self._main:
            return
        _print_line(text)
        time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self._file.append({"time": time, "event": event, "step": step, "text": text, **facts})


def _print_line(text: str) -> None:
    """Print `text` above the progress bar; without tqdm in memory, as on a job's host, there is none."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text)
    else:
        print(text, flush=True)


def read_events(run: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first, without lines that a crash cut short."""
    path = run / "events.jsonl"
    return [line for line in read_json_lines(path) if line is not None] if path.exists() else []


def lines_up_to(log: Path, step: int) -> list[dict[str, Any]]:
    """The lines of log.jsonl up to a step, without lines that a crash cut short or that have no step."""
    lines = [line for line in read_json_lines(log) if line is not None] if log.exists() else []
    return [line for line in lines if type(line.get("step")) is int and line["step"] <= step]
