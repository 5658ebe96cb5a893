"""What a run says: the console, log.jsonl and wandb."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.distributed.process_group import Processes
from far_scale.train import metrics as monitor_module
from far_scale.train.curriculum import stages
from far_scale.train.metrics import Monitor
from far_scale.train.wandb_run import WandbRun


class Alone(Processes):
    """One process without a group."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values.double()


class FakeWandb(types.ModuleType):
    """What Monitor asks of wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False
        self.step = 0  # a new run's

    def init(self, **settings: Any) -> FakeWandb:
        self.started = settings
        return self

    def Video(self, path: str, format: str) -> str:
        return f"{format} {path}"

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axis = (name, step_metric)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True

    def teardown(self) -> None:
        assert self.finished


def monitor_of(recipe: Recipe, start: int = 0) -> Monitor:
    run = Path(recipe.run_dir)
    return Monitor(
        run, recipe.log, recipe.train, len(recipe.curriculum), Alone(0, 1, torch.device("cpu")), 1e12, start,
        lambda: WandbRun(recipe.log.wandb, recipe.name, recipe.model_dump(mode="json"), "one", run),
    )  # fmt: skip


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_stages_reach_console_log_and_wandb(
    wandb: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("demo_long", [f"run_dir={tmp_path}", "log.every=2", "log.wandb.mode=offline"])
    monitor = monitor_of(recipe)
    first, second = stages(recipe)
    for stage, step in ((first, 1), (first, 2), (second, first.steps + 2)):
        monitor.begin_stage(stage)
        monitor.count(clips=3, tokens=100, flops=10**9)
        monitor.end_step(step, torch.tensor(0.5), 1e-3, torch.tensor(0.1), skipped=0, damaged=0)
    monitor.__exit__()

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    seen = [(line["step"], line["stage"], line["stage_name"]) for line in lines]
    assert seen == [(1, 1, first.name), (2, 1, first.name), (first.steps + 2, 2, second.name)]
    assert [(step, v["train/stage"], v["train/stage_name"]) for step, v in wandb.logged] == seen
    assert wandb.logged[0][1]["train/loss"] == 0.5
    assert wandb.started["resume"] == "allow"
    assert wandb.finished
    console = capsys.readouterr().out
    assert f"stage 2/2 ({second.name}): steps {second.first + 1} to {second.end}" in console


def test_newly_compiled_graphs_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("demo_cpu", [f"run_dir={tmp_path}", "log.every=1", "train.compile=true"])
    monitor = monitor_of(recipe)
    for step, graphs in enumerate((2, 2, 5), start=1):
        monkeypatch.setattr(monitor_module, "compiled_graphs", lambda count=graphs: count)
        monitor.count(clips=1, tokens=1, flops=1)
        monitor.end_step(step, torch.tensor(0.5), 1e-3, torch.tensor(0.1), skipped=0, damaged=0)
    with monitor.excluded():  # validation's own are no matter of training
        monkeypatch.setattr(monitor_module, "compiled_graphs", lambda: 7)
    monitor.end_step(4, torch.tensor(0.5), 1e-3, torch.tensor(0.1), skipped=0, damaged=0)
    monitor.__exit__()
    console = capsys.readouterr().out
    assert "step 4:" not in console
    assert "step 1: 2 graphs compiled so far" in console
    assert "step 2: 2 graphs" not in console
    assert "step 3: 5 graphs compiled so far" in console
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["compiled_graphs"] == 5


def validation(loss: float) -> dict[str, Any]:
    return {"weights": {"loss": loss, "timesteps": {"1-200": loss, "201-400": None}}, "seconds": 2.0}


def test_a_validation_is_a_line_of_its_own_and_a_row_with_its_step(
    wandb: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("demo_cpu", [f"run_dir={tmp_path}", "log.every=1", "log.wandb.mode=offline"])
    (tmp_path / "samples.mp4").write_text("")
    samples = {"prediction": {"psnr": 20.0, "ssim": 0.5, "lpips": None}, "video": "samples.mp4"}

    def started(at: int) -> Monitor:
        return monitor_of(recipe, at)

    def end_step(monitor: Monitor, step: int) -> None:
        monitor.count(clips=3, tokens=100, flops=10**9)
        monitor.end_step(step, torch.tensor(0.5), 1e-3, torch.tensor(0.1), skipped=0, damaged=0)

    monitor = started(0)
    with monitor.excluded():
        time.sleep(0.3)
    for step in (1, 2):
        end_step(monitor, step)
        monitor.validated(step, {**validation(0.25), "samples": samples})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "validation" in line) for line in lines] == [(1, False), (1, True), (2, False), (2, True)]
    assert lines[0]["clips_per_second"] > 3 / 0.3, "without the time of what is no training"
    assert lines[1] == {"step": 1, "validation": {**validation(0.25), "samples": samples}}
    assert [step for step, _ in wandb.logged] == [1, 1, 2, 2]  # one row each, to wandb
    assert wandb.logged[1][1] == {
        "validation/weights/loss": 0.25,
        "validation/weights/timesteps/1-200": 0.25,
        "validation/seconds": 2.0,
        "validation/samples/prediction/psnr": 20.0,
        "validation/samples/prediction/ssim": 0.5,
        "validation/video": f"mp4 {tmp_path}/samples.mp4",
    }
    assert "validation after step 1  loss 0.2500  PSNR 20.00  SSIM 0.5000  2.0 s" in capsys.readouterr().out

    # Killed when wandb had step 1: all of step 2 comes from the log.
    wandb.logged, wandb.step = [], 2
    monitor = started(2)
    assert monitor.validated_steps == {1, 2}
    assert [(step, "validation/seconds" in values) for step, values in wandb.logged] == [(2, False), (2, True)]

    # Killed when wandb had step 4, with the last checkpoint at step 3 and no validation of that yet.
    wandb.logged, wandb.step = [], 5
    monitor = started(3)
    monitor.validated(3, validation(0.5))
    for step in (4, 5):
        end_step(monitor, step)
        monitor.validated(step, validation(0.5))
    assert [(step, "validation/seconds" in values) for step, values in wandb.logged] == [
        (5, True),  # that of step 3: its own row is closed
        (5, False),
        (5, True),
    ]
