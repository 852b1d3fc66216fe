"""Asymptotic intervals: what they rest on against closed forms of Gaussians, and that they hold where they are read again and again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from monitoring.asymptotic import READINGS, Real, Spread, frechet_interval, moments_spread
from monitoring.points import directions, kernel, kernel_distance, sliced_wasserstein
from training.moments import frechet

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_monitoring import asymptotic_intervals, embedded_intervals  # noqa: E402
from gaussians import distances, draw, kid  # noqa: E402

TURN = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
SPREADS = np.array([3.0, 1.0, 0.5, 0.1])
LAW = (np.array([1.0, -2.0, 0.0, 0.5]), (TURN * SPREADS) @ TURN.T)


def test_the_spread_of_a_fitted_gaussian_is_that_of_its_formula():
    """Covariance of normal moments: l_a l_b (1 + [a = b]) for y_a y_b, uncorrelated, but that y_a y_b and y_b y_a are one."""
    sums = SPREADS[:, None] + SPREADS
    parts = np.outer(SPREADS, SPREADS) * (1 + np.eye(4)) / (2 * sums)
    found = moments_spread(draw(np.random.default_rng(0), 800, LAW))
    assert found.trace == pytest.approx(SPREADS.sum() + parts.sum(), rel=0.1)
    assert found.largest == pytest.approx(SPREADS[0], rel=0.15)  # of the parts, the largest is that of a pair counted twice, 3 / 4


def test_first_order_terms_are_those_of_the_distance():
    """W2 from N(m, S) to what is fitted to samples, whose squared mean is tr G / n."""
    n, mean = 4000, LAW[0]
    found = []
    for seed in range(40):
        x = draw(np.random.default_rng((seed, 1)), n, LAW).astype(np.float64)
        found.append(n * frechet(mean, LAW[1], x.mean(axis=0), np.cov(x.T, bias=True))[0])
    trace = moments_spread(draw(np.random.default_rng(0), 800, LAW)).trace
    assert np.mean(found) == pytest.approx(trace, abs=3 * np.std(found) / np.sqrt(len(found)) + 0.1 * trace)


def test_features_that_never_vary_have_no_part_in_it():
    x = draw(np.random.default_rng(0), 200, LAW)
    still = np.concatenate([x, np.full((200, 2), 7, np.float32)], axis=1)
    assert moments_spread(still) == pytest.approx(moments_spread(x), rel=1e-4)
    assert moments_spread(np.full((200, 2), 7, np.float32)) == (0, 0)


@pytest.mark.parametrize(("n", "rank", "scale"), [(2, 2, 1.0), (3, 1, 1.0), (3, 2, 1e9), (64, 1, 1e-9), (300, 5, 1.0), (300, 300, 1.0)])
def test_the_largest_eigenvalue_is_the_last_of_all(n, rank, scale):
    x = scale * np.random.default_rng(n + rank).standard_normal((n, rank))
    centred = x - x.mean(axis=0)
    assert Spread.of(x @ x.T).largest == pytest.approx(np.linalg.eigvalsh(centred @ centred.T)[-1] / (n - 1), rel=1e-9)


def test_a_mean_stays_within_reach():
    """Of 400 streams the mean of 3-vectors is looked at 100 times each; at one moment its bound is at most twice what would do."""
    rng, spread, delta = np.random.default_rng(4), Spread(1.75, 1.0), 0.05
    means = np.cumsum(rng.standard_normal((400, 1000, 3)) * np.sqrt([1.0, 0.5, 0.25]), axis=1) / np.arange(1, 1001)[:, None]
    length = np.linalg.norm(means, axis=2)
    ever = (length[:, 9::10] > [spread.reach(n, delta=delta) for n in range(10, 1001, 10)]).any(axis=1).mean()
    assert ever <= delta
    now = spread.reach_now(1000.0, delta=delta)
    assert (length[:, -1] > now).mean() <= delta < (length[:, -1] > now / 2).mean()
    assert spread.reach_now(1000.0, delta=delta) < spread.reach(1000, delta=delta)


def test_the_root_of_the_distance_moves_by_the_error():
    assert frechet_interval(0.25, 0.1) == pytest.approx((0.16, 0.36)) and frechet_interval(0.25, 0.6) == pytest.approx((0.0, 1.21))


def test_the_closed_form_of_kid_is_what_many_points_read():
    other, rng = (LAW[0] + 0.5, 1.3 * LAW[1]), np.random.default_rng(2)
    a, b = draw(rng, 2000, LAW), draw(rng, 2000, other)
    assert kernel_distance(a, b) == pytest.approx(kid(LAW, other), rel=0.2) and kid(LAW, LAW) == pytest.approx(0, abs=1e-9)
    assert kernel(a[:1], b[:1])[0, 0] == pytest.approx((float(a[0].astype(float) @ b[0]) / 4 + 1) ** 3)


def test_far_laws_are_told_from_near_ones():
    """Of 512 points against 1,024: what is far is known to be, what is the same may be zero, and an interval holds its estimate."""
    rng, zero = np.random.default_rng(6), np.zeros(8)
    real = Real(draw(rng, 1024, (zero, np.eye(8))))
    for shift, apart in ((0.0, False), (1.0, True)):
        served = draw(rng, 512, (zero + shift, np.eye(8)))
        for interval, estimate in ((real.kid_interval, kernel_distance), (real.sliced_wasserstein_interval, sliced_wasserstein)):
            value = estimate(served, real.points)
            low, high = interval(value, served, delta=0.05 / READINGS)
            assert low <= max(0.0, value) <= high and (low > 0) == apart
    near, far = (distances((zero, np.eye(8)), (zero + shift, np.eye(8)), directions(8)) for shift in (0.0, 1.0))
    assert max(near.values()) == pytest.approx(0, abs=1e-9) and far["frechet"] == pytest.approx(8.0)


@pytest.mark.slow
def test_intervals_hold_at_every_look():
    """They are careful, so that not one of these runs may miss: where a quarter did, all 12 would hold once in 30 times."""
    for row in asymptotic_intervals(12) + embedded_intervals(4, block=500):
        assert row["missed"] == 0 and row["width"] < row["most"], row


@pytest.mark.slow
def test_intervals_of_a_tenth_of_the_width_do_not_hold():
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))[0]
    covariance = (turn * np.geomspace(3, 0.1, 8)) @ turn.T
    zero, one = (np.zeros(8), covariance), (np.full(8, 0.4), 1.3 * covariance)
    true, narrow = distances(zero, one, directions(8)), dict.fromkeys(("frechet", "kid", "sliced_wasserstein"), 0)
    for run in range(12):
        rng = np.random.default_rng((run, 17))
        served, real = draw(rng, 512, one), Real(draw(rng, 1024, zero))
        distance = frechet(*zero, served.mean(axis=0, dtype=np.float64), np.cov(served.T.astype(np.float64)))[0]
        kid_, sliced = kernel_distance(served, real.points), sliced_wasserstein(served, real.points)
        stated = {
            "frechet": (distance, *frechet_interval(distance, moments_spread(served).reach(512, delta=0.05))),
            "kid": (kid_, *real.kid_interval(kid_, served, delta=0.05 / READINGS)),
            "sliced_wasserstein": (sliced, *real.sliced_wasserstein_interval(sliced, served, delta=0.05 / READINGS)),
        }
        for gauge, (value, low, high) in stated.items():
            assert low <= true[gauge] <= high
            narrow[gauge] += not value - (value - low) / 10 <= true[gauge] <= value + (high - value) / 10
    assert all(narrow.values()), narrow
