"""What every autoencoder's network is to those who train it, load it and encode with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class AutoencoderNetwork(nn.Module, ABC):
    """Frames in pixels to latents and back, without memory between frames.

    Attributes:
        latent_channels: C.
        downsample: D, pixels a side of one latent position.
    """

    latent_channels: int
    downsample: int

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] to latents [N, C, H/D, W/D]; H and W are multiples of D."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] to pixels [N, 3, DH, DW], not clamped."""

    @abstractmethod
    def card_config(self) -> dict[str, Any]:
        """What `network_of` builds the same network from, in JSON's types; it stands in the card of the weights."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weights that the pixels come out of: a discriminator's loss is weighed by its gradient there."""
