from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.clusters import NEIGHBOURS, clusters
from training.bundle import SignGaussian
from training.data import DATASETS
from training.recipes import RECIPES, latent_law

PLANE = RECIPES["grid"]
CORNERS = np.array([[0, 0], [1, 0], [0, 1]])


def blobs(centres, n=3000):
    rng = np.random.default_rng(0)
    return centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, centres.shape[1]))


@pytest.mark.parametrize(
    ("name", "count"), [("ring", 8), ("grid", 25), ("grid100", 100), ("moons", 2), ("s-curve", 1), ("flower", 1)]
)
def test_the_clusters_of_what_is_built_in(name, count):
    assert DATASETS[name]().clusters == count


def test_digits_fall_into_clusters_with_and_without_their_labels():
    digits = DATASETS["digits"]()
    assert digits.clusters == 10
    assert 2 <= replace(digits, labels=None, classes=()).clusters <= 10


@pytest.mark.parametrize(("apart", "count"), [(2, 1), (3, 1), (6, 3), (10, 3)])
def test_overlapping_clusters_are_one(apart, count):
    assert clusters(blobs(apart * CORNERS)) == count


@pytest.mark.parametrize("n", [3, 30, 1000])
@pytest.mark.parametrize("law", ["normal", "uniform", "standard_cauchy"])
def test_one_peak_is_one_cluster_however_heavy_its_tails(law, n):
    rng = np.random.default_rng(n)
    assert [clusters(getattr(rng, law)(size=(n, d))) for d in (1, 2, 10)] == [1, 1, 1]


def test_repeats_and_data_that_never_vary():
    assert clusters(np.zeros((100, 3))) == 1
    assert clusters(np.repeat(np.eye(4), 100, axis=0)) == 4


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_far_clusters_are_counted_whatever_their_number_place_scale_and_order(count, dim, seed):
    rng = np.random.default_rng(seed)
    centres = 20 * np.arange(count)[:, None] * rng.choice([-1.0, 1.0], size=dim)
    x = np.repeat(centres, 5 * NEIGHBOURS, axis=0)
    x += rng.normal(size=x.shape)
    assert clusters(x) == clusters(rng.permutation(x)) == clusters(1e3 * x[:, ::-1] - 7) == count


def test_signs_are_for_clusters_and_without_them_there_is_one_normal_more_than_coordinates():
    assert latent_law(PLANE, 25, dim=2) == SignGaussian(PLANE.signs, PLANE.normals, PLANE.scale)
    assert latent_law(PLANE, 1, dim=2) == SignGaussian(0, 3)
    assert latent_law(PLANE, 1, dim=100) == SignGaussian(0, PLANE.signs + PLANE.normals)
