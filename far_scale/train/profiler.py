"""`--profile`: what chosen steps of a run do, as a trace and, on a GPU, a memory snapshot (docs/performance.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from far_scale.errors import UserError
from far_scale.train.processes import Processes


class Profiler:
    """Watches some steps of the main process; files go to run_dir/profile/ when the last of them is done."""

    def __init__(self, steps: range, run: Path, processes: Processes) -> None:
        """`steps` count from 1; empty for none."""
        self._steps = steps if processes.main else range(0)
        self._folder, self._on_gpu = run / "profile", processes.device.type == "cuda"
        self._profile: Any = None

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around step number `step` (from 1)."""
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


def parse_steps(text: str) -> range:
    """'20' or '20:22', steps counted from 1, the last included.

    Raises:
        UserError: it is neither.
    """
    first, _, last = text.partition(":")
    try:
        steps = range(int(first), int(last or first) + 1)
    except ValueError:
        steps = range(0)
    if not steps or steps[0] < 1:
        raise UserError(f"--profile {text}: give a step, or the first and the last as in 20:22")
    return steps
