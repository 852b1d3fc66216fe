"""Mergeable statistics of a stream in constant memory: cell counts and the moments of the features.

A sketch knows no order and no time; `Blocks` cuts a stream into tumbling blocks of `BLOCK` samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray

BLOCK = 4096  # samples
READABLE = 512  # a block with fewer samples is read together with the one before it


@dataclass(frozen=True)
class Sketch:
    """Sufficient statistics of `count` samples. a + b is the sketch of both streams; addition commutes."""

    cells: Int64[ndarray, "k1"]  # samples per mode, off-manifold last
    feature_sum: Float64[ndarray, "p"]
    feature_outer: Float64[ndarray, "p p"]  # sum of x x^T

    @classmethod
    def empty(cls, cells: int, features: int) -> Sketch:
        return cls(np.zeros(cells, np.int64), np.zeros(features), np.zeros((features, features)))

    @classmethod
    def of(cls, cells: Int64[ndarray, "n"], features: Float[ndarray, "n p"], *, size: int) -> Sketch:
        """The sketch of n samples, `size` = K + 1 cells."""
        x = features.astype(np.float64)
        return cls(np.bincount(cells, minlength=size), x.sum(axis=0), x.T @ x)

    def __add__(self, other: Sketch) -> Sketch:
        return Sketch(self.cells + other.cells, self.feature_sum + other.feature_sum, self.feature_outer + other.feature_outer)

    def state(self) -> dict[str, ndarray]:
        return {"cells": self.cells, "feature_sum": self.feature_sum, "feature_outer": self.feature_outer}

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
    """The block now being filled and the one closed before it."""

    def __init__(self, cells: int, features: int) -> None:
        self._empty = Sketch.empty(cells, features)
        self._closed = self._open = self._empty

    def add(self, cells: Int64[ndarray, "n"], features: Float[ndarray, "n p"]) -> None:
        while len(cells):
            room = BLOCK - self._open.count
            self._open += Sketch.of(cells[:room], features[:room], size=len(self._empty.cells))
            cells, features = cells[room:], features[room:]
            if self._open.count == BLOCK:
                self._closed, self._open = self._open, self._empty

    def merge(self, other: Blocks) -> None:
        """Take over what another stream of the same law left: its open block joins ours, which may thereby close."""
        self._closed, self._open = self._closed + other._closed, self._open + other._open
        if self._open.count >= BLOCK:
            self._closed, self._open = self._open, self._empty

    def state(self) -> dict[str, ndarray]:
        return {f"{name}_{k}": v for name, sketch in (("closed", self._closed), ("open", self._open)) for k, v in sketch.state().items()}

    def restore(self, state: Mapping[str, ndarray]) -> None:
        self._closed, self._open = (Sketch(*(state[f"{name}_{k}"] for k in self._empty.state())) for name in ("closed", "open"))

    @property
    def view(self) -> Sketch:
        """The open block, or while that is short the closed one with it: in both cases a stream read since its first sample,
        so bounds that hold at every sample of a stream hold here."""
        return self._open if self._open.count >= READABLE else self._closed + self._open
