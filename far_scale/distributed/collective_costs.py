"""Prediction of the collectives of a training step from the shapes of a model and the number of ranks and nodes.

The entries equal those that a ledger records (far_scale/distributed/ledger.py) from the third step on, when DeepSpeed
has recorded the order of the modules. P is the number of parameters, n the ranks, and p(n) pads to a multiple of n:

    stage 0     gradients: all-reduce of P, once per step
    stage 1, 2  gradients: all-reduce of P (stage 1 in bf16: p(2 n) of P), once per step in stage 1, with each pack in 2
                weights, after the update: all-gather of p(2 n) of P
    stage 3     gradients: reduce-scatter of the sum of each parameter's p(n), with each pack
                weights: all-gathers in forward and backward, see gathers.py; after the update, one for each unsharded
                parameter

Stages 2 and 3 reduce once per step if the packs' gradients are summed first. Collectives are split into buckets. The
norm of the gradient (stages 1 to 3), the step guard, the consensus on stopping, and the number of clips (if it differs
between packs) take a few bytes each. EMA, activation checkpointing (it recomputes a block while its weights are
gathered) and compilation send nothing. With sequence parallelism every block exchanges tokens by all-to-alls, see
`exchanges` in sequence_parallel.py.

Not covered: quantised collectives (ZeRO++), and checkpoints, validation and log lines, which are not in every step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from far_scale.distributed.gathers import Gather, GatherRules, ModuleNode, pack_gathers
from far_scale.distributed.ledger import Entry, Key
from far_scale.model import FAR

_CALL_ORDER = (
    "timestep_embedding", "condition_embedding", "context_patch_embedding", "patch_embedding", "blocks", "output",
)  # fmt: skip
"""The children of FAR in the order of its forward pass."""

_DTYPE_READS = {"": "patch_embedding.weight", "timestep_embedding": "timestep_embedding.up.weight"}
"""Weights of a child that a module reads itself, for their dtype."""


@dataclass(frozen=True)
class ModelShapes:
    """The sizes and the module tree of a model.

    Attributes:
        sizes: elements of each parameter, in the model's order.
        root: the module tree.
    """

    sizes: tuple[int, ...]
    root: ModuleNode

    @staticmethod
    def from_model(model: FAR) -> ModelShapes:
        """Of a model that is not sharded, also on the meta device. Its blocks are leaf modules."""
        indices = {name: number for number, (name, _) in enumerate(model.named_parameters())}

        def node(name: str, module: nn.Module) -> ModuleNode:
            prefix = f"{name}." if name else ""
            if name.startswith("blocks."):
                return ModuleNode(tuple(i for key, i in indices.items() if key.startswith(prefix)), is_leaf=True)
            numbers = [indices[prefix + key] for key, _ in module.named_parameters(recurse=False)]
            numbers += [indices[_DTYPE_READS[name]]] if name in _DTYPE_READS else []
            modules = dict(module.named_children())
            called = [key for key in _CALL_ORDER if modules.get(key) is not None] if not name else list(modules)
            children: list[ModuleNode] = []
            for key in called:
                if key == "blocks":
                    children += [node(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
                else:
                    children.append(node(prefix + key, modules[key]))
            return ModuleNode(tuple(numbers), tuple(children))

        return ModelShapes(tuple(parameter.numel() for parameter in model.parameters()), node("", model))


@dataclass(frozen=True, kw_only=True)
class ParallelSetup:
    """How a model is trained.

    Attributes:
        ranks, nodes: the ranks are numbered node by node, equally many on each.
        stage: ZeRO stage.
        number_bytes: bytes of a weight in the model's precision: 4 or 2.
        gradient_bytes: bytes of a gradient element in reductions.
        packs: per rank and step.
        reduces_once: whether gradients are reduced once per step, not with each pack.
        hpz: ranks of an hpZ group; 1 for none.
        whole_below: parameters of up to this many elements are unsharded (stage 3).
        reduce_bucket: elements reduced at a time.
        sub_group: elements of a rank's shard that the optimizer updates at a time, each with its own norm (stage 3).
        prefetch_bucket, reuse_distance, live: see `GatherRules`.
        counts_clips: whether packs differ in their number of clips, which the ranks then add up.
        sequence_parallel: ranks that share a pack.
        exchanges: all-to-alls of a pack among these: the phase, and the elements of the largest tensor.
    """

    ranks: int
    nodes: int
    stage: int
    number_bytes: int
    gradient_bytes: int
    packs: int = 1
    reduces_once: bool = False
    hpz: int = 1
    whole_below: int = 100_000
    reduce_bucket: int = 500_000_000
    sub_group: int = 1_000_000_000
    prefetch_bucket: int = 50_000_000
    reuse_distance: int = 1_000_000_000
    live: int = 1_000_000_000
    counts_clips: bool = False
    sequence_parallel: int = 1
    exchanges: tuple[tuple[str, int], ...] = ()


def step_collectives(shapes: ModelShapes, setup: ParallelSetup) -> list[Entry]:
    """The collectives of a step, for one rank; none for a single process."""
    if setup.ranks == 1:
        return []
    total, ranks = sum(shapes.sizes), setup.ranks
    messages: list[tuple[Key, int]] = []  # the key and the message bytes of each collective

    def add(phase: str, operation: str, sizes: Iterable[int], group: int = ranks) -> None:
        key = Key(phase, operation, group, math.ceil(group * setup.nodes / ranks))
        messages.extend((key, size) for size in sizes)

    if setup.counts_clips:
        add("clips", "all-reduce", [4])
    padded = [_pad(size, ranks) for size in shapes.sizes]
    if setup.stage == 3:
        persistent = frozenset(number for number, size in enumerate(shapes.sizes) if size <= setup.whole_below)
        for gather in _step_gathers(shapes, setup, persistent):
            size = setup.number_bytes * sum(padded[number] for number in gather.parameters)
            add(gather.phase, "all-gather", [size], setup.hpz if gather.secondary else ranks)
    for phase, elements in setup.exchanges * setup.packs:
        add(phase, "all-to-all", [setup.number_bytes * elements], setup.sequence_parallel)
    operation, gradients = ("reduce-scatter", padded) if setup.stage == 3 else ("all-reduce", shapes.sizes)
    if setup.stage == 1 and setup.number_bytes == 2:
        buckets = [_pad(total, 2 * ranks)]  # DeepSpeed's bf16 optimizer reduces all gradients in one message
    else:
        buckets = _buckets(shapes.sizes, gradients, setup.reduce_bucket)
    once = setup.reduces_once or setup.stage < 2
    add("backward", operation, [setup.gradient_bytes * bucket for bucket in buckets] * (1 if once else setup.packs))
    if setup.stage > 0:
        add("norm", "all-reduce", [4] * (_sub_groups(padded, setup) if setup.stage == 3 else 1))
    add("guard", "all-reduce", [8])
    if setup.stage == 3:
        add("update", "all-gather", [setup.number_bytes * padded[number] for number in sorted(persistent)])
    elif setup.stage > 0:
        add("update", "all-gather", [setup.number_bytes * _pad(total, 2 * ranks)])
    add("vote", "all-reduce", [32])
    calls, sizes = Counter(key for key, _ in messages), Counter[Key]()
    for key, size in messages:
        sizes[key] += size
    return [Entry(key, calls[key], sizes[key]) for key in calls]


def _step_gathers(shapes: ModelShapes, setup: ParallelSetup, persistent: frozenset[int]) -> list[Gather]:
    rules = GatherRules(setup.prefetch_bucket, setup.reuse_distance, setup.live)
    first, later = (
        pack_gathers(shapes.root, shapes.sizes, persistent, rules, setup.hpz > 1, first) for first in (True, False)
    )
    return first + later * (setup.packs - 1)


def _buckets(sizes: Sequence[int], messages: Sequence[int], limit: int) -> list[int]:
    """Elements of each reduction: gradients come from the last parameter to the first and fill buckets of `limit`."""
    buckets, filled = [0], 0
    for size, message in zip(reversed(sizes), reversed(messages), strict=True):
        if filled and filled + size > limit:
            buckets.append(0)
            filled = 0
        filled += size
        buckets[-1] += message
    return buckets


def _sub_groups(padded: Sequence[int], setup: ParallelSetup) -> int:
    """Number of stage 3's parameter groups; a group is full when it has `sub_group` elements of a rank's shard."""
    groups, filled = 1, 0
    for size in padded:
        if filled >= setup.sub_group:
            groups, filled = groups + 1, 0
        filled += size // setup.ranks
    return groups


def _pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
