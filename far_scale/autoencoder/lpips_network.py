"""The network of the perceptual distance LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924), on AlexNet or VGG16.

The training of autoencoders uses it as a loss (far_scale/autoencoder/training/losses.py), evaluation as a metric
(far_scale/evaluation/lpips.py). The published tensors are in two files:

- torchvision's state dict of the backbone (alexnet-owt-7be5be79.pth, vgg16-397923af.pth): `features.0.weight`,
  `features.0.bias`, ...; other tensors are ignored;
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
    number: int  # in torchvision's `features`
    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class _Stage(NamedTuple):
    """The layers up to one of the five depths at which features are compared."""

    convolutions: tuple[_Convolution, ...]
    pool: int | None = None  # kernel of the max pooling with stride 2 before the convolutions


_BACKBONES: dict[Net, tuple[_Stage, ...]] = {
    "alex": (
        _Stage((_Convolution(0, 64, 11, 4, 2),)),
        _Stage((_Convolution(3, 192, 5, 1, 2),), pool=3),
        _Stage((_Convolution(6, 384),), pool=3),
        _Stage((_Convolution(8, 256),)),
        _Stage((_Convolution(10, 256),)),
    ),
    "vgg": (
        _Stage((_Convolution(0, 64), _Convolution(2, 64))),
        _Stage((_Convolution(5, 128), _Convolution(7, 128)), pool=2),
        _Stage((_Convolution(10, 256), _Convolution(12, 256), _Convolution(14, 256)), pool=2),
        _Stage((_Convolution(17, 512), _Convolution(19, 512), _Convolution(21, 512)), pool=2),
        _Stage((_Convolution(24, 512), _Convolution(26, 512), _Convolution(28, 512)), pool=2),
    ),
}
MIN_SIZE: dict[Net, int] = {"alex": 31, "vgg": 16}  # image side in pixels that leaves 1 x 1 features at the last stage
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], to the backbones' normalisation
_EPSILON = 1e-10


class LPIPSNetwork(nn.Module):
    """Unit-length features at five depths and the weight of each channel; frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        self._stages = _BACKBONES[net]
        self.features = nn.ModuleDict()  # under torchvision's names
        in_channels = 3
        for stage in self._stages:
            for number, channels, kernel, stride, padding in stage.convolutions:
                self.features[str(number)] = nn.Conv2d(in_channels, channels, kernel, stride, padding)
                in_channels = channels
        widths = [stage.convolutions[-1].channels for stage in self._stages]
        # Channel weights; the name is that in cached files of weights.
        self.shares = nn.ParameterList([torch.zeros(1, width, 1, 1) for width in widths])
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def normalized_features(self, pixels: Tensor) -> list[Tensor]:
        """Features normalised over channels, `[N, C, h, w]` at each depth, of pixels `[N, 3, H, W]` in [-1, 1]."""
        features = (pixels - self.shift) / self.scale
        normalized: list[Tensor] = []
        for stage in self._stages:
            if stage.pool is not None:
                features = F.max_pool2d(features, stage.pool, 2)
            for convolution in stage.convolutions:
                features = F.relu(self.features[str(convolution.number)](features))
            normalized.append(features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _EPSILON))
        return normalized


def convert_published(net: Net, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state dict of an `LPIPSNetwork` from tensors under their published names (see above).

    Raises:
        KeyError: names that are missing.
    """
    with torch.device("meta"):
        names = list(LPIPSNetwork(net).state_dict())
    published_names = {name: f"lin{name[7:]}.model.1.weight" if name.startswith("shares.") else name for name in names}
    if missing := [name for name in published_names.values() if name not in published]:
        raise KeyError(*missing)
    return {name: published[source].float() for name, source in published_names.items()}
