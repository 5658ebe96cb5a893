"""Run by test_sharding.py on every rank of two nodes: trains layouts, and resumes each one's checkpoint in the next.

usage: sharding_worker.py SHARDS OUT [NAME key=value ...] [, NAME key=value ...]
Runs whose name begins with "packs" are not resumed; OUT/NAME.json is how often each of their steps reduced gradients.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import Processes, stop_processes
from far_scale.evaluation.validation_videos import open_validation_videos
from far_scale.train import loop
from far_scale.train.deepspeed_adapter import start_deepspeed_processes
from far_scale.train.loop import train
from harness.launch import small_recipe
from harness.node_check import nodes_checked_once


def train_layout(shards: Path, run: Path, overrides: list[str], processes: Processes) -> None:
    """One run in `run`, from its checkpoint where there is one."""
    from deepspeed.utils import groups

    spec, *others = small_recipe(shards, run, *overrides)
    trained = train(load_recipe(spec, others), processes, open_validation_videos)
    assert trained is not None
    trained.engine.destroy()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes hpZ's groups once a process


@contextlib.contextmanager
def counted_reductions(steps: list[int]) -> Iterator[None]:
    """Append to `steps` how often each step reduces gradients, at any stage above 0."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    calls = [0]

    def count(function):
        def counting(*given, **named):
            calls[0] += 1
            return function(*given, **named)

        return counting

    def step(*given):
        before = calls[0]
        loss = train_step(*given)
        steps.append(calls[0] - before)
        return loss

    train_step = loop.train_step
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (DeepSpeedZeroOptimizer_Stage3, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"),
            (DeepSpeedZeroOptimizer, "reduce_ipg_grads"),
        ):
            stack.enter_context(mock.patch.object(owner, name, count(getattr(owner, name))))
        stack.enter_context(mock.patch.object(loop, "train_step", step))
        yield


def main() -> None:
    shards, out, layouts = Path(sys.argv[1]), Path(sys.argv[2]), " ".join(sys.argv[3:]).split(",")
    processes = start_deepspeed_processes()
    named = [(name, overrides) for name, *overrides in map(str.split, layouts)]
    for name, overrides in named:
        reductions: list[int] = []
        with counted_reductions(reductions):
            train_layout(shards, out / name, overrides, processes)
        if processes.is_main_process:
            (out / f"{name}.json").write_text(json.dumps(reductions))
    named = [(name, overrides) for name, overrides in named if not name.startswith("packs")]
    for (name, _), (after, overrides) in zip(named, [*named[1:], named[0]], strict=True):
        run = out / f"{name}-{after}"
        if processes.is_main_process:
            shutil.copytree(out / name, run)
            (run / "checkpoints" / "latest").write_text("step-00000005\n")
        dist.barrier()
        train_layout(shards, run, overrides, processes)
    stop_processes()


with nodes_checked_once():
    main()
