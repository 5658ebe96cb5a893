"""Autoencoders: frames in pixels to frame latents and back. `load` gives one by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from far_scale.autoencoder.compact import DOWNSAMPLE, CompactAutoencoder, CompactConfig
from far_scale.errors import UserError
from far_scale.files import read_json, sha256

WEIGHTS = Path(__file__).parent / "weights"  # what ships with the package
_AT_ONCE = 64  # frames a pass, for the memory's sake


class Autoencoder:
    """A trained autoencoder, ready for use; it never trains.

    Attributes:
        name: what recipes and manifests call it.
        weight_hash: SHA-256 of the safetensors file.
        scaling_factor: 1 / the latents' deviation over all channels; latents x factor go into a model.
        latent_channels: C.
        downsample: pixels a side of one latent position.
    """

    def __init__(
        self, name: str, weight_hash: str, scaling_factor: float, network: CompactAutoencoder, device: torch.device
    ) -> None:
        self.name = name
        self.weight_hash = weight_hash
        self.scaling_factor = scaling_factor
        self.latent_channels = network.patch_encoder.out_channels
        self.downsample = DOWNSAMPLE
        self._device = device
        # channels last: convolutions are about a quarter faster on a CPU, and no slower on a GPU
        self._network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] to latents [N, C, H/8, W/8], float32, unscaled.

        Raises:
            ValueError: another shape, or a height or width that is no multiple of 8.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % DOWNSAMPLE or pixels.shape[3] % DOWNSAMPLE:
            raise ValueError(f"pixels {list(pixels.shape)}: must be [N, 3, H, W], H and W multiples of {DOWNSAMPLE}")
        return torch.cat([self._network.encode(self._prepare(part)) for part in pixels.split(_AT_ONCE)]).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W], unscaled, to pixels [N, 3, 8H, 8W] in [-1, 1], float32.

        Raises:
            ValueError: another shape or number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents {list(latents.shape)}: must be [N, {self.latent_channels}, H, W]")
        parts = [self._network.decode(self._prepare(part)).clamp(-1, 1) for part in latents.split(_AT_ONCE)]
        return torch.cat(parts).contiguous()

    def _prepare(self, part: Tensor) -> Tensor:
        return part.to(self._device, torch.float32).contiguous(memory_format=torch.channels_last)


def load(name_or_path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """The autoencoder of a name that ships with the package, or of a .safetensors file with its .json card beside it.

    Raises:
        UserError: no such name or file, no card, or weights that are broken or do not fit the card.
    """
    path = Path(name_or_path)
    if path.suffix != ".safetensors":
        path = WEIGHTS / f"{name_or_path}.safetensors"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors")))
        raise UserError(
            f"autoencoder {name_or_path}: there is none of this name; shipped: {shipped}; "
            "or give the path of a .safetensors file"
        )
    card: dict[str, Any] = read_json(path.with_suffix(".json"), "card of an autoencoder")
    try:
        name, factor = str(card["name"]), float(card["scaling_factor"])
        network = CompactAutoencoder(CompactConfig(**card["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path.with_suffix('.json')}: not a card that tools/train_autoencoder.py wrote ({error!r}); take the "
            "one that came with the weights"
        ) from None
    try:
        network.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: weights are broken or of another autoencoder ({reason}); copy them again") from None
    return Autoencoder(name, sha256(path), factor, network, torch.device(device))
