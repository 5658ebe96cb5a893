"""How weights, gradients and optimizer state are sharded over the ranks, decided once before the engine starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from far_scale.config.schema import DeepSpeedSection, TrainSection
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.train.deepspeed_adapter import can_reduce_once
from far_scale.utils.errors import UserError
from far_scale.utils.hosts import host_name, ranks_by_host

# Up to here a copy of the weights on every node is small beside the rest of a rank's state: the 1.3B preset has 1.37e9.
_MAX_PARAMETERS_FOR_HPZ = 1.4e9

_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
_MOMENT_BYTES = 8
"""Of Adam's two float32 moments, for each parameter."""
_FLOAT_BYTES = 4
# Bytes per parameter of unsharded gradients during a step: in bf16 the model's, and their float32 sum over the packs.
_WHOLE_GRADIENTS = {"bf16": 6, "fp32": 4}

_DEFAULT_MAX_GATHERED = 10**9
"""DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance."""

_DEFAULT_REDUCE_BUCKET = 5 * 10**8
"""DeepSpeed's default of reduce_bucket_size."""

USABLE_FRACTION = 0.9
"""Fraction of the free memory that an estimate may fill: the rest is for buffers and fragmentation."""


@dataclass(frozen=True)
class Sharding:
    """How a run is sharded.

    Attributes:
        stage: of ZeRO.
        hpz: group size of hpZ: the ranks of a group keep a second copy of the weights between forward and backward, so
            that backward gathers within the group; 1 for none.
        offloaded: "optimizer" and "param", if they are in main memory.
        reduce_once: whether ZeRO-2 or -3 reduces a step's gradients once, not after each pack.
        gathered: maximum number of gathered weights that ZeRO-3 holds at a time, beside a rank's own part.
        bucket_bytes: of the buffers from which ZeRO reduces gradients; 0 on CPUs.
        why: the decisions and their reasons, lines for the log.
    """

    stage: int
    hpz: int = 1
    offloaded: frozenset[str] = frozenset()
    reduce_once: bool = False
    gathered: int = 0
    bucket_bytes: int = 0
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank's state on its device, without what is offloaded.

    Attributes:
        weights: in the model's precision, with hpZ's copy.
        gradients: that are allocated in a forward pass, as in every step or from an earlier pack of the step.
        optimizer: float32 master weights and Adam's moments.
        ema: the average.
        gathered: maximum of the weights that ZeRO-3 holds gathered.
        buckets: ZeRO's gradient buffers.
        update: further gradients when Adam steps.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    buckets: int
    update: int

    @property
    def resident(self) -> int:
        """Bytes that are allocated from step to step, whatever the packs."""
        return self.weights + self.optimizer + self.ema

    def peak(self, activations: int) -> int:
        """Bytes at most, with those of `activations`, which are freed when Adam steps, as are gathered weights."""
        return self.resident + self.gradients + self.buckets + max(self.gathered + activations, self.update)


@dataclass(frozen=True)
class _Inputs:
    """What the decisions depend on; the same on all ranks.

    Attributes:
        train: the recipe's section.
        lanes: of the recipe.
        sizes: elements of each of the model's parameters.
        hosts: of all ranks, by rank.
        on_gpus: whether the ranks have GPUs.
        free: the minimum over the ranks of the free bytes on the device.
        activations: returns the bytes that a rank needs beside its state.
    """

    train: TrainSection
    lanes: int
    sizes: Sequence[int]
    hosts: Sequence[str]
    on_gpus: bool
    free: float
    activations: Callable[[], int]

    def sharding(self, stage: int, hpz: int = 1, reduce_once: bool = False) -> Sharding:
        """A candidate, with the memory it takes."""
        section = self.train.deepspeed or DeepSpeedSection()
        offload = {"optimizer": section.offload_optimizer, "param": section.offload_param}
        offloaded = frozenset(name for name, value in offload.items() if value is not None and stage == 3)
        # DeepSpeed keeps weights gathered that backward reuses within this distance, so small models stay whole.
        limits = (section.stage3_max_live_parameters, section.stage3_max_reuse_distance)
        gathered = min(sum(self.sizes), *(_DEFAULT_MAX_GATHERED if limit is None else limit for limit in limits))
        # In main memory only the pages that are written to count: for a small model a fraction of the buffer.
        bucket_bytes = self.bucket_bytes(stage) if self.on_gpus else 0
        return Sharding(stage, hpz, offloaded, reduce_once, gathered if stage == 3 else 0, bucket_bytes)

    def bucket_bytes(self, stage: int) -> int:
        """Bytes of ZeRO's gradient buffers, which have reduce_bucket_size elements however small the model is."""
        section, precision = self.train.deepspeed or DeepSpeedSection(), self.train.precision
        if stage == 0 or (stage == 1 and precision == "bf16"):
            return 0  # BF16_Optimizer (stage 1 in bf16) reduces gradients in place
        reduce_dtype = precision if stage < 3 else section.communication_data_type or precision
        buffers = 2 if stage < 3 and section.overlap_comm is not False else 1
        elements = _DEFAULT_REDUCE_BUCKET if section.reduce_bucket_size is None else section.reduce_bucket_size
        return buffers * elements * _WEIGHT_BYTES[reduce_dtype]

    @property
    def packs(self) -> int:
        """Packs of a rank in a step."""
        return self.lanes * self.train.sequence_parallel // len(self.hosts)

    def needed_bytes(self, sharding: Sharding) -> float:
        """Bytes that a rank needs on its device."""
        train, ranks = self.train, len(self.hosts)
        state = state_bytes(train.precision, sharding, self.sizes, ranks, train.whole_below, self.packs)
        return state.peak(self.activations())

    def fits(self, sharding: Sharding) -> bool:
        return self.needed_bytes(sharding) <= USABLE_FRACTION * self.free


def choose_sharding(
    train: TrainSection, lanes: int, sizes: Sequence[int], processes: Processes, activations: Callable[[], int]
) -> Sharding:
    """Decide how a run is sharded; all ranks call it and decide the same.

    Args:
        train: the recipe's section.
        lanes: of the recipe.
        sizes: elements of each of the model's parameters.
        processes: the run's.
        activations: returns the bytes that a rank needs beside weights, gradients and optimizer, the same on all ranks;
            only called where a decision depends on memory.

    Raises:
        UserError: a key of the train section does not fit the ranks, the device or the installed DeepSpeed.
    """
    on_gpus = processes.device.type == "cuda"
    _check_installation(train, on_gpus)
    reports = all_gather_objects((host_name(), free_memory(processes)), processes.host_group)
    hosts, free = [host for host, _ in reports], min(bytes_free for _, bytes_free in reports)
    return sharding_on(train, lanes, sizes, hosts, free, on_gpus, activations)


def sharding_on(
    train: TrainSection,
    lanes: int,
    sizes: Sequence[int],
    hosts: Sequence[str],
    free: float,
    on_gpus: bool,
    activations: Callable[[], int],
) -> Sharding:
    """`choose_sharding` for ranks that need not exist.

    Args:
        hosts: of all ranks, by rank.
        free: the minimum over the ranks of the free bytes on the device.
        on_gpus: whether the ranks have GPUs.
    """
    section = train.deepspeed or DeepSpeedSection()
    inputs = _Inputs(train, lanes, sizes, hosts, on_gpus, free, activations)
    stage, why_stage = _choose_stage(inputs)
    if section.reduce_bucket_size is not None and (needed := inputs.bucket_bytes(stage)) > free:
        raise UserError(
            f"train.deepspeed.reduce_bucket_size: {section.reduce_bucket_size:.3g} numbers take {needed / 1e9:.3g} GB "
            f"on each rank, and {free / 1e9:.3g} GB are free; lower it"
        )
    hpz, why_hpz = _choose_hpz(section, stage, sum(sizes), hosts)
    reduce_once, why_reduction = _choose_reduction(inputs, stage, hpz)
    chosen = inputs.sharding(stage, hpz, reduce_once)
    offloaded = "".join(f", {name} in main memory" for name in sorted(chosen.offloaded))
    return dataclasses.replace(chosen, why=(f"sharding: ZeRO-{stage}{why_stage}{why_hpz}{offloaded}", *why_reduction))


def state_bytes(
    precision: str, sharding: Sharding, sizes: Sequence[int], ranks: int, whole_below: int = 0, packs: int = 1
) -> StateBytes:
    """What a rank's state takes, as DeepSpeed allocates and pads it.

    Stages 1 and 2 cut the concatenated parameters, padded to a multiple of 2 x `ranks`, into equal parts; stage 3 cuts
    each parameter. From stage 1 on the masters are a copy, also in float32.

    Args:
        precision: as in train.precision.
        sizes: elements of each of the model's parameters.
        ranks: number of ranks.
        whole_below: as in train.whole_below.
        packs: of a rank in a step.
    """
    weight_bytes, stage = _WEIGHT_BYTES[precision], sharding.stage
    total = sum(sizes)
    whole = total if stage == 0 else _padded(total, 2 * ranks)  # as stages 1 and 2 hold the weights
    part = {0: total, 3: sum(_padded(size, ranks) // ranks for size in sizes)}.get(stage, whole // ranks)
    weights = weight_bytes * (part if stage == 3 else whole)
    gathered = 0
    if stage == 3 and ranks > 1:  # a single rank's gathered weights are its own
        kept = sum(_padded(size, ranks) for size in sizes if size <= whole_below)
        weights += weight_bytes * kept
        gathered = weight_bytes * min(sharding.gathered, sum(_padded(size, ranks) for size in sizes) - kept)
    if "param" in sharding.offloaded:
        weights -= weight_bytes * part
    if sharding.hpz > 1:
        weights += weight_bytes * total // sharding.hpz
    gradients, update = _gradient_bytes(precision, stage, total, whole, part, packs)
    if sharding.reduce_once:
        gradients += _WHOLE_GRADIENTS[precision] * total
    masters = 0 if stage == 0 and precision == "fp32" else _FLOAT_BYTES
    optimizer, ema = (masters + _MOMENT_BYTES) * part, _FLOAT_BYTES * part
    if "optimizer" in sharding.offloaded:
        optimizer, ema = 0, 0
    return StateBytes(weights, gradients, optimizer, ema, gathered, sharding.bucket_bytes, update)


def _gradient_bytes(precision: str, stage: int, total: int, whole: int, part: int, packs: int) -> tuple[int, int]:
    """Bytes of gradients in a forward pass, and further ones when Adam steps, of DeepSpeed's optimizer wrappers.

    Args:
        total: parameters.
        whole, part: the same, padded, and of a rank.
    """
    if stage == 3:  # summed in one buffer, where Adam reads them
        return _FLOAT_BYTES * part, 0
    if stage == 1 and precision == "bf16":  # as PackGradients, reduced in bf16; the model's own end with backward
        own, reduced = _WEIGHT_BYTES[precision] * total, _WEIGHT_BYTES[precision] * whole
        if packs == 1:
            return reduced, max(own, _FLOAT_BYTES * part)
        return _FLOAT_BYTES * whole + reduced, own
    if stage == 0:
        own = _WEIGHT_BYTES[precision] * total
        stepped = own + (_FLOAT_BYTES * total if precision == "bf16" else 0)
    else:
        own = stepped = _FLOAT_BYTES * (whole if stage == 1 else part)
    kept = own if packs > 1 else 0  # from an earlier pack
    return kept, stepped - kept


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def free_memory(processes: Processes) -> float:
    """Free bytes on this rank's device; on CPUs, of main memory divided by the ranks."""
    if processes.device.type == "cuda":
        return torch.cuda.mem_get_info(processes.device)[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(meminfo["MemAvailable"].split()[0]) * 1024 / processes.world_size


def _check_installation(train: TrainSection, on_gpus: bool) -> None:
    section = train.deepspeed or DeepSpeedSection()
    quantised = [name for name in ("zero_quantized_weights", "zero_quantized_gradients") if getattr(section, name)]
    if quantised and not on_gpus:
        raise UserError(f"train.deepspeed.{quantised[0]}: DeepSpeed quantises on GPUs only; leave it out here")
    if train.reduce_once is True and not can_reduce_once():
        raise UserError("train.reduce_once: DeepSpeed 0.19.0 cannot; install a newer one, or set it to auto or false")


def _choose_stage(inputs: _Inputs) -> tuple[int, str]:
    """The stage, and the reason as text that follows its name."""
    requested = inputs.train.zero_stage
    if requested != "auto":
        return requested, ""
    # Not 0: stage 1 sends as many bytes, and each rank updates only its part of the weights.
    needs = {stage: inputs.needed_bytes(inputs.sharding(stage)) / 1e9 for stage in (1, 2, 3)}
    stage = next((stage for stage in needs if inputs.fits(inputs.sharding(stage))), 3)
    free = f"{inputs.free / 1e9:.3g} GB free"
    if not inputs.fits(inputs.sharding(stage)):
        return stage, f" (auto: none fits, a rank needs about {needs[stage]:.3g} of {free})"
    lower = "".join(f", ZeRO-{other} {needs[other]:.3g}" for other in needs if other < stage)
    return stage, f" (auto: the lowest that fits, a rank needs about {needs[stage]:.3g} of {free}{lower})"


def _choose_hpz(section: DeepSpeedSection, stage: int, parameters: int, hosts: Sequence[str]) -> tuple[int, str]:
    """The size of hpZ's groups, and the reason as text that follows the stage."""
    requested, ranks = section.zero_hpz_partition_size, len(hosts)
    if stage == 3 and ranks == 1:  # as in a dry run on a login node of a recipe that sets a size for its cluster
        return 1, ", no hpZ: one rank"
    if requested != "auto" and ranks % requested:
        raise UserError(
            f"train.deepspeed.zero_hpz_partition_size: {requested} does not divide the {ranks} ranks; set it to a "
            "divisor, such as the ranks of a node, or to auto"
        )
    if stage != 3:
        return 1, ""
    if requested != "auto":
        crosses_nodes = any(len(set(hosts[first : first + requested])) > 1 for first in range(0, ranks, requested))
        warning = "; its groups cross nodes, and so do backward's gathers" if crosses_nodes else ""
        return requested, f", hpZ {requested}: as the recipe sets{warning}"
    nodes = ranks_by_host(hosts)
    ranks_per_node = ranks // len(nodes)
    shape = f"{len(nodes)} nodes of {ranks_per_node} ranks, {parameters / 1e9:.2g} billion parameters"
    if len(nodes) == 1:
        return 1, ", no hpZ: one node"
    # DeepSpeed makes its groups of consecutive ranks.
    if any(on_node != list(range(on_node[0], on_node[0] + ranks_per_node)) for on_node in nodes.values()):
        return 1, f", no hpZ: the {len(nodes)} nodes do not hold equally many consecutive ranks each"
    if ranks_per_node == 1:
        return 1, f", no hpZ: {len(nodes)} nodes of one rank"
    if parameters > _MAX_PARAMETERS_FOR_HPZ:
        return 1, f", no hpZ: {shape}, more than {_MAX_PARAMETERS_FOR_HPZ / 1e9:g}"
    return ranks_per_node, f", hpZ {ranks_per_node}: {shape}"


def _choose_reduction(inputs: _Inputs, stage: int, hpz: int) -> tuple[bool, tuple[str, ...]]:
    """Whether gradients are reduced once per step, and the reason; without one where there is no choice."""
    packs = inputs.packs
    requested, nodes = inputs.train.reduce_once, len(ranks_by_host(inputs.hosts))
    if stage < 2 or packs == 1:
        return False, ()  # reduced once anyway
    once, per_pack = "gradients: reduced once per step", f"gradients: reduced after each of {packs} packs"
    if requested != "auto":
        return requested, (f"{once if requested else per_pack}, as the recipe sets",)
    if nodes == 1:
        return False, (f"{per_pack}: one node",)
    if not can_reduce_once():
        return False, (f"{per_pack}: DeepSpeed 0.19.0 cannot sum them first",)
    candidate = inputs.sharding(stage, hpz, reduce_once=True)
    need = f"a rank needs about {inputs.needed_bytes(candidate) / 1e9:.3g} of {inputs.free / 1e9:.3g} GB free"
    if inputs.fits(candidate):
        return True, (f"{once}, not after each of {packs} packs: {nodes} nodes, and whole gradients fit: {need}",)
    return False, (f"{per_pack}: whole gradients do not fit: {need}",)
