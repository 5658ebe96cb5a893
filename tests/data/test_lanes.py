"""The order of samples: nothing lost, nothing repeated, and no history needed to continue anywhere."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from far_scale.data.loader.lanes import Lane, LaneOrder, SampleRef
from far_scale.utils.errors import UserError

SETS = {
    "even": ([5, 5, 5, 5], 4),
    "uneven with a remainder": ([7, 1, 12, 3, 6], 4),
    "fewer shards than lanes": ([40, 3], 8),
    "one shard": ([9], 9),
    "a remainder near the whole": ([3, 4], 4),
}


def all_samples(samples_per_shard: list[int]) -> list[SampleRef]:
    return [SampleRef(shard, sample) for shard, count in enumerate(samples_per_shard) for sample in range(count)]


def read_run(order: LaneOrder, lane: int, epoch: int) -> list[SampleRef]:
    stream = Lane(order, lane)
    stream.load_state_dict({"epoch": epoch, "position": 0})
    return list(islice(stream, order.segment_length(epoch)))


@pytest.mark.parametrize("window", [1, 3, 1000])
@pytest.mark.parametrize("name", SETS)
def test_every_epoch_reads_each_sample_once(name: str, window: int) -> None:
    samples_per_shard, lanes = SETS[name]
    everything = Counter(all_samples(samples_per_shard))
    order = LaneOrder(samples_per_shard, lanes, seed=3, shuffle_window=window)
    owed: Counter[SampleRef] = Counter()  # what earlier epochs have carried over
    for epoch in range(9):
        assert order.carried_over(epoch) == owed.total()
        read = Counter(sample for lane in range(lanes) for sample in read_run(order, lane, epoch))
        assert read.total() == lanes * order.segment_length(epoch)
        due = everything + owed
        assert not read - due  # nothing else
        assert not owed - read  # the remainder comes first
        owed = due - read
        assert owed.total() < lanes and max(owed.values(), default=1) == 1


def test_row_is_the_remainder_and_then_whole_shards_in_sequence() -> None:
    samples_per_shard, lanes = [7, 1, 12, 3, 6], 4
    order = LaneOrder(samples_per_shard, lanes, seed=0, shuffle_window=1)
    rows = [[sample for lane in range(lanes) for sample in read_run(order, lane, epoch)] for epoch in range(3)]
    together = [sample for row in rows for sample in row]
    for epoch in range(2):
        part = together[29 * epoch : 29 * (epoch + 1)]  # rows lie end to end: the remainder is carried over, in order
        shards = list(dict.fromkeys(sample.shard for sample in part))
        assert part == [SampleRef(shard, sample) for shard in shards for sample in range(samples_per_shard[shard])]
    assert [sample.shard for sample in together[:29]] != [sample.shard for sample in together[29:58]]


def test_each_lane_and_epoch_has_its_own_shuffle() -> None:
    order = LaneOrder([80], 4, seed=1, shuffle_window=20)
    shuffles = {tuple(order.shuffle(epoch, lane, 0, 20)) for epoch in range(3) for lane in range(4)}
    assert len(shuffles) == 12


def test_shuffle_stays_in_its_window_and_moves() -> None:
    plain = LaneOrder([64], 2, seed=1, shuffle_window=1)
    mixed = LaneOrder([64], 2, seed=1, shuffle_window=10)
    for lane in (0, 1):
        for epoch in (0, 1):
            straight, shuffled = read_run(plain, lane, epoch), read_run(mixed, lane, epoch)
            assert straight != shuffled
            for start in range(0, 32, 10):
                assert sorted(straight[start : start + 10]) == sorted(shuffled[start : start + 10])
    first, second = read_run(mixed, 0, 0), read_run(mixed, 0, 1)
    assert first != second and first[:10] != [SampleRef(0, p.sample - 10) for p in first[10:20]]


def test_state_continues_identically_from_anywhere() -> None:
    order = LaneOrder([7, 1, 12, 3, 6], 4, seed=5, shuffle_window=4)
    for lane in range(4):
        stream = Lane(order, lane)
        states, samples = [], []
        for _ in range(40):
            states.append(stream.state_dict())
            samples.append(next(stream))
        assert {state["epoch"] for state in states} == {0, 1, 2, 3, 4, 5}
        for step, state in enumerate(states):
            again = Lane(LaneOrder([7, 1, 12, 3, 6], 4, seed=5, shuffle_window=4), lane)
            again.load_state_dict(state)
            assert list(islice(again, 40 - step)) == samples[step:]


@pytest.mark.parametrize("name", SETS)
def test_the_number_of_a_sample_is_its_position(name: str) -> None:
    order = LaneOrder(*SETS[name], seed=0, shuffle_window=4)
    stream, again = Lane(order, 1), Lane(order, 1)
    for number in range(100):
        assert stream.next_number == number
        again.go_to(number)
        assert again.state_dict() == stream.state_dict()
        assert next(again) == next(stream)


def test_each_stage_has_another_order() -> None:
    def first(stage: int) -> list[SampleRef]:
        return list(islice(Lane(LaneOrder([20] * 20, 4, 0, 16, stage), 0), 50))

    assert first(0) == list(islice(Lane(LaneOrder([20] * 20, 4, 0, 16), 0), 50))
    assert first(1) == first(1)
    assert len({tuple(first(stage)) for stage in range(4)}) == 4


def test_seed_and_window_change_the_order() -> None:
    def first(seed: int, window: int) -> list[SampleRef]:
        return list(islice(Lane(LaneOrder([20] * 20, 4, seed, window), 0), 50))

    assert first(0, 16) == first(0, 16)
    assert first(0, 16) != first(1, 16) and first(0, 16) != first(0, 8)


def test_too_many_lanes() -> None:
    with pytest.raises(UserError, match=r"data\.lanes=8 is more than the 7 samples.*lower data\.lanes"):
        LaneOrder([3, 4], 8, seed=0, shuffle_window=4)
    with pytest.raises(UserError, match="at least 1"):
        LaneOrder([3, 4], 2, seed=0, shuffle_window=0)


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0, "position": 3},
        {"epoch": -1, "position": 0},
        {"epoch": 0, "position": -1},
        {"epoch": 0},
        {"epoch": 0, "position": "1"},
        {"epoch": 0, "position": 0, "step": 1},
    ],
)
def test_state_of_another_set(state: dict[str, object]) -> None:
    lane = Lane(LaneOrder([3, 4], 3, seed=0, shuffle_window=4), 1)  # 7 samples in 3 lanes: runs of 2, then of 2 or 3
    with pytest.raises(UserError, match=r"lane 1: there is no position .*data\.lanes"):
        lane.load_state_dict(state)
    assert lane.state_dict() == {"epoch": 0, "position": 0}


def test_a_hundred_thousand_shards() -> None:
    counts = np.full(100_000, 1000)
    order = LaneOrder(counts.tolist(), 4096, seed=0, shuffle_window=256)
    lane = Lane(order, 4095)
    lane.load_state_dict({"epoch": 50, "position": 12_345})
    samples = list(islice(lane, 1000))
    assert len(set(samples)) == 1000 and len({sample.shard for sample in samples}) <= 4
    arrays = [array for epoch in (50,) for array in order._shard_order(epoch)]
    assert sum(array.nbytes for array in arrays) < 2_000_000  # as long as the shards, not the 100 million samples
    before = time.process_time()
    list(islice(lane, 5000))
    assert time.process_time() - before < 5  # a loose limit: it only fails when a step walks the set
