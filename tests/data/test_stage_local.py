"""Local shard sets that are copied to the node's disk while they are read (data.stage_local)."""

from __future__ import annotations

import json
import os
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.remote import fetch
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.errors import DamagedError
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.store import StagedStore
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import read_events
from harness.latent_sets import make_sample, write_set
from harness.launch import small_recipe
from harness.processes import start_training

FRAMES = [20 + number % 5 for number in range(22)]
GB = 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", FRAMES, samples_per_shard=5)
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)


def staged_set(folder: Path, disk: Path, limit: int = GB) -> tuple[ShardSet, StagedStore]:
    shard_set = ShardSet.from_manifest(folder, Manifest.text(folder), NodeCache(disk, limit, "data.stage_local"))
    assert isinstance(shard_set.store, StagedStore)
    return shard_set, shard_set.store


def all_right(shard_set: ShardSet) -> None:
    """All samples are those that were written."""
    for number, frames in enumerate(FRAMES):
        read, made = shard_set.read(*divmod(number, 5)), make_sample(number, frames)
        assert torch.equal(read.latents, made.latents) and read.key == made.key


def loader(shard_set: ShardSet, ahead_bytes: int = 0) -> PackLoader:
    packing = PackingConfig(lanes=4, frames=6, frame_stride=3, shuffle_window=4, seed=7, clips_per_pack=2)
    scaling = LatentScaling.of(shard_set.manifest, "channel")
    return PackLoader(shard_set, scaling, range(4), packing, ahead_bytes=ahead_bytes)


def assert_same(ours: list[list[Pack]], theirs: list[list[Pack]]) -> None:
    for one_step, other_step in zip(ours, theirs, strict=True):
        for one, other in zip(one_step, other_step, strict=True):
            assert (one.keys, one.lane_state) == (other.keys, other.lane_state)
            assert torch.equal(one.latents, other.latents)


@pytest.mark.parametrize("ahead", [0, GB])
def test_later_epochs_read_nothing_from_the_source(folder: Path, tmp_path: Path, ahead: int) -> None:
    with loader(ShardSet.open(folder)) as packs:
        plain = list(islice(packs, 12))  # four epochs
    sizes = [path.stat().st_size for path in [*folder.glob("shard-*.tar"), *folder.glob("*.index.json")]]
    shard_set, store = staged_set(folder, tmp_path / "disk")
    with loader(shard_set, ahead) as packs:
        first = list(islice(packs, 4))
        assert store.counts()[:2] == (10, sum(sizes)) and store.counts().opened_at_source == 0
        for path in folder.iterdir():
            path.unlink()
        assert_same(first + list(islice(packs, 8)), plain)
    assert store.counts()[:2] == (10, sum(sizes)) and store.counts().opened_at_source == 0


def test_a_second_start_reads_nothing_from_the_source(folder: Path, tmp_path: Path) -> None:
    all_right(staged_set(folder, tmp_path / "disk")[0])
    left = tmp_path / "disk" / f"{'a' * 64}.part"
    left.write_bytes(bytes(10_000))  # of a process that was killed
    again, store = staged_set(folder, tmp_path / "disk")
    manifest = Manifest.text(folder)
    for path in folder.iterdir():
        path.unlink()
    all_right(again)
    assert store.counts() == (0, 0, 10, 0)
    write_set(folder, [30, 30], samples_per_shard=2)
    assert Manifest.text(folder) != manifest
    staged_set(folder, tmp_path / "disk")[0].read(0, 0)
    assert not left.exists()


def test_files_without_room_are_read_at_the_source(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files of earlier trainings are evicted, those of this one stay, so no epoch copies a file twice."""
    shards = sorted(folder.glob("shard-*.tar"))
    small = sum(path.stat().st_size for path in folder.glob("*.index.json"))
    limit = small + sum(path.stat().st_size for path in shards[:2])
    old = tmp_path / "disk" / ("b" * 64)
    old.parent.mkdir()
    old.write_bytes(bytes(limit))
    os.utime(old, (time.time() - 60, time.time() - 60))
    shard_set, store = staged_set(folder, old.parent, limit)
    for _ in range(3):
        for shard in range(5):
            shard_set.index(shard)
        all_right(shard_set)
        shard_set._files._values.clear()
    assert not old.exists()
    assert store.counts().copied_files == 5 + 2 and store.counts().opened_at_source == 3 * 3
    lines = [line for line in capfd.readouterr().err.splitlines() if "data.stage_local=" in line]
    assert len(lines) == 1 and f"is read from {folder}: data.cache_gb={limit / GB:g} is full" in lines[0]


def test_training_continues_with_a_full_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shard_set, store = staged_set(folder, tmp_path / "disk")
    shard_set.read(0, 0)
    shard_set._files._values.clear()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.os, "write", full)
    all_right(shard_set)
    assert store.counts().opened_at_source == 2 * 4 and store.counts().opened_on_node == 3, (
        "a copy is used all the same"
    )
    store.fetch_ahead("shard-000004.tar", *(shard_set.manifest.shards[4].sha256, shard_set.manifest.shards[4].bytes))
    assert not list((tmp_path / "disk").glob("*.part"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "no space left on this disk" in lines[0] and "another data.stage_local" in lines[0]


def test_damage_at_the_source(folder: Path, tmp_path: Path) -> None:
    shard_set, _ = staged_set(folder, tmp_path / "disk")
    shards = sorted(folder.glob("shard-*.tar"))
    data = shards[0].read_bytes()
    shards[0].write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    with pytest.raises(DamagedError, match=r"shard-000000.tar: cannot be fetched \(its SHA-256.*, twice alike"):
        shard_set.read(0, 0)
    shards[1].write_bytes(shards[1].read_bytes()[:-512])
    with pytest.raises(DamagedError, match=r"cut off after \d+ of \d+ bytes, twice alike; .*check the file system"):
        shard_set.read(1, 0)
    shards[2].unlink()
    with pytest.raises(DamagedError, match=r"shard-000002.tar: this shard is missing; copy it again"):
        shard_set.read(2, 0)
    (folder / "shard-000003.index.json").unlink()
    with pytest.raises(DamagedError, match=r"shard-000003.index.json: this shard's index is missing"):
        shard_set.read(3, 0)
    shards[4].unlink()
    os.mkfifo(shards[4])
    with pytest.raises(DamagedError, match="not a plain file"):
        shard_set.read(4, 0)
    with pytest.raises(DamagedError, match=r"shard-000001.tar: truncated"):
        ShardSet.open(folder, NodeCache(tmp_path / "disk", GB))
    assert not list((tmp_path / "disk").glob("*.part"))


def test_an_interrupted_copy_ends(folder: Path, tmp_path: Path) -> None:
    shard_set, _ = staged_set(folder, tmp_path / "disk")
    stop = threading.Event()
    stop.set()
    with fetch.interruptible(stop), pytest.raises(fetch.Interrupted):
        shard_set.read(0, 0)
    assert not list((tmp_path / "disk").glob("*.part"))


def test_recipe_errors(tmp_path: Path) -> None:
    assert load_recipe("demo_cpu", ["data.stage_local=/local"]).hash() == load_recipe("demo_cpu").hash()
    with pytest.raises(UserError, match=r"data\.prefetch_gb: 4 is more than data\.cache_gb, 3"):
        load_recipe("demo_cpu", ["data.stage_local=/local", "data.cache_gb=3"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.stage_local=.*file/disk: Not a directory; give a folder on the node"):
        NodeCache(tmp_path / "file/disk", GB, "data.stage_local")
    with pytest.raises(UserError, match=r"^data\.stage_local=/sys/kernel: Permission denied; give a folder"):
        NodeCache("/sys/kernel", GB, "data.stage_local")


@pytest.mark.slow
def test_two_ranks_copy_each_file_once(recorded_shards: Path, tmp_path: Path) -> None:
    few = ["train.steps=6", "optimizer.warmup_steps=2", f"sample.shards={recorded_shards}"]
    few += ["validation.every=3", "validation.clips=2"]
    files = list(recorded_shards.glob("shard-*"))  # indexes, too
    for name, more in (("plain", []), ("staged", [f"data.stage_local={tmp_path / 'disk'}"])):
        recipe = small_recipe(recorded_shards, tmp_path / name, *few, *more)
        assert start_training(2, recipe, tmp_path / f"{name}.out").wait() == [0, 0]
    refused = small_recipe(recorded_shards, tmp_path / "no", f"data.stage_local={tmp_path / 'plain.out'}")
    assert 2 in start_training(2, refused, tmp_path / "no.out").wait()
    assert f"error: data.stage_local={tmp_path / 'plain.out'}: File exists; give" in (tmp_path / "no.out").read_text()
    plain, staged = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("plain", "staged")
    )
    losses = [[(line["step"], line.get("loss")) for line in lines] for lines in (plain, staged)]
    assert losses[0] == losses[1] and len(losses[0]) == 6 + 2
    (event,) = (event for event in read_events(tmp_path / "staged") if event["event"] == "staged")
    assert event["copied_files"] == len(files), "six epochs, two ranks, and the held-out set is read where it lies"
    assert event["copied_bytes"] == sum(path.stat().st_size for path in files) and event["opened_at_source"] == 0
    assert not [event for event in read_events(tmp_path / "plain") if event["event"] == "staged"]
