"""What a checkpoint holds of a run, and how a run goes on from it."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import far_scale
from far_scale.data.manifest import Manifest
from far_scale.data.scaling import LatentScaling
from far_scale.errors import UserError
from far_scale.model import FAR
from far_scale.recipe import Recipe
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments, set_adam_step, use_loaded_weights


def describe(recipe: Recipe, model: FAR, manifest: Manifest, scaling: LatentScaling) -> dict[str, Any]:
    """The part of state.json that stays the same over a run: enough to export the model without the run's data.

    Call it before the engine shards `model`: afterwards the parameters' shapes are gone.
    """
    return {
        "model": model.config.to_dict(),
        "parameters": {name: list(shape) for name, shape in parameter_shapes(model).items()},
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash(),
        "autoencoder": manifest.autoencoder.model_dump(mode="json"),
        "scaling": scaling.to_dict(),
        "latent_shape": list(manifest.latent_shape),
        "fps": manifest.fps,
        "frame_stride": recipe.data.frame_stride,
        "versions": {
            "far_scale": far_scale.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
    }


def parameter_shapes(model: FAR) -> dict[str, torch.Size]:
    """Shapes of the whole parameters by name, before or after ZeRO-3 has cut them."""
    return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in model.named_parameters()}


def pieces(engine: Any, ema: ShardedEMA) -> dict[str, FlatPiece]:
    """This rank's pieces of all that training changes, by the names they are stored under."""
    own = {}
    for fragment, average in zip(fragments(engine), ema.weights, strict=True):
        tensors = {
            "weight": fragment.weight,
            "exp_avg": fragment.exp_avg,
            "exp_avg_sq": fragment.exp_avg_sq,
            "ema": average,
        }
        for kind, tensor in tensors.items():
            own[f"{kind}/{fragment.name}"] = FlatPiece(fragment.size, fragment.offset, tensor)
    return own


def restore(run: Path, step: int, engine: Any, ema: ShardedEMA, card: dict[str, Any]) -> dict[int, dict[str, int]]:
    """Load the checkpoint of `step` into engine and EMA; returns the lanes' states.

    Raises:
        UserError: it is not whole, or was written by another model or recipe.
    """
    folder = checkpoint.step_folder(run, step)
    state = checkpoint.read_state(folder)
    if state["model"] != card["model"]:
        changed = [key for key in card["model"] if state["model"].get(key) != card["model"][key]]
        raise UserError(
            f"{folder}: this is another model's checkpoint (model.{changed[0]} was {state['model'].get(changed[0])}, "
            f"the recipe has {card['model'][changed[0]]}); use the recipe it was trained with, or another run_dir"
        )
    if state["recipe"]["data"]["lanes"] != card["recipe"]["data"]["lanes"]:
        raise UserError(
            f"{folder}: written with data.lanes {state['recipe']['data']['lanes']}, the recipe has "
            f"{card['recipe']['data']['lanes']}; lanes cannot change within a run"
        )
    checkpoint.load(folder, pieces(engine, ema))
    set_adam_step(engine, step)
    use_loaded_weights(engine)
    return {int(lane): position for lane, position in state["lanes"].items()}
