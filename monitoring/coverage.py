"""Which modes of the real data are served. A mode counts as covered while its served share is at least RHO of its real share.

Knows shares and their confidence set, not where they come from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from monitoring.divergences import Shares, ShareSet
from training.bundle import MODE_FLOOR

RHO = MODE_FLOOR


class Coverage(NamedTuple):
    """Shares of the K modes that are covered: observed, certainly, possibly; and the certainties mode by mode."""

    value: float
    low: float
    high: float
    surely_covered: Bool[ndarray, "k"]
    surely_dropped: Bool[ndarray, "k"]


def covered(p: Shares, q: Float64[ndarray, "*n k1"]) -> Bool[ndarray, "*n k"]:
    """Which modes have at least RHO of their real share p in q; off-manifold, which is last, is none."""
    return q[..., :-1] >= RHO * p[:-1]


def mode_coverage(p: Shares, shares: ShareSet) -> Coverage:
    """p [K + 1] are the real shares, off-manifold last. Exact: all cells' bounds hold together, and so does any count of them."""
    surely, dropped = covered(p, shares.low), ~covered(p, shares.high)
    return Coverage(float(covered(p, shares.centre).mean()), float(surely.mean()), float((~dropped).mean()), surely, dropped)


def mode_status(coverage: Coverage) -> list[str]:
    """covered | dropped | uncertain, in the order of the modes."""
    return np.select([coverage.surely_covered, coverage.surely_dropped], ["covered", "dropped"], "uncertain").tolist()
