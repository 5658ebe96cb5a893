"""The arithmetic of a step, from the model's shape and the attended pairs, and the peak of a device."""

from __future__ import annotations

import time

import torch

from far_scale.model import FARConfig
from far_scale.model.layers import TIMESTEP_SINUSOIDS
from far_scale.model.layout import FrameLayout

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


def attention_flops(config: FARConfig, layout: FrameLayout) -> int:
    """The part of `forward_flops` that the attended pairs take: scores and values."""
    return 4 * config.width * (config.layers * layout.attended_pairs - layout.context.pairs)


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
