"""Bytes of a rank during training: its state, and what a forward pass keeps for the backward.

What is kept was counted with torch.autograd.graph.saved_tensors_hooks on the model's layers, in eager mode and behind
the compiler's partitioner, and is linear in tokens and frames (tests/train/test_planner_memory.py counts again). A
layer without checkpointing keeps, in bytes:

    for each token and channel    eager 60 in bf16, 96 in fp32; compiled 40 and 84 (38 and 84 around FlexAttention);
                                  in a model with context 56, 100; 40, 76 (40, 76)
    for each frame and channel    8 numbers of the model's precision; compiled 6 (7 around FlexAttention)
    for each token and head       12: the log-sum-exp and the scales of the two RMSNorms, in float32
    for each token                16: mean and scale of the two LayerNorms, in float32

    shape letters   T tokens   F frames, Fw/Fc of the window/context   E width   N heads
"""

from __future__ import annotations

from dataclasses import dataclass

from far_scale.config.schema import TrainSection
from far_scale.model import FARConfig
from far_scale.model.layers import TIMESTEP_SINUSOIDS, Checkpointing
from far_scale.model.layout import FrameLayout
from far_scale.model.sharded_layout import SequenceRank, ShardedLayout
from far_scale.train.sharding import StateBytes

_FLOAT = 4
_NUMBER_BYTES = {"bf16": 2, "fp32": 4}
_ROTATION = 64 * _FLOAT
"""Bytes for each token of its rotary cosines and sines."""

# By (compiled, around FlexAttention) and precision: bytes for each token and channel, of a layer, and of the context in
# the last layer, which gives keys and values only; then numbers for each frame and channel of a layer.
_LAYER = {
    (False, False): {"bf16": (60, 18, 8), "fp32": (96, 32, 8)},
    (False, True): {"bf16": (60, 18, 8), "fp32": (96, 32, 8)},
    (True, False): {"bf16": (40, 12, 6), "fp32": (84, 20, 6)},
    (True, True): {"bf16": (38, 12, 7), "fp32": (84, 20, 7)},
}
# Bytes more for each token and channel in a model with context, where values are copied. It is less where nothing but
# the values is needed of their projection, together with queries and keys, which they are a view of otherwise.
_BUFFER = {
    (False, False): {"bf16": -4, "fp32": 4},
    (False, True): {"bf16": -4, "fp32": 4},
    (True, False): {"bf16": 0, "fp32": -8},
    (True, True): {"bf16": 2, "fp32": -8},
}


@dataclass(frozen=True)
class Counts:
    """Tokens and frames of a pack on a rank.

    Attributes:
        window, context: tokens.
        window_frames, context_frames: frames.
        clips: clips.
    """

    window: int
    context: int
    window_frames: int
    context_frames: int
    clips: int

    @staticmethod
    def of(layout: FrameLayout, sequence_parallel: int = 1) -> Counts:
        """Of a pack that so many ranks share, on the rank with the most frames of it, the first."""
        if sequence_parallel > 1:
            layout = ShardedLayout(layout, SequenceRank(0, sequence_parallel)).own
        window, context = layout.window, layout.context
        return Counts(window.tokens, context.tokens, window.frames, context.frames, len(layout.clip_frames))

    @property
    def tokens(self) -> int:
        return self.window + self.context

    @property
    def frames(self) -> int:
        return self.window_frames + self.context_frames


@dataclass(frozen=True)
class ActivationBytes:
    """What the packs of a step take beside the state.

    Attributes:
        saved: kept from forward to backward.
        recomputed: of one layer, computed again in the backward with activation checkpointing.
        workspace: intermediate results of the backward of one layer, and the batch with its successor.
    """

    saved: int
    recomputed: int
    workspace: int

    @property
    def total(self) -> int:
        return self.saved + self.recomputed + self.workspace


def activation_bytes(
    config: FARConfig, train: TrainSection, counts: Counts, flex: bool, packs: int = 1
) -> ActivationBytes:
    """Bytes for a pack.

    Args:
        config: the model's shape.
        train: the recipe's section.
        counts: of the pack.
        flex: whether attention is FlexAttention.
        packs: of the rank in a step; one is computed at a time.
    """
    width, number = config.width, _NUMBER_BYTES[train.precision]
    mode = train.activation_checkpointing
    whole = [layer_bytes(config, train, counts, flex, last=last) for last in (False, True)]
    if mode == "none":
        layers, recomputed = (config.layers - 1) * whole[0] + whole[1], 0
    else:
        layers, recomputed = config.layers * counts.tokens * width * number, max(whole)
        if keeps_attention(mode, flex):
            outputs = width * number + config.heads * _FLOAT
            layers += (config.layers * counts.window + (config.layers - 1) * counts.context) * outputs
    pixels = config.channels * config.patch**2  # numbers of a window token's patch
    context_pixels = config.channels * config.context_patch**2
    outside = (
        counts.tokens * _ROTATION
        + counts.frames * (TIMESTEP_SINUSOIDS + 4 * width) * number  # the embedding of conditions, and they themselves
        + (counts.window * pixels + counts.context * context_pixels) * number  # patches
        + counts.window * (3 * width * number + 2 * _FLOAT)  # the output head
        + counts.window_frames * width * number
        + counts.window * pixels * (number + _FLOAT)  # the velocity, and its error in the loss
        + counts.window_frames * counts.clips * _FLOAT
    )
    hidden = 2 * 4 * width * number * max(counts.window, counts.context)  # gradients around the MLP's GELU
    batch = 2 * packs * (2 * counts.window * pixels + counts.context * context_pixels) * _FLOAT
    return ActivationBytes(layers + outside, recomputed, hidden + batch)


def layer_bytes(config: FARConfig, train: TrainSection, counts: Counts, flex: bool, last: bool = False) -> int:
    """What one layer without checkpointing keeps, its input included, conditions and rotations not.

    Args:
        last: whether it is the last layer.
    """
    width, heads, number = config.width, config.heads, _NUMBER_BYTES[train.precision]
    channel, last_channel, frame = _LAYER[train.compile, flex][train.precision]
    if config.context_patch:
        channel += _BUFFER[train.compile, flex][train.precision]

    def group(tokens: int, frames: int) -> int:
        return tokens * (width * channel + heads * 3 * _FLOAT + 4 * _FLOAT) + frames * width * frame * number

    kept = group(counts.window, counts.window_frames)
    if last and counts.context:
        tokens = counts.context * (width * last_channel + heads * _FLOAT + 2 * _FLOAT)
        kept += tokens + counts.context_frames * 4 * width * number
    else:
        kept += group(counts.context, counts.context_frames)
    return kept


def keeps_attention(mode: Checkpointing, flex: bool) -> bool:
    """Whether the backward finds attention's output: it is an operator's, and FlexAttention is none."""
    return mode == "attention-kept" and not flex


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at most."""

    state: StateBytes
    activations: ActivationBytes

    @property
    def peak(self) -> int:
        """The largest sum at one time, see `StateBytes.peak`."""
        return self.state.peak(self.activations.total)

    def parts(self) -> dict[str, int]:
        """The parts by name, see `StateBytes` and `ActivationBytes`."""
        return vars(self.state) | vars(self.activations)
