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
from far_scale.train.collectives import expected_collectives, model_shapes
from far_scale.train.curriculum import stages
from far_scale.train.device_prefetch import Batch
from far_scale.train.engine import build_model, check_computation, start_engine
from far_scale.train.flow_matching import add_noise
from far_scale.train.loop import train_step
from far_scale.train.planner.estimate import Cluster, plan_run
from far_scale.train.planner.memory import Counts, activation_bytes
from far_scale.train.planner.profile import FOLDER, short_name
from far_scale.train.planner.report import disk_lines, memory_lines, stage_lines, time_lines
from far_scale.train.planner.shapes import draw_stages
from far_scale.train.setup import OpenVideos, check_memory, load_start, open_data, uses_flex
from far_scale.train.sharding import choose_sharding, free_memory
from far_scale.utils.errors import print_warning
from far_scale.utils.event_log import EventLog
from far_scale.utils.hosts import host_name


def dry_run(recipe: Recipe, processes: Processes, open_videos: OpenVideos, accept_changes: bool = False) -> None:
    """Check recipe, ranks, shard sets and memory, then train one batch of each stage; nothing is written.

    Raises:
        UserError: something does not fit; memory is checked before anything is allocated.
    """
    check_ranks(recipe, processes.world_size)
    kernel = check_computation(recipe.train, processes.device)
    config, train, plan = recipe.far_config(), recipe.train, stages(recipe)
    events = EventLog(Path(recipe.run_dir), False)
    data = open_data(recipe, plan, 0, processes, events, open_videos)
    packs_per_step = recipe.data.lanes * train.sequence_parallel // processes.world_size
    sizes = model_shapes(config).sizes
    is_flex = uses_flex(train, processes.device)
    shapes = draw_stages(plan, data.shard_sets, recipe.seed)
    counts = [Counts.of(each.largest, train.sequence_parallel) for each in shapes]
    activations = [activation_bytes(config, train, each, is_flex, packs_per_step) for each in counts]
    most = max(activation.total for activation in activations)
    sharding = choose_sharding(train, recipe.data.lanes, sizes, processes, lambda: most)
    reports = all_gather_objects((host_name(), free_memory(processes)), processes.host_group)
    hosts = [host for host, _ in reports]
    nodes = len(set(hosts))
    device = "cpu" if processes.device.type == "cpu" else short_name(torch.cuda.get_device_name(processes.device))
    cluster = Cluster(nodes, processes.world_size // nodes, device, min(free for _, free in reports))
    planned = plan_run(recipe, cluster, data.shard_sets, FOLDER, kernel.name, sharding, shapes)
    if processes.is_main_process:
        print(f"recipe      {recipe.name} ({recipe.hash()[:12]}), {train.steps} steps")
        print(f"ranks       {processes.world_size} x {packs_per_step} packs a step")
        for line in dict.fromkeys(line for stage in plan for line in summary(data.shard_sets[stage.index])):
            print(f"shard set   {line}")
        if data.held_out is not None:
            print(f"held-out    {data.held_out.clips} clips of {data.held_out.shards.folder}")
        print(f"model       {sum(sizes) / 1e6:.1f} M parameters, ZeRO-{sharding.stage}, {train.precision}")
        for line in (
            kernel.why,
            *sharding.why,
            *describe_groups(train.sequence_parallel, config.heads, hosts),
            *stage_lines(planned),
            *memory_lines(planned),
            *time_lines(planned),
            *disk_lines(planned),
            *expected_collectives(recipe, sharding, processes.world_size, nodes),
        ):
            print(line)
    check_memory(train, sizes, sharding, processes, most, packs_per_step)

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
