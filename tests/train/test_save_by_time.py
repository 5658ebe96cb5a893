"""checkpoint.every_minutes: checkpoints by the clock, of which the newest alone stays."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.evaluation.clip_sets import ClipSource
from far_scale.evaluation.follow import _RunFollower
from far_scale.evaluation.protocol import load_protocol
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece
from far_scale.train.checkpoint.folders import is_ephemeral
from far_scale.train.run_dir import existing_steps, latest_step
from far_scale.utils.event_log import read_events
from far_scale.utils.io import read_json
from harness.launch import ROOT, small_recipe
from harness.processes import start_training


def save(run: Path, step: int, ephemeral: bool, keep: int = 2) -> None:
    state = {"lanes": {}, **({"ephemeral": True} if ephemeral else {})}
    checkpoint.save(run, step, {"weight/x": FlatPiece(10, 0, torch.zeros(10))}, state, keep)


def test_only_the_newest_stays_beside_those_that_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 10, ephemeral=False)
    save(tmp_path, 13, ephemeral=True)
    assert existing_steps(tmp_path) == [13, 10] and latest_step(tmp_path) == 13
    save(tmp_path, 17, ephemeral=True)
    assert existing_steps(tmp_path) == [17, 10] and is_ephemeral(checkpoint.step_folder(tmp_path, 17))
    save(tmp_path, 20, ephemeral=False)
    assert existing_steps(tmp_path) == [20, 10], "and none where a later one of the others is there"
    save(tmp_path, 23, ephemeral=True)
    save(tmp_path, 30, ephemeral=False)
    save(tmp_path, 33, ephemeral=True)
    assert existing_steps(tmp_path) == [33, 30, 20]
    checkpoint.point_at(checkpoint.step_folder(tmp_path, 20))  # sent back by hand
    save(tmp_path, 22, ephemeral=True)
    assert existing_steps(tmp_path) == [33, 30, 22, 20] and latest_step(tmp_path) == 22
    assert not is_ephemeral(tmp_path / "none")


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("far_*.sh")), ids=lambda path: path.stem)
def test_a_crash_of_a_submitted_recipe_costs_half_an_hour_at_most(script: Path) -> None:
    names = re.findall(r"launch\.sh\"? (\w+)", script.read_text())
    assert names
    for name in names:
        minutes = load_recipe(name).checkpoint.every_minutes
        assert minutes is not None and minutes <= 30


def test_they_are_not_evaluated_beside_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol, clips = load_protocol("vizdoom-8to8"), ClipSource()
    following = _RunFollower(tmp_path, protocol, tmp_path / "out", clips, torch.device("cpu"))
    monkeypatch.setattr(_RunFollower, "_export", lambda *_: True)
    save(tmp_path, 13, ephemeral=True)
    assert following.next_step() is None
    save(tmp_path, 20, ephemeral=False)
    save(tmp_path, 23, ephemeral=True)
    assert following.next_step() == 20


def test_the_recipe() -> None:
    assert load_recipe("demo_cpu", ["checkpoint.every_minutes=null"]).hash() == load_recipe("demo_cpu").hash()


@pytest.mark.slow
def test_two_ranks_go_on_from_one_bit_for_bit(recorded_shards: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    keys = ["train.steps=24", "checkpoint.every=20", "checkpoint.keep=5"]
    plain = small_recipe(recorded_shards, whole, *keys, "checkpoint.every_minutes=null")
    assert start_training(2, plain, tmp_path / "whole.out").wait() == [0, 0]
    # Each step's end finds it due, unless the save before still runs.
    timed = small_recipe(recorded_shards, run, *keys, "checkpoint.every_minutes=1e-6")
    launch = start_training(2, timed, tmp_path / "out")
    while not any(event["event"] == "saved" for event in read_events(run)):
        time.sleep(0.01)
    launch.kill()
    assert launch.wait() == [-9, -9]
    first = latest_step(run)
    assert first is not None and is_ephemeral(checkpoint.step_folder(run, first))
    assert start_training(2, small_recipe(recorded_shards, run, *keys), tmp_path / "out").wait() == [0, 0]
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (whole, run)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 24
    events = read_events(run)
    (resumed,) = (event for event in events if event["event"] == "resumed")
    assert resumed["step"] == first
    found = read_json(run / "environment.json", "environment")
    assert (found["step"], found["ranks"]) == (first, 2) and not [e for e in events if e["event"] == "environment"]
    saved = {event["step"]: event.get("ephemeral", False) for event in events if event["event"] == "saved"}
    assert saved.pop(20) is False and saved.pop(24) is False and saved and all(saved.values())
    assert existing_steps(run) == [24, 20] == existing_steps(whole)
    states = [checkpoint.read_state(checkpoint.step_folder(folder, 24)) for folder in (run, whole)]
    assert states[0].keys() == states[1].keys() and states[0]["lanes"] == states[1]["lanes"]
