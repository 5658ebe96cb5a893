"""Recipes: reading, inheriting, overriding, refusing; and the shipped ones against the official hyper-parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from far_scale.config.recipe import Recipe, check_ranks, groups_cross_nodes, load_recipe
from far_scale.config.reference import fields
from far_scale.config.schema import ModelSection
from far_scale.config.yaml_loader import CHECKOUT
from far_scale.convert.model_dir import read_config
from far_scale.model import FAR, FARConfig
from far_scale.model.presets import PRESETS
from far_scale.recipe import config_page
from far_scale.utils.errors import UserError
from far_scale.utils.io import flatten

SHIPPED = sorted(
    path.stem
    for path in (CHECKOUT / "recipes").glob("*.yaml")
    if path.stem != "base" and not path.stem.startswith("autoencoder_")
)

# A recipe that exists to be compared with another: that one, and the keys in which the trained weights differ.
COMPARED = {
    "video_dit_l_ucf101_128_uncond": ("far_l_ucf101_128_uncond", {"model.causal", "objective.clean_frame_ratio"}),
    "demo_video_dit": ("demo_cpu", {"model.causal", "objective.clean_frame_ratio"}),
    "demo_diffusion_forcing": ("demo_cpu", {"objective.clean_frame_ratio"}),
}

# The official YAMLs (showlab/FAR, options/train/far): preset, frames and window, frame interval, steps, autoencoder,
# classes, then sampling's given frames and guidance, and the steps between checkpoints.
OFFICIAL = {
    "far_b_ucf101_64": ("B", 16, 1, 200_000, "dcae-ucf101-64-f8c32", 0, 4, 1.0, 20_000),
    "far_b_bair_64": ("B", 30, 1, 200_000, "dcae-bair-64-f8c32", 0, 2, 1.0, 20_000),
    "far_l_ucf101_128_cond": ("L", 16, 3, 400_000, "dcae-ucf101-128-f16c32", 101, 0, 2.0, 20_000),
    "far_l_ucf101_128_uncond": ("L", 16, 3, 400_000, "dcae-ucf101-128-f16c32", 0, 0, 1.0, 20_000),
    "far_l_ucf101_256_cond": ("L", 16, 3, 400_000, "dcae-ucf101-256-f32c32", 101, 0, 2.0, 20_000),
    "far_l_ucf101_256_uncond": ("L", 16, 3, 400_000, "dcae-ucf101-256-f32c32", 0, 0, 1.0, 20_000),
    "far_xl_ucf101_256_cond": ("XL", 16, 3, 400_000, "dcae-ucf101-256-f32c32", 101, 0, 2.0, 50_000),
    "far_xl_ucf101_256_uncond": ("XL", 16, 3, 400_000, "dcae-ucf101-256-f32c32", 0, 0, 1.0, 50_000),
}
# And the long ones: preset and autoencoder.
OFFICIAL_LONG = {
    "far_b_long_dmlab_64": ("B", "dcae-dmlab-64-f8c32"),
    "far_m_long_minecraft_128": ("M", "dcae-minecraft-128-f16c32"),
}
EIGHT_NODES = "far_xl_ucf101_256_cond_8_nodes"
LARGE = {"far_1b3_ucf101_256": "1.3B", "far_3b_ucf101_256": "3B", "far_7b_ucf101_256": "7B"}
SIZES = {"B": (12, 12), "M": (12, 16), "L": (24, 16), "XL": (28, 18)}

WHOLE = """\
model:
  layers: 2
  heads: 2
data:
  shards: shards/train
  autoencoder: compact
  latent_shape: [32, 8, 8]
  frames: 4
optimizer: {learning_rate: 1e-4, warmup_steps: 0, ema_decay: 0.9}
train: {steps: 10, precision: fp32, zero_stage: 1}
checkpoint: {every: 5, keep: 2}
log: {every: 1}
sample: {steps: 4, guidance: 1, given: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a whole recipe in recipes/whole.yaml."""
    monkeypatch.chdir(tmp_path)
    write("whole", WHOLE)
    return tmp_path


def write(name: str, text: str) -> str:
    """Write recipes/NAME.yaml and return its path as errors show it."""
    Path("recipes").mkdir(exist_ok=True)
    Path(f"recipes/{name}.yaml").write_text(text)
    return f"recipes/{name}.yaml"


def refusal(path_or_name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path_or_name, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_shipped_recipe_is_covered() -> None:
    demos = {"demo_cpu", "demo_base", "demo_base_short", "demo_finetune", "demo_gpu", "demo_long", "demo_long_gpu"}
    assert set(SHIPPED) == {*OFFICIAL, *OFFICIAL_LONG, *demos, *LARGE, *COMPARED, "far_xl_long", EIGHT_NODES}


def test_the_quickstart_starts_from_the_model_that_ships() -> None:
    recipe = load_recipe("demo_finetune")
    assert recipe.train.start_from == "models/demo-maze"
    config, metadata = read_config(CHECKOUT / recipe.train.start_from)
    assert config == recipe.far_config() == load_recipe("demo_base").far_config()
    assert metadata.autoencoder.name == recipe.data.autoencoder and metadata.latent_shape == recipe.data.latent_shape
    assert metadata.context_frames == 300 - config.window


@pytest.mark.parametrize("name", COMPARED)
def test_compared_recipes_differ_only_in_the_named_keys(name: str) -> None:
    base, keys = COMPARED[name]
    ours, theirs = (flatten(load_recipe(each).result_values()) for each in (name, base))
    changed = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert changed == keys


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_its_resolved_yaml_is_the_same_recipe(name: str, folder: Path) -> None:
    recipe = load_recipe(name)  # found beside the package: the working folder's recipes/ has no such file
    assert recipe.name == name
    recipe.save("run/recipe.yaml")
    again = load_recipe("run/recipe.yaml")
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert [path.name for path in Path("run").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_hyper_parameters(name: str) -> None:
    preset, frames, interval, steps, autoencoder, classes, given, guidance, every = OFFICIAL[name]
    recipe = load_recipe(name)
    layers, heads = SIZES[preset]
    assert recipe.far_config() == FARConfig(layers=layers, heads=heads, window=frames, labels=classes)
    assert recipe.far_config().to_dict()["patch"] == 1
    assert recipe.far_config().to_dict()["channels"] == 32
    assert recipe.far_config().to_dict()["condition_dropout"] == 0.1

    data, optimizer = recipe.data, recipe.optimizer
    assert (data.frames, data.frame_stride, data.autoencoder) == (frames, interval, autoencoder)
    assert data.latent_shape == (32, 8, 8)
    assert data.lanes * data.clips_per_pack == 32
    assert data.scaling == "factor"
    assert (recipe.objective.timesteps, recipe.objective.logit_mean, recipe.objective.logit_std) == (
        "logit_normal",
        0,
        1,
    )
    assert recipe.objective.clean_frame_ratio == 0.1
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps) == (1e-4, (0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.ema_decay) == (0, 1, 0.9999)
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert (recipe.train.steps, recipe.train.precision, recipe.train.zero_stage) == (steps, "bf16", 3)
    assert (recipe.sample.steps, recipe.sample.given, recipe.sample.guidance) == (50, given, guidance)
    assert (recipe.checkpoint.every, recipe.log.every, recipe.seed) == (every, 100, 0)


@pytest.mark.parametrize("name", OFFICIAL_LONG)
def test_official_hyper_parameters_of_long_videos(name: str) -> None:
    preset, autoencoder = OFFICIAL_LONG[name]
    recipe = load_recipe(name)
    layers, heads = SIZES[preset]
    assert recipe.far_config() == FARConfig(layers=layers, heads=heads, window=16, context_patch=4, actions=4)
    data, optimizer, sample = recipe.data, recipe.optimizer, recipe.sample
    assert (data.frames, data.frame_stride, data.autoencoder) == ((16, 299), 1, autoencoder)
    assert (data.latent_shape, data.scaling, data.tokens_per_pack) == ((32, 8, 8), "factor", None)
    assert data.lanes * data.clips_per_pack == 32
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (1e-4, "constant", 10_000)
    assert (optimizer.ema_decay, optimizer.clip_norm, recipe.train.steps) == (0.9999, 1, 1_000_000)
    assert (sample.given, recipe.sample_frames(), sample.guidance, sample.steps) == (144, 156, 1.5, 50)
    assert recipe.checkpoint.every == 50_000


def test_eight_nodes_train_on_as_many_clips_as_one() -> None:
    one, eight = load_recipe("far_xl_ucf101_256_cond"), load_recipe(EIGHT_NODES)
    changed = {"data.lanes", "train.steps", "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.ema_decay"}
    ours, theirs = flatten(eight.result_values()), flatten(one.result_values())
    assert {key for key in ours if ours[key] != theirs[key]} == changed and ours.keys() == theirs.keys()
    batch = eight.data.lanes * eight.data.clips_per_pack
    assert batch == 256 and eight.train.steps * batch == one.train.steps * 32
    assert eight.checkpoint.every * batch == one.checkpoint.every * 32
    assert eight.optimizer.learning_rate == pytest.approx(one.optimizer.learning_rate * 8**0.5, rel=0.02)
    assert eight.optimizer.ema_decay == pytest.approx(one.optimizer.ema_decay**8, abs=1e-6)


@pytest.mark.parametrize("name", LARGE)
def test_large_sizes_have_the_parameters_they_are_named_after(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.model.preset, recipe.train.activation_checkpointing) == (LARGE[name], "full")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in FAR(recipe.far_config()).parameters())
    assert parameters / 1e9 == pytest.approx(float(LARGE[name].removesuffix("B")), rel=0.08)
    assert recipe.optimizer.learning_rate < load_recipe("far_xl_ucf101_256_cond").optimizer.learning_rate


def test_presets() -> None:
    assert {name: PRESETS[name] for name in SIZES} == SIZES
    literal, _ = get_args(ModelSection.model_fields["preset"].annotation)
    assert set(get_args(literal)) == set(PRESETS)


def test_base_lists_its_missing_keys() -> None:
    message = refusal("base")
    assert "base.yaml: model: this required key is missing" in message
    assert "data.autoencoder: this required key is missing; set it (Name of the autoencoder" in message


def test_extends_merges_sections_over_a_chain(folder: Path) -> None:
    write("middle", "extends: whole\ntrain:\n  steps: 20\noptimizer:\n  betas: [0.8, 0.9]\n")
    Path("mine.yaml").write_text("extends: recipes/middle.yaml\ntrain:\n  zero_stage: 3\n")
    recipe = load_recipe("mine.yaml")
    assert (recipe.train.steps, recipe.train.precision, recipe.train.zero_stage) == (20, "fp32", 3)
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.optimizer.learning_rate == 1e-4
    assert (recipe.name, recipe.run_dir) == ("mine", "runs/mine")


def test_name_is_not_inherited_but_can_be_given(folder: Path) -> None:
    write("named", f"name: given\nrun_dir: out/{{name}}-1\n{WHOLE}")
    write("child", "extends: named\n")
    assert load_recipe("named").run_dir == "out/given-1"
    assert load_recipe("child").run_dir == "out/child-1"
    assert load_recipe("child", ["name=other"]).run_dir == "out/other-1"


def test_a_preset_gives_what_is_not_set(folder: Path) -> None:
    write("sized", "extends: far_b_ucf101_64\nmodel:\n  heads: 10\n")
    recipe = load_recipe("sized")
    assert (recipe.model.layers, recipe.model.heads) == (12, 10)
    recipe.save("saved.yaml")
    larger = load_recipe("saved.yaml", ["model.preset=XL"])
    assert (larger.model.layers, larger.model.heads) == (28, 10)


def test_overrides_are_yaml_and_the_last_wins(folder: Path) -> None:
    overrides = ["train.steps=5", "train.steps=7", "optimizer.betas=[0.5, 0.6]", "optimizer.learning_rate=3e-4"]
    overrides += ["log.wandb.mode=offline", "sample={guidance: 1.0, shards: held=out}", "run_dir=a b"]
    recipe = load_recipe("whole", overrides)
    assert recipe.train.steps == 7
    assert (recipe.optimizer.betas, recipe.optimizer.learning_rate) == ((0.5, 0.6), 3e-4)
    assert (recipe.log.wandb.mode, recipe.log.every) == ("offline", 1)
    assert (recipe.sample.shards, recipe.sample.given) == ("held=out", 2)
    assert recipe.run_dir == "a b"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.0e-4", "0.0001", "10e-5"])
def test_numbers_in_every_spelling(text: str, folder: Path) -> None:
    assert load_recipe("whole", [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == pytest.approx(1e-4)


def test_unknown_key_has_line_and_nearest(folder: Path) -> None:
    path = write("bad", "extends: whole\n\ndata:\n  frames: 4\n  lane: 2\n")
    message = refusal("bad")
    assert message.startswith(
        f"{path}:5: data.lane: unknown key; nearest valid key is data.lanes (valid keys of data: "
    )
    assert "shards, autoencoder, latent_shape, frames, frame_stride, lanes" in message


def test_key_of_another_section_is_named(folder: Path) -> None:
    path = write("bad", "extends: whole\ntrain:\n  learning_rate: 1e-3\n")
    assert refusal("bad").startswith(
        f"{path}:3: train.learning_rate: unknown key; nearest valid key is optimizer.learning_rate "
        "(valid keys of train: steps"
    )
    assert "nearest valid key is data.lanes (valid keys of a recipe: name" in refusal("whole", "lanes=3")


def test_error_in_an_extended_file_names_that_file(folder: Path) -> None:
    path = write("parent", WHOLE.replace("frames: 4", "frames: four"))
    write("child", "extends: parent\ndata:\n  lanes: 2\n")
    assert refusal("child").startswith(
        f"{path}:8: data.frames: must be a number of frames, a range [fewest, most] or a distribution"
    )


def test_override_errors_name_the_command_line(folder: Path) -> None:
    assert refusal("whole", "data.lane=2").startswith(
        "command line: data.lane: unknown key; nearest valid key is data.lanes"
    )
    assert refusal("whole", "train.steps=2.5") == "command line: train.steps: must be a valid integer, got 2.5"
    assert refusal("whole", "sample={stepz: 2}").startswith("command line: sample.stepz: unknown key")
    assert refusal("whole", "data.frames=17").startswith(
        "command line: data.frames: 17 frames do not fit model.window, 16"
    )
    assert "write key=value" in refusal("whole", "train.steps")
    assert "write key=value" in refusal("whole", "train..steps=3")
    assert "extends cannot be overridden" in refusal("whole", "extends=other")
    assert refusal("whole", "optimizer.betas=[1").startswith("command line: optimizer.betas:1: this is not YAML")


WRONG_VALUES = {
    "train.steps=true": "train.steps: must be a valid integer, got True",
    "train.steps='10'": "train.steps: must be a valid integer, got '10'",
    "train.steps=0": "train.steps: must be greater than or equal to 1, got 0",
    "name=3": "name: must be a valid string, got 3",
    "train.precision=fp16": "train.precision: must be 'bf16' or 'fp32', got 'fp16'",
    "train.zero_stage=4": "train.zero_stage: must be 0, 1, 2, 3 or 'auto', got 4",
    "optimizer.ema_decay=1.0": "optimizer.ema_decay: must be less than 1, got 1.0",
    "optimizer.ema_decay=-0.1": "optimizer.ema_decay: must be greater than or equal to 0, got -0.1",
    "seed=18446744073709551616": "seed: must be less than 18446744073709551616, got 18446744073709551616",
    "optimizer.learning_rate=.nan": "optimizer.learning_rate: must be a finite number, got nan",
    "optimizer.betas=[0.9]": "optimizer.betas: its list is too short",
    "optimizer.betas=[0.9, 1.0]": "optimizer.betas: must be less than 1, got 1.0",
    "data.latent_shape=8": "data.latent_shape: must be a valid tuple, got 8",
    "data=shards": "data: must be a section of `key: value` lines, got 'shards'",
    "data.frames=0": "data.frames: must be a number of frames, a range",
    "data.frames=true": "data.frames: must be a number of frames, a range",
    "data.frames=[1, 2, 3]": "data.frames: must be a number of frames, a range",
    "data.frames=[8, 4]": "data.frames: must rise from the fewest frames to the most, got [8, 4]",
    "data.frames={4: 0}": "data.frames: must be a number of frames, a range",
    "data.frames={four: 1}": "data.frames: must be a number of frames, a range",
    "data.frames={}": "data.frames: must be a number of frames, a range",
    "sample.guidance=0.5": "sample.guidance: must be at least 1, or -1 for only the null class, got 0.5",
    "curriculum=3": "curriculum: must be a valid tuple, got 3",
    "curriculum=[3]": "curriculum: must be a section of `key: value` lines, got 3",
    "curriculum=[{steps: 10}, {steps: 0}]": "curriculum.2.steps: must be greater than or equal to 1, got 0",
    "curriculum=[{steps: 10, frame: 3}]": (
        "curriculum.1.frame: unknown key; nearest valid key is curriculum.frames (valid keys of curriculum.1: steps"
    ),
    "curriculum=[{frames: 3}]": "curriculum.1.steps: this required key is missing; set it (Optimizer steps of",
    "model.preset=S": "model.preset: must be 'B', 'M', 'L', 'XL', '1.3B', '3B' or '7B', got 'S'",
    "model.preset=[B]": "model.preset: must be 'B', 'M', 'L', 'XL', '1.3B', '3B' or '7B', got ['B']",
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_wrong_value(override: str, folder: Path) -> None:
    assert refusal("whole", override).startswith(f"command line: {WRONG_VALUES[override]}")


IMPOSSIBLE = {
    ("model.heads=3", "train.sequence_parallel=4"): "train.sequence_parallel: 4 ranks share the model's 3 heads",
    ("model.patch=2", "model.context_patch=3"): "model.context_patch: 3 is not a multiple of model.patch, 2",
    ("model.context_patch=4", "model.causal=false", "objective.clean_frame_ratio=0"): (
        "model.context_patch: 4, but with model.causal false all frames are denoised together"
    ),
    ("model.causal=false",): (
        "objective.clean_frame_ratio: 0.1, but with model.causal false all frames of a clip have one timestep; set it "
        "to 0"
    ),
    ("objective.clean_frame_ratio=0", "objective.context_noise=0.1"): (
        "objective.context_noise: 0.1, but objective.clean_frame_ratio is 0"
    ),
    ("model.causal=false", "objective.clean_frame_ratio=0", "sample.context_noise=0.1"): (
        "sample.context_noise: 0.1, but with model.causal false all frames are sampled together"
    ),
    ("model.context_patch=3",): "model.context_patch: 3 does not divide the latent's 8 x 8",
    ("data.frames=[4, 17]",): "data.frames: 17 frames do not fit model.window, 16",
    ("data.frames={4: 1, 17: 1}",): "data.frames: 17 frames do not fit model.window, 16",
    ("data.clips_per_pack=2", "data.tokens_per_pack=2048"): (
        "data.tokens_per_pack: one of clips_per_pack and tokens_per_pack fills the packs, but both are set"
    ),
    ("data.clips_per_pack=null",): "data.tokens_per_pack: one of clips_per_pack and tokens_per_pack fills the packs",
    ("data.tokens_per_pack=255",): "a clip of 4 to 4 frames may have 256 tokens, more than the 255 of a pack",
    ("data.frames=[4, 30]", "model.context_patch=4", "data.tokens_per_pack=1079"): "may have 1080 tokens",
    ("curriculum=[{steps: 3}]",): "train.steps: 10 is not the sum of the stages' steps, 3",
    ("curriculum=[{steps: 5}, {steps: 5, name: stage-1}]",): "curriculum.2.name: 'stage-1' is stage 1's name already",
    ("curriculum=[{steps: 5}, {steps: 5, window: 3}]",): "data.frames: 4 frames do not fit model.window, 3",
    ("curriculum=[{steps: 5}, {steps: 5, frames: 20}]",): "curriculum.2.frames: 20 frames do not fit model.window, 16",
    ("curriculum=[{steps: 10, latent_shape: [8, 8, 8]}]",): "curriculum.1.latent_shape: 8 channels",
    ("curriculum=[{steps: 10, tokens_per_pack: 100}]",): "curriculum.1.tokens_per_pack: a clip of 4 to 4 frames",
    ("curriculum=[{steps: 10, tokens_per_pack: 999, clips_per_pack: 1}]",): "curriculum.1.tokens_per_pack: one of",
    ("sample.guidance=-1",): "sample.guidance: -1.0 needs a model trained with a condition",
    ("sample.frames=15",): "sample.frames: 2 given and 15 predicted frames do not fit model.window, 16",
    ("data.frames=20",): "data.frames: 20 frames do not fit model.window, 16",
    ("model.classes=4",): "model.classes: 4 classes, but model.condition is none",
    ("model.condition=action",): "model.classes: 0 classes, but model.condition is action; set the number of actions",
    ("model.condition=label",): "model.classes: 0 classes, but model.condition is label; set the number of labels",
    ("optimizer.warmup_steps=11",): "optimizer.warmup_steps: 11 is more than train.steps, 10",
    ("model.channels=16",): "data.latent_shape: 32 channels, but model.channels is 16",
    ("data.latent_shape=[32, 8, 9]", "model.patch=2"): "model.patch: 2 does not divide the latent's 8 x 9",
    ("data.latent_shape=[32, 9, 8]", "model.patch=2"): "model.patch: 2 does not divide the latent's 9 x 8",
    ("sample.given=4",): "sample.given: 4 given frames leave none of data.frames, 4, to predict",
    ("sample.guidance=2",): "sample.guidance: 2.0 needs a model trained with a condition",
    ("sample.guidance=2", "model.condition=label", "model.classes=3", "model.condition_dropout=0"): (
        "sample.guidance: 2.0 needs a model trained with a condition and with condition_dropout above 0"
    ),
}


@pytest.mark.parametrize("overrides", IMPOSSIBLE)
def test_impossible_combination(overrides: tuple[str, ...], folder: Path) -> None:
    message = refusal("whole", *overrides)
    assert IMPOSSIBLE[overrides] in message
    assert ";" in message  # the fix


def test_limits_that_are_still_possible(folder: Path) -> None:
    overrides = ["data.frames=16", "sample.given=0", "optimizer.ema_decay=0", "optimizer.warmup_steps=10"]
    assert load_recipe("whole", overrides).data.frames == 16


def test_frames_in_every_form(folder: Path) -> None:
    assert load_recipe("whole", ["data.frames=[3, 8]"]).data.frames == (3, 8)
    assert load_recipe("whole", ["data.frames=[8, 8]"]).data.frames == (8, 8)
    recipe = load_recipe("whole", ["data.frames={8: 1, 4: 3}"])
    assert recipe.data.frames == {4: 3.0, 8: 1.0} and recipe.sample_frames() == 6
    recipe.save("saved.yaml")
    assert load_recipe("saved.yaml") == recipe
    # A distribution is a value: one that is laid over another does not keep the other's lengths.
    write("parent", WHOLE.replace("frames: 4", "frames: {4: 1, 8: 1}"))
    write("child", "extends: parent\ndata:\n  frames: {5: 1}\n")
    assert load_recipe("child").data.frames == {5: 1.0}
    assert load_recipe("child", ["data.frames={6: 1}"]).data.frames == {6: 1.0}


def test_a_token_budget_replaces_clips(folder: Path) -> None:
    data = load_recipe("whole", ["data.tokens_per_pack=256"]).data
    assert (data.clips_per_pack, data.tokens_per_pack) == (None, 256)
    assert load_recipe("whole").data.clips_per_pack == 4


def test_guidance_may_be_only_the_null_class(folder: Path) -> None:
    overrides = ["sample.guidance=-1", "model.condition=label", "model.classes=3", "sample.frames=14"]
    recipe = load_recipe("whole", overrides)
    assert (recipe.sample.guidance, recipe.sample_frames()) == (-1, 14)


CURRICULUM = """\
extends: whole
model: {context_patch: 4}
train: {steps: null}
curriculum:
  - steps: 3
    frames: {1: 0.5, 4: 0.5}
  - name: long
    steps: 4
    frames: [16, 40]
    tokens_per_pack: 2000
    window: 8
    learning_rate_scale: 0.5
"""


def test_a_curriculum_fills_in_the_steps_and_what_stages_leave_out(folder: Path) -> None:
    write("staged", CURRICULUM)
    recipe = load_recipe("staged")
    assert recipe.train.steps == 7
    first, second = recipe.stages()
    assert (first.data.frames, first.data.clips_per_pack, first.data.tokens_per_pack) == ({1: 0.5, 4: 0.5}, 4, None)
    assert (second.data.frames, second.data.clips_per_pack, second.data.tokens_per_pack) == ((16, 40), None, 2000)
    assert (first.model.window, second.model.window) == (16, 8)
    assert second.data.shards == "shards/train" and second.stage.learning_rate_scale == 0.5
    recipe.save("saved.yaml")
    again = load_recipe("saved.yaml")
    assert again == recipe and again.hash() == recipe.hash()
    assert "- name: long\n" in Path("saved.yaml").read_text() or "name: long\n" in Path("saved.yaml").read_text()
    (only,) = load_recipe("whole").stages()
    assert only.data == load_recipe("whole").data and only.stage.steps == 10


def test_errors_in_a_curriculum_name_the_line(folder: Path) -> None:
    path = write("staged", CURRICULUM.replace("window: 8", "windows: 8"))
    assert refusal("staged").startswith(f"{path}:11: curriculum.2.windows: unknown key")
    path = write("staged", CURRICULUM.replace("2000", "200"))
    assert refusal("staged").startswith(f"{path}:10: curriculum.2.tokens_per_pack: a clip of 16 to 40 frames may have")
    path = write("staged", CURRICULUM.replace("    steps: 4\n", ""))
    assert f"{path}:7: curriculum.2.steps: this required key is missing" in refusal("staged")
    # Nothing is left of the list that another one replaces.
    write("staged", CURRICULUM)
    child = write("child", "extends: staged\ncurriculum:\n  - steps: 2\n  - steps: 2\n    frames: 0\n")
    assert refusal("child").startswith(f"{child}:5: curriculum.2.frames: must be a number of frames")
    message = refusal("staged", "curriculum=[{steps: 3}, {steps: 4, frames: 0}]")
    assert message.startswith("command line: curriculum.2.frames: must be")


def test_missing_keys_name_the_file(folder: Path) -> None:
    path = write("bad", WHOLE.replace("  layers: 2\n", "").replace("log: {every: 1}\n", ""))
    message = refusal("bad")
    assert (
        f"{path}:1: model.layers: this required key is missing; set it (Transformer layers; default: those of"
        in message
    )
    assert f"{path}: log: this required key is missing" in message
    child = write("child", "extends: bad\n")
    assert f"{child}: model.layers: this required key is missing" in refusal("child")


def test_unknown_keys_come_first(folder: Path) -> None:
    write("bad", WHOLE.replace("  layers: 2\n", "  layer: 2\n").replace("steps: 10", "steps: x"))
    kinds = [part.split(": ")[1] for part in refusal("bad").split("; ") if part.startswith("recipes/bad.yaml")]
    assert kinds == ["model.layer", "train.steps", "model.layers"]


def test_broken_files(folder: Path) -> None:
    assert refusal(write("broken", "data:\n  lanes: [1\nx: 2\n")).startswith("recipes/broken.yaml:3: this is not YAML")
    assert refusal(write("tagged", "data: !!python/object:os.system x\n")).startswith(
        "recipes/tagged.yaml:1: this is not"
    )
    assert refusal(write("endless", "data: &a [*a]\n")).startswith("recipes/endless.yaml: this is not YAML")
    assert "sections of `key: value` lines" in refusal(write("listed", "- 1\n"))
    assert "this required key is missing" in refusal(write("empty", ""))
    twice = refusal(write("twice", f"{WHOLE}train: {{steps: 3}}\n"))
    assert twice == "recipes/twice.yaml:14: train: written twice (first at recipes/twice.yaml:10); keep one"
    Path("recipes/binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert refusal("binary").startswith("recipes/binary.yaml: this recipe cannot be read")


def test_recipes_that_are_not_there(folder: Path) -> None:
    message = refusal("demo_cpx")
    assert message.startswith("demo_cpx: there is no such recipe")
    assert "nearest is demo_cpu (there are: " in message
    write("orphan", "\nextends: whol\n")
    assert refusal("orphan").startswith("recipes/orphan.yaml:2: extends: whol: there is no such recipe")
    assert "nearest is whole" in refusal("orphan")
    write("odd", "extends: [whole]\n")
    assert refusal("odd") == "recipes/odd.yaml:1: extends: must be one recipe's path or name, got ['whole']"


def test_extends_in_a_circle(folder: Path) -> None:
    write("a", "extends: b\n")
    write("b", "extends: a\n")
    assert refusal("a").startswith("recipes/a.yaml: extends: is circular (recipes/a.yaml -> recipes/b.yaml -> ")


SAME_RESULT = ["name=n", "run_dir=r", "log.every=9", "log.wandb.mode=offline", "checkpoint.keep=9", "data.prefetch=9"]
SAME_RESULT += ["data.shards=elsewhere", "sample.steps=9", "train.zero_stage=0", "train.activation_checkpointing=full"]
SAME_RESULT += ["train.compile=true", "train.attention=dense", "data.max_damaged_samples=9", "data.cache_gb=9"]
SAME_RESULT += ["data.cache_dir=cache", "data.prefetch_gb=9", "sample.context_noise=0.1", "model.causal=true"]
SAME_RESULT += ["objective.context_noise=0", "train.sequence_parallel=2"]
SAME_RESULT += ["train.zero_stage=auto", "train.reduce_once=true", "train.deepspeed={reduce_bucket_size: 9}"]
SAME_RESULT += ["validation={every: 5, shards: held-out}"]
OTHER_RESULT = ["seed=1", "model.layers=3", "data.lanes=4", "data.autoencoder=other", "objective.logit_std=2"]
OTHER_RESULT += ["data.frames=[2, 4]", "data.tokens_per_pack=512", "curriculum=[{steps: 10, frames: 3}]"]
OTHER_RESULT += [
    "model.context_patch=4",
    "train.start_from=elsewhere",
    "optimizer.eps=1e-7",
    "train.steps=11",
    "train.precision=bf16",
    "data.shuffle_window=1",
    "objective.context_noise=0.1",
]


def test_hash_covers_all_that_changes_the_result(folder: Path) -> None:
    whole = load_recipe("whole").hash()
    assert len(whole) == 64
    assert all(load_recipe("whole", [override]).hash() == whole for override in SAME_RESULT)
    others = {load_recipe("whole", [override]).hash() for override in OTHER_RESULT}
    assert whole not in others
    assert len(others) == len(OTHER_RESULT)


def test_hash_does_not_depend_on_how_the_recipe_is_written(folder: Path) -> None:
    write("sorted", yaml.safe_dump(yaml.safe_load(WHOLE.replace("1e-4", "0.0001")), sort_keys=True))
    assert load_recipe("sorted").hash() == load_recipe("whole").hash()
    assert (
        load_recipe("far_b_bair_64").hash()
        == load_recipe("far_b_bair_64", ["model.layers=12", "model.heads=12"]).hash()
    )


def test_hash_is_stable() -> None:
    # Checkpoints carry it: a change of the hash refuses the resume of every run there is.
    assert load_recipe("far_b_bair_64").hash() == "754816e51c63b638ae215de09b15bcd0f3e69e67c37b8e03d26cc2a5a49ff3e0"


def test_ranks_must_divide_the_lanes(folder: Path) -> None:
    recipe = load_recipe("whole", ["data.lanes=12"])
    for ranks in (1, 2, 3, 4, 6, 12):
        check_ranks(recipe, ranks)
    for ranks in (5, 8, 24):
        with pytest.raises(UserError, match=r"data\.lanes: 12 lanes .* start one of 1, 2, 3, 4, 6, 12 ranks"):
            check_ranks(recipe, ranks)
    with pytest.raises(UserError, match=r"multiple of 5, such as 10 or 15 \(a run .* with --accept-changes\)"):
        check_ranks(recipe, 5)
    with pytest.raises(UserError, match=r"multiple of 64, such as 64 \("):
        check_ranks(recipe, 64)


def test_groups_of_ranks_must_divide_the_lanes(folder: Path) -> None:
    recipe = load_recipe("whole", ["data.lanes=4", "model.heads=6", "train.sequence_parallel=2"])
    for ranks in (2, 4, 8):
        check_ranks(recipe, ranks)
    with pytest.raises(UserError, match=r"parallel: 5 ranks cannot form groups of 2; start one of 2, 4, 8 ranks, or"):
        check_ranks(recipe, 5)
    message = r"lanes: 4 lanes cannot be shared evenly by the 6 groups of 12 ranks; start one of 2, 4, 8 ranks, or set "
    message += r"data.lanes to a multiple of 6, such as 6 \(.*, or set train.sequence_parallel to 3 or 6"
    with pytest.raises(UserError, match=message):
        check_ranks(recipe, 12)
    # More ranks than lanes: the message for a recipe without groups says that groups would do.
    with pytest.raises(UserError, match=r"or set train\.sequence_parallel to 2 or 4"):
        check_ranks(load_recipe("whole", ["data.lanes=4", "model.heads=6"]), 8)


def test_groups_of_ranks_within_nodes(folder: Path) -> None:
    recipe = load_recipe("whole", ["train.sequence_parallel=2"])
    assert groups_cross_nodes(recipe, 8) is None
    warning = groups_cross_nodes(recipe, 3)
    assert warning is not None and "groups of 2 ranks cross nodes of 3" in warning


def test_a_recipe_does_not_change_after_its_check(folder: Path) -> None:
    recipe = load_recipe("whole")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]


def test_reference_describes_every_key() -> None:
    command = [sys.executable, "-m", "far_scale.recipe"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for key, field in fields(Recipe):
        assert f"{'.'.join(key)}  (" in text or f"\n{'.'.join(key)}: " in text
        assert field.description or "Section" in str(field.annotation)
    assert "  train.zero_stage  (0 | 1 | 2 | 3 | auto; required)\n" in text
    assert "  optimizer.final_factor  (float >= 0 and <= 1; default 0.0)\n" in text
    assert "  data.latent_shape  ([int >= 1, int >= 1, int >= 1]; required)\n" in text
    assert "  data.frames  (int | [int, int] | {int: float}; default 16)\n" in text
    assert "  curriculum.learning_rate_scale  (float > 0; default 1.0)\n" in text


def test_the_page_of_all_keys_is_up_to_date() -> None:
    assert (CHECKOUT / "docs" / "config.md").read_text() == config_page(), (
        "run python -m far_scale.recipe --markdown > docs/config.md"
    )


def test_validation_is_written_only_where_there_is_any(folder: Path) -> None:
    whole = load_recipe("whole")
    assert "validation" not in whole.resolved_yaml() and "validation" not in whole.model_dump(mode="json")
    assert whole.held_out_shards() is None
    validated = load_recipe("whole", ["validation.every=5", "sample.shards=held-out"])
    validated.save("saved.yaml")
    assert load_recipe("saved.yaml", ["name=whole"]) == validated
    assert validated.held_out_shards() == "held-out"
    assert load_recipe("whole", ["validation={every: 5, shards: other}"]).held_out_shards() == "other"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("validation.every=5", "validation.shards: neither this key nor sample.shards names a held-out shard set"),
        ("validation={shards: held-out}", "validation.every: this required key is missing; set it (Steps between"),
        ("validation={every: 0, shards: held-out}", "validation.every: must be greater than or equal to 1, got 0"),
        ("validation={every: 5, clip: 3}", "validation.clip: unknown key; nearest valid key is validation.clips"),
        ("validation={every: 5, shards: 's3://some/set'}", "validation.shards: it is remote and comes through a cache"),
        ("validation={every: 5, shards: 'ftp://some/set'}", "validation.shards: ftp://some/set"),
    ],
)
def test_impossible_validation_is_refused(folder: Path, override: str, words: str) -> None:
    assert words in refusal("whole", override)
