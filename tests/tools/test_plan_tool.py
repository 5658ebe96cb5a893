"""`far-scale plan`: it needs neither a GPU nor a shard set, and says in one line what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from far_scale.cli import plan as command
from far_scale.train.planner.profile import read_profile
from far_scale.utils.event_log import EventLog
from harness.processes import run


def far_scale_plan(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["far-scale plan", *map(str, arguments)])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_curriculum_on_eight_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    on = ["--nodes", 8, "--gpus-per-node", 8, "--gpu", "h100", "--profiles", tmp_path]
    assert far_scale_plan(monkeypatch, "far_xl_long", *on) == 0
    printed = capsys.readouterr().out
    for said in (
        "it does not start like this: data.lanes is 8, which 64 ranks cannot share one by one",
        "The plan is for train.sequence_parallel=8: groups of 8 ranks share each pack, with the same result",
        "sequence parallelism: 8 groups of 8 ranks",
        "forward: all-to-all",
        "FAR-XL-Long",
        "the shard set is not here",
        "sharding: ZeRO-3, hpZ 8",
        "300 frames",
        "saved activations",
        "of 80 GB free, with a margin of 8 GB",
        ": fits",
        "has no profile of h100",
        "forward: all-gather",
        "checkpoints 13.1 GB each, 4 at a time: 52.6 GB",
    ):
        assert said in printed, said


def test_lanes_that_no_groups_can_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    on = ["--nodes", 8, "--gpus-per-node", 8, "--gpu", "h100", "--profiles", tmp_path]
    assert far_scale_plan(monkeypatch, "far_xl_ucf101_256_cond", "data.lanes=5", *on) == 0
    printed = capsys.readouterr().out
    assert "data.lanes is 5, which 64 ranks cannot share; 1, 5 can" in printed
    assert "The plan is for data.lanes=64, 12.8 times the clips a step" in printed


def test_what_does_not_fit_is_named_with_a_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--gpus-per-node", 4, "--gpu", "a100", "--profiles", tmp_path]
    assert far_scale_plan(monkeypatch, "far_7b_ucf101_256", "train.zero_stage=1", *where) == 0
    printed = capsys.readouterr().out
    assert "fragmentation: does not fit" in printed and "  memory\n" in printed
    assert "change      the cheapest that fits: train.zero_stage=" in printed and "GB a rank at most" in printed


def test_the_interval_comes_from_the_saves_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    EventLog(tmp_path, True).emit("saved", 10, "saved", stall_seconds=8.4, seconds=21.0)
    where = ["--gpu", "h100", "--mtbf", 24, "--run", tmp_path, "--profiles", tmp_path / "none"]
    assert far_scale_plan(monkeypatch, "far_b_ucf101_64", *where) == 0
    printed = capsys.readouterr().out
    assert "training waits 8.4 s for one, which takes 21 s (median of 1 saves in" in printed
    # sqrt(2 x 8.4 s x 24 h) = 20.1 minutes
    assert "Young 1974: 20.1" in printed and "checkpoint.every_minutes=20" in printed and "goodput 98" in printed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["far_b_ucf101_64"], "--gpu: missing; give a100 or h100 or h200, or --measure"),
        (["far_b_ucf101_64", "--gpu", "h100", "--run", "runs/x"], "--run: its saves are for the checkpoint interval"),
        (["far_b_ucf101_64", "--gpu", "h100", "--mtbf", "5"], "--mtbf: the time of a save is not known; name a run"),
        (["far_b_ucf101_64", "--gpu", "h100", "train.steeps=5"], "train.steeps: unknown key"),
        (["no_such_recipe", "--gpu", "h100"], "no_such_recipe"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    arguments: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert far_scale_plan(monkeypatch, *arguments, "--profiles", tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and problem in captured.err and not captured.out


def test_a_damaged_profile_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("[]")
    assert far_scale_plan(monkeypatch, "far_b_ucf101_64", "--gpu", "h100", "--profiles", tmp_path) == 2
    assert f"{tmp_path / 'bad.json'}: not a profile of this version" in capsys.readouterr().err


@pytest.mark.slow
def test_a_machine_is_measured(tmp_path: Path) -> None:
    keys = ["model.layers=1", "model.heads=2", "data.frames=2", "data.clips_per_pack=2", "sample.given=1"]
    keys += ["train.deepspeed.reduce_bucket_size=1000000"]
    done = run("tools/plan.py", "demo_cpu", *keys, "--measure", "--profiles", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("*-cpu-fp32-zero3.json")
    assert (
        f"profile: {path}" in done.stdout and "the fitted times differ from the measured ones by at most" in done.stdout
    )
    profile = read_profile(path)
    assert [(m.shape, m.work.layers) for m in profile.measurements] == [
        ("1 layers of 2 heads, clips of [2, 2] frames", 1),
        ("1 layers of 2 heads, clips of [2] frames", 1),
        ("1 layers of 1 heads, clips of [2, 2] frames", 1),
        ("1 layers of 1 heads, clips of [2] frames", 1),
    ]
    assert all(m.seconds > 0 and m.work.products > 0 for m in profile.measurements)
    assert profile.gpu == "cpu" and min(profile.disk_write, profile.disk_read) > 0 and profile.versions["torch"]
