"""The environment, the recipe and torchrun's command of the training processes of the tests."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A model and a batch that two processes train in seconds.
SMALL = [
    "model.layers=2", "model.heads=1", "data.frames=8", "data.lanes=4", "data.clips_per_pack=2",
    "data.shuffle_window=4", "sample.given=4", "optimizer.warmup_steps=4", "log.every=1", "checkpoint.every=5",
    "train.steps=10",
]  # fmt: skip


def command(ranks: int, *arguments: object) -> list[str]:
    """torchrun over `ranks` processes of this Python."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*run, *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's, with one thread a rank and without the variables of an outer launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def small_recipe(shards: Path, run: Path, *more: str) -> list[str]:
    """`demo_cpu` in small, as arguments of `far_scale.train`."""
    return ["demo_cpu", f"data.shards={shards}", f"run_dir={run}", *SMALL, *more]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
