"""What every network of a metric asks of its input: one range of pixels, and float32 throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from far_scale.utils.errors import UserError


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
    """No gradients, autocast, TF32 or bfloat16 in convolutions: scores do not depend on the settings of a training."""
    backends = (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
