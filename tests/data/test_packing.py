"""Clips and packs as they are drawn: unbiased lengths, full packs, nothing lost, and the same from any state."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from far_scale.data.frame_counts import clip_tokens
from far_scale.data.loader.packing import POOL_SIZE, Clip, PackedLane, PackingConfig, best_subset
from far_scale.model.layout import FrameLayout
from far_scale.utils.errors import UserError


def long_tokens(frames: int) -> int:
    """Tokens of a clip at 8 x 8 latents, patch 1, context patch 4, window 16."""
    return clip_tokens(frames, 16, 1, 4, 8, 8)


LONG = PackingConfig(
    lanes=2,
    frames=(16, 300),
    frame_stride=1,
    shuffle_window=64,
    seed=3,
    clips_per_pack=None,
    tokens_per_pack=8192,
    tokens_of=long_tokens,
)


def clip_lane(packing: PackingConfig, lane: int = 0, video_frames: int = 300, samples: int = 999) -> PackedLane:
    """A lane of a shard set with videos of `video_frames` frames."""
    shard_set: Any = SimpleNamespace(samples_per_shard=[samples] * 2, frames_of=lambda shard, sample: video_frames)
    return packing.make_lanes(shard_set, [lane])[lane]


def packs_of(packing: PackingConfig, count: int, **lane: int) -> list[list[Clip]]:
    drawn = clip_lane(packing, **lane)
    return [next(drawn) for _ in range(count)]


@pytest.mark.parametrize("frames", [1, 16, 17, 300])
def test_clip_tokens_are_those_of_the_layout(frames: int) -> None:
    assert long_tokens(frames) == FrameLayout.of((frames,), (8, 8), window=16, coarsening=4).tokens


@pytest.mark.slow
def test_packs_of_the_long_demo_are_full() -> None:
    """The budgets of recipes/demo_long.yaml and demo_long_gpu.yaml, and some between."""
    demo = replace(LONG, tokens_of=lambda frames: clip_tokens(frames, 16, 2, 4, 8, 8))
    for packing, budget in ((demo, 3072), (LONG, 6144), (LONG, 8192), (LONG, 32768)):
        packs = packs_of(replace(packing, tokens_per_pack=budget), 1000)
        tokens = [sum(packing.tokens_of(clip.frames) for clip in pack) for pack in packs]
        assert max(tokens) <= budget
        assert sum(tokens) / (budget * len(tokens)) > 0.97


def test_every_clip_drawn_is_used_soon_and_lengths_keep_their_distribution() -> None:
    packs = packs_of(LONG, 1000)
    clips = [clip for pack in packs for clip in pack]
    numbers = sorted(clip.number for clip in clips)
    waiting = numbers[-1] + 1 - len(clips)
    assert len(set(numbers)) == len(numbers) and waiting < POOL_SIZE
    for pack, later in itertools.pairwise(packs):
        assert [clip.number for clip in pack] == sorted(clip.number for clip in pack)
        assert pack[0].number < later[0].number, "a pack begins with the oldest clip that waits"

    lengths = np.array([clip.frames for clip in clips])
    assert lengths.min() == 16 and lengths.max() == 300
    # Uniform on 16..300: mean 158, standard deviation 82.3; of 5000 clips the mean is within 4 standard errors.
    assert abs(lengths.mean() - 158) < 4 * 82.3 / len(lengths) ** 0.5
    quarters = np.histogram(lengths, bins=[16, 87, 158, 229, 301])[0] / len(lengths)
    assert np.allclose(quarters, 0.25, atol=0.03)


def test_a_distribution_gives_each_length_its_weight_and_every_start_is_drawn() -> None:
    packing = PackingConfig(
        lanes=2, frames={4: 3.0, 8: 1.0}, frame_stride=2, shuffle_window=8, seed=0, clips_per_pack=5
    )
    clips = [clip for pack in packs_of(packing, 400, video_frames=18) for clip in pack]
    counts = Counter(clip.frames for clip in clips)
    assert set(counts) == {4, 8} and abs(counts[4] / len(clips) - 0.75) < 0.04
    assert {clip.start for clip in clips if clip.frames == 4} == set(range(12))
    assert {clip.start for clip in clips if clip.frames == 8} == set(range(4))


def test_a_short_video_gives_all_its_frames_but_never_fewer_than_the_minimum() -> None:
    lengths = [clip.frames for pack in packs_of(LONG, 50, video_frames=40) for clip in pack]
    assert max(lengths) == 40 and lengths.count(40) > len(lengths) / 2 and min(lengths) < 40
    too_short: Any = SimpleNamespace(
        samples_per_shard=[9],
        frames_of=lambda shard, sample: 15,
        name_of=lambda shard: f"set/shard-{shard:06d}.tar",
    )
    with pytest.raises(UserError, match=r"set/shard-000000\.tar: sample \d is too short for data\.frames=16"):
        next(LONG.make_lanes(too_short, [0])[0])


def test_a_state_continues_exactly_from_every_step() -> None:
    lane = clip_lane(LONG, lane=1, samples=30)  # many epochs
    states, packs = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(lane.state_dict())))
        packs.append(next(lane))
    assert any(len(state["pending"]) > 3 for state in states) and states[-1]["epoch"] > 5
    for step, state in enumerate(states):
        again = clip_lane(LONG, lane=1, samples=30)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert [next(again) for _ in range(min(3, 60 - step))] == packs[step : step + 3]


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0, "position": 9},
        {"epoch": 0, "position": 9, "pending": [3, 2]},
        {"epoch": 0, "position": 9, "pending": [9]},
        {"epoch": 0, "position": 9, "pending": [1.0]},
        {"epoch": 0, "position": 99, "pending": list(range(POOL_SIZE))},
    ],
)
def test_an_impossible_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"lane 0: .* cannot be the pending clips"):
        clip_lane(LONG).load_state_dict(state)


def test_lanes_and_stages_draw_independently() -> None:
    first = packs_of(LONG, 20)
    assert first == packs_of(LONG, 20)
    assert first != packs_of(LONG, 20, lane=1)
    other = packs_of(replace(LONG, stage=1), 20)
    samples = [[clip.sample for pack in packs for clip in pack] for packs in (first, other)]
    frames = [[clip.frames for pack in packs for clip in pack] for packs in (first, other)]
    assert samples[0] != samples[1] and frames[0] != frames[1]


def test_best_subset() -> None:
    assert best_subset((5, 4, 3, 2), 9, with_first=True) == [0, 1]
    assert best_subset((4, 5, 3, 2), 5, with_first=False) == [1]  # and not [2, 3]: of two that fill it, the older
    assert best_subset((5, 4, 4, 2), 6, with_first=False) == [1, 3]
    assert best_subset((5, 4, 4, 2), 6, with_first=True) == [0]
    assert best_subset((7, 8), 6, with_first=False) == []
    for room, chosen in ((3, [0]), (8, [0, 1]), (15, [0, 1, 2, 3, 4])):
        assert best_subset((3,) * 5, room, with_first=True) == chosen
