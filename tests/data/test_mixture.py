"""Mixtures of shard sets: drawn by their weights, each in its own order, the same from any state and on any ranks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.config.schema import WeightedShards
from far_scale.data.loader import mixture_lane
from far_scale.data.loader.lanes import Lane, LaneOrder, SampleRef
from far_scale.data.loader.mixture import Mixture, summary
from far_scale.data.loader.mixture_lane import MixtureLane
from far_scale.data.loader.pack_loader import PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.convert import convert
from far_scale.data.shards.manifest import AutoencoderInfo, Manifest
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.table import ShardTable
from far_scale.data.shards.writer import ShardSetSpec, ShardWriter
from far_scale.train.resume_checks import find_changes
from far_scale.train.shard_sets import open_source
from harness.latent_sets import FACTS, make_sample, write_set
from harness.launch import small_recipe
from harness.processes import launch
from harness.refusal import refused

COUNTS = [[7, 1, 12], [30, 3], [9]]
WEIGHTS = [0.6, 0.3, 0.1]
LANES = 4


def orders(stage: int = 0, seed: int = 3) -> list[LaneOrder]:
    return [LaneOrder(counts, LANES, seed, 4, stage) for counts in COUNTS]


def mixed(lane: int = 1, stage: int = 0, seed: int = 3, weights: list[float] = WEIGHTS) -> MixtureLane:
    return MixtureLane(orders(stage, seed), weights, lane)


def set_of(place: SampleRef) -> tuple[int, SampleRef]:
    """The index of the set, and the sample in it."""
    firsts = [0, 3, 5]
    number = max(index for index, first in enumerate(firsts) if first <= place.shard)
    return number, SampleRef(place.shard - firsts[number], place.sample)


def test_sets_are_drawn_by_weight_and_each_is_read_in_its_order() -> None:
    found = [set_of(place) for place in islice(mixed(), 10_000)]
    drawn = Counter(number for number, _ in found)
    for number, weight in enumerate(WEIGHTS):
        # A binomial count: within four standard deviations.
        assert abs(drawn[number] - 10_000 * weight) < 4 * np.sqrt(10_000 * weight * (1 - weight))
        own = [place for chosen, place in found if chosen == number]
        assert own == list(islice(Lane(orders()[number], 1), len(own)))
    # No runs of one set: the next set is independent of the one before.
    pairs = Counter((a[0], b[0]) for a, b in pairwise(found))
    assert all(abs(pairs[a, b] / 10_000 - WEIGHTS[a] * WEIGHTS[b]) < 0.03 for a in range(3) for b in range(3))


def test_lanes_stages_and_seeds_draw_independently() -> None:
    def first(**how: int) -> list[int]:
        return [set_of(place)[0] for place in islice(mixed(**how), 200)]

    assert first() == first()
    assert len({tuple(draws) for draws in (first(), first(lane=2), first(stage=1), first(seed=4))}) == 4


def test_a_lane_continues_from_every_state_and_at_every_sample() -> None:
    lane = mixed()
    states, samples = [], []
    for number in range(300):
        assert lane.next_number == number
        states.append(json.loads(json.dumps(lane.state_dict())))
        samples.append(next(lane))
    again = mixed()
    for number, state in enumerate(states):
        again.load_state_dict(state)
        assert list(islice(again, 5)) == samples[number : number + 5] or number > 295
    for number in (299, 0, 150, 151, 7, 298):
        again.go_to(number)
        assert again.state_dict() == states[number] and next(again) == samples[number]


def test_a_state_is_restored_without_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is: no draw of a set is repeated, except for the clips that wait."""
    draws = []
    make = mixture_lane.generator
    monkeypatch.setattr(mixture_lane, "generator", lambda *key: draws.append(key) or make(*key))
    lane = mixed()
    lane.load_state_dict({"read": [6 * 10**11, 3 * 10**11, 10**11]})
    assert lane.next_number == 10**12 and not draws
    next(lane)
    assert len(draws) == 1
    lane.go_to(10**12 - 50)
    assert len(draws) == 52


@pytest.mark.parametrize(
    "state",
    [{"epoch": 0, "position": 3}, {"read": [1, 2]}, {"read": [1, 2, -1]}, {"read": [1, 2, 3.0]}, {"read": 3}, {}],
)
def test_states_of_something_else(state: dict[str, Any]) -> None:
    lane = mixed()
    next(lane)
    before = lane.state_dict()
    refused(lambda: lane.load_state_dict(state), "lane 1", "mixture of 3 shard sets", "data.shards")
    assert lane.state_dict() == before
    refused(lambda: Lane(orders()[0], 0).load_state_dict({"read": [1, 2, 3]}), "no position")


def test_samples_drawn_with_other_weights_are_not_made_up() -> None:
    lane = mixed(weights=[0.0, 0.0, 1.0])
    lane.load_state_dict({"read": [20, 0, 0]})
    refused(lambda: lane.go_to(10), "with these weights")


# Sets on disk.


def sets(tmp_path: Path, *sizes: int) -> list[Path]:
    """Sets of samples with different keys, latents and lengths."""
    folders = []
    for number, size in enumerate(sizes):
        folders.append(tmp_path / f"set{number}")
        write_set(folders[-1], [8 + (number + clip) % 5 for clip in range(size)], 7)
    return folders


def weighted(folders: Sequence[Path | str], weights: list[float]) -> tuple[WeightedShards, ...]:
    return tuple(WeightedShards(shards=str(f), weight=w) for f, w in zip(folders, weights, strict=True))


def packing(**how: Any) -> PackingConfig:
    return replace(PackingConfig(LANES, (2, 6), 1, 8, 5, clips_per_pack=3), **how)


BUDGET = {"clips_per_pack": None, "tokens_per_pack": 24}


@pytest.mark.parametrize("filling", [{}, BUDGET])
@pytest.mark.slow
def test_any_ranks_read_the_same_and_resume_in_the_middle(tmp_path: Path, filling: dict[str, Any]) -> None:
    tars = sets(tmp_path, 40, 25)
    convert(ShardSet.open(tars[1]), tmp_path / "mds", "mds")
    source = open_source(weighted([tars[0], tmp_path / "mds"], [3, 1]))
    assert isinstance(source, Mixture)
    scaling = LatentScaling.of(source.manifest, "channel")

    def read(lanes: list[int], steps: int, step: int = 0, states: Any = None, prefetch: int = 2) -> list[list[Any]]:
        with PackLoader(source, scaling, lanes, packing(**filling), step, states, prefetch) as loader:
            return [[(p.keys, p.lane_state, p.latents.sum().item()) for p in packs] for packs in islice(loader, steps)]

    alone = read(list(range(LANES)), 60)
    keys = [key for packs in alone for keys, _, _ in packs for key in keys]
    drawn = Counter(key.split("/")[0] for key in keys)
    assert set(drawn) == {"1", "2"} and abs(drawn["1"] / len(keys) - 0.75) < 0.08
    for ranks in (2, 4):
        parts = [read(list(range(rank, LANES, ranks)), 60, prefetch=1 + rank) for rank in range(ranks)]
        assert [[parts[lane % ranks][s][lane // ranks] for lane in range(LANES)] for s in range(60)] == alone
    for step in (1, 17, 40):
        states = json.loads(json.dumps({lane: alone[step - 1][lane][1] for lane in range(LANES)}))
        after = read([1, 3], 20, step, {int(lane): state for lane, state in states.items()})
        assert after == [[packs[1], packs[3]] for packs in alone[step : step + 20]]


def test_clips_are_cut_from_the_sample_that_their_key_names(tmp_path: Path) -> None:
    source = open_source(weighted(sets(tmp_path, 20, 9), [1, 1]))
    lanes = packing().make_lanes(source, range(LANES)).values()
    seen = set()
    for clip in (clip for lane in lanes for _ in range(20) for clip in next(lane)):
        sample = source.read(*clip.sample, clip.start, clip.frames)
        number, key = sample.key.split("/")
        made = make_sample(int(key[-3:]), 12)
        assert torch.equal(sample.latents, made.latents[clip.start : clip.start + clip.frames])
        folder = Path(source.name_of(clip.sample.shard)).parent
        assert folder.name == f"set{int(number) - 1}"
        assert source.frames_of(*clip.sample) == 8 + (int(number) - 1 + int(key[-3:])) % 5
        seen.add((number, key))
    assert len(seen) == 29


def with_facts(tmp_path: Path, facts: ShardSetSpec) -> tuple[WeightedShards, ...]:
    write_set(tmp_path / "one", [9] * 8, 4)
    with ShardWriter(tmp_path / "two", facts, 4) as out:
        for number in range(8):
            sample = make_sample(number, 9)
            latents = sample.latents[:, :, :, : facts.latent_shape[2]]
            actions, label = sample.actions if facts.actions else None, sample.label if facts.labels else None
            out.write(Sample(sample.key, latents, actions, label, 8.0, "v"))
    return weighted([tmp_path / "one", tmp_path / "two"], [1, 1])


OTHER = AutoencoderInfo(name="some-autoencoder", weight_hash="1" * 64, scaling_factor=0.5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"autoencoder": OTHER},
            ["autoencoder is some-autoencoder (weights 1111", "not some-autoencoder (weights 0"],
        ),
        ({"latent_shape": (4, 2, 1)}, ["latent shape is [4, 2, 1], not [4, 2, 2]", "--size"]),
        ({"actions": 5}, ["number of actions is 5, not 4", "--actions"]),
        ({"actions": 0}, ["number of actions is 0, not 4"]),
        ({"labels": 4}, ["number of labels is 4, not 3", "--labels"]),
    ],
)
def test_sets_that_do_not_fit_one_another(tmp_path: Path, changed: dict[str, Any], words: list[str]) -> None:
    shards = with_facts(tmp_path, replace(FACTS, **changed))
    refused(lambda: open_source(shards), str(tmp_path / "one"), str(tmp_path / "two"), "data.shards", *words)


@pytest.mark.slow
def test_local_and_remote_sets_in_both_formats(tmp_path: Path) -> None:
    """One set is in a folder; the MDS files of the other are remote and fetched ahead of the lanes."""
    local, source = sets(tmp_path, 40, 33)
    convert(ShardSet.open(source), tmp_path / "mds", "mds")

    def read(where: str, cache: Path | None) -> list[Any]:
        node = None if cache is None else NodeCache(cache, 10**9)
        opened = {str(local): ShardSet.open(local), where: ShardSet.open(where, node)}
        source = open_source(weighted([str(local), where], [1, 2]), opened.__getitem__)
        scaling = LatentScaling.of(source.manifest, "channel")
        with PackLoader(source, scaling, [0, 3], packing(), 0, None, 2, 0 if cache is None else 10**6) as loader:
            return [[(p.keys, p.lane_state, p.latents.tolist()) for p in packs] for packs in islice(loader, 30)]

    remote = f"pipe:cat '{tmp_path / 'mds'}'/{{file}}"
    assert read(remote, tmp_path / "cache") == read(str(source), None)
    assert len(list((tmp_path / "cache").iterdir())) >= 10  # five shards and their indexes
    ShardSet.open(remote, NodeCache(tmp_path / "cache", 10**9)).verify_shard(0)
    bad = f"data.shards=[{{shards: '{local}', weight: 1}}, {{shards: 's3://b/x', weight: 1}}]"
    refused(lambda: recipe(bad), "data.shards: it is remote", "data.cache_dir")
    assert isinstance(recipe(bad, "data.cache_dir=/somewhere").data.shards, tuple)


def test_sets_of_either_type_make_one_pack(tmp_path: Path) -> None:
    folders = sets(tmp_path, 8)
    with ShardWriter(tmp_path / "half", replace(FACTS, latent_dtype="float16"), 4) as out:
        for number in range(8):
            sample = make_sample(number, 9)
            out.write(replace(sample, latents=sample.latents.half()))
    source = open_source(weighted([*folders, tmp_path / "half"], [1, 1]))
    scaling = LatentScaling.of(source.manifest, "factor")
    with PackLoader(source, scaling, [0], packing(clips_per_pack=20)) as loader:
        (pack,) = next(loader)
    numbers = [int(key.split("@")[0][-3:]) for key in pack.keys]
    firsts = torch.cat([torch.full((count,), float(n)) for n, count in zip(numbers, pack.clip_frames, strict=True)])
    assert torch.equal(pack.latents[:, 0, 0, 0], firsts * 0.5)
    assert {key[0] for key in pack.keys} == {"1", "2"}


def test_each_set_must_serve_the_recipe(tmp_path: Path) -> None:
    folders = sets(tmp_path, 20, 3)
    source = open_source(weighted(folders, [1, 1]))
    refused(lambda: packing().make_lanes(source, [0]), str(folders[1]), "data.lanes=4 is more than the 3 samples")
    stage: Any = type("Stage", (), {})()
    stage.data = type("Data", (), {"autoencoder": "other"})()
    stage.model = None
    refused(lambda: source.check(stage.data, stage.model), "data.autoencoder=other", str(folders[0]))
    refused(lambda: open_source(weighted([folders[0], tmp_path / "none"], [1, 1])), str(tmp_path / "none"), "manifest")


def test_scaling_of_a_mixture_is_that_of_the_latents_it_gives(tmp_path: Path) -> None:
    folders = sets(tmp_path, 12, 30)
    shards = weighted(folders, [3, 1])
    manifest = open_source(shards).manifest
    latents = []
    for folder, weight in zip(folders, (0.75, 0.25), strict=True):
        shard_set = ShardSet.open(folder)
        values = torch.cat(
            [shard_set.read(s, n).latents for s, c in enumerate(shard_set.samples_per_shard) for n in range(c)]
        )
        latents.append((weight, values.double()))
    mean = sum(weight * values.mean((0, 2, 3)) for weight, values in latents)
    square = sum(weight * values.square().mean((0, 2, 3)) for weight, values in latents)
    assert np.allclose(manifest.mean, mean) and np.allclose(manifest.std, (square - mean**2).sqrt())
    scaling = LatentScaling.of(manifest, "channel")
    assert np.allclose(scaling.scale, 1 / np.array(manifest.std)) and scaling.shift == manifest.mean
    assert LatentScaling.of(manifest, "factor") == LatentScaling.of(Manifest.read(folders[0]), "factor")


def test_identity_and_description(tmp_path: Path) -> None:
    folders = sets(tmp_path, 12, 30)
    source = open_source(weighted(folders, [3, 1]))
    lines = summary(source)
    assert "75.0% of the clips" in lines[0] and str(folders[0]) in lines[0] and "2 shards, 12 samples" in lines[0]
    assert "25.0% of the clips" in lines[1] and str(folders[1]) in lines[1]
    identity = source.manifest.fingerprint()
    assert open_source(weighted(folders, [0.75, 0.25])).manifest.fingerprint() == identity
    shutil.move(folders[1], tmp_path / "elsewhere")
    moved = [folders[0], tmp_path / "elsewhere"]
    assert open_source(weighted(moved, [3, 1])).manifest.fingerprint() == identity
    others = [weighted(moved, [3, 2]), weighted(moved[::-1], [3, 1]), weighted(moved[:1], [1]), str(folders[0])]
    assert len({identity, *(open_source(other).manifest.fingerprint() for other in others)}) == 5


# In a recipe.


def recipe(*overrides: str) -> Recipe:
    return load_recipe("demo_cpu", overrides)


TWO = "data.shards=[{shards: a, weight: 3}, {shards: b, weight: 1}]"


def test_recipes_with_mixtures(tmp_path: Path) -> None:
    mixture = recipe(TWO)
    assert mixture.data.shards == weighted([Path("a"), Path("b")], [3.0, 1.0])
    mixture.save(tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == mixture
    assert Recipe.model_validate(json.loads(json.dumps(mixture.model_dump(mode="json")))) == mixture
    staged = recipe(
        "train.steps=null",
        "optimizer.warmup_steps=0",
        "curriculum=[{steps: 2, shards: [{shards: a, weight: 1}, {shards: b, weight: 1}]}, {steps: 3}]",
    )
    assert staged.curriculum[0].shards == weighted([Path("a"), Path("b")], [1.0, 1.0])
    assert staged.result_values()["curriculum"][0]["weights"] == [0.5, 0.5]

    alone = recipe("data.shards=a")
    same = recipe("data.shards=[{shards: x, weight: 0.75}, {shards: y, weight: 0.25}]")
    other = recipe("data.shards=[{shards: a, weight: 3}, {shards: b, weight: 2}]")
    assert mixture.hash() == same.hash()  # folders may have other names elsewhere
    assert len({mixture.hash(), other.hash(), alone.hash(), staged.hash()}) == 4


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[]", "a folder, or a list of {shards: FOLDER, weight: NUMBER}"),
        ("3", "a folder, or a list"),
        ("''", "a folder, or a list"),
        ("[a, b]", "in set 1 of it"),
        ("[{shards: a, weight: 1}, {shards: b}]", "in set 2 of it weight: Field required"),
        ("[{shards: a, weight: 0}]", "in set 1 of it weight: must be greater than 0"),
        ("[{shards: a, weight: .inf}]", "in set 1 of it weight: must be a finite number"),
        ("[{shards: a, weight: '1'}]", "in set 1 of it weight: must be a valid number"),
        ("[{shards: a, wieght: 1, weight: 1}]", "in set 1 of it wieght: Extra inputs"),
        ("[{shards: a, weight: 1}, {shards: a, weight: 2}]", "name each shard set once"),
    ],
)
def test_wrong_mixtures(value: str, words: str) -> None:
    refused(lambda: recipe(f"data.shards={value}"), "command line: data.shards: must", words)


def test_a_checkpoint_of_another_mixture_is_reported() -> None:
    def state(*overrides: str, shard_set: str) -> dict[str, Any]:
        return {
            "recipe": recipe(*overrides).model_dump(mode="json"),
            "versions": {},
            "ranks": 1,
            "shard_set": shard_set,
        }

    before, now = recipe(TWO), recipe("data.shards=[{shards: a, weight: 1}, {shards: b, weight: 1}]")
    assert before != now
    found = find_changes(
        state(TWO, shard_set="a" * 64), state(now_override := "data.shards=b", shard_set="b" * 64), recipe(now_override)
    )
    assert f"the mixture's shard sets or weights {'a' * 12} -> {'b' * 12}" in found.affecting_result
    even = "data.shards=[{shards: a, weight: 1}, {shards: b, weight: 1}]"
    found = find_changes(state(TWO, shard_set="a" * 64), state(even, shard_set="b" * 64), recipe(even))
    assert "data.weights [0.75, 0.25] -> [0.5, 0.5]" in found.affecting_result


# In a run.


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_on_a_mixture_resumes_on_other_ranks_but_not_with_other_weights(
    recorded_shards: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(recorded_shards)
    for name, part in (("first", manifest.shards[:2]), ("second", manifest.shards[2:])):
        shutil.copytree(recorded_shards, tmp_path / name)
        manifest.model_copy(update={"shards": ShardTable(part)}).write(tmp_path / name)
    convert(ShardSet.open(tmp_path / "second"), tmp_path / "mds", "mds")

    def train(run: Path, ranks: int, weights: tuple[int, int], *more: str) -> Any:
        entries = [
            f"{{shards: {tmp_path / 'first'}, weight: {weights[0]}}}",
            f"{{shards: {tmp_path / 'mds'}, weight: {weights[1]}}}",
        ]
        shards = f"data.shards=[{', '.join(entries)}]"
        arguments = small_recipe(recorded_shards, run, shards, "train.steps=6", "checkpoint.every=3", *more)
        return launch(ranks, "-m", "far_scale.train", *arguments)

    straight = tmp_path / "straight"
    ended = train(straight, 1, (3, 1))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"75.0% of the clips from {tmp_path / 'first'}: 2 shards, 4 samples" in ended.stdout
    assert len(losses(straight)) == 6

    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    (resumed / "checkpoints" / "latest").write_text("step-00000003\n")
    ended = train(resumed, 1, (1, 1))
    assert ended.returncode != 0 and "data.weights [0.75, 0.25] -> [0.5, 0.5]" in ended.stderr
    ended = train(resumed, 2, (3, 1))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert np.allclose(losses(resumed), losses(straight), rtol=1e-4)
    assert losses(resumed)[3:] != losses(resumed)[:3]
