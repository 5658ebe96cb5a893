"""DC-AE, FAR's own autoencoder (Chen et al. 2024, arXiv 2410.10733), through diffusers' `AutoencoderDC`.

The configurations are those of the official FAR code (showlab/FAR, options/model_cfg/dcae): the 8 times smaller latents
of f8c32 for 64 px, f16c32 for 128 px and f32c32 for 256 px. Each has one stage more than the previous one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from far_scale.autoencoder.network import AutoencoderNetwork
from far_scale.utils.errors import UserError

CLASS_NAME = "AutoencoderDC"  # `_class_name` in a config; compact configs have none
SCALING_FACTOR = 0.2889  # the official factor of all three


def _first_stages(stages: int) -> dict[str, Any]:
    """The configuration with the first `stages` of f32c32's six stages; each but the first halves the resolution.

    The first stage has no blocks: one convolution maps pixels to the second stage's width.
    """
    blocks = ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock"]
    widths = [128, 256, 512, 512, 1024, 1024]
    config: dict[str, Any] = {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_layers_per_block": [0, 4, 8, 2, 2, 2][:stages],
        "decoder_layers_per_block": [0, 5, 10, 2, 2, 2][:stages],
        "decoder_norm_types": ["batch_norm" if block == "ResBlock" else "rms_norm" for block in blocks[:stages]],
        "decoder_act_fns": ["relu" if block == "ResBlock" else "silu" for block in blocks[:stages]],
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
    }
    for side in ("encoder", "decoder"):
        config[f"{side}_block_types"] = blocks[:stages]
        config[f"{side}_block_out_channels"] = widths[:stages]
        config[f"{side}_qkv_multiscales"] = [[] for _ in range(stages)]
    return config


PRESETS = {"f8c32": _first_stages(4), "f16c32": _first_stages(5), "f32c32": _first_stages(6)}
"""FAR's configurations: 128, 216 and 323 million parameters."""


class DeepCompressionAutoencoder(AutoencoderNetwork):
    """diffusers' `AutoencoderDC`, with its (and the official code's) state dict names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the network with random weights.

        Args:
            config: arguments of `AutoencoderDC`; missing ones take its defaults.

        Raises:
            UserError: diffusers is missing.
            TypeError, ValueError: not arguments of `AutoencoderDC`.
        """
        super().__init__()
        try:
            from diffusers import AutoencoderDC
        except ImportError as error:
            raise UserError(
                f"DC-AE needs diffusers, which does not import here ({error}); pip install 'far_scale[dcae]'"
            ) from None
        autoencoder_class: Any = AutoencoderDC  # untyped
        model = autoencoder_class(**config)
        self.encoder, self.decoder = model.encoder, model.decoder
        self.latent_channels = int(model.config.latent_channels)
        self.downsample = int(model.spatial_compression_ratio)
        self._config = dict(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] to latents [N, C, H/D, W/D]; H and W are multiples of D."""
        latents: Tensor = self.encoder(pixels)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] to pixels [N, 3, DH, DW], not clamped."""
        pixels: Tensor = self.decoder(latents)
        return pixels

    def config_dict(self) -> dict[str, Any]:
        """The configuration in the format of diffusers."""
        return {"_class_name": CLASS_NAME, **self._config}

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last convolution."""
        weights: Tensor = next(self.decoder.conv_out.parameters())
        return weights
