"""Evaluation end to end on recorded files, with an autoencoder whose pixels are known: 8x8 means."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import far_scale.autoencoder
from far_scale.config.recipe import load_recipe
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, load_model_dir, save_model_dir
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.writer import ShardSetSpec, ShardWriter
from far_scale.evaluation.rollouts import rollout as rollouts
from far_scale.evaluation.rollouts import run_report as reports
from far_scale.evaluation.rollouts.runner import evaluate_rollout, prepare_rollout, write_rollout
from far_scale.model import FAR, FARConfig
from far_scale.sampling.config import SamplingConfig
from far_scale.utils.errors import UserError
from harness.refusal import refused

GIVEN, FRAMES, EPISODES = 2, 3, 2
CONFIG = FARConfig(layers=1, heads=1, channels=3, window=4, actions=4)
PLAIN = FARConfig(layers=1, heads=1, channels=3, window=4)
INFO = AutoencoderInfo(name="means", weight_hash="12" * 32, scaling_factor=1.0)


def settings(**changes: Any) -> dict[str, Any]:
    """The settings of a rollout, with changes to those of sampling, `given` or `episodes`."""
    values = {"given": GIVEN, "frames": FRAMES, "steps": 2, "guidance": 1.0, "seed": 5, "episodes": 8} | changes
    given, episodes = values.pop("given"), values.pop("episodes")
    return {"sampling": SamplingConfig(**values), "given": given, "episodes": episodes}


class Means:
    """Encodes to the mean of each 8x8 block, decodes to flat blocks."""

    name, weight_hash, scaling_factor = INFO.name, INFO.weight_hash, INFO.scaling_factor
    latent_channels, downsample = 3, 8

    def encode(self, pixels: Tensor) -> Tensor:
        return functional.avg_pool2d(pixels, 8)

    def decode(self, latents: Tensor) -> Tensor:
        return functional.interpolate(latents, scale_factor=8).clamp(-1, 1)


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> type[Means]:
    def load(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Means:
        assert name == "means"
        return Means()

    monkeypatch.setattr(far_scale.autoencoder, "load", load)
    return Means


def metadata(**changes: object) -> ModelMetadata:
    values = {
        "autoencoder": INFO,
        "scaling": LatentScaling(shift=(0.1, 0.2, 0.3), scale=(2.0, 1.0, 0.5)),
        "latent_shape": (3, 2, 2),
        "fps": 8.0,
        "training": TrainingMetadata(step=3, recipe_hash="r", weights="ema", far_scale="0"),
    }
    return ModelMetadata.model_validate(values | changes)


@pytest.fixture
def model() -> FAR:
    """A fresh model's velocity is zero, so it would answer with its noise; these weights do something."""
    draw = torch.Generator().manual_seed(0)
    model = FAR(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return model


def pixels(episode: int, frames: int) -> np.ndarray:
    """Blocks of random colours, so that the autoencoder loses nothing."""
    blocks = np.random.default_rng(episode).integers(0, 256, (frames, 2, 2, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def actions(episode: int, frames: int) -> np.ndarray:
    return (np.arange(frames) + episode) % 4


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    for episode in range(EPISODES):
        file = tmp_path / "videos" / f"episode_{episode}.npz"
        np.savez(file, frames=pixels(episode, 12), actions=actions(episode, 12), fps=8.0)
    return tmp_path / "videos"


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    facts = ShardSetSpec(latent_shape=(3, 2, 2), latent_dtype="float16", autoencoder=INFO, actions=4, labels=0)
    with ShardWriter(tmp_path / "shards", facts, 1) as writer:
        for episode in range(EPISODES):
            frames = torch.from_numpy(pixels(episode, 12)).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = Means().encode(frames).half()
            writer.write(
                Sample(f"e{episode}", latents, torch.from_numpy(actions(episode, 12)), None, 8.0, f"e{episode}.npz")
            )
    return ShardSet.open(tmp_path / "shards")


def test_videos_give_samples_pictures_and_metrics(model: FAR, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate_rollout(model, metadata(), videos, **settings(), out=out)
    assert sorted(os.listdir(out)) == ["metrics.json", "samples.mp4", "samples.png", "samples.safetensors"]
    assert json.loads((out / "metrics.json").read_text()) == report
    assert report["truth"] == "recorded pixels"
    assert len(report["episodes"]) == EPISODES
    latents = load_file(out / "samples.safetensors")["latents"]
    assert latents.shape == (EPISODES, FRAMES, 3, 2, 2)

    # the figures, worked out again from the saved latents and the recorded files
    restored = latents / torch.tensor([2.0, 1.0, 0.5]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    shown = (restored.clamp(-1, 1) / 2 + 0.5).numpy()
    real = np.stack([pixels(episode, 12)[:, ::8, ::8] for episode in range(EPISODES)]).transpose(0, 1, 4, 2, 3) / 255
    for name, guess in (("prediction", shown), ("repeat_last", real[:, GIVEN - 1 : GIVEN])):
        errors = ((guess - real[:, GIVEN : GIVEN + FRAMES]) ** 2).mean(axis=(0, 2, 3, 4))
        expected = -10 * np.log10(errors)
        assert report[name]["psnr_per_frame"] == pytest.approx(expected.tolist(), abs=1e-2), name


def test_shards_give_the_same_samples_as_their_videos(
    model: FAR, videos: Path, shards: ShardSet, tmp_path: Path
) -> None:
    from_videos = evaluate_rollout(model, metadata(), videos, **settings(), out=tmp_path / "a")
    from_shards = evaluate_rollout(model, metadata(), shards, **settings(), out=tmp_path / "b")
    assert from_shards["truth"] == "decoded latents"
    one, other = (load_file(tmp_path / name / "samples.safetensors")["latents"] for name in "ab")
    assert torch.allclose(one, other, atol=1e-2)  # the shards hold float16
    for name in ("prediction", "repeat_last"):
        assert from_shards[name]["psnr"] == pytest.approx(from_videos[name]["psnr"], abs=0.05)


def test_a_saved_model_samples_the_same_bytes(model: FAR, videos: Path, tmp_path: Path) -> None:
    evaluate_rollout(model, metadata(), videos, **settings(), out=tmp_path / "a")
    save_model_dir(tmp_path / "model", CONFIG, model.state_dict(), metadata())
    evaluate_rollout(*load_model_dir(tmp_path / "model"), videos, **settings(), out=tmp_path / "b")
    for name in ("samples.safetensors", "samples.png", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_without_a_truth_there_are_no_metrics(videos: Path, tmp_path: Path) -> None:
    everything = settings(given=12)  # all that was recorded
    (tmp_path / "metrics.json").write_text("{}")
    report = evaluate_rollout(FAR(PLAIN), metadata(), videos, **everything, out=tmp_path)
    assert report["truth"] is None and report["truth_frames"] == 0 and "prediction" not in report
    assert not (tmp_path / "metrics.json").exists()
    assert load_file(tmp_path / "samples.safetensors")["latents"].shape[1] == FRAMES
    from_nothing = evaluate_rollout(FAR(PLAIN), metadata(), videos, **settings(given=0, episodes=1), out=tmp_path)
    assert from_nothing["truth"] is None and len(from_nothing["episodes"]) == 1
    assert (tmp_path / "samples.mp4").stat().st_size > 0


@pytest.mark.slow
def test_metrics_cover_the_frames_with_a_truth(videos: Path, shards: ShardSet, tmp_path: Path) -> None:
    known = evaluate_rollout(FAR(PLAIN), metadata(), videos, **settings(frames=10), out=tmp_path / "known")
    np.savez(videos / "episode_1.npz", frames=pixels(1, 14), fps=8.0)  # the other one ends earlier
    for source, truth in ((videos, "recorded pixels"), (shards, "decoded latents")):
        report = evaluate_rollout(FAR(PLAIN), metadata(), source, **settings(frames=25), out=tmp_path / "further")
        assert report["truth"] == truth and report["truth_frames"] == 10
        assert load_file(tmp_path / "further" / "samples.safetensors")["latents"].shape[1] == 25
        for name in ("prediction", "repeat_last"):
            assert len(report[name]["psnr_per_frame"]) == 10
            assert report[name]["psnr"] == pytest.approx(known[name]["psnr"], abs=0.05)


def test_several_batches_of_episodes_equal_single_episodes(
    model: FAR, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = evaluate_rollout(model, metadata(), videos, **settings(), out=tmp_path / "a")
    monkeypatch.setattr(rollouts, "EPISODES_PER_BATCH", 1)
    one_by_one = evaluate_rollout(model, metadata(), videos, **settings(), out=tmp_path / "b")
    latents = [load_file(tmp_path / name / "samples.safetensors")["latents"] for name in "ab"]
    assert latents[1].shape == latents[0].shape and torch.allclose(latents[1], latents[0], atol=1e-5)
    for name in ("prediction", "repeat_last"):
        for key, value in together[name].items():
            assert one_by_one[name][key] == pytest.approx(value, abs=1e-4), (name, key)


def test_the_given_frames_follow_from_the_recording(model: FAR, videos: Path) -> None:
    for frames, given in ((3, 4), (8, 4), (10, 2), (11, 1)):  # of 12, for a window of 4
        assert prepare_rollout(model, metadata(), videos, **settings(given=None, frames=frames)).given == given
    assert prepare_rollout(FAR(PLAIN), metadata(), videos, **settings(given=None, frames=300)).given == 1
    assert prepare_rollout(model, metadata(frame_stride=3), videos, **settings(given=None, frames=3)).given == 1


def test_unconditional_sampling_needs_no_actions(model: FAR, tmp_path: Path) -> None:
    np.savez(tmp_path / "silent.npz", frames=pixels(0, 12))
    unconditional = settings(guidance=-1.0, frames=14)
    report = evaluate_rollout(model, metadata(), tmp_path / "silent.npz", **unconditional, out=tmp_path / "out")
    assert report["truth_frames"] == 10 and load_file(tmp_path / "out" / "samples.safetensors")["latents"].std() > 0.1


def test_the_summary_has_the_memory(model: FAR, videos: Path) -> None:
    # 2 for k and v, 64 wide, float32: a window of 4 frames of 4 tokens, two rows a clip for the guidance
    said = prepare_rollout(model, metadata(), videos, **settings(guidance=1.5)).summary()
    assert f"cache {2 * 64 * 4 * 4 * 4 * EPISODES * 2 / 1e6:.1f} MB" in said
    for part in ("1 layers", "window 4, no context", "2 clips", "2 frames given + 3 new", "2 steps", "guidance 1.5"):
        assert part in said
    long = FAR(dataclasses.replace(CONFIG, context_patch=2))
    said = prepare_rollout(long, metadata(), videos, **settings(frames=10, episodes=1)).summary()
    # eight frames of context, of one token each
    assert "window 4, context patch 2: 1 clips" in said and f"cache {2 * 64 * 4 * (16 + 8) / 1e6:.1f} MB" in said


@pytest.mark.slow
def test_a_long_roll_out_keeps_no_decoded_frames(tmp_path: Path, means: type[Means], monkeypatch) -> None:
    """300 frames of 256 pixels are 59 MB as bytes, 236 MB as floats; the process may grow by a third of the former."""
    page, resident = os.sysconf("SC_PAGE_SIZE"), []

    def decode(self: Means, latents: Tensor) -> Tensor:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
        return functional.interpolate(latents, scale_factor=128).clamp(-1, 1)

    monkeypatch.setattr(means, "decode", decode)
    monkeypatch.setattr(means, "downsample", 128)
    np.savez(tmp_path / "one.npz", frames=np.zeros((1, 256, 256, 3), np.uint8))
    monkeypatch.setattr(means, "encode", lambda self, pixels: functional.avg_pool2d(pixels, 128))
    rollout = prepare_rollout(FAR(PLAIN), metadata(), tmp_path / "one.npz", SamplingConfig(299, 1), 1, 1)
    report = write_rollout(rollout, tmp_path / "long.mp4")
    assert len(resident) == 300 and report["truth"] is None
    settled = 60  # frames, after which the encoder has filled its queues
    assert max(resident[settled:]) - resident[settled] < 20e6


def test_the_models_frame_stride_is_used(model: FAR, videos: Path, tmp_path: Path) -> None:
    report = evaluate_rollout(model, metadata(frame_stride=2), videos, **settings(), out=tmp_path / "out")
    real = np.stack([pixels(episode, 12)[::2, ::8, ::8] for episode in range(EPISODES)]) / 255
    expected = -10 * np.log10(((real[:, GIVEN - 1 : GIVEN] - real[:, GIVEN : GIVEN + FRAMES]) ** 2).mean())
    assert report["repeat_last"]["psnr"] == pytest.approx(expected, abs=1e-2)


def test_what_does_not_fit_is_refused_and_nothing_is_written(
    model: FAR, videos: Path, shards: ShardSet, means: type[Means], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    other = INFO.model_copy(update={"weight_hash": "ff" * 32})
    cases = [
        (metadata(), videos, {"given": 13, "guidance": -1.0}, r"12 frames, but 13 are needed \(13 given ones\)"),
        (metadata(), shards, {"given": 13, "guidance": -1.0}, r"12 frames, but 13 are needed \(13 given ones\)"),
        (metadata(), videos, {"frames": 0}, "at least 0, 1 and 1"),
        (metadata(), videos, {"given": -1}, "at least 0, 1 and 1"),
        (metadata(), videos, {"guidance": 0.5}, "guidance: 0.5 has no meaning"),
        (
            metadata(),
            videos,
            {"frames": 11},
            r"episode_0.npz: 12 frames, but 13 are needed \(for the actions of 2 given",
        ),
        (metadata(), shards, {"frames": 11}, "sample 0 of shard 0: 12 frames, but 13 are needed"),
        (metadata(frame_stride=3), videos, {}, r"12 frames, but 13 are needed .* one in 3 frames taken"),
        (metadata(latent_shape=(3, 4, 4)), shards, {}, "frame latents of"),
        (metadata(autoencoder=other), videos, {}, "autoencoder means: its weights"),
    ]
    for model_metadata, source, changes, message in cases:
        with pytest.raises(UserError, match=message):
            evaluate_rollout(model, model_metadata, source, **settings(**changes), out=out)
    monkeypatch.setattr(means, "weight_hash", "ff" * 32)
    with pytest.raises(UserError, match="the latents are by means"):
        evaluate_rollout(model, metadata(autoencoder=other), shards, **settings(), out=out)
    np.savez(videos / "a_without_actions.npz", frames=pixels(0, 12))
    monkeypatch.setattr(means, "weight_hash", INFO.weight_hash)
    with pytest.raises(UserError, match=r"a_without_actions.npz: holds no actions"):
        evaluate_rollout(model, metadata(), videos, **settings(), out=out)
    assert not out.exists()


@pytest.mark.slow
def test_a_run_is_reported_once_and_long_clips_by_fewer_episodes(
    model: FAR, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "load_for_sampling", lambda folder: (model, metadata()))
    sampled: list[dict[str, Any]] = []

    def watched(*arguments: Any, **options: Any) -> dict[str, Any]:
        sampled.append(options)
        return evaluate_rollout(*arguments, **options)

    monkeypatch.setattr(reports, "evaluate_rollout", watched)

    def reported(*overrides: str) -> dict[str, object]:
        small = ["data.frames=5", "sample.given=2", "sample.steps=1", *overrides]
        load_recipe("demo_cpu", small).save(tmp_path / "run" / "recipe.yaml")
        return reports.report_run(tmp_path / "run", tmp_path / "model", videos, tmp_path / "out")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1.0, "learning_rate": 0.1}\n')
    first = reported()
    assert (first["given"], first["frames"], first["truth_frames"], len(first["episodes"])) == (2, 3, 3, EPISODES)
    assert all((tmp_path / "out" / name).stat().st_size for name in reports.REPORT_FILES)
    assert reported() == first and len(sampled) == 1
    assert sampled[0]["episodes"] == reports.EPISODES

    monkeypatch.setattr(reports, "evaluate_rollout", lambda *arguments, **options: sampled.append(options) or {})
    for frames, episodes in ((160, 8), (2000, 1)):
        reported("model.context_patch=4", f"sample.frames={frames}")
        assert (sampled[-1]["sampling"].frames, sampled[-1]["episodes"]) == (frames, episodes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a recipe and a log, whose model is not of its recipe."""
    (tmp_path / "run").mkdir()
    small = ["data.frames=5", "sample.given=2", "sample.steps=1"]
    load_recipe("demo_cpu", small).save(tmp_path / "run" / "recipe.yaml")
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1.0, "learning_rate": 0.1}\n')
    return tmp_path / "run"


@pytest.mark.slow
def test_a_report_is_reused_only_for_the_same_content(
    model: FAR, videos: Path, shards: ShardSet, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of videos and weights of the same names, too."""
    sampled: list[object] = []

    def watched(*arguments: Any, **options: Any) -> dict[str, Any]:
        sampled.append(options)
        return evaluate_rollout(*arguments, **options)

    monkeypatch.setattr(reports, "evaluate_rollout", watched)
    folder, out = tmp_path / "model", tmp_path / "out"
    save_model_dir(folder, CONFIG, model.state_dict(), metadata())

    def made_anew(source: Path = videos) -> bool:
        before = len(sampled)
        report = reports.report_run(run, folder, source, out)
        assert json.loads((out / "metrics.json").read_text()) == report
        return len(sampled) > before

    assert made_anew() and not made_anew()
    np.savez(videos / "episode_1.npz", frames=pixels(7, 12), actions=actions(7, 12), fps=8.0)
    assert made_anew() and not made_anew()
    save_model_dir(folder, CONFIG, model.state_dict(), metadata(scaling=LatentScaling((0.0,) * 3, (1.0,) * 3)))
    assert made_anew() and not made_anew()
    model.output.out.bias.data += 1
    save_model_dir(folder, CONFIG, model.state_dict(), metadata())
    assert made_anew() and not made_anew()
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "loss": 0.5, "learning_rate": 0.1}\n')
    assert made_anew() and not made_anew()
    os.truncate(out / "samples.png", 10)
    assert made_anew() and not made_anew()
    (out / "metrics.json").write_text("[]")
    assert made_anew() and not made_anew()
    assert made_anew(Path(shards.folder)) and not made_anew(Path(shards.folder))
    assert json.loads((out / "metrics.json").read_text())["truth"] == "decoded latents"


def test_a_report_warns_of_differences_between_model_and_run(
    model: FAR, videos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_dir(tmp_path / "model", CONFIG, model.state_dict(), metadata(frame_stride=2))
    reports.report_run(run, tmp_path / "model", videos, tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    for words in (
        "model.layers 1, the recipe has 4",
        "data.frame_stride 2, the recipe has 1",
        "data.autoencoder means",
    ):
        assert any(words in line and str(run) in line for line in said), said


def test_a_set_of_other_classes_than_the_models_is_refused(model: FAR, shards: ShardSet) -> None:
    more = FAR(dataclasses.replace(CONFIG, actions=6))
    refused(
        lambda: prepare_rollout(more, metadata(), shards, **settings()),
        "4 actions, the model was trained on 6",
        "guidance -1",
    )
    assert prepare_rollout(more, metadata(), shards, **settings(guidance=-1.0)).given == GIVEN


@pytest.mark.parametrize("guidance", [float("inf"), float("nan"), float("-inf")])
def test_a_guidance_that_is_no_number_is_refused(model: FAR, videos: Path, guidance: float) -> None:
    refused(
        lambda: prepare_rollout(model, metadata(), videos, **settings(guidance=guidance)),
        "guidance",
        "no meaning",
    )


def test_seeds_have_64_bits(model: FAR, videos: Path) -> None:
    for seed in (2**64, -1):
        refused(
            lambda seed=seed: prepare_rollout(model, metadata(), videos, **settings(seed=seed)),
            "seed",
            "2^64 - 1",
        )
    assert prepare_rollout(model, metadata(), videos, **settings(seed=2**64 - 1)).sampling.seed == 2**64 - 1


def test_samples_that_are_not_finite_are_refused(model: FAR, videos: Path, tmp_path: Path) -> None:
    model.output.out.bias.data[0] = float("nan")
    refused(
        lambda: evaluate_rollout(model, metadata(), videos, **settings(), out=tmp_path / "out"), "frame 2", "not finite"
    )
    assert not (tmp_path / "out" / "metrics.json").exists() and not list(tmp_path.glob("out/*.mp4"))


def test_a_model_of_frames_that_are_no_squares(model: FAR, videos: Path, tmp_path: Path) -> None:
    """Video of its size is taken as it is; other video is not pressed into it."""
    wide = metadata(latent_shape=(3, 2, 4))
    np.savez(tmp_path / "wide.npz", frames=np.tile(pixels(0, 12), (1, 1, 2, 1)), actions=actions(0, 12), fps=8.0)
    one = settings(episodes=1)
    assert prepare_rollout(model, wide, tmp_path / "wide.npz", **one).episodes.context.shape == (1, GIVEN, 3, 2, 4)
    refused(lambda: prepare_rollout(model, wide, videos, **one), "episode_0.npz", "16x16", "32x16", "shard set")
