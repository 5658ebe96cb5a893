"""Damaged samples and shards: skipped, counted and logged, the same on all rank counts and resumes; or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.remote import fetch
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.errors import DamagedError, OverBudgetError
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.exit_codes import REFUSED
from far_scale.train import checkpoint
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import read_events
from harness.latent_sets import write_set
from harness.launch import small_recipe
from harness.processes import start_training
from harness.remote_sets import served

FRAMES = [20 + number % 5 for number in range(22)]
LANES = 4
PLAIN = PackingConfig(lanes=LANES, frames=6, frame_stride=3, shuffle_window=4, seed=7, clips_per_pack=2, max_damaged=99)
BUDGET = replace(PLAIN, frames=(4, 20), frame_stride=1, clips_per_pack=None, tokens_per_pack=40)
LONE = replace(BUDGET, tokens_per_pack=20, frames=(18, 20))  # no two clips fit into one pack
Damage = Callable[[Path], set[str]]


def row(folder: Path, shard: int, sample: int) -> list:
    """The index row of a sample."""
    return json.loads((folder / f"shard-{shard:06d}.index.json").read_text())["samples"][sample]


def overwrite(folder: Path, shard: int, offset: int, data: bytes) -> None:
    with (folder / f"shard-{shard:06d}.tar").open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip_header(folder: Path) -> set[str]:
    """A sample's safetensors header has a flipped bit."""
    key, *_, tensors_offset, _, _ = row(folder, 1, 2)
    overwrite(folder, 1, tensors_offset + 8, b"\xfb")
    return {key}


def flip_json(folder: Path) -> set[str]:
    """The metadata of two samples is not JSON."""
    keys = set()
    for shard, sample in ((0, 0), (3, 1)):
        key, _, offset, *_ = row(folder, shard, sample)
        overwrite(folder, shard, offset, b"[")
        keys.add(key)
    return keys


def lose_shard(folder: Path) -> set[str]:
    (folder / "shard-000002.tar").unlink()
    return {f"clip_{number:03d}" for number in range(10, 15)}


def cut_shard(folder: Path) -> set[str]:
    path = folder / "shard-000004.tar"
    path.write_bytes(path.read_bytes()[:1000])
    return {"clip_020", "clip_021"}


DAMAGES: list[Damage] = [flip_header, flip_json, lose_shard, cut_shard]


def damage_index(folder: Path) -> set[str]:
    path = folder / "shard-000003.index.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    return {f"clip_{number:03d}" for number in range(15, 20)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", FRAMES, samples_per_shard=5)
    return tmp_path / "set"


def read(
    folder: Path, packing: PackingConfig, steps: int, lanes: list[int] | None = None, **from_state
) -> list[list[Pack]]:
    manifest = ShardSet.from_manifest(folder, (folder / "manifest.json").read_bytes())
    scaling = LatentScaling.of(manifest.manifest, "channel")
    own = list(range(LANES)) if lanes is None else lanes
    with PackLoader(manifest, scaling, own, packing, **from_state) as packs:
        return list(islice(packs, steps))


def keys(packs: list[list[Pack]], lane: int) -> list[list[str]]:
    return [list(pack.keys) for step in packs for pack in step if pack.lane == lane]


def facts(pack: Pack) -> tuple:
    return pack.keys, pack.clip_frames, pack.lane_state, pack.skipped, pack.latents.sum().item()


@pytest.mark.parametrize("damage", [*DAMAGES, damage_index])
def test_next_clip_of_the_lane_replaces_a_damaged_one(folder: Path, damage: Damage) -> None:
    one_by_one = read(folder, replace(PLAIN, clips_per_pack=1), 60)
    lost = damage(folder)
    packs = read(folder, PLAIN, 20)
    skipped = 0
    for lane in range(LANES):
        clips = [key for pack in keys(one_by_one, lane) for key in pack]
        sound = [position for position, key in enumerate(clips) if key.split("@")[0] not in lost]
        got = [key for pack in keys(packs, lane) for key in pack]
        assert sorted(got) == sorted(clips[position] for position in sound[:40]) and all(
            len(pack) == 2 for pack in keys(packs, lane)
        )
        skipped_clips = [clip for step in packs for clip in step[lane].skipped]
        passed = sound[39] + 1 - 40
        assert len(skipped_clips) == packs[-1][lane].lane_state.get("damaged", 0) == passed
        assert all(clip.lane == lane and str(folder) in clip.file and clip.reason for clip in skipped_clips)
        if damage is not damage_index:  # then the samples' keys are unknown
            assert {clip.key for clip in skipped_clips} <= lost
        skipped += passed
    assert skipped > 0


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("packing", [BUDGET, LONE])
def test_pack_with_a_token_budget_skips_it(folder: Path, damage: Damage, packing: PackingConfig) -> None:
    whole = read(folder, packing, 40)
    lost = damage(folder)
    packs = read(folder, packing, 20)
    for lane in range(LANES):
        rest = [[key for key in pack if key.split("@")[0] not in lost] for pack in keys(whole, lane)]
        assert keys(packs, lane) == [pack for pack in rest if pack][:20], "an empty pack gives way to the next"
    assert any(pack.skipped for step in packs for pack in step)


@pytest.mark.parametrize("packing", [PLAIN, BUDGET, LONE])
@pytest.mark.parametrize("damage", [flip_json, lose_shard, damage_index])
def test_rank_counts_and_resumes_give_the_same_packs(folder: Path, packing: PackingConfig, damage: Damage) -> None:
    damage(folder)
    alone = read(folder, packing, 16)
    assert sum(pack.lane_state.get("damaged", 0) for pack in alone[-1]) > 0
    for ranks in (2, 4):
        shares = [read(folder, packing, 16, list(range(rank, LANES, ranks))) for rank in range(ranks)]
        for step in range(16):
            together = sorted((pack for share in shares for pack in share[step]), key=lambda pack: pack.lane)
            assert [facts(pack) for pack in together] == [facts(pack) for pack in alone[step]]
    for stop in (1, 5, 9):
        states = {pack.lane: json.loads(json.dumps(pack.lane_state)) for pack in alone[stop - 1]}
        rest = read(folder, packing, 16 - stop, step=stop, lane_states=states)
        assert [[facts(pack) for pack in step] for step in rest] == [
            [facts(pack) for pack in step] for step in alone[stop:]
        ]


def test_without_a_budget_the_first_damage_is_an_error(folder: Path) -> None:
    flip_header(folder)
    with pytest.raises(DamagedError, match=r"shard-000001\.tar: sample 'clip_007' is not what the index describes"):
        read(folder, replace(PLAIN, max_damaged=0), 20)


def test_beyond_the_budget_a_rank_stops_at_once(folder: Path) -> None:
    lose_shard(folder)
    words = r"data\.max_damaged_samples=3: 4 clips .*the last: lane \d: sample .*shard-000002\.tar: this shard is"
    with pytest.raises(OverBudgetError, match=words):
        read(folder, replace(PLAIN, max_damaged=3), 20)
    states = {pack.lane: pack.lane_state for pack in read(folder, PLAIN, 1)[-1]}
    for state in states.values():
        state["damaged"] = 1
    with pytest.raises(OverBudgetError, match="max_damaged_samples=4: 5 clips"):  # the lanes' states count too
        read(folder, replace(PLAIN, max_damaged=4), 20, step=1, lane_states=states)
    states[2]["damaged"] = -1
    with pytest.raises(UserError, match="lane 2: -1 is not a count of damaged clips"):
        read(folder, PLAIN, 1, step=1, lane_states=states)


@pytest.mark.parametrize("packing", [PLAIN, BUDGET])
def test_reading_ends_if_all_is_damaged(folder: Path, packing: PackingConfig) -> None:
    for path in folder.glob("shard-*.tar"):
        path.unlink()
    with pytest.raises(OverBudgetError, match="max_damaged_samples=99: 100 clips"):
        read(folder, packing, 1)


def test_samples_that_do_not_fit_the_manifest_are_never_skipped(folder: Path) -> None:
    key, _, offset, size, *_ = row(folder, 1, 2)
    with (folder / "shard-000001.tar").open("rb") as file:
        file.seek(offset)
        text = file.read(size)
    overwrite(folder, 1, offset, text.replace(b'"label": 1', b'"label": 7'))
    with pytest.raises(UserError, match=f"{key}.*its label is 7, and the set has 3 labels") as caught:
        read(folder, PLAIN, 20)
    assert not isinstance(caught.value, DamagedError)
    values = json.loads((folder / "manifest.json").read_text())
    values["latent_shape"] = [4, 1, 2]
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"its latents are \[2\d, 4, 2, 2\]") as caught:
        read(folder, PLAIN, 1)
    assert not isinstance(caught.value, DamagedError)


def test_remote_shard_that_cannot_be_fetched_is_skipped(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    lost = lose_shard(folder)
    here = read(folder, PLAIN, 12)
    with served(folder) as server:
        remote = ShardSet.open(server.url, NodeCache(tmp_path / "cache", 10**9))
        scaling = LatentScaling.of(remote.manifest, "channel")
        with PackLoader(remote, scaling, range(LANES), PLAIN, ahead_bytes=10**9) as packs:
            there = list(islice(packs, 12))
    for ours, theirs in zip(there, here, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.keys, a.lane_state) == (b.keys, b.lane_state)
            assert [each.key for each in a.skipped] == [each.key for each in b.skipped]
            assert {each.key for each in a.skipped} <= lost
            assert all("404" in each.reason and each.file.startswith("http://") for each in a.skipped)


def damaged_copy(shards: Path, folder: Path) -> Path:
    """The recorded shards, with one sample damaged."""
    shutil.copytree(shards, folder)
    overwrite(folder, 1, row(folder, 1, 0)[4] + 8, b"\xfb")
    return folder


def skip_events(run: Path) -> list[dict]:
    return [event for event in read_events(run) if event["event"] == "damaged-sample"]


@pytest.mark.slow
def test_training_continues_and_resumes_exactly(recorded_shards: Path, tmp_path: Path) -> None:
    shards = damaged_copy(recorded_shards, tmp_path / "set")
    key, budget = row(shards, 1, 0)[0], ["data.max_damaged_samples=60", "optimizer.schedule=constant", "train.steps=20"]
    whole, parts = tmp_path / "whole/run", tmp_path / "parts/run"
    for run in (whole, parts):
        run.parent.mkdir()
    assert start_training(2, small_recipe(shards, whole, *budget), whole.parent / "out").wait() == [0, 0]
    few = small_recipe(shards, parts, *budget, "train.steps=7")
    assert start_training(1, few, parts.parent / "out").wait() == [0]
    assert start_training(2, small_recipe(shards, parts, *budget), parts.parent / "out").wait() == [0, 0]

    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    events = skip_events(whole)
    assert [event["count"] for event in events] == list(range(1, len(events) + 1)) and len(events) >= 10
    for event in events:
        assert event["key"] == key and event["file"] == str(shards / "shard-000001.tar")
        assert f"step {event['step']}: lane {event['lane']}: sample {key} is skipped: " in event["text"]
    assert lines[-1]["damaged"] == sum(event["step"] < 20 for event in events) and lines[0]["damaged"] == 0

    def without_time(run: Path) -> list[dict]:
        events = skip_events(run)
        return [{name: value for name, value in event.items() if name not in ("time", "text")} for event in events]

    assert without_time(parts) == without_time(whole), "also on one rank, and after a resume"
    states = [checkpoint.read_state(checkpoint.step_folder(run, 20))["lanes"] for run in (whole, parts)]
    assert states[0] == states[1]
    assert sum(state.get("damaged", 0) for state in states[0].values()) == len(events)
    trained = [
        {(step, lane): keys for step, lane, keys in map(json.loads, (run.parent / "out.keys").read_text().splitlines())}
        for run in (whole, parts)
    ]
    assert trained[0] == trained[1] and len(trained[0]) == 80


@pytest.mark.slow
def test_training_ends_when_all_ranks_exceed_the_budget(recorded_shards: Path, tmp_path: Path) -> None:
    shards, run = damaged_copy(recorded_shards, tmp_path / "set"), tmp_path / "run"
    first = start_training(2, small_recipe(shards, run, "data.max_damaged_samples=4"), tmp_path / "out").wait()
    assert REFUSED in first and not set(first) - {REFUSED, -9}
    text = (tmp_path / "out").read_text()
    assert "data.max_damaged_samples=4: " in text and "Traceback" not in text
    assert len(skip_events(run)) >= 4


@pytest.mark.slow
def test_missing_shard_is_refused_before_training_or_logged(recorded_shards: Path, tmp_path: Path) -> None:
    shards, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(recorded_shards, shards)
    (shards / "shard-000003.tar").unlink()
    refused = start_training(2, small_recipe(shards, run, "data.max_damaged_samples=1"), tmp_path / "out").wait()
    assert REFUSED in refused and not set(refused) - {REFUSED, -9}
    assert "shard-000003.tar: this shard is missing" in (tmp_path / "out").read_text()
    enough = small_recipe(shards, run, "data.max_damaged_samples=90", "train.steps=6")
    assert start_training(2, enough, tmp_path / "out").wait() == [0, 0]
    (event,) = [event for event in read_events(run) if event["event"] == "damaged-shard"]
    assert "incomplete, its clips will be skipped: " in event["text"] and "shard-000003.tar" in event["text"]
    assert skip_events(run)
