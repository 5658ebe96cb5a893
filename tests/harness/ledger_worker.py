"""Run by test_ledger.py on every rank of two nodes: trains several recipes for the three steps that the ledger takes.

usage: ledger_worker.py SHARDS OUT [NAME key=value ...] [; NAME key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import stop_processes
from far_scale.evaluation.validation_videos import open_validation_videos
from far_scale.train.deepspeed_adapter import communication_backend, start_deepspeed_processes
from far_scale.train.loop import train
from harness.launch import small_recipe
from harness.node_check import nodes_checked_once


def main() -> None:
    from deepspeed.utils import groups

    shards, out, runs = Path(sys.argv[1]), Path(sys.argv[2]), " ".join(sys.argv[3:]).split(";")
    processes = start_deepspeed_processes()
    functions, methods = dict(vars(dist)), dict(vars(communication_backend()))
    for name, *overrides in map(str.split, runs):
        spec, *others = small_recipe(shards, out / name, *overrides)
        trained = train(load_recipe(spec, others), processes, open_validation_videos)
        assert trained is not None
        trained.engine.destroy()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes hpZ's groups once a process
    # What intercepts collectives while a step is recorded is gone.
    assert all(getattr(dist, name) is function for name, function in functions.items())
    assert vars(communication_backend()) == methods
    stop_processes()


with nodes_checked_once():
    main()
