"""Real samples in the form in which they are served, with 20 % held out, and the data sets that are built in.

Each is made in memory or read from files that are already there: nothing is downloaded. Data of the user's own come through
sources.py. This file knows neither networks nor bundles, nor Ray.
"""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from training.clusters import Clusters, clusters, signs_for

HELD_OUT = 0.2
COUNT = 100_000  # samples of a law that can be drawn from
CLUSTERED = 5000  # samples in which clusters are counted
COMPARED = 4096  # numbers of an image that is compared with others: larger ones are, by coarser pixels
PIECE = 2**24  # numbers of samples that are looked at together, 64 MB: of buffers below 32, the allocator keeps holes
CELLS = 20  # modes that data with neither labels nor a known law are divided into
DEBIAN = Path("/usr/share/datasets")  # where packages such as dataset-fashion-mnist put their files


class DataError(ValueError):
    """Data that cannot be trained on. The text names the file or the value, what is expected and what to do."""


@dataclass(frozen=True)
class Mixture:
    """The law of a synthetic data set: equal isotropic Gaussians, so that generated samples can be judged exactly.

    `rank` is the dimension of the Gaussians, which may be flat in the space they lie in.
    """

    centres: Float64[ndarray, "k d"]
    sigma: float
    rank: int


@dataclass(frozen=True)
class Dataset:
    """Real samples as they would be served: uint8 [n, h, w, c] or float32 [n, d] in data units."""

    name: str
    samples: ndarray  # [n, *shape], in random order; the last fifth is held out
    cells: int  # how many modes the monitor shall tell apart
    labels: Int64[ndarray, "n"] | None = None
    classes: tuple[str, ...] = ()  # names of the labels
    mixture: Mixture | None = None
    counted: Clusters | None = None  # where another process has counted them already
    stacked: bool = False  # each channel is an image of its own with a label of its own: a label is as many decimal digits

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
    def clusters(self) -> Clusters:
        """The separate clusters: the classes of labelled images, else what clusters.py counts.

        Pixels are a poor ruler: a shifted image is farther from itself than from another class, so MNIST seems to hang together.
        """
        if self.counted is not None:
            return Clusters(*self.counted)
        if self.is_image and self.labels is not None:
            return Clusters(len(self.classes), hollow=False, signs=signs_for(np.full(len(self.classes), 1 / len(self.classes))))
        return clusters(self.coarse(np.arange(min(self.trained, CLUSTERED))))

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
        shift, rows = self.shift.astype(np.float64), max(1, 2**20 // self.dim)  # in pieces: they may be larger than memory
        parts = (self.samples[i : min(i + rows, self.trained)] for i in range(0, self.trained, rows))
        deviation = np.sqrt(sum(((part - shift) ** 2).sum(axis=0) for part in parts) / self.trained).astype(np.float32)
        return np.where(deviation > 0, deviation, np.float32(1))  # a coordinate that never varies stays as it is

    def normalised(self, rows: slice | Int64[ndarray, "n"] = slice(None)) -> Float32[ndarray, "n d"]:
        """Samples in the networks' units, one row each. Only `rows` are read, where samples lie on disk."""
        picked = self.samples[rows]
        x = picked.reshape(len(picked), self.dim).astype(np.float32)
        x -= self.shift  # in place: rows of large images are not to be there twice
        x /= self.scale
        return x

    def pieces(self, rows: Int64[ndarray, "n"], fewest: int = 1) -> list[Int64[ndarray, "..."]]:
        """Rows in at least `fewest` parts, each of no more than PIECE numbers, or of one sample."""
        return np.array_split(rows, max(fewest, min(len(rows), math.ceil(len(rows) * self.dim / PIECE))))

    def coarse(self, rows: Int64[ndarray, "n"]) -> Float32[ndarray, "n q"]:
        """Samples in the networks' units, pooled."""
        return np.concatenate([self.pooled(self.normalised(part)) for part in self.pieces(rows)])

    def pooled(self, x: Float32[ndarray, "n d"]) -> Float32[ndarray, "n q"]:
        """Images of more than COMPARED numbers averaged over squares of pixels, beyond an edge over zeros; all else as it is."""
        side = math.ceil(math.sqrt(self.dim / COMPARED)) if self.is_image else 1
        if side == 1:
            return x
        x = x.reshape(len(x), *self.shape)
        for axis in (1, 2):
            x = np.add.reduceat(x, np.arange(0, x.shape[axis], side), axis=axis) / np.float32(side)
        return x.reshape(len(x), -1)


def ring() -> Dataset:
    """8 Gaussians, sigma 0.01, on the unit circle: the protocol of PacGAN (Lin et al. 2018)."""
    angles = 2 * np.pi * np.arange(8) / 8
    return _mixture("ring", np.stack([np.cos(angles), np.sin(angles)], axis=1), sigma=0.01)


def grid() -> Dataset:
    """25 Gaussians, sigma 0.05, on {-4, -2, 0, 2, 4}^2: the protocol of PacGAN."""
    side = np.arange(-4.0, 5.0, 2.0)
    return _mixture("grid", np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2), sigma=0.05)


def grid100() -> Dataset:
    """100 Gaussians, sigma 0.05, on a square grid of spacing 2: the grid of PacGAN, larger."""
    side = np.arange(-9.0, 10.0, 2.0)
    return _mixture("grid100", np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2), sigma=0.05)


def mixture1200() -> Dataset:
    """10 Gaussians of 700 dimensions, sigma 1, in one flat of R^1200: after VEEGAN (Srivastava et al. 2017).

    The paper gives no centres: here they are drawn from N(0, 2^2), some 75 sigma apart, where balls that hold 98.89 % of a
    Gaussian have a radius of 28.
    """
    rng = np.random.default_rng(1)
    flat = np.linalg.qr(rng.standard_normal((1200, 700)))[0].T
    return _mixture("mixture1200", 2 * rng.standard_normal((10, 700)) @ flat, sigma=1.0, count=20_000, flat=flat)


def s_curve(seed: int = 0) -> Dataset:
    """A sheet bent like an S in three dimensions, with noise of 0.05: scikit-learn's make_s_curve. No clusters."""
    from sklearn.datasets import make_s_curve

    return _continuous("s-curve", make_s_curve(COUNT, noise=0.05, random_state=seed)[0])


def moons(seed: int = 0) -> Dataset:
    """Two half circles that reach into each other, with noise of 0.05: scikit-learn's make_moons. Two clusters, each a curve."""
    from sklearn.datasets import make_moons

    return _continuous("moons", make_moons(COUNT, noise=0.05, random_state=seed)[0])


def flower(seed: int = 0) -> Dataset:
    """Points of the plane as dense as a photograph is bright: scikit-learn's flower.jpg, a pixel being 0.01 wide. No clusters."""
    from sklearn.datasets import load_sample_image

    rng, brightness = np.random.default_rng(seed), load_sample_image("flower.jpg").sum(axis=2, dtype=np.float64)
    height, width = brightness.shape
    row, column = np.divmod(rng.choice(brightness.size, size=COUNT, p=brightness.ravel() / brightness.sum()), width)
    return _continuous("flower", 0.01 * (np.stack([column - width / 2, height / 2 - 1 - row], axis=1) + rng.uniform(size=(COUNT, 2))))


def digits() -> Dataset:
    """1,797 handwritten digits, 8 x 8, from scikit-learn (Alpaydin and Kaynak 1998); 17 grey levels spread over 0..255."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    return _labelled("digits", images, raw.target)


def stacked_digits() -> Dataset:
    """100,000 triples of digits, one in each channel: 1,000 classes, after stacked MNIST (Metz et al. 2017).

    Triples that are held out are made of held-out digits.
    """
    return _stacked("stacked-digits", digits())


def stacked_mnist(where: str | Path = DEBIAN / "mnist") -> Dataset:
    """100,000 triples of MNIST's digits, one in each channel: 1,000 classes (Metz et al. 2017). It fills 235 MB."""
    return _stacked("stacked-mnist", mnist(where))


def mnist(where: str | Path = DEBIAN / "mnist") -> Dataset:
    """70,000 handwritten digits, 28 x 28 (LeCun et al. 1998), from a directory of IDX files or an npz at `where`."""
    return _labelled("mnist", *read_mnist(Path(where)))


def fashion_mnist(where: str | Path = DEBIAN / "fashion-mnist") -> Dataset:
    """70,000 pictures of clothes, 28 x 28 (Xiao et al. 2017), in the same files as MNIST."""
    names = "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"
    return _labelled("fashion-mnist", *read_mnist(Path(where)), names)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "ring": ring,
    "grid": grid,
    "grid100": grid100,
    "mixture1200": mixture1200,
    "s-curve": s_curve,
    "moons": moons,
    "flower": flower,
    "digits": digits,
    "stacked-digits": stacked_digits,
    "mnist": mnist,
    "stacked-mnist": stacked_mnist,
    "fashion-mnist": fashion_mnist,
}
STACKED = ("stacked-digits", "stacked-mnist")  # see Dataset.stacked
ON_DISK = ("mnist", "stacked-mnist", "fashion-mnist")  # these take the place where their files lie


def read_mnist(where: Path) -> tuple[ndarray, Int64[ndarray, "n"]]:
    """Images [n, h, w, 1] and labels of both parts, training first: IDX files, gzipped or not, or x_train .. y_test of an npz."""
    if where.suffix == ".npz":
        try:
            with np.load(where, allow_pickle=False) as file:
                parts = [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test") if f"x_{part}" in file]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{where} cannot be read ({error}); an npz of x_train, y_train, x_test and y_test is expected") from None
    elif where.is_dir():
        parts = [(_idx(where, part, "images-idx3"), _idx(where, part, "labels-idx1")) for part in ("train", "t10k")]
    else:
        package = " (Debian's package dataset-fashion-mnist puts it there)" if where == DEBIAN / "fashion-mnist" else ""
        raise DataError(f"there is nothing at {where}{package}; name the directory of IDX files or the npz with --data PATH")
    for images, labels in parts:
        if images.dtype != np.uint8 or images.ndim != 3 or labels.shape != images.shape[:1]:
            forms = f"images are {images.dtype} {images.shape} and labels {labels.shape}"
            raise DataError(f"{where}: {forms}; uint8 [n, h, w] and as many labels are expected")
    if not parts:
        raise DataError(f"{where} holds no array x_train; an npz of x_train, y_train, x_test and y_test is expected")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images[..., None], labels.astype(np.int64)


def _idx(where: Path, part: str, kind: str) -> ndarray:
    """One IDX file: two zero bytes, the code of unsigned bytes, the number of axes, each axis in big-endian, the values."""
    found = sorted(path for path in where.iterdir() if path.name.startswith(f"{part}-{kind}"))
    if not found:
        raise DataError(f"{where} holds no file {part}-{kind}-ubyte or {part}-{kind}-ubyte.gz")
    try:
        raw = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
        axes = raw[3]
        shape = np.frombuffer(raw, ">u4", count=axes, offset=4)
        if raw[:3] != b"\0\0\x08":
            raise ValueError(f"it begins with {raw[:4].hex()}, no IDX file of unsigned bytes does")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{found[0]} is damaged ({error}); fetch it again") from None


def _labelled(name: str, images: ndarray, labels: ndarray, names: tuple[str, ...] = tuple("0123456789")) -> Dataset:
    order = np.random.default_rng(0).permutation(len(images))
    return Dataset(name, images[order], len(names), labels[order].astype(np.int64), names)


def _stacked(name: str, single: Dataset) -> Dataset:
    rng = np.random.default_rng(0)
    parts = (0, single.trained, 80_000), (single.trained, len(single.samples), 20_000)
    pick = np.concatenate([rng.integers(low, high, size=(count, 3)) for low, high, count in parts])
    images = np.stack([single.samples[column, :, :, 0] for column in pick.T], axis=-1)
    labels = single.labels[pick] @ np.array([100, 10, 1])
    return Dataset(name, images, 1000, labels, tuple(f"{k:03}" for k in range(1000)), stacked=True)


def _mixture(
    name: str, centres: Float64[ndarray, "k d"], sigma: float, count: int = COUNT, flat: Float64[ndarray, "r d"] | None = None
) -> Dataset:
    """`flat` has orthonormal rows, which span the Gaussians; without it they fill the space."""
    rng = np.random.default_rng(0)
    component = rng.integers(len(centres), size=count)
    noise = rng.standard_normal((count, centres.shape[1] if flat is None else len(flat)))
    samples = centres[component] + sigma * (noise if flat is None else noise @ flat)
    mixture = Mixture(centres, sigma, rank=noise.shape[1])
    return Dataset(name, samples.astype(np.float32), cells=len(centres), mixture=mixture)


def _continuous(name: str, samples: Float64[ndarray, "n d"]) -> Dataset:
    return Dataset(name, samples.astype(np.float32), cells=CELLS)
