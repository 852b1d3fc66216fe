"""Mergeable statistics of a stream in constant memory, on two clocks.

A sketch knows no order and no time; `Blocks` cuts a stream into tumbling blocks of `BLOCK` samples, `Decayed` lets what is past
weigh ever less. Some features are kept as they are: of a block `NEWEST` spread over all of it, and by `Newest` the newest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Num
from numpy import ndarray

BLOCK = 4096  # samples
HALF_LIFE = 1024  # samples after which a sample weighs half as much
NEWEST = 512  # features kept as they are
READABLE = 512  # a block with fewer samples is read together with the one before it
TURNS = np.array([int(f"{i:0{BLOCK.bit_length() - 1}b}"[::-1], 2) for i in range(BLOCK)])  # bits reversed: the samples of any first turns lie evenly


@dataclass(frozen=True)
class Sketch:
    """Sufficient statistics of `count` samples. a + b is the sketch of both streams; addition commutes, but for ties among points."""

    cells: Int64[ndarray, "k1"]  # samples per mode, off-manifold last
    feature_sum: Float64[ndarray, "p"]
    feature_outer: Float64[ndarray, "p p"]  # sum of x x^T
    embedded_sum: Float64[ndarray, "e"]  # sum of what a kernel makes of the features
    points: Float32[ndarray, "m p"]  # features of NEWEST samples, or of all while there are fewer, by TURNS: evenly spread over them

    @classmethod
    def empty(cls, cells: int, features: int, embedded: int) -> Sketch:
        return cls(np.zeros(cells, np.int64), np.zeros(features), np.zeros((features, features)), np.zeros(embedded), np.empty((0, features), np.float32))

    @classmethod
    def of(cls, cells: Int64[ndarray, "n"], features: Float[ndarray, "n p"], embedded: Float[ndarray, "n e"], *, size: int) -> Sketch:
        """The sketch of n samples, `size` = K + 1 cells."""
        return cls.empty(size, features.shape[1], embedded.shape[1]).fed(cells, features, embedded)

    def fed(self, cells: Int64[ndarray, "n"], features: Float[ndarray, "n p"], embedded: Float[ndarray, "n e"]) -> Sketch:
        """The sketch of the same stream n samples later."""
        x = features.astype(np.float64)
        return Sketch(
            self.cells + np.bincount(cells, minlength=len(self.cells)),
            self.feature_sum + x.sum(axis=0),
            self.feature_outer + x.T @ x,
            self.embedded_sum + embedded.sum(axis=0, dtype=np.float64),
            self._kept(features.astype(np.float32)),
        )

    def _kept(self, features: Float32[ndarray, "n p"]) -> Float32[ndarray, "m p"]:
        """The points n samples later: those of the least turns."""
        begun, end = self.count, self.count + len(features)
        new = TURNS[np.arange(begun, end) % BLOCK]
        least = NEWEST * BLOCK >> begun.bit_length() - 1 if begun else BLOCK  # of the first 2^k turns, as many as there is room for lie below
        come = new < least
        if not come.any():
            return self.points
        held = np.flatnonzero(TURNS[:least] < begun)[: len(self.points)]  # bits reversed twice are what they were: those that had a turn of these
        turn = np.concatenate([held, new[come]])
        return np.concatenate([self.points, features[come]])[np.argsort(turn, kind="stable")[:NEWEST]]

    def __add__(self, other: Sketch) -> Sketch:
        *sums, points = self.state().values()
        *others, other_points = other.state().values()
        return Sketch(*(ours + theirs for ours, theirs in zip(sums, others, strict=True)), joined(points, self.count, other_points, other.count))

    def state(self) -> dict[str, ndarray]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def count(self) -> int:
        return int(self.cells.sum())

    @property
    def mean(self) -> Float64[ndarray, "p"]:
        return self.feature_sum / self.count

    @property
    def covariance(self) -> Float64[ndarray, "p p"]:
        """Of the empirical law (divisor n), float64. Raises ZeroDivisionError for an empty sketch."""
        return self.feature_outer / self.count - np.outer(self.mean, self.mean)


class Blocks:
    """The block now being filled and the one closed before it. streams: how many of them are summed up here, each with blocks of its own;
    total: samples there ever were."""

    def __init__(self, cells: int, features: int, embedded: int = 0) -> None:
        self._empty = Sketch.empty(cells, features, embedded)
        self._closed = self._open = self._empty
        self.streams, self.total = 1, 0

    def add(self, cells: Int64[ndarray, "n"], features: Float[ndarray, "n p"], embedded: Float[ndarray, "n e"]) -> None:
        self.total += len(cells)
        while len(cells):
            if self._open.count >= BLOCK:
                self._closed, self._open = self._open, self._empty
            room = BLOCK - self._open.count
            self._open = self._open.fed(cells[:room], features[:room], embedded[:room])
            cells, features, embedded = cells[room:], features[room:], embedded[room:]

    def merge(self, other: Blocks) -> None:
        """Show what both show, another stream of the same law and this one, each read since the first sample of a block of its own.

        Whenever one of them goes on to its next block, the sum is read since another start: once in BLOCK samples of all, so that a
        block of the sum, `streams` times as many, is read since `streams` starts. Bounds must hold for all of these."""
        self._closed, self._open = self._empty, self.view + other.view
        self.streams, self.total = self.streams + other.streams, self.total + other.total

    def state(self) -> dict[str, ndarray]:
        sketches = {f"{name}_{k}": v for name, sketch in (("closed", self._closed), ("open", self._open)) for k, v in sketch.state().items()}
        return sketches | {"streams": np.array(self.streams), "total": np.array(self.total)}

    def restore(self, state: Mapping[str, ndarray]) -> None:
        self.streams, self.total = int(state["streams"]), int(state["total"])
        self._closed, self._open = (Sketch(*(state[f"{name}_{k}"] for k in self._empty.state())) for name in ("closed", "open"))

    @property
    def view(self) -> Sketch:
        """The open block, or while that is short the closed one with it: in both cases a stream read since its first sample,
        so bounds that hold at every sample of a stream hold here."""
        return self._open if self._open.count >= READABLE else self._closed + self._open

    @property
    def start(self) -> int:
        """Samples before those that are shown: it moves when a block begins to be read, of a sum whenever one of its streams' does."""
        return self.total - self.view.count


class Decayed:
    """Weighted statistics: each sample weighs 2^(-age / HALF_LIFE), its age being the samples that came after it."""

    def __init__(self, cells: int, features: int, embedded: int = 0) -> None:
        self.cells = np.zeros(cells)
        self.feature_sum, self.feature_outer = np.zeros(features), np.zeros((features, features))
        self.embedded_sum = np.zeros(embedded)
        self.squares = 0.0  # sum of squared weights

    def add(self, cells: Int64[ndarray, "n"], features: Float[ndarray, "n p"], embedded: Float[ndarray, "n e"]) -> None:
        weight = 0.5 ** (np.arange(len(cells) - 1, -1, -1) / HALF_LIFE)
        past, x = 0.5 ** (len(cells) / HALF_LIFE), features.astype(np.float64)
        self.cells = past * self.cells + np.bincount(cells, weight, minlength=len(self.cells))
        self.feature_sum = past * self.feature_sum + weight @ x
        self.feature_outer = past * self.feature_outer + (x * weight[:, None]).T @ x
        self.embedded_sum = past * self.embedded_sum + weight @ embedded
        self.squares = past**2 * self.squares + float(weight @ weight)

    def merge(self, other: Decayed) -> None:
        """Both streams, the samples of each as old as they are in it."""
        self.restore({name: ours + other.state()[name] for name, ours in self.state().items()})

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])

    @property
    def weight(self) -> float:
        """Of all samples together."""
        return float(self.cells.sum())

    @property
    def effective(self) -> float:
        """How many equally weighted samples have as small a variance (Kish, Survey Sampling 1965)."""
        return self.weight**2 / self.squares if self.squares else 0.0

    @property
    def count(self) -> int:
        return math.ceil(self.effective)

    @property
    def mean(self) -> Float64[ndarray, "p"]:
        return self.feature_sum / self.weight

    @property
    def covariance(self) -> Float64[ndarray, "p p"]:
        return self.feature_outer / self.weight - np.outer(self.mean, self.mean)


class Newest:
    """The newest NEWEST features, oldest first, of `count` that there were."""

    def __init__(self, features: int) -> None:
        self.points: Float32[ndarray, "n p"] = np.empty((0, features), np.float32)
        self.count = 0

    def add(self, features: Float32[ndarray, "n p"]) -> None:
        self.points = np.concatenate([self.points, features])[-NEWEST:]
        self.count += len(features)

    def merge(self, other: Newest) -> None:
        """Of each stream its newest, as many as its part of both."""
        self.points = joined(self.points[::-1], self.count, other.points[::-1], other.count)[::-1]
        self.count += other.count

    def state(self) -> dict[str, ndarray]:
        return {"points": self.points, "count": np.array(self.count)}

    def restore(self, state: Mapping[str, ndarray]) -> None:
        self.points, self.count = state["points"], int(state["count"])


def joined(ours: Num[ndarray, "n *p"], our_count: int, theirs: Num[ndarray, "m *p"], their_count: int, *, most: int = NEWEST) -> Num[ndarray, "k *p"]:
    """So many points at most of two streams of so many samples, whose points are given with those first that are to be kept longest.

    They take turns by rank over count. So either stream has its part of both here and in every head of what is returned, which
    makes it the same, but for one point or so of each, whatever the order in which several are joined.
    """
    turn = np.concatenate([(np.arange(len(points)) + 0.5) / max(1, count) for points, count in ((ours, our_count), (theirs, their_count))])
    return np.concatenate([ours, theirs])[np.argsort(turn, kind="stable")[:most]]
