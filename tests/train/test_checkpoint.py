"""Checkpoints by themselves: whole at every instant of a save, damage found, the right ones kept, changes reported."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece, local
from far_scale.train.resume_checks import Changes, find_changes
from far_scale.utils.errors import UserError
from far_scale.utils.io import JsonlWriter


def pieces(value: float) -> dict[str, FlatPiece]:
    return {f"{kind}/x": FlatPiece(1000, 0, torch.full((1000,), value)) for kind in ("weight", "ema")}


def save(run: Path, step: int, keep: int = 1) -> None:
    checkpoint.save(run, step, pieces(float(step)), {"lanes": {}}, keep)


def steps_there(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_killed_at_every_instant_of_a_save_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    """A child saves step 20 over step 10 and dies at its first, second, ... touch of the file system."""
    instants, statuses = 0, []
    while not statuses or statuses[-1] != 0:
        run = tmp_path / str(instants)
        save(run, 10)
        statuses.append(in_child(lambda run=run: save(run, 20), run, die_at=instants))
        instants += 1
        step = checkpoint.steps_to_try(run)[0]
        folder = checkpoint.step_folder(run, step)
        assert checkpoint.damage(folder) is None, f"killed at instant {instants}"
        loaded = pieces(0.0)
        checkpoint.load(folder, loaded, single_process=True)
        assert all(torch.equal(piece.data, torch.full((1000,), float(step))) for piece in loaded.values())
        save(run, 30)  # what the killed one left is no hindrance
        assert steps_there(run) == ["latest", "step-00000030"]
    assert instants > 20 and set(statuses[:-1]) == {9}


def in_child(do: Callable[[], None], folder: Path, die_at: int) -> int:
    """Run in a forked child, which ends at its n-th operation on files below `folder`; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        left = die_at

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(folder) in str(arguments[0]):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            do()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("harm", ["truncated", "flipped", "removed"])
def test_damage_is_found_in_every_file_and_named(tmp_path: Path, harm: str) -> None:
    run = tmp_path / "run"
    save(run, 10)
    folder = checkpoint.step_folder(run, 10)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".metadata", "__0_0.distcp", "checksums.json", "state.json"]
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        if harm == "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        elif harm == "flipped":
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        else:
            path.unlink()
        # Ranks that share the work find it together, also where there are more of them than files.
        found = [checkpoint.damage(folder, part, 7) for part in range(7)]
        assert any(found) and checkpoint.damage(folder) is not None
        named = {"checksums.json": names, ".metadata": [name, "half-written"], "state.json": [name, "half-written"]}
        assert any(word in str(checkpoint.damage(folder)) for word in named.get(name, [name]))
        path.write_bytes(whole)
        assert checkpoint.damage(folder) is None


def test_the_newest_are_kept_and_never_the_wrong_ones_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (10, 20, 30):
        save(run, step, keep=2)
    assert steps_there(run) == ["latest", "step-00000020", "step-00000030"]
    # Step 30 is damaged: set aside, it counts no more.
    checkpoint.quarantine(checkpoint.step_folder(run, 30))
    checkpoint.point_at(checkpoint.step_folder(run, 20))
    assert checkpoint.steps_to_try(run) == [20]
    save(run, 25, keep=1)
    assert steps_there(run) == ["latest", "step-00000025", "step-00000030.damaged"]
    # A run that went back on purpose: later ones stay, and do not push out the one just written.
    save(run, 40, keep=2)
    checkpoint.point_at(checkpoint.step_folder(run, 25))
    save(run, 30, keep=1)
    assert {"step-00000030", "step-00000040"} <= set(steps_there(run)) and checkpoint.latest_step(run) == 30


def test_checkpoints_from_before_there_were_checksums_are_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, 10)
    folder = checkpoint.step_folder(run, 10)
    (folder / "checksums.json").unlink()
    (folder / "state.json").write_text((folder / "state.json").read_text().replace("checkpoint/2", "checkpoint/1"))
    assert checkpoint.damage(folder) is None


def test_a_node_local_file_is_good_for_the_same_ranks_and_pieces_only(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    for step in (5, 10, 15):
        local.save(folder, step, 0, 1, pieces(float(step)), {"lanes": {}}, None)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000015"]
    assert local.newest(folder, 0, 0, 1, pieces(0.0), None, None) == 15
    assert local.newest(folder, 15, 0, 1, pieces(0.0), None, None) is None, "not newer than the other checkpoint"
    assert local.newest(folder, 0, 1, 2, pieces(0.0), None, None) is None, "another rank count"
    halves = {name: FlatPiece(1000, 0, torch.zeros(500)) for name in pieces(0.0)}
    assert local.newest(folder, 0, 0, 1, halves, None, None) is None, "other pieces, as of another ZeRO stage"
    file = folder / "step-00000015" / "rank-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert local.newest(folder, 0, 0, 1, pieces(0.0), None, None) == 10
    loaded = pieces(0.0)
    local.load(folder, 10, 0, 1, loaded)
    assert loaded["ema/x"].data.unique().tolist() == [10.0]
    assert local.read_state(folder, 10, 0, 1) == {"step": 10, "lanes": {}}


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "no space left on this disk"), (errno.EDQUOT, "your quota on this disk is used up")],
)
def test_a_full_disk_is_reported_in_one_line(
    number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save(run, 10)

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("far_scale.train.checkpoint.write.finalize", full)
    with pytest.raises(UserError, match=f"step-00000020: {reason}; free some space, or lower checkpoint.keep"):
        save(run, 20)
    assert steps_there(run) == ["latest", "step-00000010"]


def compared(old: list[str], new: list[str], **facts: Any) -> Changes:
    """Between two states of demo_cpu with these overrides; `facts` are (then, now) of other keys."""
    states = []
    for index, overrides in enumerate((old, new)):
        recipe = load_recipe("demo_cpu", overrides)
        other = {key: values[index] for key, values in facts.items()}
        states.append({"recipe": recipe.model_dump(mode="json"), "versions": {"torch": "2.12"}, "ranks": 2, **other})
    return find_changes(states[0], states[1], recipe)


def test_changes_of_the_result_and_harmless_changes() -> None:
    assert compared([], []) == Changes([], [])
    found = compared([], ["optimizer.learning_rate=0.5", "train.zero_stage=1", "log.every=7"])
    (line,) = found.affecting_result
    assert line.startswith("optimizer.learning_rate ") and line.endswith(" -> 0.5")
    assert {line.split()[0] for line in found.harmless} == {"train.zero_stage", "log.every"}
    versions = ({"torch": "2.12"}, {"torch": "2.13"})
    found = compared([], [], versions=versions, ranks=(2, 4), shard_set=("a" * 64, "b" * 64))
    assert found.affecting_result == [f"the shard set's manifest {'a' * 12} -> {'b' * 12}"]
    assert found.harmless == ["torch 2.12 -> 2.13", "ranks 2 -> 4"]


def test_more_steps_are_harmless_under_a_constant_learning_rate_only() -> None:
    more = ["train.steps=9000"]
    assert compared(["optimizer.schedule=cosine"], ["optimizer.schedule=cosine", *more]).affecting_result
    assert not compared(["optimizer.schedule=constant"], ["optimizer.schedule=constant", *more]).affecting_result
    assert compared(["faults.spikes=warn"], ["faults.spikes=skip"]).affecting_result, "skipped spikes change the result"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_lines_that_do_not_fit_on_a_full_disk_come_later(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        file, filler = JsonlWriter(disk / "log.jsonl"), disk / "filler"
        file.append({"step": 1})
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as full:
            while True:
                full.write(bytes(4096))
        for step in range(2, 200):  # more than the rest of the log's own page
            file.append({"step": step, "text": "." * 100})
        lines = (disk / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) < 100
        filler.unlink()
        file.append({"step": 200})
        lines = (disk / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 201))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
