"""How far served shares q are from real shares p over K modes plus the off-manifold cell, with intervals.

Everything is in nats. p must be positive everywhere; q may have empty cells. The intervals are images of one confidence set for
q, valid at every sample of a block at once, so all of them hold together. Nothing here knows what a sample is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64, Num
from numpy import ndarray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import chdtri, gammaln, rel_entr, xlogy

Shares = Float64[ndarray, "k1"]


def forward_kl(p: Shares, q: Shares) -> float:
    """KL(real || served), the recall side: infinite while a real cell is never served."""
    return float(rel_entr(p, q).sum())


def reverse_kl(p: Shares, q: Shares) -> float:
    """KL(served || real), the precision side: at most log 1 / (1 - pi) when all that happens is that cells of mass pi vanish."""
    return float(rel_entr(q, p).sum())


def jensen_shannon(p: Shares, q: Shares) -> float:
    """In [0, log 2]; its square root is a metric (Endres and Schindelin, IEEE Trans. Inf. Theory 2003)."""
    middle = (p + q) / 2
    return float(rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2


def chi_squared(p: Shares, q: Shares) -> float:
    """Pearson's: sum (q - p)^2 / p."""
    return float(((q - p) ** 2 / p).sum())


def total_variation(p: Shares, q: Shares) -> float:
    return float(np.abs(p - q).sum()) / 2


DIVERGENCES: dict[str, Callable[[Shares, Shares], float]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": jensen_shannon,
    "chi_squared": chi_squared,
    "tv": total_variation,
}


@dataclass(frozen=True)
class ShareSet:
    """All laws q on the cells with KL(centre || q) <= radius."""

    centre: Shares  # the observed shares
    radius: float

    @classmethod
    def observed(cls, counts: Int64[ndarray, "k1"], *, priors: Float64[ndarray, "m k1"], delta: float) -> ShareSet:
        """Holds the true q at every sample of an i.i.d. stream at once, with probability >= 1 - delta.

        For each Dirichlet prior alpha, D_N = B(alpha + n) / (B(alpha) prod q_c^n_c) is a martingale that starts at 1, and so is
        the mean over `priors`, which must not depend on the stream. By Ville it stays below 1 / delta for ever, that is
            N KL(q_hat || q) <= beta_N = log(1 / delta) + sum n_c log(n_c / N) - log mean_alpha B(alpha + n) / B(alpha).
        Source: Lindon and Malek, Anytime-Valid Inference for Multinomial Count Data (NeurIPS 2022), with one prior.
        """
        total = counts.sum()
        if total == 0:
            raise ValueError("no sample was counted, so there is no set of shares; wait for the first one")
        centre = counts / total
        log_beta = [_log_beta(alpha + counts) - _log_beta(alpha) for alpha in priors]
        beta = -np.log(delta) + xlogy(counts, centre).sum() - (np.logaddexp.reduce(log_beta) - np.log(len(priors)))
        return cls(centre, float(beta / total))

    @classmethod
    def pointwise(cls, counts: Float64[ndarray, "k1"], *, count: float, delta: float) -> ShareSet:
        """Holds the true q at any one moment with probability 1 - delta, about, for many samples: 2 N KL(q_hat || q) is then
        chi-squared with K degrees of freedom (Wilks, Ann. Math. Stat. 1938). `counts` may be weights that are worth `count`
        equal ones; an effective count makes that an approximation too.
        """
        return cls(counts / counts.sum(), float(chdtri(len(counts) - 1, delta) / (2 * count)))

    @cached_property
    def low(self) -> Shares:
        """Least share of each cell in the set: lumping cells never increases KL, so kl(centre_c, q_c) <= radius."""
        return _binary_kl_inverse(self.centre, self.radius, upward=False)

    @cached_property
    def high(self) -> Shares:
        return _binary_kl_inverse(self.centre, self.radius, upward=True)


def _log_beta(alpha: Float64[ndarray, "k1"]) -> float:
    return float(gammaln(alpha).sum() - gammaln(alpha.sum()))


def _binary_kl_inverse(centre: Shares, radius: float, *, upward: bool) -> Shares:
    """The farthest b on one side with kl(centre, b) <= radius, rounded outwards."""
    inside, outside = centre.copy(), np.full_like(centre, 1.0 if upward else 0.0)
    for _ in range(60):
        middle = (inside + outside) / 2
        within = rel_entr(centre, middle) + rel_entr(1 - centre, 1 - middle) <= radius
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    return outside


def forward_kl_interval(p: Shares, shares: ShareSet) -> tuple[float, float]:
    """The extremes themselves, by Lagrange duality in one multiplier lambda = 1 / t.

    F(q) -+ (KL(centre || q) - radius) / t is concave (convex) and extremal at q_t = (centre -+ t p) / (1 -+ t). Its value there
    bounds F over the set whatever t is, and is attained where q_t lies on the boundary; so a root found badly makes the
    interval wider, never wrong.
    """

    def law(t: float) -> Shares:
        return (shares.centre + t * p) / (1 + t)

    def excess(t: float) -> float:
        return float(rel_entr(shares.centre, law(t)).sum()) - shares.radius

    def bound(t: float) -> float:
        return forward_kl(p, law(t)) + excess(t) / t

    low, high = 0.0, np.inf
    if rel_entr(shares.centre, p).sum() > shares.radius:
        low = max(0.0, bound(_root(excess, 0.0, 1e9)))
    if (shares.centre > 0).all():
        # Negative t is the upper end. KL(centre || q_t) grows without limit as q_t loses its first cell.
        high = bound(_root(excess, -float((shares.centre / p).min()) * (1 - 1e-12), 0.0))
    return low, high


def _root(f: Callable[[float], float], a: float, b: float) -> float:
    """The root of f in [a, b], or the end that is farther from 0 where f has one sign."""
    return brentq(f, a, b) if f(a) * f(b) < 0 else max(a, b, key=abs)


def _expanded(
    p: Shares,
    shares: ShareSet,
    *,
    f: Callable[[ndarray, ndarray], ndarray],
    slope: Callable[[ndarray], ndarray],
    inverse: Callable[[float], float],
    rate: Callable[[ndarray], ndarray],
) -> tuple[float, float]:
    """Outer bounds on D(q) = sum f(q_c, p_c), f convex in q with derivative slope(q / p), whose inverse is inverse.

    With c = centre, x = q / c, m = sum c slope(c / p), g = slope(c / p) - m, as shares sum to one,

        D(q) - D(c)   = sum_seen [c (x - 1) g + r(x)]        + sum_unseen h(q),   h(q) = f(q) - f(0) - m q,   r >= 0,
        KL(c || q)    = sum_seen c (x - 1 - log x)           + sum_unseen q                                   <= radius.

    Linear part: sup = min over lambda of lambda (radius - sum c log(1 - g / lambda)), by duality, any lambda being valid. Rest:
    at most the whole budget at its best rate, rate(x) = r(x) / (c (x - 1 - log x)) on seen cells, which increases in x, and
    h(q) / q on unseen ones, which increases as h is convex. Below, r >= 0 is left out, and h is at its least.
    """
    seen = shares.centre > 0
    centre, p_seen = shares.centre[seen], p[seen]
    mean = float(centre @ slope(centre / p_seen))
    g = slope(centre / p_seen) - mean

    def linear(g: ndarray) -> float:
        floor = max(float(g.max()), 0.0)

        def dual(log_excess: float) -> float:
            scale = floor + np.exp(log_excess)
            return scale * (shares.radius - (centre * np.log1p(-g / scale)).sum())

        return max(0.0, float(minimize_scalar(dual, bounds=(-25.0, 15.0), method="bounded").fun))

    # Near x = 1 the rate is 0 / 0; a larger x only widens.
    best = float(rate(np.maximum(shares.high[seen] / centre, 1.001)).max())
    least = 0.0
    if not seen.all():
        p_unseen, top = p[~seen], shares.high[~seen]
        best = max(best, float(((f(top, p_unseen) - f(0 * top, p_unseen)) / top).max()) - mean)
        q = np.minimum(top, p_unseen * inverse(mean))
        least = float((f(q, p_unseen) - f(0 * q, p_unseen) - mean * q).sum())
    value = float(f(shares.centre, p).sum())
    return max(0.0, value - linear(-g) + least), value + linear(g) + max(0.0, best) * shares.radius


def reverse_kl_interval(p: Shares, shares: ShareSet) -> tuple[float, float]:
    return _expanded(
        p,
        shares,
        f=lambda q, p: rel_entr(q, p) - q + p,
        slope=np.log,
        inverse=np.exp,
        rate=lambda x: (x * np.log(x) - x + 1) / (x - 1 - np.log(x)),
    )


def chi_squared_interval(p: Shares, shares: ShareSet) -> tuple[float, float]:
    seen = shares.centre > 0
    return _expanded(
        p,
        shares,
        f=lambda q, p: (q - p) ** 2 / p,
        slope=lambda ratio: 2 * (ratio - 1),
        inverse=lambda m: max(0.0, 1 + m / 2),
        rate=lambda x: (shares.centre / p)[seen] * (x - 1) ** 2 / (x - 1 - np.log(x)),
    )


def js_interval(p: Shares, shares: ShareSet) -> tuple[float, float]:
    """sqrt(JS) is a metric, and JS(centre, q) <= KL(centre || q) / 2: no law has a smaller sum of KLs to it than the middle."""
    root, reach = np.sqrt(jensen_shannon(p, shares.centre)), np.sqrt(shares.radius / 2)
    return float(max(0.0, root - reach) ** 2), float(min(np.log(2), (root + reach) ** 2))


def tv_interval(p: Shares, shares: ShareSet) -> tuple[float, float]:
    """Triangle inequality and Pinsker: TV(centre, q) <= sqrt(radius / 2)."""
    value, reach = total_variation(p, shares.centre), np.sqrt(shares.radius / 2)
    return max(0.0, float(value - reach)), min(1.0, float(value + reach))


INTERVALS: dict[str, Callable[[Shares, ShareSet], tuple[float, float]]] = {
    "forward_kl": forward_kl_interval,
    "reverse_kl": reverse_kl_interval,
    "js": js_interval,
    "chi_squared": chi_squared_interval,
    "tv": tv_interval,
}


def smoothed(counts: Num[ndarray, "k1"]) -> Shares:
    """Shares with half a sample added to each cell, for where a plain share of zero would make a divergence infinite."""
    return (counts + 0.5) / (counts.sum() + len(counts) / 2)
