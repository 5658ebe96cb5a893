"""The interfaces of every kind of autoencoder: the network, and a trained one ready for use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 64  # frames per forward pass, to bound the memory


class AutoencoderNetwork(nn.Module, ABC):
    """Encoder and decoder of single frames.

    Attributes:
        latent_channels: C.
        downsample: D, pixels per latent position along each side.
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
    def config_dict(self) -> dict[str, Any]:
        """The configuration in JSON types, from which `build_network` builds the same network; stored as metadata."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last layer; their gradient norms set the discriminator's adaptive weight."""


class Autoencoder:
    """A trained autoencoder of any kind, in evaluation mode: the interface of encoding, sampling and inspection.

    Attributes:
        name: as in recipes and manifests.
        weight_hash: SHA-256 of the safetensors file.
        scaling_factor: 1 / std of the latents over all channels; a model takes latents x factor.
        latent_channels: C.
        downsample: D, pixels a side of one latent position.
    """

    def __init__(
        self,
        name: str,
        weight_hash: str,
        scaling_factor: float,
        network: AutoencoderNetwork,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take ownership of `network` and cast it, weights included, to `dtype`, as the official code does."""
        self.name = name
        self.weight_hash = weight_hash
        self.scaling_factor = scaling_factor
        self.latent_channels = network.latent_channels
        self.downsample = network.downsample
        self._device, self._dtype = device, dtype
        # Channels last: convolutions are about 25% faster on a CPU, and no slower on a GPU.
        network = network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] to latents [N, C, H/D, W/D], float32, unscaled.

        Raises:
            ValueError: another shape, or a height or width that is not a multiple of D.
        """
        side = self.downsample
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % side or pixels.shape[3] % side:
            raise ValueError(f"pixels {list(pixels.shape)}: must be [N, 3, H, W], H and W multiples of {side}")
        parts = [self._network.encode(self._prepare(part)).float() for part in torch.split(pixels, _BATCH)]
        return torch.cat(parts).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W], unscaled, to pixels [N, 3, DH, DW] in [-1, 1], float32.

        Raises:
            ValueError: another shape or number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents {list(latents.shape)}: must be [N, {self.latent_channels}, H, W]")
        parts = [
            self._network.decode(self._prepare(part)).float().clamp(-1, 1) for part in torch.split(latents, _BATCH)
        ]
        return torch.cat(parts).contiguous()

    def _prepare(self, part: Tensor) -> Tensor:
        return part.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)
