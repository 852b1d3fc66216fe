"""Gauges that need points themselves, not their counts: how a cloud of served features lies to a cloud of real ones.

The MMD's intervals hold for any number of samples; those of others are in `asymptotic.py`, as far as there are any. All of it in float64; quadratic in the points, so the clouds
are kept small. It does not know where the points come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray

NEIGHBOURS = 5  # the k of precision, recall, density and coverage
LEAST = 64  # fewer points than this say nothing
DIRECTIONS = 32  # of the sliced Wasserstein distance
FREQUENCIES = 128  # of the random-feature kernel


def squared_distances(a: Float[ndarray, "n p"], b: Float[ndarray, "m p"]) -> Float64[ndarray, "n m"]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1), 0)


def kernel(x: Float[ndarray, "n p"], y: Float[ndarray, "m p"]) -> Float64[ndarray, "n m"]:
    """(x.y / p + 1)^3."""
    plain = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
    return plain * plain * plain  # numpy's power takes ten times as long


def kernel_distance(a: Float[ndarray, "n p"], b: Float[ndarray, "m p"], likeness: float | None = None) -> float:
    """KID: the unbiased squared MMD of `kernel`, which may be negative. `likeness`: that of b's points, where it is known already.

    Source: Binkowski, Sutherland, Arbel and Gretton, Demystifying MMD GANs (ICLR 2018).
    """
    return _likeness(a) + (_likeness(b) if likeness is None else likeness) - 2 * float(kernel(a, b).mean())


def _likeness(points: Float[ndarray, "n p"]) -> float:
    """The mean of `kernel` over all pairs of two different points."""
    gram = kernel(points, points)
    return float((gram.sum() - np.trace(gram)) / (len(points) * (len(points) - 1)))


def directions(size: int) -> Float64[ndarray, "l p"]:
    """DIRECTIONS unit vectors of that size, the same in every process."""
    found = np.random.default_rng(0).standard_normal((DIRECTIONS, size))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def sliced_wasserstein(a: Float[ndarray, "n p"], b: Float[ndarray, "m p"]) -> float:
    """The mean over DIRECTIONS fixed random directions of W1 between the projections, integral |F - G|, in feature units.

    Source: Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein Barycenters of Measures (JMIV 2015).
    """
    along, total = directions(a.shape[1]), 0.0
    for x, y in zip(np.sort(along @ a.T), np.sort(along @ b.T), strict=True):
        ends = np.sort(np.concatenate([x, y]))
        gap = np.searchsorted(x, ends[:-1], side="right") / len(x) - np.searchsorted(y, ends[:-1], side="right") / len(y)
        total += float(np.abs(gap) @ np.diff(ends))
    return total / DIRECTIONS


def intrinsic_dimension(points: Float[ndarray, "n p"]) -> float:
    """TwoNN: where the density is flat over two neighbours, the ratio of their distances is Pareto with the dimension as its
    exponent, and (n - 1) / sum log ratio is unbiased. Repeated points are left out; NaN where fewer than LEAST remain.

    Source: Facco, d'Errico, Rodriguez and Laio, Scientific Reports 2017.
    """
    points = np.unique(points, axis=0)
    if len(points) < LEAST:
        return math.nan
    distances = squared_distances(points, points)
    np.fill_diagonal(distances, np.inf)
    nearest = np.partition(distances, 1, axis=1)[:, :2]
    total = 0.5 * np.log(nearest[:, 1] / np.maximum(nearest[:, 0], 1e-300)).sum()  # squares, hence the half
    return float((len(points) - 1) / total) if total > 0 else math.nan


@dataclass(frozen=True)
class Cloud:
    """Real points, with what every comparison needs of them."""

    points: Float[ndarray, "m p"]

    @cached_property
    def radii(self) -> Float64[ndarray, "m"]:
        return _radii(self.points)

    def neighbours(self, served: Float[ndarray, "n p"]) -> dict[str, float]:
        """precision, recall (Kynkaanniemi et al., NeurIPS 2019), density and coverage (Naeem et al., ICML 2020).

        Balls reach to the NEIGHBOURS-th other point of their own cloud, squared distances, strictly inside. Coverage is divided
        by what it is expected to be where both clouds follow one law, 1 - prod (m - 1 - i) / (n + m - 1 - i): the chance that
        at least one of the nearest of all points is a served one; so 1 is perfect for any n and m.
        """
        n, m, i = len(served), len(self.points), np.arange(NEIGHBOURS)
        distances = squared_distances(self.points, served)
        inside = distances < self.radii[:, None]
        expected = 1 - np.prod((m - 1 - i) / (n + m - 1 - i))
        return {
            "precision": float(inside.any(axis=0).mean()),
            "recall": float((distances < _radii(served)).any(axis=1).mean()),
            "density": float(inside.sum() / (NEIGHBOURS * n)),
            "coverage": float(inside.any(axis=1).mean() / expected),
        }

    @cached_property
    def likeness(self) -> float:
        return _likeness(self.points)

    def gauges(self, served: Float[ndarray, "n p"]) -> dict[str, float]:
        """All of POINT_GAUGES; NaN while either cloud has fewer than LEAST points."""
        if min(len(served), len(self.points)) < LEAST:
            return dict.fromkeys(POINT_GAUGES, math.nan)
        distances = {"kid": kernel_distance(served, self.points, self.likeness), "sliced_wasserstein": sliced_wasserstein(served, self.points)}
        return distances | self.neighbours(served) | {"intrinsic_dimension": intrinsic_dimension(served)}


POINT_GAUGES = ("kid", "sliced_wasserstein", "precision", "recall", "density", "coverage", "intrinsic_dimension")


def _radii(points: Float[ndarray, "n p"]) -> Float64[ndarray, "n"]:
    return np.partition(squared_distances(points, points), NEIGHBOURS, axis=1)[:, NEIGHBOURS]  # 0 is the point itself


class Embedding:
    """Random Fourier features of a Gaussian kernel as wide as the median distance between real points: unit vectors, so that the
    distance of two means, the MMD of this very kernel, has exact bounds.

    The bounds are those of a kernel that was fixed beforehand: what sets the width must not be among the points whose mean this is.
    Sources: Rahimi and Recht, Random Features for Large-Scale Kernel Machines (NIPS 2007); bounds: `reach`, `reach_now`.
    """

    def __init__(self, points: Float[ndarray, "m p"], *, width_from: Float[ndarray, "w p"]) -> None:
        self.count = len(points) if min(len(points), len(width_from)) >= LEAST else 0
        self.size = 2 * FREQUENCIES if self.count else 0
        if self.count:
            apart = squared_distances(width_from, width_from)[np.triu_indices(len(width_from), 1)]
            width = math.sqrt(max(float(np.median(apart)), 1e-300))
            self.frequencies = np.random.default_rng(0).standard_normal((points.shape[1], FREQUENCIES)).astype(np.float32) / np.float32(width)
            self.sum = self(points).sum(axis=0, dtype=np.float64)

    def __call__(self, x: Float[ndarray, "n p"]) -> Float[ndarray, "n e"]:
        """Unit vectors [n, size]; of size 0 where there were not enough real points."""
        if not self.count:
            return np.empty((len(x), 0), np.float32)
        phase = x.astype(np.float32) @ self.frequencies
        return np.concatenate([np.cos(phase), np.sin(phase)], axis=1) / np.float32(math.sqrt(FREQUENCIES))

    def mmd(self, served: Float64[ndarray, "e"], n: int, *, delta: float) -> tuple[float, float, float]:
        """The MMD from the sum of n embedded samples: value (root of the unbiased square, 0 where that is negative), low, high.

        The interval holds at every n of a stream at once with probability >= 1 - delta, the real points' own error included.
        """
        return self._mmd(served, n, n, reach(n, delta / 2) + reach_now(self.count, delta / 2)) if self.count and n > 1 else (math.nan,) * 3

    def mmd_now(self, served: Float64[ndarray, "e"], weight: float, squares: float, *, delta: float) -> tuple[float, float, float]:
        """The same from the sum of w_i times the embedded samples, with sum w_i and sum w_i^2: weights that do not depend on the samples.

        The interval holds at any one moment with probability >= 1 - delta, for any number of samples.
        """
        if not self.count or not weight**2 > squares:
            return (math.nan,) * 3
        return self._mmd(served, weight, squares, reach_now(weight**2 / squares, delta / 2) + reach_now(self.count, delta / 2))

    def _mmd(self, served: Float64[ndarray, "e"], weight: float | int, squares: float | int, error: float) -> tuple[float, float, float]:
        """Of unit vectors u the weighted mean of u_i.u_j over all pairs i != j is (|sum w u|^2 - sum w^2) / ((sum w)^2 - sum w^2)."""

        def within(total: ndarray, weight: float | int, squares: float | int) -> float:
            return float((total @ total - squares) / (weight**2 - squares))

        plain = float(np.linalg.norm(served / weight - self.sum / self.count))
        square = within(served, weight, squares) + within(self.sum, self.count, self.count) - 2 * float(served @ self.sum) / (weight * self.count)
        return math.sqrt(max(0.0, square)), max(0.0, plain - error), min(plain + error, 2.0)


def reach(n: int, delta: float, *, trace: float = 1.0, largest: float = 1.0) -> float:
    """How far the mean of n independent unit vectors is from its expectation, at most, at every n at once, but for `delta`.

    For n >= 2^k: expectation of the distance at 2^k, at most 2^-k/2, plus McDiarmid's margin; the distance is a reverse
    submartingale, so that the bound at 2^k holds from there on. The k share delta as 6 / (pi (k + 1))^2.
    Source: Manole and Ramdas, Martingale Methods for Sequential Estimation of Convex Functionals (IEEE Trans. Inf. Theory 2023).

    trace, largest: of the vectors' covariance where they are not bounded; the bound then holds for large n (`asymptotic.py`).
    """
    k = n.bit_length() - 1
    share = delta * 6 / (math.pi * (k + 1)) ** 2
    return (math.sqrt(trace) + math.sqrt(2 * largest * math.log(1 / share))) / math.sqrt(2**k)


def reach_now(n: float | int, delta: float, *, trace: float = 1.0, largest: float = 1.0) -> float:
    """The same at one moment, of a weighted mean that is worth n = (sum w)^2 / sum w^2 equal weights.

    The mean's squared distance from its expectation is sum w_i^2 (1 - |E u|^2) / (sum w)^2 <= 1 / n on average, so the distance is
    1 / sqrt(n) at most. Another u_i moves the distance by 2 w_i / sum w at most, squares that sum to 4 / n: McDiarmid's inequality
    (Surveys in Combinatorics 1989) leaves exp(-t^2 n / 2) for more than t beyond that. trace, largest: as above.
    """
    return (math.sqrt(trace) + math.sqrt(2 * largest * math.log(1 / delta))) / math.sqrt(n)
