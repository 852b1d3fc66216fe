"""The alarm: a mixture of Shiryaev-Roberts e-detectors, each of which bets against one bound of the certificate.

A bet pays L >= 0 for a sample, with E[L | past] <= 1 for every law that the certificate's bounds allow. R <- (1 + R) L then makes
R_t - t a supermartingale, and so is the mixture's: sum w R_t - t, as sum w <= 1. Stopping at tau = min {t: sum w R_t >= A} gives
E[tau] >= E[sum w R_tau] >= A: on average at least A samples to a false alarm, in finite samples and for any dependence, given
that the certificate's bounds hold (probability >= 1 - delta). Capping R only lowers it, and so does leaving it as it is.
Source: Shin, Ramdas and Rinaldo, E-detectors: a nonparametric framework for sequential change detection (NEJSDS 2024).

Bets on an event pay theta / m where it happens and (1 - theta) / (1 - m) where it does not, with m a bound on its probability.
If that is q, E[L] = 1 + (q - m) (theta - m) / (m (1 - m)): at most 1 for every q <= m when theta > m, and for every q >= m when
theta < m. So a bet against an upper bound puts theta above it, against a lower bound below it. What the other bets pay, and
why it is fair, is said at `tilted`, `Shares`, `Duplicates`, and in `bulk.py`. The classes here say what a bet pays;
`kernel.py` pays it.

Null A, the served law is the certified one: all kinds but `quality`, which is null B. This file knows scores, cells, features
and bytes; it knows no words.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy import ndarray
from scipy.special import ndtri

from monitoring import kernel
from monitoring.bulk import RATES, Moments
from monitoring.coverage import RHO
from monitoring.sketches import joined
from training.bundle import AMBIGUITY, DUPLICATE_BLOCK, NEARER_TRAIN, NEAREST_TRAIN, OFF_MANIFOLD_EXCESS, Certificate, Reference
from training.drops import DROP_BETS, DROP_WEIGHT, RISE_WEIGHT, drop_bounds, mode_bounds

FAMILIES = {"modes": 0.295, "tails": 0.1375, "bulk": 0.5425, "copies": 0.01, "duplicates": 0.005, "latents": 0.005, "quality": 0.005}
"""Family -> its share of the false-alarm budget. A family that has no bet leaves its share unused, which is valid too."""

NULLS = {family: "B" if family == "quality" else "A" for family in FAMILIES}
"""Family -> the hypothesis that it tests."""

KINDS = {
    "drop": ("modes", DROP_WEIGHT),
    "inflate": ("modes", 0.0025),
    "shares": ("modes", 0.0025),
    "upper": ("tails", 0.13),
    "lower": ("tails", 0.005),
    "nan": ("tails", 0.0025),  # the bets of `NoNumbers`
    "wider": ("bulk", 0.02),
    "narrower": ("bulk", 0.16),
    "moved": ("bulk", 0.3625),
    "copies": ("copies", 0.005),
    "nearer": ("copies", 0.005),
    "duplicates": ("duplicates", 0.005),
    "latents": ("latents", 0.005),  # the bets of `latents.py`, which look at what the model was fed
    "quality": ("quality", 0.005),
}
"""What a bet accuses the model of -> its family and its weight; a kind's bets share the weight, equally but for drop and moved.
Where classes are certified, a part of drop's weight is for what they make too often, see `drop_bounds`."""

TAIL_BETS = (0.01, 0.1, 0.6)  # theta; used where above the bound
TAIL_FROM = 1 / 256  # shallower levels are the bulk's
COPIES_FROM = 1 / 1024  # what is merely close to the training data is no copy: only the deepest levels tell
SCORE_PARTS = {AMBIGUITY: 0.25}
"""Name of a score -> the part of a kind's weight that its bets get, where others get 1: what lies between classes mostly lies far from all."""

TILTS = (0.3, 0.5, 0.8)  # of a score's normal quantile: the shift, in standard deviations, that a bet is best for
INFLATE_BETS = (1.5, 3.0)  # theta / m
QUALITY_BETS = (0.0, 0.25, 0.5)  # theta / m: what is left of the least share that null B allows, RHO of the real one
EXCESS_BETS = (0.1, 0.3, 0.7)  # (theta - m) / (1 - m) for off-manifold samples under null B
SHARE_RATES = (1 / 256, 1 / 2048)  # at which `shares` forget
NEWEST = 8192  # samples among which a mode that comes too often is looked for
LEAST_EXPECTED_HITS = 10  # a tail level is usable where the certificate expects at least as many hits


def tail_levels(certificate: Certificate) -> Bool[ndarray, "l"]:
    return certificate.levels * certificate.count >= LEAST_EXPECTED_HITS


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

    The lower tails of the scores that look for training data are kinds of their own. `copies`: NEAREST_TRAIN, at its deepest
    levels. `nearer`: NEARER_TRAIN, at all levels, for what else may happen leaves training and held-out samples as near as
    they were. That samples come nearer to the data is no collapse, and that they lie farther away is for the distance from the
    manifold to say: a second bet on it would take weight from what is quicker.

    Tails: a step at one level. Bulk: exp(+-lambda h) for h the normal quantile of the middle of the bin, the likelihood ratio
    of a score that was shifted by lambda standard deviations, on the scale on which the certified score is normal.
    """

    def __init__(self, certificate: Certificate, names: tuple[str, ...] = ()) -> None:
        usable, count = tail_levels(certificate), certificate.count
        levels = certificate.levels[usable]
        beneath, above = certificate.lower_hits[:, usable][:, ::-1], certificate.upper_hits[:, usable]
        # Below a lower threshold is what counts as a hit, so a score at the threshold is beyond the edge just under it.
        edges = [np.nextafter(certificate.lower_threshold[:, usable][:, ::-1], -np.inf), certificate.upper_threshold[:, usable]]
        self.edges = np.concatenate(edges, axis=1)  # [score, edge]; bin j is what lies beyond j of them
        low = np.concatenate([1 - certificate.upper(beneath, count), certificate.lower(above, count)], axis=1)
        high = np.concatenate([1 - certificate.lower(beneath, count), certificate.upper(above, count)], axis=1)

        split, bins = len(levels), np.arange(2 * len(levels) + 1)
        hit = np.concatenate([bins <= np.arange(split)[:, None], bins > np.arange(split, 2 * split)[:, None]])
        bound = np.concatenate([1 - low[:, :split], high[:, split:]], axis=1)[..., None]
        theta = np.array(TAIL_BETS)
        names, tilting = names or ("",) * len(low), ("wider",) * len(TILTS) + ("narrower",) * len(TILTS)
        deepest = {NEAREST_TRAIN: (COPIES_FROM, 0.0), NEARER_TRAIN: (1.0, 0.0)}
        from_level = np.repeat([deepest.get(name, (TAIL_FROM, TAIL_FROM)) for name in names], split, axis=1)
        allowed = (theta > bound) & (np.concatenate([levels[::-1], levels]) <= from_level)[..., None]  # [score, edge, bet]
        bound = np.where(allowed, bound, 0.5)
        tails = np.where(hit[:, None], (theta / bound)[..., None], ((1 - theta) / (1 - bound))[..., None])

        beyond = np.concatenate([[1.0], 1 - levels[::-1], levels, [0.0]])  # nominal chance of each edge, and of the ends
        tilts = np.exp(np.outer(np.outer([1, -1], TILTS), ndtri(1 - (beyond[1:] + beyond[:-1]) / 2)))
        bulk = np.stack([tilted(tilts, *bounds) for bounds in zip(low, high, strict=True)])

        flat = [part.reshape(len(low), -1, len(bins)) for part in (tails, bulk)]
        self.table = np.concatenate(flat, axis=1).transpose(0, 2, 1).copy()  # score, bin -> payoff of each bet
        below = {NEAREST_TRAIN: "copies", NEARER_TRAIN: "nearer"}
        sides = [(below.get(name, "lower"), "upper") for name in names]
        self.kinds = tuple(k for side in sides for k in (*(kind for kind in side for _ in range(split * len(theta))), *tilting))
        tilts_allowed = np.repeat([[name not in below] for name in names], len(tilting), axis=1)
        part = np.array([[SCORE_PARTS.get(name, 1.0)] for name in names])
        self.parts = (part * np.concatenate([allowed.reshape(len(low), -1), tilts_allowed], axis=1)).ravel()


class Shares:
    """Bets on the shares that the cells have had of late: L = pi(c) / m(c) for a sample in cell c.

    pi, from the past alone, is a probability vector: the certified shares and the counts of the last samples, forgotten at
    `SHARE_RATES`, in halves once the counts are full. m are upper bounds on the shares q, so E[L] = sum q pi / m <= 1.
    """

    kinds = ("shares",) * len(SHARE_RATES)

    def __init__(self, certificate: Certificate) -> None:
        self.bound = certificate.upper(certificate.cell_count, certificate.count)
        self.prior = (certificate.cell_count + 0.5) / (certificate.count + 0.5 * certificate.cell_count.size)
        self.rates = np.array(SHARE_RATES)


class Cells:
    """Bets [..., K] that each of K modes pays `hit` at its own samples and `miss` at all others; those not allowed pay nothing."""

    def __init__(self, bound: Float64[ndarray, "*b k"], theta: Float64[ndarray, "*b k"]) -> None:
        self.allowed = (bound > 0) & (bound < 1) & (theta < 1)
        bound = np.where(self.allowed, bound, 0.5)
        self.hit, self.miss = np.where(self.allowed, theta / bound, 0.0), np.where(self.allowed, (1 - theta) / (1 - bound), 0.0)


class Modes:
    """The bets on modes: drop and inflate [g, b, K], and null B's quality [b, K + 1], which has one on the off-manifold cell.

    Drop and inflate look at on-manifold samples only; R stays as it is at others, which no bet of theirs concerns. Row 0 eats
    samples drawn by the whole law; row c + 1 those of class c, whose counts are tested given the class: how often clients ask
    for it is their business. Each R grows by at most 1 in expectation with a sample of its own row and not at all with others,
    so the sum over rows, less all samples, stays a supermartingale, whatever makes clients choose.
    """

    def __init__(self, certificate: Certificate, reference: Reference) -> None:
        (_, high), (low, drop) = mode_bounds(certificate), drop_bounds(certificate)
        bound = np.repeat(np.stack([low, high], axis=1), (len(DROP_BETS), len(INFLATE_BETS)), axis=1)
        self.shares = Cells(bound, bound * np.array((*DROP_BETS, *INFLATE_BETS))[:, None])
        real = reference.cell_share
        m = np.append(RHO * real[:-1], real[-1] + OFF_MANIFOLD_EXCESS)  # from the real data alone: what was certified may be bad
        theta = np.array(QUALITY_BETS)[:, None] * m
        theta[:, -1] = m[-1] + (1 - m[-1]) * np.array(EXCESS_BETS)
        self.quality = Cells(np.repeat(m[None], len(QUALITY_BETS), axis=0), theta)
        # [g, b]: of every allowed bet
        parts = np.array([*DROP_BETS.values(), *np.full(len(INFLATE_BETS), 1 / len(INFLATE_BETS))])
        allowed = self.shares.allowed.sum(axis=2)
        inflate = np.append(KINDS["inflate"][1], RISE_WEIGHT * allowed[1:, -1] / max(1, allowed[1:, -1].sum()))
        total = np.repeat(np.column_stack([drop, inflate]), (len(DROP_BETS), len(INFLATE_BETS)), axis=1)
        self.weights = total * parts / np.maximum(1, allowed)
        self.quality_weights = np.full(len(QUALITY_BETS), KINDS["quality"][1] / max(1, self.quality.allowed.sum()))


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
        self.win, self.lose = theta / bound, (1 - theta) / (1 - bound) if bound < 1 else theta
        self.weights = np.full(len(theta), KINDS["duplicates"][1] / max(1, len(theta)))


class Latching(ABC):
    """Part of a mixture of bets that alarms at a total evidence of `threshold` and latches; what it remembers lies in `_state`.

    groups: names of the parties to the evidence; evidence [g]: sum of w R of each, now; crossed: index of the sample at which
    the total reached the threshold, None before; named [g]: the groups that have reached the threshold on their own since, or,
    while at the crossing none had, the one with most evidence. `named` grows and never shrinks.
    """

    groups: tuple[str, ...]
    threshold: float
    crossed: int | None = None
    _state: dict[str, ndarray]
    _blank: dict[str, Any]  # `state` before the first sample

    @property
    @abstractmethod
    def evidence(self) -> Float64[ndarray, "g"]: ...

    @property
    def named(self) -> Bool[ndarray, "g"]:
        return self._state["named"]

    def restart(self) -> None:
        """Forget all evidence and the alarm, and whatever bets foretell from the past."""
        self.restore(self._blank)

    def state(self) -> dict[str, Any]:
        """All that the past has left here, as arrays and JSON values: what `restore` takes."""
        return {name: value.copy() for name, value in self._state.items()} | {"crossed": self.crossed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the detector whose `state` this is stood; it must have had the same bets, which `layout` tells."""
        self._state = {name: np.array(state[name], value.dtype) for name, value in self._state.items()}
        self.crossed = state["crossed"]

    def latch(self, crossed: int | None, named: Bool[ndarray, "g"]) -> None:
        """Take over an alarm that was raised elsewhere over the same bets."""
        if crossed is not None:
            self.crossed = crossed if self.crossed is None else min(self.crossed, crossed)
            self._state["named"] |= named

    def joined(self, other: Latching, *, index: int) -> None:
        """The evidence of `other` is part of this one's now: so is its alarm, and the sum may raise one, with sample `index`."""
        self.latch(other.crossed, other.named)
        evidence = self.evidence
        if self.crossed is None and evidence.sum() >= self.threshold:
            self.crossed = index
            self._name(int(evidence.argmax()))
        if self.crossed is not None:
            for group in np.flatnonzero((evidence >= self.threshold) & ~self.named):
                self._name(int(group))

    def _name(self, group: int) -> None:
        self._state["named"][group] = True


class EDetector(Latching):
    """The whole mixture, but for latents, the fakes among samples of a class, and what is no number. It eats independent samples of one
    model version.

    That a mode comes too often lowers the shares of all others, and the bets on their loss see it: such a mode is not named where the rise
    of another explains it, which is named in its place, see `kernel.riser`. That is of no weight to the alarm: what is named is settled
    after the evidence, and changes none.
    """

    def __init__(
        self, certificate: Certificate, reference: Reference, modes: tuple[str, ...], *, threshold: float, scores: tuple[str, ...] = ()
    ) -> None:
        """scores: names of the certificate's scores, where one of them has a meaning of its own."""
        self.threshold = threshold
        tails, moments, shares = Scores(certificate, scores), Moments(certificate), Shares(certificate)
        cells, duplicates = Modes(certificate, reference), Duplicates(certificate)
        few = np.array(tails.kinds + moments.kinds + shares.kinds)
        part = np.concatenate([tails.parts, moments.parts, np.ones(len(shares.kinds))])
        kinds = tuple(kind for kind in KINDS if kind in few)
        self.groups = (*kinds, "duplicates", *(f"{kind}:{name}" for kind in ("drop", "inflate") for name in modes), "quality")
        self._families = np.array([KINDS[g.partition(":")[0]][0] for g in self.groups])
        group = np.array([kinds.index(kind) for kind in few])
        weights = part / np.maximum(np.bincount(group, part), 1e-300)[group] * np.array([KINDS[kind][1] for kind in few])  # a kind may have no bet
        self._bets = (
            *(tails.edges, tails.table),
            *(moments.centre, moments.map, moments.radius, moments.mean, moments.rates, np.array(moments.bounds)),
            *(shares.prior, shares.bound, shares.rates),
            *(weights, group),
            *(cells.shares.hit, cells.shares.miss, cells.weights, len(DROP_BETS)),
            *(drop_bounds(certificate)[0][0], np.array(list(DROP_BETS))),
            *(cells.quality.hit, cells.quality.miss, cells.quality_weights),
            *(duplicates.win, duplicates.lose, duplicates.weights),
        )
        self._state = {
            "r": np.zeros(len(few)),
            "moved_means": np.zeros((len(moments.rates), len(moments.mean))),
            "share_counts": np.zeros((len(shares.rates), len(shares.prior))),
            "share_totals": np.zeros(len(shares.rates)),
            "r_modes": np.zeros(cells.shares.hit.shape),
            "r_quality": np.zeros(cells.quality.hit.shape),
            "sums": np.zeros(3 + len(cells.shares.hit)),  # evidence of the few, of duplicates, of quality, of each row of the modes
            "block_start": np.zeros(len(duplicates.win)),  # R of duplicates where the block began
            "block_joined": np.zeros(len(duplicates.win)),  # R of other detectors, which bets from the next block on
            "block": np.zeros((DUPLICATE_BLOCK, 0), np.uint8),  # the bytes of its samples
            "block_marks": np.zeros(2, np.int64),  # its samples so far; whether one repeats another
            "newest": np.zeros(NEWEST, np.int64),  # modes of the last samples of the whole law, a ring
            "newest_seen": np.zeros(1, np.int64),
            "named": np.zeros(len(self.groups), bool),
        }
        self._blank = self.state()
        nothing = np.empty((0, len(tails.edges))), np.empty((0, len(moments.centre))), np.empty(0, np.int64), np.empty((0, 1))
        self.update(*nothing, index=0)  # compiles now, if no process ever did, and not while a sample waits

    @property
    def layout(self) -> str:
        """What the bets are, as a hash: states of detectors with another layout mean nothing here."""
        constants = (KINDS, SCORE_PARTS, TAIL_BETS, TILTS, DROP_BETS, INFLATE_BETS, QUALITY_BETS, EXCESS_BETS, SHARE_RATES, RATES)
        shapes = [(name, value.shape) for name, value in self._state.items() if name != "block"]
        return hashlib.sha256(repr((self.groups, shapes, constants)).encode()).hexdigest()

    @property
    def evidence(self) -> Float64[ndarray, "g"]:
        found, state = np.empty(len(self.groups)), self._state
        weights, group, _, _, mode_weights, drops, *_ = self._bets[11:19]
        kernel.grouped(found, state["r"], weights, group, state["sums"], state["r_modes"], mode_weights, drops)
        return found

    def update(
        self,
        scores: Float[ndarray, "n s"],
        features: Float[ndarray, "n p"],
        cells: Int64[ndarray, "n"],
        samples: ndarray,
        *,
        index: int | Int64[ndarray, "n"],
        classes: Int64[ndarray, "n"] | None = None,
    ) -> Float64[ndarray, "n"]:
        """Feed n samples, the first of which has number `index`, or which have these numbers; returns the total evidence after each.

        classes: those that clients asked for; None where the samples were drawn by the whole law. Any split of a stream into
        updates comes to the same. Raises ValueError for a class that the certificate does not know.
        """
        known = len(self._state["r_modes"]) - 1
        if classes is not None and len(classes) and not 0 <= classes.min() <= classes.max() < known:
            raise ValueError(f"classes lie in {classes.min()} .. {classes.max()}; the certificate knows {known}, counted from 0")
        rows = np.ascontiguousarray(samples).reshape(len(samples), math.prod(samples.shape[1:])).view(np.uint8)
        rows.flags.writeable = False  # as samples from the network are: for others the kernel would be compiled again
        if len(rows) and self._state["block"].shape[1] != rows.shape[1]:
            self._state["block"] = np.zeros((DUPLICATE_BLOCK, rows.shape[1]), np.uint8)
        crossed = -1 if self.crossed is None else self.crossed
        seen = np.ascontiguousarray(scores, np.float64), np.ascontiguousarray(features, np.float64), np.ascontiguousarray(cells), np.zeros(len(cells), np.int64) if classes is None else classes + 1, rows
        totals, crossed = kernel.eat(*seen, _numbers(index, len(cells)), float(self.threshold), *self._bets, *self._state.values(), crossed)
        self.crossed = None if crossed < 0 else int(crossed)
        return totals

    def family_evidence(self) -> dict[str, float]:
        evidence = self.evidence
        return {family: float(evidence[self._families == family].sum()) for family in FAMILIES}

    def merge(self, other: EDetector, *, index: int) -> None:
        """Take over the evidence of a detector with the same bets that ate other samples of the same version.

        Each R grows by at most 1 in expectation with a sample of its own and not at all with another's, so the sum of R over
        detectors, less all samples, is a supermartingale too: an alarm at the same threshold comes after `threshold` samples
        of all of them together, on average, at least. `index`: of the newest sample, where the alarm is raised by the sum alone.
        Theirs on duplicates is a constant until the next block: as valid as a new start, which has to wait for it too.
        """
        for name in ("r", "r_modes", "r_quality"):
            self._state[name] = np.minimum(self._state[name] + other._state[name], kernel.CAP)
        self._state["block_joined"] = np.minimum(self._state["block_joined"] + other._duplicates, kernel.CAP)
        self._state["sums"] += other._state["sums"]
        ours, theirs = (int(detector._state["newest_seen"][0]) for detector in (self, other))
        newest, total = joined(self._newest, ours, other._newest, theirs, most=NEWEST), ours + theirs
        self._state["newest"][(total - 1 - np.arange(len(newest))) % NEWEST] = newest
        self._state["newest_seen"][:] = total
        self.joined(other, index=index)

    def _name(self, group: int) -> None:
        state, (mode_weights, drops, bound, rho) = self._state, self._bets[15:19]
        kernel.name(group, True, float(self.threshold), state["named"], state["r_modes"], mode_weights, drops, bound, rho, state["newest"], int(state["newest_seen"][0]))

    @property
    def _newest(self) -> Int64[ndarray, "n"]:
        """The modes of the newest samples, newest first."""
        seen = int(self._state["newest_seen"][0])
        return self._state["newest"][(seen - 1 - np.arange(min(seen, NEWEST))) % NEWEST]

    @property
    def _duplicates(self) -> Float64[ndarray, "b"]:
        """R of every bet on duplicates now."""
        (length, repeated), (win, lose, _) = self._state["block_marks"], self._bets[-3:]
        return self._state["block_start"] * ((win if repeated else lose) if length else 1.0) + length + self._state["block_joined"]


class Events(Latching):
    """Bets that an event happens more often than certified, in rows: each is fed with samples of its own.

    Each R grows by at most 1 in expectation with a sample of its own row and not at all with others. A part of the mixture that is held
    against the same threshold alone: where it reaches it, the mixture does.
    """

    def __init__(self, groups: tuple[str, ...], bound: Float64[ndarray, "g"], *, weight: float, threshold: float) -> None:
        """bound: an upper one on the chance of the event in each row; weight: of all bets together."""
        allowed, bound = (theta := np.array(TAIL_BETS)) > bound[:, None], bound[:, None]
        bound = np.where(allowed, bound, 0.5)
        self._bets = theta / bound, (1 - theta) / (1 - bound), weight * allowed / max(1, allowed.sum())
        self.threshold, self.groups = threshold, groups
        self._state = {"r": np.zeros(allowed.shape), "named": np.zeros(len(groups), bool)}
        self._blank = self.state()
        self.update(np.empty(0, np.int64), np.empty(0, bool), index=0)  # compiles now, not while a sample waits

    @property
    def evidence(self) -> Float64[ndarray, "g"]:
        return (self._bets[-1] * self._state["r"]).sum(axis=1)

    def update(self, rows: Int64[ndarray, "n"], happened: Bool[ndarray, "n"], *, index: int | Int64[ndarray, "n"]) -> None:
        """Feed n samples of these rows, the first of which has number `index`, or which have these numbers."""
        crossed = -1 if self.crossed is None else self.crossed
        crossed = kernel.events(rows, happened, _numbers(index, len(rows)), float(self.threshold), *self._bets, *self._state.values(), crossed)
        self.crossed = None if crossed < 0 else int(crossed)

    def merge(self, other: Events, *, index: int) -> None:
        """As of EDetector: R adds up."""
        self._state["r"] = np.minimum(self._state["r"] + other._state["r"], kernel.CAP)
        self.joined(other, index=index)


class Fakes(Events):
    """Bets that samples of a class which clients asked for lie off the manifold more often than certified; row c: class c.

    Off the manifold the bets on modes abstain, in `EDetector` for every class, so a class that makes nothing but junk would be no evidence.
    """

    def __init__(self, certificate: Certificate, *, threshold: float) -> None:
        counts = certificate.class_cell_count.reshape(-1, len(certificate.cell_count))
        bound = np.array([float(certificate.upper(int(row[-1]), int(row.sum()))) for row in counts])
        super().__init__(tuple(f"upper:{c}" for c in range(len(counts))), bound, weight=RISE_WEIGHT, threshold=threshold)


class NoNumbers(Events):
    """Bets that what comes as a sample is none: not finite, or so large that its features or scores are not. Row 0: draws of the whole law;
    row c + 1: those of class c.

    Certification refuses a generator that makes such a thing, so its chance is bounded as that of an event of which none in `count` came,
    or none of a class' own. All other bets look at numbers only, and leave R as it is where there are none: given that a
    sample is one, its law is the certified one, whose bounds were counted on nothing else. So sum w R less all samples, those among them that are none, stays a
    supermartingale, and the samples that E[tau] >= A counts are all of these.
    """

    def __init__(self, certificate: Certificate, *, threshold: float) -> None:
        counts = [certificate.count, *certificate.class_cell_count.sum(axis=1).tolist()]
        bound = np.array([float(certificate.upper(0, n)) if n else 1.0 for n in counts])
        super().__init__(("nan", *(f"nan:{c}" for c in range(len(counts) - 1))), bound, weight=KINDS["nan"][1], threshold=threshold)


def _numbers(index: int | Int64[ndarray, "n"], n: int) -> Int64[ndarray, "n"]:
    return np.broadcast_to(index, n) + (np.arange(n) if np.ndim(index) == 0 else 0)
