"""The typed recipe: everything a training run is told. `python -m far_scale.recipe` prints all keys.

A recipe is a YAML file that may extend another (`extends: NAME`); `key.sub=value` overrides it on the command line.
A wrong one is refused before any work, in one line with file, line, key and mend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from far_scale.errors import UserError, command_line
from far_scale.files import atomic_write
from far_scale.recipe_report import explain, reference
from far_scale.recipe_sections import (
    CheckpointSection,
    DataSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    SampleSection,
    Section,
    TrainSection,
)
from far_scale.recipe_yaml import read_document

if TYPE_CHECKING:
    from far_scale.model import FARConfig


class Recipe(Section):
    """A whole training run."""

    name: str
    """The run's name; not inherited by extends: without it, the file's name."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all randomness: weights, order of samples, noise, timesteps, dropout."""
    run_dir: str = Field(default="runs/{name}", validate_default=True)
    """Folder for all that the run writes; {name} stands for the name."""
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    train: TrainSection
    checkpoint: CheckpointSection
    log: LogSection
    sample: SampleSection

    @field_validator("run_dir")
    @classmethod
    def _put_name(cls, run_dir: str, info: ValidationInfo) -> str:
        return run_dir.replace("{name}", str(info.data.get("name")))

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        for key, problem in _impossible(self):
            raise PydanticCustomError("impossible", "{problem}", {"key": key, "problem": problem})
        return self

    def far_config(self) -> FARConfig:
        """The model's configuration."""
        from far_scale.model import FARConfig  # late: recipes are checked without loading torch

        model = self.model
        return FARConfig(
            layers=model.layers,
            heads=model.heads,
            patch=model.patch,
            channels=model.channels,
            window=model.window,
            actions=model.classes if model.condition == "action" else 0,
            labels=model.classes if model.condition == "label" else 0,
            condition_dropout=model.condition_dropout,
        )

    def resolved_yaml(self) -> str:
        """This recipe as one YAML text that needs no other file; load_recipe reads it back as an equal recipe."""
        values = self.model_dump(mode="json")
        if self.model.preset is not None:
            # Only where they differ from the preset, so that a preset laid over the resolved recipe still counts.
            preset = ModelSection.model_validate({"preset": self.model.preset})
            for key in ("layers", "heads"):
                if values["model"][key] == getattr(preset, key):
                    del values["model"][key]
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)

    def hash(self) -> str:
        """SHA-256 of all that changes the trained weights (beyond rounding): not names, folders, logs or sampling,
        nor how the work is split (ZeRO, activation checkpointing)."""
        values = self.model_dump(
            mode="json",
            exclude={
                "name": True,
                "run_dir": True,
                "checkpoint": True,
                "log": True,
                "sample": True,
                "model": {"preset"},
                "data": {"shards", "prefetch"},
                "train": {"zero_stage", "whole_below", "activation_checkpointing"},
            },
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the resolved YAML to `path`, atomically."""
        with atomic_write(path) as beside:
            beside.write_text(self.resolved_yaml(), encoding="utf-8")


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path_or_name: a file, or a bare name looked up in ./recipes and in the recipes/ folder beside the package.
        overrides: `key.sub=value`, the value written as in YAML; later ones win.

    Raises:
        UserError: one line with file, line, key and mend for all that is wrong.
    """
    document = read_document(path_or_name, overrides)
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, document, Recipe) from None


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Refuse a number of ranks (processes) that does not divide the lanes.

    Raises:
        UserError: lists the numbers that do.
    """
    lanes = recipe.data.lanes
    if lanes % ranks:
        divisors = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise UserError(
            f"{recipe.name}: data.lanes: {lanes} lanes cannot be shared evenly by {ranks} ranks; "
            f"start one of {divisors} ranks, or set data.lanes to a multiple of {ranks}"
        )


def _impossible(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every combination of keys that cannot work, as the key to mend and what is wrong."""
    model, data, sample = recipe.model, recipe.data, recipe.sample
    channels, height, width = data.latent_shape
    if model.condition == "none" and model.classes:
        yield "model.classes", f"{model.classes} classes, but model.condition is none; set it to label or action"
    if model.condition != "none" and not model.classes:
        yield (
            "model.classes",
            f"0 classes, but model.condition is {model.condition}; set the number of {model.condition}s",
        )
    if channels != model.channels:
        yield "data.latent_shape", f"{channels} channels, but model.channels is {model.channels}; make them equal"
    if height % model.patch or width % model.patch:
        yield "model.patch", f"{model.patch} does not divide the latent's {height} x {width}; choose a divisor of both"
    if data.frames > model.window:
        yield (
            "data.frames",
            f"{data.frames} frames do not fit model.window, {model.window}; lower the one or raise the other",
        )
    if recipe.optimizer.warmup_steps > recipe.train.steps:
        yield (
            "optimizer.warmup_steps",
            f"{recipe.optimizer.warmup_steps} is more than train.steps, {recipe.train.steps}; "
            "lower the one or raise the other",
        )
    if sample.given >= data.frames:
        yield (
            "sample.given",
            f"{sample.given} given frames leave none of data.frames, {data.frames}, to predict; lower it",
        )
    if sample.guidance != 1 and not (model.classes and model.condition_dropout):
        yield (
            "sample.guidance",
            f"{sample.guidance} needs a model trained with a condition and with condition_dropout above 0; set it to 1",
        )


class _Dumper(yaml.SafeDumper):
    """Block sections, but short lists such as betas on one line."""


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


@command_line
def main() -> None:
    """Print the reference of all keys."""
    print(f"The keys of a recipe:\n{reference(Recipe)}")


if __name__ == "__main__":
    main()
