"""What a checkpoint holds of a run, and how a run goes on from it."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import far_scale
from far_scale.convert.model_dir import load_model
from far_scale.data.manifest import Manifest
from far_scale.data.scaling import LatentScaling
from far_scale.errors import UserError
from far_scale.model import FAR, FARConfig
from far_scale.recipe import Recipe
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece, LaneStates
from far_scale.train.curriculum import Stage
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments, set_adam_step, use_loaded_weights


def describe(recipe: Recipe, model: FAR, manifest: Manifest, scaling: LatentScaling) -> dict[str, Any]:
    """The part of state.json that stays the same over a run; the other part is `describe_stage`.

    Together they are enough to export the model without the run's data. Call it before the engine shards `model`:
    afterwards the parameters' shapes are gone.

    Args:
        manifest: of data.shards, whose autoencoder and scaling hold for all stages.
    """
    return {
        "parameters": {name: list(shape) for name, shape in parameter_shapes(model).items()},
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash(),
        "autoencoder": manifest.autoencoder.model_dump(mode="json"),
        "scaling": scaling.to_dict(),
        "frame_stride": recipe.data.frame_stride,
        "versions": {
            "far_scale": far_scale.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
    }


def describe_stage(stage: Stage, manifest: Manifest) -> dict[str, Any]:
    """The part of state.json that may change with the stage; `manifest` is that of the stage's shard set."""
    return {
        "stage": stage.index,
        "model": stage.config.to_dict(),
        "latent_shape": list(manifest.latent_shape),
        "fps": manifest.fps,
    }


def load_start_weights(model: FAR, folder: str) -> None:
    """Put the weights of a model directory into `model`, before the engine shards it.

    Raises:
        UserError: it is no model directory, or one of another shape.
    """
    found = load_model(folder, dtype=torch.float32)
    own, theirs = model.config.to_dict(), found.config.to_dict()
    # These two change nothing that is stored.
    differing = [key for key in own if key not in ("window", "condition_dropout") and own[key] != theirs[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"train.start_from={folder}: that model's {key} is {theirs[key]}, the recipe's model has {own[key]}; "
            "make the recipe's model section fit it, or start from another"
        )
    model.load_state_dict(found.state_dict())


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


def restore(run: Path, step: int, engine: Any, ema: ShardedEMA, recipe: Recipe, stage: Stage) -> LaneStates:
    """Load the checkpoint of `step` into engine and EMA; returns the lanes' states.

    Args:
        stage: the one that `step` steps end in by the recipe.

    Raises:
        UserError: it is not whole, or was written by another model or recipe.
    """
    folder = checkpoint.step_folder(run, step)
    state = checkpoint.read_state(folder)
    if state.get("stage", 0) != stage.index:
        raise UserError(
            f"{folder}: written in stage {state.get('stage', 0) + 1} of a curriculum, by the recipe step {step} is of "
            f"stage {stage.index + 1}; the stages up to a checkpoint cannot change within a run"
        )
    config, now = {**FARConfig(1, 1).to_dict(), **state["model"]}, stage.config.to_dict()
    if config != now:
        changed = [key for key in now if config.get(key) != now[key]]
        raise UserError(
            f"{folder}: this is another model's checkpoint (model.{changed[0]} was {config.get(changed[0])}, "
            f"the recipe has {now[changed[0]]}); use the recipe it was trained with, or another run_dir"
        )
    if state["recipe"]["data"]["lanes"] != recipe.data.lanes:
        raise UserError(
            f"{folder}: written with data.lanes {state['recipe']['data']['lanes']}, the recipe has "
            f"{recipe.data.lanes}; lanes cannot change within a run"
        )
    checkpoint.load(folder, pieces(engine, ema))
    set_adam_step(engine, step)
    use_loaded_weights(engine)
    return {int(lane): position for lane, position in state["lanes"].items()}
