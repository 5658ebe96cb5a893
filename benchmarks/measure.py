"""Common parts of benchmarks: facts of the machine, interleaved timings, peak memory, dated results.

A result is two files of the same name: JSON with every single number, and Markdown with its tables.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from far_scale.model.attention.kernel import first_line
from far_scale.utils.io import atomic_write, write_json

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "webdataset",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "numpy",
    "diffusers",
    "deepspeed",
)
OUT_OF_MEMORY = "out of memory"

Result = TypeVar("Result")

Row = dict[str, Any]
"""A row of a table, by column; lists and dicts go only into the JSON."""


def environment(device: torch.device, more: Mapping[str, str]) -> dict[str, Any]:
    """Date, hardware, versions, commit and command line, and `more` facts of the benchmark."""
    facts: dict[str, Any] = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    facts["cpu"] = _cpu_name()
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["torch threads"] = torch.get_num_threads()
    facts["memory GB"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    facts["python"] = platform.python_version()
    facts |= {name: version for name in PACKAGES if (version := _version(name))}
    facts["commit"] = commit(REPOSITORY)
    facts["command"] = _command()
    return facts | dict(more)


def commit(repository: Path, folder: str = ".") -> str:
    """The commit of `repository`, and whether tracked files under `folder` differ from it.

    "unknown" where it is not the top of a git repository: a copy inside another one has not that one's commit.
    """
    git = ["git", "-C", str(repository)]
    top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode or Path(top.stdout.strip()) != repository.resolve():
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", folder], capture_output=True).returncode
    return head.stdout.strip() + (" with changes" if changed else "")


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `function` takes, a GPU's queue drained before and after."""
    start = finished_time(device)
    function()
    return finished_time(device) - start


def finished_time(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    _synchronize(device)
    return time.perf_counter()


def interleaved(
    sides: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, minutes: float, title: str
) -> dict[str, dict[str, list[float]]]:
    """Run the sides in turn, `repeats` times: so that other load on the machine affects all alike.

    Args:
        sides: each returns seconds by the name of what took them.
        minutes: no further repeat is begun after this long.

    Returns:
        side -> name -> the seconds of every repeat.
    """
    seconds: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    start = time.monotonic()
    with tqdm(total=repeats * len(sides), desc=title, unit="run") as bar:
        for repeat in range(repeats):
            if repeat and time.monotonic() - start > 60 * minutes:
                break
            for side, run in sides.items():
                bar.set_postfix_str(side)
                for name, taken in run().items():
                    seconds[side].setdefault(name, []).append(taken)
                bar.update()
    return seconds


def attempt(function: Callable[[], Result], device: torch.device) -> tuple[Result | None, str]:
    """The result of `function` and ""; or None and a short reason of the failure.

    A library may fail in any way, or a GPU be too small for one side; the other sides are still measured.
    """
    try:
        return function(), ""
    except torch.OutOfMemoryError:
        note = OUT_OF_MEMORY
    except Exception as error:
        note = f"{type(error).__name__}: {first_line(error)}"
    gc.collect()  # now that no traceback holds the tensors any more
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None, note


def peak_beyond(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes at the peak of `function` above those in use before it: a GPU's allocations, else the resident set.

    Run `function` once before, so that its caches are already in use. None where the resident set is unknown (outside
    Linux, and in some containers).
    """
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds would hide part of the peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is resident now
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def print_table(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}\n\n" + "\n".join(_table(rows)), flush=True)


def write_result(folder: Path, name: str, facts: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]) -> Path:
    """Write `tables` (title -> rows) and `facts` as DATE-NAME.json and .md in `folder`; returns the Markdown's path."""
    moment = datetime.datetime.fromisoformat(facts["date"]).strftime("%Y-%m-%d-%H%M%S")
    path = folder / f"{moment}-{name}.md"
    write_json(path.with_suffix(".json"), {"facts": dict(facts), "tables": {t: list(r) for t, r in tables.items()}})
    lines = [f"# {name}, {facts['date'][:10]}", "", *(f"- {key}: {value}" for key, value in facts.items())]
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", *_table(rows)]
    with atomic_write(path) as staged:
        staged.write_text("\n".join(lines) + "\n")
    return path


def _table(rows: Sequence[Row]) -> list[str]:
    columns = [name for name, value in rows[0].items() if not isinstance(value, (list, dict))]
    cells = [columns, *([_cell(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command() -> str:
    """The command line, without the folders that only this machine has."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
