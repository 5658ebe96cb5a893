"""What has changed between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from far_scale.config.recipe import Recipe
from far_scale.data.loader.scaling import LatentScaling
from far_scale.utils.io import flatten


@dataclass(frozen=True)
class Changes:
    """Lines like `optimizer.learning_rate 0.0001 -> 0.0002`.

    Attributes:
        of_result: what makes another run of it.
        harmless: what changes the result by rounding at most, or not at all.
    """

    of_result: list[str]
    harmless: list[str]


def changes(state: dict[str, Any], now: dict[str, Any], recipe: Recipe) -> Changes:
    """Compare a checkpoint's state with what the run would write into the next one.

    Recipe keys count as `Recipe.result_values` has them. More train.steps than before are harmless where the learning
    rate is constant, since the steps so far would have been the same.

    Args:
        state: of the checkpoint.
        now: the same keys of the run: recipe, versions, ranks, scaling, autoencoder and, unless its data are not needed
            any more, shard_set and latent_shape.
        recipe: the run's.
    """
    old, new = flatten(state["recipe"]), flatten(now["recipe"])
    decisive_old, decisive_new = flatten(_result_values(state["recipe"])), flatten(recipe.result_values())
    if recipe.optimizer.schedule == "constant" and not recipe.curriculum:
        decisive_old.pop("train.steps", None)
        decisive_new.pop("train.steps", None)
    # It was read before the first step.
    decisive_old.pop("train.start_from", None)
    decisive_new.pop("train.start_from", None)
    of_result = _differences(decisive_old, decisive_new)
    was, is_ = state.get("shard_set"), now.get("shard_set")
    if was is not None and is_ is not None and was != is_:
        mixed = any(isinstance(values.get("data.shards"), list) for values in (old, new))
        what = "the mixture's shard sets or weights" if mixed else "the shard set's manifest"
        of_result.append(f"{what} {was[:12]} -> {is_[:12]}")
    of_result += _of_latents(state, now)
    listed = {line.split(" ", 1)[0] for line in of_result}
    if new.get("train.start_from") is not None:
        listed.add("train.start_from")  # see Resume.check_start_from
    harmless = [line for line in _differences(old, new) if line.split(" ", 1)[0] not in listed]
    harmless += _differences(state["versions"], now["versions"])
    if state.get("ranks") not in (None, now["ranks"]):
        harmless.append(f"ranks {state['ranks']} -> {now['ranks']}")
    return Changes(of_result, harmless)


def _of_latents(state: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What the model's latents are, where it is not what it was: the weights know the old ones."""
    lines = []
    if "scaling" in state and "scaling" in now:
        scalings = [LatentScaling.from_dict(values["scaling"]) for values in (state, now)]
        if (words := scalings[0].differences(scalings[1])) is not None:
            lines.append(f"the latents' scaling, {words[0]} -> {words[1]}")
    for key, name in (("autoencoder", "the latents' autoencoder"), ("latent_shape", "the latents' shape")):
        was, is_ = state.get(key), now.get(key)
        if was is not None and is_ is not None and was != is_:
            if key == "autoencoder":
                was, is_ = (f"{info['name']} ({info['weight_hash'][:12]})" for info in (was, is_))
            lines.append(f"{name}, {was} -> {is_}")
    return lines


def _result_values(recipe: dict[str, Any]) -> dict[str, Any]:
    try:
        return Recipe.model_validate(recipe).result_values()
    except ValidationError:  # written by a version with other keys: all of them count
        return recipe


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = list(dict.fromkeys([*new, *old]))
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
