"""Bad steps: skipped on all ranks with nothing changed, reported with lane and keys, and no wait for the device."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.train.deepspeed_adapter import can_reduce_once
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import Fragment
from far_scale.train.step_guard import MIN_STEPS, SPIKE_WINDOW, RunningLevels
from far_scale.utils.event_log import read_events
from harness.launch import ROOT
from harness.processes import launch

pytestmark = pytest.mark.slow

CHANGING = ["adam_step", "ema", "exp_avg", "exp_avg_sq", "model", "weight"]
RUNS = {
    **{f"fp32_zero{stage}": f"train.zero_stage={stage}" for stage in (0, 1, 2, 3)},
    **{f"bf16_zero{stage}": f"train.zero_stage={stage} train.precision=bf16" for stage in (0, 1, 2, 3)},
    # Each group has its own step of Adam, as billions of parameters have.
    "many_groups": "train.zero_stage=3 train.deepspeed.sub_group_size=20_000",
}
if can_reduce_once():
    RUNS["once_fp32_zero3"] = "train.zero_stage=3 train.reduce_once=true"
    RUNS["once_bf16_zero2"] = "train.zero_stage=2 train.reduce_once=true train.precision=bf16"
OFFLOADED = {"offloaded": "train.zero_stage=3 train.precision=bf16 train.deepspeed.offload_optimizer.device=cpu"}
SPIKES = {
    "spikes_skip": "train.zero_stage=3 faults.spikes=skip",
    "spikes_warn": "train.zero_stage=1 faults.spikes=warn",
}


def run_worker(ranks: int, shards: Path, out: Path, runs: dict[str, str]) -> list[dict[str, Any]]:
    """What each rank wrote down."""
    arguments = ",".join(f"{name} {overrides}" for name, overrides in runs.items())
    finished = launch(ranks, ROOT / "tests/harness/guard_worker.py", shards, out, arguments, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard")


@pytest.fixture(scope="module")
def ranks(recorded_shards: Path, out: Path) -> list[dict[str, Any]]:
    """Every run of RUNS and SPIKES on 2 ranks, in one start of the processes."""
    return run_worker(2, recorded_shards, out, {**RUNS, **OFFLOADED, **SPIKES})


def assert_bad_steps_left_no_trace(found: dict[str, Any]) -> None:
    """Steps 3, 5 and 6 of 7 are bad; in all other steps everything moves."""
    assert found["changed"][1:] == [CHANGING, [], CHANGING, [], [], CHANGING]
    # The last layers begin at zero, so in the first step only they get a gradient, which ZeRO may give to one rank.
    assert {"adam_step", "model"} <= set(found["changed"][0])
    assert found["unlike_a_run_without"] == [], "to the last bit as if their batches had never been"
    assert set(found["adam_steps"]) == {4.0}
    assert {key: found["guard"][key] for key in ("updates", "in_row", "skipped")} == {
        "updates": 4, "in_row": 0, "skipped": 3,
    }  # fmt: skip
    assert found["guard"]["levels"]["seen"] == 4
    finite = [torch.tensor(float(norm)).isfinite().item() for norm in found["norms"]]
    assert finite == [True, True, False, True, False, True, True], "the log shows the true norm"


@pytest.mark.parametrize("name", [*RUNS, *OFFLOADED])
def test_a_step_that_is_not_finite_leaves_no_trace(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert_bad_steps_left_no_trace(found[name])


def test_a_step_in_several_groups_has_one_verdict(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found["many_groups"]["adam_steps"]) > 2 and len(found["fp32_zero3"]["adam_steps"]) == 1


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_learn_the_same_of_it(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name]["troubles"] for found in ranks)
    assert first == second
    told = [(one["step"], one["reason"], one["skipped"], one["in_row"], one["total"]) for one in first]
    assert told == [
        ("3", "the loss is not finite", "True", "1", "1"),
        ("5", "the gradient is not finite", "True", "1", "2"),
        ("6", "the loss is not finite", "True", "2", "3"),
    ]


@pytest.mark.parametrize("name", RUNS)
def test_the_event_names_lane_and_samples(ranks: list[dict[str, Any]], out: Path, name: str) -> None:
    def keys_of(step: int) -> dict[int, list[str]]:
        return {int(lane): keys for found in ranks for lane, keys in found["batches"][step - 1].items()}

    loss, gradient, infinite = read_events(out / name)
    assert [event["event"] for event in (loss, gradient, infinite)] == ["skipped"] * 3
    # The fault is in rank 1's second pack of two: lane 3 of 4.
    assert [(lane["lane"], lane["keys"]) for lane in loss["lanes"]] == [(3, keys_of(3)[3])]
    assert keys_of(3)[3][0] in loss["text"] and "lane 3" in loss["text"]
    assert {lane["lane"]: lane["keys"] for lane in gradient["lanes"]} == keys_of(5), "of a gradient, all lanes"
    assert (loss["loss"], infinite["loss"]) == ("nan", "inf") and isinstance(gradient["loss"], float)


@pytest.mark.parametrize("name", RUNS)
def test_no_step_asks_the_device_for_a_number(ranks: list[dict[str, Any]], name: str) -> None:
    """Train step, guard and EMA; only where a step was bad, one step later, its lanes are gathered on the host.

    Not counted is the first step, in which ZeRO-3 compares between the ranks in what order they use the layers.
    """
    for found in ranks:
        asked = [count > 0 for count in found[name]["waits"]]
        assert asked[1:] == [False, False, True, False, True, True]


def test_a_spike_is_skipped_or_warned_of(ranks: list[dict[str, Any]], out: Path) -> None:
    reason = "the loss is a spike and the gradient norm is a spike"
    for found in ranks:
        skip, warn = found["spikes_skip"], found["spikes_warn"]
        assert skip["changed"] == [] and warn["changed"] == CHANGING
        assert skip["after_first"] == {"updates": 18, "in_row": 1, "skipped": 1}
        assert warn["after_first"] == {"updates": 19, "in_row": 0, "skipped": 0}
        # The second spike comes right after the state was restored: without the levels it would not be seen.
        for run, skipped in ((skip, "True"), (warn, "False")):
            told = [(one["step"], one["skipped"]) for one in run["troubles"] if one["reason"] == reason]
            assert told == [("19", skipped), ("20", skipped)]
    events = read_events(out / "spikes_warn")
    assert [event["event"] for event in events] == ["spike", "spike", "skipped", "skipped", "skipped"]
    assert len(events[0]["lanes"]) == 4 and "warning" in events[0]["text"]


@pytest.mark.parametrize("name", SPIKES)
def test_the_state_comes_back_and_rows_are_counted(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert found[name]["state_again"]
        assert found[name]["rows"] == [1, 2, 3]
        assert found[name]["in_row_at_end"] == 0
        assert found[name]["told_after_forgetting"] == 0, "after a roll-back the levels are learnt anew"


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(recorded_shards: Path, tmp_path: Path) -> None:
    """From the third step on the worker lets any synchronisation in optimizer step, guard and EMA raise. Each step has
    another layout; test_device_prefetch.py has forward and backward."""
    (found,) = run_worker(1, recorded_shards, tmp_path, RUNS)
    for name in RUNS:
        assert_bad_steps_left_no_trace(found[name])


def test_levels_are_medians_of_the_last_steps() -> None:
    """Against a plain computation, over more steps than are kept; a state goes through JSON on the way."""
    levels, numbers = RunningLevels(4.0, torch.device("cpu")), torch.Generator().manual_seed(1)
    seen: list[list[float]] = []
    judged = 0
    for step in range(2 * SPIKE_WINDOW):
        now = torch.randn(2, generator=numbers).exp() + 1
        expected = []
        for place in range(2):
            values = [one[place] for one in seen[-SPIKE_WINDOW:]]
            if len(values) >= MIN_STEPS:
                median = statistics.median_low(values)
                deviation = 1.4826 * statistics.median_low([abs(value - median) for value in values])
                expected.append(now[place].item() > median + 4 * max(deviation, 0.01 * median))
            else:
                expected.append(False)
        spikes = levels.spikes(now)
        assert spikes.tolist() == expected
        judged += any(expected)
        good = ~spikes.any()
        levels.add(now, good)
        if good:
            seen.append(now.tolist())
        if step == SPIKE_WINDOW + 40:
            state = levels.state()
            levels = RunningLevels(4.0, torch.device("cpu"))
            levels.load_state(json.loads(json.dumps(state)))
            assert levels.state() == state
    assert judged > 10 and len(seen) > SPIKE_WINDOW


def test_numbers_that_hardly_move_make_no_spikes() -> None:
    levels = RunningLevels(10.0, torch.device("cpu"))
    for _ in range(MIN_STEPS):
        levels.add(torch.tensor([2.0, 1.0]), torch.tensor(True))
    assert levels.spikes(torch.tensor([2.1, 1.2])).tolist() == [False, True]
    levels.add(torch.tensor([float("nan"), 1.0]), torch.tensor(False))
    assert levels.state()["seen"] == MIN_STEPS


def test_a_level_that_lasts_becomes_the_usual_one() -> None:
    """As with spikes that are only warned of."""
    levels = RunningLevels(10.0, torch.device("cpu"))
    for _ in range(SPIKE_WINDOW):
        levels.add(torch.tensor([1.0, 1.0]), torch.tensor(True))
    higher, warned = torch.tensor([3.0, 1.0]), 0
    for _ in range(SPIKE_WINDOW):
        warned += int(levels.spikes(higher)[0])
        levels.add(higher, torch.tensor(True))
    assert 0 < warned < SPIKE_WINDOW and not levels.spikes(higher).any()


def test_the_average_moves_with_kept_steps_only() -> None:
    """Fragments in one storage, with a gap and out of order, and one by itself: bitwise a lerp of each."""
    run, other = torch.randn(100), torch.randn(7)
    parts = [run[40:90], other, run[0:30]]
    fragments = [Fragment(str(i), len(part), 0, part, part, part) for i, part in enumerate(parts)]
    ema, expected = ShardedEMA(fragments, 0.99), [part.clone() for part in parts]
    for kept in (1.0, 0.0, 1.0):
        run += 1
        other *= 2
        if kept:
            torch._foreach_lerp_(expected, parts, 1 - 0.99)
        ema.update(torch.tensor(kept))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(ema.weights, expected, strict=True))
