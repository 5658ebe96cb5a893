"""Run directories with a checkpoint of a small model, written without training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from far_scale.model import FAR, FARConfig
from far_scale.train import checkpoint
from harness.latent_sets import FACTS
from harness.official_cases import official_weights

SMALL = FARConfig(layers=2, heads=1, channels=4, window=4, actions=4, context_patch=2)
"""Fits the shard sets of `latent_sets`."""


def write_run(run: Path, step: int = 7, factor: float = 1.0, **more: Any) -> None:
    """A checkpoint of SMALL's parameters alone, as training writes it: `factor` times `trained_state`; EMA twice.

    `more` is added to its state.
    """
    parameters = {name: p for name, p in trained_state().items() if name in dict(FAR(SMALL).named_parameters())}
    pieces = {
        f"{kind}/{name}": checkpoint.FlatPiece(tensor.numel(), 0, (times * factor * tensor).flatten())
        for name, tensor in parameters.items()
        for kind, times in (("weight", 1), ("ema", 2))
    }
    state = {
        "model": SMALL.to_dict(),
        "parameters": {name: list(tensor.shape) for name, tensor in parameters.items()},
        "recipe_hash": "ab",
        "autoencoder": FACTS.autoencoder.model_dump(),
        "scaling": {"shift": [0.0] * 4, "scale": [0.5] * 4},
        "latent_shape": list(FACTS.latent_shape),
        "fps": 8.0,
        "frame_stride": 1,
        "versions": {"far_scale": "0"},
        **more,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # this process alone is meant
        checkpoint.save(run, step, pieces, state, keep=9)


def trained_state() -> dict[str, torch.Tensor]:
    """SMALL's state dict, its parameters random, its buffers as they start."""
    model = FAR(SMALL)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: tensor.clone() for name, tensor in (model.state_dict() | official_weights(shapes)).items()}
