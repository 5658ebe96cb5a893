"""The perceptual distance LPIPS on VGG16 (Zhang et al. 2018, arXiv 1801.03924), as the official FAR code has it
(showlab/FAR, far/losses/lpips.py).

Its weights come from two files that others publish, read by `torch.load(weights_only=True)` or as safetensors:

- torchvision's vgg16 state dict (vgg16-397923af.pth): `features.0.weight` ... `features.28.bias`; the rest is not read;
- the linear layers of the lpips package (lpips/weights/v0.1/vgg.pth), which VQGAN's vgg.pth equals in its names:
  `lin0.model.1.weight` ... `lin4.model.1.weight`, each [1, C, 1, 1].

They may lie in one folder, or be joined in one file.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from far_scale.errors import UserError

_CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers, by resolution
_WIDTHS = (64, 128, 256, 512, 512)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], to what VGG16 was trained on
_NEVER_ZERO = 1e-10
_SUFFIXES = (".pth", ".pt", ".safetensors")
_KEY = "train.perceptual_weights"


class PerceptualDistance(nn.Module):
    """How different two pictures look; its own weights never train."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()  # with torchvision's names
        before = 3
        for numbers, width in zip(_CONVOLUTIONS, _WIDTHS, strict=True):
            for number in numbers:
                self.features[str(number)] = nn.Conv2d(before, width, 3, padding=1)
                before = width
        self.shares = nn.ParameterList([torch.zeros(1, width, 1, 1) for width in _WIDTHS])
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> PerceptualDistance:
        """With the weights at `path`, a file or a folder of files: see above.

        Raises:
            UserError: nothing there, unreadable files, or weights that are missing or have another shape.
        """
        with torch.device("meta"):
            distance = cls()
        there = _read(Path(path))
        own = {
            name: f"lin{name[7:]}.model.1.weight" if name.startswith("shares.") else name
            for name in distance.state_dict()
        }
        missing = [theirs for theirs in own.values() if theirs not in there]
        if missing:
            raise UserError(
                f"{path}: {_KEY}: has no {', '.join(missing[:3])}{' ...' if missing[3:] else ''}; it takes "
                "torchvision's vgg16 state dict and the lpips package's vgg.pth"
            )
        distance = cls()
        try:
            distance.load_state_dict({name: there[theirs].float() for name, theirs in own.items()})
        except RuntimeError as error:
            raise UserError(f"{path}: {_KEY}: not VGG16's ({str(error).splitlines()[-1].strip()})") from None
        return distance

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The mean distance of pixels [N, 3, H, W] in [-1, 1] from others; gradients flow to `first` alone.

        At five depths of VGG16 the features of each position are scaled to length 1; the squared differences, weighed
        per channel, are summed over channels and depths and averaged over positions.
        """
        with torch.no_grad():
            others = self._units(second)
        distance = first.new_zeros(())
        for unit, other, share in zip(self._units(first), others, self.shares, strict=True):
            distance = distance + ((unit - other).square() * share).sum(1).mean()
        return distance

    def _units(self, pixels: Tensor) -> list[Tensor]:
        """Features of length 1 over the channels, at the five depths."""
        features = (pixels - self.shift) / self.scale
        found: list[Tensor] = []
        for numbers in _CONVOLUTIONS:
            if found:
                features = F.max_pool2d(features, 2)
            for number in numbers:
                features = F.relu(self.features[str(number)](features))
            found.append(features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _NEVER_ZERO))
        return found


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, or of the folder's files."""
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            values = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
        except FileNotFoundError:
            raise UserError(f"{file}: {_KEY}: there is no such file or folder") from None
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file}: {_KEY}: no file of weights ({reason}); get it again") from None
        if isinstance(values, dict):
            found |= {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
    return found
