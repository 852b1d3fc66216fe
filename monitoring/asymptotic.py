"""Intervals that hold at every sample of a block at once, for large numbers of samples: `ci="asymptotic"`.

All rest on one fact. What a gauge is made of is the mean of n independent vectors with some covariance G, be it their features,
what a kernel makes of them, or first-order terms. sqrt(n) times its error tends to a Gaussian vector Z, and

    E |Z| <= sqrt(tr G),   log E exp(t (|Z| - E |Z|)) <= t^2 lambda_max(G) / 2   (Boucheron, Lugosi and Massart, Concentration
    Inequalities, 2013, Theorem 5.5: |Z| is sqrt(lambda_max)-Lipschitz in standard normals).

The distance of a mean from its expectation is a reverse submartingale, so that Doob's inequality turns this into a bound that holds
from a sample on (`points.reach`). What is asymptotic: that Z is Gaussian, and that G is estimated from the newest points.

A distance is changed by no more than its arguments are moved: the triangle inequality makes these intervals hold as well where
served and real law agree, where the delta method fails and plug-ins are biased by as much as they vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from scipy.sparse.linalg import eigsh

from monitoring.points import DIRECTIONS, directions, kernel, reach, reach_now

READINGS = 8  # moments of a block at which gauges of its points are read, at most: at 64, 128 .. 4,096 samples, and once more


class Spread(NamedTuple):
    """Of vectors with covariance G: its trace and its largest eigenvalue."""

    trace: float
    largest: float

    @classmethod
    def of(cls, gram: Float64[ndarray, "n n"]) -> Spread:
        """From the inner products of n of them, not yet centred. With few points in many dimensions `largest` comes out too large."""
        centred = _centred(gram)
        return cls(float(np.trace(centred)) / (len(gram) - 1), _largest(centred) / (len(gram) - 1))

    def reach(self, n: int, *, delta: float) -> float:
        """How far the mean of the first n of a stream is from its expectation, at most, for every n at once but for `delta`."""
        return reach(n, delta, trace=self.trace, largest=self.largest)

    def reach_now(self, n: float, *, delta: float) -> float:
        """The same at one moment, of a mean whose weights are worth n equal ones."""
        return reach_now(n, delta, trace=self.trace, largest=self.largest)


def _centred(products: Float64[ndarray, "n m"]) -> Float64[ndarray, "n m"]:
    return products - products.mean(axis=0) - products.mean(axis=1, keepdims=True) + products.mean()


def _largest(gram: Float64[ndarray, "n n"]) -> float:
    """The largest eigenvalue, to rounding, by Lanczos' iteration: all n of them take ten times as long."""
    if len(gram) < 3 or not np.trace(gram) > 0:
        return float(np.linalg.eigvalsh(gram)[-1])
    start = np.random.default_rng(0).normal(size=len(gram))  # ARPACK's own is drawn anew each time
    return float(eigsh(gram, k=1, which="LA", v0=start, return_eigenvectors=False)[0])


def moments_spread(points: Float[ndarray, "n p"]) -> Spread:
    """Of the first-order terms of W2 between a Gaussian and the one fitted to samples.

    Near N(m, S) with eigenvalues l_a, in whose basis mean and covariance are moved by u and D, W2^2 = |u|^2 + sum D_ab^2 / (2 (l_a + l_b))
    to second order (Bures' metric; Takatsu, Wasserstein geometry of Gaussian measures, Osaka J. Math. 2011). So a sample is the
    vector of y = x - m and (y_a y_b - S_ab) / sqrt(2 (l_a + l_b)).
    """
    y = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(y.T @ y / len(y))
    kept = values > 1e-9 * max(float(values[-1]), 1e-300)  # where nothing varies, nothing is moved
    y, values = y @ vectors[:, kept], values[kept]
    a, b = np.triu_indices(len(values))  # each pair a < b stands for two terms
    pairs = y[:, a] * y[:, b] / np.sqrt(np.where(a == b, 2.0, 1.0) * (values[a] + values[b]))
    return Spread.of(y @ y.T + pairs @ pairs.T)


def frechet_interval(value: float, error: float) -> tuple[float, float]:
    """Of the squared W2 distance of a Gaussian to one that was fitted to samples and is off by no more than `error`, in W2.

    W2 between Gaussians is a metric, so the root of the distance is off by no more, either.
    """
    root = math.sqrt(value)
    return max(0.0, root - error) ** 2, (root + error) ** 2


@dataclass(frozen=True)
class Real:
    """Points of the real law, with what every interval needs of them."""

    points: Float[ndarray, "m p"]

    @cached_property
    def _kernel(self) -> Kernelled:
        return Kernelled.of(self.points)

    def kid_interval(self, value: float, served: Float[ndarray, "n p"], *, delta: float) -> tuple[float, float]:
        """Of the KID of two laws from n and m points of them, `value` being the unbiased estimate; at one moment.

        M^2 is the squared distance of mean embeddings, E the error of their difference, of covariance H = G / n + G' / m: the
        estimate is M^2 + 2 <E, M> + |E|^2 - tr H. The second term is normal with variance at most 4 M^2 h, h the largest eigenvalue
        of H; the rest lies within -2 sqrt(t tr H^2) .. 2 sqrt(t tr H^2) + 2 t h but for exp(-t) each (Laurent and Massart, Ann.
        Statist. 2000, Lemma 1), whether M is zero or not. Four such events share delta. tr H^2 and h come out too large, if at all.
        """
        ours, theirs, t = Kernelled.of(served), self._kernel, math.log(4 / delta)
        cross = float((_centred(kernel(served, self.points)) ** 2).mean()) / (len(served) * len(self.points))
        square, h = ours.square + theirs.square + 2 * cross, ours.largest + theirs.largest
        slope, low, high = math.sqrt(2 * h * t), 2 * math.sqrt(t * square), 2 * math.sqrt(t * square) + 2 * t * h
        least = max(0.0, math.sqrt(slope**2 + max(0.0, value - high)) - slope)
        most = slope + math.sqrt(max(0.0, slope**2 + value + low))
        return least**2, most**2

    def sliced_wasserstein_interval(self, value: float, served: Float[ndarray, "n p"], *, delta: float) -> tuple[float, float]:
        """Of the mean W1 over the fixed directions between two laws, from n and m points of them; at one moment.

        W1 is a metric. For n points of a law F of the line, sqrt(n) W1(F_n, F) tends to the integral of |B(F)|, B a Brownian bridge,
        whose mean is sqrt(2 / pi) integral sqrt(F (1 - F)) (del Barrio, Gine and Matran, Ann. Probab. 1999); it is the supremum of
        Gaussian variables with the variances of 1-Lipschitz functions of x, none of which varies more than x.
        """
        error = sum(_projected_error(points, math.log(2 / delta)) for points in (served, self.points))
        return max(0.0, value - error), value + error


class Kernelled(NamedTuple):
    """Of n points in the space of `kernel`, G the covariance there: tr (G / n)^2 and the largest eigenvalue of G / n."""

    square: float
    largest: float

    @classmethod
    def of(cls, points: Float[ndarray, "n p"]) -> Kernelled:
        centred = _centred(kernel(points, points)) / len(points) ** 2
        return cls(float((centred**2).sum()), _largest(centred))


def _projected_error(points: Float[ndarray, "n p"], t: float) -> float:
    """Bound on the mean W1 over the directions between n points and their law, but for exp(-t)."""
    n = len(points)
    projected = np.sort(directions(points.shape[1]) @ points.astype(np.float64).T)
    share = np.arange(1, n) / n
    mean = math.sqrt(2 / math.pi) * float((np.diff(projected) @ np.sqrt(share * (1 - share))).sum()) / DIRECTIONS
    return (mean + math.sqrt(2 * t * float(projected.var(axis=1).mean()))) / math.sqrt(n)
