"""The Frechet distance between Gaussians: closed forms, and what is clipped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.moments import frechet


def test_frechet_of_gaussians():
    mean, cov = np.array([1.0, 2.0]), np.diag([4.0, 9.0])
    distance, clipped = frechet(mean, cov, mean + 1, np.diag([1.0, 1.0]))
    assert distance == pytest.approx(2 + (2 - 1) ** 2 + (3 - 1) ** 2) and clipped == 0
    rotation = np.array([[0.8, -0.6], [0.6, 0.8]])
    assert frechet(mean, rotation @ cov @ rotation.T, mean, rotation @ cov @ rotation.T)[0] == pytest.approx(0, abs=1e-12)
    singular = np.outer([1.0, 2.0], [1.0, 2.0])  # from fewer samples than features: rounding, not a fault
    assert frechet(mean, singular, mean, cov)[1] == 0
    assert frechet(mean, np.diag([1.0, -0.5]), mean, cov)[1] > 0
    assert frechet(mean, cov, np.array([4.0, 6.0]), cov) == (pytest.approx(25), 0)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_it_is_symmetric_never_negative_and_scales_with_the_square(p: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = ((rng.standard_normal(p), np.cov(rng.standard_normal((p, 2 * p)), bias=True).reshape(p, p)) for _ in range(2))
    distance, clipped = frechet(*one, *other)
    assert distance >= 0 and clipped == 0
    assert frechet(*other, *one)[0] == pytest.approx(distance, rel=1e-9)
    assert frechet(3 * one[0], 9 * one[1], 3 * other[0], 9 * other[1])[0] == pytest.approx(9 * distance, rel=1e-9)
