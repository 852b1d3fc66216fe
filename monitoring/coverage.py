"""Which modes of the real data are served. A mode counts as covered while its served share is at least RHO of its real share.

Knows shares and their confidence set, not where they come from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
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


def mode_coverage(p: Shares, shares: ShareSet) -> Coverage:
    """p [K + 1] are the real shares, off-manifold last. Exact: all cells' bounds hold together, and so does any count of them."""
    needed = RHO * p[:-1]
    covered, dropped = shares.low[:-1] >= needed, shares.high[:-1] < needed
    value = (shares.centre[:-1] >= needed).mean()
    return Coverage(float(value), float(covered.mean()), float((~dropped).mean()), covered, dropped)


def mode_status(coverage: Coverage) -> list[str]:
    """covered | dropped | uncertain, in the order of the modes."""
    return np.select([coverage.surely_covered, coverage.surely_dropped], ["covered", "dropped"], "uncertain").tolist()
