"""What a training step sends: the collectives of a model's shapes on a number of ranks and nodes, before it is run.

The entries are those that a ledger has of the same step (far_scale/distributed/ledger.py), from the third step on, when
DeepSpeed knows the order of the modules. P is the sum of the parameters, n the ranks, and p(n) pads to a multiple of n:

    stage 0     gradients: all-reduce of P, once a step
    stage 1, 2  gradients: all-reduce of P (stage 1 in bf16: p(2 n) of P), once a step in stage 1, with each pack in 2
                weights, after the update: all-gather of p(2 n) of P
    stage 3     gradients: reduce-scatter of the sum of each parameter's p(n), with each pack
                weights: all-gathers in forward and backward, see gathers.py; after the update, one for each parameter
                that is whole on every rank

Stages 2 and 3 reduce once a step where the packs' gradients are summed up first. Each group of collectives is split by
buckets. The norm of the gradient (stages 1 to 3), the guard's verdict, the vote on stopping, and, where packs differ in
clips, their number take a few bytes each. The EMA, the activations' checkpointing (it recomputes a block while its
weights are there) and compiling take none.

Not covered: quantised collectives (ZeRO++), and checkpoints, validation and log lines, which are not of every step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from far_scale.distributed.gathers import Gather, GatherRules, Part, pack_gathers
from far_scale.distributed.ledger import Entry, Key
from far_scale.model import FAR

_CALLED = (
    "timestep_embedding", "condition_embedding", "context_patch_embedding", "patch_embedding", "blocks", "output",
)  # fmt: skip
"""The parts of FAR in the order in which its forward pass calls them."""

_READ = {"": "patch_embedding.weight", "timestep_embedding": "timestep_embedding.up.weight"}
"""Weights that a module reads of a part itself, for their dtype."""


@dataclass(frozen=True)
class Shapes:
    """What the collectives depend on in a model.

    Attributes:
        sizes: numbers in each parameter, in the model's order.
        root: its modules.
    """

    sizes: tuple[int, ...]
    root: Part

    @staticmethod
    def of(model: FAR) -> Shapes:
        """Of a model that is not sharded yet; it may be on the meta device. Its blocks are gathered in one go."""
        numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}

        def part(name: str, module: nn.Module) -> Part:
            prefix = f"{name}." if name else ""
            if name.startswith("blocks."):
                return Part(tuple(n for each, n in numbers.items() if each.startswith(prefix)), whole=True)
            own = [numbers[prefix + each] for each, _ in module.named_parameters(recurse=False)]
            own += [numbers[_READ[name]]] if name in _READ else []
            children = dict(module.named_children())
            called = [each for each in _CALLED if children.get(each) is not None] if not name else list(children)
            parts: list[Part] = []
            for each in called:
                if each == "blocks":
                    parts += [part(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
                else:
                    parts.append(part(prefix + each, children[each]))
            return Part(tuple(own), tuple(parts))

        return Shapes(tuple(parameter.numel() for parameter in model.parameters()), part("", model))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained.

    Attributes:
        ranks, nodes: the ranks are numbered node by node, with as many on each.
        stage: of ZeRO.
        number_bytes: of a weight, as the model computes with it: 4 or 2.
        gradient_bytes: of a gradient, as it is reduced.
        packs: that a rank goes through in a step.
        reduces_once: whether gradients are reduced once a step, rather than with each pack.
        hpz: ranks of an hpZ group; 1 for none.
        whole_below: parameters of up to so many numbers are whole on every rank (stage 3).
        reduce_bucket: numbers that are reduced at a time.
        sub_group: numbers of a rank's part that the optimizer steps at a time, each with a norm of its own (stage 3).
        prefetch_bucket, reuse_distance, live: what decides on stage 3's gathers, see `GatherRules`.
        counts_clips: whether packs differ in clips, so that the ranks add them up.
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


def step_collectives(shapes: Shapes, setup: Setup) -> list[Entry]:
    """The collectives of a step, for one rank; none where it is alone."""
    if setup.ranks == 1:
        return []
    total, ranks = sum(shapes.sizes), setup.ranks
    messages: list[tuple[Key, int]] = []  # a collective's key and its message's bytes

    def add(phase: str, operation: str, sizes: Iterable[int], group: int = ranks) -> None:
        key = Key(phase, operation, group, math.ceil(group * setup.nodes / ranks))
        messages.extend((key, size) for size in sizes)

    if setup.counts_clips:
        add("clips", "all-reduce", [4])
    padded = [_pad(size, ranks) for size in shapes.sizes]
    if setup.stage == 3:
        kept = frozenset(number for number, size in enumerate(shapes.sizes) if size <= setup.whole_below)
        for gather in _step_gathers(shapes, setup, kept):
            size = setup.number_bytes * sum(padded[number] for number in gather.parameters)
            add(gather.phase, "all-gather", [size], setup.hpz if gather.secondary else ranks)
    operation, gradients = ("reduce-scatter", padded) if setup.stage == 3 else ("all-reduce", shapes.sizes)
    if setup.stage == 1 and setup.number_bytes == 2:
        buckets = [_pad(total, 2 * ranks)]  # in bf16 DeepSpeed has another optimizer, which reduces all in one
    else:
        buckets = _buckets(shapes.sizes, gradients, setup.reduce_bucket)
    once = setup.reduces_once or setup.stage < 2
    add("backward", operation, [setup.gradient_bytes * bucket for bucket in buckets] * (1 if once else setup.packs))
    if setup.stage > 0:
        add("norm", "all-reduce", [4] * (_sub_groups(padded, setup) if setup.stage == 3 else 1))
    add("guard", "all-reduce", [8])
    if setup.stage == 3:
        add("update", "all-gather", [setup.number_bytes * padded[number] for number in sorted(kept)])
    elif setup.stage > 0:
        add("update", "all-gather", [setup.number_bytes * _pad(total, 2 * ranks)])
    add("vote", "all-reduce", [32])
    calls, sizes = Counter(key for key, _ in messages), Counter[Key]()
    for key, size in messages:
        sizes[key] += size
    return [Entry(key, calls[key], sizes[key]) for key in calls]


def _step_gathers(shapes: Shapes, setup: Setup, kept: frozenset[int]) -> list[Gather]:
    rules = GatherRules(setup.prefetch_bucket, setup.reuse_distance, setup.live)
    first, later = (
        pack_gathers(shapes.root, shapes.sizes, kept, rules, setup.hpz > 1, first) for first in (True, False)
    )
    return first + later * (setup.packs - 1)


def _buckets(sizes: Sequence[int], messages: Sequence[int], limit: int) -> list[int]:
    """Numbers of each reduction: gradients come from the last parameter to the first and fill buckets of `limit`."""
    buckets, filled = [0], 0
    for size, message in zip(reversed(sizes), reversed(messages), strict=True):
        if filled and filled + size > limit:
            buckets.append(0)
            filled = 0
        filled += size
        buckets[-1] += message
    return buckets


def _sub_groups(padded: Sequence[int], setup: Setup) -> int:
    """How many groups of parameters stage 3 makes, each closed when it holds `sub_group` numbers of a rank's part."""
    groups, filled = 1, 0
    for size in padded:
        if filled >= setup.sub_group:
            groups, filled = groups + 1, 0
        filled += size // setup.ranks
    return groups


def _pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
