"""Run by test_planner_memory.py on each rank: trains steps of some shapes, and measures what they allocate.

usage: memory_worker.py OUT CASES, CASES a JSON list of lists of recipe overrides. OUT gets a JSON list with, for each
case in bytes: `state` between steps, `stepping` when Adam steps, and `saved`, allocated by a forward pass and its loss.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from far_scale.config.recipe import load_recipe
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.process_group import stop_processes
from far_scale.model.attention import choose_kernel, prepare
from far_scale.model.layers import HEAD_DIM
from far_scale.train.curriculum import stages
from far_scale.train.deepspeed_adapter import start_deepspeed_processes
from far_scale.train.device_prefetch import Batch
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import build_model, call_before_adam, fragments, start_engine
from far_scale.train.flow_matching import add_noise, pack_loss
from far_scale.train.loop import train_step
from far_scale.train.sharding import Sharding


def storages() -> dict[int, int]:
    """Bytes of each storage that a live tensor has, by its address."""
    gc.collect()
    found = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def new_bytes(before: dict[int, int]) -> int:
    return sum(size for address, size in storages().items() if address and before.get(address) != size)


def allocated(run: Any) -> tuple[Any, int]:
    """What `run` returns, and the bytes that it allocated and that are still there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
        gc.collect()
        with record_function("end of the run"):
            pass
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    total = 0
    for event in events:
        if event.name() == "end of the run":
            break
        total += event.nbytes() if event.name() == "[memory]" else 0
    return result, total


def make_pack(stage: Any, lane: int) -> Pack:
    frames = stage.data.frames if isinstance(stage.data.frames, int) else stage.data.frames[1]
    clips = (frames, *(max(1, frames - 1 - clip) for clip in range(stage.data.clips_per_pack - 1)))
    classes = torch.zeros(sum(clips), dtype=torch.int64)
    return Pack(
        latents=torch.randn(sum(clips), *stage.data.latent_shape),
        actions=classes if stage.config.actions else None,
        labels=classes[: len(clips)] if stage.config.labels else None,
        clip_frames=clips,
        keys=("",) * len(clips),
        lane=lane,
        step=0,
        lane_state={},
    )


def measure(overrides: list[str], processes: Any) -> dict[str, Any]:
    recipe = load_recipe("demo_cpu", overrides)
    (stage,), train = stages(recipe), recipe.train
    packs = recipe.data.lanes // processes.world_size
    clean = [make_pack(stage, lane) for lane in range(packs)]
    noisy = [add_noise(pack, recipe.objective, stage.config, recipe.seed) for pack in clean]
    for pack in noisy:
        prepare(pack.layout, processes.device, choose_kernel("auto", processes.device, torch.float32, HEAD_DIM).name)
    before = storages()
    model = build_model(stage.config, recipe.seed)
    engine = start_engine(model, recipe.optimizer, train, packs, processes, Sharding(train.zero_stage))
    ema = ShardedEMA(fragments(engine), recipe.optimizer.ema_decay)
    stepping: list[int] = []
    call_before_adam(engine, lambda adam: stepping.append(new_bytes(before)))
    for _ in range(2):
        train_step(engine, Batch(clean, noisy), stage, processes)
        ema.update(torch.ones(()))
    state = new_bytes(before)
    pack = noisy[0]

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        velocity = model(pack.latents, pack.timesteps, pack.actions, pack.labels, pack.layout)
        return velocity, pack_loss(velocity, pack)

    saved = 0
    if processes.world_size == 1:
        forward()
        kept, saved = allocated(forward)
        del kept
    engine.destroy()
    return {"state": state, "stepping": max(stepping), "saved": saved, "clips": pack.layout.clip_frames}


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    processes = start_deepspeed_processes()
    results = [measure(case, processes) for case in cases]
    if processes.is_main_process:
        out.write_text(json.dumps(results))
    stop_processes()


if __name__ == "__main__":
    main()
