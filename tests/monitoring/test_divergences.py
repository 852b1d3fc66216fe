"""Closed forms, other people's implementations, and the promise of each interval: it holds all over the confidence set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import entropy

from monitoring.divergences import (
    DIVERGENCES,
    INTERVALS,
    ShareSet,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    smoothed,
    total_variation,
)

JEFFREYS = np.full((1, 4), 0.5)


def shares(*weights: float) -> np.ndarray:
    return np.array(weights, float) / sum(weights)


def test_against_scipy():
    p, q = shares(1, 2, 3, 4), shares(4, 1, 1, 2)
    assert forward_kl(p, q) == pytest.approx(entropy(p, q))
    assert reverse_kl(p, q) == pytest.approx(entropy(q, p))
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q) ** 2)
    assert DIVERGENCES["chi_squared"](p, q) == pytest.approx((q**2 / p).sum() - 1)
    assert total_variation(p, q) == pytest.approx(0.5 - 0.1)  # the excess of q is all on the first cell
    assert all(d(p, p) == pytest.approx(0, abs=1e-15) for d in DIVERGENCES.values())


def test_a_lost_mode_and_fakes_leave_their_marks():
    p = shares(3, 3, 3, 1)  # the last cell is off-manifold
    lost = shares(0, 3, 3, 1)
    assert forward_kl(p, lost) == np.inf
    assert reverse_kl(p, lost) == pytest.approx(np.log(1 / 0.7))  # not above log 1 / (1 - pi)
    rare = shares(0.003, 3, 3, 1)
    fakes = 0.7 * p + 0.3 * shares(0, 0, 0, 1)
    assert forward_kl(p, rare) > 3 * reverse_kl(p, rare)
    assert reverse_kl(p, fakes) > forward_kl(p, fakes)


def test_smoothed():
    np.testing.assert_allclose(smoothed(np.array([0, 3])), [0.5 / 4, 3.5 / 4])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    st.lists(st.integers(0, 300), min_size=4, max_size=4).filter(any),
    st.integers(0, 2**32 - 1),
)
def test_every_law_of_the_set_lies_within_every_interval(weights, counts, seed):
    p, observed = shares(*weights), ShareSet.observed(np.array(counts), priors=JEFFREYS, delta=0.05)
    rng = np.random.default_rng(seed)
    # From the centre towards random laws, vertices and p, as far as the set reaches.
    goals = np.concatenate([rng.dirichlet(np.full(4, 0.3), 30), 0.999 * np.eye(4) + 0.00025, [p]])
    inside, outside = np.zeros(len(goals)), np.ones(len(goals))
    for _ in range(50):
        middle = (inside + outside) / 2
        q = observed.centre + middle[:, None] * (goals - observed.centre)
        within = rel_entr(observed.centre, q).sum(axis=1) <= observed.radius
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    laws = observed.centre + inside[:, None] * (goals - observed.centre)
    assert (laws >= observed.low - 1e-9).all() and (laws <= observed.high + 1e-9).all()
    for name, interval in INTERVALS.items():
        low, high = interval(p, observed)
        values = np.array([DIVERGENCES[name](p, q) for q in laws])
        assert 0 <= low <= high
        assert (values >= low - 1e-7).all() and (values <= high * (1 + 1e-7) + 1e-7).all(), name


def test_forward_kl_extremes_are_attained():
    p, observed = shares(3, 7), ShareSet(shares(5, 5), 0.02)
    q = np.linspace(0.0005, 0.9995, 20_000)
    laws = np.stack([q, 1 - q], axis=1)
    values = rel_entr(p, laws).sum(axis=1)[rel_entr(observed.centre, laws).sum(axis=1) <= observed.radius]
    assert INTERVALS["forward_kl"](p, observed) == pytest.approx((values.min(), values.max()), rel=1e-3)


def test_forward_kl_is_open_above_while_a_cell_is_unseen():
    observed = ShareSet.observed(np.array([0, 100, 100, 100]), priors=JEFFREYS, delta=0.05)
    low, high = INTERVALS["forward_kl"](shares(1, 1, 1, 1), observed)
    assert 0.2 < low < high == np.inf


def test_intervals_shrink_and_exclude_what_is_wrong():
    p = shares(1, 1, 1, 1)
    few, many = (ShareSet.observed(n * np.array([4, 3, 2, 1]), priors=JEFFREYS, delta=0.05) for n in (20, 2000))
    for name, interval in INTERVALS.items():
        (low, high), (nearer_low, nearer_high) = interval(p, few), interval(p, many)
        assert low <= nearer_low < DIVERGENCES[name](p, many.centre) < nearer_high < high
        assert nearer_low > 0


@pytest.mark.slow
def test_the_set_holds_at_every_sample_at_once():
    """Time-uniform: of 120 streams read after every fourth of 400 samples, at most delta ever leave the set; a smaller set they leave more often."""
    delta, q = 0.05, shares(5, 3, 1.9, 0.1)
    priors = np.stack([np.full(4, 0.5), 0.5 + 100 * shares(5, 3, 1.5, 0.5)])
    rng = np.random.default_rng(8)
    farthest = np.zeros(120)  # from what was observed, as a part of the radius
    for run in range(120):
        counts = np.cumsum(np.eye(4, dtype=np.int64)[rng.choice(4, size=400, p=q)], axis=0)
        for n in counts[::4]:
            observed = ShareSet.observed(n, priors=priors, delta=delta)
            farthest[run] = max(farthest[run], rel_entr(observed.centre, q).sum() / observed.radius)
    assert (farthest > 1).mean() <= delta < (farthest > 0.7).mean()


def test_no_samples_no_set():
    with pytest.raises(ValueError, match="wait for the first"):
        ShareSet.observed(np.zeros(4, np.int64), priors=JEFFREYS, delta=0.05)


@pytest.mark.parametrize("half_life", [None, 400.0])
def test_the_pointwise_set_holds_at_one_moment(half_life):
    """Over many streams of one law: equal weights, and weights that decay and are worth fewer."""
    rng, n, misses = np.random.default_rng(8), 2000, 0
    q = np.array([0.3, 0.2, 0.2, 0.15, 0.1, 0.05])
    weight = np.ones(n) if half_life is None else 0.5 ** (np.arange(n) / half_life)
    effective = weight.sum() ** 2 / (weight**2).sum()
    for _ in range(400):
        counts = np.bincount(rng.choice(6, n, p=q), weight, minlength=6)
        shares = ShareSet.pointwise(counts, count=effective, delta=0.05)
        misses += rel_entr(shares.centre, q).sum() > shares.radius
    assert 5 <= misses <= 36  # 20 expected; four standard deviations
