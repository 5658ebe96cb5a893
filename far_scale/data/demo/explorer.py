"""Who walks the demo's mazes: from goal to goal along shortest ways, half the time to a place seen before."""

from __future__ import annotations

import math

import numpy as np

from far_scale.data.demo.maze import CELL, Cell, Maze, cell_centre

NOOP, LEFT, RIGHT, FORWARD = range(4)
TURN = 22.5  # degrees of one turn
_REACHED = 24.0  # map units from a cell's middle at which it counts as reached; more than half a step
_REST = 0.05  # probability of a rest at any moment, and
_REST_FRAMES = 4  # the most frames that it takes
_LOOK = 0.25  # probability of a look around at a goal


class Explorer:
    """Chooses the actions of one episode from where the player stands; all chance comes from `random`."""

    def __init__(self, maze: Maze, random: np.random.Generator) -> None:
        self._maze, self._random = maze, random
        self._seen: list[Cell] = []
        self._way: list[Cell] = []
        self._queued: list[int] = []  # actions decided on already

    def act(self, x: float, y: float, angle: float) -> int:
        """The next action of a player at (x, y) in map units who looks at `angle` degrees (0 = east, anticlockwise)."""
        cell = (self._inside(x), self._inside(y))
        if cell not in self._seen:
            self._seen.append(cell)
        if not self._queued:
            self._queued = self._decide(cell, x, y, angle)
        return self._queued.pop()

    def _inside(self, coordinate: float) -> int:
        return min(max(int(coordinate // CELL), 0), self._maze.side - 1)

    def _decide(self, cell: Cell, x: float, y: float, angle: float) -> list[int]:
        if self._random.random() < _REST:
            return [NOOP] * int(self._random.integers(1, _REST_FRAMES + 1))
        if self._way and math.dist((x, y), cell_centre(self._way[0])) < _REACHED:
            self._way.pop(0)
        if not self._way:
            self._way = self._maze.path(cell, self._goal(cell))
            if self._random.random() < _LOOK:
                # a half turn or a whole one, so that the same walls come by again
                return [int(self._random.choice((LEFT, RIGHT)))] * int(self._random.choice((8, 16)))
        middle = cell_centre(self._way[0])
        off = (math.degrees(math.atan2(middle[1] - y, middle[0] - x)) - angle + 180.0) % 360.0 - 180.0
        miss = math.dist((x, y), middle) * math.sin(math.radians(min(abs(off), 90.0)))
        # straight on where no turn would aim better (a little over half of one, against turns to and fro), or near by
        if abs(off) <= 0.55 * TURN or (abs(off) < 45.0 and miss < _REACHED / 2):
            return [FORWARD]
        return [LEFT if off > 0 else RIGHT]

    def _goal(self, cell: Cell) -> Cell:
        """Another cell: one seen before or any, at even odds."""
        every = [(i, j) for i in range(self._maze.side) for j in range(self._maze.side)]
        known = self._seen if len(self._seen) > 1 and self._random.random() < 0.5 else every
        others = [other for other in known if other != cell]
        return others[int(self._random.integers(len(others)))]
