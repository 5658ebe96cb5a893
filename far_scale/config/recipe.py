"""The typed recipe: the configuration of a training run. docs/config.md lists all keys.

A recipe is a YAML file that may extend another (`extends: NAME`); `key.sub=value` overrides it on the command line.
A wrong one is refused before any work, in one line with file, line, key and fix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from far_scale.config.checks import StageSections, conflicts, stage_sections
from far_scale.config.reference import explain
from far_scale.config.schema import (
    CheckpointSection,
    DataSection,
    FaultsSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    SampleSection,
    Section,
    Shards,
    StageSection,
    TrainSection,
    ValidationSection,
    mixture_weights,
)
from far_scale.config.yaml_loader import read_document
from far_scale.data.frame_counts import max_frames
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

if TYPE_CHECKING:
    from far_scale.model import FARConfig


class Recipe(Section):
    """The configuration of a training run."""

    name: str
    """Name of the run; not inherited through extends, default: the name of the file."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of all random numbers: weights, sample order, noise, timesteps, dropout."""
    run_dir: str = Field(default="runs/{name}", validate_default=True)
    """Output folder of the run; {name} is replaced by the name."""
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    train: TrainSection
    checkpoint: CheckpointSection
    faults: FaultsSection = FaultsSection()
    log: LogSection
    sample: SampleSection
    validation: ValidationSection | None = None
    curriculum: Annotated[tuple[StageSection, ...], Field(strict=False)] = ()
    """A list of stages that are trained one after another; without any, the run is one stage."""

    @field_validator("run_dir")
    @classmethod
    def _insert_name(cls, run_dir: str, info: ValidationInfo) -> str:
        return run_dir.replace("{name}", str(info.data.get("name")))

    @model_validator(mode="before")
    @classmethod
    def _count_steps(cls, values: Any) -> Any:
        """Default train.steps to the sum of the curriculum's steps."""
        train, stages = values.get("train"), values.get("curriculum")
        if isinstance(train, dict) and train.get("steps") is None and isinstance(stages, list) and stages:
            steps = [stage.get("steps") if isinstance(stage, dict) else None for stage in stages]
            # Steps that are not integers are reported by the check of their stage.
            total = max(1, sum(count for count in steps if type(count) is int))
            return {**values, "train": {**train, "steps": total}}
        return values

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        for key, problem in conflicts(
            self.model,
            self.data,
            self.objective,
            self.optimizer,
            self.train,
            self.sample,
            self.validation,
            self.curriculum,
        ):
            raise PydanticCustomError("impossible", "{problem}", {"key": key, "problem": problem})
        return self

    @model_serializer(mode="wrap")
    def _omit_null_validation(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit a null validation, as in recipes of versions before validation existed."""
        values: dict[str, Any] = serialize(self)
        if self.validation is None:
            values.pop("validation", None)
        return values

    def far_config(self) -> FARConfig:
        """Configuration of the model; a stage of a curriculum may have another window."""
        return self.model.far_config()

    def stages(self) -> list[StageSections]:
        """The stages of training with their sections; one stage without a curriculum."""
        return stage_sections(self.model, self.data, self.train, self.curriculum)

    def sample_frames(self) -> int:
        """Number of frames to predict after the given ones."""
        return self.sample.frames or max_frames(self.data.frames) - self.sample.given

    def held_out_shards(self) -> str | None:
        """Folder or URL of validation's shard set; None without validation."""
        return None if self.validation is None else self.validation.shards or self.sample.shards

    def resolved_yaml(self) -> str:
        """This recipe as YAML that extends no other file; load_recipe reads an equal recipe from it."""
        values = self.model_dump(mode="json")
        if self.model.preset is not None:
            # Only if they differ from the preset, so that overriding the preset of a resolved recipe has an effect.
            preset = ModelSection.model_validate({"preset": self.model.preset})
            for key in ("layers", "heads"):
                if values["model"][key] == getattr(preset, key):
                    del values["model"][key]
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)

    def hash(self) -> str:
        """SHA-256 of `result_values`."""
        values = self.result_values()
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def result_values(self) -> dict[str, Any]:
        """All keys that change the trained weights beyond rounding.

        Excludes names, folders, logging, sampling, validation, ZeRO, sequence parallelism, activation checkpointing,
        compiler and attention kernel.
        """
        values = self.model_dump(
            mode="json",
            exclude={
                "name": True,
                "run_dir": True,
                "checkpoint": True,
                "faults": True,
                "log": True,
                "sample": True,
                "validation": True,
                "model": {"preset"},
                "data": {
                    "shards",
                    "prefetch",
                    "cache_dir",
                    "stage_local",
                    "cache_gb",
                    "prefetch_gb",
                    "max_damaged_samples",
                },
                "curriculum": {"__all__": {"name", "shards"}},
                "train": {
                    "zero_stage",
                    "whole_below",
                    "deepspeed",
                    "reduce_once",
                    "activation_checkpointing",
                    "compile",
                    "attention",
                    "sequence_parallel",
                },
            },
        )
        # The weights of a mixture change the result, the names of its folders do not.
        sections: list[tuple[dict[str, Any], Shards | None]] = [(values["data"], self.data.shards)]
        sections += [(values["curriculum"][index], stage.shards) for index, stage in enumerate(self.curriculum)]
        for section, shards in sections:
            if isinstance(shards, tuple):
                section["weights"] = list(mixture_weights(shards))
        _drop_later_keys(values)
        if self.train.deepspeed is not None and (quantised := self.train.deepspeed.result_values()):
            values["train"]["deepspeed"] = quantised
        if self.faults.spikes == "skip":
            values["faults"] = {"spike_deviations": self.faults.spike_deviations}
        return values

    def shared_values(self) -> dict[str, Any]:
        """The values that must be the same on all ranks: all but folders that may be on a node's own disk."""
        return self.model_dump(
            mode="json",
            exclude={
                "data": {"shards", "cache_dir", "stage_local"},
                "curriculum": {"__all__": {"shards"}},
                "checkpoint": {"local_dir"},
            },
        )

    def save(self, path: str | Path) -> None:
        """Write the resolved YAML to `path`, atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.resolved_yaml(), encoding="utf-8")


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path_or_name: a file, or a bare name looked up in ./recipes and in the recipes/ folder beside the package.
        overrides: `key.sub=value`, the value written as in YAML; later ones win.

    Raises:
        UserError: one line with file, line, key and fix of every error.
    """
    document = read_document(path_or_name, overrides)
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, document, Recipe) from None


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Refuse a number of ranks whose groups (of train.sequence_parallel ranks) do not divide the lanes.

    Raises:
        UserError: lists numbers of ranks for these lanes, numbers of lanes for these ranks, and sizes of groups.
    """
    lanes, size, heads = recipe.data.lanes, recipe.train.sequence_parallel, recipe.model.heads
    if not ranks % size and not lanes % (ranks // size):
        return
    fitting = [n for n in range(1, min(ranks, heads) + 1) if not ranks % n and not lanes % (ranks // n) and n != size]
    sizes = f"or set train.sequence_parallel to {' or '.join(map(str, fitting))}" if fitting else ""
    usable = ", ".join(str(size * n) for n in range(1, lanes + 1) if lanes % n == 0)
    if ranks % size:
        raise UserError(
            f"{recipe.name}: train.sequence_parallel: {ranks} ranks cannot form groups of {size}; start one of "
            f"{usable} ranks{', ' + sizes if sizes else ''}"
        )
    groups = ranks // size
    near = " or ".join(str(n) for n in (lanes // groups * groups, (lanes // groups + 1) * groups) if n)
    shared_by = f"{ranks} ranks" if size == 1 else f"the {groups} groups of {ranks} ranks"
    raise UserError(
        f"{recipe.name}: data.lanes: {lanes} lanes cannot be shared evenly by {shared_by}; "
        f"start one of {usable} ranks, or set data.lanes to a multiple of {groups}, such as {near} (a run "
        f"that has checkpoints takes another number of lanes with --accept-changes){', ' + sizes if sizes else ''}"
    )


def groups_cross_nodes(recipe: Recipe, ranks_per_node: int) -> str | None:
    """A warning if groups of train.sequence_parallel would not stay within nodes of so many ranks each."""
    size = recipe.train.sequence_parallel
    if ranks_per_node % size == 0:
        return None
    return (
        f"{recipe.name}: train.sequence_parallel: groups of {size} ranks cross nodes of {ranks_per_node}, so every "
        f"layer exchanges tokens through the network; use a multiple of {size} ranks on each node, or another size"
    )


def _drop_later_keys(values: dict[str, Any]) -> None:
    """Drop keys that version 0.1 did not have if they have no effect.

    So the hash of a recipe without them is the same as in its older checkpoints.
    """
    no_effect: dict[str, dict[str, Any]] = {
        "model": {"context_patch": 0, "causal": True},
        "data": {"tokens_per_pack": None},
        "objective": {"context_noise": 0},
        "train": {"start_from": None},
    }
    for section, keys in no_effect.items():
        for key, value in keys.items():
            if values[section][key] == value:
                del values[section][key]
    if not values["curriculum"]:
        del values["curriculum"]


class _Dumper(yaml.SafeDumper):
    """Writes sections as blocks, but lists of plain values, such as betas, on one line."""


def _write_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    is_plain = not any(isinstance(value, dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=is_plain)


_Dumper.add_representer(list, _write_list)
