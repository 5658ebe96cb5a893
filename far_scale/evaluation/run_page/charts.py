"""Charts as SVG and HTML: curves over the step, and events over the time.

A plot has its own coordinates, 0 to 1000 in both directions, and the page stretches it to any width. Lines and dots
keep their widths then (`vector-effect`), and all text stands beside the SVG, where it keeps its size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from far_scale.evaluation.run_page.markup import Markup, join, tag

Values = NDArray[np.float64]

POINTS = 1000
"""Maximum number of points of a curve."""
_SIZE = 1000.0


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: for the legend.
        x, y: `[N]`; points that are not finite are left out.
        colour: 1 to 5, one of the page's colours; 0 for grey.
        style: a thin pale line (for raw values), a line, a line with a dot at each point, or a dashed line.
    """

    name: str
    x: Values
    y: Values
    colour: int = 1
    style: str = "line"


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`, with text to be shown by the pointer; `kind` is `stage` or `restart`."""

    x: float
    text: str
    kind: str


def downsample(y: Values, points: int = POINTS) -> NDArray[np.intp]:
    """Indices of at most `points` values to draw: the first, the last, and the extremes of equal parts.

    So every spike stays visible. Values that are not finite are left out.
    """
    finite = np.flatnonzero(np.isfinite(y))
    if len(finite) <= points:
        return finite
    parts = np.array_split(finite, (points - 2) // 2)
    extremes = [part[extreme(y[part])] for part in parts for extreme in (np.argmin, np.argmax)]
    return np.unique(np.array([finite[0], *extremes, finite[-1]], dtype=np.intp))


def smooth(y: Values) -> Values:
    """Moving average of the finite values over a centred fortieth part of the curve; NaN where there are none."""
    radius = max(1, len(y) // 80)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low, high = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(y))
    with np.errstate(invalid="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]))


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Values, margin: float = 0.05, is_log: bool = False, from_zero: bool = False) -> Axis:
        """An axis that holds `values`, with a margin on both sides as a part of their range."""
        if is_log:
            low, high = _widened(float(np.log10(values.min())), float(np.log10(values.max())), margin)
            return cls(10**low, 10**high, is_log=True)
        smallest, largest = float(values.min()), float(values.max())
        low, high = _widened(min(0.0, smallest) if from_zero else smallest, largest, margin)
        return cls(0.0 if from_zero and smallest >= 0 else low, high)

    @overload
    def at(self, value: float) -> float: ...
    @overload
    def at(self, value: Values) -> Values: ...
    def at(self, value: float | Values) -> float | Values:
        """Where values are, from 0 at `low` to 1 at `high`."""
        position: float | Values = (value - self.low) / (self.high - self.low)
        if self.is_log:
            position = np.log(value / self.low) / np.log(self.high / self.low)
        return position

    def ticks(self) -> list[float]:
        """Round values on it."""
        return log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    is_log: bool = False,
    from_zero: bool = False,
    percent: bool = False,
    marks: Sequence[Mark] = (),
    is_wide: bool = False,
) -> Markup:
    """A chart of curves over the step; empty if no curve has a point.

    Args:
        is_log: logarithmic y axis, if all values are positive.
        from_zero: the y axis begins at 0.
        percent: values are fractions, to be shown in percent.
        is_wide: takes the whole width of the page.
    """
    drawn = [(one, downsample(np.where(np.isfinite(one.x), one.y, np.nan))) for one in series]
    drawn = [(one, index) for one, index in drawn if len(index)]
    if not drawn:
        return Markup()
    all_y = np.concatenate([one.y[index] for one, index in drawn])
    x_axis = Axis.around(np.concatenate([one.x[index] for one, index in drawn]), margin=0.0)
    y_axis = Axis.around(all_y, is_log=is_log and bool((all_y > 0).all()), from_zero=from_zero)
    y_ticks, x_ticks = y_axis.ticks(), [x for x in x_axis.ticks() if x == int(x)]

    def points_of(x: Values, y: Values) -> list[str]:
        across, down = _SIZE * x_axis.at(x), _SIZE * (1 - y_axis.at(y))
        return [f"{left:.1f} {top:.1f}" for left, top in zip(across, down, strict=True)]

    grid = "".join(f"M{point}h{_SIZE:g}" for point in points_of(np.full(len(y_ticks), x_axis.low), np.array(y_ticks)))
    paths = [tag("path", d=grid, class_="grid")]
    visible = [mark for mark in marks if x_axis.low < mark.x < x_axis.high]
    for mark in visible:
        line = f"M{_SIZE * x_axis.at(mark.x):.1f} 0v{_SIZE:g}"
        paths.append(tag("path", tag("title", mark.text), d=line, class_=f"mark {mark.kind}"))
    data: dict[str, Any] = {"x": [x_axis.low, x_axis.high], "percent": percent, "series": []}
    for one, index in drawn:
        points = points_of(one.x[index], one.y[index])
        paths.append(tag("path", d="M" + "L".join(points), class_=f"{one.style} c{one.colour}"))
        if one.style == "dots" or len(points) == 1:
            paths.append(tag("path", d="".join(f"M{point}h0" for point in points), class_=f"dot c{one.colour}"))
        values = [[int(x), float(f"{y:.5g}")] for x, y in zip(one.x[index], one.y[index], strict=True)]
        data["series"].append([one.name, values])
    svg = tag(
        "svg", *paths, viewBox=f"0 0 {_SIZE:g} {_SIZE:g}", preserveAspectRatio="none", role="img", aria_label=title
    )
    y_labels = [tag("span", format_number(y, percent), style=f"top:{1 - y_axis.at(y):.2%}") for y in y_ticks]
    x_labels = [tag("span", f"{int(x):,}", style=f"left:{x_axis.at(x):.2%}") for x in x_ticks]
    plot = tag("div", svg, tag("i", class_="cursor"), tag("output"), class_="plot", data_chart=json.dumps(data))
    legend = [tag("span", tag("i", class_=f"key c{one.colour} {one.style}"), one.name) for one, _ in drawn]
    legend += [
        tag("span", tag("i", class_=f"key mark {kind}"), kind) for kind in dict.fromkeys(mark.kind for mark in visible)
    ]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), *(legend if len(legend) > 1 else ())),
        tag("div", tag("div", *y_labels, class_="y"), plot, tag("div", *x_labels, class_="x"), class_="axes"),
        class_="chart wide" if is_wide else "chart",
    )


def raw_and_smoothed(name: str, x: Values, y: Values, colour: int = 1) -> list[Series]:
    """A noisy curve, and its moving average if it has enough points for one."""
    if np.isfinite(y).sum() < 20:
        return [Series(name, x, y, colour)]
    return [Series(name, x, y, colour, "pale"), Series("smoothed", x, smooth(y), colour)]


@dataclass(frozen=True)
class Bar:
    """A time for which something went on, from `start` to `end` in seconds; `kind` names its colour in the page."""

    start: float
    end: float
    text: str
    kind: str


@dataclass(frozen=True)
class Row:
    """A line of a `time_line`; an instant is a bar whose end is its start."""

    name: str
    bars: Sequence[Bar]


def time_line(rows: Sequence[Row], first: float, last: float, ticks: Sequence[tuple[float, str]]) -> Markup:
    """Rows of bars and dots over the time.

    Args:
        first, last: ends of the axis, in seconds.
        ticks: times with their labels.
    """
    axis = Axis(*_widened(first, last, 0.0))
    lines = []
    for row in rows:
        pieces = [
            tag(
                "i",
                title=bar.text,
                class_=f"{'dot' if bar.start == bar.end else 'bar'} {bar.kind}",
                style=f"left:{axis.at(bar.start):.2%};width:{axis.at(bar.end) - axis.at(bar.start):.2%}",
            )
            for bar in row.bars
        ]
        lines.append(join(tag("span", row.name, class_="row"), tag("div", *pieces, class_="track")))
    labels = [tag("span", text, style=f"left:{axis.at(time):.2%}") for time, text in ticks]
    return tag("div", *lines, tag("span", class_="row"), tag("div", *labels, class_="x"), class_="timeline")


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [float(f"{n * step:.12g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [float(f"{tick:.12g}") for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: -(-len(ticks) // 8)]
    return [tick for tick in linear_ticks(low, high) if tick > 0]


def format_number(value: float, percent: bool = False) -> str:
    """A number with at most four digits, and k, M or G for thousands."""
    if percent:
        return f"{value * 100:.3g} %"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if letter != 'k' else 1e3):.4g}{letter}"
    return f"{value:.4g}"


def _widened(low: float, high: float, part: float) -> tuple[float, float]:
    """A range, wider by a part of it on both sides, and never empty."""
    margin = (high - low) * part
    low, high = low - margin, high + margin
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(abs(low) * 0.05, 1e-9)
        return low - margin, high + margin
    return low, high
