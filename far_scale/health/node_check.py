"""Checks of each rank's node before training."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import far_scale
from far_scale.health.gemm_probe import GemmProbe
from far_scale.utils.hosts import rank_list, ranks_on_hosts

MAX_MEDIAN_RATIO = 2.0
"""A rank that is this many times worse than the median is logged as slow; if other processes use its GPU's memory, it
is refused."""

_BATCHES = 100  # of the GEMM probe: long enough for a GPU to leave its idle clock


@dataclass(frozen=True)
class RankReport:
    """The state of one rank's node.

    Attributes:
        device: name of the device.
        kind: cuda or cpu.
        free_memory, total_memory: bytes on the device; of main memory for a CPU.
        fault: an error of the device; None if there is none.
        flops: FLOP/s of the GEMM probe.
        free_disk: free bytes by recipe key: of run_dir, and of checkpoint.local_dir if there is one.
        code: SHA-256 of the package's sources.
        recipe: SHA-256 of the recipe.
        versions: of Python and the libraries.
    """

    rank: int
    host: str
    device: str
    kind: str
    free_memory: int
    total_memory: int
    fault: str | None
    flops: float
    free_disk: dict[str, int]
    code: str
    recipe: str
    versions: dict[str, str]


def examine(
    rank: int,
    host: str,
    device: torch.device,
    dtype: torch.dtype,
    shared_values: Mapping[str, Any],
    folders: Mapping[str, str | None],
) -> RankReport:
    """Examine this rank's node: about half a second.

    Args:
        dtype: dtype of the computation.
        shared_values: recipe values that must be the same on all ranks.
        folders: to be written to, by recipe key.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    fault, flops = None, 0.0
    try:
        free, total = _memory(device)
        product = GemmProbe(device, dtype)
        if product.is_right():
            flops = product.flops / product.seconds(_BATCHES)
        else:
            fault = "a matrix product of small whole numbers came out wrong"
    except RuntimeError as error:  # the type of CUDA errors
        free = total = 0
        fault = str(error).splitlines()[0]
    return RankReport(
        rank=rank,
        host=host,
        device=name,
        kind=device.type,
        free_memory=free,
        total_memory=total,
        fault=fault,
        flops=flops,
        free_disk={key: _free_disk(Path(folder)) for key, folder in folders.items() if folder is not None},
        code=code_hash(Path(far_scale.__file__).parent),
        recipe=hashlib.sha256(json.dumps(shared_values, sort_keys=True).encode()).hexdigest(),
        versions={
            "Python": ".".join(platform.python_version_tuple()[:2]),
            "torch": torch.__version__,
            "deepspeed": importlib.metadata.version("deepspeed"),
        },
    )


def refusals(reports: Sequence[RankReport], checkpoint_bytes: int) -> list[str]:
    """The problems with which training must not start, each with its fix; empty if there are none.

    Names the ranks that differ from the majority; without a majority, those that differ from the lowest rank.

    Args:
        reports: by rank.
        checkpoint_bytes: size of one checkpoint.
    """
    hosts = [report.host for report in reports]
    texts = []
    for report in reports:
        if report.fault is not None:
            texts.append(f"rank {report.rank} on {report.host} ({report.device}): {report.fault}; {_exclude([report])}")
    for report in _short_of_memory(reports):
        texts.append(
            f"rank {report.rank} on {report.host} ({report.device}): only {report.free_memory / 1e9:.1f} of "
            f"{report.total_memory / 1e9:.1f} GB are free; end what holds the rest, or {_exclude([report])}"
        )
    texts += _short_of_disk(reports, checkpoint_bytes)
    texts += _differences(
        reports, hosts, "the code of far_scale", lambda report: report.code[:12], "install the same on all nodes"
    )
    texts += _differences(
        reports, hosts, "the recipe", lambda report: report.recipe[:12], "start all ranks with the same recipe and keys"
    )
    for library in reports[0].versions:
        texts += _differences(
            reports,
            hosts,
            library,
            lambda report, library=library: report.versions[library],  # type: ignore[misc]
            "use the same environment on all nodes",
        )
    return texts


def slow_devices(reports: Sequence[RankReport]) -> list[RankReport]:
    """The ranks with a GEMM much slower than the median."""
    median = upper_median([report.flops for report in reports])
    return [report for report in reports if report.flops < median / MAX_MEDIAN_RATIO]


def upper_median(values: Sequence[float]) -> float:
    """The median, or the greater of the two middle values: of two ranks the better one is the reference."""
    return sorted(values)[len(values) // 2]


def code_hash(package: Path) -> str:
    """SHA-256 of the names and contents of the Python files in `package`."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _memory(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    return free, total


def _free_disk(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be created."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _exclude(reports: Sequence[RankReport]) -> str:
    hosts = ",".join(dict.fromkeys(report.host for report in reports))
    return f"leave the node out: sbatch --exclude={hosts}"


def _short_of_memory(reports: Sequence[RankReport]) -> list[RankReport]:
    """GPUs with much more memory in use than the median. Not for main memory, which other processes may use."""
    usable = [report for report in reports if report.kind == "cuda" and report.fault is None]
    if not usable:
        return []
    median = upper_median([report.free_memory / report.total_memory for report in usable])
    return [report for report in usable if report.free_memory / report.total_memory < median / MAX_MEDIAN_RATIO]


def _short_of_disk(reports: Sequence[RankReport], checkpoint_bytes: int) -> list[str]:
    ranks_per_host = Counter(report.host for report in reports)
    short: dict[str, dict[str, float]] = {}
    for report in reports:
        for key, free in report.free_disk.items():
            # Node-local checkpoints hold only the parts of the node's ranks.
            fraction = 1.0 if key == "run_dir" else ranks_per_host[report.host] / len(reports)
            if free < fraction * checkpoint_bytes:
                short.setdefault(key, {})[report.host] = fraction * checkpoint_bytes
    texts = []
    for key, needs in short.items():
        where = "all nodes" if len(needs) == len(ranks_per_host) else ", ".join(needs)
        free = min(report.free_disk[key] for report in reports if report.host in needs)
        texts.append(
            f"{key}: on {where} a checkpoint needs {max(needs.values()) / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            f"free some, or set another {key}"
        )
    return texts


def _differences(
    reports: Sequence[RankReport], hosts: Sequence[str], what: str, value_of: Callable[[RankReport], str], fix: str
) -> list[str]:
    groups: dict[str, list[int]] = {}
    for report in reports:
        groups.setdefault(value_of(report), []).append(report.rank)
    if len(groups) == 1:
        return []
    usual = max(groups, key=lambda value: len(groups[value]))  # ties: the group with the lowest rank
    odd = ", ".join(f"{value} on {ranks_on_hosts(ranks, hosts)}" for value, ranks in groups.items() if value != usual)
    return [f"{what} is not the same everywhere: {odd}, but {usual} on {rank_list(groups[usual])}; {fix}"]
