"""The training loop, top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from far_scale.data.packs import PackLoader
from far_scale.data.scaling import LatentScaling
from far_scale.data.shards import ShardSet
from far_scale.model import FAR
from far_scale.objective import add_noise, pack_loss
from far_scale.recipe import Recipe, check_ranks
from far_scale.train import checkpoint
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments, set_learning_rate, start_engine
from far_scale.train.flops import peak_flops, train_flops
from far_scale.train.monitor import Monitor
from far_scale.train.processes import Processes
from far_scale.train.resume import describe, pieces, restore
from far_scale.train.schedule import learning_rate


def train(recipe: Recipe, processes: Processes) -> tuple[Any, ShardedEMA] | None:
    """Train `recipe` to its last step, from its run directory's latest checkpoint where there is one.

    Every process calls this. The run directory gets recipe.yaml, log.jsonl and checkpoints/.

    Returns:
        The engine and the EMA as they are after the last step; None where there was nothing left to do.

    Raises:
        UserError: ranks, shard set, checkpoint or disk do not fit the recipe.
    """
    check_ranks(recipe, processes.count)
    shard_set = ShardSet.open(recipe.data.shards)
    shard_set.check(recipe)
    scaling = LatentScaling.of(shard_set.manifest, recipe.data.scaling)
    run = Path(recipe.run_dir)
    config = recipe.far_config()

    start = checkpoint.latest_step(run) or 0
    if start >= recipe.train.steps:
        if processes.main:
            print(f"{run}: all {recipe.train.steps} steps are done; raise train.steps to go on")
        return None

    model = build_model(recipe)
    engine = start_engine(model, recipe, processes)
    ema = ShardedEMA(fragments(engine), recipe.optimizer.ema_decay)
    card = describe(recipe, model, shard_set.manifest, scaling)
    lane_states = restore(run, start, engine, ema, card) if start else None
    if processes.main:
        run.mkdir(parents=True, exist_ok=True)
        recipe.save(run / "recipe.yaml")
    dist.barrier()

    own_lanes = list(range(processes.rank, recipe.data.lanes, processes.count))
    loader = pack_loader(recipe, shard_set, scaling, own_lanes, start, lane_states)
    monitor = Monitor(recipe, processes, peak_flops(processes.device, compute_dtype(recipe)), start)
    try:
        packs_of_steps = iter(loader)
        for step in range(start, recipe.train.steps):
            with monitor.waiting():
                packs = next(packs_of_steps)
            rate = learning_rate(recipe, step)
            set_learning_rate(engine, rate)

            loss = train_step(engine, packs, recipe, config, processes, monitor)
            ema.update()
            monitor.end_step(step + 1, loss, rate, engine.get_global_grad_norm())

            done = step + 1
            if done % recipe.checkpoint.every == 0 or done == recipe.train.steps:
                states = gather_lane_states({pack.lane: pack.lane_state for pack in packs})
                checkpoint.save(run, done, pieces(engine, ema), {**card, "lanes": states}, recipe.checkpoint.keep)
                monitor.say(f"step {done}: saved {checkpoint.step_folder(run, done)}")
    finally:
        monitor.close()
        loader.close()
    return engine, ema


def train_step(
    engine: Any, packs: list[Any], recipe: Recipe, config: Any, processes: Processes, monitor: Monitor | None = None
) -> torch.Tensor:
    """One optimizer step on this rank's packs of a global batch; returns the mean of their losses (a scalar tensor).

    DeepSpeed averages over the packs and the ranks, and steps with the last pack's `engine.step()`.
    """
    losses = []
    for pack in packs:
        noisy = add_noise(pack, recipe.objective, config, recipe.seed).to(processes.device)
        velocity = engine(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
        loss = pack_loss(velocity, noisy)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        if monitor is not None:
            monitor.count(len(pack.clip_frames), noisy.layout.tokens, train_flops(config, noisy.layout))
    return torch.stack(losses).mean()


def build_model(recipe: Recipe) -> FAR:
    """The model with its first weights, which depend on `seed` alone: the same on every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return FAR(recipe.far_config())


def compute_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def pack_loader(
    recipe: Recipe,
    shard_set: ShardSet,
    scaling: LatentScaling,
    lanes: list[int],
    start: int,
    lane_states: dict[int, dict[str, int]] | None,
) -> PackLoader:
    """This process's share of every global batch from step `start` on."""
    data = recipe.data
    return PackLoader(
        shard_set,
        scaling,
        lanes=lanes,
        lanes_total=data.lanes,
        clips_per_pack=data.clips_per_pack,
        frames=data.frames,
        frame_stride=data.frame_stride,
        shuffle_window=data.shuffle_window,
        seed=recipe.seed,
        step=start,
        lane_states=lane_states,
        prefetch=data.prefetch,
    )


def gather_lane_states(own: dict[int, dict[str, int]]) -> dict[str, dict[str, int]]:
    """All lanes' states on every process, by lane number as text (they go into JSON)."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {str(lane): state for part in parts for lane, state in sorted(part.items())}
