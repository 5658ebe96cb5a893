"""Run by test_sequence_parallel.py on ranks that share packs: checks of the model, then trainings.

usage: sequence_worker.py SHARDS OUT CASES [NAME[<NAME@STEP] key=value ...] [; ...]
CASES is a name in `CASES`. Of the checks rank 0 writes OUT/checks.json. A run NAME<OTHER@STEP continues from a copy of
OTHER's checkpoint of STEP, and "dry" is a dry run. Rank R writes the steps, lanes and keys that it trains on to
OUT/NAME.keys-R.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from far_scale.config.recipe import load_recipe
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.process_group import Processes, stop_processes
from far_scale.distributed.sequence_parallel import SequenceGroup, exchanges, start_sequence_group
from far_scale.evaluation.validation_videos import open_validation_videos
from far_scale.model import FAR, FARConfig
from far_scale.model.attention import exchange, flex
from far_scale.model.sharded_layout import SequenceRank, ShardedLayout
from far_scale.train import loop
from far_scale.train.deepspeed_adapter import start_deepspeed_processes
from far_scale.train.plan import dry_run
from far_scale.train.planner.memory import Counts, activation_bytes
from far_scale.utils.errors import UserError
from harness.launch import small_recipe
from harness.node_check import nodes_checked_once

SIDE = 4
PLAIN = FARConfig(layers=2, heads=3, channels=4, window=8, actions=4)
LONG = FARConfig(layers=3, heads=3, channels=4, window=3, context_patch=2, actions=4)
DIT = FARConfig(layers=2, heads=3, channels=4, window=8, labels=3, causal=False)
XL = FARConfig(layers=2, heads=18, channels=4, window=3, context_patch=2)

CASES: dict[str, dict[str, tuple[FARConfig, tuple[int, ...], str, str]]] = {
    "two": {
        "window only": (PLAIN, (8, 5, 3), "none", "auto"),
        "context": (LONG, (7, 2, 5), "none", "auto"),
        "attention kept": (LONG, (7, 2, 5), "attention-kept", "auto"),
        "all recomputed": (LONG, (7, 2, 5), "full", "auto"),
        "one context frame": (LONG, (4, 2), "none", "auto"),  # none on the second rank
        "no context": (LONG, (3, 2), "none", "auto"),
        "one frame": (LONG, (1,), "none", "auto"),  # nothing at all on the second rank
        "video DiT with labels": (DIT, (4, 3, 2), "none", "auto"),
        "FlexAttention": (LONG, (7, 2, 5), "none", "flex"),
        "FlexAttention, no context": (LONG, (3, 1), "none", "flex"),
    },
    "four": {
        "5 heads": (dataclasses.replace(LONG, heads=5), (7, 2, 5), "none", "auto"),
        "18 heads": (XL, (7, 2, 5), "none", "auto"),
        "two frames": (XL, (2,), "none", "auto"),
        "Video DiT": (dataclasses.replace(DIT, heads=4), (4, 3, 2), "none", "auto"),
    },
}  # fmt: skip


def random_model(config: FARConfig, dtype: torch.dtype) -> FAR:
    torch.manual_seed(0)
    model = FAR(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_inputs(config: FARConfig, clip_frames: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    frames = sum(clip_frames)
    return {
        "latents": torch.randn(frames, config.channels, SIDE, SIDE, dtype=dtype),
        "timesteps": 1000 * torch.rand(frames, dtype=dtype),
        "actions": torch.randint(0, 4, (frames,)) if config.actions else None,
        "labels": torch.randint(0, 3, (len(clip_frames),)) if config.labels else None,
    }


def own_inputs(inputs: dict[str, Tensor | None], layout: ShardedLayout) -> dict[str, Tensor | None]:
    """What this rank holds of them."""
    return {name: x if x is None or name == "labels" else x[layout.rows] for name, x in inputs.items()}


def relative_errors(
    config: FARConfig, clip_frames: tuple[int, ...], checkpointing: str, kernel: str, shard: SequenceRank
) -> list[float]:
    """The largest error of the output, and of a parameter's gradient, against one rank, in float64."""
    model, layout = random_model(config, torch.float64), config.layout(clip_frames, (SIDE, SIDE))
    inputs = random_inputs(config, clip_frames, torch.float64)
    expected = model(**inputs, layout=layout)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    model.configure_execution(checkpointing=checkpointing)
    sharded = ShardedLayout(layout, shard)
    with contextlib.ExitStack() as stack:
        if kernel == "flex":  # it has no backward on a CPU: the dense reference in its place
            stack.enter_context(mock.patch.object(flex, "attend", dense_attention))
            stack.enter_context(mock.patch.object(model, "kernel", lambda: "flex"))
        out = model(**own_inputs(inputs, sharded), layout=sharded)
        (out * weights[sharded.window_part]).sum().backward()
    errors = [(out - expected[sharded.window_part]).abs().max().item() / expected.abs().max().item() if len(out) else 0]
    for name, parameter in model.named_parameters():
        total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(total)
        if name in gradients:
            errors.append(((total - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-30)).item())
    return [errors[0], max(errors[1:])]


def dense_attention(q, k, v, handle):
    return torch.ops.far_scale.frame_attention(q, k, v, handle, "dense")[0]


def saved_bytes(model: FAR, **inputs) -> int:
    """Bytes of the storages that autograd keeps for the backward of a pack, without the parameters."""
    kept: dict[int, Tensor] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(**inputs)
    size = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)
    out.sum().backward()
    return size


def saved_fraction(config: FARConfig, clip_frames: tuple[int, ...], checkpointing: str, shard: SequenceRank) -> float:
    model, inputs = random_model(config, torch.float32), random_inputs(config, clip_frames, torch.float32)
    layout = config.layout(clip_frames, (SIDE, SIDE))
    model.configure_execution(checkpointing=checkpointing)
    alone = saved_bytes(model, **inputs, layout=layout)
    sharded = ShardedLayout(layout, shard)
    return saved_bytes(model, **own_inputs(inputs, sharded), layout=sharded) / alone


def predicted_fraction(config: FARConfig, clip_frames: tuple[int, ...], checkpointing: str, ranks: int) -> float:
    """`saved_fraction` as the planner works it out."""
    train = load_recipe("demo_cpu", [f"train.activation_checkpointing={checkpointing}"]).train
    layout = config.layout(clip_frames, (SIDE, SIDE))
    shared, alone = (
        activation_bytes(config, train, Counts.of(layout, number), flex=False, packs=1).saved for number in (ranks, 1)
    )
    return shared / alone


def exchanged_elements(config: FARConfig, checkpointing: str, shard: SequenceRank) -> list[int]:
    """The all-to-alls of a pack's forward and backward: elements of the larger of what is sent and what arrives."""
    model, inputs = random_model(config, torch.float32), random_inputs(config, (7, 2, 5), torch.float32)
    model.configure_execution(checkpointing=checkpointing)
    sharded = ShardedLayout(config.layout((7, 2, 5), (SIDE, SIDE)), shard)
    with mock.patch.object(exchange.dist, "all_to_all_single", wraps=dist.all_to_all_single) as calls:
        model(**own_inputs(inputs, sharded), layout=sharded).sum().backward()
    return [max(x.numel() for x in call.args[:2]) for call in calls.call_args_list]


def count_flops(config: FARConfig, shard: SequenceRank) -> list[int]:
    """FLOPs of a pack on one rank, and those of all ranks that share it."""
    model, inputs = random_model(config, torch.float32), random_inputs(config, (7, 2, 5), torch.float32)
    layout = config.layout((7, 2, 5), (SIDE, SIDE))
    sharded = ShardedLayout(layout, shard)
    with FlopCounterMode(display=False) as alone:
        model(**inputs, layout=layout).sum().backward()
    with FlopCounterMode(display=False) as part:
        model(**own_inputs(inputs, sharded), layout=sharded).sum().backward()
    flops = torch.tensor(part.get_total_flops())
    dist.all_reduce(flops)
    return [alone.get_total_flops(), int(flops)]


def refuses_other_packs(group: SequenceGroup, rank: int) -> bool:
    """Whether ranks notice that they have read different clips, and only then."""

    def pack(key: str) -> Pack:
        return Pack(torch.zeros(1), None, None, (3,), (key,), 0, 7, {})

    group.check_same_packs([pack("a@0")], 8)
    try:
        group.check_same_packs([pack(f"{rank}@0")], 8)
    except UserError as error:
        return "ranks 0-" in str(error) and "have read different clips" in str(error)
    return False


def check_model(cases: str, processes: Processes, out: Path) -> None:
    group = start_sequence_group(processes.world_size, processes)
    shard = group.shard
    assert shard is not None
    values: dict[str, object] = {}
    for name, case in CASES[cases].items():
        errors = torch.tensor(relative_errors(*case, shard))
        dist.all_reduce(errors, dist.ReduceOp.MAX)
        values[name] = errors.tolist()
    modes, config = ("none", "attention-kept", "full"), dataclasses.replace(LONG, heads=max(LONG.heads, shard.size))
    saved = torch.tensor([saved_fraction(config, (11, 8, 5), mode, shard) for mode in modes])
    dist.all_reduce(saved, dist.ReduceOp.MAX)
    values["saved"] = dict(zip(modes, saved.tolist(), strict=True))
    values["predicted"] = {mode: predicted_fraction(config, (11, 8, 5), mode, shard.size) for mode in modes}
    sent = {mode: exchanged_elements(config, mode, shard) for mode in modes}
    values["exchanges"] = {mode: len(elements) for mode, elements in sent.items()}
    layout = config.layout((7, 2, 5), (SIDE, SIDE))
    expected = exchanges(layout, config.layers, config.heads, shard.size, 1, recomputed=False, rank=shard.rank)
    values["elements"] = [sorted(sent["none"]), sorted(elements for _, elements in expected)]
    values["flops"] = count_flops(config, shard)
    values["refuses"] = refuses_other_packs(group, processes.rank)
    if processes.is_main_process:
        (out / "checks.json").write_text(json.dumps(values))


@contextlib.contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Append to `path` what the training loop trains on: a JSON line [step, lane, keys] for each pack."""
    train_step = loop.train_step

    def step(engine, batch, *others):
        with path.open("a") as lines:
            lines.writelines(json.dumps([pack.step, pack.lane, pack.keys]) + "\n" for pack in batch.packs)
        return train_step(engine, batch, *others)

    with mock.patch.object(loop, "train_step", step):
        yield


def train_run(shards: Path, out: Path, spec: str, processes: Processes) -> None:
    first, *overrides = spec.split()
    name, _, source = first.partition("<")
    if source and processes.is_main_process:
        other, _, step = source.partition("@")
        shutil.copytree(out / other, out / name)
        (out / name / "checkpoints" / "latest").write_text(f"step-{int(step):08d}\n")
    dist.barrier()
    recipe, *others = small_recipe(shards, out / name, *overrides)
    if name == "dry":
        dry_run(load_recipe(recipe, others), processes, open_validation_videos)
        return
    with recorded(out / f"{name}.keys-{processes.rank}"):
        trained = loop.train(load_recipe(recipe, others), processes, open_validation_videos)
    assert trained is not None
    trained.engine.destroy()


def main() -> None:
    shards, out, cases, runs = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], " ".join(sys.argv[4:])
    processes = start_deepspeed_processes()
    torch.set_num_threads(1)
    check_model(cases, processes, out)
    for spec in filter(None, map(str.strip, runs.split(";"))):
        train_run(shards, out, spec, processes)
    stop_processes()


with nodes_checked_once():
    main()
