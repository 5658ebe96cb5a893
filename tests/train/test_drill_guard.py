"""Steps that are not finite are skipped, and too many in a row lead back to the last checkpoint; through kills, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from far_scale.train import checkpoint
from harness.drill import DRILL, STEPS, assert_same_run, events, kill_after_checkpoint, losses, trained_on
from harness.launch import small_recipe
from harness.processes import start_training

pytestmark = pytest.mark.slow


def test_a_nan_is_skipped_and_the_curve_goes_on(undisturbed: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """Of one lane at one step, through a kill, too."""
    runs = [tmp_path / name for name in ("whole", "killed")]
    for run in runs:
        arguments = small_recipe(recorded_shards, run, *DRILL)
        if run.name == "killed":
            kill_after_checkpoint(start_training(2, arguments, tmp_path / f"{run.name}.out", [(17, 3)]), run, 15)
        assert start_training(2, arguments, tmp_path / f"{run.name}.out", [(17, 3)]).wait() == [0, 0]
        skipped = events(run, "skipped")
        assert {event["step"] for event in skipped} == {17} and skipped[0]["reason"] == "the loss is not finite"
        (lane,) = skipped[0]["lanes"]
        assert lane["lane"] == 3 and lane["keys"] == trained_on(undisturbed.parent / "out")[16, 3]
    lines = [json.loads(line) for line in (runs[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["loss"] is None] == [17]
    assert lines[-1]["skipped"] == 1 and len(lines) == STEPS
    assert losses(runs[0])[:16] == losses(undisturbed)[:16]
    assert abs(losses(runs[0])[-1] / losses(undisturbed)[-1] - 1) < 0.05
    assert_same_run(runs[1], runs[0])


def test_too_many_in_a_row_go_back_to_the_last_checkpoint(recorded_shards: Path, tmp_path: Path) -> None:
    """Four from step 18 on, known after step 22, which goes back to the weights of step 15; through a kill, too."""
    bad = [(step, 1) for step in range(18, 22)]
    runs = [tmp_path / name for name in ("whole", "killed")]
    for run in runs:
        arguments = small_recipe(recorded_shards, run, *DRILL, "faults.skipped_in_row=4")
        if run.name == "killed":
            kill_after_checkpoint(start_training(2, arguments, tmp_path / f"{run.name}.out", bad), run, 15)
        assert start_training(2, arguments, tmp_path / f"{run.name}.out", bad).wait() == [0, 0]
        back = events(run, "rolled-back")
        assert {(event["step"], event["weights_of"]) for event in back} == {(22, 15)}
        assert [event["step"] for event in events(run, "saved") if 15 <= event["step"] <= 25][-2:] == [22, 25]
    state = checkpoint.read_state(checkpoint.step_folder(runs[0], STEPS))
    assert state["guard"]["updates"] == 15 + STEPS - 22 and state["guard"]["skipped"] == 4
    assert_same_run(runs[1], runs[0])


def test_going_back_for_nothing_ends_the_run(recorded_shards: Path, tmp_path: Path) -> None:
    arguments = small_recipe(recorded_shards, tmp_path / "run", *DRILL, "faults.skipped_in_row=4")
    bad = [(step, 1) for step in range(13, STEPS)]
    assert 2 in start_training(2, arguments, tmp_path / "out", bad).wait()
    assert [event["step"] for event in events(tmp_path / "run", "rolled-back")] == [17]
    assert "4 steps in a row were skipped, straight after going back" in (tmp_path / "out").read_text()
    none_yet = small_recipe(recorded_shards, tmp_path / "early", *DRILL, "faults.skipped_in_row=2")
    assert 2 in start_training(2, none_yet, tmp_path / "out", [(1, 0), (2, 0), (3, 0)]).wait()
    assert "there is no checkpoint to go back to" in (tmp_path / "out").read_text()
