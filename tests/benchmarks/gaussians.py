"""Closed forms of what gauges of points measure, between two Gaussians (mean, covariance): what intervals have to contain."""

from __future__ import annotations

import math

import numpy as np
from numpy import ndarray
from scipy.stats import norm

from training.moments import frechet

Law = tuple[ndarray, ndarray]


def draw(rng: np.random.Generator, count: int, law: Law, freedom: int | None = None) -> ndarray:
    """freedom: of Student's law with that mean and covariance, whose tails are heavier."""
    mean, covariance = law
    x = rng.standard_normal((count, len(mean)))
    if freedom is not None:
        x *= np.sqrt((freedom - 2) / rng.chisquare(freedom, (count, 1)))
    return (mean + x @ np.linalg.cholesky(covariance).T).astype(np.float32)


def kid(a: Law, b: Law) -> float:
    """Squared MMD of (x.y / p + 1)^3: x.y to the k-th power has as its mean the inner product of the laws' k-th moments."""

    def third(mean: ndarray, covariance: ndarray) -> ndarray:
        spread = mean[:, None, None] * covariance
        return mean[:, None, None] * np.outer(mean, mean) + spread + spread.transpose(1, 0, 2) + spread.transpose(1, 2, 0)

    def between(a: Law, b: Law) -> float:
        (m, s), (n, t), p = a, b, len(a[0])
        second = ((s + np.outer(m, m)) * (t + np.outer(n, n))).sum()
        return float(1 + 3 * m @ n / p + 3 * second / p**2 + (third(m, s) * third(n, t)).sum() / p**3)

    return between(a, a) + between(b, b) - 2 * between(a, b)


def sliced_wasserstein(a: Law, b: Law, directions: ndarray) -> float:
    """Between normal laws of the line, W1 = E |d + s Z|, d and s the differences of their means and standard deviations."""
    total = 0.0
    for along in directions:
        d, s = along @ (a[0] - b[0]), abs(math.sqrt(along @ a[1] @ along) - math.sqrt(along @ b[1] @ along))
        total += s * math.sqrt(2 / math.pi) * math.exp(-(d**2) / (2 * s**2)) + d * (1 - 2 * norm.cdf(-d / s)) if s > 1e-12 else abs(d)
    return float(total / len(directions))


def embedded(law: Law, frequencies: ndarray) -> ndarray:
    """The mean of (cos, sin)(x.w) / sqrt(F) over F frequencies w [p, F]: the law's characteristic function."""
    (mean, covariance), w = law, frequencies.astype(np.float64)
    damped = np.exp(-0.5 * (w * (covariance @ w)).sum(axis=0)) / math.sqrt(w.shape[1])
    return np.concatenate([damped * np.cos(mean @ w), damped * np.sin(mean @ w)])


def distances(a: Law, b: Law, directions: ndarray) -> dict[str, float]:
    return {"frechet": frechet(*a, *b)[0], "kid": kid(a, b), "sliced_wasserstein": sliced_wasserstein(a, b, directions)}
