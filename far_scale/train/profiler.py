"""`--profile`: a trace of chosen steps and, on a GPU, a memory snapshot (docs/performance.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from far_scale.distributed.process_group import Processes
from far_scale.utils.errors import UserError, print_warning


class Profiler:
    """Traces steps of the main process; writes files to run_dir/profile/ after the last of them."""

    def __init__(self, steps: range, run: Path, processes: Processes, done: int = 0) -> None:
        """`steps` count from 1; empty for none. If some of them are `done` already, none is traced."""
        self._steps = steps if processes.is_main_process else range(0)
        if self._steps and self._steps[0] <= done:
            print_warning(
                f"--profile: the run resumes from step {done}, so steps {steps[0]} to {steps[-1]} are not traced"
            )
            self._steps = range(0)
        self._folder, self._on_gpu = run / "profile", processes.device.type == "cuda"
        self._profile: Any = None

    @contextlib.contextmanager
    def trace(self, step: int) -> Iterator[None]:
        """Around step number `step` (from 1); traces it if it is among the chosen ones."""
        if step in self._steps and self._profile is None:
            self._begin()
        yield
        if self._profile is not None and step == self._steps[-1]:
            self._end()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _end(self) -> None:
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._steps[0]}-{self._steps[-1]}"
        self._profile.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self._steps = None, range(0)


def parse_steps(text: str, last: int | None = None) -> range:
    """'20' or '20:22', steps counted from 1, the last included.

    Args:
        text: the command line's.
        last: the run's last step, if known.

    Raises:
        UserError: it is neither, or the run is shorter.
    """
    first, _, end = text.partition(":")
    try:
        steps = range(int(first), int(end or first) + 1)
    except ValueError:
        steps = range(0)
    if not steps or steps[0] < 1:
        raise UserError(f"--profile {text}: give a step, or the first and the last as in 20:22")
    if last is not None and steps[-1] > last:
        raise UserError(f"--profile {text}: the run ends with step {last}; give steps up to it, or raise train.steps")
    return steps
