"""From decoded frames to the input of an autoencoder: resize, crop, normalize."""

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
class FrameTransform:
    """Maps the frames of a video to square frames of one size.

    Attributes:
        size: height and width in pixels.
        resize: how the shorter side is resized to `size`. "pillow": in 8 bits, the longer side rounded to nearest.
            "torch": in float32, antialiased, the longer side rounded down, as in the official code (torchvision's
            `Resize` in `UCFDataset`).
        crop: "centre", as the official evaluation; or "random", as the official training: one position per sample,
            derived from its key.
        stride: every n-th frame is taken, from the first.
    """

    size: int
    resize: Literal["pillow", "torch"] = "pillow"
    crop: Literal["centre", "random"] = "centre"
    stride: int = 1

    def resize_frames(self, frames: NDArray[np.uint8]) -> Frames:
        """Resize frames uint8 [F, H, W, 3] so that the shorter side is `size`; float32 with "torch", else uint8."""
        return _resize_in_8_bits(frames, self.size) if self.resize == "pillow" else _resize_in_float(frames, self.size)

    def crop_frames(self, frames: Frames, key: str) -> Frames:
        """Crop resized frames to [F, size, size, 3] for the sample `key`; a view."""
        margins = [side - self.size for side in frames.shape[1:3]]
        if self.crop == "random":
            top, left = (_draw(f"{axis} of {key}", margin + 1) for axis, margin in zip("yx", margins, strict=True))
        elif self.resize == "pillow":
            top, left = (margin // 2 for margin in margins)
        else:
            top, left = (round(margin / 2) for margin in margins)  # torchvision's CenterCrop
        return frames[:, top : top + self.size, left : left + self.size]


def resize_and_crop(frames: NDArray[np.uint8], size: int) -> Frames:
    """Resize the shorter side of frames [F, H, W, 3] to `size`, and crop the centre to [F, size, size, 3]."""
    transform = FrameTransform(size)
    return np.ascontiguousarray(transform.crop_frames(transform.resize_frames(frames), ""))


def to_pixels(frames: Tensor) -> Tensor:
    """Normalize `Frames`, given as a tensor, for an autoencoder: float32 [F, 3, H, W] from -1 to 1."""
    planes = frames.permute(0, 3, 1, 2)
    return planes.float() / 127.5 - 1 if frames.dtype == torch.uint8 else planes * 2 - 1


def _resize_in_8_bits(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    from PIL import Image

    height, width = frames.shape[1:3]
    if (height, width) == (size, size):
        return frames
    scaled = (max(size, round(width * size / min(height, width))), max(size, round(height * size / min(height, width))))
    images = (Image.fromarray(frame).resize(scaled, Image.Resampling.BILINEAR) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def _resize_in_float(frames: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    height, width = frames.shape[1:3]
    planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    if min(height, width) != size:
        scaled = [int(size * side / min(height, width)) for side in (height, width)]
        planes = torch.nn.functional.interpolate(planes, scaled, mode="bilinear", align_corners=False, antialias=True)
    channels_last: NDArray[np.float32] = planes.permute(0, 2, 3, 1).numpy()
    return channels_last


def _draw(purpose: str, count: int) -> int:
    """A number from 0 to count - 1, the same for the same purpose on every machine."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big") % count
