"""Keys that conflict with each other, and the stages of a curriculum as complete sections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from far_scale.config.deepspeed_keys import KEY_STAGES
from far_scale.config.schema import (
    DataSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    SampleSection,
    StageSection,
    TrainSection,
    ValidationSection,
    shard_urls,
)
from far_scale.data.frame_counts import clip_tokens, max_frames, min_frames
from far_scale.utils.errors import UserError
from far_scale.utils.urls import is_remote


@dataclass(frozen=True)
class StageSections:
    """One stage, with its overrides applied to the sections of the recipe.

    Attributes:
        number: from 1; 0 if the recipe has no curriculum.
        stage: the stage's section.
        model: with the stage's window.
        data: with the stage's overrides.
    """

    number: int
    stage: StageSection
    model: ModelSection
    data: DataSection

    def key(self, section: str, name: str) -> str:
        """The key that sets `section.name` in this stage: the stage's override, or the section's key."""
        overridden = name in StageSection.model_fields and getattr(self.stage, name) is not None
        return f"curriculum.{self.number}.{name}" if overridden and self.number else f"{section}.{name}"


def stage_sections(
    model: ModelSection, data: DataSection, train: TrainSection, curriculum: Sequence[StageSection]
) -> list[StageSections]:
    """The stages of a recipe with these sections; one stage without a curriculum."""
    if not curriculum:
        return [StageSections(0, StageSection(steps=train.steps), model, data)]
    stages = []
    for number, stage in enumerate(curriculum, start=1):
        values = {name: getattr(stage, name) for name in ("frames", "shards", "latent_shape")}
        overrides = {name: value for name, value in values.items() if value is not None}
        if stage.clips_per_pack is not None or stage.tokens_per_pack is not None:
            overrides |= {"clips_per_pack": stage.clips_per_pack, "tokens_per_pack": stage.tokens_per_pack}
        staged_model = model.model_copy(update={"window": stage.window or model.window})
        stages.append(StageSections(number, stage, staged_model, data.model_copy(update=overrides)))
    return stages


def conflicts(
    model: ModelSection,
    data: DataSection,
    objective: ObjectiveSection,
    optimizer: OptimizerSection,
    train: TrainSection,
    sample: SampleSection,
    validation: ValidationSection | None,
    curriculum: Sequence[StageSection],
) -> Iterator[tuple[str, str]]:
    """All combinations of keys that cannot work: the key to fix, and what is wrong."""
    yield from _check_model(model, data, optimizer, train)
    yield from _check_deepspeed(train)
    yield from _check_objective(objective, model)
    yield from _check_curriculum(curriculum, train)
    for stage in stage_sections(model, data, train, curriculum):
        yield from _check_stage(stage)
        yield from _check_source(stage)
    yield from _check_sample(sample, model, data)
    if validation is not None:
        yield from _check_validation(validation.shards or sample.shards, data)


def _check_model(
    model: ModelSection, data: DataSection, optimizer: OptimizerSection, train: TrainSection
) -> Iterator[tuple[str, str]]:
    if model.condition == "none" and model.classes:
        yield "model.classes", f"{model.classes} classes, but model.condition is none; set it to label or action"
    if model.condition != "none" and not model.classes:
        yield (
            "model.classes",
            f"0 classes, but model.condition is {model.condition}; set the number of {model.condition}s",
        )
    if model.context_patch % model.patch:
        yield (
            "model.context_patch",
            f"{model.context_patch} is not a multiple of model.patch, {model.patch}; set it to 0 or {4 * model.patch}",
        )
    if model.context_patch and not model.causal:
        yield (
            "model.context_patch",
            f"{model.context_patch}, but with model.causal false all frames are denoised together and none is context; "
            "set it to 0",
        )
    if train.sequence_parallel > model.heads:
        yield (
            "train.sequence_parallel",
            f"{train.sequence_parallel} ranks share the model's {model.heads} heads in attention, at least one each; "
            f"set it to {model.heads} at most",
        )
    if data.scaling == "start" and train.start_from is None:
        yield "data.scaling", "start, but train.start_from names no model; set data.scaling to factor or channel"
    if optimizer.warmup_steps > train.steps:
        yield (
            "optimizer.warmup_steps",
            f"{optimizer.warmup_steps} is more than train.steps, {train.steps}; lower the one or raise the other",
        )


def _check_deepspeed(train: TrainSection) -> Iterator[tuple[str, str]]:
    """Keys of `train.deepspeed` that have no effect at the ZeRO stage, or contradict each other."""
    section, zero_stage = train.deepspeed, train.zero_stage
    if section is None:
        return
    for name, value in section.explicit_values().items():
        if zero_stage != "auto" and zero_stage not in KEY_STAGES[name]:
            stages = " or ".join(map(str, KEY_STAGES[name]))
            yield (
                f"train.deepspeed.{name}",
                f"{value}, but it has no effect with train.zero_stage {zero_stage}; leave it out, or set "
                f"train.zero_stage to {stages}",
            )
    if section.zero_quantized_gradients and section.reduce_scatter is False:
        yield (
            "train.deepspeed.reduce_scatter",
            "false, but zero_quantized_gradients is a reduce-scatter; leave one of them out",
        )


def _check_objective(objective: ObjectiveSection, model: ModelSection) -> Iterator[tuple[str, str]]:
    if objective.clean_frame_ratio and not model.causal:
        yield (
            "objective.clean_frame_ratio",
            f"{objective.clean_frame_ratio:g}, but with model.causal false all frames of a clip have one timestep; "
            "set it to 0",
        )
    elif objective.context_noise and not objective.clean_frame_ratio:
        yield (
            "objective.context_noise",
            f"{objective.context_noise:g}, but objective.clean_frame_ratio is 0, so no frame is given clean; set it "
            "to 0",
        )


def _check_curriculum(curriculum: Sequence[StageSection], train: TrainSection) -> Iterator[tuple[str, str]]:
    steps = sum(stage.steps for stage in curriculum)
    if curriculum and steps != train.steps:
        yield (
            "train.steps",
            f"{train.steps} is not the sum of the stages' steps, {steps}; set it to null or make them agree",
        )
    names: dict[str, int] = {}
    for number, stage in enumerate(curriculum, start=1):
        name = stage.name or f"stage-{number}"
        if names.setdefault(name, number) != number:
            yield f"curriculum.{number}.name", f"{name!r} is stage {names[name]}'s name already; choose another"


def _check_stage(sections: StageSections) -> Iterator[tuple[str, str]]:
    model, data, key = sections.model, sections.data, sections.key
    channels, height, width = data.latent_shape
    if channels != model.channels:
        yield (
            key("data", "latent_shape"),
            f"{channels} channels, but model.channels is {model.channels}; make them equal",
        )
    patches_fit = True
    for name, patch in (("patch", model.patch), ("context_patch", model.context_patch)):
        if patch and (height % patch or width % patch):
            patches_fit = False
            yield f"model.{name}", f"{patch} does not divide the latent's {height} x {width}; choose a divisor of both"
    longest = max_frames(data.frames)
    if longest > model.window and not model.context_patch:
        yield (
            key("data", "frames"),
            f"{longest} frames do not fit model.window, {model.window}; lower the one or raise the other, "
            "or set model.context_patch for a model that sees older frames coarsely",
        )
        return
    if (data.clips_per_pack is None) == (data.tokens_per_pack is None):
        both = "both are" if data.clips_per_pack is not None else "neither is"
        yield (
            key("data", "tokens_per_pack"),
            f"one of clips_per_pack and tokens_per_pack fills the packs, but {both} set; give one, null for the other",
        )
    elif data.tokens_per_pack is not None and patches_fit:
        tokens = clip_tokens(longest, model.window, model.patch, model.context_patch, height, width)
        if tokens > data.tokens_per_pack:
            yield (
                key("data", "tokens_per_pack"),
                f"a clip of {min_frames(data.frames)} to {longest} frames may have {tokens} tokens, more than the "
                f"{data.tokens_per_pack} of a pack; raise it to {tokens} at least, or lower "
                f"{key('data', 'frames')}",
            )


def _check_source(sections: StageSections) -> Iterator[tuple[str, str]]:
    data, key = sections.data, sections.key("data", "shards")
    try:
        remote = any([is_remote(url) for url in shard_urls(data.shards)])
    except UserError as problem:  # a URL of an unknown kind
        yield key, str(problem)
        return
    if remote and data.cache_dir is None:
        yield key, "it is remote and comes through a cache; set data.cache_dir to a folder on the nodes' own disks"
    if (remote or data.stage_local is not None) and data.prefetch_gb > data.cache_gb:
        yield "data.prefetch_gb", f"{data.prefetch_gb:g} is more than data.cache_gb, {data.cache_gb:g}; lower it"


def _check_sample(sample: SampleSection, model: ModelSection, data: DataSection) -> Iterator[tuple[str, str]]:
    longest = max_frames(data.frames)
    if sample.frames is None and sample.given >= longest:
        yield (
            "sample.given",
            f"{sample.given} given frames leave none of data.frames, {longest}, to predict; lower it, "
            "or set sample.frames",
        )
    if sample.given + (sample.frames or 0) > model.window and not model.context_patch:
        yield (
            "sample.frames",
            f"{sample.given} given and {sample.frames} predicted frames do not fit model.window, {model.window}, "
            "of a model without context; lower it",
        )
    if sample.context_noise and not model.causal:
        yield (
            "sample.context_noise",
            f"{sample.context_noise:g}, but with model.causal false all frames are sampled together; set it to 0",
        )
    if sample.guidance != 1 and not (model.classes and model.condition_dropout):
        yield (
            "sample.guidance",
            f"{sample.guidance} needs a model trained with a condition and with condition_dropout above 0; set it to 1",
        )


def _check_validation(shards: str | None, data: DataSection) -> Iterator[tuple[str, str]]:
    key = "validation.shards"
    if shards is None:
        yield key, "neither this key nor sample.shards names a held-out shard set; set one of them"
        return
    try:
        remote = is_remote(shards)
    except UserError as problem:  # a URL of an unknown kind
        yield key, str(problem)
        return
    if remote and data.cache_dir is None:
        yield key, "it is remote and comes through a cache; set data.cache_dir to a folder on the nodes' own disks"
