"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924) of pairs of pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.autoencoder.lpips_network import MIN_SIZE, LPIPSNetwork, Net
from far_scale.evaluation.pixels import full_float32, unit_range
from far_scale.utils.errors import UserError


class LPIPS(LPIPSNetwork):
    """Perceptual distance on AlexNet ("alex", what papers report) or VGG16 ("vgg"). Always in float32."""

    def __init__(self, net: Net = "alex") -> None:
        super().__init__(net)
        self.net = net
        self.to(torch.float32)

    def forward(self, frames: Tensor, truth: Tensor) -> Tensor:
        """Distances `[N]` of frames `[N, 3, H, W]` from others, both RGB, uint8 or floats in [0, 1].

        They are scaled to [-1, 1] here, for which LPIPS was made.

        Raises:
            UserError: shapes that differ or are too small, another dtype or range.
        """
        if frames.shape != truth.shape or frames.ndim != 4 or frames.shape[1] != 3:
            shapes = f"{list(frames.shape)} and {list(truth.shape)}"
            raise UserError(f"LPIPS: frames of shapes {shapes}; give two of [frames, 3, height, width]")
        if min(frames.shape[2:]) < MIN_SIZE[self.net]:
            height, width = frames.shape[2:]
            raise UserError(f"LPIPS: frames of {height}x{width}; {self.net} needs at least {MIN_SIZE[self.net]} pixels")
        return self.distances(*(unit_range(each, "LPIPS") * 2 - 1 for each in (frames, truth)))

    def distances(self, pixels: Tensor, others: Tensor) -> Tensor:
        """Distances `[N]` of float32 pixels `[N, 3, H, W]` that are in the network's range already, without checks."""
        distance = torch.zeros(len(pixels), device=pixels.device, dtype=torch.float32)
        with full_float32(pixels.device):
            for unit, other, share in zip(
                self.normalized_features(pixels), self.normalized_features(others), self.shares, strict=True
            ):
                distance = distance + ((unit - other).square() * share).sum(1).mean((1, 2))
        return distance
