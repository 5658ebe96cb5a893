"""Recorded episodes of the demo world: first-person walks through procedural mazes (`far_scale.data.demo.world`)."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from far_scale.data.demo.explorer import GOALS_ONLY, Explorer, Habits
from far_scale.data.demo.world import SIZE, DemoWorld, import_vizdoom
from far_scale.data.video.videos import Video, read_video
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write
from far_scale.utils.rng import generator

FPS = 8.0  # in the files; the game's time between two frames varies


def record_episode(seed: int, frames: int, habits: Habits = GOALS_ONLY) -> Video:
    """Record an episode of `frames` frames in the maze of `seed`, walked by an `Explorer` of these habits.

    The same seed gives the same frames and actions; a longer episode begins with the shorter one.

    Raises:
        UserError: the package vizdoom is missing, or `frames` is below 1 or does not fit into memory.
    """
    if frames < 1:
        raise UserError(f"episode {seed}: {frames} frames asked for; ask for at least 1")
    try:
        pixels = np.empty((frames, SIZE, SIZE, 3), np.uint8)
    except (ValueError, MemoryError):
        raise UserError(f"episode {seed}: {frames} frames do not fit into memory; ask for fewer") from None
    actions = np.zeros(frames, np.int64)
    with DemoWorld.of_seed(seed) as world:
        explorer = Explorer(world.maze, generator(seed, "explorer"), habits)
        for frame in range(frames):
            if frame > 0:
                x, y, angle, *_ = world.variables.tolist()
                actions[frame] = explorer.act(x, y, angle)
                world.move(int(actions[frame]))
            pixels[frame] = world.frame()
    return Video(episode_name(seed), pixels, actions, label=None, fps=FPS, source=f"vizdoom maze, seed {seed}")


def record_episodes(
    folder: str | Path, seeds: Sequence[int], frames: int, workers: int, habits: Habits = GOALS_ONLY
) -> list[Path]:
    """Record an episode of each seed into `folder`/episode-<seed:06d>.npz with `workers` processes.

    Each file holds `frames` uint8 [F, 64, 64, 3], `actions` int64 [F], `fps`, `seed` and the habits that are not 0.
    Complete files of the same seed, length and habits are not recorded again. Returns the paths in the order of the
    seeds.

    Raises:
        UserError: the package vizdoom is missing, or `frames` is below 1.
    """
    folder = Path(folder)
    paths = [folder / f"{episode_name(seed)}.npz" for seed in seeds]
    missing = [seed for seed, path in zip(seeds, paths, strict=True) if not _is_complete(path, seed, frames, habits)]
    if not missing:
        return paths
    import_vizdoom()
    folder.mkdir(parents=True, exist_ok=True)
    # spawn, not fork: the caller may have torch's threads running, which a fork would lose with their locks held
    context = multiprocessing.get_context("spawn")
    record = partial(_record_file, folder, frames, habits)
    with context.Pool(min(workers, len(missing)), initializer=_ignore_interrupt) as pool:
        for _ in tqdm(pool.imap_unordered(record, missing), total=len(missing), desc="record", unit="episode"):
            pass
    return paths


def episode_name(seed: int) -> str:
    """The key of the episode of `seed`, and its file's name without the suffix."""
    return f"episode-{seed:06d}"


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the pool


def _record_file(folder: Path, frames: int, habits: Habits, seed: int) -> None:
    video = record_episode(seed, frames, habits)
    assert video.actions is not None  # the demo always has them
    with atomic_write(folder / f"{video.key}.npz") as temporary:
        arrays: dict[str, Any] = {"frames": video.frames, "actions": video.actions, "fps": video.fps, "seed": seed}
        np.savez_compressed(temporary, **arrays, **{name: value for name, value in habits._asdict().items() if value})


def _is_complete(path: Path, seed: int, frames: int, habits: Habits) -> bool:
    if not path.exists():
        return False
    try:
        video = read_video(path)
        with np.load(path, allow_pickle=False) as arrays:
            recorded = Habits(**{name: float(arrays[name]) for name in Habits._fields if name in arrays})
            same = int(arrays["seed"]) == seed and recorded == habits
    except (UserError, KeyError, ValueError, TypeError):
        return False  # half-written or foreign: recorded again
    return same and len(video.frames) == frames and video.actions is not None
