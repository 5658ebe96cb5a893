"""What a checkpoint holds of a run: the metadata in its state.json, and this rank's pieces of the tensors."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import far_scale
from far_scale.config.recipe import Recipe
from far_scale.data.loader.mixture import MixtureManifest
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR
from far_scale.train.checkpoint.pieces import FlatPiece
from far_scale.train.curriculum import Stage
from far_scale.train.deepspeed_adapter import whole_shape
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments


def run_metadata(
    recipe: Recipe,
    model: FAR,
    manifest: Manifest | MixtureManifest,
    scaling: LatentScaling,
    processes: Processes,
) -> dict[str, Any]:
    """The part of state.json that is constant over a run; the other part is `stage_metadata`.

    Together they are enough to export the model without the run's data. Call it before the engine shards `model`,
    which hides the parameters' shapes.

    Args:
        manifest: of data.shards; its autoencoder and scaling hold for all stages.
    """
    return {
        **_class_names(manifest),
        "parameters": {name: list(shape) for name, shape in parameter_shapes(model).items()},
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash(),
        "autoencoder": manifest.autoencoder.model_dump(mode="json"),
        "scaling": scaling.to_dict(),
        "frame_stride": recipe.data.frame_stride,
        "ranks": processes.world_size,
        "versions": {
            "far_scale": far_scale.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
    }


def stage_metadata(stage: Stage, manifest: Manifest | MixtureManifest) -> dict[str, Any]:
    """The part of state.json that may change with the stage; `manifest` is that of the stage's shard set."""
    return {
        **_class_names(manifest),
        "stage": stage.index,
        "model": stage.config.to_dict(),
        "latent_shape": list(manifest.latent_shape),
        "fps": manifest.fps,
        "shard_set": manifest.fingerprint(),
    }


def _class_names(manifest: Manifest | MixtureManifest) -> dict[str, Any]:
    """The names of the labels' classes, where they are known."""
    return {} if manifest.classes is None else {"classes": list(manifest.classes)}


def parameter_shapes(model: FAR) -> dict[str, torch.Size]:
    """Shapes of the whole parameters by name, before or after ZeRO-3 has sharded them."""
    return {name: whole_shape(parameter) for name, parameter in model.named_parameters()}


def training_pieces(engine: Any, ema: ShardedEMA) -> dict[str, FlatPiece]:
    """This rank's pieces of all tensors that training changes, by the names they are stored under."""
    pieces = {}
    for fragment, average in zip(fragments(engine), ema.weights, strict=True):
        tensors = {
            "weight": fragment.weight,
            "exp_avg": fragment.exp_avg,
            "exp_avg_sq": fragment.exp_avg_sq,
            "ema": average,
        }
        for kind, tensor in tensors.items():
            pieces[f"{kind}/{fragment.name}"] = FlatPiece(fragment.size, fragment.offset, tensor)
    return pieces
