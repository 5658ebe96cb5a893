"""Pictures one can look at: samples beside the truth as PNG and MP4, and the loss curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from far_scale.data.videos import write_mp4
from far_scale.errors import UserError
from far_scale.files import atomic_write

Pixels = NDArray[np.uint8]

GIVEN_COLOUR = (255, 176, 0)  # the border of given frames
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)
BORDER = 3  # pixels around every frame, coloured where it is given
CAPTION_WIDTH = 40  # left of the rows: "truth", "FAR"
CAPTION_HEIGHT = 16  # above the columns: frame numbers
SHEET_COLUMNS = 24  # of a longer clip the sheet shows this many frames, evenly chosen
SHEET_FRAME_HEIGHT = 128  # small frames are enlarged up to this
VIDEO_SCALE = 3


def sample_sheet(path: str | Path, truth: Pixels | None, prediction: Pixels, given: int) -> None:
    """Write a PNG: for each episode a row of true frames above a row of predicted ones, given frames bordered.

    Args:
        path: the PNG, written atomically.
        truth: uint8 `[B, F, H, W, 3]`, or None where the truth is not known (then there is only the second row).
        prediction: uint8 `[B, F, H, W, 3]`, the given frames first.
        given: how many of the F frames were given.
    """
    rows = _rows(truth, prediction)
    scale = max(1, SHEET_FRAME_HEIGHT // prediction.shape[2])
    count = prediction.shape[1]
    columns = np.unique(np.linspace(0, count - 1, min(count, SHEET_COLUMNS)).round().astype(int)).tolist()
    height, width = (size * scale + 2 * BORDER for size in prediction.shape[2:4])
    gap = 4 * BORDER  # below each episode
    episode_height = len(rows) * height + gap
    sheet = _canvas(
        CAPTION_HEIGHT + len(prediction) * episode_height - gap + BORDER,
        CAPTION_WIDTH + len(columns) * width + BORDER,
    )
    captions = [
        (CAPTION_WIDTH + column * width + width // 2, CAPTION_HEIGHT // 2, str(frame))
        for column, frame in enumerate(columns)
    ]
    for episode in range(len(prediction)):
        for row, (name, clips) in enumerate(rows):
            top = CAPTION_HEIGHT + episode * episode_height + row * height
            captions.append((CAPTION_WIDTH // 2, top + height // 2, name))
            for column, frame in enumerate(columns):
                _put(sheet, clips[episode, frame], top, CAPTION_WIDTH + column * width, scale, frame < given)
    picture = Image.fromarray(_write(sheet, captions))
    with atomic_write(path) as beside:
        picture.save(beside, format="PNG")


def sample_video(path: str | Path, truth: Pixels | None, prediction: Pixels, given: int, fps: float) -> None:
    """Write an MP4: a grid of episodes, each the truth above the prediction, frames enlarged threefold.

    Arguments as those of `sample_sheet`; the border is coloured for as long as given frames are shown.
    """
    rows = _rows(truth, prediction)
    episodes, count = prediction.shape[:2]
    height, width = (size * VIDEO_SCALE + 2 * BORDER for size in prediction.shape[2:4])
    grid_rows = max(1, round(math.sqrt(episodes / 4)))  # about 16:9 with two square frames an episode
    grid_columns = math.ceil(episodes / grid_rows)
    gap = 4 * BORDER
    episode_height, episode_width = len(rows) * height + gap, width + gap
    canvas = _canvas(grid_rows * episode_height, CAPTION_WIDTH + grid_columns * episode_width)
    captions = [
        (CAPTION_WIDTH // 2, grid_row * episode_height + row * height + height // 2, name)
        for grid_row in range(grid_rows)
        for row, (name, _) in enumerate(rows)
    ]
    frames = np.repeat(_write(canvas, captions)[None], count, axis=0)
    for frame, picture in enumerate(frames):
        for episode in range(episodes):
            top = episode // grid_columns * episode_height
            left = CAPTION_WIDTH + episode % grid_columns * episode_width
            for row, (_, clips) in enumerate(rows):
                _put(picture, clips[episode, frame], top + row * height, left, VIDEO_SCALE, frame < given)
    write_mp4(Path(path), frames, fps)


def loss_curve(path: str | Path, log: str | Path) -> None:
    """Draw the loss (logarithmic axis) and the learning rate over the steps of a JSONL log as a PNG.

    A line of the log is an object with `step`, `loss` and `learning_rate`; lines without a loss are left out, and of
    a step that was logged twice (a resumed run) the last line counts.

    Raises:
        UserError: the log is not there, has a line that is no JSON, or holds no loss.
    """
    from matplotlib.figure import Figure  # imported here: slow, and only wanted for this picture
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    entries = _read_log(Path(log))
    steps = sorted(entries)
    losses = [entries[step][0] for step in steps]
    figure = Figure(figsize=(8, 5), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss")
    loss_axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=1.8, label="smoothed")
    loss_axes.set_yscale("log")
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    loss_axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    loss_axes.yaxis.set_minor_formatter(NullFormatter())
    loss_axes.set_ylabel("loss")
    loss_axes.legend(frameon=False)
    rate_axes.plot(steps, [entries[step][1] for step in steps], color="tab:orange", linewidth=1.5)
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def _rows(truth: Pixels | None, prediction: Pixels) -> list[tuple[str, Pixels]]:
    """The named rows of an episode, the truth first."""
    if truth is None:
        return [("FAR", prediction)]
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} must have one shape")
    return [("truth", truth), ("FAR", prediction)]


def _canvas(height: int, width: int) -> Pixels:
    """An empty picture with even sides, as H.264 needs them."""
    return np.full((height + height % 2, width + width % 2, 3), BACKGROUND, dtype=np.uint8)


def _put(canvas: Pixels, frame: Pixels, top: int, left: int, scale: int, given: bool) -> None:
    """Enlarge a frame into the canvas; (top, left) is the corner of its border."""
    enlarged = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = enlarged.shape[:2]
    if given:
        canvas[top : top + height + 2 * BORDER, left : left + width + 2 * BORDER] = GIVEN_COLOUR
    canvas[top + BORDER : top + BORDER + height, left + BORDER : left + BORDER + width] = enlarged


def _write(canvas: Pixels, captions: list[tuple[int, int, str]]) -> Pixels:
    """The canvas with each caption centred on its (x, y)."""
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=12)
    for x, y, text in captions:
        draw.text((x, y), text, fill=INK, font=font, anchor="mm")
    return np.array(picture)


def _read_log(log: Path) -> dict[int, tuple[float, float]]:
    """(loss, learning rate) by step."""
    if not log.is_file():
        raise UserError(f"{log}: there is no training log here")
    entries: dict[int, tuple[float, float]] = {}
    for number, line in enumerate(log.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            if "loss" in entry:
                entries[int(entry["step"])] = (float(entry["loss"]), float(entry["learning_rate"]))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{log}: line {number} is no entry with step, loss and learning_rate; remove it") from None
    if not entries:
        raise UserError(f"{log}: no line holds a loss; train for at least one logging interval")
    return entries


def _smoothed(values: list[float]) -> NDArray[np.float64]:
    """The mean over a centred stretch of a twentieth of the curve, shorter at the ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))
