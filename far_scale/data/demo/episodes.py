"""The recorded demo world: first-person walks through procedural mazes, rendered by ViZDoom.

Frames are 64x64 RGB. The four actions are 0 noop, 1 turn left, 2 turn right (22.5 degrees), 3 forward (a fifth
of a cell). The player stands still at every frame, so there is no hidden velocity.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from far_scale.data.demo.explorer import FORWARD, LEFT, NOOP, RIGHT, TURN, Explorer
from far_scale.data.demo.maze import Maze, map_text, wad_bytes
from far_scale.data.video.videos import Video, read_video
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write
from far_scale.utils.rng import generator

SIZE = 64  # pixels a side
ACTIONS = 4
FPS = 8.0  # in the files; the game's time between two frames varies
_SIDE = 5  # cells a side of a maze
_RENDER = 192  # pixels: the middle square of 256x192, averaged over 3x3 pixels against jagged edges
_STEP_TICS = 3  # game ticks that the forward button is held
_REST_TICS = 40  # a player takes 36 to come to rest
_ENGINE_SEED = 1


def record_episode(seed: int, frames: int) -> Video:
    """Record an episode of `frames` frames in the maze of `seed`.

    The same seed gives the same frames and actions; a longer episode begins with the shorter one.

    Raises:
        UserError: the package vizdoom is missing, or `frames` is below 1 or does not fit into memory.
    """
    if frames < 1:
        raise UserError(f"episode {seed}: {frames} frames asked for; ask for at least 1")
    random = generator(seed, "maze")
    maze = Maze.grow(random, _SIDE)
    start = (int(random.integers(_SIDE)), int(random.integers(_SIDE)))
    text = map_text(maze, random, start, angle=90 * int(random.integers(4)))
    explorer = Explorer(maze, generator(seed, "explorer"))
    try:
        pixels = np.empty((frames, SIZE, SIZE, 3), np.uint8)
    except (ValueError, MemoryError):
        raise UserError(f"episode {seed}: {frames} frames do not fit into memory; ask for fewer") from None
    actions = np.zeros(frames, np.int64)
    with _game(text) as game:
        for frame in range(frames):
            if frame > 0:
                x, y, angle, *_ = game.get_state().game_variables
                actions[frame] = explorer.act(x, y, angle)
                _move(game, int(actions[frame]))
            pixels[frame] = _shrink(game.get_state().screen_buffer)
    return Video(episode_name(seed), pixels, actions, label=None, fps=FPS, source=f"vizdoom maze, seed {seed}")


def record_episodes(folder: str | Path, seeds: Sequence[int], frames: int, workers: int) -> list[Path]:
    """Record an episode of each seed into `folder`/episode-<seed:06d>.npz with `workers` processes.

    Each file holds `frames` uint8 [F, 64, 64, 3], `actions` int64 [F], `fps` and `seed`. Complete files of the same
    seed and length are not recorded again. Returns the paths in the order of the seeds.

    Raises:
        UserError: the package vizdoom is missing, or `frames` is below 1.
    """
    folder = Path(folder)
    paths = [folder / f"{episode_name(seed)}.npz" for seed in seeds]
    missing = [seed for seed, path in zip(seeds, paths, strict=True) if not _is_complete(path, seed, frames)]
    if not missing:
        return paths
    _import_vizdoom()
    folder.mkdir(parents=True, exist_ok=True)
    # spawn, not fork: the caller may have torch's threads running, which a fork would lose with their locks held
    context = multiprocessing.get_context("spawn")
    record = partial(_record_file, folder, frames)
    with context.Pool(min(workers, len(missing)), initializer=_ignore_interrupt) as pool:
        for _ in tqdm(pool.imap_unordered(record, missing), total=len(missing), desc="record", unit="episode"):
            pass
    return paths


def episode_name(seed: int) -> str:
    """The key of the episode of `seed`, and its file's name without the suffix."""
    return f"episode-{seed:06d}"


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the pool


def _record_file(folder: Path, frames: int, seed: int) -> None:
    video = record_episode(seed, frames)
    assert video.actions is not None  # the demo always has them
    with atomic_write(folder / f"{video.key}.npz") as temporary:
        np.savez_compressed(temporary, frames=video.frames, actions=video.actions, fps=video.fps, seed=seed)


def _is_complete(path: Path, seed: int, frames: int) -> bool:
    if not path.exists():
        return False
    try:
        video = read_video(path)
        with np.load(path, allow_pickle=False) as arrays:
            same_seed = int(arrays["seed"]) == seed
    except (UserError, KeyError, ValueError, TypeError):
        return False  # half-written or foreign: recorded again
    return same_seed and len(video.frames) == frames and video.actions is not None


def _import_vizdoom() -> Any:
    try:
        import vizdoom
    except ImportError:
        raise UserError(
            "the demo world needs the package vizdoom, which is not installed; pip install 'far_scale[demo]'"
        ) from None
    return vizdoom


@contextmanager
def _game(text: str) -> Iterator[Any]:
    """A running game on the UDMF map `text`; its files are in a temporary folder."""
    vizdoom = _import_vizdoom()
    package = Path(vizdoom.__file__).parent
    game = vizdoom.DoomGame()
    with tempfile.TemporaryDirectory(prefix="far_scale-maze-") as folder:
        (Path(folder) / "maze.wad").write_bytes(wad_bytes(text))
        # The engine makes a folder `_vizdoom` where it is started, so it is started in the temporary folder.
        launcher = Path(folder) / "vizdoom"
        launcher.write_text(f'#!/bin/sh\ncd "$(dirname "$0")" && exec "{package / "vizdoom"}" "$@"\n')
        launcher.chmod(0o700)
        game.set_vizdoom_path(str(launcher))
        game.set_doom_config_path(os.path.join(folder, "maze.ini"))
        game.set_doom_game_path(str(package / "freedoom2.wad"))
        game.set_doom_scenario_path(os.path.join(folder, "maze.wad"))
        game.set_doom_map("MAP01")
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_256X192)
        game.set_render_hud(False)
        game.set_render_weapon(False)
        game.set_render_crosshair(False)
        game.set_render_messages(False)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.Button.MOVE_FORWARD])
        variable = vizdoom.GameVariable
        game.set_available_game_variables(
            [variable.POSITION_X, variable.POSITION_Y, variable.ANGLE, variable.VELOCITY_X, variable.VELOCITY_Y]
        )
        game.set_episode_timeout(0)  # none: episodes have the requested length
        game.set_episode_start_time(10)  # the player has landed by then
        game.set_mode(vizdoom.Mode.PLAYER)
        game.add_game_args("-nomonsters +fov 100 +movebob 0 +stillbob 0 +wipetype 0")
        game.set_seed(_ENGINE_SEED)
        game.init()
        try:
            yield game
        finally:
            game.close()


def _move(game: Any, action: int) -> None:
    """Take one action and let the player come to rest: turns do not slide, and all steps are equally long."""
    if action == FORWARD:
        game.make_action([0, 1], _STEP_TICS)
        game.make_action([0, 0], _REST_TICS)
    else:
        game.make_action([{NOOP: 0.0, LEFT: -TURN, RIGHT: TURN}[action], 0], 1)


def _shrink(screen: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle square of the screen [192, 256, 3] as [64, 64, 3]."""
    left = (screen.shape[1] - _RENDER) // 2
    square = np.ascontiguousarray(screen[:, left : left + _RENDER])
    return np.asarray(Image.fromarray(square).reduce(_RENDER // SIZE))
