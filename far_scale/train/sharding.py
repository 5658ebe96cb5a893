"""How a run's weights, gradients and optimizer are shared out over its ranks, decided once before the engine starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from far_scale.config.recipe import Recipe
from far_scale.config.schema import DeepSpeedSection
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.train.deepspeed_adapter import can_reduce_once
from far_scale.utils.errors import UserError
from far_scale.utils.hosts import host_name, ranks_by_host

# Up to here a copy of the weights on every node is small beside what a rank holds anyway: the 1.3B preset has 1.37e9.
_MOST_PARAMETERS_FOR_HPZ = 1.4e9

# Bytes a parameter of what training holds: (weights, gradients, optimizer with master weights and EMA).
_BYTES = {"bf16": (2, 4, 16), "fp32": (4, 4, 12)}
# Bytes a parameter of whole gradients during a step: in bf16 the model's, and their float32 sum over the packs.
_WHOLE_GRADIENTS = {"bf16": 6, "fp32": 4}

_KEPT_GATHERED = 10**9
"""DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance."""

_REDUCED_AT_ONCE = 5 * 10**8
"""DeepSpeed's default of reduce_bucket_size."""

_USABLE = 0.9
"""Of the free memory, for what is chosen by an estimate: the rest is for buffers and fragments."""


@dataclass(frozen=True)
class Sharding:
    """What was decided.

    Attributes:
        stage: of ZeRO.
        hpz: ranks that keep a second copy of the weights among them between forward and backward, so that backward
            gathers within them alone; 1 for none.
        offloaded: of "optimizer" and "param" what lies in main memory.
        reduce_once: whether ZeRO-2 or -3 reduces a step's gradients once, not after each pack.
        gathered: the most numbers of gathered weights that ZeRO-3 holds at a time, beside a rank's part of all.
        buckets: bytes of the buffers from which ZeRO reduces gradients; none counted on CPUs.
        why: the decisions in words, lines for the log.
    """

    stage: int
    hpz: int = 1
    offloaded: frozenset[str] = frozenset()
    reduce_once: bool = False
    gathered: int = 0
    buckets: int = 0
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Situation:
    """What the decisions depend on; the same on all ranks.

    Attributes:
        recipe: the run's.
        parameters: of the model.
        hosts: of all ranks, by rank.
        on_gpus: whether the ranks have GPUs.
        free: bytes free on the device of the rank that has least.
        activations: bytes that a rank needs beside its state, when asked.
    """

    recipe: Recipe
    parameters: int
    hosts: Sequence[str]
    on_gpus: bool
    free: float
    activations: Callable[[], float]

    def sharding(self, stage: int, hpz: int = 1, reduce_once: bool = False) -> Sharding:
        """With what the recipe offloads at this stage."""
        section = self.recipe.train.deepspeed or DeepSpeedSection()
        asked = {"optimizer": section.offload_optimizer, "param": section.offload_param}
        offloaded = frozenset(name for name, value in asked.items() if value is not None and stage == 3)
        # DeepSpeed keeps gathered what backward uses again within this distance, so small models stay whole.
        limits = (section.stage3_max_live_parameters, section.stage3_max_reuse_distance)
        kept = min(self.parameters, *(_KEPT_GATHERED if limit is None else limit for limit in limits))
        # Main memory takes only the pages that are written to, which are a part of a small model's gradients.
        buckets = self.bucket_bytes(stage) if self.on_gpus else 0
        return Sharding(stage, hpz, offloaded, reduce_once, kept if stage == 3 else 0, buckets)

    def bucket_bytes(self, stage: int) -> int:
        """Of ZeRO's buffers for gradients, which have reduce_bucket_size numbers however small the model is."""
        section, precision = self.recipe.train.deepspeed or DeepSpeedSection(), self.recipe.train.precision
        if stage == 0 or (stage == 1 and precision == "bf16"):
            return 0  # BF16_Optimizer, of stage 1 in bf16, reduces from where the gradients lie
        reduced_as = precision if stage < 3 else section.communication_data_type or precision
        buffers = 2 if stage < 3 and section.overlap_comm is not False else 1
        numbers = _REDUCED_AT_ONCE if section.reduce_bucket_size is None else section.reduce_bucket_size
        return buffers * numbers * _BYTES[reduced_as][0]

    def need(self, sharding: Sharding) -> float:
        """Bytes that a rank needs on its device."""
        state = state_bytes(self.recipe.train.precision, sharding, self.parameters, len(self.hosts))
        return state + self.activations()

    def fits(self, sharding: Sharding) -> bool:
        return self.need(sharding) <= _USABLE * self.free


def choose_sharding(
    recipe: Recipe, parameters: int, processes: Processes, activations: Callable[[], float]
) -> Sharding:
    """Decide for a run; all ranks call it, and decide the same.

    Args:
        parameters: of the model.
        activations: gives the bytes that a rank needs beside weights, gradients and optimizer; only called where a
            decision depends on memory, and must give the same on all ranks.

    Raises:
        UserError: a key of the train section does not fit the ranks, the device or the installed DeepSpeed.
    """
    section = recipe.train.deepspeed or DeepSpeedSection()
    _check_installation(recipe, section, processes)
    reports = all_gather_objects((host_name(), free_memory(processes)), processes.host_group)
    hosts, free = [host for host, _ in reports], min(bytes_free for _, bytes_free in reports)
    situation = _Situation(recipe, parameters, hosts, processes.device.type == "cuda", free, activations)
    stage, why_stage = _choose_stage(situation)
    if section.reduce_bucket_size is not None and (buffers := situation.bucket_bytes(stage)) > free:
        raise UserError(
            f"train.deepspeed.reduce_bucket_size: {section.reduce_bucket_size:.3g} numbers take {buffers / 1e9:.3g} GB "
            f"on each rank, of which {free / 1e9:.3g} GB are free; lower it"
        )
    hpz, why_hpz = _choose_hpz(section, stage, parameters, hosts)
    once, why_once = _choose_reduction(situation, stage, hpz)
    chosen = situation.sharding(stage, hpz, once)
    on_host = "".join(f", {name} in main memory" for name in sorted(chosen.offloaded))
    return dataclasses.replace(chosen, why=(f"sharding: ZeRO-{stage}{why_stage}{why_hpz}{on_host}", *why_once))


def state_bytes(precision: str, sharding: Sharding, parameters: int, ranks: int) -> float:
    """Weights, gradients, master weights, Adam's moments, EMA and buffers of one rank, but for what is offloaded.

    Args:
        precision: as in train.precision.
    """
    weights, gradients, optimizer = _BYTES[precision]
    stage = sharding.stage
    shares = [
        0 if "param" in sharding.offloaded else weights / (ranks if stage == 3 else 1),
        gradients / (ranks if stage >= 2 else 1),
        0 if "optimizer" in sharding.offloaded else optimizer / (ranks if stage >= 1 else 1),
    ]
    if sharding.hpz > 1:
        shares.append(weights / sharding.hpz)
    if sharding.reduce_once:
        shares.append(_WHOLE_GRADIENTS[precision])
    return parameters * sum(shares) + weights * sharding.gathered + sharding.buckets


def free_memory(processes: Processes) -> float:
    """Bytes free on this rank's device; of main memory a rank's share."""
    if processes.device.type == "cuda":
        return torch.cuda.mem_get_info(processes.device)[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(meminfo["MemAvailable"].split()[0]) * 1024 / processes.world_size


def _check_installation(recipe: Recipe, section: DeepSpeedSection, processes: Processes) -> None:
    quantised = [name for name in ("zero_quantized_weights", "zero_quantized_gradients") if getattr(section, name)]
    if quantised and processes.device.type != "cuda":
        raise UserError(f"train.deepspeed.{quantised[0]}: DeepSpeed quantises on GPUs only; leave it out here")
    if recipe.train.reduce_once is True and not can_reduce_once():
        raise UserError("train.reduce_once: DeepSpeed 0.19.0 cannot; install a newer one, or set it to auto or false")


def _choose_stage(situation: _Situation) -> tuple[int, str]:
    """The stage, and why, to go on behind its name."""
    asked = situation.recipe.train.zero_stage
    if asked != "auto":
        return asked, ""
    # Not 0: stage 1 sends as many bytes, and each rank updates its part of the weights only.
    needs = {stage: situation.need(situation.sharding(stage)) / 1e9 for stage in (1, 2, 3)}
    stage = next((stage for stage in needs if situation.fits(situation.sharding(stage))), 3)
    free = f"{situation.free / 1e9:.3g} GB free"
    if not situation.fits(situation.sharding(stage)):
        return stage, f" (auto: none fits, a rank needs about {needs[stage]:.3g} of {free})"
    lower = "".join(f", ZeRO-{other} {needs[other]:.3g}" for other in needs if other < stage)
    return stage, f" (auto: the lowest that fits, a rank needs about {needs[stage]:.3g} of {free}{lower})"


def _choose_hpz(section: DeepSpeedSection, stage: int, parameters: int, hosts: Sequence[str]) -> tuple[int, str]:
    """The size of hpZ's groups, and why, to go on behind the stage."""
    asked, ranks = section.zero_hpz_partition_size, len(hosts)
    if stage == 3 and ranks == 1:  # as in a dry run on a login node of a recipe that sets a size for its cluster
        return 1, ", no hpZ: one rank"
    if asked != "auto" and ranks % asked:
        raise UserError(
            f"train.deepspeed.zero_hpz_partition_size: {asked} does not divide the {ranks} ranks; set it to a "
            "divisor, such as the ranks of a node, or to auto"
        )
    if stage != 3:
        return 1, ""
    if asked != "auto":
        crossing = any(len(set(hosts[first : first + asked])) > 1 for first in range(0, ranks, asked))
        where = "; its groups cross nodes, and so do backward's gathers" if crossing else ""
        return asked, f", hpZ {asked}: as the recipe sets{where}"
    nodes = ranks_by_host(hosts)
    of_a_node = ranks // len(nodes)
    shape = f"{len(nodes)} nodes of {of_a_node} ranks, {parameters / 1e9:.2g} billion parameters"
    if len(nodes) == 1:
        return 1, ", no hpZ: one node"
    # DeepSpeed makes its groups of consecutive ranks.
    if any(own != list(range(own[0], own[0] + of_a_node)) for own in nodes.values()):
        return 1, f", no hpZ: the {len(nodes)} nodes do not hold equally many consecutive ranks each"
    if of_a_node == 1:
        return 1, f", no hpZ: {len(nodes)} nodes of one rank"
    if parameters > _MOST_PARAMETERS_FOR_HPZ:
        return 1, f", no hpZ: {shape}, more than {_MOST_PARAMETERS_FOR_HPZ / 1e9:g}"
    return of_a_node, f", hpZ {of_a_node}: {shape}"


def _choose_reduction(situation: _Situation, stage: int, hpz: int) -> tuple[bool, tuple[str, ...]]:
    """Whether gradients are reduced once a step, and why; without words where there is nothing to choose."""
    packs = situation.recipe.data.lanes // len(situation.hosts)
    asked, nodes = situation.recipe.train.reduce_once, len(ranks_by_host(situation.hosts))
    if stage < 2 or packs == 1:
        return False, ()  # once anyhow
    once, each = "gradients: reduced once a step", f"gradients: reduced after each of {packs} packs"
    if asked != "auto":
        return asked, (f"{once if asked else each}, as the recipe sets",)
    if nodes == 1:
        return False, (f"{each}: one node",)
    if not can_reduce_once():
        return False, (f"{each}: DeepSpeed 0.19.0 cannot sum them first",)
    with_whole = situation.sharding(stage, hpz, reduce_once=True)
    need = f"a rank needs about {situation.need(with_whole) / 1e9:.3g} of {situation.free / 1e9:.3g} GB free"
    if situation.fits(with_whole):
        return True, (f"{once}, not after each of {packs} packs: {nodes} nodes, and whole gradients fit: {need}",)
    return False, (f"{each}: whole gradients do not fit: {need}",)
