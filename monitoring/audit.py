"""The replay audit: what was served against what the certified generator makes of the same latents. Right weights in a right
runtime give the same samples for the same latents, so a sample that is another one is proof by itself; no statistics.

`replay` asks the server for the certificate's golden samples, as any client does, by seed and offset: that works when nobody asks
for anything. `Golden` is the certified model.onnx itself, found by its hash, and runs again what replicas said they were fed.
Neither knows what a difference means, only that there is one, and whether it is still the same sample to the eye.
"""

from __future__ import annotations

import hashlib
import io
from typing import NamedTuple

import httpx
import numpy as np
import onnxruntime as ort
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from training.bundle import Bundle, BundleError, Card, Certificate, load_card, sample_classes
from training.registry import Registry

LEVELS = 1  # uint8 levels by which batches and devices may differ
FLOAT_TOLERANCE = 1e-3  # of the largest golden value; TF32 keeps ten bits, quantised weights do not come near
LEAST_SCALE = 0.01  # of the largest certified value: a sample smaller than that is held to no finer tolerance
LARGEST = float(np.finfo(np.float32).max)
NEAR = 0.25  # of the typical distance of two samples: what differs by less is the same sample, computed otherwise


def differing(golden: ndarray, answered: ndarray, least: float = 0.0) -> Bool[ndarray, "g"]:
    """Which rows of `answered` are not the golden ones; every row where shape or type differ. least: of what floats may be measured by."""
    if answered.shape != golden.shape or answered.dtype != golden.dtype:
        return np.ones(len(golden), bool)
    tolerance = LEVELS if golden.dtype == np.uint8 else FLOAT_TOLERANCE * np.abs(golden).max(initial=least)
    close = np.abs(answered.astype(np.float64) - golden.astype(np.float64)) <= tolerance  # NaN is not close
    return ~close.reshape(len(golden), -1).all(axis=1)


class Compared(NamedTuple):
    """checked: samples compared; different: those that differ; near: whether each of these is NEAR what it should be, so that
    it is the same sample, computed otherwise; worst: the largest difference of a value, LARGEST where there is none to take."""

    checked: int = 0
    different: int = 0
    near: bool = True
    worst: float = 0.0

    def __add__(self, other: Compared) -> Compared:  # type: ignore[override]
        return Compared(self.checked + other.checked, self.different + other.different, self.near and other.near, max(self.worst, other.worst))


class Comparer:
    """Compares samples of a version one by one with what they should be."""

    def __init__(self, certificate: Certificate) -> None:
        golden = certificate.golden_sample.reshape(len(certificate.golden_sample), -1).astype(np.float64)
        self._least = LEAST_SCALE * np.abs(golden).max(initial=0.0)
        self._near = NEAR * float(np.median(np.linalg.norm(golden[1:] - golden[:-1], axis=1))) if len(golden) > 1 else 0.0

    def compare(self, wanted: ndarray, served: ndarray) -> Compared:
        if wanted.shape != served.shape or wanted.dtype != served.dtype:
            return Compared(len(wanted), len(wanted), near=False, worst=LARGEST)
        found = Compared()
        for row in range(len(wanted)):
            different = bool(differing(wanted[row : row + 1], served[row : row + 1], self._least)[0])
            gap = np.abs(served[row].astype(np.float64) - wanted[row].astype(np.float64))
            worst = float(np.nan_to_num(gap.max(initial=0.0), nan=LARGEST, posinf=LARGEST))
            found += Compared(1, int(different), not different or bool(np.linalg.norm(gap) <= self._near), worst if different else 0.0)
        return found


def replay(client: httpx.Client, serving_url: str, bundle: Bundle) -> Compared:
    """Ask for every golden sample of the version, and compare.

    Raises httpx.HTTPError, and ValueError where the answer is no array of that version.
    """
    card, certificate = bundle.card, bundle.certificate
    url = f"{serving_url}/v1/models/{card.model}/versions/{card.version}/sample"
    comparer, found = Comparer(certificate), Compared()
    for seed, offset, golden in zip(certificate.golden_seed, certificate.golden_offset, certificate.golden_sample, strict=True):
        answer = client.post(url, json={"n": 1, "seed": int(seed), "offset": int(offset)}).raise_for_status()
        if (version := answer.headers.get("X-Ganwatch-Version", card.version)) != card.version:
            raise ValueError(f"{url} answered for version {version}")
        try:
            answered = np.load(io.BytesIO(answer.content), allow_pickle=False)
        except (EOFError, OSError) as error:
            raise ValueError(f"{url} answered with what is no npy: {error}") from error
        found += comparer.compare(golden[None], answered)
    return found


class Golden:
    """The certified generator of a bundle, on one CPU thread."""

    def __init__(self, bundle: Bundle, model: bytes) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._comparer, self.card, self.certificate = Comparer(bundle.certificate), bundle.card, bundle.certificate

    def samples(self, z: Float32[ndarray, "n d"], y: Int64[ndarray, "n"] | None) -> ndarray:
        return self._session.run(["samples"], {"z": z} if y is None else {"z": z, "y": y})[0]

    def compare(self, z: Float32[ndarray, "n d"], y: Int64[ndarray, "n"] | None, served: ndarray) -> Compared:
        """How `served` differs from the samples of these latents (and classes)."""
        return self._comparer.compare(self.samples(z, y), served)

    def reproduces(self) -> bool:
        """Whether it gives the certificate's golden samples."""
        found, card = Compared(), self.card
        for seed, offset, golden in zip(self.certificate.golden_seed, self.certificate.golden_offset, self.certificate.golden_sample, strict=True):
            window = {"seed": int(seed), "offset": int(offset), "count": 1}
            found += self.compare(card.latents(**window), drawn_classes(card, **window), golden[None])
        return not found.different


def drawn_classes(card: Card, *, seed: int, offset: int, count: int) -> Int64[ndarray, "count"] | None:
    """The classes that a seed draws; None where the model has none."""
    return sample_classes(np.array(card.class_shares), seed=seed, offset=offset, count=count) if card.classes else None


def certified(bundle: Bundle, registry: Registry) -> Golden | None:
    """The generator that the bundle's certificate was counted on: its own, or that of another version of the model, None where
    the registry does not hold it.

    It is known by its hash. A certificate from before hashes were noted knows it by its golden samples, and it must come with
    that very certificate.
    """
    wanted, ours = bundle.certificate.model_sha256, bundle.card
    others = (version for version in registry.versions(ours.model) if version != ours.version)
    for path in (bundle.path, *(registry.root / ours.model / version for version in others)):
        try:
            files = load_card(path).files
        except BundleError:
            continue  # deleted or damaged; another version may hold it
        if files["model.onnx"] != wanted if wanted else files["certificate.npz"] != ours.files["certificate.npz"]:
            continue
        model = (path / "model.onnx").read_bytes()
        if hashlib.sha256(model).hexdigest() != files["model.onnx"]:
            continue  # the file was altered since
        golden = Golden(bundle, model)
        if wanted or golden.reproduces():
            return golden
    return None
