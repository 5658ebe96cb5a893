"""Killed again and again, stopped, moved to other rank counts, its checkpoints damaged: nothing changes the result."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from far_scale.distributed.signals import DUPLICATE_SECONDS
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece
from far_scale.train.checkpoint.folders import fork
from far_scale.utils.event_log import read_events
from far_scale.utils.hosts import host_name
from harness.launch import small_recipe
from harness.processes import Ranks, start_training
from harness.processes import run as run_program
from harness.refusal import refused
from harness.wandb_files import history_steps, offline_files, read_records

STEPS = 60
DRILL = [f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=2", "train.zero_stage=3"]
RARE = ["checkpoint.every=1000"]  # none but the last and those that a stop asks for


@pytest.fixture(scope="module")
def undisturbed(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start_training(2, small_recipe(recorded_shards, run, *DRILL), run.parent / "out").wait() == [0, 0]
    return run


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "every step stands there once"
    return [line["loss"] for line in lines]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: weights, both moments, EMA."""
    folder = checkpoint.step_folder(run, STEPS)
    stored = checkpoint.read_metadata(folder).state_dict_metadata
    pieces = {name: FlatPiece(m.size.numel(), 0, torch.empty(m.size)) for name, m in stored.items()}
    checkpoint.load(folder, pieces, alone=True)
    return {name: piece.data for name, piece in pieces.items()}


def same(run: Path, undisturbed: Path) -> None:
    """Losses, weights, moments and EMA are those of the undisturbed run, bit for bit."""
    assert losses(run) == losses(undisturbed)
    ours, theirs = tensors(run), tensors(undisturbed)
    assert ours.keys() == theirs.keys() and len({name.split("/")[0] for name in ours}) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours_state, theirs_state = (checkpoint.read_state(checkpoint.step_folder(r, STEPS)) for r in (run, undisturbed))
    assert ours_state["lanes"] == theirs_state["lanes"] and ours_state["guard"] == theirs_state["guard"]


def trained_on(out: Path) -> dict[tuple[int, int], list[str]]:
    """Sample keys by step and lane, from the record of a run's ranks."""
    found: dict[tuple[int, int], list[str]] = {}
    for step, lane, keys in map(json.loads, Path(f"{out}.keys").read_text().splitlines()):
        assert found.setdefault((step, lane), keys) == keys, "trained on again after a resume, it is the same"
    return found


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run) if event["event"] == kind]


def saved(run: Path) -> int:
    return checkpoint.latest_step(run) or 0


def kill_after_checkpoint(launch: Ranks, run: Path, step: int) -> None:
    """-9 for all ranks as soon as a checkpoint of `step` or later is there."""
    assert wait_until(lambda: saved(run) >= step)
    for pid in launch.pids:
        os.kill(pid, signal.SIGKILL)
    launch.wait()


def wait_until(happened, timeout: float = 120) -> bool:
    """Whether it happened in time."""
    end = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def test_twenty_kills_change_nothing(undisturbed: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """-9 for any rank at random moments: in start-up, in a step and, every other time, in the middle of a save."""
    run, chance = tmp_path / "run", random.Random(0)
    arguments = small_recipe(recorded_shards, run, *DRILL)
    while_saving = 0
    for kill in range(20):
        launch = start_training(2, arguments, tmp_path / "out")
        if kill % 4 == 0:  # in start-up, or soon after
            time.sleep(chance.uniform(0, 2))
        elif kill % 2:
            assert wait_until(lambda: any((run / "checkpoints").glob("*.part")))
            time.sleep(chance.uniform(0, 0.1))
            while_saving += any((run / "checkpoints").glob("*.part"))
        else:
            before = len(events(run, "saved"))
            assert wait_until(lambda before=before: len(events(run, "saved")) > before)
            time.sleep(chance.uniform(0, 0.4))
        os.kill(chance.choice(launch.pids), signal.SIGKILL)
        assert -signal.SIGKILL in launch.wait(), (tmp_path / "out").read_text()[-3000:]
    assert while_saving > 0
    resumed_from = checkpoint.latest_step(run)
    assert start_training(2, arguments, tmp_path / "out").wait() == [0, 0]
    assert resumed_from, "the last kill came after a checkpoint, so this was a resume"
    same(run, undisturbed)


def test_other_rank_counts_and_stages_train_on_the_same_batches(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    """2 ranks, 1, 2 again; ZeRO-3, 1, 2: with optimizer and EMA, through a checkpoint each."""
    run, out = tmp_path / "run", tmp_path / "out"
    for ranks, stage, until in ((2, 3, 20), (1, 1, 40)):
        arguments = small_recipe(recorded_shards, run, *DRILL, f"train.zero_stage={stage}")
        kill_after_checkpoint(start_training(ranks, arguments, out), run, until)
    arguments = small_recipe(recorded_shards, run, *DRILL, "train.zero_stage=2")
    assert start_training(2, arguments, out).wait() == [0, 0]
    assert trained_on(out) == trained_on(undisturbed.parent / "out")
    assert len(trained_on(out)) == 4 * STEPS
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(undisturbed)), rtol=1e-5, atol=0)
    ours, theirs = tensors(run), tensors(undisturbed)
    for name in (name for name in ours if name.startswith(("weight/", "ema/"))):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    changed = [line for event in events(run, "harmless-changes") for line in event["changes"]]
    assert changed == ["train.zero_stage 3 -> 1", "ranks 2 -> 1", "train.zero_stage 1 -> 2", "ranks 1 -> 2"]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = small_recipe(recorded_shards, run, *DRILL, *RARE)
    stops = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        launch = start_training(2, arguments, out)
        lines = len((run / "log.jsonl").read_text().splitlines()) if stops else 0
        assert wait_until(lambda lines=lines: _lines(run / "log.jsonl") > lines + 5)
        os.kill(launch.pids[1], number)
        assert launch.wait() == [75, 75]
        stops.append(saved(run))
        assert events(run, "stopped")[-1]["step"] == stops[-1] == _lines(run / "log.jsonl")
    assert stops == sorted(set(stops)) and stops[0] > 0 and stops[-1] < STEPS
    assert start_training(2, arguments, out).wait() == [0, 0]
    assert len(Path(f"{out}.keys").read_text().splitlines()) == 4 * STEPS, "no step was trained twice"
    same(run, undisturbed)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_second_signal_ends_at_once(recorded_shards: Path, tmp_path: Path) -> None:
    """Also while the main thread is stuck: the other rank stands still, so no step can be finished."""
    run = tmp_path / "run"
    launch = start_training(2, small_recipe(recorded_shards, run, *DRILL, *RARE), tmp_path / "out")
    assert wait_until(lambda: _lines(run / "log.jsonl") > 5)
    os.kill(launch.pids[1], signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(launch.pids[0], signal.SIGUSR1)
    time.sleep(DUPLICATE_SECONDS + 0.5)
    os.kill(launch.pids[0], signal.SIGTERM)
    assert wait_until(lambda: "SIGTERM again: ending at once" in (tmp_path / "out").read_text())
    os.kill(launch.pids[1], signal.SIGKILL)
    assert launch.wait() == [75, -signal.SIGKILL] and saved(run) == 0


def test_a_fork_goes_on_from_an_earlier_checkpoint_as_another_run(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "branch"
    assert fork(undisturbed, STEPS - 5, run) == STEPS - 5 and not list(tmp_path.glob(".*"))
    assert start_training(2, [str(run / "recipe.yaml")], tmp_path / "out").wait() == [0, 0]
    assert (run / "identity").read_text() != (undisturbed / "identity").read_text()
    assert next((event["event"], event["step"]) for event in read_events(run)) == ("forked", STEPS - 5)
    same(run, undisturbed)
    refused(lambda: fork(undisturbed, None, run), str(run), "exists already")
    refused(lambda: fork(undisturbed, 7, tmp_path / "other"), "step-00000007", "there is no such checkpoint")
    refused(lambda: fork(tmp_path, None, tmp_path / "other"), "no checkpoint to fork")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branch", "out", "out.keys"]


def test_a_second_job_in_the_run_directory_is_refused(undisturbed: Path, recorded_shards: Path, tmp_path: Path) -> None:
    run, other_path = tmp_path / "run", tmp_path / "link"
    launch = start_training(2, small_recipe(recorded_shards, run, *DRILL), tmp_path / "out")
    assert wait_until(lambda: _lines(run / "log.jsonl") > 0)
    other_path.symlink_to(run)
    second = run_program("-m", "far_scale.train", *small_recipe(recorded_shards, other_path, *DRILL))
    assert second.returncode == 2
    (line,) = [line for line in second.stderr.splitlines() if "error" in line]
    assert line.startswith("error: ") and f"pid {launch.pids[0]}" in line and f"host {host_name()}" in line
    assert launch.wait() == [0, 0]
    same(run, undisturbed)


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    harm: str, undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = small_recipe(recorded_shards, run, *DRILL)
    kill_after_checkpoint(start_training(2, arguments, tmp_path / "out"), run, 20)
    newest = saved(run)
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
    assert f"now step-{newest:08d}.damaged; going on from step {newest - 5}" in damaged["text"]
    assert (tmp_path / "out").read_text().count("damaged checkpoint") == 1, "one clear line"
    assert checkpoint.damage(checkpoint.step_folder(run, newest - 5).with_name(f"step-{newest:08d}.damaged"))
    same(run, undisturbed)


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
        arguments = small_recipe(recorded_shards, run, *DRILL, "checkpoint.every=20")
        launch = start_training(2, arguments, tmp_path / "out")
        assert wait_until(lambda: saved(run) == 20)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:  # to the last byte: logs do not fit either
                file.write(bytes(1 << 16))
        assert wait_until(lambda: "no checkpoint: " in (tmp_path / "out").read_text())
        filler.unlink()  # at once: the next save is not far
        assert saved(run) == 20 and checkpoint.damage(checkpoint.step_folder(run, 20)) is None
        assert launch.wait() == [0, 0], (tmp_path / "out").read_text()[-2000:]
        assert all("no space left on this disk" in event["text"] for event in events(run, "save-failed"))
        assert 1 <= len(events(run, "save-failed")) <= 2
        same(run, undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_node_local_checkpoint_is_gone_on_from_where_it_is_newer(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run, out, node = tmp_path / "run", tmp_path / "out", tmp_path / "node"
    more = [*RARE, f"checkpoint.local_dir={node}", "checkpoint.local_every=3"]
    arguments = small_recipe(recorded_shards, run, *DRILL, *more)

    def local_step() -> int:
        """Of the newest file that both ranks have written."""
        steps = [{int(f.parent.name[5:]) for f in node.glob(f"*/*/rank-0000{r}-of-00002.json")} for r in (0, 1)]
        return max(steps[0] & steps[1], default=0)

    def killed_at_local(step: int) -> int:
        launch = start_training(2, arguments, out)
        assert wait_until(lambda: local_step() >= step)
        for pid in launch.pids:
            os.kill(pid, signal.SIGKILL)
        launch.wait()
        return local_step()

    first = killed_at_local(20)
    assert saved(run) == 0, "there is no other checkpoint"
    second = killed_at_local(40)
    resumed = [(event["step"], event["text"]) for event in events(run, "resumed")]
    assert resumed[0][0] == first and str(node) in resumed[0][1]
    # A file that is damaged counts as not there: the one before is taken on all ranks.
    newest = next(node.glob(f"*/step-{second:08d}/rank-00001-of-00002.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    older = max(step for step in (int(f.parent.name[5:]) for f in node.glob("*/*/rank-00001*.json")) if step < second)
    assert start_training(2, arguments, out).wait() == [0, 0]
    assert events(run, "resumed")[-1]["step"] == older
    same(run, undisturbed)
    assert all(len(list(node.glob(f"*/*/rank-0000{rank}-*.safetensors"))) <= 2 for rank in (0, 1))


def test_a_nan_is_skipped_and_the_curve_goes_on(undisturbed: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """Of one lane at one step, through a kill, too."""
    runs = [tmp_path / name for name in ("whole", "killed")]
    for run in runs:
        arguments = small_recipe(recorded_shards, run, *DRILL)
        if run.name == "killed":
            kill_after_checkpoint(start_training(2, arguments, tmp_path / f"{run.name}.out", [(32, 3)]), run, 30)
        assert start_training(2, arguments, tmp_path / f"{run.name}.out", [(32, 3)]).wait() == [0, 0]
        skipped = events(run, "skipped")
        assert {event["step"] for event in skipped} == {32} and skipped[0]["reason"] == "the loss is not finite"
        (lane,) = skipped[0]["lanes"]
        assert lane["lane"] == 3 and lane["keys"] == trained_on(undisturbed.parent / "out")[31, 3]
    lines = [json.loads(line) for line in (runs[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["loss"] is None] == [32]
    assert lines[-1]["skipped"] == 1 and len(lines) == STEPS
    assert losses(runs[0])[:31] == losses(undisturbed)[:31]
    assert abs(losses(runs[0])[-1] / losses(undisturbed)[-1] - 1) < 0.05
    same(runs[1], runs[0])


def test_too_many_in_a_row_go_back_to_the_last_checkpoint(recorded_shards: Path, tmp_path: Path) -> None:
    """Four from step 33 on, known after step 37, which goes back to the weights of step 30; through a kill, too."""
    bad = [(step, 1) for step in range(33, 37)]
    runs = [tmp_path / name for name in ("whole", "killed")]
    for run in runs:
        arguments = small_recipe(recorded_shards, run, *DRILL, "faults.skipped_in_row=4")
        if run.name == "killed":
            kill_after_checkpoint(start_training(2, arguments, tmp_path / f"{run.name}.out", bad), run, 30)
        assert start_training(2, arguments, tmp_path / f"{run.name}.out", bad).wait() == [0, 0]
        back = events(run, "rolled-back")
        assert {(event["step"], event["weights_of"]) for event in back} == {(37, 30)}
        assert [event["step"] for event in events(run, "saved") if 30 <= event["step"] <= 40][-2:] == [37, 40]
    state = checkpoint.read_state(checkpoint.step_folder(runs[0], STEPS))
    assert state["guard"]["updates"] == 30 + STEPS - 37 and state["guard"]["skipped"] == 4
    same(runs[1], runs[0])


def test_going_back_for_nothing_ends_the_run(recorded_shards: Path, tmp_path: Path) -> None:
    arguments = small_recipe(recorded_shards, tmp_path / "run", *DRILL, "faults.skipped_in_row=4")
    bad = [(step, 1) for step in range(13, STEPS)]
    assert 2 in start_training(2, arguments, tmp_path / "out", bad).wait()
    assert [event["step"] for event in events(tmp_path / "run", "rolled-back")] == [17]
    assert "4 steps in a row were skipped, straight after going back" in (tmp_path / "out").read_text()
    none_yet = small_recipe(recorded_shards, tmp_path / "early", *DRILL, "faults.skipped_in_row=2")
    assert 2 in start_training(2, none_yet, tmp_path / "out", [(1, 0), (2, 0), (3, 0)]).wait()
    assert "there is no checkpoint to go back to" in (tmp_path / "out").read_text()


def test_one_wandb_run_holds_every_step_once(recorded_shards: Path, tmp_path: Path) -> None:
    """Through stops that its helper process is sent as well, and a kill."""
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = small_recipe(recorded_shards, run, *DRILL, "log.wandb.mode=offline")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        launch, step = start_training(2, arguments, out), saved(run)
        assert wait_until(lambda step=step: saved(run) >= step + 5)
        helpers = children(launch.pids[0])
        assert helpers, "wandb has a process of its own"
        for pid in [*helpers, *launch.pids]:  # as SLURM does
            os.kill(pid, number)
        assert launch.wait() == [75, 75]
    kill_after_checkpoint(start_training(2, arguments, out), run, saved(run) + 5)
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
