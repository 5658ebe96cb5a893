"""Pictures of samples beside the truth: a contact sheet of some frames (PNG) and a video grid of all (MP4).

Both are drawn frame by frame, so that a long clip is never in memory as pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, uint8

from far_scale.utils.io import atomic_write

Pixels = NDArray[np.uint8]

GIVEN_COLOUR = (255, 176, 0)  # the border of given frames
LINE_COLOUR = (0, 96, 208)  # where the window no longer reaches back to frame 0
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)
BORDER = 3  # pixels around every frame, coloured where it is given
GAP = 4 * BORDER  # between episodes, and for the line
CAPTION_WIDTH = 64  # left of the rows: "truth", "FAR"
LINE_HEIGHT = 28  # of a line of text
SHEET_CAPTION_HEIGHT = 2 * LINE_HEIGHT  # above the columns: labels and frame numbers
PAST_WINDOW_WIDTH = 160  # of the label "past the window"
SHEET_COLUMNS = 24  # at most; of a longer clip evenly chosen frames are drawn
SHEET_FRAME_HEIGHT = 128  # small frames are enlarged up to this
VIDEO_FRAME_HEIGHT = 192


@dataclass(frozen=True)
class GridSpec:
    """The layout of pictures of some clips.

    Attributes:
        episodes: B clips.
        frames: of a clip, given and predicted ones.
        given: number of given frames.
        window: of the model; from this frame index on, frame 0 is no longer in the window.
        size: height and width of a frame in pixels.
        truth: whether a row of true frames is drawn above the predicted ones.
    """

    episodes: int
    frames: int
    given: int
    window: int
    size: tuple[int, int]
    truth: bool

    @property
    def rows(self) -> list[str]:
        """Labels of an episode's rows, from the top."""
        return ["truth", "FAR"] if self.truth else ["FAR"]


class ContactSheet:
    """A PNG with a row of true frames above a row of predicted ones for each episode; given frames have a border."""

    def __init__(self, grid: GridSpec, captions: Sequence[str] = ()) -> None:
        """`captions`, one an episode, are written above the episodes."""
        self._grid, self._captions = grid, captions
        chosen = np.linspace(0, grid.frames - 1, min(grid.frames, SHEET_COLUMNS)).round().astype(int)
        self._columns = {frame: column for column, frame in enumerate(np.unique(chosen).tolist())}
        self._scale = max(1, SHEET_FRAME_HEIGHT // grid.size[0])
        self._height, self._width = (side * self._scale + 2 * BORDER for side in grid.size)
        self._past = next((frame for frame in self._columns if frame >= grid.window), None)
        right = max(map(self._left, self._columns)) + self._width
        if self._past is not None:
            right = max(right, self._left(self._past) + PAST_WINDOW_WIDTH)
        self._canvas = _blank_canvas(self._top(grid.episodes, 0) - self._caption_height - GAP + BORDER, right + BORDER)
        self._draw_labels()

    def add(self, index: int, truth: Pixels | None, prediction: Pixels, first: int = 0) -> None:
        """Draw frame `index` of the clips from `first` on, both uint8 `[B, H, W, 3]`, if it is one of the columns.

        An unknown truth stays blank.
        """
        if index not in self._columns:
            return
        rows = [truth, prediction] if self._grid.truth else [prediction]
        for row, frames in enumerate(rows):
            for episode, frame in enumerate(() if frames is None else frames, first):
                corner = self._top(episode, row), self._left(index)
                _paste_frame(self._canvas, frame, corner, self._scale, index < self._grid.given)

    def write(self, path: str | Path) -> None:
        """Write the PNG, atomically."""
        with atomic_write(path) as temporary:
            Image.fromarray(self._canvas).save(temporary, format="PNG")

    def _left(self, frame: int) -> int:
        gap = GAP if self._past is not None and frame >= self._past else 0
        return CAPTION_WIDTH + self._columns[frame] * self._width + gap

    @property
    def _caption_height(self) -> int:
        return LINE_HEIGHT if self._captions else 0

    def _top(self, episode: int, row: int) -> int:
        episode_height = self._caption_height + len(self._grid.rows) * self._height + GAP
        return SHEET_CAPTION_HEIGHT + episode * episode_height + self._caption_height + row * self._height

    def _draw_labels(self) -> None:
        grid, middle = self._grid, LINE_HEIGHT // 2
        texts = [_Text(self._left(f) + self._width // 2, LINE_HEIGHT + middle, str(f)) for f in self._columns]
        for episode in range(grid.episodes):
            for row, name in enumerate(grid.rows):
                texts.append(_Text(CAPTION_WIDTH // 2, self._top(episode, row) + self._height // 2, name))
        for episode, caption in enumerate(self._captions):
            texts.append(_Text(self._left(0) + BORDER, self._top(episode, 0) - middle, caption, anchor="lm"))
        if grid.given:
            texts.append(_Text(self._left(0) + BORDER, middle, "given", GIVEN_COLOUR, "lm"))
        if self._past is not None:
            left = self._left(self._past)
            texts.append(_Text(left + BORDER, middle, "past the window", LINE_COLOUR, "lm"))
            self._canvas[:, left - GAP // 2 - 1 : left - GAP // 2 + 1] = LINE_COLOUR
        _write_texts(self._canvas, texts, size=20)


class VideoGrid:
    """The pictures of an MP4: a line of text above a grid of episodes, each with the truth above the prediction."""

    def __init__(self, grid: GridSpec) -> None:
        self._grid = grid
        self._scale = max(1, VIDEO_FRAME_HEIGHT // grid.size[0])
        self._height, self._width = (side * self._scale + 2 * BORDER for side in grid.size)
        grid_rows = max(1, round(math.sqrt(grid.episodes / 4)))  # about 16:9 with two square frames an episode
        self._grid_columns = math.ceil(grid.episodes / grid_rows)
        bottom = self._corner(grid_rows * self._grid_columns, 0)[0]
        self._canvas = _blank_canvas(bottom, CAPTION_WIDTH + self._grid_columns * (self._width + GAP))
        middles = [
            (name, self._corner(episode, row)[0] + self._height // 2)
            for episode in range(0, grid.episodes, self._grid_columns)
            for row, name in enumerate(grid.rows)
        ]
        _write_texts(self._canvas, [_Text(CAPTION_WIDTH // 2, middle, name) for name, middle in middles], size=20)

    def picture(self, index: int, truth: Pixels | None, prediction: Pixels) -> Pixels:
        """The picture of frame `index`; arguments as in `ContactSheet.add`."""
        picture, given = self._canvas.copy(), index < self._grid.given
        rows = [truth, prediction] if self._grid.truth else [prediction]
        for row, frames in enumerate(rows):
            for episode, frame in enumerate(() if frames is None else frames):
                _paste_frame(picture, frame, self._corner(episode, row), self._scale, given)
        texts = [_Text(GAP, LINE_HEIGHT // 2, f"frame {index}", anchor="lm")]
        if given:
            texts.append(_Text(GAP + 85, LINE_HEIGHT // 2, "given", GIVEN_COLOUR, "lm"))
        if index >= self._grid.window:
            texts.append(_Text(GAP + 132, LINE_HEIGHT // 2, "past the window", LINE_COLOUR, "lm"))
        _write_texts(picture[:LINE_HEIGHT], texts, size=16)
        return picture

    def _corner(self, episode: int, row: int) -> tuple[int, int]:
        """(top, left) of a frame's border."""
        episode_height, episode_width = len(self._grid.rows) * self._height + GAP, self._width + GAP
        top = LINE_HEIGHT + episode // self._grid_columns * episode_height + row * self._height
        return top, CAPTION_WIDTH + episode % self._grid_columns * episode_width


def to_uint8(pixels: Tensor) -> Pixels:
    """`[B, 3, h, w]` in 0..1 to uint8 `[B, h, w, 3]`."""
    return (pixels * 255).round().to(uint8).permute(0, 2, 3, 1).contiguous().numpy()


class _Text(NamedTuple):
    """Text at (x, y), with Pillow's anchor: "mm" for the middle, "lm" for the middle of the left side."""

    x: int
    y: int
    text: str
    colour: tuple[int, int, int] = INK
    anchor: str = "mm"


def _blank_canvas(height: int, width: int) -> Pixels:
    """An empty picture, with the even sides that H.264 needs."""
    return np.full((height + height % 2, width + width % 2, 3), BACKGROUND, dtype=np.uint8)


def _paste_frame(canvas: Pixels, frame: Pixels, corner: tuple[int, int], scale: int, given: bool) -> None:
    """Draw an enlarged frame; `corner` is (top, left) of its border."""
    top, left = corner
    enlarged = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = enlarged.shape[:2]
    if given:
        canvas[top : top + height + 2 * BORDER, left : left + width + 2 * BORDER] = GIVEN_COLOUR
    canvas[top + BORDER : top + BORDER + height, left + BORDER : left + BORDER + width] = enlarged


def _write_texts(canvas: Pixels, texts: list[_Text], size: int) -> None:
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for x, y, text, colour, anchor in texts:
        draw.text((x, y), text, fill=colour, font=font, anchor=anchor)
    canvas[:] = np.asarray(picture)
