"""Checks whether a run may resume from a checkpoint: what has changed since, and what does not fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from far_scale.config.recipe import Recipe
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.records import classes_differ
from far_scale.model import FARConfig
from far_scale.train.curriculum import Stage, stage_of
from far_scale.utils.errors import UserError
from far_scale.utils.io import flatten


@dataclass(frozen=True)
class Changes:
    """Lines like `optimizer.learning_rate 0.0001 -> 0.0002`.

    Attributes:
        affecting_result: changes that give another result.
        harmless: changes that alter the result by rounding at most.
    """

    affecting_result: list[str]
    harmless: list[str]


def find_changes(state: dict[str, Any], now: dict[str, Any], recipe: Recipe) -> Changes:
    """Compare a checkpoint's state with the state that the run would write into its next checkpoint.

    The recipe keys of `Recipe.result_values` change the result. More train.steps are harmless with a constant learning
    rate, since the steps so far would have been the same.

    Args:
        state: of the checkpoint.
        now: the same keys of the run: recipe, versions, ranks, scaling, autoencoder and, unless its data are no longer
            needed, shard_set and latent_shape.
        recipe: the run's.
    """
    old, new = flatten(state["recipe"]), flatten(now["recipe"])
    old_result, new_result = flatten(_result_values(state["recipe"])), flatten(recipe.result_values())
    if recipe.optimizer.schedule == "constant" and not recipe.curriculum:
        old_result.pop("train.steps", None)
        new_result.pop("train.steps", None)
    # It was read before the first step.
    old_result.pop("train.start_from", None)
    new_result.pop("train.start_from", None)
    affecting_result = _differences(old_result, new_result)
    old_set, new_set = state.get("shard_set"), now.get("shard_set")
    if old_set is not None and new_set is not None and old_set != new_set:
        is_mixture = any(isinstance(values.get("data.shards"), list) for values in (old, new))
        what = "the mixture's shard sets or weights" if is_mixture else "the shard set's manifest"
        affecting_result.append(f"{what} {old_set[:12]} -> {new_set[:12]}")
    affecting_result += _latent_changes(state, now)
    reported = {line.split(" ", 1)[0] for line in affecting_result}
    if new.get("train.start_from") is not None:
        reported.add("train.start_from")  # see Resume.check_start_from
    harmless = [line for line in _differences(old, new) if line.split(" ", 1)[0] not in reported]
    harmless += _differences(state["versions"], now["versions"])
    if state.get("ranks") not in (None, now["ranks"]):
        harmless.append(f"ranks {state['ranks']} -> {now['ranks']}")
    return Changes(affecting_result, harmless)


def _latent_changes(state: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Changes of the latents, which the weights were trained on."""
    lines = []
    if "scaling" in state and "scaling" in now:
        old_scaling, new_scaling = (LatentScaling.from_dict(values["scaling"]) for values in (state, now))
        if (differing := old_scaling.differences(new_scaling)) is not None:
            lines.append(f"the latents' scaling, {differing[0]} -> {differing[1]}")
    for key, name in (("autoencoder", "the latents' autoencoder"), ("latent_shape", "the latents' shape")):
        old, new = state.get(key), now.get(key)
        if old is not None and new is not None and old != new:
            if key == "autoencoder":
                old, new = (f"{info['name']} ({info['weight_hash'][:12]})" for info in (old, new))
            lines.append(f"{name}, {old} -> {new}")
    return lines


def _result_values(recipe: dict[str, Any]) -> dict[str, Any]:
    try:
        return Recipe.model_validate(recipe).result_values()
    except ValidationError:  # written by a version with other keys: all of them count
        return recipe


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = list(dict.fromkeys([*new, *old]))
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def check_same_classes(where: Path, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError if the classes of the run's labels are not those of the checkpoint."""
    if (difference := classes_differ(now.get("classes"), state.get("classes"))) is not None:
        raise UserError(
            f"{where}: the classes of data.shards are not those of this checkpoint: {difference}; encode the videos "
            "with --classes-of the set that it was trained on, or use another run_dir"
        )


def check_fits(folder: Path, state: dict[str, Any], plan: list[Stage]) -> None:
    """Raises UserError if a checkpoint is of another model or stage than the run's `plan` has at its step."""
    step = state["step"]
    stage = stage_of(plan, step - 1)
    if state.get("stage", 0) != stage.index:
        raise UserError(
            f"{folder}: written in stage {state.get('stage', 0) + 1} of a curriculum, by the recipe step {step} is of "
            f"stage {stage.index + 1}; the stages up to a checkpoint cannot change within a run"
        )
    old, new = {**asdict(FARConfig(1, 1)), **state["model"]}, asdict(stage.config)
    if old != new:
        key = next(key for key in new if old.get(key) != new[key])
        raise UserError(
            f"{folder}: this is another model's checkpoint (model.{key} was {old.get(key)}, the recipe has "
            f"{new[key]}); use the recipe it was trained with, or another run_dir"
        )
