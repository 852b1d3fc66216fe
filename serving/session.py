"""One ONNX graph on the provider that was asked for: opened, checked, run.

A GPU gets runs of few shapes in memory of fixed addresses (IO binding). Each shape has two sets of buffers, so that one run's
latents and samples are copied while another computes; and where all of the graph lies on the GPU, each set is a CUDA graph,
launched as a whole. A CPU runs from and into ordinary arrays: bound to buffers that are then copied it was as fast, bound to
fresh arrays slower (8 and 24 us against 10 us for one row of the light model, the same from 64 rows on).
Knows nothing of latents, classes or bundles.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
from numpy import ndarray
from onnxruntime import OrtValue

Device = Literal["auto", "cpu", "cuda"]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# An exhaustive search of algorithms would tune every shape anew, for seconds each; TF32 would cost more than one pixel level.
_CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
_SETS = 2  # of buffers for each shape

logger = logging.getLogger(__name__)


class DeviceError(RuntimeError):
    """A device was asked for that does not compute here."""


def cuda_devices() -> int:
    """How many CUDA devices the driver offers. onnxruntime lists its CUDA provider also where there are none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def check_device(device: str) -> None:
    """Raise ValueError where `device` is no device, DeviceError where it is "cuda" and there is none."""
    if device not in get_args(Device):
        raise ValueError(f"device is {device!r}; it must be one of {', '.join(get_args(Device))}")
    if device == "cuda" and not cuda_devices():
        raise DeviceError("device is 'cuda', but the driver offers no CUDA device; use --device cpu or auto")


@dataclass(frozen=True)
class _Buffers:
    """Fixed memory for runs of one shape."""

    inputs: dict[str, OrtValue]
    output: OrtValue
    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions


class Session:
    """`model`: the bytes of the graph; weights in a second file, which no hash covers, cannot be found.

    `threads`: intra-op, on a CPU. `tensorrt`: directory for its engines; None: CUDA's own kernels.
    Raises DeviceError where CUDA or TensorRT was asked for and does not compute, and what onnxruntime raises for a bad graph.
    """

    def __init__(self, model: bytes, device: Device = "auto", threads: int = 1, tensorrt: Path | None = None, most_rows: int = 256) -> None:
        check_device(device)
        self.has_graphs = False  # whether runs are launched as CUDA graphs
        self.lost_graphs = False  # whether they would be, but for a node that CUDA cannot compute
        if device == "cpu" or not cuda_devices():
            self._session = _open(model, [CPU], threads)
        else:
            onnxruntime.preload_dlls()
            self._session = self._open_cuda(model, threads, tensorrt, most_rows)
        self.provider: str = self._session.get_providers()[0]
        if device == "cuda" and self.provider not in (CUDA, TENSORRT):
            raise DeviceError(f"device is 'cuda', but the session runs on {self.provider}; install the CUDA libraries or use --device auto")
        if tensorrt is not None and self.provider != TENSORRT:
            raise DeviceError(f"TensorRT was asked for, but the session runs on {self.provider}; install TensorRT's libraries or leave it out")
        self.inputs = {i.name: (i.type, len(i.shape), i.shape[-1] if len(i.shape) == 2 else None) for i in self._session.get_inputs()}
        self.outputs = {o.name: o.type for o in self._session.get_outputs()}
        self._buffers: dict[int, SimpleQueue[_Buffers]] = {}
        self._computing = threading.Lock()  # a CUDA graph must not be launched twice at once; copies go on beside it

    def _open_cuda(self, model: bytes, threads: int, tensorrt: Path | None, most_rows: int) -> onnxruntime.InferenceSession:
        if tensorrt is not None:
            probe = _open(model, [CPU], threads)  # to know the inputs' widths
            providers = [(TENSORRT, _tensorrt_options(probe, tensorrt, most_rows)), (CUDA, _CUDA_OPTIONS), CPU]
            return _open(model, providers, threads)
        try:
            session = _open(model, [(CUDA, _CUDA_OPTIONS | {"enable_cuda_graph": "1"}), CPU], threads)
            self.has_graphs = session.get_providers()[0] == CUDA
            return session
        except Exception as error:  # onnxruntime refuses where some node has no CUDA kernel
            logger.warning("no CUDA graphs for this model: %s", error)
            self.lost_graphs = True
            return _open(model, [(CUDA, _CUDA_OPTIONS), CPU], threads)

    def bind(self, shapes: Sequence[int], row_shape: tuple[int, ...], dtype: str, memory: str = "cuda") -> None:
        """From now on runs of so many rows go through buffers in `memory`; each is run once, so that none is met unprepared.

        `row_shape`, `dtype`: of a sample.
        """
        for rows in shapes:
            queue: SimpleQueue[_Buffers] = SimpleQueue()
            for _ in range(_SETS):
                queue.put(self._allocate(rows, row_shape, dtype, memory, len(self._buffers) * _SETS + queue.qsize()))
            self._buffers[rows] = queue
            zeros = {name: np.zeros((rows, *([width] if width else [])), _NUMPY[kind]) for name, (kind, _, width) in self.inputs.items()}
            for _ in range(_SETS):
                self.run(zeros)

    def _allocate(self, rows: int, row_shape: tuple[int, ...], dtype: str, memory: str, graph: int) -> _Buffers:
        new = OrtValue.ortvalue_from_shape_and_type
        inputs = {name: new([rows, *([width] if width else [])], _NUMPY[kind], memory) for name, (kind, _, width) in self.inputs.items()}
        output, binding, options = new([rows, *row_shape], np.dtype(dtype).type, memory), self._session.io_binding(), onnxruntime.RunOptions()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("samples", output)
        if self.has_graphs:
            options.add_run_config_entry("gpu_graph_id", str(graph + 1))
        return _Buffers(inputs, output, binding, options)

    def run(self, feed: dict[str, ndarray]) -> ndarray:
        """The graph's `samples` for `feed`, whose arrays all have as many rows. May be called by several threads at once."""
        queue = self._buffers.get(len(next(iter(feed.values()))))
        if queue is None:
            return self._session.run(["samples"], feed)[0]
        buffers = queue.get()
        try:
            for name, value in feed.items():
                buffers.inputs[name].update_inplace(value)
            with self._computing:
                self._session.run_with_iobinding(buffers.binding, buffers.options)
            return np.array(buffers.output.numpy())  # a copy: the next run writes there
        finally:
            queue.put(buffers)


_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def _open(model: bytes, providers: list[Any], threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=providers)


def _tensorrt_options(probe: onnxruntime.InferenceSession, cache: Path, most_rows: int) -> dict[str, str]:
    """One engine for all shapes from 1 to `most_rows`: a shape outside its profile would rebuild it, for a minute, under traffic."""

    def profile(rows: int) -> str:
        return ",".join(f"{i.name}:{'x'.join(str(d) for d in (rows, *i.shape[1:]))}" for i in probe.get_inputs())

    cache.mkdir(parents=True, exist_ok=True)
    shapes = {f"trt_profile_{name}_shapes": profile(rows) for name, rows in (("min", 1), ("opt", most_rows), ("max", most_rows))}
    kept = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"} | {f"trt_{what}_cache_path": str(cache) for what in ("engine", "timing")}
    return shapes | kept
