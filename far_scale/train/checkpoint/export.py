"""Exports a checkpoint of any rank count and ZeRO stage as a model directory or an official file, in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from far_scale.convert.model_dir import (
    ModelMetadata,
    TrainingMetadata,
    empty_model,
    is_intact,
    load_model,
    read_any_config,
    save_model_dir,
)
from far_scale.convert.official import from_far_scale, write_official
from far_scale.data.frame_counts import FrameCounts, max_frames
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.model import FARConfig
from far_scale.model.hub import find_model
from far_scale.model.model_files import CONFIG_FILE
from far_scale.train import checkpoint
from far_scale.utils.errors import UserError


def export(run: str | Path, step: int | None, weights: Literal["ema", "model"], out: str | Path) -> int:
    """`export_if_needed`; returns the step."""
    return export_if_needed(run, step, weights, out)[0]


def export_if_needed(
    run: str | Path,
    step: int | None,
    weights: Literal["ema", "model"],
    out: str | Path,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, bool]:
    """Write the weights of a run's checkpoint as a model directory, unless `out` has them already.

    It has them if config.json names this content of a checkpoint and these weights, they are stored in this dtype, and
    all files are as they were written. Any other model directory is replaced, with its card.

    Args:
        run: the run directory.
        step: of the checkpoint; None for the latest.
        weights: the EMA or the trained weights themselves.
        out: the model directory to write.
        dtype: of the written weights; the checkpoint's float32 is rounded to the nearest number of it.

    Returns:
        The exported step, and whether it was written.

    Raises:
        UserError: there is no such checkpoint, or it is damaged; or a weight is not finite in `dtype`.
    """
    folder, state, fingerprint = _open(Path(run), step)
    metadata = ModelMetadata(
        autoencoder=AutoencoderInfo(**state["autoencoder"]),
        scaling=LatentScaling.from_dict(state["scaling"]),
        latent_shape=tuple(state["latent_shape"]),
        fps=state["fps"],
        frame_stride=state["frame_stride"],
        classes=None if state.get("classes") is None else tuple(state["classes"]),
        context_frames=_most_context_frames(state),
        training=TrainingMetadata(
            step=state["step"],
            recipe_hash=state["recipe_hash"],
            weights=weights,
            far_scale=state["versions"]["far_scale"],
            checkpoint=fingerprint,
        ),
    )
    config = FARConfig.from_dict(state["model"])
    is_needed = not is_intact(out, config, metadata, dtype)
    if is_needed:
        save_model_dir(out, config, _round(_read_weights(folder, state, weights), dtype, folder), metadata)
    return state["step"], is_needed


def _most_context_frames(state: dict[str, Any]) -> int | None:
    """The most coarse context frames that a clip of the training can have; None in a model without context."""
    recipe, model = state.get("recipe"), state["model"]
    if recipe is None or not model.get("context_patch"):
        return None
    stages = recipe.get("curriculum") or [{}]
    drawn = TypeAdapter(FrameCounts)  # in JSON its numbers may be text
    counts = [drawn.validate_python(stage.get("frames") or recipe["data"]["frames"]) for stage in stages]
    longest: int = max(map(max_frames, counts))
    window: int = model["window"]
    return max(0, longest - window)


def export_official(source: str | Path, step: int | None, weights: Literal["ema", "model"], out: str | Path) -> str:
    """Write weights as a file that the official code loads strictly.

    Args:
        source: a run directory, a model directory, or a repository of the hub.
        step: of a run's checkpoint; None for the latest.
        weights: of a run; a model directory has one set of weights.
        out: the .pth file to write.

    Returns:
        The exported weights, as text.

    Raises:
        UserError: there is no such checkpoint or model, or it is damaged; or a step of a model directory.
    """
    source = find_model(source)
    if not (source / CONFIG_FILE).is_file():
        folder, state, _ = _open(source, step)
        config = FARConfig.from_dict(state["model"])
        write_official(out, from_far_scale(config, _read_weights(folder, state, weights)))
        return f"{weights} weights of step {state['step']}"
    if step is not None:
        raise UserError(f"{source}: a model directory holds one set of weights; leave --step out, or name the run")
    config, metadata = read_any_config(source)
    write_official(out, from_far_scale(config, load_model(source).state_dict()))
    if isinstance(metadata.training, TrainingMetadata):
        return f"{metadata.training.weights} weights of step {metadata.training.step}"
    return f"weights imported from {metadata.training.imported_from}"


def _open(run: Path, step: int | None) -> tuple[Path, dict[str, Any], str]:
    """A checkpoint's folder, state.json and fingerprint, after a check of all its files."""
    step = checkpoint.latest_step(run) if step is None else step
    if step is None:
        raise UserError(f"{run}: there is no checkpoint in this run yet; train it first")
    folder = checkpoint.step_folder(run, step)
    state = checkpoint.read_state(folder)  # its errors are more helpful
    if (problem := checkpoint.damage(folder)) is not None:
        what = problem.removeprefix(f"{folder}/")
        raise UserError(f"{folder}: damaged: {what}; export another step, or copy this checkpoint again")
    return folder, state, checkpoint.fingerprint(folder)


def _read_weights(folder: Path, state: dict[str, Any], weights: Literal["ema", "model"]) -> dict[str, torch.Tensor]:
    """The model's float32 state dict: parameters from the checkpoint, and buffers."""
    tensors = {name: torch.empty(shape) for name, shape in state["parameters"].items()}
    kind = "ema" if weights == "ema" else "weight"
    pieces = {
        f"{kind}/{name}": checkpoint.FlatPiece(math.prod(tensor.shape), 0, tensor.view(-1))
        for name, tensor in tensors.items()
    }
    checkpoint.load(folder, pieces, single_process=True)
    return tensors | _buffers(FARConfig.from_dict(state["model"]))


def _round(tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    """`tensors` in `dtype`; a UserError if that makes infinities of them, or they are not finite before."""
    if dtype == torch.float32:
        return tensors
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in rounded.items():
        if not tensor.isfinite().all():
            largest, kind = tensors[name].abs().max().item(), str(dtype).removeprefix("torch.")
            raise UserError(
                f"{folder}: the largest value of {name} is {largest:.4g}, and {kind} ends at "
                f"{torch.finfo(dtype).max:.4g}; export it with --dtype float32, or another step"
            )
    return rounded


def _buffers(config: FARConfig) -> dict[str, torch.Tensor]:
    """The model's buffers with their initial values. They are never read or trained; the official code has them."""
    return {
        name: torch.ones(buffer.shape) if name.endswith("norm_q.weight") else torch.zeros(buffer.shape)
        for name, buffer in empty_model(config).named_buffers()
    }
