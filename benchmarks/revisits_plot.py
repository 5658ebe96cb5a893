"""The result of revisits.py as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import Row
from numpy.typing import NDArray

from far_scale.utils.io import atomic_write

_EXAMPLES = 6


def draw(
    path: Path,
    rows: Sequence[Row],
    gaps: NDArray[np.int64],
    truth: NDArray[np.uint8],
    remembering: NDArray[np.uint8],
    forgetting: NDArray[np.uint8],
) -> None:
    """LPIPS by how long ago a place was seen, and examples.

    Args:
        rows: of the groups by gap.
        gaps: `[N, F]` of all predicted frames, 0 where one does not revisit a place.
        truth, remembering, forgetting: `[N, F, h, w, 3]`, the pixels of these frames.
    """
    from matplotlib.figure import Figure  # imported here: slow, and only wanted for this picture

    figure = Figure(figsize=(12, 3.9), layout="constrained")
    axes, sheet = figure.subplots(1, 2, width_ratios=(1, 1.55))
    places = np.arange(len(rows))
    for side, colour in (("without", "tab:red"), ("with context", "tab:blue")):
        axes.plot(places, [row[side] for row in rows], color=colour, marker="o", label=side)
    axes.plot(places, [row["last given frame"] for row in rows], color="grey", linestyle=":", label="last given frame")
    axes.set_xticks(
        places,
        [_gap(row) for row in rows],
    )
    axes.set(xlabel="frames since a given frame saw the place", ylabel="LPIPS (lower is better)", ylim=(0, None))
    axes.set_title("places seen again that left the window", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)

    chosen = _examples(gaps)
    clips, frames = zip(*chosen, strict=True)
    images = [np.concatenate(list(side[clips, frames]), axis=1) for side in (truth, remembering, forgetting)]
    sheet.imshow(np.concatenate(images, axis=0), interpolation="nearest")
    height, width = truth.shape[2:4]
    sheet.set_yticks(height * (np.arange(3) + 0.5), ["truth", "with context", "without"])
    sheet.set_xticks(width * (np.arange(len(chosen)) + 0.5), [f"{gaps[at]} frames ago" for at in chosen], fontsize=8)
    sheet.tick_params(length=0)
    sheet.set_title("the same frames; the first of each clip that comes back to a place", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _gap(row: Row) -> str:
    name: str = row["frames that show a place"]
    return name.removeprefix("last seen ").removesuffix(" frames ago")


def _examples(gaps: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Clip and frame of the first revisiting frame of the first clips: chosen without a look at the result."""
    of_clips = [(clip, int(np.flatnonzero(row)[0])) for clip, row in enumerate(gaps) if row.any()]
    return of_clips[:_EXAMPLES]
