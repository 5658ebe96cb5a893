"""Model cards: what they say is so, their commands work, and the hub's client reads their front matter."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import far_scale.autoencoder
from far_scale.cli.main import main as far_scale_main
from far_scale.config.recipe import load_recipe
from far_scale.convert.model_dir import ImportMetadata, is_intact, load_model_dir, save_model_dir
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.writer import ShardSetSpec, ShardWriter
from far_scale.evaluation.model_card import CardFacts, write_model_card
from far_scale.model import FAR, FARConfig
from harness.hub_server import running_hub
from harness.launch import ROOT
from harness.random_models import write_random_model
from harness.refusal import refused
from harness.tools import tool

CONFIG = FARConfig(layers=1, heads=1, patch=2, channels=32, window=4, context_patch=4, actions=4)
LICENSED = CardFacts("apache-2.0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 3 clips of 12 random frames."""
    compact = far_scale.autoencoder.load("compact-vizdoom-f8c32")
    info = AutoencoderInfo(name=compact.name, weight_hash=compact.weight_hash, scaling_factor=compact.scaling_factor)
    facts = ShardSetSpec((32, 8, 8), "bfloat16", info, actions=4, labels=0)
    folder, draw = tmp_path_factory.mktemp("shards") / "set", torch.Generator().manual_seed(0)
    with ShardWriter(folder, facts, 3) as writer:
        for number in range(3):
            latents = torch.randn(12, 32, 8, 8, generator=draw).bfloat16()
            writer.write(Sample(f"clip_{number}", latents, torch.arange(12) % 4, None, 8.0, f"{number}.mp4"))
    return folder


@pytest.fixture
def model_dir(shards: Path, tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "maze", CONFIG, shards, std=0.05, step=1234)


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    """A protocol of two clips of 3 + 2 frames."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "about": "two clips",
                "clips": {"source": "test", "count": 2, "size": 64},
                "sampling": {"given": 3, "predicted": 2, "steps": 1, "batch": 2},
                "metrics": ["psnr"],
                "psnr": {"mean_of": "set"},
            }
        )
    )
    return path


def rewritten(folder: Path, config: FARConfig = CONFIG, **changes: object) -> Path:
    """The model with other metadata."""
    _, metadata = load_model_dir(folder)
    state = {name: torch.zeros_like(tensor) for name, tensor in FAR(config).state_dict().items()}
    save_model_dir(folder, config, state, metadata.model_copy(update=changes))
    return folder


@pytest.mark.slow
def test_the_card_of_an_evaluated_model_and_its_commands(
    model_dir: Path, shards: Path, protocol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.upload("org/maze", model_dir)
        scores = tmp_path / "scores"
        arguments = ["--protocol", protocol, "--shards", shards, "--device", "cpu", "--out", scores]
        tool(monkeypatch, "evaluate.py", "org/maze", *arguments)  # the weights are those of the folder
        tool(
            monkeypatch, "model_card.py", model_dir, "--license", "cc-by-4.0", "--name", "org/maze",
            "--trained-on", "Mazes of seeds 1 to 9.", "--scores", scores,
        )  # fmt: skip
        others = write_random_model(tmp_path / "others", CONFIG, shards, std=0.06, step=1234)
        facts = CardFacts("mit", scores=(scores,))
        refused(lambda: write_model_card(others, facts), f"{scores}: these are scores of other weights", str(others))
        card = (model_dir / "README.md").read_text()
        assert ModelCard(card).data.to_dict() == {
            "license": "cc-by-4.0",
            "library_name": "far_scale",
            "pipeline_tag": "image-to-video",
            "tags": ["far", "video-generation", "video-prediction", "autoregressive", "world-model", "long-context"],
        }
        parameters = sum(parameter.numel() for parameter in FAR(CONFIG).parameters())
        for text in (
            "\n# maze\n",
            f"| parameters | {parameters / 1e6:.1f} million |",
            "| weights | float32, ",
            "| condition | one of 4 actions for every frame |",
            "| sees | the last 4 frames finely, all earlier ones in patches of 4 x 4 |",
            "| frame latents | 32 x 8 x 8 (channels, height, width) |",
            "| autoencoder | `compact-vizdoom-f8c32`, SHA-256 ",
            "Mazes of seeds 1 to 9.",
            "The EMA of the weights after 1,234 steps, recipe r, far_scale 0.",
            "**tiny** (hash ",
            "2 clips): two clips",
            "- frames: 3 given -> 2 predicted, 64 px",
            "| repeat the last given frame | ",
            "ships with it",
            "arXiv:2503.19325",
        ):
            assert text in card, text
        measured = re.search(r"\| model \| ([\d.]+) \[", card)
        written = yaml.safe_load((scores / "scores.json").read_text())["scores"]["psnr"]["mean"]
        assert measured is not None and measured[1] == f"{written:.2f}"
        assert str(tmp_path) not in card  # no path of this machine

        (command,) = re.findall(r"```bash\n(far-scale .*)\n```", card)
        words = shlex.split(command.replace("CONTEXT", str(shards)))
        monkeypatch.setattr(sys, "argv", words)
        far_scale_main()
        assert Path("samples.mp4").stat().st_size > 0
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        found: dict[str, FAR] = {}
        exec(code, found)
        assert found["model"].config == CONFIG


def test_a_card_is_replaced_and_goes_with_its_model_and_others_stay(model_dir: Path) -> None:
    model, metadata = load_model_dir(model_dir)
    path = write_model_card(model_dir, LICENSED)
    assert path == model_dir / "README.md" and "license: apache-2.0" in path.read_text()
    assert is_intact(model_dir, CONFIG, metadata, torch.float32) and load_model_dir(model_dir)[1] == metadata
    write_model_card(model_dir, CardFacts("mit"))
    assert "license: mit" in path.read_text()
    save_model_dir(model_dir, CONFIG, model.state_dict(), metadata)  # an export into it
    assert not path.exists()

    path.write_text("my own words")
    refused(lambda: write_model_card(model_dir, LICENSED), f"{path}: was not written by tools/model_card.py", "move")
    refused(lambda: save_model_dir(model_dir, CONFIG, model.state_dict(), metadata), "not only a model directory")
    assert path.read_text() == "my own words" and not is_intact(model_dir, CONFIG, metadata, torch.float32)


def test_models_of_other_kinds(model_dir: Path, tmp_path: Path) -> None:
    digest = "ab" * 32
    origin = ImportMetadata(imported_from="FAR_B.pth", sha256=digest, far_scale="0")
    labels = FARConfig(layers=1, heads=1, patch=2, channels=32, window=4, labels=101)
    card = write_model_card(
        rewritten(model_dir, labels, classes=("run", "a|b"), training=origin, frame_stride=2, fps=8.0), LICENSED
    ).read_text()
    for text in (
        "one of 101 labels for a clip: run, a\\|b |",
        "| frames per second | 4 |",
        "| sees | the last 4 frames |",
        "Imported from `FAR_B.pth` (SHA-256 abababababab), frame stride 2.",
        "CONTEXT is a shard set with labels, with more than 8 frames each.",
    ):
        assert text in card, text
    assert "world-model" not in card and "## Scores" not in card

    diffusion = FARConfig(layers=1, heads=1, patch=2, channels=32, window=4, causal=False)
    card = write_model_card(rewritten(model_dir, diffusion, fps=None), LICENSED).read_text()
    assert "A video diffusion transformer, which" in card and "clips of at most 4 frames" in card
    assert "| condition | none |" in card and "| frames per second | of several videos |" in card


def test_the_run_of_the_model_gives_its_recipe_without_paths(model_dir: Path, shards: Path, tmp_path: Path) -> None:
    overrides = [f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", "optimizer.learning_rate=3e-4"]
    recipe = load_recipe(ROOT / "recipes" / "demo_long.yaml", overrides)
    recipe.save(tmp_path / "run" / "recipe.yaml")
    facts = CardFacts("apache-2.0", run=tmp_path / "run")
    refused(lambda: write_model_card(model_dir, facts), str(tmp_path / "run"), "trained by another recipe")
    _, metadata = load_model_dir(model_dir)
    assert not (model_dir / "README.md").exists()
    rewritten(model_dir, training=metadata.training.model_copy(update={"recipe_hash": recipe.hash()}))
    card = write_model_card(model_dir, facts).read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    values = yaml.safe_load(text)
    assert values["optimizer"]["learning_rate"] == 3e-4 and values["objective"]["timesteps"] == "logit_normal"
    assert values["train"] == {"steps": recipe.train.steps, "precision": recipe.train.precision}
    assert [stage["steps"] for stage in values.get("curriculum", [])] == [stage.steps for stage in recipe.curriculum]
    assert "A shard set of 3 videos with 36 frames." in card
    assert str(tmp_path) not in card and str(shards.parent) not in card


def test_missing_scores_and_bad_licences_are_refused(model_dir: Path, tmp_path: Path) -> None:
    refused(lambda: write_model_card(model_dir, CardFacts("Apache 2")), "--license Apache 2", "apache-2.0")
    facts = CardFacts("mit", scores=(tmp_path / "nothing",))
    refused(lambda: write_model_card(model_dir, facts), "scores.json: there are no scores here")
    refused(lambda: write_model_card(tmp_path / "nowhere", LICENSED), "there is no model directory here")


@pytest.mark.slow
def test_scores_of_imported_weights(
    model_dir: Path, shards: Path, protocol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = ImportMetadata(imported_from="FAR_B.pth", sha256="ab" * 32, far_scale="0")
    folder, scores = rewritten(model_dir, training=origin), tmp_path / "scores"
    arguments = ["--protocol", protocol, "--shards", shards, "--device", "cpu", "--out", scores]
    tool(monkeypatch, "evaluate.py", folder, *arguments)
    assert "- weights: imported, SHA-256" in (scores / "scores.md").read_text()
    card = write_model_card(folder, CardFacts("other", scores=(scores,))).read_text()
    assert "Imported from `FAR_B.pth`" in card and "**tiny** (hash " in card
