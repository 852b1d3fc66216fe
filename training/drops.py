"""CONTRACT. How the loss of a mode is bet on, and after how many samples it would be seen: the monitor bets so, and the card says it.

Knows a certificate, numpy and scipy; the detector that the bets belong to is monitoring/edetectors.py.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.special import xlogy

from training.bundle import Certificate

DROP_WEIGHT = 0.29  # of the false-alarm budget: all bets on a loss together
RISE_WEIGHT = 0.0025  # what of the half of it that is for classes goes to bets that one of these makes a mode too often, and as much for fakes
DROP_BETS = {0.0: 0.8, 0.5: 0.2}  # theta / m: what is left of a mode -> the bet's part of the weight
LEAST_GIVEN = 0.05  # of a class: a mode that it makes more rarely is not bet on given that class
UNWATCHED = 1e5  # samples: a mode whose loss would take longer to be seen counts as unwatched, never as fine

DropBounds = tuple[Float64[ndarray, "g k"], Float64[ndarray, "g"]]


def mode_bounds(certificate: Certificate) -> tuple[Float64[ndarray, "g k"], Float64[ndarray, "g k"]]:
    """Bounds on each mode's share of the *on-manifold* samples: row 0 of all, row c + 1 of those of class c, if there are classes.

    Fakes lower the share of every mode; among on-manifold samples they do not, so that a mode is accused only of what it lost
    to other modes or to junk of its own. Given how many of the certificate's samples lie on the manifold, the counts are
    binomial: still exact.
    """
    modes = np.concatenate([certificate.cell_count[None], certificate.class_cell_count.reshape(-1, len(certificate.cell_count))])[:, :-1]
    bounds = [(certificate.lower(row, int(row.sum())), certificate.upper(row, int(row.sum()))) for row in modes]
    low, high = (np.stack(side) for side in zip(*bounds, strict=True))
    return low, high


def drop_bounds(certificate: Certificate) -> DropBounds:
    """The lower bound that each bet on a loss is against, 0 where there is none, and the weight of each row's bets together.

    Given a class, only those modes are bet on which it makes often; the rest is confusion. Where there are classes, samples
    drawn by the law and samples of classes that clients asked for have half of the weight each, whichever come; of the latter half,
    bets on what a class makes too often take RISE_WEIGHT twice.
    """
    low, _ = mode_bounds(certificate)
    low[1:][low[1:] < LEAST_GIVEN] = 0.0
    bets = (low > 0).sum(axis=1)
    if len(low) == 1:
        return low, np.array([DROP_WEIGHT])
    return low, np.append(DROP_WEIGHT / 2, (DROP_WEIGHT / 2 - 2 * RISE_WEIGHT) * bets[1:] / max(1, bets[1:].sum()))


def delay_of_loss(certificate: Certificate, bounds: DropBounds, losses: Float64[ndarray, "m"], *, threshold: float) -> Float64[ndarray, "m k"]:
    """Samples until a mode that lost this part of its share is found, about, by its own bets; infinite where they never would.
    bounds: the certificate's `drop_bounds`, which take longer than all else here.

    Wald: log(threshold / w) over the growth of the best bet, E[log L]. An approximation for people, no bound.
    """
    (low, *_), (weight, *_) = bounds
    modes = certificate.cell_count[:-1]
    delay = np.full((len(losses), len(low)), np.inf)
    if not (watched := low > 0).any():
        return delay
    q = (1 - losses[:, None]) * modes[watched] / modes.sum()
    bound = low[watched]
    looked = modes.sum() / certificate.count  # bets abstain off the manifold
    best = np.full(q.shape, np.inf)
    for rho, part in DROP_BETS.items():
        growth = looked * (xlogy(q, rho) + (1 - q) * np.log((1 - rho * bound) / (1 - bound)))
        with np.errstate(divide="ignore"):
            best = np.minimum(best, np.log(threshold * watched.sum() / (weight * part)) / np.maximum(growth, 0))
    delay[:, watched] = best
    return delay
