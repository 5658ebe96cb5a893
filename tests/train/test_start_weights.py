"""train.start_from: weights for latents that they know, and only at the start of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.convert.model_dir import ImportMetadata, ModelMetadata, TrainingMetadata, WeightsMetadata, save_model_dir
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR, FARConfig
from far_scale.model.far import patchify
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece
from far_scale.train.curriculum import stages
from far_scale.train.engine import build_model
from far_scale.train.resume import Resume
from far_scale.train.resume_checks import find_changes
from far_scale.train.setup import find_scaling
from far_scale.train.start_weights import context_weights, latent_differences, start_from, start_scaling
from far_scale.utils.event_log import EventLog, read_events
from harness.latent_sets import FACTS, write_set
from harness.refusal import refused

TRAINING = TrainingMetadata(step=7, recipe_hash="ab", weights="ema", far_scale="0")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_set(tmp_path / "set", [6, 8], 1)


def recipe_of(tmp_path: Path, *overrides: str) -> Recipe:
    """A small model on sets of latent_sets, started from the directory `model`."""
    small = [
        "model={layers: 1, heads: 1, channels: 4, patch: 1, classes: 4}", "data.latent_shape=[4, 2, 2]",
        "data.autoencoder=some-autoencoder", f"data.shards={tmp_path / 'set'}", "data.scaling=factor",
        f"train.start_from={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    return load_recipe("demo_cpu", [*small, *overrides])


def save_model(tmp_path: Path, manifest: Manifest, **changes: Any) -> FAR:
    """The directory `model`, of random weights whose metadata fits the recipe but for `changes`."""
    recipe = recipe_of(tmp_path, "seed=9")
    model = build_model(recipe.far_config(), recipe.seed)
    values = {
        "autoencoder": manifest.autoencoder,
        "scaling": LatentScaling.of(manifest, "factor"),
        "latent_shape": manifest.latent_shape,
        "fps": 8.0,
        "training": TRAINING,
    }
    save_model_dir(tmp_path / "model", model.config, model.state_dict(), ModelMetadata(**(values | changes)))
    return model


def started(tmp_path: Path, manifest: Manifest, *overrides: str, accept: bool = False) -> tuple[FAR, str]:
    """A fresh model, started; and what was said."""
    recipe = recipe_of(tmp_path, *overrides)
    model, scaling = build_model(recipe.far_config(), recipe.seed), find_scaling(recipe, manifest, 0)
    folder = str(recipe.train.start_from)
    return model, start_from(model, folder, manifest, scaling, recipe.data.frame_stride, accept)


def same_weights(one: FAR, other: FAR) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_weights_of_the_same_latents_are_taken(tmp_path: Path, manifest: Manifest) -> None:
    theirs = save_model(tmp_path, manifest)
    model, said = started(tmp_path, manifest)
    assert same_weights(model, theirs)
    assert said == f"starting from the ema weights of step 7 in {tmp_path / 'model'}"
    rounded = LatentScaling((0.0,) * 4, (0.5 * (1 + 1e-9),) * 4)
    save_model(tmp_path, manifest, scaling=rounded)
    assert "accepted" not in started(tmp_path, manifest)[1]


OTHER = FACTS.autoencoder.model_copy(update={"name": "another", "weight_hash": "f" * 64})
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "channel in the model": (
        {"scaling": "channel"},
        [],
        ["its scaling of latents is per channel (channel 0: ", "the run's one factor 0.5", "data.scaling=channel"],
    ),
    "factor in the model": (
        {},
        ["data.scaling=channel"],
        ["is one factor 0.5, the run's per channel", "data.scaling=factor"],
    ),
    "another set's channels": (
        {"scaling": LatentScaling((0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0))},
        ["data.scaling=channel"],
        ["per channel (channel 0: shift 0, scale 1)", "data.scaling=start to keep the model's"],
    ),
    "one channel's scale": (
        {"scaling": LatentScaling((0.0,) * 4, (0.5, 0.5, 0.5, 0.25))},
        [],
        ["(channel 3: shift 0, scale 0.25)", "one factor 0.5"],
    ),
    "autoencoder": ({"autoencoder": OTHER}, [], ["another (ffffffffffff)", "some-autoencoder (000000000000)"]),
    "stride": ({"frame_stride": 2}, [], ["its frame stride is 2, the recipe's 1", "data.frame_stride=2"]),
    "latent shape": ({"latent_shape": (4, 4, 4)}, [], ["[4, 4, 4]", "[4, 2, 2]", "data.latent_shape"]),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_of_other_latents_are_refused_unless_accepted(tmp_path: Path, manifest: Manifest, case: str) -> None:
    differing, overrides, words = CASES[case]
    if differing.get("scaling") == "channel":
        differing = {"scaling": LatentScaling.of(manifest, "channel")}
    theirs = save_model(tmp_path, manifest, **differing)
    refused(
        lambda: started(tmp_path, manifest, *overrides),
        f"train.start_from={tmp_path / 'model'}: that model was trained on other latents: ",
        "--accept-changes",
        *words,
    )
    model, said = started(tmp_path, manifest, *overrides, accept=True)
    assert same_weights(model, theirs) and len(said.splitlines()) == 1
    assert "accepted: trained on other latents" in said and all(word in said for word in words)


def test_context_weights_start_as_those_of_the_window(tmp_path: Path, manifest: Manifest) -> None:
    theirs = save_model(tmp_path, manifest)
    model, said = started(tmp_path, manifest, "model.context_patch=2")
    assert said.endswith(f"in {tmp_path / 'model'}; it has no context, whose weights start as those of the window")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    name = "blocks.0.attention.{}qkv.weight"
    assert torch.equal(state[name.format("context_")], state[name.format("")])
    refused(lambda: started(tmp_path, manifest, "model.context_patch=2", "model.layers=2"), "layers is 1")


def random_model(config: FARConfig, seed: int) -> FAR:
    """In float64, without zeros, so that every weight counts."""
    model, random = FAR(config).double().eval(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=random) * 0.2
    return model


def test_a_model_with_context_of_fine_patches_starts_as_the_same_function() -> None:
    config = FARConfig(layers=3, heads=2, patch=2, channels=3, window=6, actions=2)
    window_only = random_model(config, 0)
    long = random_model(replace(config, window=2, context_patch=2), 1)
    long.load_state_dict(window_only.state_dict() | context_weights(long, window_only.state_dict()))
    random = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 6, 3, 4, 6, dtype=torch.float64, generator=random)
    timesteps = torch.tensor([-2.0, -2, -2, -2, -1, 600]).expand(2, -1)
    actions = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 2, 1]])
    expected = window_only(latents, timesteps, actions)[:, -2:]
    torch.testing.assert_close(long(latents, timesteps, actions), expected, rtol=1e-12, atol=1e-12)


def test_a_coarse_patch_starts_as_the_mean_of_its_fine_ones() -> None:
    config = FARConfig(layers=1, heads=1, patch=2, channels=3, window=4, context_patch=4)
    window_only, long = random_model(replace(config, context_patch=0), 0), random_model(config, 1)
    long.load_state_dict(window_only.state_dict() | context_weights(long, window_only.state_dict()))
    frames = torch.randn(5, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fine = window_only.patch_embedding(patchify(frames, 2)).unflatten(1, (2, 2, 3, 2))  # rows and columns of 2
    coarse = long.context_patch_embedding(patchify(frames, 4))
    torch.testing.assert_close(coarse, fine.mean((2, 4)).flatten(1, 2), rtol=1e-12, atol=1e-12)


def test_weights_of_other_classes(tmp_path: Path, manifest: Manifest) -> None:
    scaling = LatentScaling.of(manifest, "factor")
    facts = (manifest.autoencoder, scaling, manifest.latent_shape, 8.0)
    names = ("autoencoder", "scaling", "latent_shape", "fps")

    def differing(theirs: tuple[str, ...] | None, ours: tuple[str, ...] | None, *overrides: str) -> list[str]:
        metadata = ModelMetadata(**dict(zip(names, facts, strict=True)), training=TRAINING, classes=theirs)
        with_names = manifest.model_copy(update={"classes": ours})
        recipe = recipe_of(tmp_path, *overrides)
        model = build_model(recipe.far_config(), recipe.seed)
        return latent_differences(metadata, model, with_names, scaling, recipe.data.frame_stride)

    by_label = ("model.condition=label", "model.classes=3")
    (line,) = differing(("a", "b", "c"), ("a", "c", "b"), *by_label)
    assert "class 1 is 'c', there 'b'" in line and "--classes-of" in line
    assert not differing(("a", "b", "c"), ("a", "b", "c"), *by_label)
    assert not differing(None, ("a", "b"), *by_label) and not differing(("a", "b"), None, *by_label)
    assert not differing(("a", "b", "c"), ("a", "c", "b")), "the model is not conditioned on them"


def test_weights_of_unknown_latents_are_taken_and_reported(tmp_path: Path, manifest: Manifest) -> None:
    nine = recipe_of(tmp_path, "seed=9")
    theirs = build_model(nine.far_config(), nine.seed)
    origin = ImportMetadata(imported_from="far.pth", sha256="a" * 64, far_scale="0")
    save_model_dir(tmp_path / "model", theirs.config, theirs.state_dict(), WeightsMetadata(training=origin))
    model, said = started(tmp_path, manifest)
    assert same_weights(model, theirs)
    assert "imported from far.pth" in said and "the latents that they were trained on are unknown" in said


def with_checkpoint(tmp_path: Path, start: str | None, **values: Any) -> None:
    """A checkpoint of step 5 of a run that started from `start`, with `values` in its state."""
    recipe = recipe_of(tmp_path, f"train.start_from={'null' if start is None else start}")
    pieces = {"weight/x": FlatPiece(4, 0, torch.zeros(4))}
    state = {"recipe": recipe.model_dump(mode="json"), "lanes": {}} | values
    checkpoint.save(tmp_path / "run", 5, pieces, state, keep=1)


def test_a_run_keeps_the_scaling_of_its_start_model(tmp_path: Path, manifest: Manifest) -> None:
    theirs = LatentScaling((0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0))
    saved = save_model(tmp_path, manifest, scaling=theirs)
    recipe = recipe_of(tmp_path, "data.scaling=start")
    assert find_scaling(recipe, manifest, 0) == theirs
    model, said = started(tmp_path, manifest, "data.scaling=start")
    assert same_weights(model, saved) and "accepted" not in said
    with_checkpoint(tmp_path, str(tmp_path / "model"), scaling=theirs.to_dict())
    (tmp_path / "model").rename(tmp_path / "gone")  # a run resumes without the model that it started from
    assert find_scaling(recipe, manifest, 5) == theirs


def test_the_scaling_of_no_model_or_of_weights_alone_is_refused(tmp_path: Path) -> None:
    refused(
        lambda: recipe_of(tmp_path, "data.scaling=start", "train.start_from=null"), "data.scaling", "train.start_from"
    )
    recipe = recipe_of(tmp_path, "data.scaling=start")
    model = build_model(recipe.far_config(), 0)
    origin = ImportMetadata(imported_from="far.pth", sha256="a" * 64, far_scale="0")
    save_model_dir(tmp_path / "model", model.config, model.state_dict(), WeightsMetadata(training=origin))
    refused(lambda: start_scaling(str(tmp_path / "model")), "train.start_from=", "--shards")


@pytest.mark.parametrize("before", [None, "models/other"])
def test_start_weights_for_a_run_that_has_checkpoints_are_refused(tmp_path: Path, before: str | None) -> None:
    with_checkpoint(tmp_path, before)
    recipe = recipe_of(tmp_path)
    events = EventLog(tmp_path / "run", True)
    resume = Resume(recipe, stages(recipe), Processes(0, 1, torch.device("cpu")), events)
    words = ["train.start_from=", "step-00000005", before or "random weights", "another run_dir"]
    refused(lambda: resume.check_start_from(5, accept_changes=False), *words)
    resume.check_start_from(0, accept_changes=False)  # a run without any
    resume.check_start_from(5, accept_changes=True)
    (event,) = read_events(tmp_path / "run")
    assert event["event"] == "accepted-changes" and "not read" in event["text"]


def test_the_start_weights_of_the_run_itself_are_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_checkpoint(tmp_path, "model")  # the same folder, named otherwise
    for same in (f"{tmp_path}/model", "model", "./model"):
        recipe = recipe_of(tmp_path, f"train.start_from={same}")
        Resume(
            recipe, stages(recipe), Processes(0, 1, torch.device("cpu")), EventLog(tmp_path / "run", True)
        ).check_start_from(5, accept_changes=False)
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_another_scaling_autoencoder_or_shape_on_resume_is_a_change_of_the_result() -> None:
    recipe = load_recipe("demo_cpu")

    def state(scale: float, name: str, side: int) -> dict[str, Any]:
        return {
            "recipe": recipe.model_dump(mode="json"),
            "versions": {},
            "ranks": 1,
            "scaling": {"shift": [0.25] * 2, "scale": [1.0, scale]},
            "autoencoder": {"name": name, "weight_hash": name * 12, "scaling_factor": 1.0},
            "latent_shape": [2, side, side],
        }

    assert find_changes(state(2.0, "a", 2), state(2.0, "a", 2), recipe).affecting_result == []
    assert find_changes(state(2.0, "a", 2), state(3.0, "b", 4), recipe).affecting_result == [
        "the latents' scaling, per channel (channel 1: shift 0.25, scale 2) -> "
        "per channel (channel 1: shift 0.25, scale 3)",
        "the latents' autoencoder, a (aaaaaaaaaaaa) -> b (bbbbbbbbbbbb)",
        "the latents' shape, [2, 2, 2] -> [2, 4, 4]",
    ]
