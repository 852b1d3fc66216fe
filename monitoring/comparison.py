"""Do two versions give the same law? A sequential test on pairs: what each makes of the very same latents.

Null: X, of production, and Y, of the candidate, have one law. With the same latents X and Y depend on each other, in a way that
nobody knows: Y = G'(z) and X = G(z) may have one law without being exchangeable, say G'(z) = G(Tz) for a T that keeps the law of
z but is not its own inverse. So it is not the order within the pairs that is bet on, which an exchangeable pair would allow, but
what one law implies whatever the coupling: E h(Y) = E h(X) for every h. With values of h at most 1 apart

    L = 1 + lambda (h(Y) - h(X)),    |lambda| < 1,    h chosen from the past alone

has E[L | past] = 1. The product of L is a martingale, so is a mixture of products, and by Ville's inequality a mixture of versions
with one law ever reaches 1 / ALPHA with probability at most ALPHA, however often somebody looks. Pairing is what makes it quick:
where the versions agree on a latent, h(Y) - h(X) is 0 and costs nothing. On the cells this is McNemar's test (Psychometrika
1947) as a bet; with a witness that is learned, the two-sample test of Shekhar and Ramdas (IEEE Trans. Inf. Theory 2024).

Two honest trainings differ, and this says so: it is no alarm, and takes nothing of the alarms' budget. Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.special import logsumexp

from monitoring.features import Seen
from training.bundle import Certificate

ALPHA = 1e-3  # chance that two versions with one law are ever said to differ
STAKES = (0.2, 0.5, 0.9)  # |lambda|
LEVELS = (1 / 2, 1 / 16, 1 / 256)  # of the scores, both tails
REACH = 3.0  # standard deviations along the witness at which h is clipped
CHUNK = 64  # pairs between two looks for a better witness
NAMED = 5  # modes named in the words
DROPPED = ("rejected", "unpaired")  # why latents of a candidate were not compared: some row could not be looked at, production's side did not come


class Comparison:
    """Pairs of one production version with one candidate, in the eyes of production's features.onnx and certificate.

    evidence: log of the mixture; differs: whether it ever reached 1 / ALPHA, which stays; pairs: how many were looked at;
    dropped: by DROPPED, how many were not. identity: of this pair, in what JSON can say; no other's state is taken.
    """

    def __init__(self, certificate: Certificate, modes: tuple[str, ...], identity: Mapping[str, Any] | None = None) -> None:
        self._certificate, self._modes = certificate, modes
        self.identity = {**(identity or {}), "bets": [list(STAKES), list(LEVELS), REACH, CHUNK]}
        used = [int(np.abs(certificate.levels - level).argmin()) for level in LEVELS]
        self._edges = np.concatenate([certificate.lower_threshold[:, used], certificate.upper_threshold[:, used]], axis=1)  # [s, e]
        both = np.array([sign * stake for stake in STAKES for sign in (1, -1)])
        self._stakes = {"modes": both, "scores": both, "features": np.array(STAKES)}
        shapes = {"modes": (len(modes) + 1,), "scores": self._edges.shape, "features": (1,)}
        self._log = {family: np.zeros((*shapes[family], len(stakes))) for family, stakes in self._stakes.items()}
        self._moved = np.zeros(certificate.white_mean.size)  # sum of y - x
        self._counts = np.zeros((2, len(modes) + 1), np.int64)  # production, candidate
        self._least = np.zeros(len(modes) + 1)  # most that each mode's own evidence has been
        self.pairs, self.agreed = 0, 0
        self.dropped = dict.fromkeys(DROPPED, 0)
        self.differs = False

    @property
    def evidence(self) -> float:
        return float(logsumexp([self._family(family) for family in self._log])) - math.log(len(self._log))

    @property
    def families(self) -> dict[str, float]:
        """Family -> log10 of its evidence."""
        return {family: self._family(family) / math.log(10) for family in self._log}

    def _family(self, family: str) -> float:
        return float(logsumexp(self._log[family])) - math.log(self._log[family].size)

    def update(self, production: Seen, candidate: Seen) -> None:
        """n pairs, row by row. Raises ValueError where the two are not equally long: then no row is known to have a partner."""
        n = len(production.cells)
        if len(candidate.cells) != n:
            raise ValueError(f"{n} samples of production, {len(candidate.cells)} of the candidate: these are no pairs")
        for i in range(0, n, CHUNK):
            self._step(*(Seen(s.samples[i : i + CHUNK], s.features[i : i + CHUNK], s.scores[i : i + CHUNK], s.cells[i : i + CHUNK], {}) for s in (production, candidate)))

    def _step(self, x: Seen, y: Seen) -> None:
        for row, cells in enumerate((x.cells, y.cells)):
            self._counts[row] += np.bincount(cells, minlength=self._counts.shape[1])
        apart = x.cells != y.cells  # elsewhere nothing is won or lost
        np.add.at(self._log["modes"], y.cells[apart], np.log1p(self._stakes["modes"]))
        np.add.at(self._log["modes"], x.cells[apart], np.log1p(-self._stakes["modes"]))
        beyond = [(s.scores[:, :, None] > self._edges).astype(np.int8) for s in (x, y)]
        self._log["scores"] += np.log1p((beyond[1] - beyond[0])[..., None] * self._stakes["scores"]).sum(axis=0)
        if self._moved.size:
            a, b = (self._certificate.white(s.features) - self._certificate.white_mean for s in (x, y))
            if length := float(np.linalg.norm(self._moved)):
                h = [np.clip(v @ self._moved / (2 * REACH * length), -0.5, 0.5) for v in (a, b)]
                self._log["features"] += np.log1p((h[1] - h[0])[:, None] * self._stakes["features"]).sum(axis=0)
            self._moved = self._moved + (b - a).sum(axis=0)
        self.pairs += len(x.cells)
        self.agreed += int((~apart).sum())
        self._least = np.maximum(self._least, self._log["modes"].max(axis=1))
        self.differs = self.differs or self.evidence >= -math.log(ALPHA)

    def state(self) -> dict[str, Any]:
        """All that the past has left here, under plain names: arrays, and values that JSON can say."""
        values = {"identity": self.identity, "pairs": self.pairs, "agreed": self.agreed, "differs": self.differs, "dropped": dict(self.dropped)}
        return values | {name: array.copy() for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, ndarray]:
        return {f"log.{family}": log for family, log in self._log.items()} | {"moved": self._moved, "counts": self._counts, "least": self._least}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Go on where the comparison stood whose `state` this is; where it is of another pair or of other bets, begin anew and return False.

        Raises ValueError where the state is damaged, and takes nothing of it.
        """
        if not isinstance(state.get("identity"), dict):
            raise ValueError("the state does not say which pair it is of")
        if state["identity"] != self.identity:
            return False
        for name, own in self._arrays().items():
            found = state.get(name)
            if not isinstance(found, ndarray) or (found.dtype, found.shape) != (own.dtype, own.shape):
                about = f"{found.dtype} {list(found.shape)}" if isinstance(found, ndarray) else repr(found)[:50]
                raise ValueError(f"{name} is {about}; expected {own.dtype} {list(own.shape)}")
            if not np.isfinite(found).all() or (name in ("counts", "least") and (found < 0).any()):
                raise ValueError(f"{name} holds what no pairs can have left there")
        pairs, agreed, dropped = state.get("pairs"), state.get("agreed"), state.get("dropped")
        counts = [pairs, agreed, *(dropped.get(reason) for reason in DROPPED)] if isinstance(dropped, dict) else [None]
        if not all(type(count) is int and count >= 0 for count in counts) or type(state.get("differs")) is not bool:
            raise ValueError(f"pairs, agreed, dropped, differs are {pairs!r}, {agreed!r}, {dropped!r}, {state.get('differs')!r}; expected counts, and whether")
        if (state["counts"].sum(axis=1) != pairs).any() or agreed > pairs:
            raise ValueError(f"there are {pairs} pairs, {agreed} agreed, and the cells of {state['counts'].sum(axis=1).tolist()} samples")
        self.pairs, self.agreed, self.differs = pairs, agreed, state["differs"]
        self.dropped = {reason: dropped[reason] for reason in DROPPED}
        self._log = {family: state[f"log.{family}"].copy() for family in self._log}
        self._moved, self._counts, self._least = (state[name].copy() for name in ("moved", "counts", "least"))
        return True

    def shares(self) -> Float64[ndarray, "2 k1"]:
        """Of the cells among the pairs: production's, the candidate's. NaN before the first pair."""
        with np.errstate(invalid="ignore"):
            return self._counts / np.float64(self.pairs)

    def named(self) -> list[int]:
        """Cells whose own evidence has reached 1 / ALPHA on its weight: those that certainly differ, farthest first."""
        over = np.flatnonzero(self._least - math.log(3 * self._log["modes"].size) >= -math.log(ALPHA))
        shares = self.shares()
        return sorted(over.tolist(), key=lambda cell: -abs(shares[1, cell] - shares[0, cell]))

    def words(self, production: str, candidate: str) -> str:
        """One sentence or two."""
        if not self.pairs:
            return f"No latent has been given to both {candidate} and {production} yet."
        agreement = f"They put {self.agreed / self.pairs:.1%} of {self.pairs:,} latents into the same mode."
        if not self.differs:
            return f"Nothing tells {candidate} from {production} so far. {agreement}"
        shares, names = self.shares(), (*self._modes, "samples off the manifold")
        said = [f"{'more' if b > a else 'less'} {names[cell]} ({b:.1%} instead of {a:.1%})" for cell in self.named()[:NAMED] for a, b in [shares[:, cell]]]
        families = self.families
        if not said:
            said = [{"modes": "other shares of the modes", "scores": "other distances from the data", "features": "other features"}[max(families, key=families.get)]]
        return f"{candidate} is not the model that {production} is: {', '.join(said)}. {agreement}"

    def snapshot(self, production: str, candidate: str) -> dict[str, Any]:
        """What there is to show, JSON-able."""
        return {
            "against": production,
            "pairs": self.pairs,
            "dropped": dict(self.dropped),
            "agreement": self.agreed / self.pairs if self.pairs else None,
            "log10_evidence": self.evidence / math.log(10),
            "log10_threshold": -math.log10(ALPHA),
            "families": self.families,
            "differs": self.differs,
            "words": self.words(production, candidate),
        }
