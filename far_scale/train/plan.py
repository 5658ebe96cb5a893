"""`--dry-run`: checks everything about a run that can be known before it, and trains one batch of each stage."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from far_scale.config.recipe import Recipe, check_ranks
from far_scale.data.loader.mixture import summary
from far_scale.data.loader.pack_loader import PackLoader
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.distributed.sequence_parallel import describe_groups, start_sequence_group
from far_scale.model import FAR
from far_scale.train.collectives import expected_collectives
from far_scale.train.costs import StageCosts, activation_bytes, peak_flops
from far_scale.train.curriculum import stages
from far_scale.train.device_prefetch import Batch
from far_scale.train.engine import build_model, check_computation, compute_dtype, start_engine
from far_scale.train.flow_matching import add_noise
from far_scale.train.loop import train_step
from far_scale.train.setup import OpenVideos, load_start, open_data
from far_scale.train.sharding import choose_sharding, free_memory, state_bytes
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.event_log import EventLog
from far_scale.utils.hosts import host_name

_MFU = 0.4  # fraction of the device's peak, for the estimate of a step's time


def dry_run(recipe: Recipe, processes: Processes, open_videos: OpenVideos, accept_changes: bool = False) -> None:
    """Check recipe, ranks, shard sets and memory, then train one batch of each stage; nothing is written.

    Raises:
        UserError: something does not fit; memory is checked before anything is allocated.
    """
    check_ranks(recipe, processes.world_size)
    attention = check_computation(recipe.train, processes.device)
    config, train, plan = recipe.far_config(), recipe.train, stages(recipe)
    dtype, events = compute_dtype(train), EventLog(Path(recipe.run_dir), False)
    data = open_data(recipe, plan, 0, processes, events, open_videos)
    packs_per_step = recipe.data.lanes * train.sequence_parallel // processes.world_size
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in FAR(config).parameters())
    costs = [StageCosts.sample(stage, data.shard_sets[stage.index], recipe.seed) for stage in plan]
    activations = [activation_bytes(config, train, cost.largest) for cost in costs]
    sharding = choose_sharding(train, recipe.data.lanes, parameters, processes, lambda: max(activations))
    hosts = all_gather_objects(host_name(), processes.host_group)
    nodes = len(set(hosts))
    state = state_bytes(train.precision, sharding, parameters, processes.world_size)
    needs = [state + activation for activation in activations]
    need, have = max(needs), free_memory(processes)
    if processes.is_main_process:
        print(f"recipe      {recipe.name} ({recipe.hash()[:12]}), {train.steps} steps")
        print(f"ranks       {processes.world_size} x {packs_per_step} packs a step")
        for line in dict.fromkeys(line for stage in plan for line in summary(data.shard_sets[stage.index])):
            print(f"shard set   {line}")
        if data.held_out is not None:
            print(f"held-out    {data.held_out.clips} clips of {data.held_out.shards.folder}")
        print(f"model       {parameters / 1e6:.1f} M parameters, ZeRO-{sharding.stage}, {train.precision}")
        peak = processes.world_size * peak_flops(processes.device, dtype)
        for line in (
            attention,
            *sharding.why,
            *describe_groups(train.sequence_parallel, config.heads, hosts),
            *stage_table(costs, needs, peak),
            *expected_collectives(recipe, sharding, processes.world_size, nodes),
        ):
            print(line)
        print(f"memory      about {need / 1e9:.2f} GB a rank at most, {have / 1e9:.2f} GB free")
    if need > have:
        raise UserError(
            f"{recipe.name}: a rank needs about {need / 1e9:.1f} GB and has {have / 1e9:.1f} GB free; use more ranks, "
            "a higher train.zero_stage, train.activation_checkpointing=full, or a lower data.clips_per_pack or "
            "data.tokens_per_pack"
        )

    model = build_model(config, recipe.seed)
    if train.start_from is not None:
        text = load_start(model, recipe, data, accept_changes)
        if processes.is_main_process:
            print(text)
    engine = start_engine(model, recipe.optimizer, train, packs_per_step, processes, sharding)
    sequence = start_sequence_group(train.sequence_parallel, processes)
    own_lanes = sequence.lanes(recipe.data.lanes)
    for stage in plan:
        shard_set, packing = data.shard_sets[stage.index], stage.packing(recipe.seed)
        with PackLoader(shard_set, data.scaling, own_lanes, packing, stage.first, prefetch=1) as loader:
            packs = next(loader)
            for skipped in (skipped for pack in packs for skipped in pack.skipped):
                print_warning(f"one batch: {skipped}")
            noisy = [add_noise(pack, recipe.objective, stage.config, recipe.seed) for pack in packs]
            sequence.check_same_packs(packs, stage.first + 1)
            noisy = noisy if sequence.shard is None else [pack.shard(sequence.shard) for pack in noisy]
            start = time.perf_counter()
            batch = Batch(packs, [pack.to(processes.device) for pack in noisy], sequence.size)
            loss = processes.mean(train_step(engine, batch, stage, processes, reduce_once=sharding.reduce_once)).item()
            seconds = time.perf_counter() - start
        if processes.is_main_process:
            of_stage = f"of {stage.name}: " if recipe.curriculum else ""
            print(f"one batch   {of_stage}loss {loss:.4f}, {seconds:.2f} s (the first is the slowest)")
    if processes.is_main_process:
        print(f"dry run of {recipe.name} passed")


def stage_table(costs: list[StageCosts], needs: list[float], peak: float) -> list[str]:
    """The stages as a table.

    Args:
        needs: bytes that a rank needs in each stage.
        peak: FLOP/s of all ranks together.
    """
    rows = [
        ("stage", "steps", "frames", "clips a pack", "tokens a pack", "attended pairs", "TFLOP/step", "GB", "s/step")
    ]
    for cost, need in zip(costs, needs, strict=True):
        frames = cost.stage.data.frames
        rows.append(
            (
                cost.stage.name,
                str(cost.stage.steps),
                str(list(frames) if isinstance(frames, tuple) else frames),
                cost.mean_and_max(lambda layout: len(layout.clip_frames)),
                cost.mean_and_max(lambda layout: layout.tokens),
                cost.mean_and_max(lambda layout: layout.attended_pairs),
                f"{cost.step_flops / 1e12:.3g}",
                f"{need / 1e9:.2f}",
                f"{cost.step_flops / (peak * _MFU):.3g}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = f"(mean / largest of {len(costs[0].layouts)} drawn packs; TFLOP over all ranks; GB a rank;"
    return [*lines, f"{note} s/step at {_MFU:.0%} of {peak / 1e12:.3g} TFLOP/s, the peak of all ranks)"]
