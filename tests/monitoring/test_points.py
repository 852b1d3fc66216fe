"""Gauges from points agree with their definitions, written out; closed forms where there are any; the MMD's interval holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance

from monitoring.asymptotic import Spread
from monitoring.divergences import DIVERGENCES
from monitoring.points import (
    DIRECTIONS,
    LEAST,
    NEIGHBOURS,
    POINT_GAUGES,
    Cloud,
    Embedding,
    directions,
    intrinsic_dimension,
    kernel_distance,
    reach,
    reach_now,
    sliced_wasserstein,
)
from training import evaluation

RNG = np.random.default_rng(5)
REAL, SERVED = RNG.standard_normal((150, 7)).astype(np.float32), (1.3 * RNG.standard_normal((90, 7)) + 0.2).astype(np.float32)
WIDTH = RNG.standard_normal((80, 7)).astype(np.float32)  # points that set the width of a kernel


def test_the_kernel_distance_is_its_definition():
    def kernel(x, y):
        return (float(x.astype(np.float64) @ y.astype(np.float64)) / 7 + 1) ** 3

    def mean(a, b, same):
        return np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)])

    wanted = mean(SERVED, SERVED, True) + mean(REAL, REAL, True) - 2 * mean(SERVED, REAL, False)
    assert kernel_distance(SERVED, REAL) == pytest.approx(wanted, rel=1e-9)
    assert Cloud(REAL).gauges(SERVED)["kid"] == kernel_distance(SERVED, REAL)


def test_the_sliced_distance_is_a_mean_of_wasserstein_distances():
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, 7))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    wanted = np.mean([wasserstein_distance(SERVED @ d, REAL @ d) for d in directions])
    assert sliced_wasserstein(SERVED, REAL) == pytest.approx(wanted, rel=1e-6)
    assert sliced_wasserstein(REAL + 1, REAL) == pytest.approx(np.abs(directions.sum(axis=1)).mean(), rel=1e-6)  # a shift is itself


def test_neighbours_are_their_definitions():
    def radius(points):
        return np.sort(cdist(points, points), axis=1)[:, NEIGHBOURS]

    distance, real, served = cdist(REAL, SERVED), radius(REAL), radius(SERVED)
    found = Cloud(REAL).neighbours(SERVED)
    assert found["precision"] == np.mean([(distance[:, j] < real).any() for j in range(90)])
    assert found["recall"] == np.mean([(distance[i] < served).any() for i in range(150)])
    assert found["density"] == pytest.approx(sum((distance[:, j] < real).sum() for j in range(90)) / (NEIGHBOURS * 90))
    plain = np.mean([distance[i].min() < real[i] for i in range(150)])
    assert found["coverage"] == pytest.approx(plain / (1 - math.comb(149, NEIGHBOURS) / math.comb(149 + 90, NEIGHBOURS)))


def test_the_offline_measuring_stick_says_the_same():
    assert Cloud(REAL).neighbours(SERVED) == pytest.approx(evaluation.prdc(REAL, SERVED), abs=1e-6)
    assert kernel_distance(SERVED, REAL[:90]) == pytest.approx(evaluation.kid(REAL[:90], SERVED, subsets=1)[0], abs=1e-6)
    assert sliced_wasserstein(SERVED, REAL) == pytest.approx(evaluation.sliced_wasserstein1(REAL, SERVED, directions=directions(7)), abs=1e-6)
    assert sliced_wasserstein(SERVED, REAL) == pytest.approx(evaluation.sliced_wasserstein1(REAL, SERVED), abs=1e-6)
    for points in (SERVED, REAL, np.repeat(SERVED, 2, axis=0)):
        assert intrinsic_dimension(points) == pytest.approx(evaluation.intrinsic_dimension(points), abs=1e-6)
    assert math.isnan(evaluation.intrinsic_dimension(SERVED[: LEAST - 1])) and math.isfinite(evaluation.intrinsic_dimension(SERVED[:LEAST]))
    embedding = Embedding(REAL, width_from=WIDTH)
    real, served = (embedding(x).astype(np.float64) for x in (REAL, SERVED))
    width = float(np.median(pdist(WIDTH)))
    gauge = embedding.mmd(served.sum(axis=0), len(served), delta=0.05)[0]
    assert gauge == pytest.approx(math.sqrt(evaluation.squared_mmd(lambda a, b: a @ b.T, real, served)), abs=1e-6)
    assert gauge == pytest.approx(evaluation.mmd(REAL, SERVED, width=width), rel=0.1)  # the same kernel, but for the chance of its frequencies
    p, q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.25, 0.25, 0.45, 0.05])
    assert {name: divergence(p, q) for name, divergence in DIVERGENCES.items()} == pytest.approx(evaluation.divergences(p, q), abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(100, 400), (400, 100), (300, 300)])
def test_coverage_is_one_where_nothing_is_wrong(n, m):
    found = [Cloud(RNG.standard_normal((m, 3))).neighbours(RNG.standard_normal((n, 3)))["coverage"] for _ in range(30)]
    assert np.mean(found) == pytest.approx(1, abs=4 * np.std(found) / np.sqrt(30) + 1e-3)


def test_the_dimension_is_that_of_the_manifold():
    flat = np.zeros((1000, 12))
    flat[:, :3] = RNG.uniform(size=(1000, 3))
    rotated = flat @ np.linalg.qr(RNG.standard_normal((12, 12)))[0]
    assert intrinsic_dimension(rotated) == pytest.approx(3, abs=0.5)
    assert intrinsic_dimension(np.repeat(rotated, 4, axis=0)) == pytest.approx(intrinsic_dimension(rotated))
    assert math.isnan(intrinsic_dimension(np.ones((1000, 2))))


def test_too_few_points_say_nothing():
    for served, real in ((SERVED[: LEAST - 1], REAL), (SERVED, REAL[: LEAST - 1]), (SERVED, REAL[:0])):
        assert all(math.isnan(value) for value in Cloud(real).gauges(served).values())
    assert tuple(Cloud(REAL).gauges(SERVED)) == POINT_GAUGES
    empty = Embedding(REAL[:0], width_from=WIDTH)
    assert Embedding(REAL, width_from=WIDTH[: LEAST - 1]).size == 0
    assert empty(SERVED).shape == (90, 0) and all(math.isnan(v) for v in empty.mmd(np.empty(0), 90, delta=0.05))
    assert all(math.isnan(v) for v in (*empty.mmd_now(np.empty(0), 90.0, 80.0, delta=0.05), *Embedding(REAL, width_from=WIDTH).mmd_now(np.zeros(256), 1.0, 1.0, delta=0.05)))


def test_no_point_has_part_in_both_the_kernel_and_the_mean():
    """Bounds for a fixed kernel: other points in the mean leave it as it is, other points for the width leave none of theirs in the mean."""
    plain, others, wider = (Embedding(points, width_from=width) for points, width in ((REAL, WIDTH), (9 + REAL, WIDTH), (REAL, 3 * WIDTH)))
    np.testing.assert_array_equal(others.frequencies, plain.frequencies)
    assert not np.allclose(others.sum, plain.sum)
    np.testing.assert_allclose(3 * wider.frequencies, plain.frequencies, rtol=1e-5)
    assert plain.count == wider.count == len(REAL)
    np.testing.assert_allclose(wider.sum, wider(REAL).sum(axis=0), rtol=1e-4)


def test_the_embedded_distance_is_an_mmd():
    embedding = Embedding(REAL, width_from=WIDTH)
    a, b = (embedding(x).astype(np.float64) for x in (SERVED, REAL))
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-5)
    gram = np.mean([u @ v for i, u in enumerate(a) for j, v in enumerate(a) if i != j]) + np.mean([u @ v for i, u in enumerate(b) for j, v in enumerate(b) if i != j])
    value, low, high = embedding.mmd(a.sum(axis=0), 90, delta=0.05)
    assert value == pytest.approx(math.sqrt(gram - 2 * (a @ b.T).mean()), rel=1e-4)
    assert low <= value <= high


def streams(rng, runs, length):
    """Embedded streams of the real law itself, whose MMD is 0, and of a shifted one, whose MMD is known from many samples."""
    for _ in range(runs):
        embedding = Embedding(rng.standard_normal((1000, 2)), width_from=rng.standard_normal((500, 2)))
        middle = embedding(rng.standard_normal((20_000, 2))).mean(0)
        for shift in (0.0, 0.5):
            truth = np.linalg.norm(embedding(rng.standard_normal((20_000, 2)) + shift).mean(0) - middle) if shift else 0.0
            yield embedding, embedding(rng.standard_normal((length, 2)) + shift), truth


def test_the_interval_of_the_mmd_holds_at_every_sample():
    misses, narrow = 0, []
    for embedding, stream, truth in streams(np.random.default_rng(3), 10, 1024):
        path = stream.astype(np.float64).cumsum(axis=0)
        bounds = [embedding.mmd(path[n - 1], n, delta=0.05) for n in range(2, 1025, 7)]
        misses += any(not low - 0.01 <= truth <= high + 0.01 for _, low, high in bounds)
        narrow.append(bounds[-1][2] - bounds[-1][1])
    assert misses <= 1 and np.max(narrow) < 0.75
    assert reach(1024, 0.05) < 3 * reach(8192, 0.05) < 3 * reach(4096, 0.05)


def test_the_weighted_mmd_is_that_of_all_pairs():
    """Written out pair by pair; equal weights are no weights."""
    embedding, weight = Embedding(REAL, width_from=WIDTH), 0.5 ** (np.arange(90)[::-1] / 20)
    a, b = (embedding(x).astype(np.float64) for x in (SERVED, REAL))
    pairs, others = np.outer(weight, weight), ~np.eye(90, dtype=bool)
    ours = (pairs * (a @ a.T))[others].sum() / pairs[others].sum()
    theirs = (b @ b.T)[~np.eye(len(b), dtype=bool)].mean()
    value, low, high = embedding.mmd_now(weight @ a, weight.sum(), weight @ weight, delta=0.05)
    assert value == pytest.approx(math.sqrt(ours + theirs - 2 * (weight @ (a @ b.T)).sum() / (weight.sum() * len(b))), abs=1e-6)
    plain = np.linalg.norm(weight @ a / weight.sum() - b.mean(axis=0))
    error = reach_now(weight.sum() ** 2 / (weight @ weight), 0.025) + reach_now(len(b), 0.025)
    assert (low, high) == pytest.approx((max(0.0, plain - error), plain + error), abs=1e-6)
    assert embedding.mmd_now(a.sum(axis=0), 90.0, 90.0, delta=0.05)[0] == embedding.mmd(a.sum(axis=0), 90, delta=0.05)[0]


@pytest.mark.parametrize("delta", [0.3, 0.05])
def test_a_weighted_mean_stays_within_reach_at_one_moment(delta):
    """Unit vectors of several laws, decaying weights; the expectation of the distance is what the bound's first part says, or less."""
    rng = np.random.default_rng(8)
    for size, shift in ((1, 0.0), (2, 0.0), (3, 1.0), (50, 0.0)):
        unit = rng.standard_normal((1000, 100, size)) + shift
        unit /= np.linalg.norm(unit, axis=2, keepdims=True)
        middle = rng.standard_normal((10**5, size)) + shift
        middle = (middle / np.linalg.norm(middle, axis=1, keepdims=True)).mean(axis=0) if shift else np.zeros(size)
        weight = 0.5 ** (np.arange(100) / 15)
        n = weight.sum() ** 2 / (weight @ weight)
        distance = np.linalg.norm(weight @ unit / weight.sum() - middle, axis=1)
        assert distance.mean() <= 1 / math.sqrt(n) + 0.01 and (distance > reach_now(n, delta)).mean() <= delta
        assert (distance**2).mean() == pytest.approx((1 - middle @ middle) / n, rel=0.1)
    assert reach_now(30.0, delta) < reach(30, delta) and Spread(1.0, 1.0).reach_now(30.0, delta=delta) == reach_now(30.0, delta)


def test_the_interval_of_the_weighted_mmd_holds_at_one_moment():
    misses, widths, weight = 0, [], 0.5 ** (np.arange(2000)[::-1] / 200)
    for embedding, stream, truth in streams(np.random.default_rng(4), 20, 2000):
        _, low, high = embedding.mmd_now(weight @ stream, weight.sum(), weight @ weight, delta=0.05)
        misses += not low - 0.01 <= truth <= high + 0.01
        widths.append(high - low)
    assert misses <= 2 and max(widths) < 0.6
