"""The alarm: a mixture of Shiryaev-Roberts e-detectors, each of which bets against one bound of the certificate.

A bet on an event holds L = theta / m where the event happens and (1 - theta) / (1 - m) where it does not, with m a bound on the
event's probability. If the probability is q, E[L] = 1 + (q - m) (theta - m) / (m (1 - m)): at most 1 for every q <= m when
theta > m, and for every q >= m when theta < m. So a bet against an upper bound puts theta above it, against a lower bound below
it, and E[L] <= 1 holds for every law that the bounds allow, whatever came before. Where a bet abstains, L = 1.

R <- (1 + R) L then makes R_t - t a supermartingale, and so is the mixture's: sum w R_t - t, as sum w <= 1. Stopping at
tau = min {t: sum w R_t >= A} gives E[tau] >= E[sum w R_tau] >= A: on average at least A samples to a false alarm, in finite
samples and for any dependence, given that the certificate's bounds hold (probability >= 1 - delta). Capping R only lowers it.
Source: Shin, Ramdas and Rinaldo, E-detectors: a nonparametric framework for sequential change detection (NEJSDS 2024).

Null A, the served law is the certified one: `drop`, `inflate`, `upper`, `lower`, `duplicates`. Null B, quality: `quality`.
This file knows scores, cells and bytes; it knows no words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy import ndarray

from monitoring.coverage import RHO
from training.bundle import DUPLICATE_BLOCK, Certificate, Reference

FAMILIES = {"modes": 0.35, "tails": 0.40, "duplicates": 0.05, "quality": 0.20}
"""Family -> its share of the false-alarm budget. A family that has no bet leaves its share unused, which is valid too."""

KINDS = {
    "drop": ("modes", 0.30),
    "inflate": ("modes", 0.05),
    "upper": ("tails", 0.20),
    "lower": ("tails", 0.20),
    "duplicates": ("duplicates", 0.05),
    "quality": ("quality", 0.20),
}
"""What a bet accuses the model of -> its family and its weight; a kind's bets share the weight equally."""

TAIL_BETS = (0.01, 0.05, 0.2, 0.5, 0.9)  # theta; used where above the bound
DROP_BETS = (0.0, 0.1, 0.5)  # theta / m: what is left of a mode
INFLATE_BETS = (1.5, 3.0)  # theta / m
QUALITY_BETS = (0.0, 0.25, 0.5)  # theta / m: what is left of the least share that null B allows
EXCESS_BETS = (0.1, 0.3, 0.7)  # (theta - m) / (1 - m) for off-manifold samples under null B
OFF_MANIFOLD_TOLERANCE = 0.1  # null B allows this much above the certified off-manifold share
LEAST_EXPECTED_HITS = 10  # a tail level is usable where the certificate expects at least as many hits

_CAP = 1e150  # far above every threshold, far below overflow
_CHUNK = 256  # samples whose path is kept at once, which bounds memory


class Bet(NamedTuple):
    group: str  # whose evidence it is: a kind, or "drop:<mode>"
    event: int  # column of the events
    bound: float  # m
    theta: float
    weight: float

    @property
    def kind(self) -> str:
        return self.group.partition(":")[0]

    @property
    def win(self) -> float:
        return self.theta / self.bound

    @property
    def lose(self) -> float:
        return (1 - self.theta) / (1 - self.bound)


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


def bets(certificate: Certificate, reference: Reference, modes: tuple[str, ...]) -> list[Bet]:
    """Every bet that the certificate allows, by group. Events: upper and lower tails (score by score), then the K + 1 cells."""
    usable = tail_levels(certificate)
    found: list[tuple[str, int, float, float]] = []
    first = 0
    for kind, hits in (("upper", certificate.upper_hits), ("lower", certificate.lower_hits)):
        bounds = certificate.upper(hits[:, usable], certificate.count).ravel()
        found += [(kind, first + i, m, theta) for i, m in enumerate(bounds) for theta in TAIL_BETS if theta > m]
        first += len(bounds)
    low, high = mode_bounds(certificate)
    for k, name in enumerate(modes):
        if low[k] > 0:
            found += [(f"drop:{name}", first + k, low[k], rho * low[k]) for rho in DROP_BETS]
        found += [("inflate", first + k, high[k], rho * high[k]) for rho in INFLATE_BETS if rho * high[k] < 1]
        if (m := RHO * reference.cell_share[k]) > 0:
            found += [("quality", first + k, m, rho * m) for rho in QUALITY_BETS]
    m = float(certificate.upper(int(certificate.cell_count[-1]), certificate.count)) + OFF_MANIFOLD_TOLERANCE
    if m < 1:
        found += [("quality", first + len(modes), m, m + rho * (1 - m)) for rho in EXCESS_BETS]
    sizes: dict[str, int] = {}
    for group, *_ in found:
        kind = group.partition(":")[0]
        sizes[kind] = sizes.get(kind, 0) + 1
    kinds = [group.partition(":")[0] for group, *_ in found]
    weighted = [Bet(*b[:2], float(b[2]), float(b[3]), KINDS[kind][1] / sizes[kind]) for b, kind in zip(found, kinds, strict=True)]
    return sorted(weighted, key=lambda b: b.group)


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

    def __init__(self, certificate: Certificate, reference: Reference, modes: tuple[str, ...], *, threshold: float) -> None:
        self.threshold = threshold
        self._bets = bets(certificate, reference, modes)
        self._certificate = certificate
        usable = tail_levels(certificate)
        self._upper, self._lower = certificate.upper_threshold[:, usable], certificate.lower_threshold[:, usable]
        self._cells = np.arange(len(modes) + 1)
        self._event = np.array([b.event for b in self._bets], np.intp)
        self._win = np.array([b.win for b in self._bets])
        self._lose = np.array([b.lose for b in self._bets])
        self._weights = np.array([b.weight for b in self._bets])
        self._abstains = np.array([b.kind in ("drop", "inflate") for b in self._bets], bool)  # off the manifold
        names = [b.group for b in self._bets]
        self._first = np.array([i for i, name in enumerate(names) if i == 0 or names[i - 1] != name], np.intp)
        self.groups = (*(names[i] for i in self._first), "duplicates")
        self._families = np.array([KINDS[g.partition(":")[0]][0] for g in self.groups])
        self.restart()

    def restart(self) -> None:
        """Forget all evidence and the alarm. Blocks of duplicates start anew."""
        self.evidence = np.zeros(len(self.groups))
        self.crossed: int | None = None
        self.named = np.zeros(len(self.groups), bool)
        self._r = np.zeros(len(self._bets))
        self._duplicates = Duplicates(self._certificate)

    def update(self, scores: Float[ndarray, "n s"], cells: Int64[ndarray, "n"], samples: ndarray, *, index: int) -> None:
        """Feed n samples, the first of which has number `index`. Any split of a stream into updates comes to the same."""
        for i in range(0, len(cells), _CHUNK):
            part = slice(i, i + _CHUNK)
            self._latch(self._step(scores[part], cells[part], samples[part]), index + i)

    def family_evidence(self) -> dict[str, float]:
        return {family: float(self.evidence[self._families == family].sum()) for family in FAMILIES}

    def state(self) -> dict[str, Any]:
        """All that the past has left here, as arrays and JSON values: what `restore` takes."""
        own = {"evidence": self.evidence, "crossed": self.crossed, "named": self.named, "r": self._r}
        return own | {f"duplicates_{name}": value for name, value in self._duplicates.state().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the detector whose `state` this is stood; it must have had the same bets, which `layout` tells."""
        self.evidence, self.crossed, self.named, self._r = (state[name] for name in ("evidence", "crossed", "named", "r"))
        self._duplicates.restore({name.removeprefix("duplicates_"): value for name, value in state.items() if name.startswith("duplicates_")})

    @property
    def layout(self) -> str:
        """What the bets are, as a hash: states of detectors with another layout mean nothing here."""
        return hashlib.sha256(repr((self.groups, self._bets)).encode()).hexdigest()

    def merge(self, other: EDetector, *, index: int) -> None:
        """Take over the evidence of a detector with the same bets that ate other samples of the same version.

        Each R grows by at most 1 in expectation with a sample of its own and not at all with another's, so the sum of R over
        detectors, less all samples, is a supermartingale too: an alarm at the same threshold comes after `threshold` samples
        of all of them together, on average, at least. `index`: of the newest sample, where the alarm is raised by the sum alone.
        """
        self._r = np.minimum(self._r + other._r, _CAP)
        self._duplicates.merge(other._duplicates)
        crossed = [c for c in (self.crossed, other.crossed) if c is not None]
        self.crossed = min(crossed, default=None)
        self.named |= other.named
        self._latch((self.evidence + other.evidence)[None], index)

    def _step(self, scores: Float[ndarray, "n s"], cells: Int64[ndarray, "n"], samples: ndarray) -> Float64[ndarray, "n g"]:
        """Evidence of each group after each of n samples."""
        n = len(cells)
        above = (scores[:, :, None] > self._upper).reshape(n, -1)
        below = (scores[:, :, None] < self._lower).reshape(n, -1)
        events = np.concatenate([above, below, cells[:, None] == self._cells], axis=1)
        path = np.where(events[:, self._event], self._win, self._lose)
        path[np.ix_(cells == self._cells[-1], self._abstains)] = 1.0
        r, grown = self._r, np.empty_like(self._r)
        for row in path:  # L on entry, R on exit
            np.add(r, 1.0, out=grown)
            np.multiply(row, grown, out=row)
            np.minimum(row, _CAP, out=row)
            r = row
        self._r = r.copy()
        path *= self._weights
        return np.column_stack([np.add.reduceat(path, self._first, axis=1), self._duplicates.update(samples)])

    def _latch(self, path: Float64[ndarray, "n g"], index: int) -> None:
        self.evidence = path[-1]
        if self.crossed is None:
            over = path.sum(axis=1) >= self.threshold
            if not over.any():
                return
            at = int(over.argmax())
            self.crossed = index + at
            path = path[at:]
            self.named[path[0].argmax()] = True
        self.named |= (path >= self.threshold).any(axis=0)
