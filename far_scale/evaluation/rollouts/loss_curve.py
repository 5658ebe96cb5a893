"""Draws the loss curve of a run, with its validation losses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, read_json_lines


def draw_loss_curve(path: str | Path, log: str | Path) -> None:
    """Draw the loss (logarithmic axis) and the learning rate over the steps of a JSONL log as a PNG.

    A line of the log is an object with `step`, `loss` and `learning_rate`; lines without a loss are left out, and of
    a step that was logged twice (a resumed run) the last line counts. Validation losses in the log are drawn, too.

    Raises:
        UserError: the log is missing, has a line that is not a JSON object, or holds no loss.
    """
    from matplotlib.figure import Figure  # imported here: slow, and only needed for this picture
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    entries = _read_log(Path(log))
    steps = sorted(entries)
    losses = [entries[step][0] for step in steps]
    figure = Figure(figsize=(8, 5), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss")
    loss_axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=1.8, label="smoothed")
    held_out = validation_losses(log)
    for key, name, colour in (("weights", "held-out", "tab:red"), ("ema", "held-out, EMA", "tab:green")):
        points = [(step, validation[key]) for step, validation in held_out.items() if key in validation]
        if points:
            loss_axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=1.2, marker="o", markersize=3, label=name
            )
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
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def validation_losses(log: str | Path) -> dict[int, dict[str, float]]:
    """The finite losses on held-out clips in a log by step, of the `weights` and of the `ema`."""
    by_step: dict[int, dict[str, float]] = {}
    for line in read_json_lines(log):
        values = line.get("validation") if line is not None else None
        if line is None or not isinstance(values, dict):
            continue
        losses = {key: values[key].get("loss") for key in ("weights", "ema") if isinstance(values.get(key), dict)}
        finite = {key: loss for key, loss in losses.items() if isinstance(loss, float) and math.isfinite(loss)}
        if finite and type(line.get("step")) is int:
            by_step[line["step"]] = finite
    return dict(sorted(by_step.items()))


def _read_log(log: Path) -> dict[int, tuple[float, float]]:
    """(loss, learning rate) by step."""
    if not log.is_file():
        raise UserError(f"{log}: there is no training log here")
    entries: dict[int, tuple[float, float]] = {}
    for number, entry in enumerate(read_json_lines(log), start=1):
        try:
            if entry is None:
                raise ValueError
            if entry.get("loss") is not None:  # null stands for a loss that was not finite
                values = float(entry["loss"]), float(entry["learning_rate"])
                if all(map(math.isfinite, values)):
                    entries[int(entry["step"])] = values
        except (ValueError, TypeError, KeyError, OverflowError):
            raise UserError(f"{log}: line {number} is no entry with step, loss and learning_rate; remove it") from None
    if not entries:
        raise UserError(f"{log}: no line holds a loss; train for at least one logging interval")
    return entries


def _smoothed(values: list[float]) -> NDArray[np.float64]:
    """Moving average over a centred twentieth of the curve, shorter at the ends."""
    radius = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))
