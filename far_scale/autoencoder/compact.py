"""The compact convolutional autoencoder: pixels [N, 3, H, W] to latents [N, C, H/8, W/8] and back.

Encoder and decoder are each a linear map of 8x8 patches, initialised with their principal components, plus a small
convolutional network that starts at zero and learns the residual. So training starts at the best linear code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.autoencoder.network import AutoencoderNetwork

DOWNSAMPLE = 8
_GROUPS = 8


@dataclass(frozen=True)
class CompactConfig:
    """Sizes of the autoencoder.

    Attributes:
        channels: latent channels C.
        width: features at a quarter of the resolution, a multiple of 8; at an eighth there are twice as many.
        encoder_depth: residual blocks at each of the encoder's two resolutions.
        decoder_depth: the same for the decoder.
    """

    channels: int = 32
    width: int = 64
    encoder_depth: int = 1
    decoder_depth: int = 2


class ResidualBlock(nn.Module):
    """A residual block of two 3x3 convolutions, initialised to the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = _zero_init(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, width, H, W] in and out."""
        out: Tensor = features + self.second(F.silu(self.first(self.norm(features))))
        return out


class CompactAutoencoder(AutoencoderNetwork):
    """The compact network; its weights come from `far_scale.autoencoder.training` or a safetensors file."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels, self.downsample = config.channels, DOWNSAMPLE
        fine, coarse = config.width, 2 * config.width
        self.patch_encoder = nn.Conv2d(3, config.channels, DOWNSAMPLE, DOWNSAMPLE)
        self.patch_decoder = nn.ConvTranspose2d(config.channels, 3, DOWNSAMPLE, DOWNSAMPLE)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(3 * 4**2, fine, 3, padding=1),
            *[ResidualBlock(fine) for _ in range(config.encoder_depth)],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * fine, coarse, 1),
            *[ResidualBlock(coarse) for _ in range(config.encoder_depth)],
            nn.GroupNorm(_GROUPS, coarse),
            nn.SiLU(),
            _zero_init(nn.Conv2d(coarse, config.channels, 3, padding=1)),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.channels, coarse, 3, padding=1),
            *[ResidualBlock(coarse) for _ in range(config.decoder_depth)],
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            *[ResidualBlock(fine) for _ in range(config.decoder_depth)],
            nn.GroupNorm(_GROUPS, fine),
            nn.SiLU(),
            _zero_init(nn.Conv2d(fine, 3 * 4**2, 3, padding=1)),
            nn.PixelShuffle(4),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] to latents [N, C, H/8, W/8]."""
        latents: Tensor = self.patch_encoder(pixels) + self.encoder(pixels)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] to pixels [N, 3, 8H, 8W], not clamped."""
        pixels: Tensor = self.patch_decoder(latents) + self.decoder(latents)
        return pixels

    def config_dict(self) -> dict[str, Any]:
        """The fields of `CompactConfig`."""
        return asdict(self.config)

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last convolution, without the parallel linear map."""
        convolution = self.decoder[-2]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.weight

    @torch.no_grad()
    def start_from_patches(self, pixels: Tensor) -> None:
        """Initialise the linear maps with the principal components of the 8x8 patches of `pixels` [N, 3, H, W].

        With eigenvectors u_c and eigenvalues v_c of the patches' covariance, channel c is u_c . (patch - mean) /
        sqrt(s_c s_0), where s_c = sqrt(v_c) is its std. So the channels' stds are sqrt(s_c / s_0): less spread than
        those of plain components, in the same order.
        """
        channels = self.patch_encoder.out_channels
        mean = pixels.mean((0, 2, 3))
        patches = F.unfold(pixels - mean[:, None, None], DOWNSAMPLE, stride=DOWNSAMPLE)  # [N, 3 x 8 x 8, L]
        rows = patches.transpose(1, 2).flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # ascending
        values, vectors = values[-channels:].flip(0), vectors[:, -channels:].flip(1)
        # An eigenvector's sign is arbitrary; fix it independently of the linear algebra library.
        vectors = vectors * vectors.sum(0).sign().where(vectors.sum(0) != 0, 1.0)
        scale = (values.clamp_min(1e-8) * values[0].clamp_min(1e-8)) ** 0.25
        shape = self.patch_encoder.weight.shape
        weight = (vectors / scale).T.reshape(shape).float()
        bias = -torch.einsum("cxyz,x->c", weight, mean)
        self.patch_encoder.load_state_dict({"weight": weight, "bias": bias})
        self.patch_decoder.load_state_dict({"weight": (vectors * scale).T.reshape(shape), "bias": mean})


def _zero_init(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution
