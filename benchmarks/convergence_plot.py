"""The curves of convergence.py as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import Row

from far_scale.evaluation.score_statistics import bootstrap_interval
from far_scale.utils.io import atomic_write

COLOURS = {
    "FAR": "tab:blue",
    "Video DiT": "tab:red",
    "FAR without clean frames": "tab:green",
    "Diffusion Forcing": "tab:purple",
}


def draw(path: Path, rows: Sequence[Row], baseline: Sequence[Row]) -> None:
    """LPIPS against steps and FLOPs and PSNR against steps, with the range over seeds; the long clips' last scores."""
    from matplotlib.figure import Figure  # imported here: slow, and only wanted for this picture

    figure = Figure(figsize=(12, 8), layout="constrained")
    (by_steps, by_flops), (of_psnr, of_long) = figure.subplots(2, 2)
    _curves(by_steps, rows, "steps", "LPIPS", baseline)
    _curves(by_flops, rows, "train TFLOP", "LPIPS", baseline)
    _curves(of_psnr, rows, "steps", "PSNR", baseline)
    by_steps.set(
        xlabel="steps", ylabel="LPIPS (lower is better)", title="8 frames given, 8 predicted; shaded: range over seeds"
    )
    by_flops.set(xlabel="training arithmetic (TFLOP)", ylabel="LPIPS (lower is better)")
    of_psnr.set(xlabel="steps", ylabel="PSNR (dB, higher is better)")
    by_steps.legend(frameon=False, fontsize=8)
    for axes in (by_steps, by_flops, of_psnr, of_long):
        axes.grid(alpha=0.3)
    if long_sides := [side for side in dict.fromkeys(row["side"] for row in rows) if side not in COLOURS]:
        _long_clips(of_long, long_sides, rows, baseline)
    else:
        of_long.remove()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _curves(axes: Any, rows: Sequence[Row], x: str, metric: str, baseline: Sequence[Row]) -> None:
    for side, colour in COLOURS.items():
        own = [row for row in rows if row["side"] == side]
        if not own:
            continue
        at = sorted({row[x] for row in own})
        values = [[row[metric] for row in own if row[x] == place] for place in at]
        axes.plot(at, [statistics.fmean(each) for each in values], color=colour, marker="o", markersize=3, label=side)
        axes.fill_between(at, [min(each) for each in values], [max(each) for each in values], color=colour, alpha=0.15)
    axes.axhline(baseline[0][metric], color="grey", linestyle=":", label="last given frame repeated")


def _long_clips(axes: Any, sides: Sequence[str], rows: Sequence[Row], baseline: Sequence[Row]) -> None:
    """Each side's last score, the mean over seeds, with the 95% interval over clips."""
    for place, side in enumerate(sides):
        last = max(row["steps"] for row in rows if row["side"] == side)
        own = [row["per clip"]["LPIPS"] for row in rows if row["side"] == side and row["steps"] == last]
        per_clip = [statistics.fmean(clip) for clip in zip(*own, strict=True)]
        mean, interval = statistics.fmean(per_clip), bootstrap_interval(per_clip)
        error = [[mean - interval.low], [interval.high - mean]]
        axes.errorbar([mean], [place], xerr=error, fmt="o", color="tab:blue", capsize=3)
    axes.axvline(baseline[1]["LPIPS"], color="grey", linestyle=":", label="last given frame repeated")
    axes.set_yticks(range(len(sides)), [side.removeprefix("long clips, ") for side in sides])
    axes.set(xlabel="LPIPS, 95% interval over clips", title="clips of 32 frames, 24 given, 8 predicted")
    axes.legend(frameon=False, fontsize=8)
