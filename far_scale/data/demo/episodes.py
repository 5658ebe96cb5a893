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

from far_scale.data.demo.explorer import Explorer
from far_scale.data.demo.world import SIZE, DemoWorld, import_vizdoom
from far_scale.data.video.videos import Video, read_video
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write
from far_scale.utils.rng import generator

FPS = 8.0  # in the files; the game's time between two frames varies


def record_episode(seed: int, frames: int, wander: float = 0.0) -> Video:
    """Record an episode of `frames` frames in the maze of `seed`, walked by an `Explorer` that may `wander`.

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
        explorer = Explorer(world.maze, generator(seed, "explorer"), wander)
        for frame in range(frames):
            if frame > 0:
                x, y, angle, *_ = world.variables.tolist()
                actions[frame] = explorer.act(x, y, angle)
                world.move(int(actions[frame]))
            pixels[frame] = world.frame()
    return Video(episode_name(seed), pixels, actions, label=None, fps=FPS, source=f"vizdoom maze, seed {seed}")


def record_episodes(
    folder: str | Path, seeds: Sequence[int], frames: int, workers: int, wander: float = 0.0
) -> list[Path]:
    """Record an episode of each seed into `folder`/episode-<seed:06d>.npz with `workers` processes.

    Each file holds `frames` uint8 [F, 64, 64, 3], `actions` int64 [F], `fps`, `seed` and, unless it is 0, `wander`.
    Complete files of the same seed, length and `wander` are not recorded again. Returns the paths in the order of the
    seeds.

    Raises:
        UserError: the package vizdoom is missing, or `frames` is below 1.
    """
    folder = Path(folder)
    paths = [folder / f"{episode_name(seed)}.npz" for seed in seeds]
    missing = [seed for seed, path in zip(seeds, paths, strict=True) if not _is_complete(path, seed, frames, wander)]
    if not missing:
        return paths
    import_vizdoom()
    folder.mkdir(parents=True, exist_ok=True)
    # spawn, not fork: the caller may have torch's threads running, which a fork would lose with their locks held
    context = multiprocessing.get_context("spawn")
    record = partial(_record_file, folder, frames, wander)
    with context.Pool(min(workers, len(missing)), initializer=_ignore_interrupt) as pool:
        for _ in tqdm(pool.imap_unordered(record, missing), total=len(missing), desc="record", unit="episode"):
            pass
    return paths


def episode_name(seed: int) -> str:
    """The key of the episode of `seed`, and its file's name without the suffix."""
    return f"episode-{seed:06d}"


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the pool


def _record_file(folder: Path, frames: int, wander: float, seed: int) -> None:
    video = record_episode(seed, frames, wander)
    assert video.actions is not None  # the demo always has them
    with atomic_write(folder / f"{video.key}.npz") as temporary:
        arrays: dict[str, Any] = {"frames": video.frames, "actions": video.actions, "fps": video.fps, "seed": seed}
        np.savez_compressed(temporary, **arrays | ({"wander": wander} if wander else {}))


def _is_complete(path: Path, seed: int, frames: int, wander: float) -> bool:
    if not path.exists():
        return False
    try:
        video = read_video(path)
        with np.load(path, allow_pickle=False) as arrays:
            recorded_wander = float(arrays["wander"]) if "wander" in arrays else 0.0
            same = int(arrays["seed"]) == seed and recorded_wander == wander
    except (UserError, KeyError, ValueError, TypeError):
        return False  # half-written or foreign: recorded again
    return same and len(video.frames) == frames and video.actions is not None
