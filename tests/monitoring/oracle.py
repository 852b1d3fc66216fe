"""The mixture in plain numpy and in logarithms, one sample at a time, as the formulas read: what the compiled pass must agree with."""

from __future__ import annotations

import numpy as np
from numpy import ndarray
from scipy.special import logsumexp

from monitoring.bulk import Moments
from monitoring.edetectors import KINDS, TAIL_BETS, Duplicates, Modes, Scores, Shares
from training.bundle import DUPLICATE_BLOCK, Certificate, Reference
from training.drops import DROP_BETS, RISE_WEIGHT


class Oracle:
    """log evidence of each group after each sample: `feed` returns it, keys as in EDetector.groups and Fakes.groups."""

    def __init__(self, certificate: Certificate, reference: Reference, modes: tuple[str, ...]) -> None:
        self.certificate, self.names = certificate, modes
        self.scores, self.moments, self.shares = Scores(certificate), Moments(certificate), Shares(certificate)
        self.cells, self.duplicates = Modes(certificate, reference), Duplicates(certificate)
        self.kinds = np.array(self.scores.kinds + self.moments.kinds + self.shares.kinds)
        parts = np.concatenate([self.scores.parts, self.moments.parts, np.ones(len(self.shares.rates))])
        self.weights = np.array([KINDS[k][1] * part / parts[self.kinds == k].sum() for k, part in zip(self.kinds, parts, strict=True)])
        self.log_r = np.full(len(self.kinds), -np.inf)
        self.log_modes = np.full(self.cells.shares.hit.shape, -np.inf)
        given = certificate.class_cell_count.reshape(-1, len(certificate.cell_count))
        self.fake = np.array([certificate.upper(int(n[-1]), int(n.sum())) for n in given])
        self.log_fakes = np.full((len(given), len(TAIL_BETS)), -np.inf)
        self.duplicated = 0.0
        self.log_quality = np.full(self.cells.quality.hit.shape, -np.inf)
        self.means = np.zeros((len(self.moments.rates), len(self.moments.mean)))
        self.past: list[int] = []
        self.block: list[bytes] = []
        self.start, self.repeated = np.zeros(len(self.duplicates.win)), False

    def tilts(self, scores: ndarray) -> ndarray:
        return np.concatenate([table[np.searchsorted(edges, x)] for table, edges, x in zip(self.scores.table, self.scores.edges, scores, strict=True)])

    def moved(self, x: ndarray) -> ndarray:
        y = self.certificate.white(x[None])[0] - self.certificate.white_mean
        e, s, size = self.moments.bounds
        v, m = self.moments.rates / (2 - self.moments.rates), self.means
        squares = (m**2).sum(axis=1)
        payoffs = ((1 + m @ y / 2) ** 2 + v / 4 * (y @ y)) / (1 + e * np.sqrt(squares) + (s * squares + v * size) / 4)
        self.means = m + self.moments.rates[:, None] * (y - m)
        return payoffs

    def recent(self, cell: int) -> ndarray:
        payoffs = []
        for rate in self.shares.rates:
            kept = (1 - rate) ** np.arange(len(self.past))[::-1]
            counted = kept[np.array(self.past) == cell].sum() if self.past else 0.0
            payoffs.append((self.shares.prior[cell] / rate + counted) / (1 / rate + kept.sum()) / self.shares.bound[cell])
        self.past.append(cell)
        return np.array(payoffs)

    def repeats(self, row: bytes) -> float:
        self.repeated |= row in self.block
        self.block.append(row)
        r = self.start * (self.duplicates.win if self.repeated else self.duplicates.lose) + len(self.block)
        if len(self.block) == DUPLICATE_BLOCK:
            self.start, self.block, self.repeated = r, [], False
        return float(r @ self.duplicates.weights)

    @staticmethod
    def _mode(log_r: ndarray, cell: int, hit: ndarray, miss: ndarray) -> ndarray:
        payoffs = miss.copy()
        if cell < miss.shape[1]:
            payoffs[:, cell] = hit[:, cell]
        return np.logaddexp(0, log_r) + np.log(payoffs)

    def feed(self, scores: ndarray, x: ndarray, cell: int, row: bytes, given: int = 0) -> dict[str, float]:
        """given: 0, or one more than the class that was asked for."""
        with np.errstate(divide="ignore"):
            if given:
                theta, m = np.array(TAIL_BETS), self.fake[given - 1]
                payoffs = theta / m if cell == len(self.names) else (1 - theta) / (1 - m)
                self.log_fakes[given - 1] = np.logaddexp(0, self.log_fakes[given - 1]) + np.log(payoffs)
            else:
                self.log_r = np.logaddexp(0, self.log_r) + np.log(np.concatenate([self.tilts(scores), self.moved(x), self.recent(cell)]))
                self.log_quality = self._mode(self.log_quality, cell, self.cells.quality.hit, self.cells.quality.miss)
                self.duplicated = self.repeats(row)
            if cell < len(self.names):
                self.log_modes[given] = self._mode(self.log_modes[given], cell, self.cells.shares.hit[given], self.cells.shares.miss[given])
            found = {k: logsumexp((self.log_r + np.log(self.weights))[self.kinds == k]) for k in KINDS if k in self.kinds}
            found["duplicates"] = np.log(self.duplicated)
            modes = self.log_modes + np.log(self.cells.weights)[..., None]
            found |= {f"drop:{name}": logsumexp(modes[:, : len(DROP_BETS), k]) for k, name in enumerate(self.names)}
            found |= {f"inflate:{name}": logsumexp(modes[:, len(DROP_BETS) :, k]) for k, name in enumerate(self.names)}
            allowed = np.array(TAIL_BETS) > self.fake[:, None]
            found |= {f"upper:{c}": logsumexp(r[a]) + np.log(RISE_WEIGHT / allowed.sum()) for c, (r, a) in enumerate(zip(self.log_fakes, allowed, strict=True))}
            found["quality"] = logsumexp(self.log_quality + np.log(self.cells.quality_weights)[:, None])
        return found
