"""Inputs that training must refuse: one clear line, exit status 2 on every rank, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from far_scale.train import checkpoint
from far_scale.train.checkpoint.export import export, export_official
from far_scale.utils.errors import UserError
from far_scale.utils.hosts import host_name
from harness.launch import small_recipe
from harness.processes import launch, run
from harness.refusal import refused
from harness.strangers import Evil, seal_again

pytestmark = pytest.mark.slow


def train_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m far_scale.train` without a launcher."""
    return run("-m", "far_scale.train", *arguments)


def the_error(finished: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused run ends with."""
    assert finished.returncode == 2, finished.stderr[-2000:]
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def trained(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each, by one process without a launcher, with wandb offline."""
    run = tmp_path_factory.mktemp("trained") / "run"
    finished = train_alone(*small_recipe(recorded_shards, run, *SHORT, "log.wandb.mode=offline"))
    assert finished.returncode == 0, finished.stderr[-2000:]
    return run


SHORT = ["train.steps=2", "checkpoint.every=1", "optimizer.warmup_steps=1", "model.layers=1", "model.heads=1"]


def test_one_process_trains_without_a_launcher(trained: Path) -> None:
    assert checkpoint.latest_step(trained) == 2
    assert (trained / "recipe.yaml").exists() and len((trained / "log.jsonl").read_text().splitlines()) == 2
    assert list((trained / "wandb").glob("offline-run-*/*.wandb"))


def test_a_finished_run_says_so(trained: Path, recorded_shards: Path) -> None:
    before = (trained / "log.jsonl").read_text()
    finished = train_alone(*small_recipe(recorded_shards, trained, *SHORT))
    assert finished.returncode == 0 and "all 2 steps are done" in finished.stdout
    assert (trained / "log.jsonl").read_text() == before


def test_dry_run_checks_and_writes_nothing(recorded_shards: Path, tmp_path: Path) -> None:
    finished = train_alone(*small_recipe(recorded_shards, tmp_path / "run"), "--dry-run")
    assert finished.returncode == 0, finished.stderr[-2000:]
    for said in (
        "8 samples",
        "M parameters",
        "sharding: ZeRO-",
        "attended pairs",
        "GB free",
        "one batch   loss",
        "passed",
    ):
        assert said in finished.stdout
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_what_does_not_fit_into_memory(recorded_shards: Path, tmp_path: Path) -> None:
    huge = ["model.layers=2000", "model.heads=64"]
    finished = train_alone(*small_recipe(recorded_shards, tmp_path / "run", *huge), "--dry-run")
    assert re.search(r"a rank needs [\d.]+ GB and has [\d.]+ GB free; use more ranks", the_error(finished))


def test_ranks_that_do_not_divide_the_lanes(recorded_shards: Path, tmp_path: Path) -> None:
    finished = launch(2, "-m", "far_scale.train", *small_recipe(recorded_shards, tmp_path / "run", "data.lanes=3"))
    assert finished.returncode != 0
    for rank in (0, 1):
        assert (
            f"[rank {rank} on {host_name()}] error: demo_cpu: data.lanes: 3 lanes cannot be shared evenly by 2 ranks"
            in finished.stderr
        )
    assert "one of 1, 3 ranks" in finished.stderr and not (tmp_path / "run").exists()


def test_a_recipe_and_a_shard_set_that_do_not_fit(recorded_shards: Path, tmp_path: Path) -> None:
    assert "data.lane: unknown key" in the_error(train_alone("demo_cpu", "data.lane=4"))
    other = small_recipe(recorded_shards, tmp_path / "run", "data.autoencoder=another")
    assert "data.autoencoder" in the_error(train_alone(*other)) and not (tmp_path / "run").exists()


def test_another_models_checkpoint(trained: Path, recorded_shards: Path) -> None:
    before = sorted(path.name for path in trained.rglob("*"))
    wider = small_recipe(recorded_shards, trained, *SHORT, "train.steps=3", "model.heads=2")
    assert "another model's checkpoint (model.heads was 1, the recipe has 2)" in the_error(train_alone(*wider))
    assert sorted(path.name for path in trained.rglob("*")) == before


def test_a_checkpoint_of_an_older_version_is_resumed(trained: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """Without checksums, and from before steps could be skipped: all its steps count as updates."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    folder = checkpoint.step_folder(run, 2)
    state = checkpoint.read_state(folder)
    older = {key: value for key, value in state.items() if key not in ("guard", "shard_set", "ranks", "went_back")}
    (folder / "state.json").write_text(json.dumps({**older, "format": "far_scale.checkpoint/1"}))
    (folder / "checksums.json").unlink()
    finished = train_alone(*small_recipe(recorded_shards, run, *SHORT, "train.steps=3"), "--accept-changes")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert checkpoint.read_state(checkpoint.step_folder(run, 3))["guard"]["updates"] == 3


def test_a_change_of_the_result_needs_a_flag(trained: Path, recorded_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    manifest = tmp_path / "shards" / "manifest.json"
    shutil.copytree(recorded_shards, manifest.parent)
    manifest.write_text(manifest.read_text().replace('"fps": ', '"fps": 1', 1))  # another frame rate
    changed = small_recipe(manifest.parent, run, *SHORT, "train.steps=3", "optimizer.learning_rate=0.5", "log.every=2")
    error = the_error(train_alone(*changed))
    assert "optimizer.learning_rate 0.003 -> 0.5" in error and "the shard set's manifest" in error
    assert "train.steps 2 -> 3" in error, "the learning rate's cosine ends elsewhere"
    assert "--accept-changes" in error and "log.every" not in error and checkpoint.latest_step(run) == 2
    finished = train_alone(*changed, "--accept-changes")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "other results accepted" in finished.stdout and "log.every 1 -> 2" in finished.stdout
    assert checkpoint.latest_step(run) == 3


def test_a_checkpoint_that_is_missing_or_incomplete(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint; there are: step-00000001, step-00000002"):
        export(trained, 7, "ema", tmp_path / "model")
    with pytest.raises(UserError, match="no checkpoint in this run yet"):
        export(tmp_path, None, "ema", tmp_path / "model")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "step-00000002" / "state.json").unlink()
    with pytest.raises(UserError, match="half-written; remove it and use an earlier one"):
        export(run, None, "ema", tmp_path / "model")
    assert export(run, 1, "ema", tmp_path / "model") == 1
    (run / "checkpoints" / "latest").write_text("the newest\n")
    with pytest.raises(UserError, match="does not name a checkpoint"):
        export(run, None, "ema", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_or_foreign_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    folder = run / "checkpoints" / "step-00000002"
    data = next(folder.glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(UserError, match="step-00000002: "):
        export(run, None, "ema", tmp_path / "model")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": "something/9"}))
    with pytest.raises(UserError, match="format 'something/9', this version reads"):
        export(run, None, "ema", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_start_weights_for_a_finished_run_are_refused(trained: Path, recorded_shards: Path, tmp_path: Path) -> None:
    start = [f"train.start_from={tmp_path / 'model'}", "--profile", "9"]
    arguments = small_recipe(recorded_shards, trained, *SHORT)
    error = the_error(train_alone(*arguments, *start))
    assert "--profile 9: the run ends with step 2" in error
    error = the_error(train_alone(*arguments, *start[:1]))
    assert "train.start_from=" in error and "started from random weights; use another run_dir" in error


def test_an_untrusted_checkpoint_runs_no_code(trained: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """Its metadata is a pickle that would make a file."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(trained, run)
    folder = checkpoint.step_folder(run, 2)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    seal_again(folder)
    refused(lambda: export(run, None, "ema", tmp_path / "model"), ".metadata", "system")
    refused(lambda: export_official(run, None, "ema", tmp_path / "own.pth"), ".metadata", "system")
    error = the_error(train_alone(*small_recipe(recorded_shards, run, *SHORT, "train.steps=3"), "--accept-changes"))
    assert ".metadata: this is not the metadata of a checkpoint" in error and "system" in error
    assert not mark.exists() and not (tmp_path / "model").exists() and not (tmp_path / "own.pth").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_leaves_the_last_checkpoint_whole(recorded_shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for one checkpoint of this model (16 bytes a parameter), not for two.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = disk / "run"
        finished = train_alone(*small_recipe(recorded_shards, run, *SHORT, "checkpoint.keep=2"))
        assert "no space left on this disk" in the_error(finished)
        assert checkpoint.latest_step(run) == 1
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]
        export(run, None, "ema", tmp_path / "model")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
