"""Training of autoencoders: losses, averaging, frames, checkpoints; and whole runs, killed, stopped and shared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale import autoencoder as autoencoders
from far_scale.autoencoder.compact import CompactAutoencoder, CompactConfig
from far_scale.autoencoder.training import (
    TrainingPaths,
    load_autoencoder_recipe,
    psnr,
    read_frames,
    to_pixels,
    train_autoencoder,
)
from far_scale.autoencoder.training.checkpoints import Checkpoints
from far_scale.autoencoder.training.frames import VideoFrames, cut_clip
from far_scale.autoencoder.training.loop import init_network, open_video_frames
from far_scale.autoencoder.training.losses import PatchDiscriminator, PerceptualLoss, adaptive_weight, hinge_loss
from far_scale.autoencoder.training.recipe import AutoencoderRecipe, VideoData
from far_scale.autoencoder.training.trainer import Trainer
from far_scale.config.yaml_loader import CHECKOUT
from far_scale.distributed.process_group import Processes
from far_scale.utils.errors import UserError
from far_scale.utils.io import write_json
from harness import processes
from harness.launch import ROOT
from harness.processes import Ranks, running_ranks

TOOL = ROOT / "tools" / "train_autoencoder.py"
PRELOAD = ["diffusers.models.autoencoders.autoencoder_dc"]
VGG = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
VGG += [(17, 256, 512), *[(number, 512, 512) for number in (19, 21, 24, 26, 28)]]

# A DC-AE in small: blocks of both types, batch norms in the decoder, 8 pixels a latent position.
NARROW: dict[str, Any] = {
    "_class_name": "AutoencoderDC", "in_channels": 3, "latent_channels": 8, "attention_head_dim": 16,
    **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in {
        "block_types": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
        "block_out_channels": [16, 32, 32, 32],
        "layers_per_block": [0, 1, 1, 1],
        "qkv_multiscales": [[], [], [], []],
    }.items()},
    "decoder_norm_types": ["batch_norm", "batch_norm", "rms_norm", "rms_norm"],
    "decoder_act_fns": ["relu", "relu", "silu", "silu"],
}  # fmt: skip


@pytest.fixture
def alone() -> Iterator[Processes]:
    """This process as the only one of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Processes(0, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of VGG16's and LPIPS's weights, of random numbers, under the names that are published."""
    folder, random = tmp_path_factory.mktemp("vgg"), torch.Generator().manual_seed(0)
    features: dict[str, Tensor] = {"classifier.0.weight": torch.zeros(1)}
    for number, before, width in VGG:
        weight = torch.randn(width, before, 3, 3, generator=random) * (2 / (9 * before)) ** 0.5
        features |= {f"features.{number}.weight": weight, f"features.{number}.bias": torch.full((width,), 0.01)}
    shares = {
        f"lin{depth}.model.1.weight": torch.rand(1, width, 1, 1, generator=random)
        for depth, width in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(features, folder / "vgg16-397923af.pth", _use_new_zipfile_serialization=False)  # as it is published
    torch.save(shares, folder / "vgg.pth")
    return folder


def recipe_of(folder: Path, videos: Path, *overrides: str) -> AutoencoderRecipe[Any, Any]:
    """The paper's way to train the narrow DC-AE on `videos` at 32 px, in few steps."""
    return load_autoencoder_recipe(recipe_file(folder, videos), list(overrides))


def recipe_file(folder: Path, videos: Path) -> Path:
    write_json(folder / "narrow.json", NARROW)
    recipe = {
        "name": "narrow",
        "model": {"kind": "dc_ae", "config": str(folder / "narrow.json")},
        "data": {"videos": str(videos), "size": 32, "flip": True},
        "train": {
            "steps": 20, "batch": 16, "learning_rate": 1e-4, "betas": [0.5, 0.9], "schedule": "constant",
            "ema_decay": 0.9, "loss": {"squared": 0, "absolute": 1, "perceptual": 1, "discriminator": 0.5},
            "discriminator_start": 8, "latent_noise": 0.1, "checkpoint_every": 3, "log_every": 1,
        },
    }  # fmt: skip
    write_json(folder / "narrow.yaml", recipe)  # JSON is YAML
    return folder / "narrow.yaml"


def trainer_of(recipe: AutoencoderRecipe[Any, Any], alone: Processes) -> tuple[Trainer, VideoFrames]:
    frames = open_video_frames(recipe, 2, alone, print)
    return Trainer(recipe.train, recipe.seed, init_network(recipe, frames, alone), alone), frames


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


# Losses


@pytest.mark.slow
def test_perceptual_loss_is_that_of_the_paper(vgg: Path) -> None:
    random = torch.Generator().manual_seed(1)
    first, second = (torch.rand(2, 3, 32, 32, generator=random) * 2 - 1 for _ in range(2))
    first.requires_grad_(True)
    distance = PerceptualLoss.load(vgg)
    assert not any(weight.requires_grad for weight in distance.parameters())
    reached = distance(first, second)
    files = (vgg / "vgg16-397923af.pth", vgg / "vgg.pth")
    weights = {name: tensor for file in files for name, tensor in torch.load(file, weights_only=True).items()}

    def features(pixels: Tensor) -> list[Tensor]:
        pixels = (pixels - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        found = []
        for number, *_ in VGG:
            if number in (5, 10, 17, 24):
                pixels = F.max_pool2d(pixels, 2, 2)
            pixels = F.conv2d(
                pixels, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1
            ).relu()
            if number in (2, 7, 14, 21, 28):
                found.append(pixels / (pixels.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    per_picture = torch.zeros(2)
    for depth, (own, other) in enumerate(zip(features(first), features(second), strict=True)):
        weighed = F.conv2d((own - other) ** 2, weights[f"lin{depth}.model.1.weight"])
        per_picture = per_picture + weighed.mean((1, 2, 3))
    torch.testing.assert_close(reached, per_picture.mean(), rtol=1e-5, atol=0)
    assert reached > 0.01 and distance(second, second) == 0
    (gradient,) = torch.autograd.grad(reached, first)
    (expected,) = torch.autograd.grad(per_picture.mean(), first)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)

    joined = vgg.parent / "joined.pth"
    torch.save(weights, joined)
    assert torch.equal(PerceptualLoss.load(joined)(first, second), reached)


def test_wrong_perceptual_weights_are_refused_in_one_line(vgg: Path, tmp_path: Path) -> None:
    def refused(path: Path, said: str) -> None:
        with pytest.raises(UserError, match=said) as caught:
            PerceptualLoss.load(path)
        assert "train.perceptual_weights" in str(caught.value) and "\n" not in str(caught.value)

    refused(tmp_path / "absent.pth", "there is no such file or folder")
    refused(vgg / "vgg16-397923af.pth", r"has no lin0\.model\.1\.weight, lin1.* \.\.\.; it takes torchvision's vgg16")
    refused(vgg / "vgg.pth", r"has no features\.0\.weight")
    whole = (vgg / "vgg.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "half.pth", "not a file of weights")
    torch.save(np.float64, tmp_path / "pickle.pth")
    refused(tmp_path / "pickle.pth", "not a file of weights")
    shutil.copytree(vgg, tmp_path / "other")
    torch.save({f"lin{depth}.model.1.weight": torch.ones(1, 3, 1, 1) for depth in range(5)}, tmp_path / "other/vgg.pth")
    refused(tmp_path / "other", "not VGG16's")


def test_discriminator_is_the_official_one() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    assert sum(weight.numel() for weight in discriminator.parameters()) == 2_765_633
    assert discriminator(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]
    assert [layer.bias is not None for layer in convolutions] == [True, False, False, False, True]
    assert all(layer.weight.std().item() == pytest.approx(0.02, rel=0.1) for layer in convolutions)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(((0 + 0.5) / 2 + (0 + 2) / 2) / 2)


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(alone: Processes) -> None:
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    loss, adversarial = (layer * torch.tensor([6.0, 8.0])).sum(), (layer * torch.tensor([0.0, 2.0])).sum()
    weight = adaptive_weight(loss, adversarial, layer, alone)
    assert weight.item() == pytest.approx(10 / (2 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(loss * 1e9, adversarial, layer, alone).item() == pytest.approx(1e4)


# Steps


@pytest.mark.slow
def test_ema_follows_the_weights(alone: Processes, recorded: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, recorded, "train.discriminator_start=3", "train.loss.perceptual=0")
    trainer, frames = trainer_of(recipe, alone)
    expected = copied(trainer.ema_state_dict)
    with frames:
        for step in range(5):
            trainer.step(step, frames.batch(step))
            live = trainer.state()["network"]
            for name in trainer.state()["average"]:
                if step < 3 or not name.startswith("encoder."):  # whose average stays, as it does
                    expected[name] = 0.9 * expected[name] + 0.1 * live[name]
    average = trainer.ema_state_dict
    assert average.keys() == live.keys()
    for name, weight in average.items():
        if "running" in name or "num_batches" in name:  # no weights: as they are
            assert torch.equal(weight, live[name])
        else:
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
            assert name.endswith("bias") or not torch.equal(weight, live[name])


@pytest.mark.slow
def test_discriminator_starts_at_its_step_and_updates_only_the_decoder(
    alone: Processes, recorded: Path, tmp_path: Path
) -> None:
    states: dict[str, list[dict[str, Any]]] = {}
    metrics = []
    for weight in ("0", "0.5"):
        recipe = recipe_of(
            tmp_path,
            recorded,
            "train.discriminator_start=2",
            "train.loss.perceptual=0",
            f"train.loss.discriminator={weight}",
        )
        trainer, frames = trainer_of(recipe, alone)
        states[weight] = []
        with frames:
            for step in range(4):
                metrics.append(trainer.step(step, frames.batch(step)))
                state = trainer.state()
                parts = {name: copied(state[name]) for name in ("network", "discriminator") if name in state}
                states[weight].append(parts)
    assert all("adversarial" not in losses for losses in metrics[:6])
    assert all({"adversarial", "adversarial_weight", "discriminator"} <= losses.keys() for losses in metrics[6:])
    assert metrics[6]["discriminator"].item() == pytest.approx(1, abs=0.5) and metrics[6]["adversarial_weight"] > 0

    without, with_it = states["0"], states["0.5"]
    for step in range(2):
        assert all(
            torch.equal(tensor, with_it[step]["network"][name]) for name, tensor in without[step]["network"].items()
        )
    first, second = with_it[0]["discriminator"], with_it[1]["discriminator"]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(second["layers.0.weight"], with_it[2]["discriminator"]["layers.0.weight"])
    moved = {
        name
        for name, tensor in with_it[1]["network"].items()
        if not torch.equal(tensor, with_it[2]["network"][name]) and not name.endswith("num_batches_tracked")
    }
    assert moved and not any(name.startswith("encoder.") for name in moved)
    # Beside the pixels' own loss the discriminator has a say in them, from the last layer to the first.
    for name in ("decoder.conv_in.weight", "decoder.conv_out.conv.weight"):
        assert name in moved and not torch.equal(without[2]["network"][name], with_it[2]["network"][name])


@pytest.mark.slow
def test_a_narrow_dc_ae_learns_and_is_exported(
    alone: Processes, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "train.steps=60",
        "train.learning_rate=2e-3",
        "train.discriminator_start=1000",
        "train.log_every=20",
        "train.precision=bf16",
    ]
    recipe = recipe_of(tmp_path, recorded, *overrides, f"data.heldout_videos={recorded}", "train.checkpoint_every=1000")
    places = TrainingPaths(tmp_path / "out", tmp_path / "run", tmp_path / "episodes", 2)
    trainer, frames = trainer_of(recipe, alone)
    with frames:
        heldout = frames.heldout()
    assert heldout is not None and heldout.shape == (32, 3, 32, 32)  # four frames of each of eight videos
    first = autoencoders.build_network(NARROW)
    first.load_state_dict(trainer.ema_state_dict)
    before = psnr(autoencoders.Autoencoder("first", "", 1.0, first, torch.device("cpu")), heldout)

    assert train_autoencoder(recipe, places, "the command", alone)
    said = capsys.readouterr().out
    assert said.count("no perceptual loss: train.perceptual_weights is not set, so that term is off\n") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 20, 40, 60] and "perceptual" not in lines[0]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    trained = autoencoders.load(tmp_path / "out" / "narrow.safetensors")
    metadata = json.loads((tmp_path / "out" / "narrow.json").read_text())
    assert metadata["psnr_db"] == round(psnr(trained, heldout), 2) and psnr(trained, heldout) > before + 4
    assert (metadata["weights_dtype"], metadata["command"], metadata["config"]) == ("float32", "the command", NARROW)
    assert trained.scaling_factor == 1 / metadata["latent_std"] and len(metadata["channel_std"]) == 8
    fewer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 50})})
    with pytest.raises(UserError, match=r"step-00000060\.pt: train\.steps: 50 are fewer than this checkpoint has"):
        train_autoencoder(fewer, places, "the command", alone)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "step-00000060.pt", weights_only=True)
    for name, weight in trained._network.state_dict().items():  # what is exported is the average
        assert torch.equal(weight, checkpoint["average"].get(name, checkpoint["network"][name]))


# Whole runs


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The log, without what a clock has said."""
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


@pytest.mark.slow
def test_ranks_kills_and_stops_change_nothing(recorded: Path, vgg: Path, tmp_path: Path) -> None:
    file = recipe_file(tmp_path, recorded)
    overrides = ["train.steps=14", "train.batch=8", "train.discriminator_start=6", f"train.perceptual_weights={vgg}"]

    def start(name: str, count: int) -> contextlib.AbstractContextManager[Ranks]:
        out, run = tmp_path / name / "out", tmp_path / name / "run"
        arguments = [file, *overrides, "--out", out, "--run-dir", run, "--workers", "1"]
        (tmp_path / name).mkdir(exist_ok=True)
        return running_ranks(count, TOOL, *arguments, output=tmp_path / name / "printed", preload=PRELOAD)

    def wait_for(step: int, run: Path) -> None:
        end = time.monotonic() + 120
        while not any(line["step"] >= step for line in lines_of(run)):
            assert time.monotonic() < end, (run.parent / "printed").read_text()
            time.sleep(0.02)

    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    printed = tmp_path / "broken" / "printed"
    with start("whole", 2) as ranks:
        assert ranks.wait(240) == [0, 0], (tmp_path / "whole" / "printed").read_text()
    with start("broken", 2) as ranks:
        wait_for(4, broken)
        for rank in ranks:
            rank.kill()
            rank.wait()
    killed_at = lines_of(broken)[-1]["step"]
    assert 4 <= killed_at < 14
    (broken / "checkpoints" / ".step-00000009.77.part.pt").write_bytes(b"half")
    with start("broken", 2) as ranks:
        wait_for(max(8, killed_at + 1), broken)
        ranks[1].terminate()
        assert ranks.wait(240) == [75, 75], printed.read_text()
    stopped_at = lines_of(broken)[-1]["step"]
    assert stopped_at < 14 and (broken / "checkpoints" / f"step-{stopped_at:08d}.pt").exists()
    with start("broken", 2) as ranks:
        assert ranks.wait(240) == [0, 0], printed.read_text()
    beginnings = [line for line in printed.read_text().splitlines() if line.startswith("narrow: from step")]
    assert beginnings[0] == "narrow: from step 0 to 14 on 2 ranks" and beginnings[1].startswith("narrow: from step ")
    assert 3 <= int(beginnings[1].split()[3]) <= killed_at
    assert beginnings[2:] == [f"narrow: from step {stopped_at} to 14 on 2 ranks"]

    assert lines_of(broken) == lines_of(whole) and [line["step"] for line in lines_of(whole)] == list(range(1, 15))
    assert {"squared", "absolute", "perceptual", "adversarial", "discriminator"} <= lines_of(whole)[8].keys()
    names = ["step-00000012.pt", "step-00000014.pt"]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == names
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == names
    own, other = (torch.load(run / "checkpoints" / names[1], weights_only=True) for run in (whole, broken))
    assert own.keys() >= {"network", "average", "optimizer", "discriminator", "discriminator_optimizer", "step"}
    same_everywhere(own, other)
    files = [tmp_path / name / "out" / "narrow.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()

    # One rank goes on where two were: equal but for rounding. Gradients are not continuous (signs of absolute errors,
    # ReLU, max-pooling): a sign that rounding turns moved their norms by 7e-4 where PyTorch ran without vectors.
    checkpoints = tmp_path / "one" / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / names[0], checkpoints)
    with start("one", 1) as ranks:
        assert ranks.wait(240) == [0]
    assert "from step 12 to 14 on 1 ranks" in (tmp_path / "one" / "printed").read_text()
    of_gradients = {"adversarial_weight": 1e-2, "grad_norm": 1e-2}
    assert lines_of(tmp_path / "one" / "run") == [
        {key: pytest.approx(value, rel=of_gradients.get(key, tolerance)) for key, value in line.items()}
        for line, tolerance in zip(lines_of(whole)[12:], (1e-4, 1e-3), strict=True)
    ]
    alone = torch.load(checkpoints / names[1], weights_only=True)
    for name in ("network", "average", "discriminator"):
        for key, tensor in alone[name].items():
            torch.testing.assert_close(tensor, own[name][key], rtol=1e-3, atol=2e-5)


def same_everywhere(own: Any, other: Any) -> None:
    """Bit for bit."""
    if isinstance(own, dict):
        assert own.keys() == other.keys()
        for key, value in own.items():
            same_everywhere(value, other[key])
    elif isinstance(own, Tensor):
        assert torch.equal(own, other)
    else:
        assert own == other


def small_recipe(folder: Path, **changes: str) -> Path:
    """The shipped compact recipe, small enough to be trained in a test; `changes` are replacements of whole lines."""
    lines = {
        "name": "name: small", "width": "  width: 16", "frames": "  frames: 40", "steps": "  steps: 40",
        "learning_rate": "  learning_rate: 5e-4",
        "latent_noise": "  latent_noise: 0.0", "train_seeds": "  train_seeds: [20000, 20008]",
        "heldout_seeds": "  heldout_seeds: [30000, 30001]",
        "warmup_steps": "  warmup_steps: 5", "precision": "  precision: fp32", **changes,
    }  # fmt: skip
    shipped = (CHECKOUT / "recipes" / "autoencoder_compact.yaml").read_text().splitlines()
    path = folder / "small.yaml"
    path.write_text("\n".join(lines.get(line.split(":")[0].strip(), line) for line in shipped) + "\n")
    return path


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run(TOOL, *arguments, preload=PRELOAD)


@pytest.mark.slow
def test_the_compact_one_improves_on_its_linear_start(tmp_path: Path) -> None:
    path, episodes = small_recipe(tmp_path), tmp_path / "episodes"
    folders = ("--run-dir", tmp_path / "run", "--episodes", episodes, "--workers", "1")
    done = run_tool(path, "--out", tmp_path / "weights", *folders)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "weights" / "small.safetensors"
    trained = autoencoders.load(written)
    metadata = json.loads(written.with_suffix(".json").read_text())
    heldout = read_frames([episodes / "episode-030000.npz"])
    assert metadata["psnr_db"] == round(psnr(trained, heldout), 2) and f"{metadata['psnr_db']} dB" in done.stdout
    assert trained.name == "small" and trained.scaling_factor == 1 / metadata["latent_std"]
    assert metadata["weights_dtype"] == "float16" and metadata["recipe"]["train"]["loss"]["absolute"] == 0.05
    assert metadata["command"] == f"python tools/train_autoencoder.py {path} --out {tmp_path / 'weights'}"

    frames = read_frames(sorted(episodes.glob("episode-02*.npz")))
    assert len(frames) == 320
    start = CompactAutoencoder(CompactConfig(width=16))
    start.start_from_patches(to_pixels(frames))
    linear = autoencoders.Autoencoder("start", "", 1.0, start, torch.device("cpu"))
    assert psnr(trained, frames) > psnr(linear, frames) + 0.03
    assert psnr(trained, heldout) > psnr(linear, heldout) + 0.03

    again = run_tool(path, "--out", tmp_path / "again", *folders)  # nothing is left to do but to write it
    assert again.returncode == 0 and "from step 40 to 40" in again.stdout
    assert (tmp_path / "again" / "small.safetensors").read_bytes() == written.read_bytes()
    other = run_tool(path, "train.learning_rate=2e-3", "--out", tmp_path / "other", *folders)
    assert other.returncode == 2 and other.stderr.splitlines()[-1].startswith("error: ")
    assert "changed since this checkpoint: train.learning_rate 0.0005 -> 0.002; put it back" in other.stderr


# Frames and checkpoints


def test_frames_follow_from_seed_and_step(alone: Processes, recorded: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, recorded)
    with (
        open_video_frames(recipe, 2, alone, print) as frames,
        open_video_frames(recipe, 1, alone, print) as others,
    ):
        batches = [frames.batch(step) for step in range(3)]
        assert batches[0].shape == (16, 3, 32, 32) and batches[0].dtype == torch.uint8
        assert torch.equal(others.batch(2), batches[2]) and not torch.equal(batches[0], batches[2])
    for rank in range(2):
        with open_video_frames(recipe, 1, dataclasses.replace(alone, rank=rank, world_size=2), print) as share:
            assert torch.equal(share.batch(1), batches[1].chunk(2)[rank])
    # Four clips a step and eight videos: two steps are an epoch, in which each video is seen once.
    for count in (8, 16):
        with open_video_frames(recipe, 1, alone, print) as frames:
            order = [int(frames._order(number // 8)[number % 8]) for number in range(count - 8, count)]
        assert sorted(order) == list(range(8))


def test_cutting_clips() -> None:
    def data(**changes: Any) -> VideoData:
        return VideoData(**{"videos": "videos", "size": 16, "clip_frames": 4, "frame_stride": 2, **changes})

    numbered = np.arange(30, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.uint8)
    starts = set()
    for seed in range(300):
        times = cut_clip(numbered, data(), np.random.default_rng(seed))[:, 0, 0, 0]
        assert (np.diff(times) == 2).all()
        starts.add(int(times[0]))
    assert starts == set(range(24))
    assert cut_clip(numbered, data(), None)[:, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert cut_clip(numbered[:6], data(), None)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert cut_clip(numbered[:2], data(), None)[:, 0, 0, 0].tolist() == [0, 1, 1, 1]

    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (4, 32, 64, 3))
    assert cut_clip(ramp, data(), None)[0, 0, :, 0].tolist() == pytest.approx(list(range(16, 48, 2)), abs=1)
    crops = [cut_clip(ramp, data(), np.random.default_rng(seed))[0, 0, 0, 0] for seed in range(40)]
    assert min(crops) < 8 and max(crops) > 24
    flipped = [cut_clip(ramp, data(flip=True, crop="center"), np.random.default_rng(seed)) for seed in range(20)]
    rising = [bool((np.diff(clip[..., 0].astype(int), axis=2) > 0).all()) for clip in flipped]
    assert 3 < sum(rising) < 17


def test_broken_videos_are_logged_and_skipped_up_to_a_budget(alone: Processes, recorded: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(recorded, tmp_path / "videos")
    first, second = sorted(videos.iterdir())[:2]
    first.write_bytes(first.read_bytes()[:3000])
    recipe, said = recipe_of(tmp_path, videos), list[str]()
    with open_video_frames(recipe, 2, alone, said.append) as frames:
        assert all(len(frames.batch(step)) == 16 for step in range(4))
    assert len(said) == 1 and said[0].startswith(f"left out: {first}: ")
    second.write_bytes(b"")
    with (
        pytest.raises(UserError, match=r"data\.videos: 2 of 8 videos cannot be used"),
        open_video_frames(recipe, 1, alone, said.append) as frames,
    ):
        for step in range(4):
            frames.batch(step)


def test_a_broken_checkpoint_gives_way_to_the_one_before(alone: Processes, tmp_path: Path) -> None:
    said = list[str]()
    checkpoints = Checkpoints(tmp_path, alone, said.append)
    assert checkpoints.load_newest() is None
    for step in (10, 20, 30):
        checkpoints.save(step, {"network": {"weight": torch.full((1000,), float(step))}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020.pt", "step-00000030.pt"]
    newest = tmp_path / "step-00000030.pt"
    newest.write_bytes(newest.read_bytes()[:2000])
    found = checkpoints.load_newest()
    assert found is not None and found[1]["step"] == 20 and found[1]["network"]["weight"][0] == 20
    assert len(said) == 1 and said[0].startswith(f"{newest}: this checkpoint is broken")
    (tmp_path / "step-00000020.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of these checkpoints can be read"):
        checkpoints.load_newest()


# Recipes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": "  widht: 16"}, "model.widht: unknown key; nearest valid key is model.width"),
        ({"width": "  kind: vae"}, "model.kind: must be 'dc_ae', got 'vae'"),
        ({"steps": "  steps: many"}, "train.steps: must be a valid integer"),
        ({"width": "  width: 20"}, "model.width: must be a multiple of 8"),
        ({"train_seeds": "  train_seeds: [20000, 20000]"}, "data.train_seeds: no seeds"),
        ({"heldout_seeds": "  heldout_seeds: [20001, 20005]"}, "data.heldout_seeds: some are in data.train_seeds"),
        ({"batch": "  batch: 32\n  loss: {squared: 0, absolute: 0}"}, "train.loss: squared and absolute are both 0"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_autoencoder_recipe(small_recipe(tmp_path, **changes))
    assert said in str(caught.value) and "small.yaml:" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sise=64"], "data.sise: unknown key; nearest valid key is data.size"),
        (["model.preset=f8c32"], "model.preset: set either this, to f8c32, f16c32 or f32c32, or model.config"),
        (["model.config=null"], "model.preset: set either this"),
        (["train.batch=18"], "train.batch: 18 frames are not a whole number of clips of data.clip_frames 4"),
        (["data.size=16"], "data.size: 16 is too small; the discriminator needs at least 24"),
        (["train.ema_decay=1"], "train.ema_decay: must be less than 1"),
        (["train.loss.gan=1"], "train.loss.gan: unknown key; nearest valid key is"),
    ],
)
def test_wrong_recipes_of_videos_are_refused_in_one_line(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of(tmp_path, tmp_path, *overrides)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_the_recipe_is_refused_in_one_line(alone: Processes, recorded: Path, tmp_path: Path) -> None:
    def refused(said: str, *overrides: str, ranks: int = 1) -> None:
        processes = dataclasses.replace(alone, world_size=ranks)
        places = TrainingPaths(tmp_path / "out", tmp_path / "run", tmp_path, 1)
        with pytest.raises(UserError, match=said) as caught:
            train_autoencoder(recipe_of(tmp_path, recorded, *overrides), places, "", processes)
        assert "\n" not in str(caught.value)

    refused(r"train\.batch: 16 frames, 4 clips, cannot be divided evenly among 3 ranks", ranks=3)
    refused(r"data\.size: 36 is not a multiple of 8", "data.size=36")
    refused("there is no config of an autoencoder here", f"model.config={tmp_path / 'absent.json'}")
    write_json(tmp_path / "odd.json", {"_class_name": "AutoencoderDC", "latent": 8})
    refused(
        r"odd\.json: model\.config: not a configuration of diffusers' AutoencoderDC",
        f"model.config={tmp_path / 'odd.json'}",
    )
    refused(
        r"narrow: data\.videos: .*absent: there is no such file or folder of videos",
        f"data.videos={tmp_path / 'absent'}",
    )
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_shipped_recipes_of_dc_ae_are_the_official_settings() -> None:
    for name, preset, size in (("f8c32", "f8c32", 64), ("f16c32", "f16c32", 128), ("f32c32", "f32c32", 256)):
        recipe = load_autoencoder_recipe(f"autoencoder_dc_{name}")
        train, data = recipe.train, recipe.data
        assert (recipe.model.preset, data.size, data.clip_frames, data.frame_stride) == (preset, size, 4, 2)
        assert (train.steps, train.discriminator_start, train.batch) == (200_000, 100_000, 128 * 4)
        assert (train.learning_rate, train.betas, train.schedule, train.warmup_steps) == (
            1e-4,
            (0.5, 0.9),
            "constant",
            0,
        )
        assert (train.ema_decay, train.precision, train.latent_noise) == (0.9999, "bf16", 0)
        assert train.loss.model_dump() == {"squared": 0, "absolute": 1, "perceptual": 1, "discriminator": 0.5}


def test_a_recipe_that_is_not_there_ends_the_tool_with_one_line() -> None:
    done = run_tool("absent.yaml")
    assert done.returncode == 2 and done.stderr.startswith("error: absent.yaml") and done.stderr.count("\n") == 1
