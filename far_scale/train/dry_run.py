"""`--dry-run`: everything that can be found out about a run without running it, and one batch."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from far_scale.data.scaling import LatentScaling
from far_scale.data.shards import ShardSet
from far_scale.errors import UserError
from far_scale.layout import FrameLayout
from far_scale.model import FAR
from far_scale.recipe import Recipe, check_ranks
from far_scale.train.engine import start_engine
from far_scale.train.flops import train_flops
from far_scale.train.loop import build_model, pack_loader, train_step
from far_scale.train.processes import Processes

# Bytes a parameter of what training holds: (weights, gradients, optimizer with master weights and EMA).
_BYTES = {"bf16": (2, 4, 16), "fp32": (4, 4, 12)}


def dry_run(recipe: Recipe, processes: Processes) -> None:
    """Check recipe, ranks, shard set and memory, then train one batch; nothing is written.

    Raises:
        UserError: something does not fit; memory is judged before anything is allocated.
    """
    check_ranks(recipe, processes.count)
    shard_set = ShardSet.open(recipe.data.shards)
    shard_set.check(recipe)
    manifest = shard_set.manifest

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in FAR(recipe.far_config()).parameters())
    _, height, width = recipe.data.latent_shape
    grid = (height // recipe.model.patch, width // recipe.model.patch)
    layout = FrameLayout.window((recipe.data.frames,) * recipe.data.clips_per_pack, grid)
    need = state_bytes(recipe, parameters, processes.count) + activation_bytes(recipe, layout)
    have = _free_memory(processes)
    if processes.main:
        passes = recipe.data.lanes // processes.count
        print(f"recipe      {recipe.name} ({recipe.hash()[:12]}), {recipe.train.steps} steps")
        print(f"ranks       {processes.count} x {passes} packs of {recipe.data.clips_per_pack} clips a step")
        print(f"shard set   {recipe.data.shards}: {len(manifest.shards)} shards, {manifest.samples} samples")
        print(
            f"model       {parameters / 1e6:.1f} M parameters, ZeRO-{recipe.train.zero_stage}, {recipe.train.precision}"
        )
        print(f"pack        {layout.tokens} tokens, {layout.attended_pairs} attended pairs")
        flops = train_flops(recipe.far_config(), layout) * recipe.data.lanes
        print(f"step        {flops / 1e12:.3g} TFLOP over all ranks")
        print(f"memory      about {need / 1e9:.2f} GB a rank, {have / 1e9:.2f} GB free")
    if need > have:
        raise UserError(
            f"{recipe.name}: a rank needs about {need / 1e9:.1f} GB and has {have / 1e9:.1f} GB free; use more ranks, "
            "a higher train.zero_stage, train.activation_checkpointing=full or a lower data.clips_per_pack"
        )

    engine = start_engine(build_model(recipe), recipe, processes)
    own_lanes = list(range(processes.rank, recipe.data.lanes, processes.count))
    scaling = LatentScaling.of(manifest, recipe.data.scaling)
    with pack_loader(recipe, shard_set, scaling, own_lanes, 0, None) as loader:
        packs = next(iter(loader))
        start = time.perf_counter()
        loss = processes.mean(train_step(engine, packs, recipe, recipe.far_config(), processes)).item()
    if processes.main:
        print(f"one batch   loss {loss:.4f}, {time.perf_counter() - start:.2f} s (the first is the slowest)")
        print(f"dry run of {recipe.name} passed")


def state_bytes(recipe: Recipe, parameters: int, ranks: int) -> float:
    """Weights, gradients, master weights, Adam's moments and EMA that one rank holds, by ZeRO stage."""
    weights, gradients, optimizer = _BYTES[recipe.train.precision]
    stage = recipe.train.zero_stage
    shares = (
        weights / (ranks if stage == 3 else 1),
        gradients / (ranks if stage >= 2 else 1),
        optimizer / (ranks if stage >= 1 else 1),
    )
    return parameters * sum(shares)


def activation_bytes(recipe: Recipe, layout: FrameLayout) -> float:
    """Roughly what a forward pass keeps for backward: some 34 numbers a token, layer and channel of width.

    With activation checkpointing one number a layer and one layer's worth in full.
    """
    number = 2 if recipe.train.precision == "bf16" else 4
    config = recipe.far_config()
    a_layer = 34 * layout.tokens * config.width * number
    if recipe.train.activation_checkpointing == "full":
        return a_layer + config.layers * layout.tokens * config.width * number
    return config.layers * a_layer


def _free_memory(processes: Processes) -> float:
    if processes.device.type == "cuda":
        return torch.cuda.mem_get_info(processes.device)[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(meminfo["MemAvailable"].split()[0]) * 1024 / processes.count
