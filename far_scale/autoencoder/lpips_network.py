"""The network of the perceptual distance LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924), on AlexNet or VGG16.

The training of autoencoders takes it as a loss (far_scale/autoencoder/training/perceptual.py), evaluation as a metric
(far_scale/evaluation/metric_networks.py). The published tensors are those of two files:

- torchvision's state dict of the backbone (alexnet-owt-7be5be79.pth, vgg16-397923af.pth): `features.0.weight`,
  `features.0.bias`, ...; the rest is not read;
- the linear layers of the lpips package (lpips/weights/v0.1/alex.pth, vgg.pth): `lin0.model.1.weight` ...
  `lin4.model.1.weight`, each [1, C, 1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Net = Literal["alex", "vgg"]


class _Convolution(NamedTuple):
    number: int  # torchvision's
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class _Depth(NamedTuple):
    """What lies between two of the five depths at which features are compared."""

    convolutions: tuple[_Convolution, ...]
    pool: int | None = None  # the kernel of the max pooling with stride 2 before the convolutions


_BACKBONES: dict[Net, tuple[_Depth, ...]] = {
    "alex": (
        _Depth((_Convolution(0, 64, 11, 4, 2),)),
        _Depth((_Convolution(3, 192, 5, 1, 2),), pool=3),
        _Depth((_Convolution(6, 384),), pool=3),
        _Depth((_Convolution(8, 256),)),
        _Depth((_Convolution(10, 256),)),
    ),
    "vgg": (
        _Depth((_Convolution(0, 64), _Convolution(2, 64))),
        _Depth((_Convolution(5, 128), _Convolution(7, 128)), pool=2),
        _Depth((_Convolution(10, 256), _Convolution(12, 256), _Convolution(14, 256)), pool=2),
        _Depth((_Convolution(17, 512), _Convolution(19, 512), _Convolution(21, 512)), pool=2),
        _Depth((_Convolution(24, 512), _Convolution(26, 512), _Convolution(28, 512)), pool=2),
    ),
}
SMALLEST: dict[Net, int] = {"alex": 31, "vgg": 16}  # side of a picture, in pixels, that leaves one at the last depth
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], to what backbones were trained on
_NEVER_ZERO = 1e-10


class LPIPSNetwork(nn.Module):
    """Features of unit length at five depths, and the weight of each channel; nothing in it trains."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        self._depths = _BACKBONES[net]
        self.features = nn.ModuleDict()  # with torchvision's names
        before = 3
        for depth in self._depths:
            for number, width, kernel, stride, padding in depth.convolutions:
                self.features[str(number)] = nn.Conv2d(before, width, kernel, stride, padding)
                before = width
        widths = [depth.convolutions[-1].width for depth in self._depths]
        self.shares = nn.ParameterList([torch.zeros(1, width, 1, 1) for width in widths])
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def units(self, pixels: Tensor) -> list[Tensor]:
        """Features of length 1 over the channels, `[N, C, h, w]` at each depth, of pixels `[N, 3, H, W]` in [-1, 1]."""
        features = (pixels - self.shift) / self.scale
        found: list[Tensor] = []
        for depth in self._depths:
            if depth.pool is not None:
                features = F.max_pool2d(features, depth.pool, 2)
            for convolution in depth.convolutions:
                features = F.relu(self.features[str(convolution.number)](features))
            found.append(features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _NEVER_ZERO))
        return found


def from_published(net: Net, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an `LPIPSNetwork`, in float32, from tensors under their published names (see above).

    Raises:
        KeyError: names that are missing.
    """
    with torch.device("meta"):
        names = list(LPIPSNetwork(net).state_dict())
    theirs = {name: f"lin{name[7:]}.model.1.weight" if name.startswith("shares.") else name for name in names}
    if missing := [name for name in theirs.values() if name not in published]:
        raise KeyError(*missing)
    return {name: published[their].float() for name, their in theirs.items()}
