"""Export of a training: EMA weights and metadata, which `far_scale.autoencoder.load` reads."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far_scale.autoencoder import Autoencoder, build_network
from far_scale.autoencoder.training.frames import FrameSource, to_pixels
from far_scale.autoencoder.training.recipe import AutoencoderRecipe, CompactModel
from far_scale.utils.io import atomic_write, sha256, write_json
from far_scale.utils.tensor_files import save_tensors

_FRAMES_FOR_STATISTICS = 2048
_BATCH = 64  # frames per forward pass


def export(
    path: Path,
    recipe: AutoencoderRecipe[Any, Any],
    config: dict[str, Any],
    weights: dict[str, Tensor],
    frames: FrameSource,
    command: str,
    device: torch.device,
) -> dict[str, Any]:
    """Write `weights` to `path`, a .safetensors file, and their metadata to a .json file beside it.

    The metadata has `command`, recipe, date, the PSNR on held-out frames (null without any), and mean and std of the
    latents per channel and overall, measured with the weights as stored. Those of the compact autoencoder are stored
    in float16, since they ship with the package, those of a DC-AE in float32.

    Args:
        path: of the weights.
        recipe: of the training.
        config: of the network, see `AutoencoderNetwork.config_dict`.
        weights: the network's state dict.
        frames: the training frames.
        command: the command line, for the metadata.
        device: where to measure.

    Returns:
        The metadata.

    Raises:
        UserError: the disk is full.
    """
    dtype = torch.float16 if isinstance(recipe.model, CompactModel) else torch.float32
    stored = {name: tensor.cpu().to(dtype if tensor.is_floating_point() else None) for name, tensor in weights.items()}
    network = build_network(config)
    network.load_state_dict(stored)
    autoencoder = Autoencoder(recipe.name, "", 1.0, network, device)
    sample = frames.sample(_FRAMES_FOR_STATISTICS)
    latents = torch.cat([autoencoder.encode(to_pixels(part)).cpu() for part in torch.split(sample, _BATCH)])
    heldout = frames.heldout()
    with atomic_write(path) as staged:
        save_tensors({name: tensor.contiguous() for name, tensor in stored.items()}, staged)
    metadata = {
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
    write_json(path.with_suffix(".json"), metadata)
    return metadata


def psnr(autoencoder: Autoencoder, frames: Tensor) -> float:
    """PSNR in dB of the reconstructions of `frames` uint8 [N, 3, H, W], averaged over frames.

    10 log10(255^2 / mean squared error) per frame, of reconstructions rounded to 8 bits.
    """
    ratios = []
    for part in torch.split(frames, _BATCH):
        decoded = ((autoencoder.decode(autoencoder.encode(to_pixels(part))) + 1) * 127.5).round().cpu()
        error = (decoded - part.float()).square().mean((1, 2, 3))
        ratios.append(10 * torch.log10(255**2 / error.clamp_min(1e-6)))
    return torch.cat(ratios).mean().item()
