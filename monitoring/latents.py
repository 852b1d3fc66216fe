"""Bets on the law of the latents that replicas really fed to the model: signs and normals, known exactly, so nothing is certified.

Every bet is a likelihood ratio against the law itself: E[L] = 1, for the law has no unknown. R <- (1 + R) L and the mixture are
those of `edetectors.py`, of which this is a family: sum w R_t - t stays a supermartingale, as each R grows by at most 1 with a
row of its own and not at all with samples whose latents were not noted. Latents are float32 and the law is not: MARGIN is taken
off each payoff, more than rounding can add. What is not in the law's support (a sign that is neither, no number) has
probability 0 under it and pays all there is to pay.

With y the normals over their scale and e the signs, d coordinates in all, of which N are normal and S signs:
  narrower, wider   the normals' spread is t in place of 1: t^-N exp(-|y|^2 (t^-2 - 1) / 2), all together and each alone
  shifted           exp(k x - k^2 / 2), x = sum y / sqrt N or one y; and the normals drawn around a mean m that the past rows had:
                    N(m, 1 + v) over N(0, 1), where m forgets at a rate r and v = r / (2 - r) is how little it knows
  signs             1 + b e for each; exp(k x) / cosh(k / sqrt S)^S, x = sum e / sqrt S; prod (1 + m e), m as above
  dependent         1 + b s s' for each pair of the coordinates' signs, which are fair coins that know nothing of each other
  repeats           the row is one of the last PAST: theta over a bound on its chance, that of S bits and N float32 values

Knows no seeds. The first call of a process compiles, or finds what an earlier process compiled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from monitoring.edetectors import KINDS, Latching
from monitoring.kernel import CAP, compiled, grow
from training.bundle import SignGaussian

GROUPS = {"narrower": 0.3, "wider": 0.1, "shifted": 0.25, "signs": 0.15, "dependent": 0.05, "repeats": 0.1, "impossible": 0.05}
"""What a bet says of the latents -> its part of the family's weight; half of it is for bets on all coordinates together."""
SPREADS = ((0.3, 0.8), (1.25, 2.0))  # t: standard deviation in place of 1, narrower and wider
SHIFTS = (-1.0, 1.0)  # k
COINS = (-0.8, -0.3, 0.3, 0.8)  # b of one sign
PAIRS = (-0.8, 0.8)  # b of two
RATES = (1 / 8, 1 / 50)  # at which the mean of past rows forgets
PAIRED = 32  # coordinates that are looked at in pairs, at most
PAST = 256  # rows that a row is compared with
REPEATS = (0.01, 0.3)  # theta
LEAST_CHANCE = 1e-12  # of a repeat: bets need no smaller one
IMPOSSIBLE = 0.01  # stake on what cannot happen
MARGIN = 1e-6
HELD = 0.9  # of a coin's mean, at most: no payoff is 0


@compiled
def ratio(y, m, v):
    """N(m, (1 + v) I) over N(0, I) at y."""
    far, near = 0.0, 0.0
    for j in range(len(y)):
        far += y[j] * y[j]
        near += (y[j] - m[j]) ** 2
    return np.exp(far / 2 - near / (2 * (1 + v)) - len(y) / 2 * np.log(1 + v))


@compiled
def pay(payoffs, z, signs, scale, spreads, shifts, coins, pairs, paired, rates, m, odds, repeats, past, seen):
    """What each bet pays for the row z; then means and past know it. Returns whether it is in the law's support."""
    n = len(z) - signs
    for j in range(len(z)):
        if not np.isfinite(z[j]) or (j < signs and z[j] != 1.0 and z[j] != -1.0):
            return False
    y, at = np.empty(n), 0
    square = total = 0.0
    for j in range(n):
        y[j] = z[signs + j] / scale
        square += y[j] * y[j]
        total += y[j]
    if n:
        for t in spreads:
            payoffs[at] = np.exp(-n * np.log(t) - square * (1 / (t * t) - 1) / 2)
            at += 1
            for j in range(n):
                payoffs[at] = np.exp(-np.log(t) - y[j] * y[j] * (1 / (t * t) - 1) / 2)
                at += 1
        for k in shifts:
            payoffs[at] = np.exp(k * total / np.sqrt(n) - k * k / 2)
            at += 1
            for j in range(n):
                payoffs[at] = np.exp(k * y[j] - k * k / 2)
                at += 1
        for r in range(len(rates)):
            payoffs[at] = ratio(y, m[r], rates[r] / (2 - rates[r]))
            at += 1
            for j in range(n):
                m[r, j] += rates[r] * (y[j] - m[r, j])
    if signs:
        total = 0.0
        for j in range(signs):
            total += z[j]
        for k in shifts:
            payoffs[at] = np.exp(k * total / np.sqrt(signs) - signs * np.log(np.cosh(k / np.sqrt(signs))))
            at += 1
        for b in coins:
            for j in range(signs):
                payoffs[at] = 1 + b * z[j]
                at += 1
        for r in range(len(rates)):
            product = 1.0
            for j in range(signs):
                product *= 1 + max(-HELD, min(HELD, odds[r, j])) * z[j]
                odds[r, j] += rates[r] * (z[j] - odds[r, j])
            payoffs[at] = product
            at += 1
    sign = np.where(z[:paired] > 0, 1.0, -1.0)
    for b in pairs:
        for i in range(paired):
            for j in range(i):
                payoffs[at + j] = 1 + b * sign[i] * sign[j]
            at += i
    hit = False
    for i in range(min(seen, len(past))):
        j = len(z) - 1  # the last ones are normals, if there are any, which tell sooner
        while j >= 0 and past[i, j] == z[j]:
            j -= 1
        hit = hit or j < 0
    past[seen % len(past)] = z
    for b in range(len(repeats)):
        payoffs[at] = repeats[b, 0] if hit else repeats[b, 1]
        at += 1
    payoffs[at] = 1 - IMPOSSIBLE
    for b in range(len(payoffs)):
        payoffs[b] *= 1 - MARGIN
    return True


@compiled
def eat(rows, index, threshold, weights, ends, r, named, crossed, seen, payoffs, signs, scale, spreads, shifts, coins, pairs, paired, rates, m, odds, repeats, past):
    """R of every bet after the rows [n, d], whose samples have the numbers index [n]; returns where the evidence crossed the threshold
    (or `crossed`) and how many rows were ever seen."""
    evidence = np.empty(len(named))
    for i in range(len(rows)):
        if pay(payoffs, rows[i], signs, scale, spreads, shifts, coins, pairs, paired, rates, m, odds, repeats, past, seen):
            seen += 1
            grow(r, payoffs)
        else:
            r[-1] = CAP
        for g in range(len(ends) - 1):
            evidence[g] = 0.0
            for b in range(ends[g], ends[g + 1]):
                evidence[g] += weights[b] * r[b]
        if crossed < 0 and evidence.sum() >= threshold:
            crossed = index[i]
            named[evidence.argmax()] = True
        if crossed >= 0:
            named |= evidence >= threshold
    return crossed, seen


class LatentDetector(Latching):
    """The family `latents` of the mixture, over rows of latents that were fed for independent draws of the law, against the same
    threshold: where this family alone reaches it, the mixture does."""

    def __init__(self, law: SignGaussian, *, threshold: float) -> None:
        self.law, self.threshold = law, threshold
        n, signs = law.normals, law.signs
        paired = min(law.dim, PAIRED)
        chance = max(LEAST_CHANCE, PAST * 2.0**-signs * 2.0 ** (-24 * n))  # no float32 has more than 2^-24 of a normal law
        repeats = np.array([[theta / chance, (1 - theta) / (1 - chance)] for theta in REPEATS if chance < theta]).reshape(-1, 2)
        kinds: list[tuple[str, int, bool]] = []  # group, bets, whether on all coordinates together
        if n:
            kinds += [(group, bets, together) for group, ts in zip(("narrower", "wider"), SPREADS, strict=True) for _ in ts for bets, together in ((1, True), (n, False))]
            kinds += [("shifted", bets, together) for _ in SHIFTS for bets, together in ((1, True), (n, False))] + [("shifted", len(RATES), True)]
        if signs:
            kinds += [("signs", len(SHIFTS), True), ("signs", len(COINS) * signs, False), ("signs", len(RATES), True)]
        kinds += [("dependent", len(PAIRS) * paired * (paired - 1) // 2, True), ("repeats", len(repeats), True), ("impossible", 1, True)]
        self.groups = tuple(f"latents:{group}" for group in GROUPS)
        names = list(GROUPS)
        group = np.repeat([names.index(group) for group, _, _ in kinds], [bets for _, bets, _ in kinds])  # ascends
        self._ends = np.searchsorted(group, np.arange(len(names) + 1))
        together = np.repeat([both for _, _, both in kinds], [bets for _, bets, _ in kinds])
        halves = np.where(together, 0, 1)
        part = np.zeros(len(group))
        for g, weight in enumerate(GROUPS.values()):
            present = [h for h in (0, 1) if ((group == g) & (halves == h)).any()]
            for h in present:
                mine = (group == g) & (halves == h)
                part[mine] = weight / len(present) / mine.sum()
        self._weights = KINDS["latents"][1] * part
        self._payoffs = np.empty(len(part))
        self._law = (signs, float(law.scale), np.concatenate(SPREADS), np.array(SHIFTS), np.array(COINS), np.array(PAIRS), paired, np.array(RATES))
        self._repeats = repeats
        self._state = {
            "r": np.zeros(len(part)),
            "means": np.zeros((len(RATES), n)),
            "odds": np.zeros((len(RATES), signs)),
            "past": np.zeros((PAST, law.dim), np.float32),
            "named": np.zeros(len(GROUPS), bool),
        }
        self.seen = 0
        self._blank = self.state()
        self.update(np.empty((0, law.dim), np.float32), np.empty(0, np.int64))  # compiles now, not while a sample waits

    @property
    def evidence(self) -> Float64[ndarray, "g"]:
        """Sum of w R of each group."""
        return np.array([w @ r for w, r in zip(*(np.split(x, self._ends[1:-1]) for x in (self._weights, self._state["r"])), strict=True)])

    @property
    def layout(self) -> str:
        """What the bets are, as a hash: states of detectors with another layout mean nothing here."""
        constants = (GROUPS, SPREADS, SHIFTS, COINS, PAIRS, RATES, PAIRED, PAST, REPEATS, self.law, KINDS["latents"])
        return hashlib.sha256(repr(constants).encode()).hexdigest()

    def update(self, z: Float32[ndarray, "n d"], index: Int64[ndarray, "n"]) -> None:
        """Feed the latents of n samples, which have the numbers `index` among those eaten."""
        state, crossed = self._state, -1 if self.crossed is None else self.crossed
        rows = np.ascontiguousarray(z, np.float64)
        crossed, self.seen = eat(
            rows, np.ascontiguousarray(index), float(self.threshold), self._weights, self._ends, state["r"], state["named"], crossed, self.seen, self._payoffs,
            *self._law, state["means"], state["odds"], self._repeats, state["past"],
        )  # fmt: skip
        self.crossed = None if crossed < 0 else int(crossed)

    def state(self) -> dict[str, Any]:
        return super().state() | {"seen": self.seen}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.seen = state["seen"]

    def merge(self, other: LatentDetector, *, index: int) -> None:
        """As of EDetector: R adds up. What is foretold from the past, and the rows that were seen, stay this detector's own."""
        self._state["r"] = np.minimum(self._state["r"] + other._state["r"], CAP)
        self.joined(other, index=index)
