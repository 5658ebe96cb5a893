"""The networks of FVD and LPIPS: I3D and LPIPS, always computed in float32.

`I3D` (Carreira and Zisserman 2017, arXiv 1705.07750) computes the function of the tf.hub network that FVD was defined
with (Unterthiner et al. 2018, arXiv 1812.01717), under the parameter names of piergiaj's pytorch-i3d: TensorFlow's SAME
padding, batch norms with eps 1e-3, logits averaged over time. `LPIPS` is version 0.1 (Zhang et al. 2018, arXiv
1801.03924).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.autoencoder.lpips_network import MIN_SIZE, LPIPSNetwork, Net
from far_scale.utils.errors import UserError


def unit_range(pixels: Tensor, what: str) -> Tensor:
    """`pixels` as float32 in [0, 1]: uint8 ones are divided by 255, floating-point ones must already be in that range.

    Raises:
        UserError: another dtype, or values outside of [0, 1], such as those of pixels in [-1, 1] or [0, 255].
    """
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32) / 255
    if not pixels.is_floating_point():
        raise UserError(f"{what}: {pixels.dtype} pixels; give uint8, or floats in [0, 1]")
    if pixels.numel() == 0:
        return pixels.to(torch.float32)
    low, high = (value.item() for value in torch.aminmax(pixels))
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise UserError(f"{what}: pixels from {low:g} to {high:g}; give uint8, or floats in [0, 1]")
    return pixels.to(torch.float32)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disable gradients, autocast, TF32 and bfloat16 in convolutions: scores must not depend on global settings."""
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


LOGITS = 400
SIDE = 224
MIN_FRAMES = 9  # fewer leave no frame for the last pooling
_EPS = 1e-3  # PyTorch's default 1e-5 is another function

# Channels of each Inception block: input, then branches 0, 1 (two units), 2 (two units) and 3.
_MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """I3D on RGB with 400 logits, the features of FVD. Always in float32 and in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _ConvUnit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _ConvUnit(64, 64, 1)
        self.Conv3d_2c_3x3 = _ConvUnit(64, 192, 3)
        for name, widths in _MIXED.items():
            self.add_module(name, _Inception(*widths))
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, LOGITS, 1)})
        self.to(torch.float32).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> I3D:
        """Stay in evaluation mode: the statistics of the batch norms are part of the weights."""
        return super().train(False)

    def forward(self, video: Tensor) -> Tensor:
        """Logits `[B, 400]` of videos `[B, T, 3, H, W]`, RGB, uint8 or floats in [0, 1], of at least 9 frames.

        Frames of another size than 224x224 are resized: bilinear between half-pixel centres, without antialiasing.

        Raises:
            UserError: another shape, dtype or range, or fewer frames.
        """
        if video.ndim != 5 or video.shape[2] != 3:
            raise UserError(f"I3D: videos of shape {list(video.shape)}; give [clips, frames, 3, height, width]")
        if video.shape[1] < MIN_FRAMES:
            raise UserError(f"I3D: clips of {video.shape[1]} frames; FVD needs at least {MIN_FRAMES}")
        frames = unit_range(video, "I3D").flatten(0, 1)
        with full_float32(video.device):
            if frames.shape[-2:] != (SIDE, SIDE):
                frames = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)
            return self.logits_of(frames.unflatten(0, video.shape[:2]).transpose(1, 2) * 2 - 1)

    def logits_of(self, x: Tensor) -> Tensor:
        """Logits `[B, 400]` of float32 `[B, 3, T, H, W]` in [-1, 1]: the network without range checks and resizing."""
        x = self.Conv3d_1a_7x7(x)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self._mixed(x, "Mixed_3b", "Mixed_3c")
        x = _max_pool(x, (3, 3, 3), (2, 2, 2))
        x = self._mixed(x, "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f")
        x = _max_pool(x, (2, 2, 2), (2, 2, 2))
        x = self._mixed(x, "Mixed_5b", "Mixed_5c")
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        logits: Tensor = self.logits["conv3d"](x)
        return logits.flatten(2).mean(2)

    def _mixed(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


class _ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class _Inception(nn.Module):
    """Four branches side by side, joined over channels."""

    def __init__(self, channels: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int) -> None:
        super().__init__()
        self.b0 = _ConvUnit(channels, b0, 1)
        self.b1a, self.b1b = _ConvUnit(channels, b1a, 1), _ConvUnit(b1a, b1b, 3)
        self.b2a, self.b2b = _ConvUnit(channels, b2a, 1), _ConvUnit(b2a, b2b, 3)
        self.b3b = _ConvUnit(channels, b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


def _max_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Max pooling with SAME padding; its zeros change no maximum after a ReLU."""
    return F.max_pool3d(_pad_same(x, kernel, stride), kernel, stride)


def _pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's SAME padding with zeros: ceil(size / stride) outputs; an odd zero is added at the end."""
    padding: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding) if any(padding) else x


class LPIPS(LPIPSNetwork):
    """Perceptual distance on AlexNet ("alex", what papers report) or VGG16 ("vgg"). Always in float32."""

    def __init__(self, net: Net = "alex") -> None:
        super().__init__(net)
        self.net = net
        self.to(torch.float32)

    def forward(self, frames: Tensor, truth: Tensor) -> Tensor:
        """Distances `[N]` of frames `[N, 3, H, W]` from the truth, both RGB, uint8 or floats in [0, 1].

        They are scaled to [-1, 1], the range that LPIPS was trained on.

        Raises:
            UserError: shapes that differ or are too small, another dtype or range.
        """
        if frames.shape != truth.shape or frames.ndim != 4 or frames.shape[1] != 3:
            shapes = f"{list(frames.shape)} and {list(truth.shape)}"
            raise UserError(f"LPIPS: frames of shapes {shapes}; give two of [frames, 3, height, width]")
        if min(frames.shape[2:]) < MIN_SIZE[self.net]:
            height, width = frames.shape[2:]
            raise UserError(f"LPIPS: frames of {height}x{width}; {self.net} needs at least {MIN_SIZE[self.net]} pixels")
        return self.distances(*(unit_range(pixels, "LPIPS") * 2 - 1 for pixels in (frames, truth)))

    def distances(self, pixels: Tensor, others: Tensor) -> Tensor:
        """Distances `[N]` of float32 pixels `[N, 3, H, W]` in the network's range, without checks."""
        distance = torch.zeros(len(pixels), device=pixels.device, dtype=torch.float32)
        with full_float32(pixels.device):
            for unit, other, weight in zip(
                self.normalized_features(pixels), self.normalized_features(others), self.shares, strict=True
            ):
                distance = distance + ((unit - other).square() * weight).sum(1).mean((1, 2))
        return distance
