"""Frechet distances for FVD, and the uncertainty of scores: their std over seeds, bootstrap intervals over clips.

    d(1, 2) = |mean_1 - mean_2|^2 + trace(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2))

The Frechet distance, in float64, is biased: it is positive for finite sets of one distribution, and larger for smaller
sets. Scores of different numbers of clips must never be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

MIN_CLIPS_TO_EXTRAPOLATE = (
    512  # with fewer, subsets are far smaller than the 400 logits, and the distance is not linear in 1/N
)
_SUBSETS = 15  # as Chong and Forsyth


class FeatureStatistics:
    """Mean and covariance of features that come in batches, in the memory of the covariance."""

    def __init__(self, dim: int) -> None:
        """For features of `dim` numbers."""
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # about the mean

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """The statistics of `[N, dim]` features."""
        statistics = cls(features.shape[1])
        statistics.add(features)
        return statistics

    def add(self, features: Tensor) -> None:
        """Add `[N, dim]` features of any device and floating dtype.

        Raises:
            UserError: features of another shape, or that are not finite.
        """
        dim = len(self.mean)
        if features.ndim != 2 or features.shape[1] != dim:
            raise UserError(f"Frechet distance: features of shape {list(features.shape)}; give [clips, {dim}]")
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise UserError("Frechet distance: features that are not finite; look at the videos or the network")
        if len(features):
            mean = features.mean(0)
            centred = features - mean
            self._join(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the features of `other`."""
        if other.count:
            self._join(other.count, other.mean, other._scatter)

    def covariance(self) -> Tensor:
        """`[dim, dim]`, with N - 1 as divisor, as in the official code.

        Raises:
            UserError: fewer than 2 features.
        """
        if self.count < 2:
            raise UserError(f"Frechet distance: {self.count} clips; a covariance takes at least 2")
        return self._scatter / (self.count - 1)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Add a batch's moments (Chan, Golub and LeVeque 1979): exact even where the mean is large beside the std."""
        total, shift = self.count + count, mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The squared distance of normal distributions with these moments, as FID and FVD report it.

    Raises:
        UserError: fewer than 2 features of one of them, or features of different lengths.
    """
    if len(first.mean) != len(second.mean):
        raise UserError(f"Frechet distance: features of {len(first.mean)} and of {len(second.mean)} numbers")
    covariance, other = first.covariance(), second.covariance()
    # (cov_1 cov_2)^(1/2) has the trace of (R' cov_2 R)^(1/2), where cov_1 = R R': a symmetric matrix, so that eigh
    # replaces a general matrix root, which may diverge for a singular covariance.
    values, vectors = _eigh(covariance)
    root = vectors * values.sqrt()
    trace = _eigh(root.T @ other @ root)[0].sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + covariance.trace() + other.trace() - 2 * trace
    return max(distance.item(), 0.0)


def frechet_infinity(first: Tensor, second: Tensor, seed: int) -> float:
    """The distance extrapolated to infinitely many clips (Chong and Forsyth 2020, arXiv 1911.07023): FVD-infinity.

    Subsets of N clips of both sets, N from half of the smaller set to all of it in even steps of 1/N, are drawn
    without replacement; the distances are fitted by a line in 1/N, whose value at 0 is the result. It may be below 0
    where the sets are equally distributed.

    Args:
        first, second: features `[clips, dim]`.
        seed: of the draws.

    Raises:
        UserError: fewer than 512 clips in a set.
    """
    largest = min(len(first), len(second))
    if largest < MIN_CLIPS_TO_EXTRAPOLATE:
        raise UserError(
            f"FVD-infinity: {largest} clips; it needs at least {MIN_CLIPS_TO_EXTRAPOLATE} of each set, "
            "so generate more or report FVD with its number of clips"
        )
    sizes = np.rint(1 / np.linspace(2 / largest, 1 / largest, _SUBSETS)).astype(int)
    distances = [
        frechet_distance(
            _subset_statistics(first, size, seed, number, lane=0),
            _subset_statistics(second, size, seed, number, lane=1),
        )
        for number, size in enumerate(sizes)
    ]
    return float(np.polynomial.Polynomial.fit(1 / sizes, distances, 1)(0.0))


def _subset_statistics(features: Tensor, size: int, seed: int, number: int, lane: int) -> FeatureStatistics:
    """The statistics of `size` features: draw `number` from set `lane`."""
    order = generator(seed, "frechet-infinity", step=number, lane=lane).permutation(len(features))
    return FeatureStatistics.of(features[torch.from_numpy(order[:size])])


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a positive semi-definite matrix, without those that are only rounding errors.

    A singular covariance (fewer clips than numbers) has eigenvalues of +-1e-16 of the largest, whose roots, 1e-8,
    would add up.
    """
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    largest = values[-1:].clamp(min=0)  # empty where the set's clips are all equal
    significant = values > len(values) * torch.finfo(values.dtype).eps * largest
    return values[significant], vectors[:, significant]


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
    """Mean and std of one score a seed.

    Raises:
        UserError: no scores.
    """
    if not scores:
        raise UserError("spread over seeds: there are no scores")
    return Spread(statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else None)


def bootstrap_interval(per_clip: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """The 95% percentile bootstrap interval (Efron 1979) of the mean of one number a clip.

    Clips are resampled, not frames: the frames of a clip depend on each other. The interval of a monotonic function of
    the mean, such as the PSNR of the mean squared error, is that function of both ends.

    Args:
        per_clip: `[N]`, such as each clip's mean LPIPS over frames.
        seed: of the draws; the interval is the same on every machine.

    Raises:
        UserError: fewer than 2 clips, or values that are not finite.
    """
    values = _checked(per_clip)
    return _interval(_resampled_means(values[:, None], seed)[:, 0])


def bootstrap_ratio(
    per_clip: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray, seed: int = 0
) -> Interval:
    """As `bootstrap_interval`, of the ratio of two sums over the same clips: a draw takes the same clips of both.

    Args:
        per_clip: `[N]`, such as each clip's summed LPIPS by one model.
        other: `[N]`, by the model that it is compared with; above 0.
        seed: of the draws.

    Raises:
        UserError: as `bootstrap_interval`.
    """
    means = _resampled_means(np.stack([_checked(per_clip), _checked(other)], axis=1), seed)
    return _interval(means[:, 0] / means[:, 1])


def _checked(per_clip: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(per_clip, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"bootstrap: values of shape {list(values.shape)}; give one number for each of 2 clips or more")
    if not np.isfinite(values).all():
        raise UserError("bootstrap: values that are not finite; look at these clips")
    return values


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means `[draws, K]` of the rows of `[N, K]`, drawn with replacement."""
    blocks = [
        values[generator(seed, "bootstrap", step=block).integers(len(values), size=(_BLOCK, len(values)))].mean(1)
        for block in range(_DRAWS // _BLOCK)
    ]
    return np.concatenate(blocks)


def _interval(draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, _PERCENTILES)
    return Interval(float(low), float(high))
