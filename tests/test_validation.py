"""Validation while training: what it says, and that training does not notice it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT, launch, small_recipe

from far_scale.convert.model_dir import load_model_dir
from far_scale.convert.zero import export
from far_scale.data.packs.loader import Pack
from far_scale.data.shards.shard_set import ShardSet
from far_scale.objective import CLEAN, add_noise
from far_scale.recipe import load_recipe
from far_scale.sampling.evaluate import evaluate
from far_scale.train.faults.events import read_events
from far_scale.train.held_out import HeldOut

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
    if shutil.which("g++"):
        asked += [f"compiled train.compile=true train.steps=4 {' '.join(held_out)}"]
    (out / "unwritable").mkdir()
    (out / "unwritable" / "validation").write_text("no folder")
    finished = launch(2, ROOT / "tests/training_worker.py", recorded_shards, out, ",".join(asked), timeout=500)
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_nothing_new_is_compiled(runs: Path) -> None:
    graphs = [line["compiled_graphs"] for line in lines(runs / "compiled") if "loss" in line]
    assert sorted(validations(runs / "compiled")) == [2, 4]
    assert graphs[0] >= 1 and set(graphs) == {graphs[0]} and len(graphs) == 4


def by_hand(run: Path, shards: Path, weights: str, out: Path) -> dict[str, Any]:
    """The loss of exported weights in float64, clip by clip."""
    export(run, None, weights, out)  # type: ignore[arg-type]
    model, card = load_model_dir(out, dtype=torch.float64)
    shard_set, recipe = ShardSet.open(shards), load_recipe(run / "recipe.yaml")
    places = [(shard, n) for shard, count in enumerate(shard_set.samples_per_shard) for n in range(count)][:7]
    assert recipe.validation is not None
    seed = HeldOut(recipe.validation, recipe.objective, shard_set, card.scaling, recipe.seed, None).noise_seed
    assert seed != recipe.seed
    clips, frames = [], []
    for number in range(3):
        samples = [shard_set.read(*place, frames=8) for place in places[3 * number : 3 * number + 3]]
        pack = Pack(
            latents=card.scaling.normalise(torch.cat([sample.latents for sample in samples])),
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
    """One rank goes on from the checkpoint of step 4, to whose validation a kill did not let the run come."""
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
    model, card = load_model_dir(tmp_path / "model")
    expected = evaluate(model, card, ShardSet.open(recorded_shards), 4, 4, 2, 1.0, 0, 3, tmp_path / "out")

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
