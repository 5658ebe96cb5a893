"""The run directory: which checkpoint a run resumes from, and whether the directory is a copy of another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from far_scale.slurm.lifecycle import checkpoint_step
from far_scale.train.checkpoint import FlatPiece, local, point_at, quarantine, step_folder
from far_scale.train.checkpoint.folders import commit
from far_scale.train.run_dir import latest_stamp, latest_step, run_identity, steps_to_try
from harness.refusal import refused


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the checkpoints 10, 20 and 30, and what may lie beside them."""
    run = tmp_path / "run"
    for step in (10, 20, 30):
        step_folder(run, step).mkdir(parents=True)
    for other in ("step-bestmode", "step-00000040.damaged", "step-00000040.part", "step-0000004"):
        (run / "checkpoints" / other).mkdir()
    (run / "checkpoints" / "step-00000050").touch()  # a file
    point_at(step_folder(run, 30))
    return run


def test_the_run_goes_on_from_the_checkpoint_that_latest_names(run: Path) -> None:
    assert steps_to_try(run) == [30, 20, 10]
    point_at(step_folder(run, 20))
    assert steps_to_try(run) == [20, 10] and latest_step(run) == checkpoint_step(run) == 20


@pytest.mark.parametrize("named", [None, 25, 60])
def test_without_the_checkpoint_that_latest_names_the_newest_is_taken(run: Path, named: int | None) -> None:
    if named is None:
        (run / "checkpoints" / "latest").unlink()
    else:
        point_at(step_folder(run, named))
    assert steps_to_try(run) == [30, 20, 10] and latest_step(run) == checkpoint_step(run) == 30


def test_a_latest_that_names_nothing_is_refused(run: Path) -> None:
    for content in (b"", b"step-10", b"step-bestmode", b"\xff\xfe"):
        (run / "checkpoints" / "latest").write_bytes(content)
        refused(lambda: steps_to_try(run), "checkpoints/latest", "step-XXXXXXXX")
    assert checkpoint_step(run) == 0
    point_at(step_folder(run, 30))
    for step in (10, 20, 30):
        step_folder(run, step).rmdir()
    refused(lambda: steps_to_try(run), "names step 30", "there is no checkpoint")


def test_a_run_that_was_sent_back_to_a_damaged_checkpoint_never_goes_on_from_a_later_one(run: Path) -> None:
    point_at(step_folder(run, 20))
    quarantine(step_folder(run, 20))
    assert steps_to_try(run) == [10]
    step_folder(run, 10).rmdir()
    refused(lambda: steps_to_try(run), "latest", "step 20, is damaged", "resume from there: step-00000030")


def test_a_link_to_a_checkpoint_on_another_disk_counts_and_goes_as_a_checkpoint_does(run: Path, tmp_path: Path) -> None:
    elsewhere = [tmp_path / f"elsewhere-{step}" for step in (10, 20)]
    for step, place in zip((10, 20), elsewhere, strict=True):
        (step_folder(run, step) / "state.json").touch()
        step_folder(run, step).rename(place)
        step_folder(run, step).symlink_to(place)
    assert steps_to_try(run) == [30, 20, 10]
    assert quarantine(step_folder(run, 10)).is_symlink()
    temporary = run / "checkpoints" / "step-00000035.part"
    temporary.mkdir()
    commit(temporary, step_folder(run, 35), keep=1)
    assert steps_to_try(run) == [35] and not list((run / "checkpoints").glob("*.old.part"))
    assert all((place / "state.json").exists() for place in elsewhere)


def test_a_copy_of_a_run_is_another_run(tmp_path: Path) -> None:
    run, copy, moved = tmp_path / "run", tmp_path / "copy", tmp_path / "moved"
    run.mkdir()
    own, copied = run_identity(run)
    assert copied is None and run_identity(run) == (own, None) and len(own) == 16
    shutil.copytree(run, copy)
    other, copied = run_identity(copy)
    assert other != own and copied is not None and str(run) in copied and own in copied
    assert run_identity(copy) == (other, None) and run_identity(run) == (own, None)
    run.rename(moved)
    assert run_identity(moved) == (own, None), "moved, it is the same run"
    (tmp_path / "link").symlink_to(moved)
    assert run_identity(tmp_path / "link") == (own, None), "and by another path"
    # Moved, it leaves its old place: a copy that is put there is another run.
    (tmp_path / "link").unlink()
    shutil.copytree(moved, run)
    assert run_identity(moved) == (own, None)
    assert run_identity(run)[0] not in (own, other)
    # As the line says: to continue as the other, write its identity into the file.
    (copy / "identity").write_text(own + "\n")
    assert run_identity(copy) == run_identity(copy) == (own, None)


def test_a_run_from_before_places_were_recorded_keeps_its_identity(tmp_path: Path) -> None:
    (tmp_path / "identity").write_text("0123456789abcdef\n")
    assert run_identity(tmp_path) == ("0123456789abcdef", None)
    (tmp_path / "identity.place").write_text("{half")
    assert run_identity(tmp_path) == ("0123456789abcdef", None)


def test_after_going_back_no_node_local_checkpoint_of_the_old_history_is_taken(run: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    pieces = {"weight/x": FlatPiece(4, 0, torch.arange(4.0))}
    latest = run / "checkpoints" / "latest"

    def written(step: int) -> None:
        local.save(node, step, 0, 1, pieces, {}, latest_stamp(run))

    def taken() -> int | None:
        return local.newest(node, latest_step(run) or 0, 0, 1, pieces, latest_stamp(run), None)

    written(35)
    assert taken() == 35
    os.utime(latest, (0, 10**9))  # the time at which it was written, whatever this test's clock does
    assert taken() is None
    written(35)
    assert taken() == 35
    # By hand, to a checkpoint that this file is later than.
    latest.write_text("step-00000020\n")
    assert taken() is None, "the run was sent back"
    written(25)
    assert taken() == 25, "of the new history"
    # There and back again: files of the histories that were left do not push out those of this one.
    for step in (22, 24, 26, 28, 21, 23):
        if step in (22, 21):
            latest.write_text("step-00000020\n")
            os.utime(latest, (0, 10**9 + step))
        written(step)
        assert taken() == step
    latest.unlink()
    assert taken() is None
    shutil.rmtree(run / "checkpoints")
    assert taken() is None, "removed on purpose, to begin anew"
