"""The costs of a step: arithmetic from the model's shape and the attended pairs, and memory for activations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from far_scale.config.schema import TrainSection
from far_scale.data.loader.mixture import Mixture
from far_scale.data.shards.shard_set import ShardSet
from far_scale.model import FARConfig
from far_scale.model.layers import TIMESTEP_SINUSOIDS
from far_scale.model.layout import FrameLayout
from far_scale.train.curriculum import Stage

_SAMPLED_PACKS = 256  # of each stage

# Dense bfloat16 peak, in FLOP/s, from the vendors' data sheets (without sparsity).
BF16_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def forward_flops(config: FARConfig, layout: FrameLayout) -> int:
    """Floating-point operations (2 per multiply-add) of one forward pass over a pack.

    A layer takes 12 E^2 multiply-adds per token (q, k, v, out: 4; MLP: 8), 6 E^2 per frame (modulation) and 2 E per
    attended pair (scores and values). The last layer makes only keys and values of context tokens (2 E^2 per token,
    3 E^2 per frame), and no context token is a query there.
    """
    width, window, context = config.width, layout.window, layout.context
    layer = 12 * width**2 * layout.tokens + 6 * width**2 * layout.frames + 2 * width * layout.attended_pairs
    unused = 10 * width**2 * context.tokens + 3 * width**2 * context.frames + 2 * width * context.pairs
    embedding = config.channels * width * (config.patch**2 * window.tokens + config.context_patch**2 * context.tokens)
    condition = (TIMESTEP_SINUSOIDS * width + width**2) * layout.frames
    output = config.channels * config.patch**2 * width * window.tokens + 2 * width**2 * window.frames
    return 2 * (config.layers * layer - unused + embedding + condition + output)


def train_flops(config: FARConfig, layout: FrameLayout) -> int:
    """Operations of forward and backward: three times the forward pass (as usual for MFU, without recomputation)."""
    return 3 * forward_flops(config, layout)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak of a device in FLOP/s: from the data sheet of a known GPU, otherwise measured.

    The measurement is the best of a few square matrix products in `dtype` on the threads that torch uses.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in BF16_PEAKS.items():
            if known in name:
                return peak
    size = 8192 if device.type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


@dataclass(frozen=True)
class StageCosts:
    """Costs of a stage, estimated from sampled packs.

    Attributes:
        stage: the stage.
        layouts: layouts of the sampled packs.
    """

    stage: Stage
    layouts: list[FrameLayout]

    @staticmethod
    def sample(stage: Stage, shard_set: ShardSet | Mixture, seed: int) -> StageCosts:
        """Draw a few hundred packs as training will, without reading them."""
        lanes = stage.packing(seed).make_lanes(shard_set, range(min(stage.data.lanes, _SAMPLED_PACKS)))
        rounds = -(-_SAMPLED_PACKS // len(lanes))
        packs = [next(lane) for _ in range(rounds) for lane in lanes.values()]
        return StageCosts(stage, [stage.layout(tuple(clip.frames for clip in pack)) for pack in packs])

    @property
    def step_flops(self) -> float:
        """Floating-point operations of a mean step on all ranks together."""
        flops = [train_flops(self.stage.config, layout) for layout in self.layouts]
        return self.stage.data.lanes * sum(flops) / len(flops)

    @property
    def largest(self) -> FrameLayout:
        """The pack with the most tokens."""
        return max(self.layouts, key=lambda layout: layout.tokens)

    def mean_and_max(self, measure: Callable[[FrameLayout], int]) -> str:
        """Mean and maximum of `measure` over the packs, as text."""
        values = [measure(layout) for layout in self.layouts]
        return f"{_format(sum(values) / len(values))} / {_format(max(values))}"


def activation_bytes(config: FARConfig, train: TrainSection, layout: FrameLayout) -> float:
    """Rough bytes that a forward pass keeps for backward: about 34 numbers per token, layer and channel of width.

    With activation checkpointing one number per layer (two if attention is kept) and one whole layer. With sequence
    parallelism a rank has its share of the tokens.
    """
    number_bytes = 2 if train.precision == "bf16" else 4
    tokens = layout.tokens / train.sequence_parallel
    layer_bytes = 34 * tokens * config.width * number_bytes
    kept_tensors = {"none": 0, "attention-kept": 2, "full": 1}[train.activation_checkpointing]
    if not kept_tensors:
        return config.layers * layer_bytes
    return layer_bytes + kept_tensors * config.layers * tokens * config.width * number_bytes


def max_activation_bytes(
    config: FARConfig,
    train: TrainSection,
    seed: int,
    plan: Sequence[Stage],
    shard_sets: Mapping[int, ShardSet | Mixture],
) -> float:
    """`activation_bytes` of the largest sampled pack of all stages; `shard_sets` by the stage's index."""
    costs = [StageCosts.sample(stage, shard_sets[stage.index], seed) for stage in plan]
    return max(activation_bytes(config, train, cost.largest) for cost in costs)


def _format(number: float) -> str:
    """A number, with a unit where it is long."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e5, "K")):
        if number >= size:
            return f"{number / (1e3 if unit == 'K' else size):.3g}{unit}"
    return f"{number:.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"
