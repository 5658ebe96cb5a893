"""Run by test_sharding.py on every rank of two nodes: trains layouts, and resumes each one's checkpoint in the next.

usage: sharding_worker.py SHARDS OUT [NAME key=value ...] [, NAME key=value ...]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from launch import small_recipe

from far_scale.recipe import load_recipe
from far_scale.train.loop import train
from far_scale.train.processes import Processes, start_processes, stop_processes


def train_layout(shards: Path, run: Path, overrides: list[str], processes: Processes) -> None:
    """One run in `run`, from its checkpoint where there is one."""
    from deepspeed.utils import groups

    spec, *others = small_recipe(shards, run, *overrides)
    trained = train(load_recipe(spec, others), processes)
    assert trained is not None
    trained.engine.destroy()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes hpZ's groups once a process


def main() -> None:
    shards, out, layouts = Path(sys.argv[1]), Path(sys.argv[2]), " ".join(sys.argv[3:]).split(",")
    processes = start_processes()
    named = [(name, overrides) for name, *overrides in map(str.split, layouts)]
    for name, overrides in named:
        train_layout(shards, out / name, overrides, processes)
    for (name, _), (after, overrides) in zip(named, [*named[1:], named[0]], strict=True):
        run = out / f"{name}-{after}"
        if processes.main:
            shutil.copytree(out / name, run)
            (run / "checkpoints" / "latest").write_text("step-00000010\n")
        dist.barrier()
        train_layout(shards, run, overrides, processes)
    stop_processes()


main()
