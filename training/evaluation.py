"""The offline measuring stick: how far samples are from real data, as numbers for people. Pure numpy and scipy.

Whether a generator may be published is gate.py's question; whether it still behaves, the monitor's.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from numpy import ndarray
from scipy.spatial import cKDTree
from scipy.stats import chi2

from training.data import Mixture

PERFECT = chi2.cdf(9, 2)  # 98.89 %: what a perfect sampler has within 3 sigma in the plane


def divergences(real: Float64[ndarray, "k"], generated: Float64[ndarray, "k"]) -> dict[str, float]:
    """Divergences between two laws over the same cells, in nats; infinite where a cell is unseen on the wrong side."""
    middle = (real + generated) / 2
    with np.errstate(divide="ignore"):
        terms = np.where(real > 0, (generated - real) ** 2 / real, np.where(generated > 0, np.inf, 0.0))
    return {
        "forward_kl": _kl(real, generated),
        "reverse_kl": _kl(generated, real),
        "js": (_kl(real, middle) + _kl(generated, middle)) / 2,
        "chi_squared": float(terms.sum()),
        "tv": float(np.abs(real - generated).sum() / 2),
    }


def _kl(p: Float64[ndarray, "k"], q: Float64[ndarray, "k"]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.sum(np.where(p > 0, p * np.log(p / q), 0.0)))


def frechet(
    mean1: Float64[ndarray, "p"], cov1: Float64[ndarray, "p p"], mean2: Float64[ndarray, "p"], cov2: Float64[ndarray, "p p"]
) -> float:
    """Squared 2-Wasserstein distance between two Gaussians (Dowson and Landau 1982; the F of FID, Heusel et al. 2017)."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov2 @ root), 0, None)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def prdc(real: Float32[ndarray, "n d"], fake: Float32[ndarray, "m d"], k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020); balls are open, as in their code.

    `coverage` is divided by its expectation when both samples follow one law, so that 1 is perfect at any n and m.
    """
    n, m = len(real), len(fake)
    real_radius = cKDTree(real).query(real, k + 1)[0][:, -1]
    fake_radius = cKDTree(fake).query(fake, k + 1)[0][:, -1]
    distance = np.sqrt(np.clip((real**2).sum(1)[:, None] - 2 * real @ fake.T + (fake**2).sum(1), 0, None))
    in_real = distance < real_radius[:, None]
    i = np.arange(k)
    expected = 1 - np.prod((n - 1 - i) / (n + m - 1 - i))
    return {
        "precision": float(in_real.any(axis=0).mean()),
        "recall": float((distance < fake_radius).any(axis=1).mean()),
        "density": float(in_real.sum(axis=0).mean() / k),
        "coverage": float((distance.min(axis=1) < real_radius).mean() / expected),
    }


def mixture_fit(mixture: Mixture, samples: Float[ndarray, "n d"]) -> dict[str, float]:
    """How well samples follow a known mixture. A perfect sampler has high_quality 0.9889, not more; in the plane spread 0.974.

    high_quality: share in the balls around centres that hold as much of a Gaussian as 3 sigma do in the plane.
    modes: centres with at least one such sample nearest to them.
    reverse_kl: from the uniform law over centres, of high-quality samples (NaN where there are none).
    spread: standard deviation of high-quality samples around their centre, per dimension of the Gaussian, in sigmas.
    """
    distance, nearest = cKDTree(mixture.centres).query(samples)
    good = distance < mixture.sigma * np.sqrt(chi2.ppf(PERFECT, mixture.rank))
    count: Int64[ndarray, "k"] = np.bincount(nearest[good], minlength=len(mixture.centres))
    return {
        "high_quality": float(good.mean()),
        "modes": int(np.count_nonzero(count)),
        "reverse_kl": _kl(count / count.sum(), np.full(len(count), 1 / len(count))) if good.any() else float("nan"),
        "spread": float(np.sqrt(np.mean(distance[good] ** 2) / mixture.rank) / mixture.sigma) if good.any() else float("nan"),
    }
