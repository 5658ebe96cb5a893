"""The training loop, top to bottom."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from far_scale.config.recipe import Recipe, check_ranks
from far_scale.data.loader.mixture import summary
from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.scaling import LatentScaling
from far_scale.distributed.consensus import Consensus
from far_scale.distributed.ledger import phase
from far_scale.distributed.process_group import Processes, set_timeouts
from far_scale.distributed.signals import StopSignals
from far_scale.health.preflight import check_nodes
from far_scale.health.straggler import StragglerDetector
from far_scale.health.watchdog import Watchdog
from far_scale.model import FAR
from far_scale.model.attention import choose_kernel
from far_scale.model.layers import HEAD_DIM
from far_scale.train.checkpoint import local
from far_scale.train.checkpoint.saver import CheckpointSaver
from far_scale.train.checkpoint_policy import CheckpointPolicy
from far_scale.train.collectives import StepLedger
from far_scale.train.compiled import check_compiler
from far_scale.train.costs import most_activation_bytes
from far_scale.train.curriculum import Stage, stages
from far_scale.train.damaged_samples import DamagedSamples
from far_scale.train.deepspeed_adapter import grad_norm, one_step
from far_scale.train.device_prefetch import Batch, DevicePrefetch
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments, set_learning_rate, start_engine
from far_scale.train.environment import record_environment
from far_scale.train.flops import peak_flops, train_flops
from far_scale.train.flow_matching import pack_loss
from far_scale.train.held_out import OpenVideos, open_held_out
from far_scale.train.lr_schedule import learning_rate
from far_scale.train.metrics import Monitor
from far_scale.train.profiler import Profiler
from far_scale.train.resume import Resume, identity, run_metadata, stage_metadata
from far_scale.train.sets import open_sets, say_staged
from far_scale.train.sharding import choose_sharding
from far_scale.train.start_weights import start_from
from far_scale.train.step_guard import StepGuard
from far_scale.train.validation import Validation
from far_scale.utils.event_log import EventLog


class Trained(NamedTuple):
    """What `train` leaves.

    Attributes:
        engine, ema: as they are after the last step.
        step: steps done, fewer than the recipe's where the run was asked to stop.
    """

    engine: Any
    ema: ShardedEMA
    step: int


def train(
    recipe: Recipe,
    processes: Processes,
    open_videos: OpenVideos,
    steps_to_profile: range = range(0),
    signals: StopSignals | None = None,
    accept_changes: bool = False,
) -> Trained | None:
    """Train `recipe` to its last step, from its run directory's latest checkpoint where there is one.

    Every process calls this. The run directory gets recipe.yaml, log.jsonl, events.jsonl, environment.json and
    checkpoints/, profile/ if there are `steps_to_profile` (counted from 1), and validation/ if the recipe asks for
    sampled videos.

    Args:
        recipe: what to train.
        processes: who trains it.
        open_videos: opens what samples the videos of validation.
        steps_to_profile: steps to trace.
        signals: what may ask for a stop; then the run ends after a step, with a checkpoint.
        accept_changes: resume even where what has changed since the checkpoint makes another result.

    Returns:
        None where there was nothing left to do.

    Raises:
        UserError: ranks, shard sets, checkpoint, start weights or disk do not fit the recipe, or the attention kernel
            or the compiler that it asks for is missing; a node is not as the others; no good step is left to take.
    """
    check_ranks(recipe, processes.world_size)
    attention = check_computation(recipe, processes)
    plan = stages(recipe)
    run, events = Path(recipe.run_dir), EventLog(Path(recipe.run_dir), processes.is_main_process)
    resume = Resume(recipe, plan, processes, events)
    start = resume.newest_whole()
    resume.check_start_from(start, accept_changes)
    if start >= recipe.train.steps:
        if processes.is_main_process:
            print(f"{run}: all {recipe.train.steps} steps are done; raise train.steps to go on")
        return None
    to_come = [stage for stage in plan if stage.end > start]
    shard_sets, manifest = open_sets(recipe.data, to_come, processes, events, start)
    scaling = LatentScaling.of(manifest, recipe.data.scaling)
    not_over = [stage for stage in plan if stage.end >= start]
    held_out = open_held_out(
        recipe, not_over, manifest, scaling, compute_dtype(recipe), processes, events, start, open_videos
    )

    hosts = check_nodes(recipe, processes, compute_dtype(recipe), events, start)
    record_environment(run, processes, events, start)
    with Watchdog(run, processes.rank, recipe.faults.watchdog_seconds, events, hosts) as watchdog:
        model = build_model(recipe)
        if recipe.train.start_from is not None and start == 0:
            first_set = shard_sets[to_come[0].index].manifest
            events.emit("started-from", 0, start_from(model, recipe, first_set, scaling, accept_changes))
        card = run_metadata(recipe, model, manifest, scaling, processes)
        stage_cards = {index: stage_metadata(plan[index], shards.manifest) for index, shards in shard_sets.items()}
        sharding = choose_sharding(
            recipe,
            sum(parameter.numel() for parameter in model.parameters()),
            processes,
            lambda: most_activation_bytes(recipe, to_come, shard_sets),
        )
        engine = start_engine(model, recipe, processes, sharding)
        set_timeouts(processes)  # of DeepSpeed's groups
        ema = ShardedEMA(fragments(engine), recipe.optimizer.ema_decay)
        name = identity(run, processes, events)
        local_folder = local.folder_of(recipe.checkpoint, run, name)
        position = resume.restore(start, engine, ema, local_folder, card, stage_cards, shard_sets, accept_changes)
        if processes.is_main_process:
            recipe.save(run / "recipe.yaml")
        dist.barrier()

        guard = StepGuard(engine, recipe.faults, processes, events)
        if position.guard is not None:
            guard.load_state(position.guard)
        else:
            guard.updates = position.step  # of a checkpoint from before steps could be skipped, or of none
        if position.step == 0:
            events.emit("began", 0, f"training {recipe.name} on {processes.world_size} ranks")
        own_lanes = list(range(processes.rank, recipe.data.lanes, processes.world_size))
        profiler, consensus = Profiler(steps_to_profile, run, processes, position.step), Consensus(signals, processes)
        slow = StragglerDetector(processes, compute_dtype(recipe), events, hosts)
        peak, done, stopping = peak_flops(processes.device, compute_dtype(recipe)), position.step, False
        with (
            Monitor(recipe, processes, peak, done, name, slow) as monitor,
            CheckpointSaver(run, recipe.checkpoint, processes, events, local_folder, resume.latest) as saver,
        ):
            keeper = CheckpointPolicy(recipe, engine, ema, guard, saver, resume, card, processes)
            ledger = StepLedger(hosts, processes, events, monitor.say)
            monitor.say(attention)
            for line in sharding.why:
                monitor.say(line)
            validation = Validation(plan, held_out, engine, ema, monitor, watchdog, processes)
            validation.after_step(position.step)  # which the last start may not have come to
            for stage in plan:
                if stage.end <= position.step or stopping:
                    continue
                shard_set = shard_sets[stage.index]
                monitor.begin_stage(stage)
                ledger.begin_stage(max(position.step, stage.first))
                monitor.say("\n".join(summary(shard_set)))
                first = max(position.step, stage.first)
                middle = first > stage.first  # or else the stage begins its shard set afresh
                states, beginnings = (position.lanes, position.beginnings) if middle else (None, ())
                if first == stage.first or position.lanes_changed:
                    guard.forget_levels()
                packing = replace(stage.packing(recipe.seed), beginnings=beginnings)
                stage_card = stage_cards[stage.index] | ({"beginnings": beginnings} if beginnings else {})
                ahead = (stage.data.prefetch, stage.data.prefetch_bytes)
                damaged = DamagedSamples(stage.data.max_damaged_samples, states, processes, events)
                with (
                    PackLoader(shard_set, scaling, own_lanes, packing, first, states, *ahead) as packs_of_steps,
                    DevicePrefetch(
                        packs_of_steps, recipe.objective, stage.config, recipe.seed, processes.device
                    ) as batches,
                    contextlib.closing(packs_of_steps),  # before the feed, which may be waiting for it
                ):
                    for step in range(first, stage.end):
                        with monitor.waiting_for_data():
                            batch = next(batches)
                        rate = learning_rate(recipe, step) * stage.learning_rate_scale
                        set_learning_rate(engine, rate)

                        done = step + 1
                        with ledger.watching(done):
                            with profiler.watching(done):
                                loss = train_step(engine, batch, stage, processes, monitor, guard, sharding.reduce_once)
                                ema.update(guard.update_mask)
                            consensus.start(saver.busy, any(pack.skipped for pack in batch.packs), keeper.due)
                        guard.end_step(done, batch.packs)
                        monitor.end_step(done, loss, rate, grad_norm(engine), guard.skipped, damaged.count)
                        watchdog.beat(done)

                        flags = consensus.flags()
                        if flags.damaged:
                            damaged.report(done, batch.packs)
                        with monitor.waiting_for_save():
                            keeper.after_step(done, batch.packs, stage_card, flags)
                        stopping = flags.stop
                        if stopping:
                            break
                        validation.after_step(done)
                say_staged(shard_set, done, processes, events)
            saver.finish(required=done == recipe.train.steps)
            if done == recipe.train.steps:
                events.emit("finished", done, f"all {done} steps are done")
            else:
                events.emit("stopped", done, f"step {done}: stopped as asked; the same command goes on from here")
        dist.barrier()  # a launcher that sees one process end may kill the others in their last moments
        return Trained(engine, ema, done)


def train_step(
    engine: Any,
    batch: Batch,
    stage: Stage,
    processes: Processes,
    monitor: Monitor | None = None,
    guard: StepGuard | None = None,
    reduce_once: bool = False,
) -> torch.Tensor:
    """One optimizer step on this rank's packs of a global batch, unless the guard finds it bad.

    DeepSpeed averages over the packs and the ranks, and steps after the last pack.

    Args:
        reduce_once: as in `Sharding`.

    Returns:
        The mean of the packs' losses, weighted by their clips: a scalar tensor whose mean over the ranks is the loss,
        the mean over the clips of the global batch.
    """
    weights = pack_weights(batch.packs, stage, processes)
    losses = []
    with one_step(engine, len(batch.noisy), reduce_once) as backward:
        for noisy, weight in zip(batch.noisy, weights, strict=True):
            with phase("forward"):
                velocity = engine(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
            loss = pack_loss(velocity, noisy) * weight
            if guard is not None:
                guard.watch(loss)
            backward(loss)
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
    with phase("clips"):
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
    return choose_kernel(recipe.train.attention, processes.device, compute_dtype(recipe), HEAD_DIM).why


def compute_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
