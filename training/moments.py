"""How far two laws are apart by mean and covariance alone: one function for training, for the measuring stick and for the monitor.

Contract module: numpy only. It does not know where the moments come from.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

_ROUNDING = 1e-9  # of the largest eigenvalue: one that lies farther below zero is no rounding error


def frechet(
    mean1: Float64[ndarray, "p"], cov1: Float64[ndarray, "p p"], mean2: Float64[ndarray, "p"], cov2: Float64[ndarray, "p p"]
) -> tuple[float, int]:
    """Squared 2-Wasserstein distance between two Gaussians, and how many eigenvalues below zero had to be clipped for it.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Dowson and Landau, J. Multivariate Analysis 1982; the F of FID, Heusel et al. 2017).
    The trace of (S1 S2)^1/2 is the sum of the singular values of R1^T R2, S = R R^T. Eigenvalues of S1 S2, the usual way, are
    squares of these: what is lost of the smallest ones has shown in the sixth digit where features differ much in scale.
    """
    (root1, clipped1), (root2, clipped2) = _root(cov1), _root(cov2)
    cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return max(0.0, float(distance)), clipped1 + clipped2


def _root(covariance: Float64[ndarray, "p p"]) -> tuple[Float64[ndarray, "p p"], int]:
    """R with R R^T = covariance, and the number of clipped eigenvalues; directions that only rounding filled are left empty."""
    values, vectors = np.linalg.eigh(covariance)
    noise = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    clipped = int((values < -_ROUNDING * np.abs(values).max()).sum())
    return vectors * np.sqrt(np.where(values > noise, values, 0.0)), clipped


__all__ = ["frechet"]
