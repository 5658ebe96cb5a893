"""How sure a score is: its spread over seeds, and bootstrap intervals over clips."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

_DRAWS, _BLOCK = 2000, 50  # a block of draws is in memory at a time
_PERCENTILES = (2.5, 97.5)


class Spread(NamedTuple):
    """A score over several seeds; `std` (with N - 1 as divisor) is None for a single seed."""

    mean: float
    std: float | None


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


def over_seeds(scores: Sequence[float]) -> Spread:
    """Mean and standard deviation of one score a seed.

    Raises:
        UserError: no scores.
    """
    if not scores:
        raise UserError("spread over seeds: there are no scores")
    return Spread(statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else None)


def bootstrap_interval(per_clip: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """The 95% percentile bootstrap interval (Efron 1979) of the mean of one number a clip.

    Clips are drawn, not frames: the frames of a clip depend on each other. The interval of a growing or falling
    function of the mean, such as the PSNR of the mean squared error, is that function of both ends.

    Args:
        per_clip: `[N]`, such as each clip's mean LPIPS over frames.
        seed: of the draws; the same seed and numbers give the same interval, wherever it is computed.

    Raises:
        UserError: fewer than 2 clips, or values that are not finite.
    """
    values = np.asarray(per_clip, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"bootstrap: values of shape {list(values.shape)}; give one number for each of 2 clips or more")
    if not np.isfinite(values).all():
        raise UserError("bootstrap: values that are not finite; look at these clips")
    blocks = [
        values[generator(seed, "bootstrap", step=block).integers(len(values), size=(_BLOCK, len(values)))].mean(1)
        for block in range(_DRAWS // _BLOCK)
    ]
    low, high = np.percentile(np.concatenate(blocks), _PERCENTILES)
    return Interval(float(low), float(high))
