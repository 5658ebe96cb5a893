"""The training loop, top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from far_scale.data.manifest import Manifest
from far_scale.data.packs import Pack, PackLoader
from far_scale.data.scaling import LatentScaling
from far_scale.model import FAR
from far_scale.model.attention import choose
from far_scale.model.layers import HEAD_DIM
from far_scale.objective import pack_loss
from far_scale.recipe import Recipe, check_ranks
from far_scale.train import checkpoint
from far_scale.train.checkpoint import LaneStates
from far_scale.train.compiled import check_compiler
from far_scale.train.curriculum import Stage, stage_of, stages
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments, set_learning_rate, start_engine
from far_scale.train.feed import Batch, Feed
from far_scale.train.flops import peak_flops, train_flops
from far_scale.train.monitor import Monitor
from far_scale.train.processes import Processes
from far_scale.train.profiler import Profiler
from far_scale.train.resume import describe, describe_stage, load_start_weights, pieces, restore
from far_scale.train.schedule import learning_rate


def train(recipe: Recipe, processes: Processes, steps_to_profile: range = range(0)) -> tuple[Any, ShardedEMA] | None:
    """Train `recipe` to its last step, from its run directory's latest checkpoint where there is one.

    Every process calls this. The run directory gets recipe.yaml, log.jsonl and checkpoints/, and profile/ if there are
    `steps_to_profile` (counted from 1).

    Returns:
        The engine and the EMA as they are after the last step; None where there was nothing left to do.

    Raises:
        UserError: ranks, shard sets, checkpoint, start weights or disk do not fit the recipe, or the attention kernel
            or the compiler that it asks for is missing.
    """
    check_ranks(recipe, processes.count)
    attention = check_computation(recipe, processes)
    plan = stages(recipe)
    run = Path(recipe.run_dir)
    start = checkpoint.latest_step(run) or 0
    if start >= recipe.train.steps:
        if processes.main:
            print(f"{run}: all {recipe.train.steps} steps are done; raise train.steps to go on")
        return None
    to_do = [(stage, stage.open_shards()) for stage in plan if stage.end > start]
    manifest = Manifest.read(recipe.data.shards)
    scaling = LatentScaling.of(manifest, recipe.data.scaling)

    model = build_model(recipe)
    if recipe.train.start_from is not None and start == 0:
        load_start_weights(model, recipe.train.start_from)
    card = describe(recipe, model, manifest, scaling)
    engine = start_engine(model, recipe, processes)
    ema = ShardedEMA(fragments(engine), recipe.optimizer.ema_decay)
    lane_states = restore(run, start, engine, ema, recipe, stage_of(plan, start - 1)) if start else None
    if processes.main:
        run.mkdir(parents=True, exist_ok=True)
        recipe.save(run / "recipe.yaml")
    dist.barrier()

    own_lanes = list(range(processes.rank, recipe.data.lanes, processes.count))
    monitor = Monitor(recipe, processes, peak_flops(processes.device, compute_dtype(recipe)), start)
    monitor.say(attention)
    profiler = Profiler(steps_to_profile, run, processes)
    try:
        for stage, shard_set in to_do:
            monitor.begin_stage(stage)
            first = max(start, stage.first)
            states = lane_states if first > stage.first else None  # a stage begins its shard set afresh
            dealing, prefetch = stage.dealing(recipe.seed), stage.data.prefetch
            with (
                PackLoader(shard_set, scaling, own_lanes, dealing, first, states, prefetch) as packs_of_steps,
                Feed(packs_of_steps, recipe.objective, stage.config, recipe.seed, processes.device) as batches,
            ):
                for step in range(first, stage.end):
                    with monitor.waiting():
                        batch = next(batches)
                    rate = learning_rate(recipe, step) * stage.learning_rate_scale
                    set_learning_rate(engine, rate)

                    done = step + 1
                    with profiler.watching(done):
                        loss = train_step(engine, batch, stage, processes, monitor)
                        ema.update()
                    monitor.end_step(done, loss, rate, engine.get_global_grad_norm())

                    if done % recipe.checkpoint.every == 0 or done == recipe.train.steps:
                        lanes = gather_lane_states({pack.lane: pack.lane_state for pack in batch.packs})
                        state = {**card, **describe_stage(stage, shard_set.manifest), "lanes": lanes}
                        checkpoint.save(run, done, pieces(engine, ema), state, recipe.checkpoint.keep)
                        monitor.say(f"step {done}: saved {checkpoint.step_folder(run, done)}")
    finally:
        monitor.close()
    return engine, ema


def train_step(
    engine: Any, batch: Batch, stage: Stage, processes: Processes, monitor: Monitor | None = None
) -> torch.Tensor:
    """One optimizer step on this rank's packs of a global batch.

    DeepSpeed averages over the packs and the ranks, and steps with the last pack's `engine.step()`.

    Returns:
        The mean of the packs' losses, weighted by their clips: a scalar tensor whose mean over the ranks is the loss,
        the mean over the clips of the global batch.
    """
    weights = pack_weights(batch.packs, stage, processes)
    losses = []
    for noisy, weight in zip(batch.noisy, weights, strict=True):
        velocity = engine(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
        loss = pack_loss(velocity, noisy) * weight
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        if monitor is not None:
            layout = noisy.layout
            monitor.count(len(layout.clip_frames), layout.tokens, train_flops(stage.config, layout))
    return torch.stack(losses).mean()


def pack_weights(packs: list[Pack], stage: Stage, processes: Processes) -> torch.Tensor:
    """`[packs]` what each pack's mean over its clips counts in the global batch: its clips over those of a mean pack.

    Only a token budget gives packs of different numbers of clips; without one no rank asks the others.
    """
    if stage.data.tokens_per_pack is None:
        return torch.ones(len(packs), device=processes.device)
    clips = torch.tensor([float(len(pack.clip_frames)) for pack in packs]).to(processes.device, non_blocking=True)
    total = clips.sum()
    dist.all_reduce(total)
    return clips * (stage.data.lanes / total)


def build_model(recipe: Recipe) -> FAR:
    """The model with random first weights, which depend on `seed` alone: the same on every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return FAR(recipe.far_config())


def check_computation(recipe: Recipe, processes: Processes) -> str:
    """Which attention kernel this run takes and why, as a line for the log.

    Raises:
        UserError: that kernel is unknown or not usable here, or there is no compiler for train.compile.
    """
    if recipe.train.compile:
        check_compiler(processes.device)
    return choose(recipe.train.attention, processes.device, compute_dtype(recipe), HEAD_DIM).why


def compute_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def gather_lane_states(own: LaneStates) -> LaneStates:
    """All lanes' states on every process."""
    parts: list[LaneStates] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {lane: state for part in parts for lane, state in sorted(part.items())}
