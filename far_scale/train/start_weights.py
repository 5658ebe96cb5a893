"""`train.start_from`: a new run's first weights out of a model directory, where they know the run's latents."""

from __future__ import annotations

from far_scale.config.recipe import Recipe
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, read_any_config
from far_scale.data.loader.mixture import MixtureManifest
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.records import classes_differ
from far_scale.model import FAR
from far_scale.train.resume import load_start_weights
from far_scale.utils.errors import UserError


def start_from(
    model: FAR, recipe: Recipe, manifest: Manifest | MixtureManifest, scaling: LatentScaling, accept: bool
) -> str:
    """Put the weights of the model directory `train.start_from` into `model`, before the engine shards it.

    Args:
        model: of the recipe.
        recipe: which has train.start_from.
        manifest: of the first stage's shard set.
        scaling: of the run's latents.
        accept: take them also where they know other latents.

    Returns:
        What was done, as a line for the events: where the weights come from, and what of their latents is another or
        not known.

    Raises:
        UserError: it is no model directory, one of another shape, damaged, or, unless accepted, of other latents.
    """
    folder = str(recipe.train.start_from)
    card = read_any_config(folder)[1]
    found = other_latents(card, recipe, manifest, scaling) if isinstance(card, ModelMetadata) else []
    if found and not accept:
        raise UserError(
            f"train.start_from={folder}: that model was trained on other latents: {'; '.join(found)}; or start with "
            "--accept-changes to train it on these all the same"
        )
    load_start_weights(model, folder)
    training = card.training
    if isinstance(training, TrainingMetadata):
        whose = f"the {training.weights} weights of step {training.step} in {folder}"
    else:
        whose = f"the weights in {folder}, imported from {training.imported_from}"
    if not isinstance(card, ModelMetadata):
        return f"starting from {whose}; it does not say which latents they were trained on"
    return f"starting from {whose}" + (f"; accepted: trained on other latents: {'; '.join(found)}" if found else "")


def other_latents(
    card: ModelMetadata, recipe: Recipe, manifest: Manifest | MixtureManifest, scaling: LatentScaling
) -> list[str]:
    """In which the latents that a model knows differ from those of a run, a line each with both values and the fix."""
    lines = []
    theirs, ours = card.autoencoder, manifest.autoencoder
    if theirs.weight_hash != ours.weight_hash:
        lines.append(
            f"its autoencoder is {theirs.name} ({theirs.weight_hash[:12]}), the shard set's {ours.name} "
            f"({ours.weight_hash[:12]}): set data.autoencoder={theirs.name} and data.shards to a set made by it"
        )
    if card.latent_shape != tuple(manifest.latent_shape):
        lines.append(
            f"its frame latents are {list(card.latent_shape)}, the shard set's {list(manifest.latent_shape)}: set "
            "data.latent_shape and data.shards to a set of these"
        )
    if card.frame_stride != recipe.data.frame_stride:
        lines.append(
            f"its frame stride is {card.frame_stride}, the recipe's {recipe.data.frame_stride}: set "
            f"data.frame_stride={card.frame_stride}"
        )
    if recipe.model.condition == "label" and (difference := classes_differ(manifest.classes, card.classes)) is not None:
        lines.append(
            f"its classes are not the shard set's: {difference}: encode the videos with --classes-of the set that it "
            "was trained on"
        )
    if (words := card.scaling.differences(scaling)) is not None:
        kinds = ("factor", "channel")
        fitting = [k for k in kinds if card.scaling.differences(LatentScaling.of(manifest, k)) is None]  # type: ignore[arg-type]
        fix = f"data.scaling={fitting[0]}" if fitting else "data.shards to the set that it was trained on"
        lines.append(f"its scaling of latents is {words[0]}, the run's {words[1]}: set {fix}")
    return lines
