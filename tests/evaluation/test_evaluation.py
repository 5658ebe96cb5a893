"""Evaluation by a protocol, from recorded videos to scores: on any number of processes, killed and continued."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save, save_file

import far_scale.autoencoder
from far_scale.convert.model_dir import load_model_dir, save_model_dir
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes
from far_scale.evaluation import batches, metrics, weights
from far_scale.evaluation.clip_sets import ClipSource, select_clips
from far_scale.evaluation.pipeline import WorkShard, evaluate, open_evaluation
from far_scale.evaluation.protocol import Protocol, load_protocol
from far_scale.evaluation.rollouts.psnr_ssim import frame_ssim, psnr
from far_scale.evaluation.score_statistics import FeatureStatistics, frechet_distance
from far_scale.model import FAR, FARConfig
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.sampler import roll_out
from harness.foreign_sets import adopted, tar_of
from harness.launch import ROOT
from harness.processes import launch
from harness.random_models import write_random_model
from harness.random_networks import random_lpips
from harness.refusal import refused

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
CONFIG = FARConfig(layers=1, heads=1, patch=2, channels=32, window=16, actions=4)


@pytest.fixture(scope="module")
def model_dir(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that moves what it is given."""
    return write_random_model(tmp_path_factory.mktemp("evaluated") / "model", CONFIG, recorded_shards, std=0.05, step=3)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache folder with a random LPIPS network under the name `random`, and its SHA-256."""
    folder = tmp_path_factory.mktemp("cache")
    save_file(random_lpips("alex"), folder / "alex.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(weights.CACHE_VARIABLE, str(folder))
        return folder, weights.import_file("lpips-alex", folder / "alex.safetensors", "random").weights_sha256


@pytest.fixture(autouse=True)
def cache(networks: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, so that no test finds another one's baselines."""
    folder = tmp_path / "cache"
    shutil.copytree(networks[0] / "metrics", folder / "metrics")
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def protocol_file(networks: tuple[Path, str], tmp_path: Path) -> Callable[..., Path]:
    """Writes a protocol of five clips of 3 + 4 frames, with changes by section."""

    def write(name: str = "small", **changes: Any) -> Path:
        values: dict[str, Any] = {
            "clips": {"source": "test", "count": 5, "size": 64},
            "sampling": {"given": 3, "predicted": 4, "steps": 2, "batch": 2},
            "metrics": ["lpips", "psnr", "ssim"],
            "lpips": {"network": networks[1], "name": "random"},
            "psnr": {"mean_of": "set"},
            "ssim": {},
        }
        for section, change in changes.items():
            values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def run(
    model: Path, protocol: Protocol, out: Path, videos: Path, share: WorkShard | None = None, merge: bool = False
) -> dict[str, Any] | None:
    """`evaluate` in this process; the samples stay."""
    open_it = functools.partial(open_evaluation, model, None, protocol, out, ClipSource(videos), CPU)
    return evaluate(open_it, ALONE, share, merge, keep_samples=True)


def test_scores_are_the_same_on_any_number_of_processes_and_after_a_kill(
    model_dir: Path, recorded: Path, protocol_file: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    path = protocol_file(sampling={"seeds": [0, 2]})
    protocol = load_protocol(path)
    scores = run(model_dir, protocol, tmp_path / "alone", recorded)
    assert scores is not None and scores["n"] == 5 and set(scores["scores"]) == {"lpips", "psnr", "ssim"}
    expected = (tmp_path / "alone" / "scores.json").read_bytes()

    def same(out: Path) -> bool:
        arrays = [dict(np.load(folder / "per_clip.npz")) for folder in (tmp_path / "alone", out)]
        return (out / "scores.json").read_bytes() == expected and all(
            np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0]
        )

    tasks = tmp_path / "tasks"
    for task in (2, 0):
        assert run(model_dir, protocol, tasks, recorded, WorkShard(task, 3)) is None
    refused(lambda: run(model_dir, protocol, tasks, recorded, merge=True), "tasks", "3 of 9 batches are missing")
    shutil.rmtree(cache / "evaluation")
    assert run(model_dir, protocol, tasks, recorded, WorkShard(1, 3)) is None
    assert run(model_dir, protocol, tasks, recorded, merge=True) == scores and same(tasks)

    # A kill leaves files that are cut off, and some that are not there.
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "alone", killed)
    (killed / "scores.json").unlink()
    (killed / "units" / "seed-0-000001.npz").write_bytes(b"PK")
    (killed / "units" / "baseline-000002.npz").unlink()
    tool = [ROOT / "tools" / "evaluate.py", model_dir, "--protocol", path, "--videos", recorded, "--out", killed]
    done = launch(2, *tool)
    assert done.returncode == 0, done.stderr
    assert "model" in done.stdout and "LPIPS" in done.stdout and done.stdout.count("scores.json") == 1
    assert same(killed) and not (killed / "samples").exists()


def test_scores_are_those_of_the_saved_samples(
    model_dir: Path, recorded: Path, protocol_file: Callable[..., Path], tmp_path: Path, networks: tuple[Path, str]
) -> None:
    out = tmp_path / "out"
    scores = run(model_dir, load_protocol(protocol_file()), out, recorded)
    assert scores is not None
    keys = [f"episode-{number:06d}" for number in range(10_900, 10_905)]
    assert sorted(path.stem for path in (out / "samples").iterdir()) == keys
    model, metadata = load_model_dir(model_dir)
    autoencoder, lpips = (
        far_scale.autoencoder.load(metadata.autoencoder.name),
        weights.load_lpips("alex", label="random"),
    )
    squares, similar, distances, repeated = [], [], [], []
    for number, key in enumerate(keys):
        with np.load(out / "samples" / f"{key}.npz") as saved, np.load(recorded / f"{key}.npz") as video:
            frames, truth, actions = saved["frames"], saved["truth"], torch.from_numpy(video["actions"][:7]).long()
            assert np.array_equal(truth, video["frames"][:7]) and np.array_equal(frames[:3], truth[:3])
        context = autoencoder.encode(torch.from_numpy(truth[:3]).permute(0, 3, 1, 2).float() / 127.5 - 1)
        predicted = roll_out(
            model,
            metadata.scaling.normalise(context)[None],
            SamplingConfig(frames=4, steps=2, seed=0),
            actions=actions[None],
            clip_ids=[number],
        )
        pixels = autoencoder.decode(metadata.scaling.restore(predicted[0])) / 2 + 0.5
        # In another batch than the evaluation's, sums are rounded otherwise: now and then to the next of 256 values.
        ours = (pixels * 255).round().permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - frames[3:]).max() <= 1 and (ours != frames[3:]).mean() < 0.01
        new, true = (torch.from_numpy(part[3:]).permute(0, 3, 1, 2).float() / 255 for part in (frames, truth))
        squares.append((((frames[3:].astype(np.float64) - truth[3:]) / 255) ** 2).mean())
        similar.append(frame_ssim(new, true).double().mean().item())
        distances.append(lpips(new, true).double().mean().item())
        repeated.append((((truth[2].astype(np.float64) - truth[3:]) / 255) ** 2).mean())
    assert scores["scores"]["psnr"]["mean"] == pytest.approx(psnr(float(np.mean(squares))), abs=1e-9)
    assert scores["scores"]["ssim"]["mean"] == pytest.approx(np.mean(similar), abs=1e-5)
    assert scores["scores"]["lpips"]["mean"] == pytest.approx(np.mean(distances), abs=1e-5)
    assert scores["repeat_last"]["psnr"]["mean"] == pytest.approx(psnr(float(np.mean(repeated))), abs=1e-9)
    assert scores["reconstruction"]["psnr"]["mean"] > 28 > scores["repeat_last"]["psnr"]["mean"]
    low, high = scores["scores"]["psnr"]["ci95"]
    assert low < scores["scores"]["psnr"]["mean"] < high
    assert (
        scores["protocol_hash"]
        == load_protocol(protocol_file()).with_clips(fingerprint=scores["settings"]["clips"]["fingerprint"]).hash()
    )


def test_baselines_are_computed_once_for_all_models(
    model_dir: Path, recorded: Path, protocol_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = load_protocol(protocol_file())
    first = run(model_dir, protocol, tmp_path / "first", recorded)
    monkeypatch.setattr(batches._BatchWorker, "_compute_baseline", None)
    assert run(model_dir, load_protocol(protocol_file("other", sampling={"steps": 1})), tmp_path / "b", recorded)
    # Other videos under the same names are not taken for them.
    changed = tmp_path / "changed"
    shutil.copytree(recorded, changed)
    with np.load(changed / "episode-010900.npz") as video:
        arrays = dict(video)
    arrays["frames"] = 255 - arrays["frames"]
    np.savez(changed / "episode-010900.npz", **arrays)
    with pytest.raises(TypeError):
        run(model_dir, protocol, tmp_path / "c", changed)
    assert first is not None


def test_a_folder_takes_one_evaluation_only(
    model_dir: Path, recorded: Path, protocol_file: Callable[..., Path], tmp_path: Path
) -> None:
    out, protocol = tmp_path / "out", load_protocol(protocol_file())
    run(model_dir, protocol, out, recorded)
    refused(lambda: run(model_dir, protocol.with_clips(count=4), out, recorded), "evaluation.json", "protocol_hash")
    refused(lambda: run(model_dir, protocol.with_metrics(("psnr",)), out, recorded), "evaluation.json", "metrics")
    (out / "scores.json").unlink()
    shutil.copy(out / "samples" / "episode-010900.npz", out / "samples" / "left-over.npz")
    refused(lambda: run(model_dir, protocol, out, recorded), "left-over.npz", "remove it")
    (out / "samples" / "left-over.npz").unlink()
    assert run(model_dir, protocol, out, recorded)


def test_clips_that_do_not_fit_are_refused(
    model_dir: Path, recorded: Path, recorded_shards: Path, protocol_file: Callable[..., Path], tmp_path: Path
) -> None:
    def opened(protocol: Path, videos: Path | None = recorded, shards: Path | None = None) -> Any:
        return open_evaluation(
            model_dir, None, load_protocol(protocol), tmp_path / "o", ClipSource(videos, shards), CPU, first=True
        )

    refused(lambda: opened(protocol_file(clips={"count": 9})), "has 8 clips", "takes 9", "--clips 8")
    refused(lambda: opened(protocol_file(clips={"size": 128})), "clips.size is 128", "64x64")
    refused(lambda: opened(protocol_file(clips={"fingerprint": "0" * 64})), "clips.fingerprint")
    refused(lambda: opened(protocol_file(clips={"per_class": 9})), "class 0 has 8 videos")
    refused(lambda: opened(protocol_file(sampling={"weights": "model"})), "ema weights", "takes model")
    refused(lambda: opened(protocol_file(sampling={"guidance": 0.5})), "sampling.guidance")
    refused(lambda: opened(protocol_file(lpips={"network": "0" * 64}), None), "--videos or --shards")
    refused(lambda: opened(protocol_file(), None, recorded), "there is no shard set here")
    long = protocol_file(sampling={"predicted": 40})
    refused(lambda: run(model_dir, load_protocol(long), tmp_path / "long", recorded), "24 frames", "needs 43")
    other = protocol_file(lpips={"network": "0" * 64})
    refused(
        lambda: run(model_dir, load_protocol(other), tmp_path / "n", recorded), "lpips.network", "tools/metric_weights"
    )
    assert not (tmp_path / "o").exists()


def test_a_shard_sets_decoded_latents_are_another_truth(
    model_dir: Path, recorded_shards: Path, recorded: Path, protocol_file: Callable[..., Path], tmp_path: Path
) -> None:
    protocol = load_protocol(protocol_file())
    open_it = functools.partial(
        open_evaluation, model_dir, None, protocol, tmp_path / "s", ClipSource(shards=recorded_shards), CPU
    )
    scores = evaluate(open_it, ALONE, None, False, keep_samples=True)
    of_videos = run(model_dir, protocol, tmp_path / "v", recorded)
    assert scores is not None and of_videos is not None
    assert scores["reconstruction"] is None and scores["settings"]["clips"]["pixels"] == "decoded"
    assert scores["protocol_hash"] != of_videos["protocol_hash"]
    with (
        np.load(tmp_path / "s" / "samples" / "episode-010900.npz") as ours,
        np.load(tmp_path / "v" / "samples" / "episode-010900.npz") as theirs,
    ):
        difference = np.abs(ours["truth"].astype(int) - theirs["truth"].astype(int))
    assert 0 < difference.mean() < 8  # the autoencoder's error


def test_shards_of_others_may_have_the_same_keys(
    model_dir: Path, recorded_shards: Path, protocol_file: Callable[..., Path], tmp_path: Path
) -> None:
    own = ShardSet.open(recorded_shards)
    (tmp_path / "theirs").mkdir()
    for shard in range(2):
        sample = own.read(0, shard)
        assert sample.actions is not None
        data = save({"latent": sample.latents, "action": sample.actions})
        tar_of(tmp_path / "theirs" / f"{shard}.tar", {"0.safetensors": data})
    m = own.manifest
    options = {"layout": "FCHW", "actions": m.actions, "fps": 8.0}
    adopted(tmp_path / "theirs", tmp_path / "set", autoencoder=m.autoencoder.name, **options)
    protocol = load_protocol(protocol_file(clips={"count": 2}))
    source = ClipSource(shards=tmp_path / "set")
    evaluation = open_evaluation(model_dir, None, protocol, tmp_path / "s", source, CPU, first=True)
    assert evaluation.clips.keys == ["0-0", "1-0"]


def test_the_best_sample_counts_and_fvd_is_a_mean_over_samples(
    model_dir: Path, recorded: Path, protocol_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for I3D, whose logits are the mean colours of each frame."""

    class Colours(torch.nn.Module):
        def forward(self, video: torch.Tensor) -> torch.Tensor:
            assert video.dtype == torch.uint8 and len(video) == 3
            return video.float().mean(dim=(3, 4)).flatten(1)

    monkeypatch.setattr(metrics, "_load_i3d", lambda section, device: Colours())
    monkeypatch.setattr("far_scale.evaluation.protocol.MIN_FRAMES", 4)
    path = protocol_file(
        sampling={"trajectories": 2, "seeds": [0, 3]},
        metrics=["lpips", "psnr", "ssim", "fvd"],
        fvd={"network": "0" * 64, "batch": 3},
        psnr={"mean_of": "frames"},
        frames={"given": "decoded"},
    )
    out = tmp_path / "out"
    scores = run(model_dir, load_protocol(path), out, recorded)
    assert scores is not None
    best, distances = [], []
    for folder in (out / "samples", out / "samples" / "seed-3"):
        files = [np.load(folder / f"episode-{number:06d}.npz") for number in range(10_900, 10_905)]
        frames = np.stack([file["frames"] for file in files]).astype(np.float64)  # [5, 2, 7, 64, 64, 3]
        truth = np.stack([file["truth"] for file in files]).astype(np.float64)
        assert not np.array_equal(frames[:, :, :3], np.repeat(truth[:, None, :3], 2, axis=1))
        errors = ((frames - truth[:, None])[:, :, 3:] / 255) ** 2
        values = -10 * np.log10(errors.mean(axis=(3, 4, 5)))
        best.append(values.mean(axis=2).max(axis=1))
        logits, real = (torch.from_numpy(x.mean(axis=(-3, -2)).reshape(*x.shape[:-4], -1)) for x in (frames, truth))
        statistics = FeatureStatistics.of(real)
        distances.append(np.mean([frechet_distance(FeatureStatistics.of(logits[:, n]), statistics) for n in (0, 1)]))
    assert scores["scores"]["psnr"]["mean"] == pytest.approx(np.mean(best), rel=1e-9)
    assert scores["scores"]["fvd"]["mean"] == pytest.approx(np.mean(distances), rel=1e-3)
    assert scores["scores"]["fvd"]["std"] == pytest.approx(np.std(distances, ddof=1), rel=1e-2)
    assert scores["repeat_last"]["fvd"]["mean"] > scores["reconstruction"]["fvd"]["mean"]


def test_generation_from_nothing_by_class(
    recorded: Path, model_dir: Path, protocol_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No given frames, labels from the folders, and a balanced draw."""
    videos = tmp_path / "videos"
    for number, path in enumerate(sorted(recorded.iterdir())):
        (videos / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, videos / "ab"[number % 2])
    config = replace(CONFIG, actions=0, labels=2)
    draw = torch.Generator().manual_seed(1)
    state = {name: torch.randn(x.shape, generator=draw) * 0.05 for name, x in FAR(config).state_dict().items()}
    _, metadata = load_model_dir(model_dir)
    save_model_dir(tmp_path / "labels", config, state, metadata.model_copy(update={"classes": ("a", "b")}))
    monkeypatch.setattr(
        metrics, "_load_i3d", lambda section, device: lambda video: video.float().mean(dim=(3, 4)).flatten(1)
    )
    protocol = load_protocol(
        protocol_file(
            clips={"count": 4, "per_class": 2, "seed": 1},
            sampling={"given": 0, "predicted": 9, "guidance": 2.0},
            metrics=["fvd"],
            fvd={"network": "0" * 64},
        )
    )
    scores = run(tmp_path / "labels", protocol, tmp_path / "out", videos)
    assert scores is not None and scores["guidance"] == 2 and scores["repeat_last"] is None
    assert set(scores["scores"]) == set(scores["reconstruction"]) == {"fvd"}
    keys = [path.stem for path in (tmp_path / "out" / "samples").iterdir()]
    assert sorted(key[0] for key in keys) == ["a", "a", "b", "b"]


def test_selection_follows_the_list(protocol_file: Callable[..., Path]) -> None:
    protocol = load_protocol(protocol_file(clips={"every": 3, "count": 3}))
    assert select_clips(list(range(10)), lambda item: None, protocol, "set") == [0, 3, 6]
    protocol = load_protocol(protocol_file(clips={"per_class": 2, "count": 4, "seed": 5}))
    chosen = select_clips(list(range(20)), lambda item: item % 2, protocol, "set")
    assert len(set(chosen)) == 4 and sorted(item % 2 for item in chosen) == [0, 0, 1, 1]
    assert chosen == select_clips(list(range(20)), lambda item: item % 2, protocol, "set")
    other = load_protocol(protocol_file(clips={"per_class": 2, "count": 4, "seed": 6}))
    assert chosen != select_clips(list(range(20)), lambda item: item % 2, other, "set")
    refused(lambda: select_clips([1, 2], lambda item: None, protocol, "set"), "clips.per_class", "class")
