"""Evaluation beside a training: every checkpoint once, oldest first, through kills and removals, and into wandb."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import Processes
from far_scale.evaluation import follow as following
from far_scale.evaluation.batches import Evaluation
from far_scale.evaluation.clip_sets import ClipSource
from far_scale.evaluation.follow import follow
from far_scale.evaluation.pipeline import evaluate, open_evaluation
from far_scale.evaluation.protocol import Protocol, load_protocol
from far_scale.train.wandb_run import ScoreRows, WandbRun
from harness.launch import ROOT, small_recipe
from harness.processes import launch
from harness.refusal import refused
from harness.tensorboard_files import scalars
from harness.wandb_files import last_step, offline_files, read_records

pytestmark = pytest.mark.slow

ALONE = Processes(0, 1, torch.device("cpu"))
PROTOCOL = """
clips: {source: the demo world, count: 2, size: 64}
sampling: {given: 4, predicted: 4, steps: 1, batch: 2}
metrics: [psnr, ssim]
psnr: {mean_of: set}
ssim: {}
"""
# Checkpoints of steps 2, 4 and 6; weights move far in so few steps.
SHORT = [
    "train.steps=6", "checkpoint.every=2", "checkpoint.keep=3", "optimizer.warmup_steps=1", "model.heads=1",
    "optimizer.learning_rate=0.01", "log.wandb.mode=offline", "log.tensorboard=true",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines are computed once for all tests."""
    monkeypatch.setenv("FAR_SCALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def trained(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    done = launch(1, "-m", "far_scale.train", *small_recipe(recorded_shards, run, *SHORT))
    assert done.returncode == 0, done.stderr[-2000:]
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The trained run, to be changed."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "identity.place").unlink()  # not to be taken for a copy
    return tmp_path / "run"


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    path = tmp_path_factory.mktemp("protocol") / "short.yaml"
    path.write_text(PROTOCOL)
    return load_protocol(path)


@pytest.fixture
def followed(recorded: Path, protocol: Protocol) -> Any:
    """`follow` with this module's protocol and clips."""

    def go(run: Path, out: Path, once: bool = True, of: Protocol = protocol) -> None:
        follow(run, of, out, ClipSource(recorded), once, ALONE)

    return go


def steps_in(out: Path) -> list[int]:
    return [entry["step"] for entry in json.loads((out / "scores_by_step.json").read_text())["steps"]]


def history(folder: Path, run: Path) -> list[tuple[int, dict[str, Any]]]:
    """Step and values of all lines that the offline files in a folder have for the wandb run of `run`."""
    end = time.monotonic() + 30
    while True:  # wandb's own process writes the last records after `finish`
        files = [read_records(file) for file in offline_files(folder, (run / "identity").read_text().strip())]
        if all(any(record.HasField("exit") for record in records) for records in files):
            break
        assert time.monotonic() < end, "a file of wandb is not complete"
        time.sleep(0.05)
    return [
        (record.history.step.num, {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
        for records in files
        for record in records
        if record.HasField("history")
    ]


def test_every_checkpoint_is_evaluated_once(
    run: Path, followed: Any, protocol: Protocol, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "evaluation" / "short"
    followed(run, out, once=False)  # all steps are done, so it ends
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 6"]

    by_step = json.loads((out / "scores_by_step.json").read_text())
    assert (by_step["protocol"], by_step["n"], steps_in(out)) == ("short", 2, [2, 4, 6])
    for entry in by_step["steps"]:
        folder = out / f"step-{entry['step']:08d}"
        scores = json.loads((folder / "scores.json").read_text())
        assert entry["scores"] == scores["scores"] and scores["weights"]["step"] == entry["step"]
        assert scores["protocol_hash"] == by_step["protocol_hash"] and scores["weights"]["source"] == str(run)
        assert by_step["repeat_last"] == scores["repeat_last"] and scores["reconstruction"]["psnr"]["mean"] > 25
        assert not (folder / "model").exists() and not (folder / "samples").exists()
        assert (folder / "samples.mp4").is_file() and (folder / "by_frame.png").is_file()
    means = [entry["scores"]["psnr"]["mean"] for entry in by_step["steps"]]
    assert len({round(mean, 6) for mean in means}) == 3, "each is of its own weights"
    width, height = Image.open(out / "scores_by_step.png").size
    assert width > 2 * height > 400, "two panels"

    expected = {
        f"evaluation/short/{metric}": [
            (entry["step"], float(torch.tensor(entry["scores"][metric]["mean"]))) for entry in by_step["steps"]
        ]
        for metric in ("psnr", "ssim")
    }
    assert scalars(run / "tensorboard" / "evaluation-short") == expected, "each step once, though written three times"

    step_4 = functools.partial(
        open_evaluation, run, 4, protocol, tmp_path / "alone", ClipSource(recorded), torch.device("cpu")
    )
    alone = evaluate(step_4, ALONE, None, False, False)
    assert alone is not None and alone["scores"] == by_step["steps"][1]["scores"]

    # The training logged no line any more, so these come after its last one, in files of their own.
    logged = history(run / "evaluation", run)
    assert [(step, values["evaluation/step"]) for step, values in logged] == [(7, 2), (8, 4), (9, 6)]
    assert [values["evaluation/short/psnr"] for _, values in logged] == means
    assert last_step(run, (run / "identity").read_text().strip()) == 6
    assert not (run / "lease.json").exists()

    written = {path: path.stat().st_mtime_ns for path in out.rglob("step-*/*")}
    followed(run, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("step-*/*")} == written
    assert len(history(run / "evaluation", run)) == 3

    other = protocol.with_clips(count=1)
    refused(lambda: followed(run, out, of=other), str(out / "step-00000002"), "another protocol", "--out")


def test_a_killed_evaluation_continues_without_its_checkpoint(
    run: Path, followed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, compute = tmp_path / "out", Evaluation.compute

    def killed_in_step_4(self: Evaluation, units: Any) -> Any:
        for unit in compute(self, units):
            yield unit
            if self.weights["step"] == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(Evaluation, "compute", killed_in_step_4)
        followed(run, out)
    (unit,) = (out / "step-00000004" / "units").iterdir()
    assert steps_in(out) == [2] and (out / "step-00000004" / "model").is_dir()
    before = unit.stat().st_mtime_ns
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (out / "scores_by_step.json").unlink()
    (out / "step-00000004" / ".model.0123456789ab.part").mkdir()
    followed(run, out)
    assert steps_in(out) == [2, 4, 6] and unit.stat().st_mtime_ns == before
    assert not list((out / "step-00000004").glob("*model*")), "weights of many checkpoints would fill a disk"


def test_removed_and_damaged_checkpoints_are_skipped(
    run: Path, followed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export, out = following.export_if_needed, tmp_path / "out"

    def removed_while_it_is_read(source: Path, step: int, *arguments: Any) -> Any:
        if step == 2:
            shutil.rmtree(source / "checkpoints" / "step-00000002")
            raise FileNotFoundError(2, "No such file or directory", "step-00000002/__0_0.distcp")
        return export(source, step, *arguments)

    monkeypatch.setattr(following, "export_if_needed", removed_while_it_is_read)
    damaged = run / "checkpoints" / "step-00000004"
    os.truncate(next(damaged.glob("*.distcp")), 100)
    followed(run, out, once=False)
    assert steps_in(out) == [6]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "is not evaluated" in line]
    assert len(warnings) == 2, "each is said once"
    assert "step-00000002: was removed" in warnings[0]
    assert "step-00000004/" in warnings[1] and "has 100 bytes" in warnings[1]
    assert sorted(path.name for path in out.glob("step-*")) == ["step-00000006"]


def test_it_waits_for_the_run_and_for_its_checkpoints(
    run: Path, followed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later, out = tmp_path / "later", tmp_path / "out"
    recipe = (run / "recipe.yaml").read_text().replace("mode: offline", "mode: disabled")

    def starts() -> None:
        (later / "checkpoints").mkdir(parents=True)
        (later / "recipe.yaml").write_text(recipe)

    def writes(step: int) -> None:
        name = f"step-{step:08d}"
        shutil.copytree(run / "checkpoints" / name, later / "checkpoints" / name)

    happens = iter([starts, lambda: writes(2), lambda: None, lambda: writes(6)])
    monkeypatch.setattr(following.time, "sleep", lambda seconds: next(happens)())
    followed(later, out, once=False)
    assert steps_in(out) == [2, 6] and next(happens, None) is None
    waited = [line for line in capsys.readouterr().out.splitlines() if "waiting" in line]
    assert [line.split()[-1] for line in waited] == ["0", "2"], "one line a checkpoint"

    monkeypatch.setattr(following, "INACTIVITY_HOURS", -1.0)
    (later / "recipe.yaml").write_text(recipe.replace("steps: 6", "steps: 8"))
    refused(lambda: followed(later, out, once=False), str(later), "no sign of training")
    refused(lambda: followed(tmp_path / "no", tmp_path / "none"), "there is no run here")


def test_all_processes_take_part(run: Path, protocol: Protocol, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(PROTOCOL)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    tool = [ROOT / "tools" / "evaluate.py", run, "--protocol", tmp_path / "short.yaml", "--videos", recorded]
    done = launch(2, *tool, "--follow", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    out = run / "evaluation" / "short"
    assert steps_in(out) == [4, 6] and done.stdout.count("step 4: PSNR") == 1
    assert [values["evaluation/step"] for _, values in history(run / "evaluation", run)] == [4, 6]


def test_a_training_logs_scores_beside_its_lines_and_every_step_once(tmp_path: Path) -> None:
    """Its restarts find the right last step; rows that a kill has kept from wandb are logged again."""
    run, rows = tmp_path / "run", ScoreRows(tmp_path / "run")
    recipe = load_recipe("demo_cpu", [f"run_dir={run}", "log.wandb.mode=offline"])
    run.mkdir()
    (run / "identity").write_text("one\n")

    def opened(folder: Path | None = None) -> WandbRun:
        return WandbRun(recipe.log.wandb, recipe.name, recipe.model_dump(mode="json"), "one", run, folder)

    def trains(steps: range) -> None:
        wandb_run = opened()
        for step in steps:
            wandb_run.log({"step": step, "loss": 0.5})
        wandb_run.finish()
        history(run, run)  # waits for its file

    def scores(step: int) -> dict[str, Any]:
        return {"evaluation/step": step, "evaluation/p/psnr": float(step)}

    for step in (1, 2, 3):
        rows.put(f"p-{step}", scores(step))
    trains(range(1, 3))  # the third waits
    os.replace(run / "evaluation/for_wandb/p-2.logged-00000002", run / "evaluation/for_wandb/p-2.logged-00000009")
    trains(range(1, 4))  # steps 1 and 2 are there already
    rows.put("p-2", scores(2))  # was logged
    rows.put("p-4", scores(4))
    opened(run / "evaluation").log_scores(after_step=3)
    trains(range(1, 6))
    lines = history(run, run)
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5] and all(values["train/loss"] == 0.5 for _, values in lines)
    assert [values.get("evaluation/step") for _, values in lines] == [1, 2, 2, None, None]
    assert [values["evaluation/step"] for _, values in history(run / "evaluation", run)] == [3, 4]
    assert not rows.waiting()


def test_trouble_with_wandb_does_not_end_the_evaluation(
    run: Path, followed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")

    def no_connection(*arguments: Any) -> Any:
        raise ConnectionError("no route to host")

    out = run / "evaluation" / "short"
    with monkeypatch.context() as patched:
        patched.setattr(following, "WandbRun", no_connection)
        followed(run, out, once=False)
    assert "wandb: ConnectionError: no route to host" in capsys.readouterr().err and steps_in(out) == [6]
    followed(run, out)  # logs what waits
    assert [values["evaluation/step"] for _, values in history(run / "evaluation", run)] == [6]
