"""CONTRACT. A bundle is one immutable directory that holds a generator and all that is needed to serve and to watch it.

    model.onnx       z [n, d] (and y [n]) -> samples, in the form in which they are served
    features.onnx    samples -> features, scores, mode: how the monitor looks at a sample
    reference.npz    statistics of the real data
    certificate.npz  the certified generator's own law, counted on fresh samples
    card.json        what all of it means, and the hash of every file; written last, so its presence means complete

This file knows neither torch, onnxruntime nor Ray: whoever reads a bundle needs numpy and scipy, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, UInt64
from numpy import ndarray
from scipy.special import betaincinv, ndtri

SCHEMA = 1
FILES = ("model.onnx", "features.onnx", "reference.npz", "certificate.npz")
SEED_LIMIT = 2**63  # seeds, offsets and offset + count lie in [0, 2^63)
MODE_FLOOR = 0.25  # of a mode's real share: what is good enough, to the gate and to the monitor
OFF_MANIFOLD_EXCESS = 1 / 3  # ... and how much more of what is generated than of the real data may lie off the manifold
AMBIGUITY = "ambiguity"  # the score that is large between classes
NEAREST_TRAIN = "nearest_train"  # the score that is 0 for a copy of a training sample
NEARER_TRAIN = "nearer_train"  # ... that is 0 for one of a training, 1 for one of a held-out sample, as near to either at 1/2
DUPLICATE_BLOCK = 32  # samples looked at together when searching for exact repeats

# Each use of a seed reads its own Philox key, so that classes never depend on how many words a latent takes.
_LATENT_STREAM, _CLASS_STREAM, _ORDER_STREAM = 0, 1, 2


class BundleError(ValueError):
    """A bundle that is incomplete, altered or of another schema. The text says which file and what to do."""


def philox_words(seed: int, stream: int, offset: int, rows: int, words: int) -> UInt64[ndarray, "rows words"]:
    """Row i of a seed's stream: `words` raw Philox4x64-10 words that depend on (seed, stream, i) alone.

    A row starts at a counter of its own, ceil(words / 4) counters apart, so any window is read without what precedes it.
    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); numpy's raw Philox words are frozen.
    """
    blocks = -(-words // 4)
    generator = np.random.Philox(key=(stream << 64) | seed, counter=offset * blocks)
    return generator.random_raw(rows * blocks * 4).reshape(rows, blocks * 4)[:, :words]


def _uniform(words: UInt64[ndarray, "..."]) -> Float64[ndarray, "..."]:
    """The upper 52 bits of each word as the midpoint of a cell of (0, 1): never 0, never 1 (53 bits would round up to 1)."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def check_window(seed: int, offset: int, count: int) -> None:
    """Raise ValueError where (seed, offset, count) is not a window of a seed's rows."""
    for name, value in (("seed", seed), ("offset", offset), ("count", count)):
        if not 0 <= value < SEED_LIMIT:
            raise ValueError(f"{name} is {value}; it must lie in [0, 2^63)")
    if offset + count > SEED_LIMIT:
        raise ValueError(f"offset + count is {offset + count}; it must not exceed 2^63")


@dataclass(frozen=True)
class SignGaussian:
    """The latent law `philox-icdf-1`: `signs` coordinates of +-1, then `normals` of N(0, scale^2).

    Row i of a seed is one row for ever, bitwise, whatever window it is read in.
    """

    signs: int
    normals: int
    scale: float = 1.0
    algorithm: str = "philox-icdf-1"

    def __post_init__(self) -> None:
        if self.algorithm != "philox-icdf-1":
            raise BundleError(f"latent algorithm is {self.algorithm!r}; this version knows only 'philox-icdf-1'")
        if self.signs < 0 or self.normals < 0 or self.dim == 0:
            raise BundleError(f"latent has {self.signs} signs and {self.normals} normals; it needs at least one coordinate")

    @classmethod
    def read(cls, words: str) -> SignGaussian:
        """`normal:128`, `normal:64x0.5` (its standard deviation), `signs:16` or `signs:16+normal:48x0.5`. Raises BundleError."""
        found = re.fullmatch(r"(?:signs:([1-9]\d{0,5}))?(?:(?:^|(?<=\d)\+)normal:([1-9]\d{0,5})(?:x(\d*\.?\d+))?)?", words)
        if not words or not found or not 0 < np.float32(found[3] or 1) < np.inf:
            raise BundleError(f"{words!r}; normal:128, normal:64x0.5 (a standard deviation above 0), signs:16 or signs:16+normal:48 is expected")
        return cls(int(found[1] or 0), int(found[2] or 0), float(found[3] or 1))

    @property
    def dim(self) -> int:
        return self.signs + self.normals

    def sample(self, *, seed: int, offset: int = 0, count: int, truncation: float = 1.0) -> Float32[ndarray, "count d"]:
        """Rows offset .. offset + count of `seed`, float32 [count, dim].

        `truncation` t in (0, 1] keeps the central t of the Gaussian's mass, by conditioning (|z| <= scale * Phi^-1((1 + t) / 2));
        signs are untouched, and t = 1 is the law itself.
        """
        return self.sample_windows([(seed, offset, count, truncation)])

    def sample_windows(self, windows: Sequence[tuple[int, int, int, float]]) -> Float32[ndarray, "n d"]:
        """`sample` of several (seed, offset, count, truncation), one after the other; costs little more than one of as many rows."""
        sign_words = -(-self.signs // 64)
        parts = []
        for seed, offset, count, truncation in windows:
            check_window(seed, offset, count)
            if not 0.0 < truncation <= 1.0:
                raise ValueError(f"truncation is {truncation}; it must lie in (0, 1]")
            parts.append(philox_words(seed, _LATENT_STREAM, offset, count, self.normals + sign_words))
        words = parts[0] if len(parts) == 1 else np.concatenate(parts)
        n = len(words)
        z = np.empty((n, self.dim), np.float32)
        octets = np.ascontiguousarray(words[:, self.normals :]).astype("<u8").view(np.uint8).reshape(n, 8 * sign_words)
        bits = np.unpackbits(octets, axis=1, bitorder="little")
        z[:, : self.signs] = bits[:, : self.signs].astype(np.float32) * 2 - 1
        u = _uniform(words[:, : self.normals])
        if any(truncation < 1.0 for *_, truncation in windows):  # where it is 1, this changes no bit
            kept = np.repeat([truncation for *_, truncation in windows], [count for _, _, count, _ in windows])[:, None]
            u = (1.0 - kept) / 2 + kept * u
        z[:, self.signs :] = ndtri(u) * self.scale
        return z

    def interpolate(self, *, seeds: tuple[int, int], offset: int = 0, count: int) -> Float32[ndarray, "count d"]:
        """A path of `count` rows from row `offset` of one seed to row `offset` of another: both ends are those rows, bitwise.

        Gaussian part: cos(t) a + sin(t) b with t from 0 to pi/2, the great circle on which two independent draws meet (after
        White, arXiv:1609.04468). Signs: those that differ flip one by one, evenly along the path, in an order that the two
        seeds draw; no sign is ever scaled. Each row alone has exactly this law where the seeds differ; equal seeds give one row
        `count` times.
        """
        first, last = (self.sample(seed=seed, offset=offset, count=1)[0].astype(np.float64) for seed in seeds)
        if seeds[0] == seeds[1]:
            return np.repeat(first[None].astype(np.float32), count, axis=0)
        steps = np.arange(count)[:, None]
        end = max(count - 1, 1)
        z = np.sin(np.pi / 2 * (end - steps) / end) * first + np.sin(np.pi / 2 * steps / end) * last
        order = np.bitwise_xor(*(philox_words(seed, _ORDER_STREAM, offset, 1, max(self.signs, 1))[0] for seed in seeds))[: self.signs]
        differing = np.flatnonzero(first[: self.signs] != last[: self.signs])
        rank = np.empty(len(differing), np.int64)
        rank[np.argsort(order[differing], kind="stable")] = np.arange(len(differing))
        flips = (2 * steps * len(differing) + end) // (2 * end)  # how many have flipped by then, rounded
        z[:, : self.signs] = first[: self.signs]
        z[:, differing] = np.where(rank < flips, last[differing], first[differing])
        return z.astype(np.float32)


def sample_classes(shares: Float64[ndarray, "c"], *, seed: int, offset: int = 0, count: int) -> Int64[ndarray, "count"]:
    """The classes of rows offset .. offset + count of `seed`, drawn from the class law `shares` [c], which sums to 1."""
    check_window(seed, offset, count)
    u = _uniform(philox_words(seed, _CLASS_STREAM, offset, count, 1)[:, 0])
    return np.minimum(np.searchsorted(np.cumsum(shares), u, side="right"), len(shares) - 1).astype(np.int64)


@dataclass(frozen=True)
class Card:
    """What a bundle is. Everything a server or a monitor must know before it opens another file."""

    model: str
    version: str
    created: str  # ISO 8601, UTC
    files: dict[str, str]  # name -> sha256, one entry for each of FILES
    latent: SignGaussian
    sample_shape: tuple[int, ...]  # [h, w, c] for images, [d] for vectors
    sample_dtype: str  # uint8 for images, float32 for vectors
    modes: tuple[str, ...]  # names of the K modes, in the order of features.onnx
    scores: tuple[str, ...]  # names of the scores whose tails are certified; the first one defines off-manifold
    classes: tuple[str, ...] = ()  # empty: the model is unconditional and has no input y
    class_shares: tuple[float, ...] = ()  # the law of y where a request names none
    training: dict[str, Any] = field(default_factory=dict)  # {"config": ..., "metrics": ...}
    certified: dict[str, Any] = field(default_factory=dict)  # figures at certification, for people and for the gate
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that made it
    injected_from: str | None = None  # a deliberately faulty version: where it came from
    fault: str | None = None  # ... and what was done to it
    forced: str | None = None  # why `publish --force` was needed, in the gate's words
    schema: int = SCHEMA

    @property
    def is_image(self) -> bool:
        return self.sample_dtype == "uint8"

    @property
    def dataset(self) -> str | None:
        """The real data that its reference was made of, as --dataset names them; None where nobody wrote that down."""
        if "recertified" in self.training:
            return self.training["recertified"]["data"]
        return self.training.get("config", self.training).get("dataset") or self.training.get("reference")

    def latents(self, *, seed: int, offset: int = 0, count: int, truncation: float = 1.0) -> Float32[ndarray, "count d"]:
        return self.latent.sample(seed=seed, offset=offset, count=count, truncation=truncation)


@dataclass(frozen=True)
class Reference:
    """The real data in the eyes of features.onnx. K modes plus the off-manifold cell, which comes last."""

    count: int
    cell_share: Float64[ndarray, "k1"]  # [K + 1], sums to 1
    feature_mean: Float64[ndarray, "p"]
    feature_cov: Float64[ndarray, "p p"]
    train_points: Float32[ndarray, "a p"]  # empty with --no-reference-points
    held_out_points: Float32[ndarray, "b p"]


@dataclass(frozen=True)
class Certificate:
    """The certified generator's own law, as counts over fresh samples, so that every bound can be derived again.

    Tail thresholds were set on other samples than the `count` on which their hits were counted: that makes the hits binomial.
    """

    count: int
    delta: float  # chance that any of the bounds derived from this certificate is wrong
    cell_count: Int64[ndarray, "k1"]  # [K + 1], off-manifold last
    levels: Float64[ndarray, "l"]  # nominal tail levels, 2^-1 .. 2^-16
    upper_threshold: Float64[ndarray, "s l"]
    upper_hits: Int64[ndarray, "s l"]  # samples with score > upper_threshold
    lower_threshold: Float64[ndarray, "s l"]
    lower_hits: Int64[ndarray, "s l"]  # samples with score < lower_threshold
    duplicate_blocks: int  # blocks of DUPLICATE_BLOCK consecutive samples looked at
    duplicate_hits: int  # ... of which held an exact repeat
    feature_mean: Float64[ndarray, "p"]
    feature_cov: Float64[ndarray, "p p"]
    golden_seed: Int64[ndarray, "g"]
    golden_offset: Int64[ndarray, "g"]
    golden_sample: ndarray  # [g, *sample_shape]
    # What `white` does was set on other samples than the `count` over which its moments were taken. Empty: not certified.
    white_centre: Float64[ndarray, "c"] = field(default_factory=lambda: np.zeros(0))
    white_map: Float64[ndarray, "c w"] = field(default_factory=lambda: np.zeros((0, 0)))
    white_radius: float = 0.0
    white_mean: Float64[ndarray, "w"] = field(default_factory=lambda: np.zeros(0))  # of y = white(x)
    white_moment: Float64[ndarray, "w w"] = field(default_factory=lambda: np.zeros((0, 0)))  # mean of y y^T
    class_cell_count: Int64[ndarray, "classes cells"] = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # cell_count of each class
    model_sha256: str = ""  # of the model.onnx that was counted; a faulty version keeps its healthy one's certificate. Empty: not noted

    def white(self, features: Float[ndarray, "n p"]) -> Float64[ndarray, "n w"]:
        """Features whitened and clipped: no row is longer than white_radius."""
        return whiten(features, self.white_centre, self.white_map, self.white_radius)

    @property
    def bounds(self) -> int:
        """How many bounds share delta: both sides of every tail on both sides, both sides of every mode's part of the on-manifold
        samples, given each class too, the upper side of every cell's share and of the off-manifold one given each class, that of what is
        no number, given each class too, the duplicates, three of the whitened moments. The count is never too low."""
        return 4 * self.upper_hits.size + 3 * self.cell_count.size + 2 * self.class_cell_count.size + 1 + 3

    def upper(self, hits: Int64[ndarray, "..."] | int, count: int) -> Float64[ndarray, "..."]:
        return clopper_pearson(hits, count, self.delta / self.bounds)[1]

    def lower(self, hits: Int64[ndarray, "..."] | int, count: int) -> Float64[ndarray, "..."]:
        return clopper_pearson(hits, count, self.delta / self.bounds)[0]


def clopper_pearson(hits: Any, count: int, delta: float) -> tuple[Float64[ndarray, "..."], Float64[ndarray, "..."]]:
    """One-sided exact binomial bounds, each wrong with probability <= delta (Clopper and Pearson, Biometrika 1934)."""
    hits = np.asarray(hits, np.float64)
    with np.errstate(invalid="ignore"):
        low = np.where(hits > 0, betaincinv(np.maximum(hits, 1), count - hits + 1, delta), 0.0)
        high = np.where(hits < count, betaincinv(hits + 1, np.maximum(count - hits, 1), 1 - delta), 1.0)
    return low, high


def whitening(features: Float[ndarray, "n p"]) -> tuple[Float64[ndarray, "p"], Float64[ndarray, "p w"], float]:
    """Centre, map and radius such that (x - centre) @ map has unit covariance here, and one sample in a thousand is longer.

    Directions in which the features hardly vary are left out, so w <= p.
    """
    x = features.astype(np.float64)
    centre = x.mean(axis=0)
    x -= centre
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    kept = values > max(1e-9 * values[-1], 1e-300)
    scale = vectors[:, kept] / np.sqrt(values[kept])
    radius = np.quantile(np.linalg.norm(x @ scale, axis=1), 0.999, method="higher") if kept.any() else 0.0
    return centre, scale, float(radius)


def whiten(x: Float[ndarray, "n p"], centre: Float64[ndarray, "p"], scale: Float64[ndarray, "p w"], radius: float) -> Float64[ndarray, "n w"]:
    y = (x - centre) @ scale
    length = np.sqrt(np.einsum("nw,nw->n", y, y))
    return y * (radius / np.maximum(length, radius))[:, None] if radius > 0 else y


@dataclass(frozen=True)
class Bundle:
    """A verified directory. Arrays are read when first asked for."""

    path: Path
    card: Card

    @property
    def model_path(self) -> Path:
        return self.path / "model.onnx"

    @property
    def features_path(self) -> Path:
        return self.path / "features.onnx"

    @cached_property
    def reference(self) -> Reference:
        return read_arrays(Reference, self.path / "reference.npz")

    @cached_property
    def certificate(self) -> Certificate:
        return read_arrays(Certificate, self.path / "certificate.npz")


def load_card(path: str | os.PathLike[str]) -> Card:
    """The card of a bundle directory. Raises BundleError where there is none or it is of another schema."""
    card = Path(path) / "card.json"
    try:
        raw = json.loads(card.read_text())
    except FileNotFoundError:
        raise BundleError(f"{path}: no card.json, so this is no complete bundle; publish it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{card}: not JSON ({error}); the bundle was altered, publish it again") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise BundleError(f"{card}: schema is {found!r}, this version reads schema {SCHEMA}")
    names = {f.name for f in fields(Card)}
    if unknown := set(raw) - names:
        raise BundleError(f"{card}: unknown fields {sorted(unknown)}")
    try:
        raw["latent"] = SignGaussian(**raw["latent"])
        for name in ("sample_shape", "modes", "scores", "classes", "class_shares"):
            raw[name] = tuple(raw.get(name, ()))
        return Card(**raw)
    except (TypeError, KeyError) as error:
        raise BundleError(f"{card}: incomplete card ({error})") from None


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The bundle at `path`, every hash checked. Raises BundleError naming the missing, truncated or altered file."""
    path = Path(path)
    card = load_card(path)
    for name in FILES:
        if name not in card.files:
            raise BundleError(f"{path}: the card lists no hash for {name}")
        if not (path / name).is_file():
            raise BundleError(f"{path / name}: missing; publish the version again or roll back")
        if (found := sha256(path / name)) != card.files[name]:
            raise BundleError(f"{path / name}: sha256 is {found[:12]}..., the card says {card.files[name][:12]}...; the file was truncated or altered")
    return Bundle(path, card)


def write_card(path: str | os.PathLike[str], card: Card) -> Card:
    """Hash the files at `path` and write the card, last and in one step. Returns the card with its hashes."""
    path = Path(path)
    card = Card(**{**{f.name: getattr(card, f.name) for f in fields(Card)}, "files": {name: sha256(path / name) for name in FILES}})
    staged = path / "card.json.partial"
    with open(staged, "w") as file:
        json.dump(asdict(card), file, indent=2, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path / "card.json")
    return card


def write_arrays(path: Path, arrays: Reference | Certificate) -> None:
    np.savez(path, allow_pickle=False, **{f.name: getattr(arrays, f.name) for f in fields(arrays)})


def read_arrays(kind: type, path: Path) -> Any:
    """The Reference or the Certificate in the file at `path`. Raises BundleError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            optional = {f.name for f in fields(kind) if f.default_factory is not MISSING or f.default is not MISSING}
            values = {f.name: data[f.name] for f in fields(kind) if f.name in data or f.name not in optional}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: {error}") from None
    return kind(**{name: value.item() if value.ndim == 0 else value for name, value in values.items()})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
