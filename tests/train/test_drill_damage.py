"""Damaged checkpoints and full disks cost checkpoints, not the run."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from far_scale.train import checkpoint
from harness.drill import DRILL, STEPS, assert_same_run, events, kill_after_checkpoint, saved_step, wait_until
from harness.launch import small_recipe
from harness.processes import start_training

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    harm: str, undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = small_recipe(recorded_shards, run, *DRILL)
    kill_after_checkpoint(start_training(2, arguments, tmp_path / "out"), run, 10)
    newest = saved_step(run)
    file = checkpoint.step_folder(run, newest) / "__1_0.distcp"
    if harm == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert start_training(2, arguments, tmp_path / "out").wait() == [0, 0]
    (damaged,) = events(run, "damaged")
    assert str(file) in damaged["text"] and damaged["step"] == newest
    assert f"now step-{newest:08d}.damaged; resuming from step {newest - 5}" in damaged["text"]
    assert (tmp_path / "out").read_text().count("damaged checkpoint") == 1, "one clear line"
    assert checkpoint.damage(checkpoint.step_folder(run, newest - 5).with_name(f"step-{newest:08d}.damaged"))
    assert_same_run(run, undisturbed)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_costs_checkpoints_and_not_the_run(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in checkpoint.step_folder(undisturbed, STEPS).iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run, filler = disk / "run", disk / "filler"
        arguments = small_recipe(recorded_shards, run, *DRILL, "checkpoint.every=10")
        launch = start_training(2, arguments, tmp_path / "out")
        assert wait_until(lambda: saved_step(run) == 10)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:  # to the last byte: logs do not fit either
                file.write(bytes(1 << 16))
        assert wait_until(lambda: "no checkpoint: " in (tmp_path / "out").read_text())
        filler.unlink()  # at once: the next save is not far
        assert saved_step(run) == 10 and checkpoint.damage(checkpoint.step_folder(run, 10)) is None
        assert launch.wait() == [0, 0], (tmp_path / "out").read_text()[-2000:]
        assert all("no space left on this disk" in event["text"] for event in events(run, "save-failed"))
        assert 1 <= len(events(run, "save-failed")) <= 2
        assert_same_run(run, undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
