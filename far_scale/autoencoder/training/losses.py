"""The losses of an autoencoder beside those of pixels: LPIPS on VGG16, and a patch discriminator.

As in the official FAR code (showlab/FAR, far/losses/lpips.py, far/models/patch_discriminator.py and
far/trainers/trainer_dcae.py). The discriminator is that of pix2pix (Isola et al. 2017, arXiv 1611.07004), its adaptive
weight that of VQGAN (Esser et al. 2021, arXiv 2012.09841, equation 7).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.autoencoder.lpips_network import LPIPSNetwork, convert_published
from far_scale.distributed.process_group import Processes
from far_scale.utils.errors import UserError
from far_scale.utils.tensor_files import read_tensors

_WEIGHTS_KEY = "train.perceptual_weights"  # the recipe key, for errors
_WIDTH = 64
_INIT_STD = 0.02
_MAX_ADAPTIVE_WEIGHT = 1e4
_EPSILON = 1e-4  # added to the norm in the denominator


class PerceptualLoss(LPIPSNetwork):
    """The LPIPS distance of two batches of pixels; its weights are frozen."""

    def __init__(self) -> None:
        super().__init__("vgg")

    @classmethod
    def load(cls, path: str | Path) -> PerceptualLoss:
        """Load the published weights (see `lpips_network`) from a file or a folder of files.

        VQGAN's vgg.pth has the same names as the lpips package's.

        Raises:
            UserError: nothing at `path`, unreadable files, or weights that are missing or have another shape.
        """
        try:
            weights = convert_published("vgg", read_tensors(Path(path)))
        except UserError as error:
            raise UserError(f"{_WEIGHTS_KEY}: {error}") from None
        except KeyError as error:
            missing = error.args
            raise UserError(
                f"{path}: {_WEIGHTS_KEY}: has no {', '.join(missing[:3])}{' ...' if missing[3:] else ''}; it takes "
                "torchvision's vgg16 state dict and the lpips package's vgg.pth"
            ) from None
        loss = cls()
        try:
            loss.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{path}: {_WEIGHTS_KEY}: not VGG16's ({str(error).splitlines()[-1].strip()})") from None
        return loss

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """The mean distance of pixels [N, 3, H, W] in [-1, 1] to `target`; only `pixels` gets gradients.

        Squared differences of normalised features, weighted per channel, are summed over channels and depths and
        averaged over positions.
        """
        with torch.no_grad():
            target_features = self.normalized_features(target)
        distance = pixels.new_zeros(())
        for features, others, weight in zip(
            self.normalized_features(pixels), target_features, self.shares, strict=True
        ):
            distance = distance + ((features - others).square() * weight).sum(1).mean()
        return distance


class PatchDiscriminator(nn.Module):
    """Classifies every patch of 70x70 pixels as real or fake: five 4x4 convolutions, the first three of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_WIDTH, 2 * _WIDTH, 4 * _WIDTH, 8 * _WIDTH]
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTH, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for in_width, width in pairwise(widths):
            stride = 1 if width == widths[-1] else 2
            layers += [
                nn.Conv2d(in_width, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, _INIT_STD)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, _INIT_STD)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] to logits [N, 1, H/8 - 2, W/8 - 2], high for real."""
        logits: Tensor = self.layers(pixels)
        return logits


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (mean(max(0, 1 - real)) + mean(max(0, 1 + fake))) / 2, of logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: nn.Parameter, processes: Processes) -> Tensor:
    """|d loss / d last layer| / (|d adversarial / d last layer| + 1e-4), at most 1e4, detached.

    The norms are those of the global batch's gradients, so that the number of ranks changes nothing; officially each
    rank takes those of its local batch.

    Args:
        loss: of the pixels, this rank's mean.
        adversarial: the adversarial loss, this rank's mean.
        last_layer: the weights of the decoder's last layer.
        processes: the ranks to average gradients over.
    """
    norms = []
    for value in (loss, adversarial):
        (gradient,) = torch.autograd.grad(value, last_layer, retain_graph=True)
        norms.append(processes.mean(gradient.flatten()).norm())
    weight: Tensor = (norms[0] / (norms[1] + _EPSILON)).clamp(0, _MAX_ADAPTIVE_WEIGHT)
    return weight.float()
