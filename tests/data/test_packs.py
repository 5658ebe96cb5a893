"""Packs: the right frames at the right scale, the same for any division of the lanes, and errors that are raised."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError
from harness.latent_sets import FACTS, make_sample, write_set

FRAMES = [20 + number % 5 for number in range(22)]
LANES = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", FRAMES, samples_per_shard=5)
    return tmp_path / "set"


def loader(folder: Path, indices: list[int] | None = None, **changes) -> PackLoader:
    """A loader of all lanes (or those of `indices`), with changes to the packing or to the loader's arguments."""
    shard_set = ShardSet.open(folder)
    arguments = {name: changes.pop(name) for name in ("step", "lane_states", "prefetch") if name in changes}
    plain = PackingConfig(lanes=LANES, frames=6, frame_stride=3, shuffle_window=4, seed=7, clips_per_pack=2)
    packing = replace(plain, **changes)
    scaling = LatentScaling.of(shard_set.manifest, "channel")
    return PackLoader(shard_set, scaling, range(packing.lanes) if indices is None else indices, packing, **arguments)


def read(packs: PackLoader, steps: int) -> list[list[Pack]]:
    with packs:
        return list(islice(packs, steps))


def same(a: Pack, b: Pack) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("latents", "actions", "labels"))
    facts = ("clip_frames", "keys", "lane", "step", "lane_state")
    return tensors and all(getattr(a, name) == getattr(b, name) for name in facts)


def test_pack_holds_the_clips_that_its_keys_name(folder: Path) -> None:
    scaling = LatentScaling.of(ShardSet.open(folder).manifest, "channel")
    steps = read(loader(folder), 5)
    for step, packs in enumerate(steps):
        assert [(pack.lane, pack.step) for pack in packs] == [(lane, step) for lane in range(LANES)]
        for pack in packs:
            assert pack.clip_frames == (6, 6) and pack.latents.shape == (12, 4, 2, 2)
            assert (pack.latents.dtype, pack.actions.dtype, pack.labels.dtype) == (
                torch.float32,
                torch.int64,
                torch.int64,
            )
            for clip, key in enumerate(pack.keys):
                name, start = key.split("@")
                number, chosen = int(name.removeprefix("clip_")), slice(int(start), int(start) + 16, 3)
                made, part = make_sample(number, FRAMES[number]), slice(6 * clip, 6 * clip + 6)
                assert torch.equal(pack.latents[part], scaling.normalise(made.latents[chosen]))
                assert torch.equal(pack.actions[part], made.actions[chosen])
                assert int(pack.labels[clip]) == made.label


def test_an_epoch_of_packs_reads_each_sample_once(folder: Path) -> None:
    # 22 samples in 4 lanes leave 2 over each epoch: after 11 packs of 2 clips, all lanes have read 4 whole epochs.
    keys = Counter(key.split("@")[0] for packs in read(loader(folder), 11) for pack in packs for key in pack.keys)
    assert keys == {f"clip_{number:03d}": 4 for number in range(22)}


def test_every_start_is_drawn(tmp_path: Path) -> None:
    write_set(tmp_path, [10], samples_per_shard=1)
    packs = read(loader(tmp_path, [0], lanes=1, frames=3, frame_stride=3), 100)
    starts = Counter(int(key.split("@")[1]) for step in packs for key in step[0].keys)
    assert set(starts) == {0, 1, 2, 3} and min(starts.values()) > 25


def test_any_number_of_ranks_reads_the_same(folder: Path) -> None:
    one_rank = read(loader(folder), 8)
    for ranks in (2, 4):
        of_ranks = [
            read(loader(folder, [lane for lane in range(LANES) if lane % ranks == rank]), 8) for rank in range(ranks)
        ]
        for step in range(8):
            together = sorted(
                (pack for rank_packs in of_ranks for pack in rank_packs[step]), key=lambda pack: pack.lane
            )
            assert all(same(a, b) for a, b in zip(one_rank[step], together, strict=True))


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_continues_from_a_state(folder: Path, stop: int) -> None:
    whole = read(loader(folder), 12)
    states = {pack.lane: pack.lane_state for pack in whole[stop - 1]}
    assert stop < 4 or states[0]["epoch"] > 0
    rest = read(loader(folder, step=stop, lane_states=states, prefetch=1), 12 - stop)
    for before, after in zip(whole[stop:], rest, strict=True):
        assert all(same(a, b) for a, b in zip(before, after, strict=True))


def test_the_state_is_that_after_the_pack_and_not_after_what_was_read_ahead(folder: Path) -> None:
    with loader(folder, prefetch=4) as packs:
        assert next(packs)[0].lane_state == {"epoch": 0, "position": 2}
        assert next(packs)[0].lane_state == {"epoch": 0, "position": 4}


def test_without_conditions(tmp_path: Path) -> None:
    write_set(tmp_path, FRAMES, 5, replace(FACTS, actions=0, labels=0))
    pack = read(loader(tmp_path), 1)[0][0]
    assert pack.actions is None and pack.labels is None


def test_closes_while_the_thread_waits_for_room(folder: Path) -> None:
    before = threading.active_count()
    packs = loader(folder, prefetch=1)
    next(packs)
    assert threading.active_count() == before + 1
    packs.close()
    packs.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(packs)


def test_an_error_of_the_thread_is_raised_by_next(folder: Path) -> None:
    packs = loader(folder)
    for path in folder.glob("shard-*.tar"):
        path.write_bytes(b"")
    with packs:
        with pytest.raises(UserError, match=r"shard-00000\d\.tar: truncated"):
            for _ in range(10):
                next(packs)
        with pytest.raises(UserError, match="truncated"):
            next(packs)


def test_a_sample_that_is_too_short(folder: Path) -> None:
    message = r"shard-00000\d\.tar.*too short for data\.frames=24.*--min-frames"
    with loader(folder, frames=24, frame_stride=1) as packs, pytest.raises(UserError, match=message):
        list(islice(packs, 10))


def test_more_lanes_than_samples_and_a_wrong_state(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.lanes=23 is more than the 22 samples"):
        loader(folder, lanes=23)
    with pytest.raises(UserError, match="lane 2: there is no position"):
        loader(folder, [2], lane_states={2: {"epoch": 0, "position": 6}})
