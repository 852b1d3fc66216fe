"""Bets on the bulk of the features: that they have moved in some direction, which the past has to tell.

y: whitened, clipped features of a sample less their certified mean, |y| <= r. Were y Gaussian and its mean moved to an unknown
theta, then given the past theta would be about N(m, v I), with m the exponentially weighted mean of the past y and v what is
left of its variance. The likelihood ratio exp(theta y - |theta|^2 / 2) has no normaliser that a sample could certify in every
direction; its square-root form (1 + theta y / 2)^2 does, since its mean needs two moments only. Averaged over N(m, v I):

    L = ((1 + m y / 2)^2 + v |y|^2 / 4) / (1 + e |m| + (s |m|^2 + v T) / 4)

with e >= |E y|, s >= the largest eigenvalue of E y y^T and T >= E |y|^2, all at once for every law that the certificate allows.
Then E[L | past] <= 1, whatever the past made of m: the numerator's mean is 1 + m E y + (m^T E[y y^T] m + v E |y|^2) / 4.
As |m|^2 is the statistic of a multivariate EWMA chart (Lowry et al., Technometrics 1992), this is that chart as a bet.

Blind to whatever leaves mean and size of y as they were, and to shrinkage. Knows features, no scores and no cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import rel_entr

from training.bundle import Certificate

RATES = {1 / 8: 0.9, 1 / 50: 0.1}
"""At which m forgets -> the bet's part of the weight. v is rate / (2 - rate), the variance of m under the certified law."""


class MomentBounds(NamedTuple):
    mean: float  # e
    scale: float  # s
    size: float  # T


def moment_bounds(certificate: Certificate) -> MomentBounds:
    """Bounds on the first two moments of y, wrong with probability <= 3 delta / bounds.

    Y = y + certified mean, |Y| <= r. S = E[Y Y^T]: by Tropp's matrix Bernstein inequality (User-friendly tail bounds for sums of
    random matrices, 2012, Theorem 6.1), with |Y Y^T - S| <= r^2 and variance <= r^2 |S|, the largest eigenvalue of S - S_hat
    exceeds u = sqrt(2 r^2 |S| x / N) + 2 r^2 x / (3 N) with probability <= w exp(-x). As |S| <= |S_hat| + u, u solves a
    quadratic equation. E |Y|^2: |Y|^2 / r^2 in [0, 1] is no more spread than a coin of its mean, so N kl(its mean here, its
    mean) <= x (Hoeffding, 1963, Theorem 1). The mean: Bousquet's inequality (2002) for the supremum over unit vectors,
    |Y - E Y| <= 2 r, and E |mean - E Y| <= sqrt(E |Y|^2 / N).
    """
    n, mean, moment = certificate.count, certificate.white_mean, certificate.white_moment
    delta = certificate.delta / certificate.bounds
    r, width = certificate.white_radius, len(mean)
    x = np.log(width / delta)
    a, b, largest = 2 * r**2 * x / n, 2 * r**2 * x / (3 * n), np.linalg.eigvalsh(moment)[-1]
    u = (a + np.sqrt(a**2 + 4 * a * (largest + b))) / 2 + b
    x = np.log(1 / delta)
    size = r**2 * _coin(np.trace(moment) / r**2, x / n)
    expected = np.sqrt(size / n)
    error = expected + np.sqrt(2 * x * (largest + u + 4 * r * expected) / n) + 2 * r * x / (3 * n)
    # Centring at the certified mean: E[y y^T] = S - mean (E y)^T - (E y) mean^T - mean mean^T.
    shift, centred = 2 * np.linalg.norm(mean) * error, moment - np.outer(mean, mean)
    return MomentBounds(float(error), float(np.linalg.eigvalsh(centred)[-1] + u + shift), float(size - mean @ mean + shift))


def _coin(mean: float, radius: float) -> float:
    """The largest p with kl(mean, p) <= radius, rounded up."""
    low, high = mean, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if rel_entr(mean, p) + rel_entr(1 - mean, 1 - p) <= radius else (low, p)
    return high


class Moments:
    """The bets above, one at each rate. Without certified moments there is none."""

    def __init__(self, certificate: Certificate) -> None:
        rates = RATES if certificate.white_mean.size else {}
        self.rates, self.parts = np.array(list(rates)), np.array(list(rates.values()))
        self.kinds = ("moved",) * len(rates)
        self.bounds = moment_bounds(certificate) if rates else MomentBounds(0.0, 0.0, 0.0)
        self.centre, self.map = certificate.white_centre, np.ascontiguousarray(certificate.white_map)
        self.radius, self.mean = float(certificate.white_radius), certificate.white_mean
