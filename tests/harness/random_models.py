"""Model directories with random weights: the velocity of a fresh model would be zero."""

from __future__ import annotations

from pathlib import Path

import torch

from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, save_model_dir
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.model import FAR, FARConfig


def write_random_model(folder: Path, config: FARConfig, shards: Path, std: float, step: int) -> Path:
    """Write a model for the latents of `shards` with normal weights of this std; returns the folder."""
    manifest, draw = Manifest.read(shards), torch.Generator().manual_seed(0)
    state = {name: torch.randn(x.shape, generator=draw) * std for name, x in FAR(config).state_dict().items()}
    metadata = ModelMetadata(
        autoencoder=manifest.autoencoder,
        scaling=LatentScaling.of(manifest, "channel"),
        latent_shape=manifest.latent_shape,
        fps=manifest.fps,
        training=TrainingMetadata(step=step, recipe_hash="r", weights="ema", far_scale="0"),
    )
    save_model_dir(folder, config, state, metadata)
    return folder
