"""The policy that walks the demo's mazes: shortest paths from goal to goal, half of them to cells seen before.

It never walks into a wall, as people do who hold a key, and seldom looks around. `Habits` mixes such actions in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from far_scale.data.demo.maze import CELL, Cell, Maze, cell_centre

NOOP, LEFT, RIGHT, FORWARD = range(4)
TURN = 11.25  # degrees of one turn
_REACHED = 24.0  # map units from a cell's centre at which it counts as reached; more than half a step
_REST = 0.05  # probability of a rest at any frame
_MAX_REST_FRAMES = 4
_LOOK = 0.25  # probability of turning around at a goal
_WANDERING = (0.5, 0.25, 0.25)  # of wandering: straight on, turns to one side, a mixture of actions
_MAX_WANDER_FRAMES = 10
_LOOK_AROUND_FRAMES = (48, 96)  # at least, at most; a circle has 32
_SWEEP_FRAMES = (8, 39)  # at least, at most: turns to one side


class Habits(NamedTuple):
    """What an explorer does beside walking to its goals: probabilities at each decision.

    Attributes:
        wander: up to 10 frames without a goal, which also walk into walls.
        look_around: 48 to 96 frames on the spot, in sweeps of 8 to 39 turns to either side, which show the same views
            again.
    """

    wander: float = 0.0
    look_around: float = 0.0


GOALS_ONLY = Habits()


class Explorer:
    """Chooses the actions of one episode from the player's pose; all randomness comes from `random`.

    Args:
        maze: that the player is in.
        random: its draws.
        habits: of the player.
    """

    def __init__(self, maze: Maze, random: np.random.Generator, habits: Habits = GOALS_ONLY) -> None:
        self._maze, self._random, self._habits = maze, random, habits
        self._seen: list[Cell] = []
        self._path: list[Cell] = []
        self._queued: list[int] = []  # actions already decided

    def act(self, x: float, y: float, angle: float) -> int:
        """The next action of a player at (x, y) in map units who looks at `angle` degrees (0 = east, anticlockwise)."""
        cell = (self._to_cell(x), self._to_cell(y))
        if cell not in self._seen:
            self._seen.append(cell)
        if not self._queued:
            self._queued = self._decide(cell, x, y, angle)
        return self._queued.pop()

    def _to_cell(self, coordinate: float) -> int:
        return min(max(int(coordinate // CELL), 0), self._maze.side - 1)

    def _decide(self, cell: Cell, x: float, y: float, angle: float) -> list[int]:
        if self._habits.wander and self._random.random() < self._habits.wander:
            self._path = []
            return self._wander()
        if self._habits.look_around and self._random.random() < self._habits.look_around:
            return self._look_around()
        if self._random.random() < _REST:
            return [NOOP] * int(self._random.integers(1, _MAX_REST_FRAMES + 1))
        if self._path and math.dist((x, y), cell_centre(self._path[0])) < _REACHED:
            self._path.pop(0)
        if not self._path:
            self._path = self._maze.path(cell, self._choose_goal(cell))
            if math.dist((x, y), cell_centre(cell)) >= _REACHED:  # after wandering, a wall may be in the way
                self._path.insert(0, cell)
            if self._random.random() < _LOOK:
                # half or full, so that the same walls are seen again
                return [int(self._random.choice((LEFT, RIGHT)))] * round(int(self._random.choice((180, 360))) / TURN)
        centre = cell_centre(self._path[0])
        turn = (math.degrees(math.atan2(centre[1] - y, centre[0] - x)) - angle + 180.0) % 360.0 - 180.0
        miss = math.dist((x, y), centre) * math.sin(math.radians(min(abs(turn), 90.0)))
        # Straight on where no turn would aim better (with a margin, against turning back and forth), or where the
        # centre is almost reached.
        if abs(turn) <= 0.55 * TURN or (abs(turn) < 45.0 and miss < _REACHED / 2):
            return [FORWARD]
        return [LEFT if turn > 0 else RIGHT]

    def _wander(self) -> list[int]:
        frames = int(self._random.integers(2, _MAX_WANDER_FRAMES + 1))
        kind = self._random.choice(3, p=_WANDERING)
        if kind == 0:
            return [FORWARD] * frames
        if kind == 1:
            return [int(self._random.choice((LEFT, RIGHT)))] * frames
        mixture = self._random.choice((NOOP, LEFT, RIGHT, FORWARD), size=frames, p=(0.1, 0.2, 0.2, 0.5))
        return [int(action) for action in mixture]

    def _look_around(self) -> list[int]:
        frames = int(self._random.integers(*_LOOK_AROUND_FRAMES, endpoint=True))
        actions: list[int] = []
        while len(actions) < frames:
            turn = int(self._random.choice((LEFT, RIGHT)))
            actions += [turn] * int(self._random.integers(*_SWEEP_FRAMES, endpoint=True))
        return actions[:frames]

    def _choose_goal(self, cell: Cell) -> Cell:
        """Choose another cell: with probability 1/2 each, one seen before or any."""
        all_cells = [(i, j) for i in range(self._maze.side) for j in range(self._maze.side)]
        candidates = self._seen if len(self._seen) > 1 and self._random.random() < 0.5 else all_cells
        others = [other for other in candidates if other != cell]
        return others[int(self._random.integers(len(others)))]
