"""Bundle -> samples: one ONNX session and the bundle's own latent law. Pure: which rows are asked for decides the answer.

Knows nothing of requests, batches or aliases; needs numpy, numba and onnxruntime, and never writes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from serving.latents import Latents
from serving.session import CPU, Device, DeviceError, Session, check_device
from training.bundle import Bundle, BundleError, Card, sample_classes

# Their own generators would make rows depend on what was asked before.
_RANDOM_OPS = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
_TENSOR = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}
_BATCH_S, _BATCH_ROWS = 20e-3, 4096  # of a run on a CPU: more rows at a time gain nothing and make others wait
NOTED = 4096  # latents that a window keeps until it is answered, in rows, those of others in its batches among them
BUCKETS = (1, 8, 32, 64, 128, 256)  # rows of a run where its shape matters; all are run once before a sampler is ready


@dataclass(frozen=True, eq=False)
class Window:
    """Rows offset .. offset + count of `seed`; or given latents, of which the seed draws the classes alone.

    fed: (row of the seed, latents from there on as they lay in memory when the model ran), of what has run. Parts share it.
    """

    seed: int
    offset: int
    count: int
    label: int | tuple[int, ...] | None = None  # index of a class, or of one for each row; None: drawn from the class law
    truncation: float = 1.0
    z: Float32[ndarray, "count d"] | None = None
    fed: list[tuple[int, Float32[ndarray, "_ d"]]] = field(default_factory=list, compare=False, repr=False)

    def part(self, start: int, count: int) -> Window:
        label = self.label[start : start + count] if isinstance(self.label, tuple) else self.label
        z = None if self.z is None else self.z[start : start + count]
        return Window(self.seed, self.offset + start, count, label, self.truncation, z, self.fed)

    def latents(self, card: Card) -> Float32[ndarray, "count d"]:
        if self.z is not None:
            return self.z
        return card.latents(seed=self.seed, offset=self.offset, count=self.count, truncation=self.truncation)

    def classes(self, card: Card) -> Int64[ndarray, "count"]:
        if self.label is None:
            return sample_classes(np.asarray(card.class_shares), seed=self.seed, offset=self.offset, count=self.count)
        return np.full(self.count, self.label, np.int64)


class Sampler:
    """The generator of one verified bundle.

    `device`: "cuda" needs a working CUDA session, "auto" takes CUDA where a device answers, else the CPU.
    `threads`: intra-op threads of the session. `deterministic`: every run has the same shape, so that a row's bits depend on
    nothing else that ran with it, on any device; costs the time of a full run even for one row. `tensorrt`: directory for the
    engines that TensorRT builds; None: CUDA's own kernels.
    Raises BundleError where the model is not what its card says, DeviceError where CUDA was asked for and is absent.
    """

    def __init__(
        self, bundle: Bundle, device: Device = "auto", threads: int = 1, deterministic: bool = False, tensorrt: Path | None = None
    ) -> None:
        check_device(device)
        self.card, self._latents = bundle.card, Latents(bundle.card.latent)
        self.sample_bytes = int(np.prod(self.card.sample_shape)) * np.dtype(self.card.sample_dtype).itemsize
        model = bundle.model_path.read_bytes()
        # The op type is the only text under field 4 (tag 0x22) of an ONNX node: its bytes show, also in subgraphs and functions.
        for op in _RANDOM_OPS:
            if b"\x22" + bytes([len(op)]) + op.encode() in model:
                raise BundleError(f"{bundle.model_path}: holds the random op {op}; seeds would mean nothing, feed all noise as z")
        try:
            self._session = Session(model, device, threads, tensorrt, BUCKETS[-1])
        except DeviceError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise BundleError(f"{bundle.model_path}: onnxruntime refuses it: {error}") from error
        self.provider, self.lost_graphs = self._session.provider, self._session.lost_graphs
        self._check_signature(bundle)
        # A GPU chooses its algorithms for each shape anew; a CPU gains nothing from rows that nobody asked for.
        self.buckets = BUCKETS[-1:] if deterministic else BUCKETS if self.provider != CPU else ()
        if self.provider != CPU:
            self._session.bind(self.buckets, self.card.sample_shape, self.card.sample_dtype)
        self._times = {rows: self._timed(rows) for rows in self.buckets or BUCKETS}  # seconds
        self._pace = min(seconds / rows for rows, seconds in self._times.items())
        self.batch = self.buckets[-1] if self.buckets else max(BUCKETS[2], min(int(_BATCH_S / self._pace), _BATCH_ROWS))  # rows of a run at most

    def sample(self, windows: Sequence[Window]) -> ndarray:
        """The rows of all windows, one after the other: uint8 [n, h, w, c] or float32 [n, d]."""
        card = self.card
        if any(window.z is not None for window in windows):
            z = np.concatenate([window.latents(card) for window in windows])
        else:
            z = self._latents.sample_windows([(window.seed, window.offset, window.count, window.truncation) for window in windows])
        start = 0
        for window in windows:
            if not window.fed or sum(len(rows.base) for _, rows in window.fed) < NOTED:  # a view of a batch keeps all of it
                window.fed.append((window.offset, z[start : start + window.count]))
            start += window.count
        return self.run(z, np.concatenate([window.classes(card) for window in windows]) if card.classes else None)

    def seconds(self, rows: int) -> float:
        """What it takes to draw so many rows, as it was timed beforehand: with buckets, that of the runs that they fill."""
        if not self.buckets:
            return self._pace * rows
        runs, rest = divmod(rows, self.buckets[-1])
        return runs * self._times[self.buckets[-1]] + (self._times[self._bucket(rest)] if rest else 0.0)

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def _timed(self, rows: int) -> float:
        started = time.perf_counter()
        self.sample([Window(seed=0, offset=0, count=rows)])
        return time.perf_counter() - started

    def run(self, z: Float32[ndarray, "n d"], y: Int64[ndarray, "n"] | None = None) -> ndarray:
        """The samples of given latents (and classes), in runs of the buckets' sizes where there are buckets."""
        if not self.buckets:
            return self._run(z, y)
        step = self.buckets[-1]
        runs = [self._padded(z[i : i + step], None if y is None else y[i : i + step]) for i in range(0, len(z), step)]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    def _padded(self, z: Float32[ndarray, "n d"], y: Int64[ndarray, "n"] | None) -> ndarray:
        n = len(z)
        more = self._bucket(n) - n
        return self._run(np.pad(z, ((0, more), (0, 0))), None if y is None else np.pad(y, (0, more)))[:n]

    def _run(self, z: Float32[ndarray, "n d"], y: Int64[ndarray, "n"] | None) -> ndarray:
        samples = self._session.run({"z": z} if y is None else {"z": z, "y": y})
        if samples.shape != (len(z), *self.card.sample_shape):
            expected = self.card.sample_shape
            raise BundleError(f"{self.card.model} {self.card.version} gave shape {samples.shape} for {len(z)} rows of {expected}")
        return samples

    def _check_signature(self, bundle: Bundle) -> None:
        card = self.card
        inputs, outputs = self._session.inputs, self._session.outputs
        expected = {"z": ("tensor(float)", 2, card.latent.dim)} | ({"y": ("tensor(int64)", 1, None)} if card.classes else {})
        if inputs != expected:
            raise BundleError(f"{bundle.model_path}: inputs are {inputs}; the card asks for {expected} (type, rank, width)")
        if outputs != {"samples": _TENSOR.get(card.sample_dtype)}:
            raise BundleError(f"{bundle.model_path}: outputs are {outputs}; the card asks for samples of {card.sample_dtype}")
        if len(card.class_shares) != len(card.classes):
            raise BundleError(
                f"{bundle.path / 'card.json'}: {len(card.class_shares)} class shares for {len(card.classes)} classes"
            )
