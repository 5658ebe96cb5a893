"""Procedural mazes as Doom maps: a grid of square cells, written as a UDMF text map inside a PWAD.

Formats: the Universal Doom Map Format, version 1.1 (namespace "zdoom"), and the WAD directory of the original game.
The textures are only named: they are in Freedoom (BSD licence), which ViZDoom's wheel contains.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass

import numpy as np

CELL = 128  # side of a cell in map units; a step forward is about a fifth of it
_HEIGHT = 112
_LIGHT = 240  # one light level for the whole maze
# Textures that do not move, of different colours and with little detail: distinguishable at 64 pixels.
_WALLS = ("REDWALL", "STWALL", "DOKGRIR", "COMPBLUE", "A-CONCTE", "A-BROCK2")
_FLOORS = ("FLAT5_4", "FLAT5")
_CEILINGS = ("FLAT19",)
_REGION = 2  # cells a side of a region of one wall texture
_PLAYER_START = 1  # UDMF thing type of the first player's start

Cell = tuple[int, int]


def _neighbours(cell: Cell, side: int) -> list[Cell]:
    """The up to four cells beside `cell` on a grid of side x side."""
    x, y = cell
    beside = ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1))
    return [(i, j) for i, j in beside if 0 <= i < side and 0 <= j < side]


def cell_centre(cell: Cell) -> tuple[float, float]:
    """The map coordinates of a cell's centre."""
    return (cell[0] + 0.5) * CELL, (cell[1] + 0.5) * CELL


@dataclass(frozen=True)
class Maze:
    """A maze of side x side cells; `doors` are the pairs of neighbouring cells without a wall between them."""

    side: int
    doors: frozenset[frozenset[Cell]]

    @classmethod
    def grow(cls, random: np.random.Generator, side: int, loops: float = 0.2) -> Maze:
        """A depth-first maze (every cell can be reached), then each wall is opened with probability `loops`."""
        doors: set[frozenset[Cell]] = set()
        visited: set[Cell] = {(0, 0)}
        stack: list[Cell] = [(0, 0)]
        while stack:
            unvisited = [cell for cell in _neighbours(stack[-1], side) if cell not in visited]
            if not unvisited:
                stack.pop()
                continue
            cell = unvisited[random.integers(len(unvisited))]
            doors.add(frozenset((stack[-1], cell)))
            visited.add(cell)
            stack.append(cell)
        for cell in [(x, y) for x in range(side) for y in range(side)]:
            for other in _neighbours(cell, side):
                if cell < other and random.random() < loops:
                    doors.add(frozenset((cell, other)))
        return cls(side, frozenset(doors))

    def is_open(self, cell: Cell, other: Cell) -> bool:
        """Whether there is a door between two cells."""
        return frozenset((cell, other)) in self.doors

    def path(self, start: Cell, goal: Cell) -> list[Cell]:
        """The cells of a shortest path to `goal`, without `start`."""
        previous: dict[Cell, Cell] = {}
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            for other in _neighbours(cell, self.side):
                if other not in previous and other != start and self.is_open(cell, other):
                    previous[other] = cell
                    queue.append(other)
        path, cell = [], goal
        while cell != start:
            path.append(cell)
            cell = previous[cell]
        return path[::-1]


def map_text(maze: Maze, random: np.random.Generator, start: Cell, angle: int) -> str:
    """The maze as a UDMF text map; the player starts at the centre of `start` with this `angle` (degrees, 0 = east).

    Every cell is a sector; a door is one two-sided line, a wall a one-sided line on either side.
    """
    side = maze.side
    regions = -(-side // _REGION)
    # Every texture is used before one is repeated, so that neighbouring regions seldom look alike.
    order = np.concatenate([random.permutation(len(_WALLS)) for _ in range(-(-(regions**2) // len(_WALLS)))])
    floor = _FLOORS[random.integers(len(_FLOORS))]
    ceiling = _CEILINGS[random.integers(len(_CEILINGS))]

    x, y = cell_centre(start)
    skills = " ".join(f"skill{level} = true;" for level in range(1, 6))
    text = [
        'namespace = "zdoom";',
        f"thing {{ x = {x:.1f}; y = {y:.1f}; angle = {angle}; type = {_PLAYER_START}; {skills} single = true; }}",
    ]
    text += [f"vertex {{ x = {i * CELL}.0; y = {j * CELL}.0; }}" for j in range(side + 1) for i in range(side + 1)]
    sides: list[str] = []
    lines: list[str] = []
    for i in range(side):
        for j in range(side):
            sector = i * side + j
            wall = _WALLS[order[(i // _REGION) * regions + j // _REGION]]
            corners = ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))  # clockwise: a line's front is its right side
            neighbours = ((i - 1, j), (i, j + 1), (i + 1, j), (i, j - 1))
            for number, other in enumerate(neighbours):
                (x1, y1), (x2, y2) = corners[number], corners[(number + 1) % 4]
                ends = f"v1 = {y1 * (side + 1) + x1}; v2 = {y2 * (side + 1) + x2}; sidefront = {len(sides)};"
                if not maze.is_open((i, j), other):
                    sides.append(f'sidedef {{ sector = {sector}; texturemiddle = "{wall}"; }}')
                    lines.append(f"linedef {{ {ends} blocking = true; }}")
                elif (i, j) < other:
                    sides.append(f"sidedef {{ sector = {sector}; }}")
                    sides.append(f"sidedef {{ sector = {other[0] * side + other[1]}; }}")
                    lines.append(f"linedef {{ {ends} sideback = {len(sides) - 1}; twosided = true; }}")
    sector_text = (
        f"sector {{ heightfloor = 0; heightceiling = {_HEIGHT}; lightlevel = {_LIGHT}; "
        f'texturefloor = "{floor}"; textureceiling = "{ceiling}"; }}'
    )
    return "\n".join(text + sides + lines + [sector_text] * side**2)


def wad_bytes(text: str) -> bytes:
    """A PWAD with one map, MAP01, of this UDMF text."""
    lumps = ((b"MAP01", b""), (b"TEXTMAP", text.encode()), (b"ENDMAP", b""))
    body, directory = b"", b""
    for name, content in lumps:
        directory += struct.pack("<ii8s", 12 + len(body), len(content), name)
        body += content
    return struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(body)) + body + directory
