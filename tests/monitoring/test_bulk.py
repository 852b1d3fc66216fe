"""Bets on moved features: fair for all that the certified moments allow, whatever the past, and as quick as the chart that they are."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring import kernel
from monitoring.bulk import RATES, Moments, moment_bounds
from training.bundle import Certificate, whiten, whitening

WIDTH = 3


def skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    """Features with heavy, one-sided, correlated tails."""
    e = rng.standard_exponential((count, WIDTH))
    return e @ np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.1]])


def certify(rng: np.random.Generator, count: int, draw=skewed, white=None) -> Certificate:
    white = white or whitening(draw(rng, 4000))
    y = whiten(draw(rng, count), *white)
    one, tails = np.zeros(1, np.int64), np.zeros((1, 1))
    return Certificate(
        count, 0.01, np.array([count, 0]), np.array([0.5]), tails, one[None], tails, one[None], 0, 0, np.zeros(WIDTH), np.eye(WIDTH), one, one,
        np.zeros((1, WIDTH)), *white, y.mean(axis=0), y.T @ y / count,
    )  # fmt: skip


class Moved:
    """The bets by themselves, as the compiled pass pays them."""

    def __init__(self, certificate: Certificate) -> None:
        self.bets = Moments(certificate)
        self.mean = np.zeros((len(self.bets.rates), len(self.bets.mean)))

    def payoffs(self, x: np.ndarray) -> np.ndarray:
        bets, found, y = self.bets, np.empty((len(x), len(self.bets.rates))), np.empty(len(self.bets.mean))
        for row, payoffs in zip(np.asarray(x, np.float64), found, strict=True):
            kernel.whitened(y, row, bets.centre, bets.map, bets.radius, bets.mean)
            kernel.moved(payoffs, y, self.mean, bets.rates, np.array(bets.bounds))
        return found


def test_no_white_row_is_longer_than_its_radius_and_idle_directions_are_left_out():
    rng = np.random.default_rng(0)
    x = np.concatenate([skewed(rng, 5000), np.ones((5000, 1))], axis=1)
    centre, scale, radius = whitening(x)
    y = whiten(x, centre, scale, radius)
    assert y.shape == (5000, WIDTH) and np.linalg.norm(y, axis=1).max() <= radius * (1 + 1e-12)
    assert 1 <= (np.linalg.norm((x - centre) @ scale, axis=1) > radius).sum() <= 5
    np.testing.assert_allclose(np.cov(((x - centre) @ scale).T, bias=True), np.eye(WIDTH), atol=1e-9)


def test_the_bounds_hold_and_are_not_absurd():
    rng = np.random.default_rng(1)
    white = whitening(skewed(rng, 4000))
    truth = whiten(skewed(rng, 2_000_000), *white)
    mean, moment = truth.mean(axis=0), truth.T @ truth / len(truth)
    for _ in range(100):
        certificate = certify(rng, 2000, white=white)
        e, s, size = moment_bounds(certificate)
        centre = certificate.white_mean
        centred = moment - np.outer(mean, centre) - np.outer(centre, mean) + np.outer(centre, centre)
        assert np.linalg.norm(mean - centre) <= e < 0.5 and np.linalg.eigvalsh(centred)[-1] <= s < 3 and np.trace(centred) <= size < 9
    wide = moment_bounds(certify(rng, 200_000, white=white))
    assert wide.mean < e / 9 and wide.scale < 1.2  # narrows with 1 / sqrt(count)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=WIDTH, max_size=WIDTH), st.integers(0, 2**31))
def test_a_bet_is_fair_whatever_the_past_for_every_law_with_such_moments(past, seed):
    """E[L | past] in closed form over a law on a few points, moved and scaled to the very edge of what the bounds allow."""
    rng = np.random.default_rng(seed)
    bets = Moved(certify(np.random.default_rng(2), 3000))
    e, s, size = bets.bets.bounds
    p, points = rng.dirichlet(np.ones(8)), rng.standard_normal((8, WIDTH))
    points -= p @ points
    second = (points * p[:, None]).T @ points
    points *= np.sqrt(min((s - e**2) / np.linalg.eigvalsh(second)[-1], (size - e**2) / np.trace(second)))
    direction = rng.standard_normal(WIDTH)
    points += e * direction / np.linalg.norm(direction)
    bets.bets.map, bets.bets.centre, bets.bets.radius = np.eye(WIDTH), -bets.bets.mean, 1e6  # such that y = x
    expected = np.zeros(len(RATES))
    for chance, point in zip(p, points, strict=True):
        bets.mean = np.tile(past, (len(RATES), 1))
        expected += chance * bets.payoffs(point[None])[0]
    assert (expected <= 1 + 1e-9).all()


def test_what_is_whitened_here_is_what_was_certified():
    rng = np.random.default_rng(3)
    certificate, x, y = certify(rng, 20_000), 2 * skewed(rng, 500), np.empty((500, WIDTH))
    for row, out in zip(x, y, strict=True):
        kernel.whitened(out, row, certificate.white_centre, certificate.white_map, certificate.white_radius, certificate.white_mean)
    np.testing.assert_allclose(y, certificate.white(x) - certificate.white_mean, rtol=1e-9, atol=1e-12)


def test_fair_to_somebody_who_stops_when_it_pays():
    """Stop as soon as R is three times the time, else at the end: still E[R] <= E[time]."""
    rng, runs, length = np.random.default_rng(4), 400, 200
    certificate, r, time = certify(rng, 200_000), [], []
    for _ in range(runs):
        payoffs = Moved(certificate).payoffs(skewed(rng, length))
        evidence = np.zeros(len(RATES))
        for t, row in enumerate(payoffs, start=1):
            evidence = (1 + evidence) * row
            if evidence.mean() > 3 * t and t > 5:
                break
        r.append(evidence.mean())
        time.append(t)
    assert min(time) < length
    assert np.mean(r) <= np.mean(time) + 3 * np.std(np.subtract(r, time)) / np.sqrt(runs)


def test_it_grows_where_features_move_and_nowhere_else():
    rng = np.random.default_rng(5)
    normal = lambda rng, n: rng.standard_normal((n, WIDTH))  # noqa: E731
    certificate = certify(rng, 200_000, draw=normal)
    growth = {}
    for name, x in {"same": normal(rng, 4000), "moved": normal(rng, 4000) + 0.5, "shrunk": 0.8 * normal(rng, 4000)}.items():
        bets = Moved(certificate)
        growth[name] = np.log(bets.payoffs(x)[200:]).mean(axis=0)
    assert (growth["same"] < 0).all() and (growth["shrunk"] < 0).all()
    assert (growth["moved"] > 0.6 * WIDTH * 0.5**2 / 2).all()  # of log-likelihood ratio's |shift|^2 / 2


def test_without_certified_moments_there_is_no_bet():
    certificate = certify(np.random.default_rng(6), 100)
    blank = {f.name: f.default_factory() for f in fields(Certificate) if f.default_factory is not MISSING}
    certificate = replace(certificate, **blank)
    bets = Moved(certificate)
    assert bets.bets.kinds == () and bets.payoffs(np.zeros((5, WIDTH))).shape == (5, 0)
