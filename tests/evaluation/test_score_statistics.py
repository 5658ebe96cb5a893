"""The Frechet distance against closed forms, FVD-infinity, spreads and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from far_scale.evaluation.score_statistics import (
    FeatureStatistics,
    Interval,
    Spread,
    bootstrap_interval,
    bootstrap_ratio,
    frechet_distance,
    frechet_infinity,
    over_seeds,
)
from harness.refusal import refused


def normal(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: Tensor, root: Tensor, seed: int, count: int = 50) -> FeatureStatistics:
    """Of features whose sample mean is `mean` and whose sample covariance is root root^T, exactly."""
    features = normal(count, len(mean), seed)
    features = features - features.mean(0)
    own = torch.linalg.cholesky(features.T @ features / (count - 1))
    return FeatureStatistics.of(mean + features @ torch.linalg.inv(own).T @ root.T)


def test_one_dimension() -> None:
    for mean, std, other_mean, other_std in ((0.0, 1.0, 3.0, 1.0), (1.0, 2.0, 1.0, 0.5), (-2.0, 3.0, 5.0, 7.0)):
        first = with_moments(torch.tensor([mean]).double(), torch.tensor([[std]]).double(), 0)
        second = with_moments(torch.tensor([other_mean]).double(), torch.tensor([[other_std]]).double(), 1)
        expected = (mean - other_mean) ** 2 + (std - other_std) ** 2
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_covariances_that_commute() -> None:
    dim = 12
    stds, others = normal(dim, 1, 2)[:, 0].abs() + 0.1, normal(dim, 1, 3)[:, 0].abs() + 0.1
    shift = normal(dim, 1, 4)[:, 0]
    expected = (shift.square().sum() + (stds - others).square().sum()).item()
    axes, _ = torch.linalg.qr(normal(dim, dim, 5))
    for basis in (torch.eye(dim, dtype=torch.float64), axes):
        first = with_moments(torch.zeros(dim, dtype=torch.float64), basis * stds, 6)
        second = with_moments(shift, basis * others, 7)
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_any_covariances_by_the_eigenvalues_of_their_product() -> None:
    mix = normal(20, 20, 8)
    first, second = normal(300, 20, 9), 0.3 + normal(200, 20, 10) @ mix
    covariances = np.cov(first.numpy(), rowvar=False), np.cov(second.numpy(), rowvar=False)  # ddof 1
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    expected = np.square(first.numpy().mean(0) - second.numpy().mean(0)).sum()
    expected += np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root
    distance = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert distance == pytest.approx(float(expected), rel=1e-9)


def test_equal_sets_are_at_distance_0_also_with_fewer_clips_than_features() -> None:
    for count in (400, 20):
        features = 100 * normal(count, 60, 11)
        statistics = FeatureStatistics.of(features)
        again = FeatureStatistics.of(features.flip(0))
        assert 0 <= frechet_distance(statistics, again) < 1e-8 * statistics.covariance().trace().item()


def test_sets_of_equal_clips_differ_by_their_means() -> None:
    constant, other = FeatureStatistics.of(torch.zeros(5, 30)), FeatureStatistics.of(torch.full((3, 30), 2.0))
    assert frechet_distance(constant, other) == 120
    spread = FeatureStatistics.of(normal(40, 30, 12))
    expected = spread.mean.square().sum().item() + spread.covariance().trace().item()
    assert frechet_distance(constant, spread) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(spread, constant) == pytest.approx(expected, rel=1e-12)


def test_batches_and_merged_parts_give_what_all_at_once_gives() -> None:
    for offset in (0.0, 1e6):  # beside which the spread is small: plain sums of squares would lose 12 digits
        features = normal(101, 8, 12) + offset
        whole = FeatureStatistics.of(features)
        torch.testing.assert_close(
            whole.covariance().numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-9
        )
        parts = [FeatureStatistics(8) for _ in range(3)]
        for i, batch in enumerate(features.split(7)):
            parts[i % 3].add(batch)
        total = FeatureStatistics(8)
        for part in [*parts, FeatureStatistics(8)]:
            total.merge(part)
        assert total.count == 101
        torch.testing.assert_close(total.mean, features.mean(0), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(total.covariance(), whole.covariance(), rtol=1e-8, atol=1e-9)
    single = FeatureStatistics(8)
    single.add(features.float().bfloat16())
    assert single.covariance().dtype == torch.float64


def test_features_that_cannot_be_compared_are_refused() -> None:
    statistics = FeatureStatistics(4)
    refused(lambda: statistics.add(torch.zeros(3, 5)), "[3, 5]", "[clips, 4]")
    refused(lambda: statistics.add(torch.full((2, 4), math.nan)), "not finite")
    statistics.add(torch.zeros(1, 4))
    refused(statistics.covariance, "1 clips", "at least 2")
    refused(lambda: frechet_distance(statistics, FeatureStatistics(5)), "4", "5")


def test_fvd_infinity_removes_the_bias_of_finite_sets() -> None:
    count, dim = 512, 64
    first, second = normal(count, dim, 13), 2 * normal(count + 88, dim, 14) + 0.5
    truth = dim * (1 + 0.25)
    biased = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    reached = frechet_infinity(first, second, seed=0)
    assert biased > truth + 6 and abs(reached - truth) < 3
    assert frechet_infinity(first, second, seed=0) == reached != frechet_infinity(first, second, seed=1)
    refused(lambda: frechet_infinity(first[:511], second, seed=0), "511 clips", "at least 512")
    refused(lambda: frechet_infinity(first, second[:511], seed=0), "511 clips")


def test_spread_over_seeds() -> None:
    assert over_seeds([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(math.sqrt(7)))
    assert over_seeds([5.0]) == Spread(5.0, None)
    refused(lambda: over_seeds([]), "no scores")


def test_bootstrap_intervals_hold_the_true_mean_in_19_of_20_cases() -> None:
    random = np.random.default_rng(0)
    cases = [(random.exponential(size=80), 1.0) for _ in range(200)] + [
        (random.normal(size=80), 0.0) for _ in range(200)
    ]
    held = [low <= truth <= high for values, truth in cases for low, high in [bootstrap_interval(values)]]
    assert 0.90 < np.mean(held) < 0.98
    values = cases[0][0]
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(80), rel=0.1)
    assert bootstrap_interval(values) == bootstrap_interval(list(values)) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([2.0, 2.0]) == Interval(2.0, 2.0)
    refused(lambda: bootstrap_interval([1.0]), "2 clips or more")
    refused(lambda: bootstrap_interval([1.0, math.inf]), "not finite")


def test_the_interval_of_a_ratio_draws_the_same_clips_of_both_sides() -> None:
    random = np.random.default_rng(0)
    other = random.uniform(0.1, 5, 30)
    assert bootstrap_ratio(0.7 * other, other) == pytest.approx(
        Interval(0.7, 0.7)
    )  # clips differ, their ratio does not
    assert bootstrap_ratio(other, np.ones(30)) == pytest.approx(bootstrap_interval(other))
    truth = 0.8  # of sums over many clips
    held = []
    for _ in range(200):
        clips = random.uniform(0.1, 5, 40)
        low, high = bootstrap_ratio(truth * clips * random.uniform(0.5, 1.5, 40), clips, seed=1)
        held.append(low <= truth <= high)
    assert 0.88 <= np.mean(held) <= 0.99
    refused(lambda: bootstrap_ratio([1.0, math.nan], [1.0, 1.0]), "not finite")
