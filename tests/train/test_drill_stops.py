"""Signals, a second job, wandb: a run stops after a whole step and goes on with every step once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from far_scale.distributed.signals import DUPLICATE_SECONDS
from far_scale.utils.hosts import host_name
from harness.drill import (
    DRILL,
    RARE,
    STEPS,
    assert_same_run,
    events,
    kill_after_checkpoint,
    line_count,
    saved_step,
    wait_until,
)
from harness.launch import small_recipe
from harness.processes import run as run_program
from harness.processes import start_training
from harness.wandb_files import history_steps, offline_files, read_records

pytestmark = pytest.mark.slow


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = small_recipe(recorded_shards, run, *DRILL, *RARE)
    stops = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        launch = start_training(2, arguments, out)
        lines = len((run / "log.jsonl").read_text().splitlines()) if stops else 0
        assert wait_until(lambda lines=lines: line_count(run / "log.jsonl") > lines + 2)
        os.kill(launch.pids[1], number)
        assert launch.wait() == [75, 75]
        stops.append(saved_step(run))
        assert events(run, "stopped")[-1]["step"] == stops[-1] == line_count(run / "log.jsonl")
    assert stops == sorted(set(stops)) and stops[0] > 0 and stops[-1] < STEPS
    assert start_training(2, arguments, out).wait() == [0, 0]
    assert len(Path(f"{out}.keys").read_text().splitlines()) == 4 * STEPS, "no step was trained twice"
    assert_same_run(run, undisturbed)


def test_a_second_signal_ends_at_once(recorded_shards: Path, tmp_path: Path) -> None:
    """Also while the main thread is stuck: the other rank stands still, so no step can be finished."""
    run = tmp_path / "run"
    launch = start_training(2, small_recipe(recorded_shards, run, *DRILL, *RARE), tmp_path / "out")
    assert wait_until(lambda: line_count(run / "log.jsonl") > 5)
    os.kill(launch.pids[1], signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(launch.pids[0], signal.SIGUSR1)
    time.sleep(DUPLICATE_SECONDS + 0.5)
    os.kill(launch.pids[0], signal.SIGTERM)
    assert wait_until(lambda: "SIGTERM again: ending at once" in (tmp_path / "out").read_text())
    os.kill(launch.pids[1], signal.SIGKILL)
    assert launch.wait() == [75, -signal.SIGKILL] and saved_step(run) == 0


def test_a_second_job_in_the_run_directory_is_refused(undisturbed: Path, recorded_shards: Path, tmp_path: Path) -> None:
    run, other_path = tmp_path / "run", tmp_path / "link"
    launch = start_training(2, small_recipe(recorded_shards, run, *DRILL), tmp_path / "out")
    assert wait_until(lambda: line_count(run / "log.jsonl") > 0)
    other_path.symlink_to(run)
    second = run_program("-m", "far_scale.train", *small_recipe(recorded_shards, other_path, *DRILL))
    assert second.returncode == 2
    (line,) = [line for line in second.stderr.splitlines() if "error" in line]
    assert line.startswith("error: ") and f"pid {launch.pids[0]}" in line and f"host {host_name()}" in line
    assert launch.wait() == [0, 0]
    assert_same_run(run, undisturbed)


def test_one_wandb_run_holds_every_step_once(recorded_shards: Path, tmp_path: Path) -> None:
    """Through stops that its helper process is sent as well, and a kill."""
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = small_recipe(recorded_shards, run, *DRILL, "log.wandb.mode=offline")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        launch, step = start_training(2, arguments, out), saved_step(run)
        assert wait_until(lambda step=step: saved_step(run) >= step + 5)
        helpers = children(launch.pids[0])
        assert helpers, "wandb has a process of its own"
        for pid in [*helpers, *launch.pids]:  # as SLURM does
            with contextlib.suppress(ProcessLookupError):  # a helper that runs a moment only, or ends with its parent
                os.kill(pid, number)
        assert launch.wait() == [75, 75]
    kill_after_checkpoint(start_training(2, arguments, out), run, saved_step(run) + 5)
    assert start_training(2, arguments, out).wait() == [0, 0]
    files = offline_files(run, (run / "identity").read_text().strip())
    starts = [len(list((run / "wandb").glob(f"{prefix}offline-run-*"))) for prefix in ("", "unfinished-")]
    assert sum(starts) == 4 and starts[0] == len(files), "one run, a folder a start"
    assert starts[1] in (1, 2), "of the kill, and perhaps of the SIGTERM that its helper process got"
    ended = [any(record.HasField("exit") for record in read_records(file)) for file in files]
    assert all(ended), "what counts is complete"
    steps = [step for file in files for step in history_steps(file)]
    assert steps == list(range(1, STEPS + 1)), "every step once, also those of the files that are set aside"


def children(pid: int) -> list[int]:
    """Process ids of all that descend from a process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    own = [child for child, parent in parents.items() if parent == pid]
    return own + [descendant for child in own for descendant in children(child)]
