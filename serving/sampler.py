"""Bundle -> samples: one ONNX session and the bundle's own latent law. Pure: which rows are asked for decides the answer.

Knows nothing of requests, batches or aliases; needs numpy and onnxruntime only, and never writes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
from jaxtyping import Float32, Int64
from numpy import ndarray

from training.bundle import Bundle, BundleError, sample_classes

Device = Literal["auto", "cpu", "cuda"]

# Their own generators would make rows depend on what was asked before.
_RANDOM_OPS = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
_TENSOR = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}
_WARM_ROWS = (1, 64)


@dataclass(frozen=True)
class Window:
    """Rows offset .. offset + count of `seed`."""

    seed: int
    offset: int
    count: int
    label: int | None = None  # index of a class; None: drawn from the class law
    truncation: float = 1.0

    def part(self, start: int, count: int) -> Window:
        return replace(self, offset=self.offset + start, count=count)


class Sampler:
    """The generator of one verified bundle.

    `device`: "cuda" needs a working CUDA session, "auto" takes CUDA where a device answers, else the CPU.
    `threads`: intra-op threads of the session.
    Raises BundleError where the model is not what its card says, RuntimeError where CUDA was asked for and is absent.
    """

    def __init__(self, bundle: Bundle, device: Device = "auto", threads: int = 1) -> None:
        check_device(device)
        self.card = bundle.card
        model = bundle.model_path.read_bytes()
        # The op type is the only text under field 4 (tag 0x22) of an ONNX node: its bytes show, also in subgraphs and functions.
        for op in _RANDOM_OPS:
            if b"\x22" + bytes([len(op)]) + op.encode() in model:
                raise BundleError(f"{bundle.model_path}: holds the random op {op}; seeds would mean nothing, feed all noise as z")
        self._session = _open_session(model, bundle, device, threads)
        self.provider: str = self._session.get_providers()[0]
        self._check_signature(bundle)
        for rows in _WARM_ROWS:
            self.sample([Window(seed=0, offset=0, count=rows)])

    def sample(self, windows: Sequence[Window]) -> ndarray:
        """The rows of all windows, one after the other: uint8 [n, h, w, c] or float32 [n, d]. One run of the model."""
        card = self.card
        z = [card.latents(seed=w.seed, offset=w.offset, count=w.count, truncation=w.truncation) for w in windows]
        y = np.concatenate([self._classes(w) for w in windows]) if card.classes else None
        return self.run(np.concatenate(z), y)

    def run(self, z: Float32[ndarray, "n d"], y: Int64[ndarray, "n"] | None = None) -> ndarray:
        """The samples of given latents (and classes)."""
        samples = self._session.run(["samples"], {"z": z} if y is None else {"z": z, "y": y})[0]
        if samples.shape != (len(z), *self.card.sample_shape):
            expected = self.card.sample_shape
            raise BundleError(f"{self.card.model} {self.card.version} gave shape {samples.shape} for {len(z)} rows of {expected}")
        return samples

    def _classes(self, window: Window) -> Int64[ndarray, "n"]:
        if window.label is None:
            return sample_classes(np.asarray(self.card.class_shares), seed=window.seed, offset=window.offset, count=window.count)
        return np.full(window.count, window.label, np.int64)

    def _check_signature(self, bundle: Bundle) -> None:
        card = self.card
        inputs = {i.name: (i.type, len(i.shape), i.shape[-1] if len(i.shape) == 2 else None) for i in self._session.get_inputs()}
        outputs = {o.name: o.type for o in self._session.get_outputs()}
        expected = {"z": ("tensor(float)", 2, card.latent.dim)} | ({"y": ("tensor(int64)", 1, None)} if card.classes else {})
        if inputs != expected:
            raise BundleError(f"{bundle.model_path}: inputs are {inputs}; the card asks for {expected} (type, rank, width)")
        if outputs != {"samples": _TENSOR.get(card.sample_dtype)}:
            raise BundleError(f"{bundle.model_path}: outputs are {outputs}; the card asks for samples of {card.sample_dtype}")
        if len(card.class_shares) != len(card.classes):
            raise BundleError(
                f"{bundle.path / 'card.json'}: {len(card.class_shares)} class shares for {len(card.classes)} classes"
            )


def cuda_devices() -> int:
    """How many CUDA devices the driver offers. onnxruntime lists its CUDA provider also where there are none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def check_device(device: str) -> None:
    """Raise ValueError where `device` is no device, RuntimeError where it is "cuda" and there is none."""
    if device not in get_args(Device):
        raise ValueError(f"device is {device!r}; it must be one of {', '.join(get_args(Device))}")
    if device == "cuda" and not cuda_devices():
        raise RuntimeError("device is 'cuda', but the driver offers no CUDA device; use --device cpu or auto")


def _open_session(model: bytes, bundle: Bundle, device: Device, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu" and cuda_devices():
        onnxruntime.preload_dlls()
        # An exhaustive search would tune every batch size anew, for seconds each.
        providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
    try:
        # From bytes: weights in a second file, which no hash covers, cannot be found.
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise BundleError(f"{bundle.model_path}: onnxruntime refuses it: {error}") from error
    if device == "cuda" and (found := session.get_providers()[0]) != "CUDAExecutionProvider":
        raise RuntimeError(f"device is 'cuda', but the session runs on {found}; install the CUDA libraries or use --device auto")
    return session
