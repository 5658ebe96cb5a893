"""Slow ranks: the rule, and that the one at fault is named once until it recovers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from far_scale.health.straggler import SlowRank, slow_ranks
from far_scale.utils.event_log import read_events
from harness.launch import ROOT
from harness.processes import started


def test_of_two_ranks_the_faster_is_the_reference() -> None:
    assert slow_ranks([1.0, 2.0]) == [SlowRank(1, 2.0)]
    assert slow_ranks([1.0, 1.4]) == [] and slow_ranks([5.0]) == []


def test_few_of_thousands_are_found_and_the_usual_spread_is_not() -> None:
    draw = random.Random(0)
    seconds = [draw.gauss(1.0, 0.05) for _ in range(4096)]
    assert slow_ranks(seconds) == []
    seconds[17], seconds[4000] = 1.9, 3.0
    assert [slow.rank for slow in slow_ranks(seconds)] == [17, 4000]


def test_an_outlier_among_widely_differing_ranks_is_not_slow() -> None:
    draw = random.Random(0)
    assert slow_ranks([draw.uniform(0.0, 1.0) for _ in range(4096)]) == []


def test_a_wait_that_delays_nobody_is_not_reported() -> None:
    assert slow_ranks([0.0, 0.001], min_excess=0.01) == []
    assert slow_ranks([0.0, 0.02], min_excess=0.01) == [SlowRank(1, float("inf"))]


@pytest.mark.slow
def test_a_slow_rank_is_named_with_its_node_once_until_it_recovers(tmp_path: Path) -> None:
    with started(2, tmp_path / "out", ROOT / "tests/harness/slow_ranks_worker.py", tmp_path) as ranks:
        ends = [rank.end(60) for rank in ranks]
    assert [status for status, _ in ends] == [0, 0], ends[0][1] + ends[1][1]
    events = read_events(tmp_path)
    assert all((event["event"], event["rank"], event["host"]) == ("slow", 1, "n1") for event in events)
    # Each after three lines; the product again once most of five lines are slow anew.
    assert [(event["step"], event["what"]) for event in events] == [
        (3, "calculates"),
        (4, "waits for data"),
        (9, "calculates"),
    ]
    assert "rank 1 on n1 is slow: it calculates 4.0 times the median" in events[0]["text"]
