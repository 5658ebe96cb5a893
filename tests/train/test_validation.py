"""Validation while training: what it says, and that training does not notice it.

That it compiles no new graph is tested in test_training.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.convert.model_dir import load_model_dir
from far_scale.data.loader.pack_loader import Pack
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo, Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes
from far_scale.evaluation import validation_videos as validation_samples
from far_scale.evaluation.metric_networks import LPIPS
from far_scale.evaluation.rollouts.psnr_ssim import frame_ssim
from far_scale.evaluation.rollouts.runner import evaluate_rollout
from far_scale.evaluation.validation_videos import open_validation_videos
from far_scale.sampling.config import SamplingConfig
from far_scale.train.checkpoint.export import export
from far_scale.train.curriculum import Stage, stages
from far_scale.train.flow_matching import CLEAN, add_noise
from far_scale.train.held_out import HeldOut, open_held_out
from far_scale.train.validation import summary
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog, read_events
from harness.latent_sets import FACTS, write_set
from harness.launch import ROOT, small_recipe
from harness.processes import launch

pytestmark = pytest.mark.slow

# Seven clips in three packs, so that one of two ranks computes a pack that is not counted; three clips sampled.
VALIDATION = ["validation.every=2", "validation.clips=7", "validation.clips_per_pack=3"]
SAMPLES = ["validation.sample_every=4", "validation.sample_clips=3", "sample.steps=2"]
STEPS = ["train.steps=6", "optimizer.schedule=constant", "checkpoint.every=4"]
STAGES = {
    "zero3": "train.zero_stage=3",
    "zero1": "train.zero_stage=1",
    "bf16_zero3": "train.zero_stage=3 train.precision=bf16 train.whole_below=9999 train.activation_checkpointing=full",
    "bf16_zero2": "train.zero_stage=2 train.precision=bf16",
    "bf16_zero0": "train.zero_stage=0 train.precision=bf16",
}


@pytest.fixture(scope="module")
def runs(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of STAGES without and with validation, and a run whose samples cannot be written, on 2 ranks in one start.

    The tests name a cache folder without an LPIPS network.
    """
    out = tmp_path_factory.mktemp("validated")
    held_out = [*VALIDATION, f"validation.shards={recorded_shards}"]
    asked = []
    for name, stage in STAGES.items():
        asked += [f"{name}_plain {stage} {' '.join(STEPS)}"]
        asked += [f"{name}_validated {stage} {' '.join([*STEPS, *held_out, *(SAMPLES if name == 'zero3' else [])])}"]
    asked += [f"unwritable train.steps=1 optimizer.warmup_steps=0 {' '.join([*held_out, *SAMPLES])}"]
    (out / "unwritable").mkdir()
    (out / "unwritable" / "validation").write_text("no folder")
    finished = launch(2, ROOT / "tests/harness/training_worker.py", recorded_shards, out, ",".join(asked), timeout=500)
    assert finished.returncode == 0, finished.stderr[-9000:]
    (out / "console").write_text(finished.stdout)
    return out


@pytest.fixture(scope="module", autouse=True)
def no_networks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAR_SCALE_CACHE", str(tmp_path_factory.mktemp("no_networks")))
        yield


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def validations(run: Path) -> dict[int, dict[str, Any]]:
    found = [line for line in lines(run) if "validation" in line]
    assert all(line.keys() == {"step", "validation"} for line in found)
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps)), "each once"
    return {line["step"]: line["validation"] for line in found}


@pytest.mark.parametrize("name", STAGES)
def test_training_is_bit_for_bit_the_one_without(runs: Path, name: str, tmp_path: Path) -> None:
    plain, validated = runs / f"{name}_plain", runs / f"{name}_validated"
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (plain, validated)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    for weights in ("model", "ema"):
        tensors = []
        for run in (plain, validated):
            export(run, None, weights, tmp_path / run.name)  # type: ignore[arg-type]
            tensors.append(load_model_dir(tmp_path / run.name)[0].state_dict())
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert not validations(plain)
    assert sorted(validations(validated)) == [2, 4, 6]


def by_hand(run: Path, shards: Path, weights: str, out: Path) -> dict[str, Any]:
    """The loss of exported weights in float64, clip by clip."""
    export(run, None, weights, out)  # type: ignore[arg-type]
    model, metadata = load_model_dir(out, dtype=torch.float64)
    shard_set, recipe = ShardSet.open(shards), load_recipe(run / "recipe.yaml")
    places = [(shard, n) for shard, count in enumerate(shard_set.samples_per_shard) for n in range(count)][:7]
    assert recipe.validation is not None
    seed = HeldOut(recipe.validation, recipe.objective, shard_set, metadata.scaling, recipe.seed, None).noise_seed
    assert seed != recipe.seed
    clips, frames = [], []
    for number in range(3):
        samples = [shard_set.read(*place, frames=8) for place in places[3 * number : 3 * number + 3]]
        pack = Pack(
            latents=metadata.scaling.normalise(torch.cat([sample.latents for sample in samples])),
            actions=torch.cat([sample.actions for sample in samples if sample.actions is not None]),
            labels=None, clip_frames=(8,) * len(samples), keys=(), lane=number, step=0, lane_state={},
        )  # fmt: skip
        noisy = add_noise(pack, recipe.objective, model.config, seed)
        for clip in range(len(samples)):
            rows = slice(8 * clip, 8 * clip + 8)
            x, t, target = noisy.latents[rows].double(), noisy.timesteps[rows], noisy.target[rows].double()
            assert pack.actions is not None
            with torch.no_grad():
                velocity = model(x[None], t[None].double(), pack.actions[None, rows])[0]  # all actions, none dropped
            error = (velocity - target).square().mean(dim=(1, 2, 3))
            there = [frame for frame in range(8) if t[frame] != CLEAN]
            clips.append(error[there].mean().item())
            frames += [(frame, int(t[frame]), error[frame].item()) for frame in there]

    def mean(errors: list[float]) -> float | None:
        return sum(errors) / len(errors) if errors else None

    bands = {f"{low}-{low + 199}": (low, low + 199) for low in (1, 201, 401, 601, 801)}
    return {
        "loss": sum(clips) / 7,
        "timesteps": {key: mean([e for _, t, e in frames if a <= t <= b]) for key, (a, b) in bands.items()},
        "frames": {str(index): mean([e for frame, _, e in frames if frame == index]) for index in range(8)},
    }


@pytest.mark.parametrize(("weights", "key"), [("model", "weights"), ("ema", "ema")])
def test_the_loss_is_that_of_the_exported_weights(
    runs: Path, recorded_shards: Path, tmp_path: Path, weights: str, key: str
) -> None:
    """To the rounding of a float32 forward pass: means of some hundred errors that are each right to 1e-6 or so."""
    expected = by_hand(runs / "zero3_validated", recorded_shards, weights, tmp_path / "model")
    found = validations(runs / "zero3_validated")[6][key]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for part in ("timesteps", "frames"):
        assert found[part].keys() == expected[part].keys()
        assert found[part] == {name: pytest.approx(value, rel=1e-5) for name, value in expected[part].items()}


def test_stages_and_precisions_agree(runs: Path) -> None:
    reference = validations(runs / "zero3_validated")[6]
    for name in STAGES:
        found = validations(runs / f"{name}_validated")[6]
        for key in ("weights", "ema"):
            assert found[key]["loss"] == pytest.approx(reference[key]["loss"], rel=5e-3 if "bf16" in name else 1e-5)


def test_resumed_on_another_number_of_ranks(runs: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """One rank resumes from the checkpoint of step 4, to whose validation a kill did not let the run come."""
    before, run = runs / "zero3_validated", tmp_path / "resumed"
    shutil.copytree(before, run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    (run / "checkpoints/latest").unlink()
    kept = [line for line in lines(run) if not ("validation" in line and line["step"] == 4)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    overrides = [*STEPS, *VALIDATION, f"validation.shards={recorded_shards}", *SAMPLES, "train.zero_stage=3"]
    finished = launch(1, "-m", "far_scale.train", *small_recipe(recorded_shards, run, *overrides))
    assert finished.returncode == 0, finished.stderr[-9000:]

    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 7))
    two, one = validations(before), validations(run)
    assert sorted(one) == [2, 4, 6]
    for key in ("weights", "ema"):
        # The same weights in the same packs: only kernels for other numbers of threads could round differently.
        assert one[4][key]["loss"] == pytest.approx(two[4][key]["loss"], rel=1e-6)
        assert one[6][key]["loss"] == pytest.approx(two[6][key]["loss"], rel=1e-4)
    for metric in ("psnr", "ssim"):
        expected = two[4]["samples"]["prediction"][metric]
        assert one[4]["samples"]["prediction"][metric] == pytest.approx(expected, rel=1e-4)


def test_samples_are_those_of_the_exported_ema(runs: Path, recorded_shards: Path, tmp_path: Path) -> None:
    run = runs / "zero3_validated"
    export(run, None, "ema", tmp_path / "model")
    model, metadata = load_model_dir(tmp_path / "model")
    expected = evaluate_rollout(
        model, metadata, ShardSet.open(recorded_shards), SamplingConfig(4, 2), 4, 3, tmp_path / "out"
    )

    folder = run / "validation/step-00000006"
    assert sorted(path.name for path in folder.iterdir()) == ["samples.mp4", "samples.png", "scores.json"]
    scores = json.loads((folder / "scores.json").read_text())
    assert [clip["key"] for clip in scores["clips"]] == expected["episodes"]
    logged = validations(run)[6]["samples"]
    assert logged["video"] == "validation/step-00000006/samples.mp4"
    for source in ("prediction", "repeat_last"):
        assert scores[source] == logged[source]
        for metric in ("psnr", "ssim"):
            assert scores[source][metric] == pytest.approx(expected[source][metric], rel=1e-4)
        assert scores[source]["lpips"] is None
        each = [clip[source]["ssim"] for clip in scores["clips"]]
        assert sum(each) / 3 == pytest.approx(scores[source]["ssim"])
    assert sorted(path.name for path in (run / "validation").iterdir()) == ["step-00000004", "step-00000006"]
    console = (runs / "console").read_text()
    assert console.count("no LPIPS") == 2
    assert "get it by `python tools/metric_weights.py`" in console


def test_samples_that_cannot_be_written_cost_no_more(runs: Path) -> None:
    run = runs / "unwritable"
    (found,) = validations(run).values()
    assert found["samples"]["video"] is None and found["samples"]["prediction"]["psnr"] > 0
    events = {event["event"]: event for event in read_events(run)}
    assert events["validation-failed"]["step"] == 1 and "finished" in events
    assert "cannot be written" in events["validation-failed"]["text"]


def test_what_is_logged_of_errors_is_counted_by_hand() -> None:
    """Three clips, of which one is clean throughout; frames 4 to 36 are 33 indices, so three share a bin."""
    rows = np.array(
        [
            # pack, clip, frame index, timestep, error; the packs are not in order
            [1, 0, 4, 1, 3.0],
            [0, 0, 5, 200, 1.0],
            [0, 0, 36, 201, 2.0],
        ]
    )
    found = summary(rows, clips=3)
    assert found["loss"] == (3.0 + 1.5 + 0.0) / 3
    assert found["timesteps"] == {"1-200": 2.0, "201-400": 2.0, "401-600": None, "601-800": None, "801-1000": None}
    assert len(found["frames"]) == 11
    assert (found["frames"]["4-6"], found["frames"]["7-9"], found["frames"]["34-36"]) == (2.0, None, 2.0)
    assert summary(np.empty((0, 5)), clips=2)["loss"] == 0.0


ALONE = Processes(0, 1, torch.device("cpu"))
TINY = [
    "model.channels=4", "model.patch=1", "data.latent_shape=[4,2,2]", "data.autoencoder=some-autoencoder",
    "data.frames=[2,6]", "data.frame_stride=2", "data.scaling=factor", "sample.given=2", "validation.every=1",
    "validation.clips=5", "validation.clips_per_pack=2",
]  # fmt: skip


def open_for(recipe: Recipe, manifest: Manifest, scaling: LatentScaling, events: EventLog) -> HeldOut | None:
    plan = stages(recipe)
    return open_held_out(
        recipe.validation, recipe.held_out_shards(), recipe.objective, recipe.data, recipe.seed, plan, manifest,
        scaling, ALONE, events, 0,
        lambda shards: open_validation_videos(recipe, shards, plan[-1], scaling, torch.float32, ALONE, events),
    )  # fmt: skip


def opened(folder: Path, trained_on: Path, *more: str) -> tuple[HeldOut, Stage]:
    recipe = load_recipe("demo_cpu", [*TINY, f"validation.shards={folder}", *more])
    manifest, plan = Manifest.read(trained_on), stages(recipe)
    scaling = LatentScaling.of(manifest, recipe.data.scaling)
    held_out = open_for(recipe, manifest, scaling, EventLog(folder, False))
    assert held_out is not None
    return held_out, plan[0]


def test_packs_are_the_first_clips_on_any_number_of_ranks(tmp_path: Path) -> None:
    write_set(tmp_path, [30, 3, 10, 11, 12, 30], samples_per_shard=4)
    held_out, stage = opened(tmp_path, tmp_path)
    alone = held_out.packs(stage, ALONE)
    # Every second frame of up to 30, and 6 of those at most.
    assert [pack.clip_frames for pack in alone] == [(6, 2), (5, 6), (6,)]
    assert [pack.keys for pack in alone][1:] == [("clip_002@0", "clip_003@0"), ("clip_004@0",)]
    assert alone[0].latents[:, 1, 1, 1].tolist() == [(f + 1 / 8) / 2 for f in (0, 2, 4, 6, 8, 10, 0, 2)]  # factor 0.5
    for ranks in (2, 4):
        counted = {}
        each = [Processes(rank, ranks, torch.device("cpu")) for rank in range(ranks)]
        packs = [held_out.packs(stage, processes) for processes in each]
        assert len({len(own) for own in packs}) == 1, "all ranks run as many forward passes"
        for processes, own in zip(each, packs, strict=True):
            counted |= {p.lane: p for at, p in enumerate(own) if held_out.counts(at, processes)}
        assert sum(held_out.counts(at, p) for p, own in zip(each, packs, strict=True) for at in range(len(own))) == 3
        assert all(torch.equal(counted[pack.lane].latents, pack.latents) for pack in alone)


def test_a_held_out_set_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "train", [30] * 4, samples_per_shard=4)
    other = AutoencoderInfo(name="some-autoencoder", weight_hash="1" * 64, scaling_factor=0.5)
    write_set(tmp_path / "encoded", [30] * 4, 4, dataclasses.replace(FACTS, autoencoder=other))
    write_set(tmp_path / "actions", [30] * 4, 4, dataclasses.replace(FACTS, actions=0))
    write_set(tmp_path / "short", [2] * 4, 4)
    write_set(tmp_path / "damaged", [30] * 4, 4)
    (tmp_path / "damaged" / "shard-000000.tar").write_bytes(b"")
    for name, words in {
        "encoded": "the latents are by some-autoencoder (111111111111), those of data.shards by some-autoencoder (0",
        "actions": "model.condition=action does not fit the shard set",
        "short": "the shortest sample has 2 frames and 3 are needed",
        "missing": "there is no shard set's manifest here",
        "damaged": "truncated (0 bytes",
    }.items():
        with pytest.raises(UserError) as caught:
            opened(tmp_path / name, tmp_path / "train")
        assert words in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_lpips_is_that_of_its_network(recorded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = LPIPS("alex")
    monkeypatch.setattr(validation_samples, "load_lpips", lambda net, device: network)
    spec, *overrides = small_recipe(recorded_shards, tmp_path, *VALIDATION, f"validation.shards={recorded_shards}")
    recipe, manifest = load_recipe(spec, [*overrides, *SAMPLES]), Manifest.read(recorded_shards)
    scaling, events = LatentScaling.of(manifest, "channel"), EventLog(tmp_path, False)
    held_out = open_for(recipe, manifest, scaling, events)
    assert held_out is not None and held_out.videos is not None and held_out.videos.without_lpips is None
    frames, truth = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    error, ssim, lpips = held_out.videos._score(frames, truth)
    torch.testing.assert_close(torch.from_numpy(lpips), network(frames, truth).double())
    torch.testing.assert_close(torch.from_numpy(ssim), frame_ssim(frames, truth).double())
    torch.testing.assert_close(torch.from_numpy(error), (frames - truth).double().square().mean((1, 2, 3)))
    small = ["sample.given=30", "data.frames=16", "validation.sample_every=1"]
    with pytest.raises(UserError, match="24 frames, but 42 are needed"):
        wide = load_recipe(spec, [*overrides, *small, "sample.frames=12", "model.window=42"])
        open_for(wide, manifest, scaling, events)
