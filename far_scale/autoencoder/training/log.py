"""What an autoencoder's run says: a console line and a line of log.jsonl, each step once however often it starts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from far_scale.distributed.process_group import Processes
from far_scale.utils.event_log import lines_up_to
from far_scale.utils.io import JsonlWriter, atomic_write


class Log:
    """The log of a run of `steps` steps, on the main process; the others' says nothing.

    Args:
        file: log.jsonl.
        steps: of the whole run.
        start: steps done before; lines of later ones, of a run that died past its last checkpoint, are dropped.
        processes: who runs it.
    """

    def __init__(self, file: Path, steps: int, start: int, processes: Processes) -> None:
        self._lines, self._steps, self._main = JsonlWriter(file), steps, processes.is_main_process
        self._told, self._since = start, time.perf_counter()
        if self._main and file.exists():
            lines = lines_up_to(file, start)
            with atomic_write(file) as beside:
                beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._bar: Any = tqdm(
            total=steps, initial=start, desc="train", unit="step", disable=None if self._main else True
        )

    def end_step(self) -> None:
        """A step is done."""
        self._bar.update()

    def tell(self, step: int, values: dict[str, float]) -> None:
        """A line on step number `step` (from 1)."""
        if self._main:
            seconds = (time.perf_counter() - self._since) / max(1, step - self._told)
            self._lines.append({"step": step, **values, "seconds_per_step": seconds})
            written = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            tqdm.write(f"step {step}/{self._steps}  {written}")
        self._told, self._since = step, time.perf_counter()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
