"""Measures steps of a few shapes and the disk, for a `Profile`."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

import far_scale
from far_scale.config.schema import ObjectiveSection, OptimizerSection, TrainSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.collective_costs import ModelShapes, ParallelSetup, step_collectives
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.model import FAR, FARConfig
from far_scale.model.attention import choose_kernel, flex
from far_scale.model.layers import HEAD_DIM
from far_scale.model.layout import FrameLayout
from far_scale.train.curriculum import Stage
from far_scale.train.device_prefetch import Batch
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import build_model, compute_dtype, fragments, start_engine
from far_scale.train.flow_matching import add_noise
from far_scale.train.loop import train_step
from far_scale.train.planner.profile import Measurement, Profile, Settings, short_name
from far_scale.train.planner.time_model import Work, fit_seconds, pack_work, sum_work, update_work
from far_scale.train.sharding import Sharding
from far_scale.utils.hosts import host_name

WARMUP, TIMED = 3, 5
_DISK_BYTES = 256 * 2**20


def measured_shapes(config: FARConfig, layout: FrameLayout) -> list[tuple[FARConfig, tuple[int, ...]]]:
    """The models and the packs' clips that are measured: fewer layers and clips than the recipe's, two widths."""
    clips = layout.clip_frames
    packs = list(dict.fromkeys([clips, clips[: -(-len(clips) // 2)], clips[:1]]))
    few, more = (min(config.layers, layers) for layers in (2, 4))
    narrow = max(1, config.heads // 2)
    models = dict.fromkeys((layers, heads) for layers, heads in ((few, config.heads), (few, narrow), (more, narrow)))
    return [(replace(config, layers=layers, heads=heads), pack) for layers, heads in models for pack in packs]


def measure(
    stage: Stage,
    layout: FrameLayout,
    optimizer: OptimizerSection,
    objective: ObjectiveSection,
    train: TrainSection,
    folder: Path,
    processes: Processes,
    print_line: Callable[[str], None],
) -> Profile:
    """Measure this machine; with more than one rank the seconds include the collectives.

    Args:
        stage: gives the shape of the model and of the latents.
        layout: the largest pack that is measured.
        optimizer, objective, train: the recipe's sections.
        folder: where the disk is measured.
        processes: the process group; every rank calls it.
        print_line: gets a line for each measured shape.
    """
    device = processes.device
    zero_stage = 1 if train.zero_stage == "auto" else train.zero_stage
    kernel = choose_kernel(train.attention, device, compute_dtype(train), HEAD_DIM).name
    measurements = []
    for config, clips in measured_shapes(stage.config, layout):
        shape = replace(stage, config=config)
        work, seconds = measure_step(shape, clips, optimizer, objective, train, zero_stage, kernel, processes)
        text = f"{config.layers} layers of {config.heads} heads, clips of {list(clips)} frames"
        measurements.append(Measurement(text, work, seconds))
        print_line(f"{seconds:.4g} s  {text}")
    write, read = measure_disk(folder)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    versions = {"far_scale": far_scale.__version__, **{name: version(name) for name in ("torch", "deepspeed")}}
    return Profile(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        hardware=hardware if device.type == "cuda" else f"{hardware}, {torch.get_num_threads()} threads",
        gpu=short_name(hardware) if device.type == "cuda" else "cpu",
        ranks=processes.world_size,
        versions={**versions, "python": platform.python_version()},
        settings=Settings(train.precision, train.compile, kernel, zero_stage),
        measurements=tuple(measurements),
        coefficients=fit_seconds([m.work for m in measurements], [m.seconds for m in measurements]),
        disk_write=write,
        disk_read=read,
        disk_folder=str(folder),
    )


def measure_step(
    stage: Stage,
    clips: tuple[int, ...],
    optimizer: OptimizerSection,
    objective: ObjectiveSection,
    train: TrainSection,
    zero_stage: int,
    kernel: str,
    processes: Processes,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Work, float]:
    """The work of a step on one pack a rank, and its median seconds.

    Args:
        stage: with the model's shape.
        clips: frames of the pack's clips.
        zero_stage: of ZeRO.
        kernel: of attention.
        clock: in seconds.
    """
    with _step(stage, clips, optimizer, objective, train, zero_stage, processes, clock) as (step, shapes):
        seconds = [step() for _ in range(WARMUP + TIMED)][WARMUP:]
        del step
    gc.collect()  # the engine is full of reference cycles
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
    pack = pack_work(stage.config, stage.layout(clips), train.activation_checkpointing, kernel == flex.NAME)
    ranks, number_bytes = processes.world_size, 2 if train.precision == "bf16" else 4
    nodes = len(set(all_gather_objects(host_name(), processes.host_group)))
    setup = ParallelSetup(
        ranks=ranks, nodes=nodes, stage=zero_stage, number_bytes=number_bytes, gradient_bytes=number_bytes,
        whole_below=train.whole_below,
    )  # fmt: skip
    update = update_work(shapes.sizes, zero_stage, step_collectives(shapes, setup), ranks)
    return sum_work([pack, update]), statistics.median(seconds)


@contextlib.contextmanager
def _step(
    stage: Stage,
    clips: tuple[int, ...],
    optimizer: OptimizerSection,
    objective: ObjectiveSection,
    train: TrainSection,
    zero_stage: int,
    processes: Processes,
    clock: Callable[[], float],
) -> Iterator[tuple[Callable[[], float], ModelShapes]]:
    """A function that trains a step on random latents and returns its seconds, and the model's sizes."""
    config, device = stage.config, processes.device
    model: FAR = build_model(config, 0)
    shapes = ModelShapes.from_model(model)
    engine = start_engine(model, optimizer, train, 1, processes, Sharding(zero_stage))
    ema = ShardedEMA(fragments(engine), optimizer.ema_decay)
    always = torch.ones((), device=device)
    frames = sum(clips)
    classes = torch.zeros(frames, dtype=torch.int64)
    pack = Pack(
        latents=torch.randn(frames, *stage.data.latent_shape),
        actions=classes if config.actions else None,
        labels=classes[: len(clips)] if config.labels else None,
        clip_frames=clips,
        keys=("",) * len(clips),
        lane=processes.rank,
        step=0,
        lane_state={},
    )
    batch = Batch([pack], [add_noise(pack, objective, config, 0).to(device)])

    def step() -> float:
        _synchronize(device)
        start = clock()
        train_step(engine, batch, stage, processes)
        ema.update(always)
        _synchronize(device)
        return clock() - start

    yield step, shapes
    engine.destroy()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_disk(folder: Path) -> tuple[float, float]:
    """Bytes/s of writing a file to the disk and of reading it back, past the operating system's cache."""
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(2**22)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        write = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        read = time.perf_counter() - start
    return _DISK_BYTES / write, _DISK_BYTES / read
