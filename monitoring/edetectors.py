"""The alarm: a mixture of Shiryaev-Roberts e-detectors, each of which bets against one bound of the certificate.

A bet pays L >= 0 for a sample, with E[L | past] <= 1 for every law that the certificate's bounds allow. R <- (1 + R) L then makes
R_t - t a supermartingale, and so is the mixture's: sum w R_t - t, as sum w <= 1. Stopping at tau = min {t: sum w R_t >= A} gives
E[tau] >= E[sum w R_tau] >= A: on average at least A samples to a false alarm, in finite samples and for any dependence, given
that the certificate's bounds hold (probability >= 1 - delta). Capping R only lowers it, and so does leaving it as it is.
Source: Shin, Ramdas and Rinaldo, E-detectors: a nonparametric framework for sequential change detection (NEJSDS 2024).

Bets on an event pay theta / m where it happens and (1 - theta) / (1 - m) where it does not, with m a bound on its probability.
If that is q, E[L] = 1 + (q - m) (theta - m) / (m (1 - m)): at most 1 for every q <= m when theta > m, and for every q >= m when
theta < m. So a bet against an upper bound puts theta above it, against a lower bound below it. What the other bets pay, and
why it is fair, is said at `tilted`, `Shares`, `Duplicates`, and in `bulk.py`.

Null A, the served law is the certified one: all kinds but `quality`, which is null B. This file knows scores, cells, features
and bytes; it knows no words.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy import ndarray
from scipy.special import ndtri

from monitoring.bulk import RATES, Moments
from monitoring.coverage import RHO
from training.bundle import DUPLICATE_BLOCK, NEAREST_TRAIN, OFF_MANIFOLD_EXCESS, Certificate, Reference

FAMILIES = {"modes": 0.26, "tails": 0.20, "bulk": 0.49, "copies": 0.01, "duplicates": 0.01, "quality": 0.03}
"""Family -> its share of the false-alarm budget. A family that has no bet leaves its share unused, which is valid too."""

NULLS = {family: "B" if family == "quality" else "A" for family in FAMILIES}
"""Family -> the hypothesis that it tests."""

KINDS = {
    "drop": ("modes", 0.24),
    "inflate": ("modes", 0.01),
    "shares": ("modes", 0.01),
    "upper": ("tails", 0.18),
    "lower": ("tails", 0.02),
    "wider": ("bulk", 0.02),
    "narrower": ("bulk", 0.14),
    "moved": ("bulk", 0.33),
    "copies": ("copies", 0.01),
    "duplicates": ("duplicates", 0.01),
    "quality": ("quality", 0.03),
}
"""What a bet accuses the model of -> its family and its weight; a kind's bets share the weight, equally but for those that `moved`."""

TAIL_BETS = (0.01, 0.1, 0.6)  # theta; used where above the bound
TAIL_FROM = 1 / 16  # shallower levels are the bulk's
COPIES_FROM = 1 / 1024  # what is merely close to the training data is no copy: only the deepest levels tell
TILTS = (0.3, 0.8, 2.0)  # of a score's normal quantile: the shift, in standard deviations, that a bet is best for
DROP_BETS = (0.0, 0.35)  # theta / m: what is left of a mode
INFLATE_BETS = (1.5, 3.0)  # theta / m
QUALITY_BETS = (0.0, 0.25, 0.5)  # theta / m: what is left of the least share that null B allows, RHO of the real one
EXCESS_BETS = (0.1, 0.3, 0.7)  # (theta - m) / (1 - m) for off-manifold samples under null B
SHARE_RATES = (1 / 256, 1 / 2048)  # at which `shares` forget
LEAST_EXPECTED_HITS = 10  # a tail level is usable where the certificate expects at least as many hits

CHUNK = 64  # samples that are looked at together, which bounds memory
_CAP = 1e150  # far above every threshold, far below overflow


def tail_levels(certificate: Certificate) -> Bool[ndarray, "l"]:
    return certificate.levels * certificate.count >= LEAST_EXPECTED_HITS


def mode_bounds(certificate: Certificate) -> tuple[Float64[ndarray, "k"], Float64[ndarray, "k"]]:
    """Bounds on each mode's share of the *on-manifold* samples.

    Fakes lower the share of every mode; among on-manifold samples they do not, so that a mode is accused only of what it lost
    to other modes or to junk of its own. Given how many of the certificate's samples lie on the manifold, the counts are
    binomial: still exact.
    """
    modes = certificate.cell_count[:-1]
    on_manifold = int(modes.sum())
    return certificate.lower(modes, on_manifold), certificate.upper(modes, on_manifold)


def tilted(payoff: Float64[ndarray, "... b"], low: Float64[ndarray, "e"], high: Float64[ndarray, "e"]) -> Float64[ndarray, "... b"]:
    """Any payoff f >= 0 over the bins of a score, made a fair bet: f over a bound on its mean.

    low, high [e]: bounds on the chance P_j that the score lies beyond edge j = 1 .. e, between bins j - 1 and j. Summed by
    parts, E[f] = f_0 + sum_j (f_j - f_{j-1}) P_j, which is at most the same sum with `high` where f rises and `low` where it
    falls. A bet on a tail is the payoff with one step.
    """
    steps = np.diff(payoff)
    return payoff / (payoff[..., :1] + (steps * np.where(steps > 0, high, low)).sum(axis=-1, keepdims=True))


class Scores:
    """Bets on where the scores of a sample lie among their certified quantiles: on each tail, and on the bulk as a whole.

    The lower tail of score number `nearest_train` is a kind of its own, `copies`.

    Tails: a step at one level. Bulk: exp(+-lambda h) for h the normal quantile of the middle of the bin, the likelihood ratio
    of a score that was shifted by lambda standard deviations, on the scale on which the certified score is normal.
    """

    def __init__(self, certificate: Certificate, nearest_train: int | None = None) -> None:
        usable, count = tail_levels(certificate), certificate.count
        levels = certificate.levels[usable]
        beneath, above = certificate.lower_hits[:, usable][:, ::-1], certificate.upper_hits[:, usable]
        # Below a lower threshold is what counts as a hit, so a score at the threshold is beyond the edge just under it.
        edges = [np.nextafter(certificate.lower_threshold[:, usable][:, ::-1], -np.inf), certificate.upper_threshold[:, usable]]
        self._edges = np.concatenate(edges, axis=1)  # [score, edge]
        low = np.concatenate([1 - certificate.upper(beneath, count), certificate.lower(above, count)], axis=1)
        high = np.concatenate([1 - certificate.lower(beneath, count), certificate.upper(above, count)], axis=1)

        split, bins = len(levels), np.arange(2 * len(levels) + 1)
        hit = np.concatenate([bins <= np.arange(split)[:, None], bins > np.arange(split, 2 * split)[:, None]])
        bound = np.concatenate([1 - low[:, :split], high[:, split:]], axis=1)[..., None]
        theta = np.array(TAIL_BETS)
        deep = np.concatenate([levels[::-1], levels]) <= TAIL_FROM
        allowed = (theta > bound) & deep[:, None]  # [score, edge, bet]
        if nearest_train is not None:
            allowed[nearest_train, :split] &= (levels[::-1] <= COPIES_FROM)[:, None]
        bound = np.where(allowed, bound, 0.5)
        tails = np.where(hit[:, None], (theta / bound)[..., None], ((1 - theta) / (1 - bound))[..., None])

        beyond = np.concatenate([[1.0], 1 - levels[::-1], levels, [0.0]])  # nominal chance of each edge, and of the ends
        tilts = np.exp(np.outer(np.outer([1, -1], TILTS), ndtri(1 - (beyond[1:] + beyond[:-1]) / 2)))
        bulk = np.stack([tilted(tilts, *bounds) for bounds in zip(low, high, strict=True)])

        flat = [part.reshape(len(low), -1, len(bins)) for part in (tails, bulk)]
        self._table = np.concatenate(flat, axis=1).transpose(0, 2, 1).copy()  # score, bin -> payoff of each bet
        rest = ("upper",) * (split * len(theta)) + ("wider",) * len(TILTS) + ("narrower",) * len(TILTS)
        lower = ["copies" if s == nearest_train else "lower" for s in range(len(low))]
        self.kinds = tuple(kind for below in lower for kind in ((below,) * (split * len(theta)) + rest))
        self.allowed = np.concatenate([allowed.reshape(len(low), -1), np.ones(bulk.shape[:2], bool)], axis=1).ravel()
        self._scores = np.arange(len(low))

    def payoffs(self, scores: Float[ndarray, "n s"]) -> Float64[ndarray, "n b"]:
        bins = np.empty(scores.shape, np.intp)
        for s, edges in enumerate(self._edges):
            bins[:, s] = edges.searchsorted(scores[:, s])
        return self._table[self._scores, bins].reshape(len(scores), -1)


class Shares:
    """Bets on the shares that the cells have had of late: L = pi(c) / m(c) for a sample in cell c.

    pi, from the past alone, is a probability vector: the certified shares and the counts of the last samples, forgotten at
    `SHARE_RATES`, in halves once the counts are full. m are upper bounds on the shares q, so E[L] = sum q pi / m <= 1.
    """

    kinds = ("shares",) * len(SHARE_RATES)

    def __init__(self, certificate: Certificate) -> None:
        self._bound = certificate.upper(certificate.cell_count, certificate.count)
        self._prior = (certificate.cell_count + 0.5) / (certificate.count + 0.5 * certificate.cell_count.size)
        self._rate = np.array(SHARE_RATES)
        past = np.arange(CHUNK)[:, None] - np.arange(CHUNK) - 1
        self._kept = (1 - self._rate) ** np.arange(CHUNK + 1)[:, None]  # [age, rate]
        weight = np.where(past >= 0, self._kept[np.maximum(past, 0)].transpose(2, 0, 1), 0.0)
        self._weight = np.ascontiguousarray(weight)  # [rate, now, before]
        self._counts = np.zeros((len(self._rate), certificate.cell_count.size))
        self._total = np.zeros(len(self._rate))

    def payoffs(self, cells: Int64[ndarray, "n"]) -> Float64[ndarray, "n b"]:
        """For at most CHUNK samples, which then belong to the past."""
        n = len(cells)
        kept, full = self._kept[:n], 1 / self._rate
        counts, totals = kept * self._counts[:, cells].T, kept * self._total
        if n > 1:
            counts += (self._weight[:, :n, :n] * (cells[:, None] == cells)).sum(axis=2).T
            totals += (1 - kept) * full
        payoffs = (self._prior[cells, None] * full + counts) / ((full + totals) * self._bound[cells, None])
        self._counts *= self._kept[n][:, None]
        np.add.at(self._counts, (slice(None), cells), kept[::-1].T)
        self._total = self._total * self._kept[n] + kept.sum(axis=0)
        return payoffs

    def state(self) -> dict[str, Any]:
        return {"counts": self._counts, "total": self._total}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._counts, self._total = np.array(state["counts"]), np.array(state["total"])


class Cells:
    """Bets that each of K modes pays `hit` at its own samples and `miss` at all others: R, hit, miss [K, b].

    While a mode is missed R <- miss (1 + R) over and over, so n samples come to R <- miss^n R + (miss + ... + miss^n): whole
    chunks are done at once, mode by mode only where one was hit. Between hits R goes one way, hence the highest that it was is
    known too.
    """

    def __init__(self, bound: Float64[ndarray, "k b"], theta: Float64[ndarray, "k b"]) -> None:
        self.allowed = (bound > 0) & (bound < 1) & (theta < 1)
        bound, theta = np.where(self.allowed, bound, 0.5), np.where(self.allowed, theta, 0.5)
        self.hit, self.miss = theta / bound, (1 - theta) / (1 - bound)
        self._power = self.miss ** np.arange(CHUNK + 1)[:, None, None]
        self._sum = np.cumsum(self._power, axis=0) - 1
        self.r = np.zeros(bound.shape)

    def step(self, cells: Int64[ndarray, "n"]) -> Float64[ndarray, "k b"]:
        """At most CHUNK samples, each in a mode or, K, in none; returns the most that each R has been after any of them.

        For one sample that is R itself.
        """
        n, before = len(cells), self.r
        if n == 1:
            self.r = (1 + before) * self.miss
            if (k := cells[0]) < len(before):
                self.r[k] = self.hit[k] * (1 + before[k])
            return np.minimum(self.r, _CAP, out=self.r)
        self.r = before * self._power[n] + self._sum[n]
        most = np.maximum(before, self.r)
        order = np.argsort(cells, kind="stable")
        hits = cells[order]
        order, hits = order[hits < len(before)], hits[hits < len(before)]
        first = np.flatnonzero(np.diff(hits, prepend=-1))
        modes, times = hits[first], np.diff(np.append(first, len(hits)))
        value, done = before[modes], np.zeros(len(modes), np.intp)
        highest = value.copy()
        for turn in range(times.max(initial=0)):
            again = np.flatnonzero(times > turn)
            k, now = modes[again], order[first[again] + turn]
            missed = value[again] * self._power[now - done[again], k] + self._sum[now - done[again], k]
            value[again] = np.minimum(self.hit[k] * (1 + missed), _CAP)
            highest[again] = np.maximum(highest[again], np.maximum(missed, value[again]))
            done[again] = now + 1
        self.r[modes] = value * self._power[n - done, modes] + self._sum[n - done, modes]
        most[modes] = np.maximum(highest, self.r[modes])
        np.minimum(self.r, _CAP, out=self.r)
        return most

    def path(self, cells: Int64[ndarray, "n"]) -> Float64[ndarray, "n k b"]:
        """The same, returning every R after every sample."""
        path = np.repeat(self.miss[None], len(cells), axis=0)
        hits = np.flatnonzero(cells < len(self.r))
        path[hits, cells[hits]] = self.hit[cells[hits]]
        r = self.r
        for row in path:  # L on entry, R on exit
            row *= 1 + r
            r = np.minimum(row, _CAP, out=row)
        self.r = r.copy()
        return path


class Modes:
    """The bets on single cells: drop, inflate, and null B's quality. Groups: drop:<mode> for each mode, inflate, quality.

    Drop and inflate look at on-manifold samples only; R stays as it is at others, which no bet of theirs concerns.
    """

    def __init__(self, certificate: Certificate, reference: Reference, modes: tuple[str, ...]) -> None:
        self.groups = (*(f"drop:{name}" for name in modes), "inflate", "quality")
        self._drops = len(DROP_BETS)
        low, high = mode_bounds(certificate)
        bound = np.repeat(np.stack([low, high], axis=1), (self._drops, len(INFLATE_BETS)), axis=1)
        self._shares = Cells(bound, bound * np.array(DROP_BETS + INFLATE_BETS))
        real = reference.cell_share
        m = np.append(RHO * real[:-1], real[-1] + OFF_MANIFOLD_EXCESS)  # from the real data alone: what was certified may be bad
        theta = m[:, None] * np.array(QUALITY_BETS)
        theta[-1] = m[-1] + (1 - m[-1]) * np.array(EXCESS_BETS)
        self._quality = Cells(np.repeat(m[:, None], len(QUALITY_BETS), axis=1), theta)
        allowed = {"drop": self._shares.allowed[:, : self._drops], "inflate": self._shares.allowed[:, self._drops :]}
        weights = {kind: KINDS[kind][1] * a / max(1, a.sum()) for kind, a in (allowed | {"quality": self._quality.allowed}).items()}
        self._weights = np.concatenate([weights["drop"], weights["inflate"]], axis=1), weights["quality"]

    def step(self, cells: Int64[ndarray, "n"]) -> tuple[Float64[ndarray, "k b"], Float64[ndarray, "k1 c"]]:
        """At most CHUNK samples; returns the most that each R has been."""
        on_manifold = cells[cells < len(self._shares.r)]
        return self._shares.step(on_manifold) if len(on_manifold) else self._shares.r, self._quality.step(cells)

    def total(self, r: tuple[Float64[ndarray, "k b"], Float64[ndarray, "k1 c"]]) -> float:
        return float(np.vdot(r[0], self._weights[0]) + np.vdot(r[1], self._weights[1]))

    def grouped(self, r: tuple[Float64[ndarray, "k b"], Float64[ndarray, "k1 c"]]) -> Float64[ndarray, "g"]:
        weighted = r[0] * self._weights[0]
        drops, inflate = weighted[:, : self._drops].sum(axis=1), weighted[:, self._drops :].sum()
        return np.append(drops, (inflate, np.vdot(r[1], self._weights[1])))

    def path(self, cells: Int64[ndarray, "n"]) -> Float64[ndarray, "n g"]:
        """The same, returning the evidence of each group after each sample."""
        seen = cells < len(self._shares.r)
        shares = np.concatenate([self._shares.r[None], self._shares.path(cells[seen])])[np.cumsum(seen)] * self._weights[0]
        quality = (self._quality.path(cells) * self._weights[1]).sum(axis=(1, 2))
        drops, inflate = shares[:, :, : self._drops].sum(axis=2), shares[:, :, self._drops :].sum(axis=(1, 2))
        return np.column_stack([drops, inflate, quality])

    @property
    def r(self) -> tuple[Float64[ndarray, "k b"], Float64[ndarray, "k1 c"]]:
        """All R, in arrays that are never written to."""
        return self._shares.r, self._quality.r

    @r.setter
    def r(self, values: tuple[Float64[ndarray, "k b"], Float64[ndarray, "k1 c"]]) -> None:
        self._shares.r, self._quality.r = (np.minimum(value, _CAP) for value in values)


class Duplicates:
    """Bets on exact repeats within blocks of DUPLICATE_BLOCK consecutive samples, blocks running on across updates.

    Inside a block the past tells whether it will hit, so a bet paid at its end would not be fair to somebody who may stop
    before. Therefore a block's loss is paid at its first sample and returned, with the win, at the very sample that repeats;
    whoever starts betting inside a block starts with the next one: R_t = R_0 lambda_t + u at the block's u-th sample, where
    lambda_t is win or lose so far. As lambda_t <= E[L | past], R_t is at most a process Z with Z_t - t a supermartingale, and
    E[R_tau] <= E[Z_tau] <= E[tau] for every tau.
    """

    def __init__(self, certificate: Certificate) -> None:
        hits, blocks = certificate.duplicate_hits, certificate.duplicate_blocks
        bound = float(certificate.upper(hits, blocks)) if blocks else 1.0
        theta = np.array([r for r in TAIL_BETS if r > bound])
        self._win, self._lose = theta / bound, (1 - theta) / (1 - bound) if bound < 1 else theta
        self._weights = np.full(len(theta), KINDS["duplicates"][1] / max(1, len(theta)))
        self._start = np.zeros(len(theta))  # R where the block began
        self._joined = np.zeros(len(theta))  # R of other detectors, which bets from the next block on
        self._block: set[bytes] = set()
        self._length, self._hit = 0, False

    def update(self, samples: ndarray) -> Float64[ndarray, "n"]:
        """Weighted evidence after each of n samples."""
        path = np.empty(len(samples))
        done = 0
        while done < len(samples):
            part = samples[done : done + DUPLICATE_BLOCK - self._length]
            hit = np.empty(len(part), bool)
            for i, sample in enumerate(part):
                row = sample.tobytes()
                self._hit = self._hit or row in self._block
                self._block.add(row)
                hit[i] = self._hit
            held = np.arange(self._length + 1, self._length + len(part) + 1)
            values = np.minimum(self._start * np.where(hit[:, None], self._win, self._lose) + held[:, None] + self._joined, _CAP)
            path[done : done + len(part)] = (values * self._weights).sum(axis=1)  # not BLAS, which rounds by the number of rows
            done += len(part)
            self._length += len(part)
            if self._length == DUPLICATE_BLOCK:
                self._start, self._block, self._length, self._hit = values[-1], set(), 0, False
                self._joined = np.zeros_like(values[-1])
        return path

    @property
    def _value(self) -> Float64[ndarray, "b"]:
        """R of every bet now."""
        return self._start * ((self._win if self._hit else self._lose) if self._length else 1.0) + self._length + self._joined

    def state(self) -> dict[str, Any]:
        rows = np.frombuffer(b"".join(sorted(self._block)), np.uint8).reshape(len(self._block), -1) if self._block else np.empty((0, 0), np.uint8)
        return {"start": self._start, "joined": self._joined, "block": rows, "length": self._length, "hit": self._hit}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._start, self._joined = state["start"], state["joined"]
        self._block = {row.tobytes() for row in state["block"]}
        self._length, self._hit = state["length"], state["hit"]

    def merge(self, other: Duplicates) -> None:
        """A constant until the next block: as valid as a new start, which has to wait for it too."""
        self._joined = np.minimum(self._joined + other._value, _CAP)


class EDetector:
    """The whole mixture. It eats independent samples of one model version, alarms at a total evidence of `threshold` and latches.

    groups: names of the parties to the evidence; evidence [g]: sum of w R of each, now; crossed: index of the sample at which
    the total reached the threshold, None before; named [g]: the groups that have reached the threshold on their own since, or,
    while at the crossing none had, the one with most evidence. `named` grows and never shrinks.
    """

    def __init__(
        self, certificate: Certificate, reference: Reference, modes: tuple[str, ...], *, threshold: float, scores: tuple[str, ...] = ()
    ) -> None:
        """scores: names of the certificate's scores, where one of them has a meaning of its own."""
        self.threshold = threshold
        nearest = scores.index(NEAREST_TRAIN) if NEAREST_TRAIN in scores else None
        self._scores, self._moments, self._shares = Scores(certificate, nearest), Moments(certificate, chunk=CHUNK), Shares(certificate)
        self._modes, self._duplicates = Modes(certificate, reference, modes), Duplicates(certificate)
        kinds = np.array(self._scores.kinds + self._moments.kinds + self._shares.kinds)
        part = np.concatenate([self._scores.allowed, self._moments.parts, np.ones(len(self._shares.kinds))])
        groups = tuple(kind for kind in KINDS if kind in kinds)
        mine = part[:, None] * (kinds[:, None] == groups)
        self._weights = mine * np.array([KINDS[kind][1] for kind in groups]) / np.maximum(mine.sum(axis=0), 1e-300)  # a kind may have no bet
        self.groups = (*groups, "duplicates", *self._modes.groups)
        self._families = np.array([KINDS[g.partition(":")[0]][0] for g in self.groups])
        self._r, self._few = np.zeros(len(kinds)), np.zeros(len(groups) + 1)
        self.crossed: int | None = None
        self.named = np.zeros(len(self.groups), bool)
        self._blank = copy.deepcopy(self.state())

    @property
    def layout(self) -> str:
        """What the bets are, as a hash: states of detectors with another layout mean nothing here."""
        constants = (KINDS, TAIL_BETS, TILTS, DROP_BETS, INFLATE_BETS, QUALITY_BETS, EXCESS_BETS, SHARE_RATES, RATES)
        return hashlib.sha256(repr((self.groups, self._r.shape, constants)).encode()).hexdigest()

    @property
    def evidence(self) -> Float64[ndarray, "g"]:
        return np.append(self._few, self._modes.grouped(self._modes.r))

    def restart(self) -> None:
        """Forget all evidence and the alarm. Blocks of duplicates start anew."""
        self.restore(self._blank)

    def update(
        self, scores: Float[ndarray, "n s"], features: Float[ndarray, "n p"], cells: Int64[ndarray, "n"], samples: ndarray, *, index: int
    ) -> None:
        """Feed n samples, the first of which has number `index`. Any split of a stream into updates comes to the same."""
        for i in range(0, len(cells), CHUNK):
            part = slice(i, i + CHUNK)
            self._step(scores[part], features[part], cells[part], samples[part], index + i)

    def trace(
        self, scores: Float[ndarray, "n s"], features: Float[ndarray, "n p"], cells: Int64[ndarray, "n"], samples: ndarray
    ) -> Float64[ndarray, "n g"]:
        """The evidence of each group after each of n samples; alarms are none of its business."""
        parts = []
        for i in range(0, len(cells), CHUNK):
            part = slice(i, i + CHUNK)
            few = self._fed(scores[part], features[part], cells[part], samples[part])
            parts.append(np.concatenate([few, self._modes.path(cells[part])], axis=1))
        return np.concatenate(parts)

    def family_evidence(self) -> dict[str, float]:
        return {family: float(self.evidence[self._families == family].sum()) for family in FAMILIES}

    def state(self) -> dict[str, Any]:
        """All that the past has left here, as arrays and JSON values: what `restore` takes."""
        own = {"few": self._few, "crossed": self.crossed, "named": self.named, "r": self._r}
        own |= dict(zip(("r_shares", "r_quality"), self._modes.r, strict=True))
        parts = {"moments": self._moments, "shares": self._shares, "duplicates": self._duplicates}
        return own | {f"{part}_{name}": value for part, owner in parts.items() for name, value in owner.state().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the detector whose `state` this is stood; it must have had the same bets, which `layout` tells."""
        self._few, self.named, self._r = (np.array(state[name]) for name in ("few", "named", "r"))
        self.crossed = state["crossed"]
        self._modes.r = state["r_shares"], state["r_quality"]
        for part, owner in {"moments": self._moments, "shares": self._shares, "duplicates": self._duplicates}.items():
            owner.restore({name.removeprefix(f"{part}_"): value for name, value in state.items() if name.startswith(f"{part}_")})

    def merge(self, other: EDetector, *, index: int) -> None:
        """Take over the evidence of a detector with the same bets that ate other samples of the same version.

        Each R grows by at most 1 in expectation with a sample of its own and not at all with another's, so the sum of R over
        detectors, less all samples, is a supermartingale too: an alarm at the same threshold comes after `threshold` samples
        of all of them together, on average, at least. `index`: of the newest sample, where the alarm is raised by the sum alone.
        """
        self._r, self._few = np.minimum(self._r + other._r, _CAP), self._few + other._few
        self._modes.r = tuple(mine + theirs for mine, theirs in zip(self._modes.r, other._modes.r, strict=True))
        self._duplicates.merge(other._duplicates)
        crossed = [c for c in (self.crossed, other.crossed) if c is not None]
        self.crossed = min(crossed, default=None)
        self.named |= other.named
        self._latch(self.evidence[None], index)

    def _step(
        self, scores: Float[ndarray, "n s"], features: Float[ndarray, "n p"], cells: Int64[ndarray, "n"], samples: ndarray, index: int
    ) -> None:
        """The path of every mode is followed only where something may have been crossed on the way."""
        few = self._fed(scores, features, cells, samples)
        before = self._modes.r
        most = self._modes.step(cells)
        if self.crossed is None:
            certain = few.sum(axis=1).max() + self._modes.total(most) < self.threshold
        else:
            self.named |= np.append((few >= self.threshold).any(axis=0), self._modes.grouped(self._modes.r) >= self.threshold)
            certain = not ((self._modes.grouped(most) >= self.threshold) & ~self.named[few.shape[1] :]).any()
        if not certain:
            self._modes.r = before
            self._latch(np.concatenate([few, self._modes.path(cells)], axis=1), index)

    def _fed(
        self, scores: Float[ndarray, "n s"], features: Float[ndarray, "n p"], cells: Int64[ndarray, "n"], samples: ndarray
    ) -> Float64[ndarray, "n f"]:
        """Evidence of every group but those of `Modes` after each of at most CHUNK samples."""
        path = np.concatenate([self._scores.payoffs(scores), self._moments.payoffs(features), self._shares.payoffs(cells)], axis=1)
        r, grown = self._r, np.empty_like(self._r)
        for row in path:  # L on entry, R on exit
            np.add(r, 1.0, out=grown)
            np.multiply(row, grown, out=row)
            np.minimum(row, _CAP, out=row)
            r = row
        self._r = r.copy()
        few = np.empty((len(path), len(self._few)))
        few[:, :-1], few[:, -1] = path @ self._weights, self._duplicates.update(samples)
        self._few = few[-1]
        return few

    def _latch(self, path: Float64[ndarray, "n g"], index: int) -> None:
        if self.crossed is None:
            over = path.sum(axis=1) >= self.threshold
            if not over.any():
                return
            at = int(over.argmax())
            self.crossed = index + at
            path = path[at:]
            self.named[path[0].argmax()] = True
        self.named |= (path >= self.threshold).any(axis=0)
