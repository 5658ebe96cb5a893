"""What a training leaves: the averaged weights and their card, which `far_scale.autoencoder.load` reads."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far_scale.autoencoder import Autoencoder, network_of
from far_scale.autoencoder.training.frames import Frames, to_pixels
from far_scale.autoencoder.training.recipe import AutoencoderRecipe, CompactModel
from far_scale.utils.io import atomic_write, sha256, write_json
from far_scale.utils.tensor_files import save_tensors

_FRAMES_FOR_STATISTICS = 2048
_AT_ONCE = 64  # frames a pass


def export(
    path: Path,
    recipe: AutoencoderRecipe[Any, Any],
    config: dict[str, Any],
    weights: dict[str, Tensor],
    frames: Frames,
    command: str,
    device: torch.device,
) -> dict[str, Any]:
    """Write `weights` to `path`, a .safetensors file, and beside it their card .json; returns the card.

    It holds `command`, recipe, date, the PSNR on the held-out frames (null without any), and the latents' mean and
    deviation per channel and over all; all of it measured on the weights as they are stored. The compact autoencoder's
    are stored in float16, since they ship with the package, a DC-AE's in float32.

    Args:
        path: where to.
        recipe: what they were trained by.
        config: the network's, as `AutoencoderNetwork.card_config` gives it.
        weights: by the network's names.
        frames: what they were trained on.
        command: the command line that the card tells.
        device: on which to measure.

    Raises:
        UserError: the disk is full.
    """
    dtype = torch.float16 if isinstance(recipe.model, CompactModel) else torch.float32
    stored = {name: tensor.cpu().to(dtype if tensor.is_floating_point() else None) for name, tensor in weights.items()}
    network = network_of(config)
    network.load_state_dict(stored)
    autoencoder = Autoencoder(recipe.name, "", 1.0, network, device)
    sample = frames.sample(_FRAMES_FOR_STATISTICS)
    latents = torch.cat([autoencoder.encode(to_pixels(part)).cpu() for part in sample.split(_AT_ONCE)])
    heldout = frames.heldout()
    with atomic_write(path) as beside:
        save_tensors({name: tensor.contiguous() for name, tensor in stored.items()}, beside)
    card = {
        "name": recipe.name,
        "config": config,
        "scaling_factor": 1 / latents.std().item(),
        "psnr_db": None if heldout is None else round(psnr(autoencoder, heldout), 2),
        "latent_std": latents.std().item(),
        "channel_mean": latents.mean((0, 2, 3)).tolist(),
        "channel_std": latents.std((0, 2, 3)).tolist(),
        "command": command,
        "recipe": recipe.model_dump(mode="json"),
        "weights_dtype": str(dtype).removeprefix("torch."),
        "weights_sha256": sha256(path),
        "date": datetime.date.today().isoformat(),
    }
    write_json(path.with_suffix(".json"), card)
    return card


def psnr(autoencoder: Autoencoder, frames: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the reconstructions of `frames` uint8 [N, 3, H, W], the mean over frames.

    Per frame 10 log10(255^2 / mean squared error), of the reconstruction rounded to the 256 values of a picture.
    """
    ratios = []
    for part in frames.split(_AT_ONCE):
        seen = ((autoencoder.decode(autoencoder.encode(to_pixels(part))) + 1) * 127.5).round().cpu()
        error = (seen - part.float()).square().mean((1, 2, 3))
        ratios.append(10 * torch.log10(255**2 / error.clamp_min(1e-6)))
    return torch.cat(ratios).mean().item()
