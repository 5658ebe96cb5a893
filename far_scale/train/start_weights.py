"""`train.start_from`: the initial weights of a new run from a model directory that was trained on the same latents."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, load_model, read_any_config
from far_scale.data.loader.mixture import MixtureManifest
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.records import classes_differ
from far_scale.model import FAR
from far_scale.utils.errors import UserError


def start_from(
    model: FAR,
    folder: str,
    manifest: Manifest | MixtureManifest,
    scaling: LatentScaling,
    frame_stride: int,
    accept_changes: bool,
) -> str:
    """Load the weights of a model directory into `model`, before the engine shards it.

    Args:
        model: the run's.
        folder: the model directory.
        manifest: of the first stage's shard set.
        scaling: of the run's latents.
        frame_stride: the recipe's data.frame_stride.
        accept_changes: load them even if they were trained on other latents.

    Returns:
        A line for the events: where the weights come from, and how their latents differ, or that they are unknown.

    Raises:
        UserError: it is not a model directory, one of another shape, damaged, or, unless accepted, of other latents.
    """
    metadata = read_any_config(folder)[1]
    differences = []
    if isinstance(metadata, ModelMetadata):
        differences = latent_differences(metadata, model, manifest, scaling, frame_stride)
    if differences and not accept_changes:
        raise UserError(
            f"train.start_from={folder}: that model was trained on other latents: {'; '.join(differences)}; or start "
            "with --accept-changes to train it on these nevertheless"
        )
    context_from_window = load_start_weights(model, folder)
    training = metadata.training
    if isinstance(training, TrainingMetadata):
        weights = f"the {training.weights} weights of step {training.step} in {folder}"
    else:
        weights = f"the weights in {folder}, imported from {training.imported_from}"
    if context_from_window:
        weights += "; it has no context, whose weights start as those of the window"
    if not isinstance(metadata, ModelMetadata):
        return f"starting from {weights}; the latents that they were trained on are unknown"
    accepted = f"; accepted: trained on other latents: {'; '.join(differences)}" if differences else ""
    return f"starting from {weights}{accepted}"


def start_scaling(folder: str) -> LatentScaling:
    """The scaling of the latents that a model directory was trained on.

    Raises:
        UserError: it is not a model directory, or its scaling is unknown.
    """
    metadata = read_any_config(folder)[1]
    if not isinstance(metadata, ModelMetadata):
        raise UserError(
            f"train.start_from={folder}: the scaling of that model's latents is unknown; set data.scaling to factor or "
            "channel, or import the model again with --shards, the set of its latents"
        )
    return metadata.scaling


def latent_differences(
    metadata: ModelMetadata,
    model: FAR,
    manifest: Manifest | MixtureManifest,
    scaling: LatentScaling,
    frame_stride: int,
) -> list[str]:
    """How the latents of a model directory differ from the run's: a line each, with both values and the fix."""
    lines = []
    theirs, ours = metadata.autoencoder, manifest.autoencoder
    if theirs.weight_hash != ours.weight_hash:
        lines.append(
            f"its autoencoder is {theirs.name} ({theirs.weight_hash[:12]}), the shard set's {ours.name} "
            f"({ours.weight_hash[:12]}): set data.autoencoder={theirs.name} and data.shards to a set made by it"
        )
    if metadata.latent_shape != tuple(manifest.latent_shape):
        lines.append(
            f"its frame latents are {list(metadata.latent_shape)}, the shard set's {list(manifest.latent_shape)}: set "
            "data.latent_shape and data.shards to a set of these"
        )
    if metadata.frame_stride != frame_stride:
        lines.append(
            f"its frame stride is {metadata.frame_stride}, the recipe's {frame_stride}: set "
            f"data.frame_stride={metadata.frame_stride}"
        )
    if model.config.labels and (difference := classes_differ(manifest.classes, metadata.classes)) is not None:
        lines.append(
            f"its classes are not the shard set's: {difference}: encode the videos with --classes-of the set that it "
            "was trained on"
        )
    if (scalings := metadata.scaling.differences(scaling)) is not None:
        kinds = ("factor", "channel")
        matching = [k for k in kinds if metadata.scaling.differences(LatentScaling.of(manifest, k)) is None]  # type: ignore[arg-type]
        fix = f"data.scaling={matching[0]}" if matching else "data.scaling=start to keep the model's"
        lines.append(f"its scaling of latents is {scalings[0]}, the run's {scalings[1]}: set {fix}")
    return lines


def load_start_weights(model: FAR, folder: str) -> bool:
    """Load the weights of a model directory into `model`, before the engine shards it.

    A FAR-Long can start from a window-only model. Its context weights then start as those of the window, see
    `context_weights`: from random ones, a model that already knows its window learns for a long time to ignore them.

    Returns:
        Whether the context weights come from the window's.

    Raises:
        UserError: it is not a model directory, or one of another shape.
    """
    start_model = load_model(folder, dtype=torch.float32)
    ours, theirs = asdict(model.config), asdict(start_model.config)
    context_from_window = bool(ours["context_patch"]) and not theirs["context_patch"]
    no_shape = {"window", "condition_dropout", "causal"}  # these do not change stored tensors
    if context_from_window:
        no_shape.add("context_patch")
    differing = [key for key in ours if key not in no_shape and ours[key] != theirs[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"train.start_from={folder}: that model's {key} is {theirs[key]}, the recipe's model has {ours[key]}; "
            "make the recipe's model section fit it, or start from another"
        )
    weights = start_model.state_dict()
    if context_from_window:
        weights |= context_weights(model, weights)
    model.load_state_dict(weights)
    return context_from_window


def context_weights(model: FAR, window: dict[str, Tensor]) -> dict[str, Tensor]:
    """Context weights for a FAR-Long from the weights of a window-only model: each is a copy of the window's.

    The embedding of a coarse patch becomes the mean of the embeddings of the fine patches in it, so that a context
    frame looks to the model like a window frame of a lower resolution. With equal patches it is the same as a clean
    window frame.

    Args:
        model: the FAR-Long.
        window: the state dict of the window-only model.
    """
    config = model.config
    weights = {}
    for name, own in model.state_dict().items():
        if name == "context_patch_embedding.weight":
            times = config.context_patch // config.patch
            fine = window["patch_embedding.weight"].view(-1, config.channels, config.patch, config.patch)
            weights[name] = fine.repeat(1, 1, times, times).flatten(1) / times**2
        elif name.startswith("context_output."):
            weights[name] = own  # unused
        elif "context_" in name:
            weights[name] = window[name.replace("context_", "")].clone()
    return weights
