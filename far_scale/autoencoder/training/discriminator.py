"""The patch discriminator that an autoencoder is trained against, and its losses.

As in the official FAR code (showlab/FAR, far/models/patch_discriminator.py and far/trainers/trainer_dcae.py), which has
the network from pix2pix (Isola et al. 2017, arXiv 1611.07004) and the weighing from VQGAN (Esser et al. 2021,
arXiv 2012.09841, equation 7).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.distributed.process_group import Processes

_WIDTH = 64
_DEVIATION = 0.02  # of the first weights
_LARGEST_WEIGHT = 1e4
_NEVER_ZERO = 1e-4  # added to the norm that is divided by


class PatchDiscriminator(nn.Module):
    """Judges every patch of 70x70 pixels: five 4x4 convolutions, the first three of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_WIDTH, 2 * _WIDTH, 4 * _WIDTH, 8 * _WIDTH]
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTH, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, width in pairwise(widths):
            stride = 1 if width == widths[-1] else 2
            layers += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, _DEVIATION)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, _DEVIATION)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] to logits [N, 1, H/8 - 2, W/8 - 2], high where they look real."""
        logits: Tensor = self.layers(pixels)
        return logits


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator learns by: (mean(max(0, 1 - real)) + mean(max(0, 1 + fake))) / 2, of logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: nn.Parameter, processes: Processes) -> Tensor:
    """|d loss / d last layer| / (|d adversarial / d last layer| + 1e-4), at most 1e4, with no gradient of its own.

    The norms are those of the gradients of the global batch, so that the number of ranks changes nothing; officially
    each rank takes its own share's.

    Args:
        loss: of the pixels, this rank's mean.
        adversarial: the discriminator's judgement as a loss, this rank's mean.
        last_layer: the weights that the pixels come out of.
        processes: whose means make the global batch's.
    """
    norms = []
    for one in (loss, adversarial):
        (gradient,) = torch.autograd.grad(one, last_layer, retain_graph=True)
        norms.append(processes.mean(gradient.flatten()).norm())
    return (norms[0] / (norms[1] + _NEVER_ZERO)).clamp(0, _LARGEST_WEIGHT).float()
