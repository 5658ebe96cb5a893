"""Resume in the middle of an epoch with other ranks and another read-ahead: each lane's next samples are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from far_scale.config.schema import WeightedShards
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.convert import convert
from far_scale.data.shards.shard_set import ShardSet
from far_scale.train.shard_sets import open_source
from harness.latent_sets import write_set

pytestmark = pytest.mark.slow

LANES, NEXT = 4, 1000  # keys of each lane
STEP = 41
CLIPS, TOKENS = {"clips_per_pack": 2}, {"clips_per_pack": None, "tokens_per_pack": 9}
PACKING = PackingConfig(LANES, (2, 4), 1, 16, 11, clips_per_pack=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet | Mixture]:
    """The same set in both formats, and a mixture of it with another one."""
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "tar", [4 + number * 7 % 9 for number in range(240)], 13)
    write_set(folder / "other", [5 + number * 5 % 7 for number in range(90)], 11)
    convert(ShardSet.open(folder / "tar"), folder / "mds", "mds")
    parts = [WeightedShards(shards=str(folder / name), weight=w) for name, w in (("mds", 2.0), ("other", 1.0))]
    return {
        "tar": open_source(str(folder / "tar")),
        "mds": open_source(str(folder / "mds")),
        "mixture": open_source(tuple(parts)),
    }


def read(
    source: ShardSet | Mixture,
    packing: PackingConfig,
    ranks: int,
    prefetch: int,
    states: dict[int, Any] | None,
    samples: int,
) -> dict[int, list[Pack]]:
    """The next packs of each lane, read by so many ranks, until each lane has so many clips."""
    packs: dict[int, list[Pack]] = {}
    scaling = LatentScaling.of(source.manifest, "factor")
    for rank in range(ranks):
        lanes = list(range(rank, LANES, ranks))
        missing = dict.fromkeys(lanes, samples)
        with PackLoader(source, scaling, lanes, packing, STEP if states else 0, states, prefetch) as loader:
            while max(missing.values()) > 0:
                for pack in next(loader):
                    packs.setdefault(pack.lane, []).append(pack)
                    missing[pack.lane] -= len(pack.keys)
    return packs


def keys(packs: list[Pack]) -> list[str]:
    return [key for pack in packs for key in pack.keys]


CASES = [("tar", CLIPS), ("tar", TOKENS), ("mds", CLIPS), ("mds", TOKENS), ("mixture", TOKENS)]


@pytest.mark.parametrize(("name", "filling"), CASES)
def test_the_next_thousand_keys_of_each_lane(
    sources: dict[str, ShardSet | Mixture], name: str, filling: dict[str, int | None]
) -> None:
    packing = replace(PACKING, **filling)
    straight = read(sources[name], packing, 1, 2, None, NEXT + 5 * STEP)
    states = {lane: json.loads(json.dumps(packs[STEP - 1].lane_state)) for lane, packs in straight.items()}
    if name != "mixture":
        assert sum(state["epoch"] > 0 and state["position"] > 0 for state in states.values()) >= 3, "in mid-epoch"
    if filling is TOKENS:
        assert any(state["pending"] for state in states.values())
    for ranks, prefetch in ((2, 7), (4, 1)):
        after = read(sources[name], packing, ranks, prefetch, states, NEXT)
        for lane, packs in straight.items():
            expected = keys(packs[STEP:])[:NEXT]
            assert len(expected) == NEXT and keys(after[lane])[:NEXT] == expected


def test_both_formats_have_the_same_order(sources: dict[str, ShardSet | Mixture]) -> None:
    tar, mds = (read(sources[name], PACKING, ranks, 2, None, NEXT) for name, ranks in (("tar", 1), ("mds", 2)))
    for lane in range(LANES):
        assert keys(tar[lane]) == keys(mds[lane])
        assert [pack.lane_state for pack in tar[lane]] == [pack.lane_state for pack in mds[lane]]
