from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.clusters import NEIGHBOURS, Clusters, clusters, signs_for
from training.bundle import SignGaussian
from training.data import DATASETS
from training.config import Config
from training.recipes import RECIPES, frequency, latent_law

PLANE = RECIPES["grid"]
CORNERS = np.array([[0, 0], [1, 0], [0, 1]])


def blobs(centres, n=3000):
    rng = np.random.default_rng(0)
    return centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, centres.shape[1]))


@pytest.mark.parametrize(
    ("name", "count"), [("ring", 8), ("grid", 25), ("grid100", 100), ("mixture1200", 10), ("moons", 2), ("s-curve", 1), ("flower", 1)]
)
def test_the_clusters_of_what_is_built_in(name, count):
    found = DATASETS[name]().clusters
    assert found.count == count
    assert found.heaps == (name not in ("moons", "s-curve", "flower"))


def test_digits_fall_into_clusters_with_and_without_their_labels():
    digits = DATASETS["digits"]()
    assert digits.clusters[:2] == (10, False)
    assert 2 <= replace(digits, labels=None, classes=()).clusters.count <= 10


@pytest.mark.parametrize(("apart", "count"), [(2, 1), (3, 1), (6, 3), (10, 3)])
def test_overlapping_clusters_are_one(apart, count):
    assert clusters(blobs(apart * CORNERS))[:2] == (count, False)


@pytest.mark.parametrize("n", [3, 30, 1000])
@pytest.mark.parametrize("law", ["normal", "uniform", "standard_cauchy"])
def test_one_peak_is_one_cluster_however_heavy_its_tails(law, n):
    rng = np.random.default_rng(n)
    assert [clusters(getattr(rng, law)(size=(n, d))) for d in (1, 2, 10)] == [(1, False, 0)] * 3


def test_repeats_and_data_that_never_vary():
    assert clusters(np.zeros((100, 3))) == (1, False, 0)
    assert clusters(np.repeat(np.eye(4), 100, axis=0)) == (4, False, 2)


@pytest.mark.parametrize(("dim", "count"), [(2, 1), (2, 3), (3, 2)])
def test_circles_and_shells_are_hollow_but_heaps_are_not(dim, count):
    rng = np.random.default_rng(dim)
    heap = rng.normal(size=(count, 1500, dim))
    shell = heap / np.linalg.norm(heap, axis=2, keepdims=True) + 0.02 * heap
    centres = 10 * np.arange(count)[:, None, None]
    assert clusters((shell + centres).reshape(-1, dim))[:2] == (count, True)
    assert clusters((heap + centres).reshape(-1, dim))[:2] == (count, False)
    assert clusters(np.concatenate([shell[0] + 30, *(heap[:1] + centres[:2]).repeat(2, axis=0)])).hollow is False  # most lie in heaps


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_far_clusters_are_counted_whatever_their_number_place_scale_and_order(count, dim, seed):
    rng = np.random.default_rng(seed)
    centres = 20 * np.arange(count)[:, None] * rng.choice([-1.0, 1.0], size=dim)
    x = np.repeat(centres, 5 * NEIGHBOURS, axis=0)
    x += rng.normal(size=x.shape)
    assert clusters(x) == clusters(rng.permutation(x)) == clusters(1e3 * x[:, ::-1] - 7)
    assert clusters(x)[:2] == (count, False)


@pytest.mark.parametrize(("shares", "signs"), [([1], 0), ([0.5, 0.5], 1), ([0.51, 0.49], 1), ([0.7, 0.3], 4), ([1 / 3] * 3, 5), ([1 / 8] * 8, 3), ([0.97, 0.03], 5)])
def test_signs_are_as_few_as_can_be_dealt_out(shares, signs):
    assert signs_for(np.array(shares, float)) == signs


def test_signs_are_for_heaps_and_without_them_there_is_one_normal_more_than_coordinates():
    heaps, curves = Clusters(25, hollow=False, signs=5), Clusters(2, hollow=True, signs=1)
    assert latent_law(PLANE, heaps, dim=2) == SignGaussian(PLANE.signs, PLANE.normals, PLANE.scale)
    assert latent_law(PLANE, Clusters(1, hollow=True, signs=0), dim=2) == SignGaussian(0, 3)
    assert latent_law(PLANE, Clusters(1, hollow=False, signs=0), dim=100) == SignGaussian(0, PLANE.signs + PLANE.normals)
    assert latent_law(PLANE, curves, dim=2) == SignGaussian(1, 3)
    assert latent_law(Config(dataset="moons", latent="signs:2+normal:5x0.5").recipe, curves, dim=2) == SignGaussian(2, 5, 0.5)
    assert frequency(PLANE, heaps) == PLANE.frequencies
    assert frequency(PLANE, curves) == frequency(PLANE, Clusters(1, hollow=False, signs=0)) == (2.0,)


@pytest.mark.parametrize(("count", "apart"), [(3, 8.0), (5, 7.0), (6, 6.0)])
def test_heaps_in_a_circle_that_touch_by_their_outliers_are_no_curve(count, apart):
    rng, angle = np.random.default_rng(0), 2 * np.pi * np.arange(count) / count
    centres = apart / 2 / np.sin(np.pi / count) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    found = clusters(centres[rng.integers(count, size=5000)] + rng.standard_normal((5000, 2)))
    assert found.heaps and found.count == count and found.signs > 1
