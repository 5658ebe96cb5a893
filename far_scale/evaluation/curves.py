"""Curves of scores over the frames of a clip, with 95% bootstrap bands over clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from far_scale.evaluation.protocol import Metric
from far_scale.evaluation.results import PAIRED, PerClip, System, Values, mse_to_psnr, psnr_to_mse
from far_scale.evaluation.score_statistics import bootstrap_interval
from far_scale.utils.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:cyan", "tab:pink", "tab:olive")
REPEAT_STYLE = ("0.35", "--")  # colour and line style in all pictures
RECONSTRUCTION_STYLE = ("tab:green", ":")

_LABELS: dict[Metric, str] = {
    "lpips": "LPIPS (lower is better)",
    "psnr": "PSNR in dB (higher is better)",
    "ssim": "SSIM (higher is better)",
}
_PANEL, _TITLE, _LEGEND_LINE = (4.2, 3.4), 0.4, 0.25  # inches: width and height; heights
_MARKERS_UP_TO = 16  # frames; more markers would overlap


@dataclass(frozen=True)
class Curve:
    """A score over the predicted frames: `mean` `[P]` and its band, `low` and `high` (None for a single clip)."""

    mean: Values
    low: Values | None
    high: Values | None


@dataclass(frozen=True)
class Line:
    """The data of one line of the plots, and its style (matplotlib's names)."""

    name: str
    clips: PerClip
    system: System
    colour: str
    dashes: str = "-"


def mean_curve(clips: PerClip, system: System, metric: Metric) -> Curve:
    """The mean over clips at each predicted frame; PSNR over a set is averaged as mean squared error."""
    values = clips.values[system, metric]
    pooled = metric == "psnr" and clips.psnr_of == "set"
    if pooled:
        values = psnr_to_mse(values)
    mean, low, high = values.mean(axis=0), None, None
    if len(values) > 1:
        low, high = np.array([bootstrap_interval(column) for column in values.T]).T
    if pooled:  # a low error is a high PSNR
        mean, low, high = mse_to_psnr(mean), *(None if end is None else mse_to_psnr(end) for end in (high, low))
    return Curve(mean, low, high)


def draw_curves(path: Path, plots: Sequence[tuple[str, Sequence[Line]]]) -> None:
    """Write a PNG atomically: a row of panels for each plot (title and lines), a panel for each metric.

    Without any values no PNG is written, and an existing one of an earlier evaluation is removed.
    """
    from matplotlib.figure import Figure  # imported here: slow, and only needed for pictures

    plots = [(title, lines) for title, lines in plots if _metrics(lines)]
    if not plots:
        path.unlink(missing_ok=True)
        return
    columns = max(len(_metrics(lines)) for _, lines in plots)
    heights = [_PANEL[1] + _TITLE + _LEGEND_LINE * math.ceil(len(lines) / columns) for _, lines in plots]
    figure = Figure(figsize=(_PANEL[0] * columns, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(plots), squeeze=False, height_ratios=heights)[:, 0]
    for row, (title, lines) in zip(rows, plots, strict=True):
        row.suptitle(title, fontsize=12)
        all_axes = row.subplots(1, columns, squeeze=False)[0]
        for axes, metric in zip(all_axes, _metrics(lines), strict=False):
            _draw_panel(axes, metric, lines)
        for axes in all_axes[len(_metrics(lines)) :]:
            axes.set_visible(False)
        named = {
            label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        row.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=min(len(named), columns), frameon=False
        )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _metrics(lines: Sequence[Line]) -> list[Metric]:
    return [metric for metric in PAIRED if any((line.system, metric) in line.clips.values for line in lines)]


def _draw_panel(axes: Axes, metric: Metric, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in lines:
        if (line.system, metric) not in line.clips.values:
            continue
        drawn = mean_curve(line.clips, line.system, metric)
        frames = line.clips.given + np.arange(len(drawn.mean))
        (drawn_line,) = axes.plot(frames, drawn.mean, color=line.colour, linestyle=line.dashes, label=line.name)
        if len(frames) <= _MARKERS_UP_TO:
            drawn_line.set(marker="o", markersize=3.5)
        if drawn.low is not None and drawn.high is not None:
            axes.fill_between(frames, drawn.low, drawn.high, color=line.colour, alpha=0.18, linewidth=0)
    axes.set_title(_LABELS[metric], fontsize=12)
    axes.set_xlabel(f"frame index ({lines[0].clips.given} given)", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
