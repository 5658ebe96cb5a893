"""The training loop, top to bottom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from far_scale.config.recipe import Recipe, check_ranks
from far_scale.data.loader.mixture import summary
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.consensus import Consensus
from far_scale.distributed.ledger import phase
from far_scale.distributed.process_group import Processes
from far_scale.distributed.sequence_parallel import describe_groups, start_sequence_group
from far_scale.distributed.signals import StopSignals
from far_scale.health.preflight import check_nodes
from far_scale.health.straggler import StragglerDetector
from far_scale.health.watchdog import Watchdog
from far_scale.train.checkpoint import local
from far_scale.train.checkpoint.saver import CheckpointSaver
from far_scale.train.checkpoint_policy import CheckpointPolicy
from far_scale.train.collectives import StepLedger
from far_scale.train.costs import train_flops
from far_scale.train.curriculum import Stage, stages
from far_scale.train.deepspeed_adapter import grad_norm, optimizer_step
from far_scale.train.device_prefetch import Batch
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import build_model, check_computation, compute_dtype, fragments, set_learning_rate
from far_scale.train.environment import record_environment
from far_scale.train.flow_matching import pack_loss
from far_scale.train.lr_schedule import learning_rate
from far_scale.train.metrics import Monitor
from far_scale.train.profiler import Profiler
from far_scale.train.resume import Resume, find_identity
from far_scale.train.run_state import run_metadata, stage_metadata
from far_scale.train.setup import (
    OpenVideos,
    load_start,
    open_data,
    open_forecast,
    open_monitor,
    prefetched_batches,
    shard_model,
)
from far_scale.train.shard_sets import DamagedSamples, log_staged_reads
from far_scale.train.step_guard import StepGuard
from far_scale.train.tensorboard_log import check_tensorboard
from far_scale.train.validation import Validation
from far_scale.utils.event_log import EventLog


class Trained(NamedTuple):
    """The result of `train`.

    Attributes:
        engine, ema: their state after the last step.
        step: steps done; fewer than train.steps if the run was stopped by a signal.
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
    """Train `recipe` to its last step, from the latest checkpoint in its run directory if there is one.

    Every process calls this. The run directory gets recipe.yaml, log.jsonl, events.jsonl, environment.json and
    checkpoints/, profile/ if there are `steps_to_profile` (counted from 1), and validation/ if the recipe asks for
    sampled videos.

    Args:
        recipe: what to train.
        processes: the processes of the run.
        open_videos: see `OpenVideos`.
        steps_to_profile: steps to trace.
        signals: requests to stop; then the run ends after a step, with a checkpoint.
        accept_changes: resume even if something that affects the result has changed since the checkpoint.

    Returns:
        None if there was nothing left to do.

    Raises:
        UserError: ranks, shard sets, checkpoint, start weights or disk do not fit the recipe, or its attention kernel,
            compiler or TensorBoard is missing; a node differs from the others; too many steps are skipped.
    """
    check_ranks(recipe, processes.world_size)
    if recipe.log.tensorboard:
        check_tensorboard()
    kernel = check_computation(recipe.train, processes.device)
    plan, dtype = stages(recipe), compute_dtype(recipe.train)
    run, events = Path(recipe.run_dir), EventLog(Path(recipe.run_dir), processes.is_main_process)
    resume = Resume(recipe, plan, processes, events)
    start = resume.newest_undamaged()
    resume.check_start_from(start, accept_changes)
    if start >= recipe.train.steps:
        if processes.is_main_process:
            print(f"{run}: all {recipe.train.steps} steps are done; raise train.steps to continue")
        return None
    data = open_data(recipe, plan, start, processes, events, open_videos)

    folders = {"run_dir": recipe.run_dir, "checkpoint.local_dir": recipe.checkpoint.local_dir}
    hosts = check_nodes(
        recipe.name, recipe.far_config(), recipe.shared_values(), folders, processes, dtype, events, start
    )
    record_environment(run, processes, events, start)
    with Watchdog(run, processes.rank, recipe.faults.watchdog_seconds, events, hosts) as watchdog:
        model = build_model(recipe.far_config(), recipe.seed)
        if recipe.train.start_from is not None and start == 0:
            events.emit("started-from", 0, load_start(model, recipe, data, accept_changes))
        metadata = run_metadata(recipe, model, data.manifest, data.scaling, processes)
        metadata_of_stages = {
            index: stage_metadata(plan[index], shards.manifest) for index, shards in data.shard_sets.items()
        }
        sequence = start_sequence_group(recipe.train.sequence_parallel, processes)
        engine, sharding = shard_model(model, recipe, [stage for stage in plan if stage.end > start], data, processes)
        ema = ShardedEMA(fragments(engine), recipe.optimizer.ema_decay)
        identity = find_identity(run, processes, events)
        local_folder = local.local_run_folder(recipe.checkpoint, run, identity)
        resumed = resume.restore(
            start, engine, ema, local_folder, metadata, metadata_of_stages, data.shard_sets, accept_changes
        )
        if processes.is_main_process:
            recipe.save(run / "recipe.yaml")
        dist.barrier()

        guard = StepGuard(engine, recipe.faults, processes, events)
        if resumed.guard is not None:
            guard.load_state(resumed.guard)
        else:
            guard.updates = resumed.step  # 0, or an old checkpoint without a guard, when no step could be skipped
        if resumed.step == 0:
            events.emit("began", 0, f"training {recipe.name} on {processes.world_size} ranks")
        profiler, consensus = Profiler(steps_to_profile, run, processes, resumed.step), Consensus(signals, processes)
        stragglers = StragglerDetector(processes, dtype, events, hosts)
        done, stopping = resumed.step, False
        with (
            open_monitor(recipe, processes, dtype, done, identity, stragglers) as monitor,
            CheckpointSaver(run, recipe.checkpoint, processes, events, local_folder, resume.latest) as saver,
        ):
            policy = CheckpointPolicy(
                recipe.checkpoint,
                recipe.train.steps,
                recipe.faults.skipped_in_row,
                engine,
                ema,
                guard,
                saver,
                resume,
                metadata,
                processes,
            )
            ledger = StepLedger(hosts, processes, events, monitor.print)
            groups = describe_groups(sequence.size, recipe.model.heads, hosts)
            forecast = open_forecast(recipe, model, sharding, hosts, processes, events)
            for line in (kernel.why, *sharding.why, *groups):
                monitor.print(line)
            validation = Validation(plan, data.held_out, engine, ema, monitor, watchdog, processes)
            validation.after_step(done)  # the last start may have ended before this validation
            for stage in plan:
                if stage.end <= done or stopping:
                    continue
                shard_set, first = data.shard_sets[stage.index], max(done, stage.first)
                monitor.begin_stage(stage)
                ledger.begin_stage(first)
                monitor.print("\n".join(summary(shard_set)))
                is_resumed = first > stage.first  # otherwise the stage starts at the beginning of its shard set
                lanes, beginnings = (resumed.lanes, resumed.beginnings) if is_resumed else (None, ())
                if not is_resumed or resumed.lanes_changed:
                    guard.clear_levels()
                packing = replace(stage.packing(recipe.seed), beginnings=beginnings)
                metadata_of_stage = metadata_of_stages[stage.index] | ({"beginnings": beginnings} if beginnings else {})
                damaged = DamagedSamples(stage.data.max_damaged_samples, lanes, processes, events)
                of_data = shard_set, data.scaling, packing, first, lanes, recipe.objective
                with prefetched_batches(stage, *of_data, processes, sequence, kernel.name) as batches:
                    for step in range(first, stage.end):
                        with monitor.waiting_for_data():
                            batch = next(batches)
                        sequence.check_same_packs(batch.packs, step + 1)
                        rate = learning_rate(recipe.optimizer, recipe.train.steps, step) * stage.learning_rate_scale
                        set_learning_rate(engine, rate)

                        done = step + 1
                        with ledger.record(done):
                            with profiler.trace(done):
                                loss = train_step(engine, batch, stage, processes, monitor, guard, sharding.reduce_once)
                                ema.update(guard.update_mask)
                            consensus.start(saver.busy, any(pack.skipped for pack in batch.packs), policy.is_due)
                        guard.end_step(done, batch.packs)
                        monitor.end_step(done, loss, rate, grad_norm(engine), guard.skipped, damaged.count)
                        watchdog.beat(done)
                        forecast.end_step(done, [noisy.whole_layout for noisy in batch.noisy])

                        flags = consensus.flags()
                        if flags.damaged:
                            damaged.report(done, batch.packs if sequence.reports else [])
                        with monitor.waiting_for_save():
                            policy.after_step(done, batch.packs, metadata_of_stage, flags)
                        stopping = flags.stop
                        if stopping:
                            break
                        validation.after_step(done)
                log_staged_reads(shard_set, done, processes, events)
            saver.finish(required=done == recipe.train.steps)
            if done == recipe.train.steps:
                events.emit("finished", done, f"all {done} steps are done")
            else:
                events.emit("stopped", done, f"step {done}: stopped on request; the same command resumes from here")
        dist.barrier()  # when one process exits, a launcher may kill the others before they are done
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
    """One optimizer step on this rank's packs of a global batch, unless the guard skips it.

    DeepSpeed averages over the packs and the ranks, and steps after the last pack.

    Args:
        reduce_once: as in `Sharding`.

    Returns:
        The mean of the packs' losses, weighted by their clips: a scalar tensor. Its mean over the ranks is the loss,
        which is the mean over the clips of the global batch.
    """
    weights = pack_weights(batch.packs, stage, processes, batch.ranks_per_pack)
    losses = []
    with optimizer_step(engine, len(batch.noisy), reduce_once) as backward:
        for noisy, weight in zip(batch.noisy, weights, strict=True):
            with phase("forward"):
                velocity = engine(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
            loss = pack_loss(velocity, noisy) * weight
            if guard is not None:
                guard.add_loss(loss)
            backward(loss)
            losses.append(loss.detach())
            if monitor is not None:
                layout = noisy.whole_layout
                counts = len(layout.clip_frames), layout.tokens, train_flops(stage.config, layout)
                monitor.count(*(count / batch.ranks_per_pack for count in counts))
    return torch.stack(losses).mean()


def pack_weights(packs: list[Pack], stage: Stage, processes: Processes, ranks_per_pack: int = 1) -> list[torch.Tensor]:
    """Weight of each pack's loss in the global batch: its number of clips over the mean number of a pack.

    Packs have different numbers of clips only with a token budget; otherwise no communication is needed.

    Args:
        ranks_per_pack: ranks that share each pack.

    Returns:
        Scalar tensors.
    """
    if stage.data.tokens_per_pack is None:
        return [torch.ones((), device=processes.device)] * len(packs)
    clips = [len(pack.clip_frames) for pack in packs]
    total = torch.full((), float(sum(clips)), device=processes.device)  # filled there: a copy could wait for the GPU
    with phase("clips"):
        dist.all_reduce(total)
    of_a_clip = stage.data.lanes * ranks_per_pack / total
    return [count * of_a_clip for count in clips]
