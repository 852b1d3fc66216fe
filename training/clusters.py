"""Counts the separate clusters of data, the peaks of their density that deep valleys part, and says whether they are heaps or
curves. From it the latent law follows.

A continuous latent cannot jump, so a smooth generator joins separate clusters by bridges of bad samples; signs jump, but leave
gaps in data that hang together. Nobody should have to know which of the two their data are. How many signs there shall be is
recipes.py's question.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

NEIGHBOURS = 20  # an estimated log density then varies by about 1 / sqrt(20), and no cluster has fewer samples
PROMINENCE = 2.0  # in nats: a peak counts where on every way to a higher one the density falls to less than a seventh of its own
UNEVEN = 0.02  # of the rows, how many may be dealt to another cluster than theirs
HOLLOW = 3.0  # distances to the k-th neighbour: a cluster has nothing in its middle where nothing lies nearer to it than this


class Clusters(NamedTuple):
    """What data fall into."""

    count: int  # at least one
    hollow: bool  # whether most rows lie in clusters with nothing in their middle: bent curves or sheets, rather than heaps
    signs: int  # the fewest whose patterns, each as likely as any other, can be dealt out to the clusters as their rows are

    @property
    def heaps(self) -> bool:
        """Whether data lie in separate heaps, rather than hang together or lie on a few curves or sheets."""
        return self.count > 1 and not self.hollow


def clusters(x: Float[ndarray, "n d"]) -> Clusters:
    """The separate clusters of rows; those of no more than NEIGHBOURS rows are not seen.

    Persistence-based clustering (ToMATo, Chazal et al., Journal of the ACM 60, 2013) on the graph of nearest neighbours: points
    are added from the densest on, a point that touches no component begins one, and where two meet the lower peak ends, unless its
    log density lies PROMINENCE above that meeting. The density is k / r^m, with r the distance to the k-th neighbour
    and m the intrinsic dimension (Levina and Bickel 2005, averaged as by MacKay and Ghahramani).
    """
    from sklearn.neighbors import NearestNeighbors  # slow to import, and every command line imports this file

    k = min(NEIGHBOURS, len(x) - 1)
    distance, index = NearestNeighbors(n_neighbors=k).fit(x).kneighbors()
    radius = np.maximum(distance, 1e-6)  # of exact repeats
    dimension = (k - 2) / max(np.mean(np.log(radius[:, -1:] / radius[:, :-1]).sum(axis=1)), 1e-9)
    height: list[float] = (-dimension * np.log(radius[:, -1])).tolist()

    order: list[int] = np.argsort(radius[:, -1], kind="stable").tolist()
    rank: list[int] = np.argsort(order).tolist()
    neighbours: list[list[int]] = index.tolist()
    for i, own in enumerate(index.tolist()):
        for j in own:
            neighbours[j].append(i)
    above = list(range(len(x)))  # leads from a point to the peak of its component

    def summit(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    for i in order:
        touched = {summit(j) for j in neighbours[i] if rank[j] < rank[i]} or {i}
        above[i] = highest = min(touched, key=rank.__getitem__)
        for lower in touched - {highest}:
            if height[lower] - height[i] < PROMINENCE:
                above[lower] = highest
    peaks = np.array([summit(i) for i in range(len(x))])
    found, rows = np.unique(peaks, return_counts=True)
    empty = sum(int(inside.sum()) for peak in found if _is_hollow(x[inside := peaks == peak], radius[inside, -1]))
    return Clusters(len(found), 2 * empty > len(x), signs_for(rows / len(x)))


def signs_for(shares: Float[ndarray, "k"]) -> int:
    """The fewest signs whose 2^s patterns can be dealt out to clusters of these shares, but for UNEVEN of them."""
    signs = math.ceil(math.log2(len(shares)))
    while (dealt := np.rint(shares * 2**signs)).min() == 0 or np.abs(dealt / 2**signs - shares).sum() / 2 > UNEVEN:
        signs += 1
    return signs


def _is_hollow(x: Float[ndarray, "n d"], radius: Float[ndarray, "n"]) -> bool:
    """Whether rows, each with the distance to its k-th neighbour, leave their middle empty."""
    return bool(np.linalg.norm(x - x.mean(axis=0), axis=1).min() > HOLLOW * np.median(radius))
