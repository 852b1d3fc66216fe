"""Covered, dropped, uncertain: what the bounds of the shares allow to say."""

from __future__ import annotations

import numpy as np
import pytest

from monitoring.coverage import RHO, mode_coverage, mode_status
from monitoring.divergences import ShareSet

REAL = np.array([0.3, 0.3, 0.3, 0.1])  # three modes and the off-manifold cell
PRIORS = np.full((1, 4), 0.5)


@pytest.mark.parametrize(
    ("counts", "value", "low", "high", "status"),
    [
        ([3000, 3000, 3000, 1000], 1, 1, 1, ["covered"] * 3),
        ([0, 4500, 4500, 1000], 2 / 3, 2 / 3, 2 / 3, ["dropped", "covered", "covered"]),
        ([0, 5, 4, 1], 2 / 3, 0, 1, ["uncertain"] * 3),  # ten samples prove little
        ([0, 0, 1, 0], 1 / 3, 0, 1, ["uncertain"] * 3),
    ],
)
def test_coverage(counts, value, low, high, status):
    coverage = mode_coverage(REAL, ShareSet.observed(np.array(counts), priors=PRIORS, delta=0.05))
    assert coverage[:3] == pytest.approx((value, low, high))
    assert mode_status(coverage) == status


def test_fakes_leave_coverage_alone():
    counts = np.array([2000, 2000, 2000, 4000])
    assert mode_coverage(REAL, ShareSet.observed(counts, priors=PRIORS, delta=0.05))[:3] == (1, 1, 1)


def test_a_mode_at_the_edge_is_uncertain():
    edge = RHO * REAL[0]
    counts = np.rint(10_000 * np.array([edge, (0.9 - edge) / 2, (0.9 - edge) / 2, 0.1])).astype(np.int64)
    assert mode_status(mode_coverage(REAL, ShareSet.observed(counts, priors=PRIORS, delta=0.05)))[0] == "uncertain"
