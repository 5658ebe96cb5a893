"""The software and hardware of a run: recorded at each start, with an event for what has changed since the last one.

environment.json     packages, code, CUDA libraries, drivers and GPUs of the nodes, and variables, of the last start
environments.jsonl   those of earlier starts, where they differ from the next one
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

import far_scale
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.utils.code_version import CodeVersion, running_code
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.event_log import EventLog
from far_scale.utils.hosts import host_name
from far_scale.utils.io import JsonlWriter, read_json, write_json

NAME, HISTORY = "environment.json", "environments.jsonl"
_VARIABLES = re.compile(r"(NCCL|GLOO|SLURM|CUDA|TORCH|PYTORCH|UCX|FI)_\w+|OMP_NUM_THREADS")
_HEADER = re.compile(r"^(Name|Version): *(\S+)", re.MULTILINE)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|JWT|CREDENTIAL|AUTH")
_LOGIN = re.compile(r"(?<=://)[^/\s@]*@")  # user and password in a URL
_JOB_PREFIX = "SLURM_"  # variables that differ in each start
_MAX_LISTED = 12  # changes in the event's text


class Node(NamedTuple):
    """A rank's report of its node.

    Attributes:
        host: its name.
        driver: version of NVIDIA's driver, or None.
        device: name of the rank's GPU, or `cpu`.
    """

    host: str
    driver: str | None
    device: str


def record_environment(run: Path, processes: Processes, events: EventLog, step: int) -> None:
    """Write environment.json and emit what differs from the last start's; every rank calls it.

    What cannot be found is left out: no failure here ends a run.

    Args:
        run: the run directory.
        processes: the run's.
        events: of the run.
        step: steps done before.
    """
    nodes = all_gather_objects(_this_node(processes.device), processes.host_group)
    if not processes.is_main_process:
        return
    try:
        before, now = _read_last(run), environment(nodes, step)
        differences = [] if before is None else differences_of(before, now)
        if differences:
            JsonlWriter(run / HISTORY).append(before)
        write_json(run / NAME, now)
    except Exception as error:  # of any type: installations vary
        print_warning(f"{run / NAME}: not written ({type(error).__name__}: {error})")
        return
    if differences:
        more = len(differences) - _MAX_LISTED
        listed = "; ".join(differences[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        events.emit("environment", step, f"changed since the last start: {listed}", changes=differences)


def environment(nodes: Sequence[Node], step: int) -> dict[str, Any]:
    """The content of environment.json.

    Args:
        nodes: of all ranks.
        step: steps done before.
    """
    by_host: dict[str, dict[str, Any]] = {}
    for node in nodes:
        by_host.setdefault(node.host, {"driver": node.driver, "devices": []})["devices"].append(node.device)
    code = running_code()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "ranks": len(nodes),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "nccl": _nccl(),
        "nodes": by_host,
        "code": {"far_scale": far_scale.__version__, **asdict(code)},
        "variables": variables(os.environ),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Versions of all installed distributions by name, as `pip freeze` has them."""
    versions = {}
    for package in importlib.metadata.distributions():
        # Not `package.name`: Python's parser of e-mails would read the package's whole README.
        text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
        header = dict(_HEADER.findall(text.partition("\n\n")[0]))
        if "Name" in header and "Version" in header:
            versions[header["Name"]] = header["Version"]
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that affect communication and computation, without those that may be secrets."""
    return {
        name: _LOGIN.sub("", value)
        for name, value in sorted(environ.items())
        if _VARIABLES.fullmatch(name) and not _SECRET.search(name)
    }


def differences_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of two environments, in lines like `torch 2.12.0 -> 2.13.0`, without host names and job variables."""
    old, new = _comparable(before), _comparable(now)
    names = list(dict.fromkeys([*new, *old]))
    lines = [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
    old_code, new_code = (
        CodeVersion(**{k: v for k, v in values["code"].items() if k != "far_scale"}) for values in (before, now)
    )
    if old_code != new_code:
        lines.insert(0, f"code {_code_text(old_code)} -> {_code_text(new_code)}")
    return lines


def _comparable(values: Mapping[str, Any]) -> dict[str, str]:
    """The values to compare, by the name in a line; without the code."""
    nodes = values["nodes"].values()
    devices = Counter(device for node in nodes for device in node["devices"])
    comparable: dict[str, Any] = {
        "Python": values["python"],
        "far_scale": values["code"]["far_scale"],
        **{name: version for name, version in values["packages"].items() if name != "far_scale"},
        "CUDA": values["cuda"],
        "cuDNN": values["cudnn"],
        "NCCL": values["nccl"],
        "driver": ", ".join(sorted({node["driver"] for node in nodes if node["driver"]})) or None,
        "devices": ", ".join(f"{count} x {name}" for name, count in sorted(devices.items())),
        **{key: value for key, value in values["variables"].items() if not key.startswith(_JOB_PREFIX)},
    }
    return {name: str(value) for name, value in comparable.items() if value is not None}


def _code_text(code: CodeVersion) -> str:
    commit = "unknown" if code.commit is None else f"commit {code.commit[:12]}"
    return commit + (f" (with {code.diff_lines} changed lines{' or more' * code.diff_cut})" if code.diff else "")


def _read_last(run: Path) -> dict[str, Any] | None:
    try:
        last = read_json(run / NAME, "environment")
        differences_of(last, last)
    except (UserError, KeyError, TypeError, AttributeError):  # missing, or not comparable
        return None
    return last  # type: ignore[no-any-return]


def _this_node(device: torch.device) -> Node:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Node(host_name(), _driver(Path("/proc/driver/nvidia/version")), name)


def _driver(path: Path) -> str | None:
    """The version of the kernel module: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  ...`."""
    try:
        match = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else match[1]


def _cudnn() -> str | None:
    cudnn: Any = torch.backends.cudnn  # without types
    version = cudnn.version() if cudnn.is_available() else None
    return None if version is None else str(version)


def _nccl() -> str | None:
    nccl: Any = torch.cuda.nccl  # without types
    return ".".join(map(str, nccl.version())) if torch.cuda.is_available() else None
