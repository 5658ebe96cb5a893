"""The recorded demo world: seeded, at rest at every frame, revisited, and leaving nothing behind."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import numpy as np
import pytest

from far_scale.data.demo.episodes import record_episode, record_episodes
from far_scale.data.demo.explorer import FORWARD, LEFT, NOOP, RIGHT, TURN, Explorer, Habits
from far_scale.data.demo.maze import CELL, Maze, cell_centre, map_text, wad_bytes
from far_scale.data.demo.world import TURNS_OF_A_CIRCLE, DemoWorld
from far_scale.data.video.videos import Video, read_video
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator
from harness import processes

ROOT = Path(__file__).parents[2]
FRAMES = 300
SEED = 10_900
STEP = 24.40  # map units


@pytest.fixture(scope="module")
def episode() -> Video:
    return record_episode(SEED, FRAMES)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def test_an_episode_is_a_function_of_its_seed(episode: Video) -> None:
    again, other = record_episode(SEED, 60), record_episode(SEED + 1, 60)
    assert np.array_equal(again.frames, episode.frames[:60]) and np.array_equal(again.actions, episode.actions[:60])
    assert difference(other.frames, again.frames) > 5 and not np.array_equal(other.actions, again.actions)


def test_an_episode_is_real_video_with_all_four_actions(episode: Video) -> None:
    assert episode.frames.shape == (FRAMES, 64, 64, 3) and episode.frames.dtype == np.uint8
    assert episode.actions is not None and episode.actions.shape == (FRAMES,) and episode.actions.dtype == np.int64
    assert (episode.key, episode.label, episode.fps) == (f"episode-{SEED:06d}", None, 8.0)
    assert episode.actions[0] == NOOP
    frequencies = np.bincount(episode.actions, minlength=4) / FRAMES
    assert frequencies.shape == (4,) and frequencies.min() > 0.04 and frequencies[FORWARD] > 0.3, frequencies
    assert episode.frames.std() > 20  # neither black nor one colour
    assert all(len(np.unique(frame.reshape(-1, 3), axis=0)) > 100 for frame in episode.frames[::10])


def test_an_action_leads_to_its_frame(episode: Video) -> None:
    """Nothing slides: a noop changes no pixel, and a turn back shows the very picture of before."""
    actions, frames = episode.actions, episode.frames
    assert actions is not None
    noops = np.flatnonzero(actions[1:] == NOOP) + 1
    assert len(noops) > 3 and all(np.array_equal(frames[f], frames[f - 1]) for f in noops)
    moves = np.flatnonzero(actions[1:] != NOOP) + 1
    assert np.mean([difference(frames[f], frames[f - 1]) > 1 for f in moves]) > 0.95


def test_turns_and_noops_leave_the_player_in_place_and_steps_are_equally_long() -> None:
    maze = Maze(2, frozenset({frozenset({(0, 0), (1, 0)}), frozenset({(0, 0), (0, 1)})}))
    with DemoWorld(maze, map_text(maze, generator(0, "test"), (0, 0), angle=0)) as world:
        poses, pictures = [world.variables], [world.frame()]
        script = [FORWARD, LEFT, RIGHT, FORWARD, NOOP, *[LEFT] * TURNS_OF_A_CIRCLE, RIGHT]
        for action in script:
            pictures.append(world.step(action))
            poses.append(world.variables)
        world.restart()
        assert np.array_equal(world.variables, poses[0]) and np.array_equal(world.frame(), pictures[0])
    expected = {NOOP: 0.0, LEFT: TURN, RIGHT: -TURN, FORWARD: 0.0}
    for action, before, after in zip(script, poses, poses[1:], strict=False):
        moved = math.dist(before[:2], after[:2])
        assert moved == (pytest.approx(STEP, abs=0.01) if action == FORWARD else 0.0)
        assert (after[2] - before[2] - expected[action] + 180) % 360 - 180 == pytest.approx(0, abs=1e-4)
        assert after[3] == after[4] == 0.0  # at rest
    assert np.array_equal(pictures[1], pictures[3])  # left and right again
    assert np.array_equal(pictures[5], pictures[5 + TURNS_OF_A_CIRCLE])  # a whole turn


def test_places_are_seen_again(episode: Video) -> None:
    """Many a frame looks almost like one of at least 20 frames ago, with other pictures in between."""
    small = episode.frames.reshape(FRAMES, 16, 4, 16, 4, 3).mean((2, 4)).reshape(FRAMES, -1)
    distance = np.abs(small[:, None] - small[None]).mean(2)
    again = 0
    for late in range(20, FRAMES):
        early = int(distance[late, : late - 19].argmin())
        again += distance[late, early] < 8 and distance[late, early:late].max() > 15
    assert again > 0.08 * FRAMES, again


def test_mazes_are_connected_and_the_explorer_walks_open_doors_only() -> None:
    for seed in range(20):
        maze = Maze.grow(generator(seed, "maze"), 5)
        assert all(len(maze.path((0, 0), (i, j))) >= i + j for i in range(5) for j in range(5))
        assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in map(tuple, maze.doors))
    explorer, (x, y), angle = Explorer(maze, generator(0, "explorer")), cell_centre((2, 2)), 0.0
    cells = [(2, 2)]
    for _ in range(600):
        action = explorer.act(x, y, angle)
        angle += {LEFT: TURN, RIGHT: -TURN}.get(action, 0.0)
        if action == FORWARD:
            x += STEP * math.cos(math.radians(angle))
            y += STEP * math.sin(math.radians(angle))
        cell = (int(x // CELL), int(y // CELL))
        if cell != cells[-1]:
            assert maze.is_open(cells[-1], cell)
            cells.append(cell)
    assert len(set(cells)) > 12 and len(cells) > 1.5 * len(set(cells))  # gets about, and back


def test_a_wandering_player_walks_into_walls_and_finds_the_way_again(episode: Video) -> None:
    def blocked(video: Video) -> list[bool]:
        assert video.actions is not None
        steps = np.flatnonzero(video.actions[1:] == FORWARD) + 1
        return [np.array_equal(video.frames[frame], video.frames[frame - 1]) for frame in steps]

    wandering = record_episode(SEED, FRAMES, habits=Habits(wander=0.3))
    assert wandering.actions is not None and set(wandering.actions.tolist()) == {NOOP, LEFT, RIGHT, FORWARD}
    assert sum(blocked(wandering)) > 3 and not any(blocked(episode))
    moves = blocked(wandering)
    assert not all(moves[-20:]) and sum(moves) < len(moves) / 2  # it is never stuck


def test_a_player_who_looks_around_sees_the_same_views_again() -> None:
    video = record_episode(SEED, 90, Habits(look_around=1.0))
    assert video.actions is not None and set(video.actions[1:].tolist()) == {LEFT, RIGHT}
    headings = np.cumsum(np.select([video.actions == LEFT, video.actions == RIGHT], [1, -1])) % TURNS_OF_A_CIRCLE
    views = {heading: video.frames[headings == heading] for heading in headings.tolist()}
    assert all((frames == frames[0]).all() for frames in views.values())
    assert len(views) > TURNS_OF_A_CIRCLE / 2 and max(len(frames) for frames in views.values()) > 3


def test_the_wad_holds_the_map() -> None:
    wad = wad_bytes("abc")
    assert wad[:4] == b"PWAD" and wad[12:15] == b"abc" and len(wad) == 12 + 3 + 3 * 16


@pytest.mark.slow
def test_records_many_keeps_complete_ones_and_replaces_broken_ones(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "episodes"
    work.mkdir()
    script = [ROOT / "tools/record_demo.py", "--out", out, "--episodes", "3", "--frames", "12"]
    done = processes.run(*script, "--seed", "10500", "--workers", "2", cwd=work)
    assert done.returncode == 0, done.stderr
    paths = sorted(out.iterdir())
    assert [path.name for path in paths] == [f"episode-{seed:06d}.npz" for seed in (10500, 10501, 10502)]
    assert list(work.iterdir()) == []  # the engine left nothing in the working folder
    with np.load(paths[1], allow_pickle=False) as archive:
        assert sorted(archive.files) == ["actions", "fps", "frames", "seed"] and archive["seed"] == 10501
    video = read_video(paths[1])
    assert np.array_equal(video.frames, record_episode(10501, 12).frames)

    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[2].write_bytes(paths[2].read_bytes()[:1000])
    assert record_episodes(out, range(10500, 10503), frames=12, workers=1) == paths
    assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(paths, stamps, strict=True)] == [True, True, False]
    assert len(read_video(paths[2]).frames) == 12

    record_episodes(out, [10500], frames=12, workers=1, habits=Habits(wander=0.5))  # so it is recorded again
    with np.load(paths[0], allow_pickle=False) as archive:
        assert archive["wander"] == 0.5
    stamp = paths[0].stat().st_mtime_ns
    record_episodes(out, [10500], frames=12, workers=1, habits=Habits(wander=0.5))
    assert paths[0].stat().st_mtime_ns == stamp


def test_the_error_without_vizdoom_names_the_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true_import = builtins.__import__

    def without_vizdoom(name: str, *arguments: object, **keywords: object) -> object:
        if name == "vizdoom":
            raise ModuleNotFoundError("No module named 'vizdoom'")
        return true_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_vizdoom)
    with pytest.raises(UserError, match=r"pip install 'far_scale\[demo\]'"):
        record_episodes(tmp_path / "episodes", [1], frames=2, workers=1)
    assert not (tmp_path / "episodes").exists()


def test_refuses_no_frames(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        record_episode(1, 0)
    done = processes.run(ROOT / "tools/record_demo.py", "--out", tmp_path, "--frames", "0")
    assert done.returncode == 2 and done.stderr.startswith("error: --frames 0") and len(done.stderr.splitlines()) == 1
