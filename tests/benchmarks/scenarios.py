"""The laws of the monitoring benchmark: what is normal, what it changes into, and how our certificate of it is counted.

A space is a law before the change with its changes. Streams are [time, stream, d] float32, in lock-step. Nothing here knows a
detector, except that `certify` makes the certificate that ours needs, from the space's own samples alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

from training.bundle import AMBIGUITY, DUPLICATE_BLOCK, Certificate, Reference, open_bundle, whiten, whitening
from training.export import open_source

LEVELS = 2.0 ** -np.arange(1.0, 17.0)
DELTA = 0.01

Draw = Callable[[np.random.Generator, int, int], ndarray]  # generator, samples, number of the stream -> [samples, d]
Density = Callable[[ndarray], ndarray]  # [..., d] -> log q(x) / p(x)


class Change(NamedTuple):
    name: str
    draw: Draw
    horizon: int  # samples after the change at which a run is given up
    oracle: Density | None = None  # the log-likelihood ratio, where it is known and the same for every stream


@dataclass(frozen=True)
class Space:
    name: str
    dim: int
    draw: Draw
    changes: tuple[Change, ...]
    cells: int = 25  # k-means cells, where there is no `probability`
    probability: Callable[[ndarray], ndarray] | None = None  # of each of the `cells` classes, [n, d] -> [n, cells]


def _normal(sd: float = 1.0, mean: float = 0.0, mixed: float = 1.0, d: int = 20) -> Draw:
    """`mixed` of N(mean, sd^2 I) and the rest of N(0, I)."""

    def draw(rng: np.random.Generator, n: int, stream: int) -> ndarray:
        x = rng.standard_normal((n, d), np.float32)
        other = rng.random(n) < mixed
        x[other] = x[other] * sd + mean
        return x

    return draw


def _ratio(sd: float = 1.0, mean: float = 0.0, mixed: float = 1.0, d: int = 20) -> Density:
    def log_ratio(x: ndarray) -> ndarray:
        x = x.astype(np.float64)
        other = -0.5 * ((x - mean) ** 2).sum(-1) / sd**2 - d * np.log(sd) + 0.5 * (x**2).sum(-1)
        return np.logaddexp(np.log(mixed) + other, np.log1p(-mixed)) if mixed < 1 else other

    return log_ratio


GAUSSIAN = (
    ("0.7 N(0, 4I)", {"sd": 2.0, "mixed": 0.7}, 300),
    ("0.3 N(0, 4I)", {"sd": 2.0, "mixed": 0.3}, 400),
    ("mean + 0.3", {"mean": 0.3}, 400),
    ("variance x 0.8", {"sd": 0.8**0.5}, 1000),
    ("5 % N(0, 9I)", {"sd": 3.0, "mixed": 0.05}, 1000),
)


def gauss() -> Space:
    return Space("gauss", 20, _normal(), tuple(Change(name, _normal(**law), h, _ratio(**law)) for name, law, h in GAUSSIAN))


def _turn(d: int) -> ndarray:
    """A fixed random matrix of condition number 30: through it, no coordinate means anything by itself."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    return (left * np.geomspace(0.2, 6, d) @ right).astype(np.float32)


def mixed(space: Space) -> Space:
    """The same laws and changes, seen through that matrix."""
    turn = _turn(space.dim)
    back = np.linalg.inv(turn.astype(np.float64)).astype(np.float32)
    through = lambda draw: lambda rng, n, stream: draw(rng, n, stream) @ turn  # noqa: E731
    changes = tuple(c._replace(draw=through(c.draw), oracle=None) for c in space.changes)
    probability = space.probability and (lambda x: space.probability(x @ back))
    return Space(f"mixed {space.name}", space.dim, through(space.draw), changes, space.cells, probability)


def grid(cells: int = 25) -> Space:
    """25 modes in the plane, 2 apart, with sd 0.05; a stream loses the mode of its number."""
    centres = 2.0 * np.stack([np.arange(25) % 5 - 2, np.arange(25) // 5 - 2], axis=1)

    def draw(rng: np.random.Generator, n: int, stream: int, lost: bool = False) -> ndarray:
        mode = rng.integers(24, size=n) if lost else rng.integers(25, size=n)
        mode += lost & (mode >= stream % 25)
        return (centres[mode] + 0.05 * rng.standard_normal((n, 2))).astype(np.float32)

    change = Change("one mode of 25 drops", lambda rng, n, stream: draw(rng, n, stream, True), 2000)
    return Space("grid" if cells == 25 else f"grid-{cells}", 2, draw, (change,), cells)


@cache
def _digits() -> tuple[ndarray, ndarray]:
    data = load_digits()
    points = PCA(16, random_state=0).fit_transform(data.data)
    return (points / points.std()).astype(np.float32), data.target


def digits() -> Space:
    """1,797 digits in 16 principal components, with noise of sd 0.1; a stream loses the class of its number."""
    points, target = _digits()
    without = [np.flatnonzero(target != k) for k in range(10)]

    def draw(rng: np.random.Generator, n: int, stream: int, lost: bool = False) -> ndarray:
        pick = without[stream % 10][rng.integers(len(without[stream % 10]), size=n)] if lost else rng.integers(len(points), size=n)
        return points[pick] + 0.1 * rng.standard_normal((n, 16), np.float32)

    rng = np.random.default_rng(2)
    pick = rng.integers(len(points), size=20_000)
    eye = QuadraticDiscriminantAnalysis(reg_param=0.01).fit(points[pick] + 0.1 * rng.standard_normal((20_000, 16), np.float32), target[pick])
    change = Change("one class of 10 drops", lambda rng, n, stream: draw(rng, n, stream, True), 1000)
    return Space("digits", 16, draw, (change,), 10, eye.predict_proba)


def served(folder: Path) -> Space:
    """The features of a certified generator's own samples, where nothing is aligned with the radius.

    The law is that of a pool of 100,000 samples, drawn from again and again, so that it is known without error. Scales and means
    change about the pool's centre, in its whitened coordinates; a stream loses the class of its number.
    """
    bundle = open_bundle(folder)
    source = open_source(bundle.path, bundle.card)
    pool = [source.see(source.samples(seed=7, offset=at, count=1000)) for at in range(0, 100_000, 1000)]
    points, target = np.concatenate([features for features, _, _ in pool]), np.concatenate([mode for _, _, mode in pool])
    centre, classes = points.mean(axis=0), len(bundle.card.modes)
    values, vectors = np.linalg.eigh(np.cov(points.T.astype(np.float64)))
    shift = ((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T).sum(axis=0).astype(np.float32)  # one sd in each white coordinate
    kept = [np.flatnonzero(target != k) for k in range(classes)]

    def draw(rng: np.random.Generator, n: int, stream: int, sd: float = 1.0, mean: float = 0.0, mixed: float = 1.0, lost: bool = False) -> ndarray:
        among = kept[stream % classes] if lost else np.arange(len(points))
        x = points[among[rng.integers(len(among), size=n)]]
        other = (rng.random(n) < mixed)[:, None]
        return np.where(other, centre + sd * (x - centre) + mean * shift, x).astype(np.float32)

    changes = tuple(Change(name, lambda rng, n, stream, law=law: draw(rng, n, stream, **law), h) for name, law, h in GAUSSIAN)
    changes += (Change(f"one class of {classes} drops", lambda rng, n, stream: draw(rng, n, stream, lost=True), 1000),)
    on = np.flatnonzero(target >= 0)
    look = QuadraticDiscriminantAnalysis(reg_param=0.01).fit(points[on[:20_000]], target[on[:20_000]])
    return Space(bundle.card.model, points.shape[1], draw, changes, classes, look.predict_proba)


SPACES: dict[str, Callable[[], Space]] = {
    "gauss": gauss,
    "grid": grid,
    "digits": digits,
    "mixed-gauss": lambda: mixed(gauss()),
    "mixed-grid": lambda: mixed(grid()),
    "mixed-digits": lambda: mixed(digits()),
    "grid-16": lambda: grid(16),
    "grid-40": lambda: grid(40),
}


def streams(space: Space, seed: int, count: int, before: int, after: int, change: Change | None = None) -> ndarray:
    """[before + after, count, d]: the law of the space, and from `before` on the changed one, if any."""
    found = np.empty((before + after, count, space.dim), np.float32)
    for s in range(count):
        rng = np.random.default_rng((seed, s))
        found[:before, s] = space.draw(rng, before, s)
        found[before:, s] = (change or space).draw(rng, after, s)
    return found


class Eye(NamedTuple):
    """What our detector is told of x: scores, the features and the cell.

    The scores are those of `training/features.py`, but for the two that look for training data: these have bets of their own, which
    take no weight from others, and what is changed here makes no copies.
    """

    centre: ndarray
    outer: ndarray  # (x - centre) @ outer is white
    inner: ndarray  # ... within the cells
    cells: ndarray
    limit: float  # of the distance to the nearest cell: farther is off the manifold
    probability: Callable[[ndarray], ndarray] | None
    count: int  # of modes

    @property
    def scores(self) -> tuple[str, ...]:
        return ("manifold_distance", "radius") if self.probability is None else ("manifold_distance", "radius", AMBIGUITY)

    def look(self, x: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """scores [n, 2 or 3], features [n, d], cells [n]."""
        y = (x @ self.inner).astype(np.float32)
        places = (self.cells @ self.inner).astype(np.float32)
        squares = (y**2).sum(1)[:, None] - 2 * y @ places.T + (places**2).sum(1)
        nearest = squares.argmin(axis=1)
        distance = np.sqrt(((y - places[nearest]) ** 2).sum(axis=1))
        radius = np.linalg.norm((x - self.centre) @ self.outer, axis=1)
        kind, scores = nearest, [distance, radius]
        if self.probability is not None:
            each = self.probability(x)
            kind, scores = each.argmax(axis=1), [*scores, 1 - each.max(axis=1)]
        return np.stack(scores, axis=1), x, np.where(distance > self.limit, self.count, kind).astype(np.int64)



def _white(x: ndarray) -> ndarray:
    values, vectors = np.linalg.eigh(np.cov(x.T.astype(np.float64)))
    return vectors / np.sqrt(np.maximum(values, 1e-12))


def certify(space: Space, seed: int, count: int) -> tuple[Eye, Certificate, Reference]:
    """Fit the eye on 20,000 samples, set thresholds on count / 5 others, count on `count` more."""
    rng = np.random.default_rng((seed, 77))
    x = space.draw(rng, 20_000, 0)
    found = KMeans(space.cells if space.probability is None else 100, n_init=1, random_state=0).fit(x[:10_000])
    centres = found.cluster_centers_
    eye = Eye(x.mean(axis=0), _white(x), _white(x - centres[found.predict(x)]), centres, np.inf, space.probability, space.cells)
    eye = eye._replace(limit=float(np.quantile(eye.look(x[10_000:])[0][:, 0], 0.99)))

    scores, features, _ = eye.look(space.draw(rng, count // 5, 0))
    white = whitening(features)
    upper = np.quantile(scores, 1 - LEVELS, axis=0, method="higher").T.astype(np.float64)
    lower = np.quantile(scores, LEVELS, axis=0, method="lower").T.astype(np.float64)
    hits = np.zeros((2, *upper.shape), np.int64)
    cells = np.zeros(eye.count + 1, np.int64)
    mean, moment = np.zeros(white[1].shape[1]), np.zeros((white[1].shape[1],) * 2)
    for at in range(0, count, 50_000):
        scores, features, cell = eye.look(space.draw(rng, min(50_000, count - at), 0))
        for s, column in enumerate(np.sort(scores.astype(np.float64), axis=0).T):
            hits[0, s] += len(column) - np.searchsorted(column, upper[s], side="right")
            hits[1, s] += np.searchsorted(column, lower[s], side="left")
        cells += np.bincount(cell, minlength=len(cells))
        y = whiten(features, *white)
        mean, moment = mean + y.sum(axis=0), moment + y.T @ y
    blank, d = np.zeros(1, np.int64), space.dim
    certificate = Certificate(
        count, DELTA, cells, LEVELS, upper, hits[0], lower, hits[1], count // DUPLICATE_BLOCK, 0, np.zeros(d), np.eye(d), blank, blank,
        np.zeros((1, d), np.float32), white[0], white[1], white[2], mean / count, moment / count,
    )  # fmt: skip
    share = (cells + 0.5) / (count + 0.5 * len(cells))
    empty = np.zeros((0, d), np.float32)
    return eye, certificate, Reference(count, share, np.zeros(d), np.eye(d), empty, empty)
