"""A real SLURM cluster for the tests, and what they ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness.launch import ROOT
from harness.processes import forked_python

SCRIPT = ROOT / "tests" / "harness" / "slurm_cluster.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED")

# FAR-XL's recipe with a model and a batch that two CPU processes train in seconds.
TINY = [
    "model.preset=null", "model.layers=1", "model.heads=1", "model.patch=2", "model.condition=action",
    "model.classes=4", "data.autoencoder=compact-vizdoom-f8c32", "data.frames=8", "data.frame_stride=1",
    "data.lanes=4", "data.clips_per_pack=2", "data.shuffle_window=4", "data.scaling=channel", "sample.given=4",
    "sample.guidance=1", "train.precision=fp32", "train.compile=false", "log.every=1", "checkpoint.every=10",
]  # fmt: skip


def tiny(shards: Path, run: Path, steps: int, *more: str) -> list[str]:
    """Overrides that make FAR-XL's recipe small."""
    return [*TINY, f"data.shards={shards}", f"run_dir={run}", f"train.steps={steps}", *more]


def steps_logged(run: Path) -> list[int]:
    """The steps in the run's log, in its order."""
    path = run / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


class Cluster:
    """A running cluster; its jobs start in `folder`, where their output lands, too."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.environment = {**kept, "SLURM_CONF": f"{root}/slurm.conf", "FAR_SCALE": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment.pop("PYTHONPATH", None)  # a job finds its code by itself

    def fork_python(self) -> None:
        """Have the jobs' Python programs forked by the fork server, which saves each rank seconds of imports."""
        if not torch.cuda.is_available():
            self.environment |= {"PYTHON": str(forked_python())}

    def run(self, *command: object, **environment: object) -> str:
        """The output of a command, which must succeed."""
        own = {**self.environment, **{name: str(value) for name, value in environment.items()}}
        done = subprocess.run(
            list(map(str, command)), env=own, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, script: Path, options: str, overrides: list[str], **environment: object) -> str:
        """Submit; returns the job's number."""
        return self.run("sbatch", "--parsable", "--mem=3000", *options.split(), script, *overrides, **environment)

    def show(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(
        self, job: str | None, what: str, holds: Callable[[], bool], timeout: float = 120, every: float = 0.2
    ) -> None:
        """Ask `every` so many seconds until it `holds`; fail, with the output of `job`, after `timeout`."""
        end = time.monotonic() + timeout
        while not holds():
            output = f"\njob {job}:\n{self.output(job)}" if job else ""
            assert time.monotonic() < end, f"{what}: not within {timeout} s{output}"
            time.sleep(every)

    def wait(self, job: str, states: tuple[str, ...] = ENDED) -> dict[str, str]:
        """The job as the controller has it, once it is in one of these states."""
        # Each question is a process of its own.
        self.until(job, " or ".join(states), lambda: self.show(job)["JobState"] in states, every=0.5)
        return self.show(job)

    def output(self, job: str) -> str:
        """What the job printed at all its starts."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"**/*{job}*.out")))

    def kill_node(self, name: str) -> None:
        self.run("bash", SCRIPT, "kill-node", self.root, name)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed by a test")

    def start_node(self, name: str) -> None:
        self.run("bash", SCRIPT, "start-node", self.root, name)
        idle = ("sinfo", "-h", "-N", "-t", "idle", "-o", "%N")
        self.until(None, f"{name} is idle", lambda: name in self.run(*idle).split())


@contextlib.contextmanager
def started_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster of three nodes; without one the tests are skipped with the reason, or fail where CI is set."""
    root = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a short path, for sockets lie below it
    root.chmod(0o755)
    owner = {**os.environ, "OWNER": str(os.getpid())}
    up = subprocess.run(["bash", SCRIPT, "up", root], env=owner, capture_output=True, text=True)
    try:
        if up.returncode:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no SLURM cluster: {up.stderr[-2000:]}")
        yield Cluster(root, folder)
    finally:
        subprocess.run(["bash", SCRIPT, "down", root], check=True)
        shutil.rmtree(root)
