"""What a run opens before its first step: data, start weights, engine, monitor and batches, from the recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from far_scale.config.recipe import Recipe
from far_scale.config.schema import ObjectiveSection, TrainSection
from far_scale.data.loader.mixture import Mixture, MixtureManifest
from far_scale.data.loader.pack_loader import PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes, all_gather_objects, set_timeouts
from far_scale.distributed.sequence_parallel import SequenceGroup
from far_scale.health.straggler import StragglerDetector
from far_scale.model import FAR
from far_scale.model.attention import choose_kernel, flex
from far_scale.model.layers import HEAD_DIM
from far_scale.train.checkpoint import read_state, step_folder
from far_scale.train.collectives import step_entries, unknown_key
from far_scale.train.costs import peak_flops
from far_scale.train.curriculum import Stage
from far_scale.train.deepspeed_adapter import whole_shape
from far_scale.train.device_prefetch import DevicePrefetch
from far_scale.train.engine import compute_dtype, start_engine
from far_scale.train.held_out import HeldOut, ValidationVideos, open_held_out
from far_scale.train.metrics import Monitor
from far_scale.train.planner.forecast import Forecast
from far_scale.train.planner.memory import Counts, activation_bytes
from far_scale.train.planner.profile import FOLDER, Settings, newest_profile, short_name
from far_scale.train.planner.shapes import draw_stages
from far_scale.train.resume_lanes import LaneStates
from far_scale.train.shard_sets import open_sets
from far_scale.train.sharding import USABLE_FRACTION, Sharding, choose_sharding, free_memory, state_bytes
from far_scale.train.start_weights import start_from, start_scaling
from far_scale.train.wandb_run import WandbRun
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.event_log import EventLog

OpenVideos = Callable[[Recipe, ShardSet, Stage, LatentScaling, torch.dtype, Processes, EventLog], ValidationVideos]
"""Opens the sampler of validation videos. An argument of `train`, since sampling and evaluation import the training
code, not the reverse."""


class RunData(NamedTuple):
    """The data of a run.

    Attributes:
        shard_sets: those of the remaining stages, by the stage's index.
        manifest: of data.shards; its autoencoder and scaling hold for all stages.
        scaling: scaling of the latents.
        held_out: for validation, or None.
    """

    shard_sets: dict[int, ShardSet | Mixture]
    manifest: Manifest | MixtureManifest
    scaling: LatentScaling
    held_out: HeldOut | None


def open_data(
    recipe: Recipe,
    plan: Sequence[Stage],
    start: int,
    processes: Processes,
    events: EventLog,
    open_videos: OpenVideos,
) -> RunData:
    """Open and check the data of the stages that remain after `start` steps; every rank calls it."""
    remaining = [stage for stage in plan if stage.end > start]
    shard_sets, manifest = open_sets(recipe.data, remaining, processes, events, start)
    scaling, dtype = find_scaling(recipe, manifest, start), compute_dtype(recipe.train)
    held_out = open_held_out(
        recipe.validation,
        recipe.held_out_shards(),
        recipe.objective,
        recipe.data,
        recipe.seed,
        [stage for stage in plan if stage.end >= start],  # the validation of a stage that has just ended may be missing
        manifest,
        scaling,
        processes,
        events,
        start,
        lambda shards: open_videos(recipe, shards, plan[-1], scaling, dtype, processes, events),
    )
    return RunData(shard_sets, manifest, scaling, held_out)


def find_scaling(recipe: Recipe, manifest: Manifest | MixtureManifest, step: int) -> LatentScaling:
    """The scaling of the run's latents (`data.scaling`).

    Args:
        manifest: of data.shards.
        step: of the checkpoint that the run resumes from, which has the scaling of a model that may be gone; or 0.

    Raises:
        UserError: `data.scaling` is "start", and train.start_from is not a model directory or has no scaling.
    """
    if recipe.data.scaling != "start":
        return LatentScaling.of(manifest, recipe.data.scaling)
    if step > 0:
        return LatentScaling.from_dict(read_state(step_folder(Path(recipe.run_dir), step))["scaling"])
    return start_scaling(str(recipe.train.start_from))


def load_start(model: FAR, recipe: Recipe, data: RunData, accept_changes: bool) -> str:
    """Load the weights of train.start_from into `model`; returns a line for the log."""
    manifest = data.shard_sets[min(data.shard_sets)].manifest
    folder = str(recipe.train.start_from)
    return start_from(model, folder, manifest, data.scaling, recipe.data.frame_stride, accept_changes)


def shard_model(
    model: FAR, recipe: Recipe, plan: Sequence[Stage], data: RunData, processes: Processes
) -> tuple[Any, Sharding]:
    """The engine around `model`, and how it is sharded; `plan` has the remaining stages.

    Raises:
        UserError: a rank's state does not fit into its memory.
    """
    train, device = recipe.train, processes.device
    packs_per_step = recipe.data.lanes * train.sequence_parallel // processes.world_size
    sizes = [parameter.numel() for parameter in model.parameters()]

    shapes = draw_stages(plan, data.shard_sets, recipe.seed)
    counts, is_flex = [Counts.of(stage.largest, train.sequence_parallel) for stage in shapes], uses_flex(train, device)
    most = max(activation_bytes(model.config, train, each, is_flex, packs_per_step).total for each in counts)
    sharding = choose_sharding(train, recipe.data.lanes, sizes, processes, lambda: most)
    check_memory(train, sizes, sharding, processes, most, packs_per_step)
    engine = start_engine(model, recipe.optimizer, train, packs_per_step, processes, sharding)
    set_timeouts(processes)  # of DeepSpeed's groups
    return engine, sharding


def check_memory(
    train: TrainSection,
    sizes: Sequence[int],
    sharding: Sharding,
    processes: Processes,
    activations: int,
    packs_per_step: int,
) -> None:
    """Check that every rank has the memory, and warn where it has it for the state, but probably not for all else.

    Args:
        train: the recipe's section.
        sizes: elements of each of the model's parameters.
        sharding: of the run.
        processes: the run's; every rank calls it.
        activations: bytes of the largest pack, as an estimate.
        packs_per_step: packs of each rank.

    Raises:
        UserError: on all ranks alike: weights, optimizer and EMA, whose bytes are exact, do not fit.
    """
    state = state_bytes(train.precision, sharding, sizes, processes.world_size, train.whole_below, packs_per_step)
    need, have = state.resident, min(all_gather_objects(free_memory(processes), processes.host_group))
    if need > have:
        raise UserError(
            f"weights, optimizer and EMA: a rank needs {need / 1e9:.1f} GB and has {have / 1e9:.1f} GB free; use more "
            "ranks, a higher train.zero_stage, or a smaller model (far-scale plan finds what fits)"
        )
    estimate = state.peak(activations)
    if estimate > USABLE_FRACTION * have and processes.is_main_process:
        print_warning(
            f"a rank needs about {estimate / 1e9:.1f} GB and has {have / 1e9:.1f} GB free; it may run out of memory: "
            "use more ranks, a higher train.zero_stage, train.activation_checkpointing=full, or a lower "
            "data.clips_per_pack or data.tokens_per_pack (far-scale plan finds the cheapest)"
        )


def uses_flex(train: TrainSection, device: torch.device) -> bool:
    """Whether attention is FlexAttention on this device."""
    return choose_kernel(train.attention, device, compute_dtype(train), HEAD_DIM).name == flex.NAME


def open_forecast(
    recipe: Recipe, model: FAR, sharding: Sharding, hosts: Sequence[str], processes: Processes, events: EventLog
) -> Forecast:
    """What compares the first steps of this start with what is predicted for them.

    Args:
        model: the engine's, sharded or not.
        hosts: of all ranks, by rank.
    """
    train, ranks = recipe.train, processes.world_size
    kernel = choose_kernel(train.attention, processes.device, compute_dtype(train), HEAD_DIM).name
    device = "cpu" if processes.device.type == "cpu" else short_name(torch.cuda.get_device_name(processes.device))
    profile = None
    if processes.is_main_process:
        try:
            settings = Settings(train.precision, train.compile, kernel, sharding.stage)
            profile, _ = newest_profile(FOLDER, device, settings)
        except UserError as problem:  # training does not need it
            print_warning(str(problem))
    known = ranks > 1 and profile is not None and unknown_key(recipe) is None
    traffic = step_entries(recipe, sharding, ranks, len(set(hosts))) if known else []
    sizes = [whole_shape(parameter).numel() for parameter in model.parameters()]
    is_flex = kernel == flex.NAME
    return Forecast(model.config, train, sharding, sizes, is_flex, traffic, profile, processes, events)


def open_monitor(
    recipe: Recipe, processes: Processes, dtype: torch.dtype, start: int, identity: str, stragglers: StragglerDetector
) -> Monitor:
    run = Path(recipe.run_dir)
    return Monitor(
        run,
        recipe.log,
        recipe.train,
        len(recipe.curriculum),
        processes,
        peak_flops(processes.device, dtype),
        start,
        lambda: WandbRun(recipe.log.wandb, recipe.name, recipe.model_dump(mode="json"), identity, run),
        stragglers,
    )


@contextlib.contextmanager
def prefetched_batches(
    stage: Stage,
    shard_set: ShardSet | Mixture,
    scaling: LatentScaling,
    packing: PackingConfig,
    first: int,
    lanes: LaneStates | None,
    objective: ObjectiveSection,
    processes: Processes,
    sequence: SequenceGroup,
    kernel: str,
) -> Iterator[DevicePrefetch]:
    """This rank's batches of a stage from step `first` (from 0) on, on the device.

    Args:
        kernel: name of the attention kernel.
        lanes: the lanes' states, or None where they begin.
    """
    rank_lanes = sequence.lanes(stage.data.lanes)
    ahead, device = (stage.data.prefetch, stage.data.prefetch_bytes), processes.device
    with (
        PackLoader(shard_set, scaling, rank_lanes, packing, first, lanes, *ahead) as packs,
        DevicePrefetch(packs, objective, stage.config, packing.seed, device, kernel, sequence.shard) as batches,
        contextlib.closing(packs),  # before DevicePrefetch, which may be waiting for it
    ):
        yield batches
