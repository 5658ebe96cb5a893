"""Another number of lanes from a checkpoint on: what was read is not read again, and no sample is left out."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.data.loader.epoch_remainder import (
    EpochRemainder,
    LanePositions,
    beginning_after,
    beginning_state,
    load_beginning,
)
from far_scale.data.loader.lane_change import Continuation, change_lanes, continue_lanes
from far_scale.data.loader.lanes import FIRST_EPOCH, Beginning, Lane, LaneOrder, SampleRef
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.loader.shard_prefetch import shards_ahead
from far_scale.data.shards.errors import DamagedError
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.writer import ShardWriter
from far_scale.distributed.exit_codes import REFUSED
from far_scale.train import checkpoint
from far_scale.train.curriculum import Stage, stages
from far_scale.train.resume_lanes import ResumedLanes, resume_lanes
from far_scale.utils.event_log import read_events
from harness.latent_sets import FACTS, write_set
from harness.launch import small_recipe
from harness.processes import start_training
from harness.refusal import refused

CHANGES = [8, 64, 16, 3, 64, 1]  # numbers of lanes
CLIPS = PackingConfig(8, (2, 4), 1, 8, 5, clips_per_pack=2, max_damaged=10**6)
TOKENS = replace(CLIPS, clips_per_pack=None, tokens_per_pack=7)


def again(state: Any) -> Any:
    """The state as read from a checkpoint."""
    return json.loads(json.dumps(state))


def some_counts(rng: random.Random) -> list[int]:
    """Samples per shard, at least 64 in all; one shard has one, another more than a lane's run."""
    counts = [1, 23, *(rng.randint(1, 12) for _ in range(9))]
    return [*counts, max(1, 64 - sum(counts))]


def all_samples(counts: list[int], times: int) -> Counter[SampleRef]:
    samples = [SampleRef(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    return Counter(times * samples)


@pytest.mark.parametrize("seed", range(12))
def test_what_was_read_and_the_remainder_are_whole_epochs(seed: int) -> None:
    """Lanes are anywhere, in the remainder of an earlier change or epochs apart, and some samples wait for a pack."""
    rng = random.Random(seed)
    counts = some_counts(rng)
    read: Counter[SampleRef] = Counter()
    begin, drawn = FIRST_EPOCH, set[tuple[int, int]]()
    for lanes in CHANGES:
        order = LaneOrder(counts, lanes, seed, rng.choice([1, 5, 64]), 0, begin)
        run, apart = order.samples // lanes, rng.choice([0, 2, 3 * order.samples // lanes])
        base = rng.randint(0, 2 * run)
        numbers, waiting = list[int](), dict[int, list[int]]()
        for lane in map(Lane, [order] * lanes, range(lanes)):
            got = [(lane.next_number, next(lane)) for _ in range(base + rng.randint(0, apart))]
            own = {(lane.index, number) for number, _ in got}
            assert drawn.isdisjoint(own), "no draw is repeated"
            drawn |= own
            waits = set(rng.sample(range(len(got)), min(len(got), rng.randint(0, 3))))
            read.update(sample for index, (_, sample) in enumerate(got) if index not in waits)
            numbers.append(lane.next_number)
            if waits:
                waiting[lane.index] = [got[index][0] for index in sorted(waits)]
        begin = beginning_after(order, LanePositions(numbers, waiting))
        begin = load_beginning(again(beginning_state(begin)), counts, 0)
        remainder = begin.remainder
        rest = Counter(map(remainder.sample_at, range(begin.remaining))) if remainder else Counter()
        assert read + rest == all_samples(counts, begin.epoch)


@pytest.mark.parametrize("seed", range(4))
def test_a_lane_of_the_remainder_continues_from_every_state(seed: int) -> None:
    rng = random.Random(seed)
    counts = some_counts(rng)
    begin = Beginning()
    for lanes in (8, 3, 5):
        before = LaneOrder(counts, lanes, seed, 4, 0, begin)
        begin = beginning_after(
            before, LanePositions([before.beginning.number + 1 + lane % 2 for lane in range(lanes)], {})
        )
    order = LaneOrder(counts, 6, seed, 4, 0, begin)
    assert isinstance(begin.remainder, EpochRemainder) and len(begin.remainder) == begin.remaining > 30
    for number in range(6):
        lane, other = Lane(order, number), Lane(order, number)
        states, samples = [], []
        for _ in range(3 * order.samples // 6):
            states.append((lane.next_number, again(lane.state_dict())))
            samples.append(next(lane))
        assert states[0][1] == {"epoch": begin.epoch - 1, "position": 0} and states[-1][1]["epoch"] > begin.epoch
        for index, (at, state) in enumerate(states):
            other.load_state_dict(state)
            assert other.next_number == at and next(other) == samples[index]
            other.go_to(at)
            assert other.state_dict() == state
        walk = list(islice(shards_ahead(order, number, states[5][0]), 200))
        for distance, sample in enumerate(samples[5:30]):
            assert any(sample.shard == shard and ahead < distance + 8 for ahead, shard in walk), "it is fetched ahead"
        assert [ahead for ahead, _ in walk] == sorted(ahead for ahead, _ in walk)


def test_a_change_at_an_epochs_border_leaves_no_remainder() -> None:
    order = LaneOrder([5, 3, 8], 4, 0, 4)
    begin = beginning_after(order, LanePositions([8] * 4, {}))
    assert begin == Beginning(2, 0, 8) and beginning_state(begin) == {"epoch": 2, "left": 0, "number": 8}
    new = LaneOrder([5, 3, 8], 2, 0, 1, 0, begin)
    samples = [sample for lane in (0, 1) for sample in islice(Lane(new, lane), 8)]
    straight = LaneOrder([5, 3, 8], 2, 0, 1)
    assert samples == [straight.sample_in_segment(2, lane, position) for lane in (0, 1) for position in range(8)]


SIZES = {"tar": [71], "mixture": [71, 65]}


def open_damaged(folder: Path, name: str, patch: pytest.MonkeyPatch) -> ShardSet | Mixture:
    """A set, or a mixture of two; every seventh sample, or its row of the index, is damaged."""
    sets = [ShardSet.open(folder / f"set{number}") for number in range(len(SIZES[name]))]
    for number, shard_set in enumerate(sets):
        firsts = [0]
        for count in shard_set.samples_per_shard:
            firsts.append(firsts[-1] + count)
        prefix = f"{number + 1}/" if name == "mixture" else ""

        def checked(method: Any, remainder: int, firsts: list[int] = firsts, prefix: str = prefix) -> Any:
            def call(shard: int, sample: int, *more: Any) -> Any:
                if (which := firsts[shard] + sample) % 14 == remainder:
                    raise DamagedError("some shard", "damaged", f"{prefix}clip_{which:03d}")
                return method(shard, sample, *more)

            return call

        patch.setattr(shard_set, "frames_of", checked(shard_set.frames_of, 3))
        patch.setattr(shard_set, "read", checked(shard_set.read, 10))
    return sets[0] if name == "tar" else Mixture(sets, [2 / 3, 1 / 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for number, size in enumerate(SIZES["mixture"]):
        write_set(folder / f"set{number}", [4 + clip % (5 - number) for clip in range(size)], 9 + number)
    return folder


def read(
    source: ShardSet | Mixture, going: Continuation | None, packing: PackingConfig, steps: int, ranks: int
) -> list[list[Pack]]:
    """The packs of the next steps, in the order of their lanes."""
    packs: list[list[Pack]] = [[] for _ in range(steps)]
    scaling = LatentScaling.of(source.manifest, "factor")
    for rank in range(ranks):
        lanes, states = range(rank, packing.lanes, ranks), None if going is None else going.states
        with PackLoader(source, scaling, lanes, packing, 0, states, prefetch=1 + rank) as loader:
            for step, rank_packs in enumerate(islice(loader, steps)):
                packs[step] += rank_packs
    return [sorted(step_packs, key=lambda pack: pack.lane) for step_packs in packs]


def keys_of(packs: list[list[Pack]]) -> list[str]:
    """The keys of the samples in these packs, and of those left out."""
    flat = [pack for step_packs in packs for pack in step_packs]
    return [key.split("@")[0] for pack in flat for key in (*(s.key for s in pack.skipped), *pack.keys)]


def states_after(packs: list[list[Pack]]) -> dict[int, dict[str, Any]]:
    return {int(lane): state for lane, state in again({pack.lane: pack.lane_state for pack in packs[-1]}).items()}


@pytest.mark.parametrize("filling", [CLIPS, TOKENS], ids=["clips", "tokens"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
def test_packs_over_several_changes(
    folder: Path, name: str, filling: PackingConfig, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 -> 64 -> 16 -> 3 lanes -> 1: at the end of the last remainder all samples were read equally often, whatever is
    damaged, on any number of ranks, and after a resume in between."""
    source, rng = open_damaged(folder, name, monkeypatch), random.Random(seed)
    read_so_far: Counter[str] = Counter()
    packing, going, skipped, waiting = replace(filling, seed=seed), None, 0, 0
    states: dict[int, dict[str, Any]] = {}
    for lanes in (8, 64, 16, 3):
        if states:
            going = change_lanes(packing, replace(filling, seed=seed, lanes=lanes), source, states)
            packing = replace(going.packing, beginnings=tuple(again(going.packing.beginnings)))
        steps = rng.randint(2, 3 if lanes > 8 else 12)
        packs = read(source, going, packing, steps, ranks=1)
        states = states_after(packs)
        if lanes in (16, 64):
            shared = read(source, going, packing, steps, ranks=4)
            assert states_after(shared) == states and keys_of(shared) == keys_of(packs)
            continued = continue_lanes(
                packing, source, states_after(packs[:1])
            )  # as a restart after the first step does
            resumed = read(source, continued, continued.packing, steps - 1, ranks=2)
            assert states_after(resumed) == states and keys_of(resumed) == keys_of(packs[1:])
        read_so_far.update(keys_of(packs))
        skipped += sum(len(pack.skipped) for step_packs in packs for pack in step_packs)
        assert sum(state.get("damaged", 0) for state in states.values()) == skipped
        waiting += sum(len(state.get("pending", [])) for state in states.values())
    assert skipped and (waiting or filling is CLIPS)

    one_lane = replace(CLIPS, seed=seed, lanes=1, clips_per_pack=1)
    going = change_lanes(packing, one_lane, source, states)
    assert going.states[0]["damaged"] == skipped
    keys = keys_of(read(source, going, going.packing, 3 * sum(left.remaining for left in going.unread), ranks=1))
    for number, (size, left) in enumerate(zip(SIZES[name], going.unread, strict=True)):
        prefix = f"{number + 1}/" if name == "mixture" else ""
        rest = [key for key in keys if key.startswith(prefix)][: left.remaining]
        assert len(rest) == left.remaining
        total = Counter({key: count for key, count in read_so_far.items() if key.startswith(prefix)}) + Counter(rest)
        assert total == Counter({f"{prefix}clip_{clip:03d}": left.epoch + 1 for clip in range(size)})


def test_states_of_something_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_damaged(folder, "mixture", monkeypatch)
    begin = {"lanes": 2, "seed": 0, "shuffle_window": 4, "numbers": [3, 4], "waiting": {"1": [2]}}
    going = replace(CLIPS, beginnings=(begin, begin))
    state = {"read": [4, 4]}
    lanes = going.make_lanes(source, range(8))
    assert lanes[0].state_dict() == state
    refused(lambda: lanes[0].load_state_dict({"read": [3, 4]}), "lane 0", "mixture of 2 shard sets")
    budget = replace(TOKENS, beginnings=(begin, begin)).make_lanes(source, [0])[0]
    refused(lambda: budget.load_state_dict({"read": [9, 9], "pending": [7]}), "cannot be the pending clips")
    of_one_set = {lane: {"epoch": 0, "position": 0} for lane in range(8)}
    refused(lambda: change_lanes(CLIPS, replace(CLIPS, lanes=4), source, of_one_set), "mixture of 2 shard sets")
    refused(lambda: replace(CLIPS, beginnings=(begin,)).lane_orders(source), "2 shard sets", "made with 1")
    wrong: list[dict[str, Any]] = [{"numbers": [3]}, {"numbers": [3, -1]}, {"waiting": {"2": [1]}}, {"waiting": 3}]
    for values in (*wrong, {"lanes": "2"}):
        refused(partial(load_beginning, {**begin, **values}, [9, 9], 0), "take an older checkpoint")
    refused(lambda: load_beginning({"epoch": 2}, [9, 9], 0), "take an older checkpoint")


def state_of(
    source: ShardSet | Mixture, recipe: Recipe, step: int, packing: PackingConfig, steps: int
) -> dict[str, Any]:
    """The state of a checkpoint of `step` when each lane has read so many packs."""
    lanes = packing.make_lanes(source, range(packing.lanes))
    for lane in lanes.values():
        for _ in range(steps):
            next(lane)
    states = {str(number): lane.state_dict() for number, lane in lanes.items()}
    return again({"step": step, "recipe": recipe.model_dump(mode="json"), "lanes": states})


def test_the_message_of_a_change_and_when_a_remainder_is_dropped(folder: Path) -> None:
    source = ShardSet.open(folder / "set0")

    def loaded(lanes: int, *more: str) -> tuple[Recipe, list[Stage]]:
        recipe = load_recipe("demo_cpu", [f"data.lanes={lanes}", "data.frames=2", "sample.given=1", *more])
        return recipe, stages(recipe)

    def lanes_now(state: dict[str, Any], recipe: Recipe, plan: list[Stage]) -> ResumedLanes:
        return resume_lanes(Path("step"), state, plan, recipe.seed, {0: source})

    (four, (stage,)), (nine, (after,)) = loaded(4), loaded(9, "data.clips_per_pack=null", "data.tokens_per_pack=40")
    state = state_of(source, four, 10, stage.packing(0), 10)
    assert lanes_now(state, four, [stage]) == ResumedLanes(
        {int(lane): lane_state for lane, lane_state in state["lanes"].items()}
    )
    changed = lanes_now(state, nine, [after])
    # Of the 142 samples of two epochs, 4 lanes have read 20 each.
    assert changed.change == (
        "data.lanes 4 -> 9 (global batch 8 clips -> 9 packs of at most 40 tokens; "
        "the rest of epoch 1, 62 of 71 samples, is read first: nothing is trained twice)"
    )
    four_by_tokens, (by_tokens,) = loaded(4, "data.clips_per_pack=null", "data.tokens_per_pack=40")
    filled = lanes_now(state, four_by_tokens, [by_tokens])
    assert filled.change == (
        "data.lanes 4, filled otherwise (global batch 8 clips -> 4 packs of at most 40 tokens; "
        "the rest of epoch 1, 62 of 71 samples, is read first: nothing is trained twice)"
    )
    packing = replace(by_tokens.packing(0), beginnings=filled.beginnings)
    of_tokens = {**state_of(source, four_by_tokens, 11, packing, 2), "beginnings": again(filled.beginnings)}
    assert any(lane_state["pending"] for lane_state in of_tokens["lanes"].values())
    back = lanes_now(of_tokens, four, [stage])
    lanes = replace(stage.packing(0), beginnings=back.beginnings).make_lanes(source, range(4))
    for number, lane in lanes.items():
        lane.load_state_dict(back.states[number])
    read_by_tokens = sum(
        lane_state["position"] - len(lane_state["pending"]) for lane_state in of_tokens["lanes"].values()
    )
    assert (back.change or "").endswith(
        f"the rest of epoch 1, {62 - read_by_tokens} of 71 samples, is read first: nothing is trained twice)"
    )

    packing = replace(after.packing(0), beginnings=changed.beginnings)
    middle = {**state_of(source, nine, 11, packing, 1), "beginnings": again(changed.beginnings)}
    unchanged = lanes_now(middle, nine, [after])
    assert unchanged.change is None and unchanged.beginnings == changed.beginnings
    later = {**state_of(source, nine, 30, packing, 20), "beginnings": again(changed.beginnings)}
    assert lanes_now(later, nine, [after]).beginnings == ({"epoch": 2, "left": 62 % 9, "number": 20 + 62 // 9},)

    staged = ["train.steps=null", "optimizer.warmup_steps=0", "curriculum=[{steps: 10}, {steps: 3}]"]
    (before, _), (now, plan) = loaded(4, *staged), loaded(8, *staged)
    ended = lanes_now({**state, "recipe": before.model_dump(mode="json")}, now, plan)
    assert ended.change == "data.lanes 4 -> 8 (global batch 8 -> 16 clips; the next stage begins with them)"
    older = {**state, "recipe": {**state["recipe"], "unknown": 1}}
    refused(lambda: lanes_now(older, nine, [after]), "step/state.json", "set data.lanes to 4")


# In a run.

SAMPLES = 37


def trained_keys(log: Path) -> dict[tuple[int, int], list[str]]:
    """What was trained on, by step and lane."""
    lines = map(json.loads, log.with_name(f"{log.name}.keys").read_text().splitlines())
    return {(step, lane): keys for step, lane, keys in lines}


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_lanes(tmp_path: Path) -> None:
    """4 lanes on 2 ranks, 8 on 2, 2 on 1: two epochs, each sample once in each of them; refused without the flag."""
    shards, run, log = tmp_path / "set", tmp_path / "run", tmp_path / "out"
    info = AutoencoderInfo(name="compact-vizdoom-f8c32", weight_hash="0" * 64, scaling_factor=1.0)
    facts = replace(FACTS, latent_shape=(32, 8, 8), autoencoder=info, labels=0)
    torch.manual_seed(0)
    with ShardWriter(shards, facts, 5) as writer:
        for number in range(SAMPLES):
            latents, actions = torch.randn(16, 32, 8, 8).bfloat16(), torch.zeros(16, dtype=torch.int64)
            writer.write(Sample(f"clip_{number:03d}", latents, actions, None, 8.0, "v"))

    def recipe(lanes: int, steps: int) -> list[str]:
        more = [f"data.lanes={lanes}", f"train.steps={steps}", "data.frames=4", "sample.given=2"]
        return small_recipe(shards, run, *more, "optimizer.schedule=constant", "optimizer.warmup_steps=0")

    assert start_training(2, recipe(4, 3), log).wait() == [0, 0], log.read_text()
    assert REFUSED in start_training(2, recipe(8, 5), log).wait()
    (line,) = {line.split("error: ")[1] for line in log.read_text().splitlines() if "error: " in line}
    for words in ("data.lanes 4 -> 8 (global batch 8 -> 16 clips; ", "13 of 37 samples", "--accept-changes"):
        assert words in line
    assert start_training(2, [*recipe(8, 5), "--accept-changes"], log).wait() == [0, 0], log.read_text()
    state = checkpoint.read_state(checkpoint.step_folder(run, 5))
    assert len(state["lanes"]) == 8 and len(state["beginnings"]) == 1
    assert start_training(1, [*recipe(2, 9), "--accept-changes"], log).wait() == [0], log.read_text()
    changes = [event["changes"] for event in read_events(run) if event["event"] == "accepted-changes"]
    assert changes == [
        [
            "data.lanes 4 -> 8 (global batch 8 -> 16 clips; "
            "the rest of epoch 0, 13 of 37 samples, is read first: nothing is trained twice)"
        ],
        [
            "data.lanes 8 -> 2 (global batch 16 -> 4 clips; "
            "the rest of epoch 1, 18 of 37 samples, is read first: nothing is trained twice)"
        ],
    ]
    keys = trained_keys(log)
    assert sorted(keys) == sorted(
        (step, lane)
        for steps, lanes in ((range(3), 4), (range(3, 5), 8), (range(5, 9), 2))
        for step in steps
        for lane in range(lanes)
    )
    counts = Counter(key.split("@")[0] for each in keys.values() for key in each)
    assert sorted(counts.values()) == [1, 1, *[2] * (SAMPLES - 2)], "72 of the 74 samples of two epochs"
