"""What every network of a metric asks of its input: one range of pixels, and float32 throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from far_scale.errors import UserError


def unit_range(pixels: Tensor, what: str) -> Tensor:
    """`pixels` as float32 in [0, 1]: uint8 ones are divided by 255, floating ones must lie in that range already.

    Raises:
        UserError: another dtype, or values outside of [0, 1], as those of pixels in [-1, 1] or [0, 255] are.
    """
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32) / 255
    if not pixels.is_floating_point():
        raise UserError(f"{what}: {pixels.dtype} pixels; give uint8, or floats in [0, 1]")
    if pixels.numel() == 0:
        return pixels.to(torch.float32)
    low, high = (value.item() for value in torch.aminmax(pixels))
    if not (low >= 0 and high <= 1):  # also where one is not a number
        raise UserError(f"{what}: pixels from {low:g} to {high:g}; give uint8, or floats in [0, 1]")
    return pixels.to(torch.float32)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and no TF32 in convolutions: scores must not depend on a training's settings."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precision = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = precision
