"""Run under torchrun by test_training.py: trains several recipes in one start of the processes.

usage: training_worker.py SHARDS OUT [NAME key=value ...] [, NAME key=value ...]
Of the run named "zero3", rank 0 also samples with the EMA weights that the processes hold, before they are exported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from far_scale.config.recipe import load_recipe
from far_scale.convert.model_dir import read_config
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import stop_processes
from far_scale.evaluation.rollouts.runner import evaluate_rollout
from far_scale.evaluation.validation_videos import open_validation_videos
from far_scale.health.watchdog import collective_timeout
from far_scale.model import FAR
from far_scale.sampling.config import SamplingConfig
from far_scale.train.checkpoint.export import export
from far_scale.train.deepspeed_adapter import start_deepspeed_processes
from far_scale.train.engine import fragments
from far_scale.train.loop import train
from harness.launch import small_recipe
from harness.node_check import nodes_checked_once


def gathered_ema(engine, ema) -> dict[str, torch.Tensor]:
    """The whole EMA out of the ranks' fragments, on every rank."""
    own = [(f.name, f.offset, w) for f, w in zip(fragments(engine), ema.weights, strict=True)]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
    whole = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    for name, offset, weight in (piece for part in parts for piece in part):
        whole[name].view(-1)[offset : offset + len(weight)] = weight
    return whole


def main() -> None:
    shards, out, *rest = sys.argv[1:]
    timeout = collective_timeout(1800.0)
    processes = start_deepspeed_processes(timeout)
    for run in " ".join(rest).split(","):
        name, *overrides = run.split()
        spec, *others = small_recipe(Path(shards), Path(out) / name, *overrides)
        recipe = load_recipe(spec, others)
        engine, ema, _ = train(recipe, processes, open_validation_videos)
        assert engine.zero_overlap_comm() == name.startswith("overlap")
        for group in dist.distributed_c10d._world.pg_map:  # DeepSpeed's among them
            assert group._get_backend(torch.device("cpu")).options._timeout == timeout, group.group_name
        if name == "zero3":
            weights = gathered_ema(engine, ema)
            if processes.is_main_process:
                export(recipe.run_dir, None, "ema", Path(out) / "model")
                config, metadata = read_config(Path(out) / "model")
                model = FAR(config).eval()
                model.load_state_dict(weights)
                torch.set_num_threads(1)
                evaluate_rollout(
                    model,
                    metadata,
                    ShardSet.open(shards),
                    SamplingConfig(4, 3, seed=5),
                    4,
                    3,
                    Path(out) / "sampled_in_training",
                )
            dist.barrier()
        engine.destroy()
    stop_processes()


with nodes_checked_once():
    main()
