"""Walks without a server: their frames, steps back, and the engine beside them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from PIL import Image

from far_scale.data.demo.explorer import FORWARD, LEFT, NOOP, RIGHT
from far_scale.data.demo.world import TURNS_OF_A_CIRCLE, DemoWorld
from far_scale.play import walk as walk_module
from far_scale.play.headless import open_walk, play_actions, replay
from far_scale.play.recording import read_recording, write_video
from far_scale.play.walk import Walk
from far_scale.play.world import Given, World, open_world
from far_scale.sampling.sampler import predict_frames
from harness.play import FakeEngine, small_world
from harness.refusal import refused

SEED = 5
GIVEN = TURNS_OF_A_CIRCLE + 1  # one look around


def pixels(picture: bytes | None) -> np.ndarray:
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(picture)))


def maze_walk() -> tuple[Walk, FakeEngine]:
    engine = FakeEngine()
    return Walk(small_world(side=8, has_engine=True), "maze", SEED, cast(DemoWorld, engine)), engine


def given_frames(world: World, frames: int) -> Given:
    latents = torch.randn(1, frames, 32, *world.latent_size, generator=torch.Generator().manual_seed(1))
    return Given(latents, torch.arange(frames)[None] % 4, None)


@pytest.mark.parametrize("given, context_patch", [(0, 0), (3, 0), (6, 4)])
def test_frames_are_those_of_predict_frames(given: int, context_patch: int) -> None:
    """Past the window of 4 frames, for the same actions and seed, bit for bit."""
    world = small_world(actions=4, context_patch=context_patch)
    start = given_frames(world, given) if given else None
    if start is not None:
        world = World(**{**vars(world), "episodes": (start,)})
    walk = open_walk(world, SEED)
    actions = [1, 2, 3, 0, 1, 1, 2]
    walked = np.stack([pixels(walk.act(action, steps=3, guidance=1.0).dream) for action in actions])
    context = torch.empty(1, 0, 32, 4, 4) if start is None else start.latents
    earlier = [] if start is None or start.classes is None else start.classes[0].tolist()
    sampling = replace(world.sampling(SEED, steps=3, guidance=1.0), frames=len(actions))
    assert (sampling.grid, sampling.window_stride) == ("even", 2)
    predicted = predict_frames(world.model, context, sampling, actions=torch.tensor([[*earlier, *actions]]))
    expected = np.concatenate([world.decode(latents) for latents in predicted])
    assert expected.std() > 10
    assert np.array_equal(walked, expected)


@pytest.mark.parametrize("context_patch", [0, 4])
def test_a_step_back_leaves_nothing_behind(context_patch: int) -> None:
    """Also over changes of steps, and of guidance, which begins and ends; past the window."""
    world = small_world(actions=4, context_patch=context_patch)
    script = [(1, 1, 1.0), (2, 3, 1.0), (3, 3, 2.0), (0, 3, 1.5), (1, 2, 1.0), (2, 1, 3.0)]
    straight = open_walk(world, SEED)
    expected = [straight.act(*values) for values in script]
    walk = open_walk(world, SEED)
    for number, values in enumerate(script):
        for wrong in ((3, 2, 1.0), (0, 1, 4.0)):
            walk.act(*wrong)
            walk.act(*wrong)
            walk.back()
            back = walk.back()
            assert back.dream == (expected[number - 1].dream if number else None) and back.index == number - 1
        assert walk.act(*values).dream == expected[number].dream, number
    assert walk.recording() == straight.recording()


def test_history_is_bounded_and_an_old_walk_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "MAX_STEPS_BACK", 3)
    monkeypatch.setattr(walk_module, "MAX_KEPT_FRAMES", 6)
    monkeypatch.setattr(walk_module, "MAX_RECORDED_FRAMES", 5)
    walk = open_walk(small_world(), SEED)
    for number in range(9):
        shown = walk.act(number % 4, 1, 1.0)
    assert (shown.index, shown.recorded, shown.steps_back) == (8, 5, 3)
    shown = walk.act(1, 1, 2.0)  # a new session from the 6 frames that are kept
    assert (shown.index, shown.recorded) == (9, 5)
    for _ in range(5):
        shown = walk.back()
    assert (shown.index, shown.recorded, shown.steps_back) == (6, 5, 0)
    assert walk.recording().actions == [0, 1, 2, 3, 0]


def test_the_engine_moves_beside_and_back() -> None:
    walk, engine = maze_walk()
    start = walk.now()
    assert start.index == TURNS_OF_A_CIRCLE and pixels(start.engine)[0, 0].tolist() == [0, 0, 0]
    walk.act(FORWARD, 1, 1.0)
    walk.act(LEFT, 1, 1.0)
    shown = walk.act(FORWARD, 1, 1.0)
    assert pixels(shown.engine)[0, 0].tolist() == [2, 1, 0]
    assert pixels(walk.back().engine)[0, 0].tolist() == [1, 1, 0]
    assert pixels(walk.back().engine)[0, 0].tolist() == [1, 0, 0]
    assert pixels(walk.act(RIGHT, 1, 1.0).engine)[0, 0].tolist() == [1, TURNS_OF_A_CIRCLE - 1, 0]
    assert pixels(walk.act(NOOP, 1, 1.0).engine)[0, 0].tolist() == [1, TURNS_OF_A_CIRCLE - 1, 0]
    assert pixels(walk.reset().engine)[0, 0].tolist() == [0, 0, 0]
    assert pixels(walk.act(FORWARD, 1, 1.0).engine)[0, 0].tolist() == [1, 0, 0]
    engine.fails = True
    shown = walk.act(FORWARD, 1, 1.0)
    assert shown.engine is None and shown.dream is not None and engine.is_closed
    assert walk.engine_problem is not None and "new maze" in walk.engine_problem
    walk.act(FORWARD, 1, 1.0)
    walk.reset()


def test_the_video_has_given_and_new_frames_of_both(tmp_path: Path) -> None:
    walk, _ = maze_walk()
    walk.act(FORWARD, 1, 1.0)
    pictures = walk.pictures()
    assert (len(pictures.frames), pictures.given, pictures.size) == (GIVEN + 1, GIVEN, (64, 64))
    write_video(tmp_path / "walk.mp4", pictures)
    with av.open(str(tmp_path / "walk.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == GIVEN + 1 and frames[0].shape[0] > 2 * 192


def test_a_frame_that_is_not_finite_changes_nothing() -> None:
    world = small_world()
    walk, reference = open_walk(world, SEED), open_walk(world, SEED)
    walk.act(1, 2, 1.0)
    reference.act(1, 2, 1.0)
    refused(lambda: walk.act(1, 2, 1e38), "not finite", "guidance")
    refused(lambda: walk.act(1, 2, 0.5), "guidance")
    assert walk.act(2, 2, 1.0).dream == reference.act(2, 2, 1.0).dream


def test_recordings_of_other_weights_or_given_frames_are_refused(tmp_path: Path) -> None:
    world = small_world()
    recording = play_actions(world, SEED, [1, 2], 1, 1.0, tmp_path / "walk.mp4")
    assert read_recording(tmp_path / "walk.json") == recording

    def changed(**values: Any) -> World:
        return World(**{**vars(world), **values})

    refused(lambda: replay(changed(weights="1" * 64), recording, tmp_path / "x.mp4"), "weights", "give the model")
    other = play_actions(changed(episodes=(given_frames(world, 2),)), SEED, [1], 1, 1.0, tmp_path / "other.mp4")
    assert (other.start, other.given) == ("recorded", 2)
    refused(lambda: replay(world, other, tmp_path / "x.mp4"), "--start")
    refused(lambda: replay(changed(episodes=(given_frames(world, 3),)), other, tmp_path / "x.mp4"), "--start")
    refused(lambda: replay(world, recording.model_copy(update={"actions": [9]}), tmp_path / "x.mp4"), "action 9")
    refused(lambda: replay(world, recording.model_copy(update={"start": "maze"}), tmp_path / "x.mp4"), "demo")
    assert not (tmp_path / "x.mp4").exists()
    for text in ("{", "[]", "{}", (tmp_path / "walk.json").read_text().replace('"first": 0', '"first": 1')):
        (tmp_path / "bad.json").write_text(text)
        refused(lambda: read_recording(tmp_path / "bad.json"), str(tmp_path / "bad.json"), "far-scale play")
    refused(lambda: read_recording(tmp_path / "none.json"), "none.json")


@pytest.mark.slow
def test_walks_start_from_recorded_videos_and_shards(recorded: Path, recorded_shards: Path, tmp_path: Path) -> None:
    from harness.play import small_config
    from harness.random_models import write_random_model

    folder = write_random_model(tmp_path / "model", small_config(actions=4), recorded_shards, std=0.1, step=0)
    from_videos, from_shards = (open_world(folder, start, threads=1) for start in (recorded, recorded_shards))
    for world in (from_videos, from_shards):
        assert world.start == "recorded" and len(world.episodes) == 8
        assert world.episodes[0].latents.shape == (1, 4, 32, 8, 8)
    assert torch.equal(from_videos.episodes[3].classes, from_shards.episodes[3].classes)  # type: ignore[arg-type]
    walk = open_walk(from_videos, seed=11)  # episode 3 of 8
    assert walk.now().index == 3
    assert walk.recording().given_sha256 != open_walk(from_videos, seed=12).recording().given_sha256
    assert open_world(folder, None, threads=1).start == "maze"


@pytest.mark.slow
def test_the_real_engine_walks_as_the_recorder(tmp_path: Path) -> None:
    """The given frames and those of the same actions are what record_episode's world shows."""
    world = small_world(side=8, has_engine=True)
    script = [FORWARD, FORWARD, LEFT, FORWARD]
    with DemoWorld.of_seed(SEED) as engine:
        expected = [engine.frame(), *(engine.step(action) for action in [LEFT] * TURNS_OF_A_CIRCLE + script)]
    walk = open_walk(world, SEED)
    shown = [walk.act(action, 1, 1.0) for action in [RIGHT, FORWARD]]
    walk.back()
    walk.back()
    shown = [walk.act(action, 1, 1.0) for action in script]
    assert all(np.array_equal(pixels(s.engine), e) for s, e in zip(shown, expected[GIVEN:], strict=True))
    given = walk.pictures().frames[:GIVEN]
    assert all(np.array_equal(cast(np.ndarray, g[1]), e) for g, e in zip(given, expected, strict=False))
    assert np.array_equal(pixels(walk.reset().engine), expected[0])
    assert np.array_equal(pixels(walk.act(FORWARD, 1, 1.0).engine), expected[GIVEN])
    recording = walk.recording()
    walk.close()
    again = replay(world, recording, tmp_path / "again.mp4")
    assert again == recording and recording.start == "maze" and recording.given == GIVEN
