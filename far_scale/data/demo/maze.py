"""Procedural mazes as Doom maps: a grid of square cells, written as a UDMF text map inside a PWAD.

Formats: the Universal Doom Map Format, version 1.1 (namespace "zdoom"), and the WAD directory of the original game.
The textures are named, not shipped: they come from Freedoom (BSD licence), which ViZDoom's wheel carries.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass

import numpy as np

CELL = 128  # side of a cell in map units; a step forward is about a fifth of it
_HEIGHT = 112
_LIGHT = 240  # one light level for the whole maze
# Still textures only, each of another colour, with little fine grain: places are told apart at 64 pixels.
_WALLS = ("REDWALL", "STWALL", "DOKGRIR", "COMPBLUE", "A-CONCTE", "A-BROCK2")
_FLOORS = ("FLAT5_4", "FLAT5")
_CEILINGS = ("FLAT19",)
_REGION = 2  # walls change their texture every two cells
_PLAYER_START = 1  # the editor number of the first player's start

Cell = tuple[int, int]


def _neighbours(cell: Cell, side: int) -> list[Cell]:
    """The up to four cells beside `cell` on a grid of side x side."""
    x, y = cell
    beside = ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1))
    return [(i, j) for i, j in beside if 0 <= i < side and 0 <= j < side]


def cell_centre(cell: Cell) -> tuple[float, float]:
    """The map coordinates of a cell's middle."""
    return (cell[0] + 0.5) * CELL, (cell[1] + 0.5) * CELL


@dataclass(frozen=True)
class Maze:
    """A maze of side x side cells; `doors` are the pairs of neighbouring cells with no wall between them."""

    side: int
    doors: frozenset[frozenset[Cell]]

    @classmethod
    def grow(cls, random: np.random.Generator, side: int, loops: float = 0.2) -> Maze:
        """A depth-first maze (every cell can be reached), with each wall opened with probability `loops` besides."""
        doors: set[frozenset[Cell]] = set()
        seen: set[Cell] = {(0, 0)}
        trail: list[Cell] = [(0, 0)]
        while trail:
            fresh = [cell for cell in _neighbours(trail[-1], side) if cell not in seen]
            if not fresh:
                trail.pop()
                continue
            cell = fresh[random.integers(len(fresh))]
            doors.add(frozenset((trail[-1], cell)))
            seen.add(cell)
            trail.append(cell)
        for cell in [(x, y) for x in range(side) for y in range(side)]:
            for other in _neighbours(cell, side):
                if cell < other and random.random() < loops:
                    doors.add(frozenset((cell, other)))
        return cls(side, frozenset(doors))

    def is_open(self, cell: Cell, other: Cell) -> bool:
        """Whether one can walk from `cell` straight into `other`."""
        return frozenset((cell, other)) in self.doors

    def path(self, start: Cell, goal: Cell) -> list[Cell]:
        """The cells of a shortest way from `start` (left out) to `goal`."""
        before: dict[Cell, Cell] = {}
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            for other in _neighbours(cell, self.side):
                if other not in before and other != start and self.is_open(cell, other):
                    before[other] = cell
                    queue.append(other)
        way, cell = [], goal
        while cell != start:
            way.append(cell)
            cell = before[cell]
        return way[::-1]


def map_text(maze: Maze, random: np.random.Generator, start: Cell, angle: int) -> str:
    """The maze as a UDMF text map whose player starts in the middle of `start`, looking at `angle` (degrees, 0 = east).

    Every cell is a sector of its own; a door is one two-sided line, a wall a one-sided line on either side.
    """
    side = maze.side
    regions = -(-side // _REGION)
    # Every texture is used before one comes again, so that a region seldom looks like its neighbour.
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
            beyond = ((i - 1, j), (i, j + 1), (i + 1, j), (i, j - 1))
            for number, other in enumerate(beyond):
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
    """A PWAD with one map, MAP01, whose UDMF text is `text`."""
    lumps = ((b"MAP01", b""), (b"TEXTMAP", text.encode()), (b"ENDMAP", b""))
    body, directory = b"", b""
    for name, content in lumps:
        directory += struct.pack("<ii8s", 12 + len(body), len(content), name)
        body += content
    return struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(body)) + body + directory
