"""From a checkpoint, written by any number of ranks under any ZeRO stage, to a model directory, in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

from far_scale.convert.model_dir import (
    CONFIG_FILE,
    ModelCard,
    TrainingCard,
    is_model_dir,
    read_config,
    save_model_dir,
)
from far_scale.data.manifest import AutoencoderInfo
from far_scale.data.scaling import LatentScaling
from far_scale.errors import UserError
from far_scale.model import FARConfig
from far_scale.train import checkpoint


def export(run: str | Path, step: int | None, weights: Literal["ema", "model"], out: str | Path) -> int:
    """Write the float32 weights of a run's checkpoint as a model directory, if it is not there already.

    Args:
        run: the run directory.
        step: which checkpoint; the latest where None.
        weights: the EMA or the trained weights themselves.
        out: the model directory to write.

    Returns:
        The step exported.

    Raises:
        UserError: no such checkpoint, or it is not whole.
    """
    run = Path(run)
    step = checkpoint.latest_step(run) if step is None else step
    if step is None:
        raise UserError(f"{run}: there is no checkpoint in this run yet; train it first")
    folder = checkpoint.step_folder(run, step)
    state = checkpoint.read_state(folder)
    card = ModelCard(
        autoencoder=AutoencoderInfo(**state["autoencoder"]),
        scaling=LatentScaling.from_dict(state["scaling"]),
        latent_shape=tuple(state["latent_shape"]),
        fps=state["fps"],
        frame_stride=state["frame_stride"],
        training=TrainingCard(
            step=step,
            recipe_hash=state["recipe_hash"],
            weights=weights,
            far_scale=state["versions"]["far_scale"],
        ),
    )
    config = FARConfig.from_dict(state["model"])
    if not _is_current(Path(out), folder, config, card):
        tensors = _read_weights(folder, state, "ema" if weights == "ema" else "weight")
        save_model_dir(out, config, tensors, card)
    return step


def _is_current(out: Path, folder: Path, config: FARConfig, card: ModelCard) -> bool:
    """Whether `out` is this very export already, made after the checkpoint was."""
    if not is_model_dir(out) or read_config(out) != (config, card):
        return False
    return (out / CONFIG_FILE).stat().st_mtime > (folder / "state.json").stat().st_mtime


def _read_weights(folder: Path, state: dict[str, Any], kind: str) -> dict[str, torch.Tensor]:
    """The parameters by name, float32, in their shapes."""
    tensors = {name: torch.empty(shape) for name, shape in state["parameters"].items()}
    pieces = {
        f"{kind}/{name}": checkpoint.FlatPiece(math.prod(tensor.shape), 0, tensor.view(-1))
        for name, tensor in tensors.items()
    }
    checkpoint.load(folder, pieces, alone=True)
    return tensors
