"""The perceptual distance LPIPS on VGG16 as a loss, as the official FAR code has it (showlab/FAR, far/losses/lpips.py).

Its weights come from two files that others publish (see far_scale/autoencoder/lpips_network.py). They may lie in one
folder, or be joined in one file. VQGAN's vgg.pth has the same names as the lpips package's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from far_scale.autoencoder.lpips_network import LPIPSNetwork, from_published
from far_scale.utils.errors import UserError
from far_scale.utils.tensor_files import read_tensors

_KEY = "train.perceptual_weights"


class PerceptualDistance(LPIPSNetwork):
    """How different two pictures look; its own weights never train."""

    def __init__(self) -> None:
        super().__init__("vgg")

    @classmethod
    def load(cls, path: str | Path) -> PerceptualDistance:
        """With the weights at `path`, a file or a folder of files: see above.

        Raises:
            UserError: nothing there, unreadable files, or weights that are missing or have another shape.
        """
        try:
            weights = from_published("vgg", read_tensors(Path(path)))
        except UserError as error:
            raise UserError(f"{_KEY}: {error}") from None
        except KeyError as error:
            missing = error.args
            raise UserError(
                f"{path}: {_KEY}: has no {', '.join(missing[:3])}{' ...' if missing[3:] else ''}; it takes "
                "torchvision's vgg16 state dict and the lpips package's vgg.pth"
            ) from None
        distance = cls()
        try:
            distance.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{path}: {_KEY}: not VGG16's ({str(error).splitlines()[-1].strip()})") from None
        return distance

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The mean distance of pixels [N, 3, H, W] in [-1, 1] from others; gradients flow to `first` alone.

        At five depths of VGG16 the features of each position are scaled to length 1; the squared differences, weighed
        per channel, are summed over channels and depths and averaged over positions.
        """
        with torch.no_grad():
            others = self.units(second)
        distance = first.new_zeros(())
        for unit, other, share in zip(self.units(first), others, self.shares, strict=True):
            distance = distance + ((unit - other).square() * share).sum(1).mean()
        return distance
