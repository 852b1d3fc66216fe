"""The built-in data sets, in the form in which samples are served, with 20 % held out.

Each is made in memory: nothing is downloaded. This file knows neither networks nor bundles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

HELD_OUT = 0.2


@dataclass(frozen=True)
class Mixture:
    """The law of a synthetic data set: equal isotropic Gaussians, so that generated samples can be judged exactly."""

    centres: Float64[ndarray, "k d"]
    sigma: float


@dataclass(frozen=True)
class Dataset:
    """Real samples as they would be served: uint8 [n, h, w, c] or float32 [n, d] in data units."""

    name: str
    samples: ndarray  # [n, *shape], in random order; the last fifth is held out
    cells: int  # how many modes the monitor shall tell apart
    labels: Int64[ndarray, "n"] | None = None
    classes: tuple[str, ...] = ()  # names of the labels
    mixture: Mixture | None = None

    @property
    def is_image(self) -> bool:
        return self.samples.dtype == np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        return self.samples.shape[1:]

    @property
    def dim(self) -> int:
        return int(np.prod(self.shape))

    @property
    def trained(self) -> int:
        """How many samples the networks may see; the rest is held out."""
        return len(self.samples) - int(len(self.samples) * HELD_OUT)

    @cached_property
    def shift(self) -> Float32[ndarray, "d"]:
        """Networks see (sample - shift) / scale: [-1, 1] for images, zero mean and unit variance for vectors."""
        if self.is_image:
            return np.full(self.dim, 127.5, np.float32)
        return self.samples[: self.trained].mean(axis=0, dtype=np.float64).astype(np.float32)

    @cached_property
    def scale(self) -> Float32[ndarray, "d"]:
        if self.is_image:
            return np.full(self.dim, 127.5, np.float32)
        return self.samples[: self.trained].std(axis=0, dtype=np.float64).astype(np.float32)

    def normalised(self) -> Float32[ndarray, "n d"]:
        """All samples in the networks' units, one row each."""
        return (self.samples.reshape(len(self.samples), -1).astype(np.float32) - self.shift) / self.scale


def ring() -> Dataset:
    """8 Gaussians, sigma 0.01, on the unit circle: the protocol of PacGAN (Lin et al. 2018)."""
    angles = 2 * np.pi * np.arange(8) / 8
    return _mixture("ring", np.stack([np.cos(angles), np.sin(angles)], axis=1), sigma=0.01)


def grid() -> Dataset:
    """25 Gaussians, sigma 0.05, on {-4, -2, 0, 2, 4}^2: the protocol of PacGAN."""
    side = np.arange(-4.0, 5.0, 2.0)
    return _mixture("grid", np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2), sigma=0.05)


def digits() -> Dataset:
    """1,797 handwritten digits, 8 x 8, from scikit-learn (Alpaydin and Kaynak 1998); 17 grey levels spread over 0..255."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.images))
    images = np.rint(raw.images[order] * (255 / 16)).astype(np.uint8)[..., None]
    labels = raw.target[order].astype(np.int64)
    return Dataset("digits", images, cells=10, labels=labels, classes=tuple(str(c) for c in range(10)))


def _mixture(name: str, centres: Float64[ndarray, "k d"], sigma: float, count: int = 100_000) -> Dataset:
    rng = np.random.default_rng(0)
    component = rng.integers(len(centres), size=count)
    samples = centres[component] + sigma * rng.standard_normal((count, centres.shape[1]))
    return Dataset(name, samples.astype(np.float32), cells=len(centres), mixture=Mixture(centres, sigma))


DATASETS: dict[str, Callable[[], Dataset]] = {"ring": ring, "grid": grid, "digits": digits}
