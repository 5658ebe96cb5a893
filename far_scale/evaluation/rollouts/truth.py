"""The frames that an episode really has, handed out one index at a time: whole videos never lie there as floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from far_scale.autoencoder import Autoencoder


class Truth(Protocol):
    """The first frames of B episodes, as many of each.

    Attributes:
        is_what: "recorded pixels" or "decoded latents".
    """

    is_what: str

    def __len__(self) -> int:
        """How many frames are known of each episode."""
        ...

    def frame(self, episodes: slice, index: int) -> Tensor:
        """Frame `index` of some episodes, `[b, 3, h, w]` in 0..1, float32 on the CPU."""
        ...


@dataclass(frozen=True)
class RecordedPixels:
    """uint8 `[B, K, h, w, 3]`, as the video has them."""

    pixels: NDArray[np.uint8]
    is_what = "recorded pixels"

    def __len__(self) -> int:
        return self.pixels.shape[1]

    def frame(self, episodes: slice, index: int) -> Tensor:
        return from_numpy(self.pixels[episodes, index]).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class DecodedLatents:
    """Unscaled latents `[B, K, C, H, W]`, as a shard set has them, decoded when they are asked for."""

    latents: Tensor
    autoencoder: Autoencoder
    is_what = "decoded latents"

    def __len__(self) -> int:
        return self.latents.shape[1]

    def frame(self, episodes: slice, index: int) -> Tensor:
        return decode(self.autoencoder, self.latents[episodes, index].float())


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Unscaled latents `[b, C, H, W]` to pixels `[b, 3, h, w]` in 0..1, float32 on the CPU."""
    return autoencoder.decode(latents).cpu() / 2 + 0.5
