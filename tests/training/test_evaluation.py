import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data import DATASETS
from training.evaluation import divergences, frechet, mixture_fit, prdc


def test_divergences_of_a_known_pair():
    found = divergences(np.array([0.5, 0.5, 0.0]), np.array([0.75, 0.0, 0.25]))
    assert found["tv"] == pytest.approx(0.5)
    assert found["forward_kl"] == math.inf and found["reverse_kl"] == math.inf and found["chi_squared"] == math.inf
    found = divergences(np.array([0.5, 0.5]), np.array([0.25, 0.75]))
    assert found["forward_kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found["chi_squared"] == pytest.approx(0.25)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=12), st.randoms())
def test_divergences_are_bounded_and_zero_on_the_diagonal(counts, random):
    p = np.array(counts) / sum(counts)
    q = np.array(random.sample(list(p), len(p)))
    found = divergences(p, q)
    assert all(value >= -1e-12 for value in found.values())
    assert found["js"] <= math.log(2) + 1e-12 and found["tv"] <= 1 + 1e-12
    assert found["tv"] ** 2 <= 2 * found["js"] + 1e-9 * 8 + found["forward_kl"]  # Pinsker, loosely
    assert all(abs(value) < 1e-12 for value in divergences(p, p).values())


def test_frechet_between_gaussians_has_a_closed_form():
    mean, covariance = np.zeros(2), np.diag([4.0, 9.0])
    assert frechet(mean, covariance, np.array([3.0, 4.0]), covariance) == pytest.approx(25)
    assert frechet(mean, covariance, mean, np.diag([1.0, 1.0])) == pytest.approx((2 - 1) ** 2 + (3 - 1) ** 2)


def test_prdc_of_equal_and_of_disjoint_laws():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((2, 600, 2)).astype(np.float32)
    same = prdc(real, fake)
    assert same["coverage"] == pytest.approx(1, abs=0.05) and same["density"] == pytest.approx(1, abs=0.1)
    assert same["precision"] > 0.95 and same["recall"] > 0.95
    assert prdc(real, fake + 100) == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}


def test_a_perfect_sampler_is_not_better_than_theory():
    dataset = DATASETS["ring"]()
    fit = mixture_fit(dataset.mixture, dataset.samples.astype(np.float64))
    assert fit["modes"] == 8 and fit["reverse_kl"] < 1e-3
    assert fit["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert fit["spread"] == pytest.approx(0.974, abs=0.005)


def test_no_sample_near_any_mode_is_not_a_number_but_no_error():
    fit = mixture_fit(DATASETS["ring"]().mixture, np.full((10, 2), 50.0))
    assert fit["modes"] == 0 and fit["high_quality"] == 0 and math.isnan(fit["reverse_kl"])
