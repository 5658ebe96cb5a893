"""The demo world itself: a maze in ViZDoom, moved by one action at a time.

Frames are 64x64 RGB. The four actions are 0 noop, 1 turn left, 2 turn right (11.25 degrees), 3 forward (a fifth
of a cell). The player stands still at every frame, so there is no hidden velocity.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from far_scale.data.demo.explorer import FORWARD, LEFT, NOOP, RIGHT, TURN
from far_scale.data.demo.maze import Maze, map_text, wad_bytes
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

SIZE = 64  # pixels a side
ACTION_NAMES = ("wait", "left", "right", "forward")
ACTIONS = len(ACTION_NAMES)
TURNS_OF_A_CIRCLE = round(360 / TURN)
_SIDE = 5  # cells a side of a maze
_RENDER = 192  # pixels: the middle square of 256x192, averaged over 3x3 pixels against jagged edges
_FIELD_OF_VIEW = 100  # degrees
_STEP_TICS = 3  # game ticks that the forward button is held
_REST_TICS = 40  # a player takes 36 to come to rest
_ENGINE_SEED = 1


class DemoWorld:
    """A running game in one maze; `close` ends it, as does the end of a `with` block.

    Attributes:
        maze: the maze of the map.
    """

    def __init__(self, maze: Maze, text: str) -> None:
        """Start a game on the UDMF map `text` of `maze`; its files are in a temporary folder.

        Raises:
            UserError: the package vizdoom is missing, or the engine does not start.
        """
        vizdoom = import_vizdoom()
        self.maze = maze
        self._folder = tempfile.TemporaryDirectory(prefix="far_scale-maze-")
        self._game = _make_game(vizdoom, Path(self._folder.name), text)
        try:
            self._game.init()
        except Exception as error:  # vizdoom's have no common class
            self.close()
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the demo world's engine could not be started ({reason}); install vizdoom again") from None

    @staticmethod
    def of_seed(seed: int) -> DemoWorld:
        """The maze of `seed`, with the player at its start.

        Raises:
            UserError: the package vizdoom is missing.
        """
        random = generator(seed, "maze")
        maze = Maze.grow(random, _SIDE)
        start = (int(random.integers(_SIDE)), int(random.integers(_SIDE)))
        return DemoWorld(maze, map_text(maze, random, start, angle=90 * int(random.integers(4))))

    @property
    def variables(self) -> NDArray[np.float64]:
        """The player's x, y (map units), angle (degrees, 0 = east, anticlockwise), and velocities in x and y."""
        return np.array(self._game.get_state().game_variables)

    def frame(self) -> NDArray[np.uint8]:
        """What the player sees, `[64, 64, 3]`."""
        return _shrink(self._game.get_state().screen_buffer)

    def step(self, action: int) -> NDArray[np.uint8]:
        """Take one action, let the player come to rest, and return the new frame.

        So turns do not slide, and all steps are equally long.
        """
        self.move(action)
        return self.frame()

    def move(self, action: int) -> None:
        """As `step`, without the frame."""
        if action == FORWARD:
            self._game.make_action([0, 1], _STEP_TICS)
            self._game.make_action([0, 0], _REST_TICS)
        else:
            self._game.make_action([{NOOP: 0.0, LEFT: -TURN, RIGHT: TURN}[action], 0], 1)

    def restart(self) -> None:
        """Put the player back to the start."""
        self._game.new_episode()
        # The field of view of the start options holds for the first episode only. Two ticks apply it; the player rests.
        self._game.send_game_command(f"fov {_FIELD_OF_VIEW}")
        self._game.make_action([0, 0], 2)

    def close(self) -> None:
        """End the game and remove its files; a second call does nothing."""
        self._game.close()
        self._folder.cleanup()

    def __enter__(self) -> DemoWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def import_vizdoom() -> Any:
    """The package vizdoom.

    Raises:
        UserError: it is missing.
    """
    try:
        import vizdoom
    except ImportError:
        raise UserError(
            "the demo world needs the package vizdoom, which is not installed; pip install 'far_scale[demo]'"
        ) from None
    return vizdoom


def _make_game(vizdoom: Any, folder: Path, text: str) -> Any:
    package = Path(vizdoom.__file__).parent
    game = vizdoom.DoomGame()
    (folder / "maze.wad").write_bytes(wad_bytes(text))
    # The engine makes a folder `_vizdoom` where it is started, so it is started in the temporary folder.
    launcher = folder / "vizdoom"
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
    game.add_game_args(f"-nomonsters +fov {_FIELD_OF_VIEW} +movebob 0 +stillbob 0 +wipetype 0")
    game.set_seed(_ENGINE_SEED)
    return game


def _shrink(screen: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle square of the screen [192, 256, 3] as [64, 64, 3]."""
    left = (screen.shape[1] - _RENDER) // 2
    square = np.ascontiguousarray(screen[:, left : left + _RENDER])
    return np.asarray(Image.fromarray(square).reduce(_RENDER // SIZE))
