"""TensorBoard's event files, read back by its own reader: the numbers of log.jsonl, every step once."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import Processes
from far_scale.train.loop import train
from far_scale.train.tensorboard_log import FOLDER, TensorBoardLog
from far_scale.utils.errors import UserError
from harness.drill import line_count, saved_step, wait_until
from harness.launch import small_recipe
from harness.processes import start_training
from harness.tensorboard_files import scalars

STEPS = 40


def expected(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The same from the lines of log.jsonl; TensorBoard has float32."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        values = line.get("validation")
        if values is None:
            named = {f"train/{key}": value for key, value in line.items() if key not in ("step", "stage_name")}
        else:
            named = {f"validation/{key}/loss": values[key]["loss"] for key in ("weights", "ema")}
        for name, value in named.items():
            if value is not None:
                points.setdefault(name, []).append((line["step"], float(np.float32(value))))
    return points


def training_line(step: int) -> dict[str, Any]:
    return {"step": step, "stage_name": "short", "loss": 1 / step, "grad_norm": None if step == 2 else 0.5}


def validation_line(step: int) -> dict[str, Any]:
    losses = {"loss": 2.0 + step, "timesteps": {"1-200": None}}
    return {"step": step, "validation": {"weights": losses, "ema": losses}}


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    lines = [training_line(step) for step in range(1, 9)]
    lines.insert(4, validation_line(4))
    first = TensorBoardLog(tmp_path, 0, [])
    for line in lines[:7]:  # to step 6, and then a kill: it is not closed
        first.log(line)
    second = TensorBoardLog(tmp_path, 4, lines[:5])  # from the checkpoint of step 4
    for line in lines[5:]:
        second.log(line)
    second.finish()
    assert scalars(tmp_path / FOLDER) == expected(lines)
    assert [step for step, _ in scalars(tmp_path / FOLDER)["train/grad_norm"]] == [1, 3, 4, 5, 6, 7, 8]
    first.finish()


def test_a_run_that_turns_it_on_later_has_all_its_steps(tmp_path: Path) -> None:
    lines = [training_line(1), validation_line(1), training_line(2)]
    log = TensorBoardLog(tmp_path, 2, lines)
    log.log(training_line(3))
    log.finish()
    assert scalars(tmp_path / FOLDER) == expected([*lines, training_line(3)])


def test_errors_are_reported_once_and_end_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FOLDER).write_text("no folder")
    log = TensorBoardLog(tmp_path, 0, [])
    log.log(training_line(1))
    log.finish()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tensorboard: ") and line.endswith("; logging continues without it")


def test_a_missing_package_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    recipe = load_recipe("demo_cpu", [f"run_dir={tmp_path / 'run'}", "log.tensorboard=true"])
    with pytest.raises(UserError, match=r"log\.tensorboard: .*pip install 'far_scale\[tensorboard\]'"):
        train(recipe, Processes(0, 1, torch.device("cpu")), lambda *_: pytest.fail("too late"))
    assert not (tmp_path / "run").exists()


def test_it_does_not_change_the_hash() -> None:
    assert load_recipe("demo_cpu", ["log.tensorboard=true"]).hash() == load_recipe("demo_cpu").hash()


@pytest.mark.slow
def test_a_training_that_is_stopped_killed_and_resumed(recorded_shards: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    validation = f"validation={{every: 5, clips: 4, shards: {recorded_shards}}}"
    small = [f"train.steps={STEPS}", "checkpoint.every=1000", "model.layers=1", "model.heads=1", validation]
    arguments = small_recipe(recorded_shards, run, *small, "log.tensorboard=true")
    launch = start_training(1, arguments, out)
    assert wait_until(lambda: line_count(run / "log.jsonl") >= 3)
    launch[0].send_signal(signal.SIGUSR1)
    assert launch.wait() == [75]
    stopped, lines_before = saved_step(run), line_count(run / "log.jsonl")
    launch = start_training(1, arguments, out)
    assert wait_until(lambda: line_count(run / "log.jsonl") > lines_before + 5)
    launch.kill()
    launch.wait()
    assert saved_step(run) == stopped < STEPS, "the steps since the stop are trained again"
    assert start_training(1, arguments, out).wait() == [0]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    written, found = expected(lines), scalars(run / FOLDER)
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in found["validation/ema/loss"]] == list(range(5, STEPS + 1, 5))
    assert {name: found[name] for name in written} == written
    assert len(list((run / FOLDER).iterdir())) == 3
