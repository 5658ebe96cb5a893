"""Frames as they are decoded to what an autoencoder takes: scaled, cropped, mirrored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Frames = NDArray[Any]
"""[F, H, W, 3], RGB: uint8 from 0 to 255, or float32 from 0 to 1."""


@dataclass(frozen=True)
class Framing:
    """How a video's frames become square pictures.

    Attributes:
        size: their height and width in pixels.
        resize: how the shorter side is brought to it. "pillow": in 8 bits, the longer side rounded to the nearest.
            "torch": in float32, antialiased, the longer side rounded down, as the official code does it by torchvision
            (`Resize` of `UCFDataset`).
        crop: which square of the scaled frames is taken. "centre", as officially in evaluation; or "random", as
            officially in training: one place a sample, drawn from its key.
        stride: every n-th frame is taken, beginning with the first.
    """

    size: int
    resize: Literal["pillow", "torch"] = "pillow"
    crop: Literal["centre", "random"] = "centre"
    stride: int = 1

    def scale(self, frames: NDArray[np.uint8]) -> Frames:
        """Frames uint8 [F, H, W, 3] as [F, h, w, 3] whose shorter side is `size`; float32 by torch's way."""
        return _scale_in_8_bits(frames, self.size) if self.resize == "pillow" else _scale_in_float(frames, self.size)

    def cut(self, frames: Frames, key: str) -> Frames:
        """The square [F, size, size, 3] of scaled frames that the sample `key` has; a view."""
        spare = [side - self.size for side in frames.shape[1:3]]
        if self.crop == "random":
            top, left = (_drawn(f"{axis} of {key}", more + 1) for axis, more in zip("yx", spare, strict=True))
        elif self.resize == "pillow":
            top, left = (more // 2 for more in spare)
        else:
            top, left = (round(more / 2) for more in spare)  # torchvision's CenterCrop
        return frames[:, top : top + self.size, left : left + self.size]


def fit(frames: NDArray[np.uint8], size: int) -> Frames:
    """Frames `[F, H, W, 3]` as `[F, size, size, 3]`: the shorter side scaled to `size`, the centre cropped."""
    framing = Framing(size)
    return np.ascontiguousarray(framing.cut(framing.scale(frames), ""))


def to_pixels(frames: Tensor) -> Tensor:
    """`Frames` as a tensor, on any device, to what an autoencoder takes: float32 [F, 3, H, W] from -1 to 1."""
    planes = frames.permute(0, 3, 1, 2)
    return planes.float() / 127.5 - 1 if frames.dtype == torch.uint8 else planes * 2 - 1


def _scale_in_8_bits(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    from PIL import Image

    height, width = frames.shape[1:3]
    if (height, width) == (size, size):
        return frames
    scaled = (max(size, round(width * size / min(height, width))), max(size, round(height * size / min(height, width))))
    images = (Image.fromarray(frame).resize(scaled, Image.Resampling.BILINEAR) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def _scale_in_float(frames: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    height, width = frames.shape[1:3]
    planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    if min(height, width) != size:
        scaled = [int(size * side / min(height, width)) for side in (height, width)]
        planes = torch.nn.functional.interpolate(planes, scaled, mode="bilinear", align_corners=False, antialias=True)
    channels_last: NDArray[np.float32] = planes.permute(0, 2, 3, 1).numpy()
    return channels_last


def _drawn(what: str, count: int) -> int:
    """A number from 0 to count - 1, the same for the same words everywhere."""
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") % count
