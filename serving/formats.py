"""Samples -> bytes by media type, and which media type an Accept header asks for. A new format is one function and one line;
one that can be sent piece by piece is a class of three methods: head, rows, tail.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from serving.errors import NotAcceptable, SamplingFailed

_JSON_ROWS = 256  # encoded at a time, so that a big answer leaves other threads room between two pieces
_IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def json_text(samples: ndarray, about: dict[str, Any]) -> bytes:
    """`about` and the samples as nested lists; float32 values come back exactly."""
    pieces = (samples[i : i + _JSON_ROWS] for i in range(0, len(samples), _JSON_ROWS))
    try:
        rows = ", ".join(json.dumps(piece.tolist(), allow_nan=False)[1:-1] for piece in pieces)
    except ValueError:
        raise SamplingFailed(
            "the model gave NaN or infinite values, which JSON cannot hold; ask for application/x-npy to see them"
        ) from None
    return f'{json.dumps(about)[:-1]}, "samples": [{rows}]}}'.encode()


def png(samples: UInt8[ndarray, "n h w c"], about: dict[str, Any]) -> bytes:
    """One picture: a square grid of the images, row by row, without gaps; unused cells are black."""
    n, h, w, c = samples.shape
    columns = math.isqrt(n - 1) + 1
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, h, w, c), np.uint8)
    cells[:n] = samples
    grid = cells.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)
    buffer = io.BytesIO()
    Image.fromarray(grid[:, :, 0] if c == 1 else grid).save(buffer, "PNG")
    return buffer.getvalue()


class Raw:
    """Row-major bytes and nothing else; the headers X-Ganwatch-Shape and -Dtype say what they are."""

    def __init__(self, shape: tuple[int, ...], dtype: str, about: dict[str, Any]) -> None:
        """`shape`: [n, *sample_shape] of all that will be sent."""
        self.shape, self.dtype, self.about = shape, np.dtype(dtype), about
        self.row_bytes = math.prod(shape[1:]) * self.dtype.itemsize

    @property
    def length(self) -> int | None:
        """Bytes from head to tail, where they are known beforehand."""
        return len(self.head()) + self.shape[0] * self.row_bytes

    def head(self) -> bytes:
        return b""

    def rows(self, samples: ndarray) -> bytes:
        return samples.tobytes()

    def tail(self) -> bytes:
        return b""


class Npy(Raw):
    """NumPy's own file format: `numpy.load(io.BytesIO(body))`."""

    def head(self) -> bytes:
        buffer = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(buffer, fields)
        return buffer.getvalue()


class ArrowStream(Raw):
    """An Arrow IPC stream: one column `samples` of fixed-shape tensors, one batch for each piece, the request in its metadata."""

    def __init__(self, shape: tuple[int, ...], dtype: str, about: dict[str, Any]) -> None:
        import pyarrow  # takes longer to load than all else here, and few ask for it

        super().__init__(shape, dtype, about)
        self._arrow = pyarrow
        self._type = pyarrow.fixed_shape_tensor(pyarrow.from_numpy_dtype(self.dtype), shape[1:])
        self._schema = pyarrow.schema([("samples", self._type)], {name: str(value) for name, value in about.items()})

    @property
    def length(self) -> int | None:
        return None

    def head(self) -> bytes:
        return self._schema.serialize().to_pybytes()

    def rows(self, samples: ndarray) -> bytes:
        arrow = self._arrow
        values = arrow.array(samples.reshape(-1))
        storage = arrow.FixedSizeListArray.from_arrays(values, math.prod(self.shape[1:]))
        batch = arrow.record_batch([arrow.ExtensionArray.from_storage(self._type, storage)], schema=self._schema)
        return batch.serialize().to_pybytes()

    def tail(self) -> bytes:
        return b"\xff\xff\xff\xff\x00\x00\x00\x00"  # the format's end-of-stream marker


STREAMS: dict[str, type[Raw]] = {
    "application/x-npy": Npy,
    "application/octet-stream": Raw,
    "application/vnd.apache.arrow.stream": ArrowStream,
}


def _whole(kind: type[Raw]) -> Callable[[ndarray, dict[str, Any]], bytes]:
    def encode(samples: ndarray, about: dict[str, Any]) -> bytes:
        stream = kind(samples.shape, samples.dtype.name, about)
        return b"".join((stream.head(), stream.rows(samples), stream.tail()))

    return encode


FORMATS: dict[str, Callable[[ndarray, dict[str, Any]], bytes]] = {
    "application/json": json_text,
    "application/x-npy": _whole(Npy),
    "image/png": png,
    "application/octet-stream": lambda samples, about: samples.tobytes(),
    "application/vnd.apache.arrow.stream": _whole(ArrowStream),
}


def as_dtype(samples: ndarray, dtype: str) -> ndarray:
    """Served samples as `dtype`: bytes of images become float32 from 0 to 1, everything else stays as it is."""
    return samples if samples.dtype == dtype else samples.astype(np.float32) / np.float32(255)


def available(sample_shape: tuple[int, ...]) -> list[str]:
    """The media types that samples of this shape can be sent as. A picture needs [h, w, c] with c = 1, 3 or 4."""
    drawable = len(sample_shape) == 3 and sample_shape[-1] in _IMAGE_MODES
    return [name for name in FORMATS if drawable or not name.startswith("image/")]


@lru_cache(maxsize=256)  # clients send the same few headers for ever
def negotiate(accept: str, sample_shape: tuple[int, ...], among: tuple[str, ...] | None = None) -> str:
    """The media type to answer with: the highest quality, the order of FORMATS (or `among`) among equals (RFC 9110, 12.5.1).

    Raises NotAcceptable listing what there is.
    """
    offered = among or available(sample_shape)
    if not accept.strip():
        return offered[0]
    ranges = [_range(item) for item in accept.split(",")]
    quality = {name: _quality(name, ranges) for name in offered}
    best = max(offered, key=lambda name: quality[name])
    if quality[best] > 0:
        return best
    why = "" if len(offered) == len(FORMATS) else f" (samples of shape {list(sample_shape)} are no pictures)"
    raise NotAcceptable(
        f"cannot answer with {accept[:200]!r}{why}", field="Accept", value=accept, expected=f"one of {', '.join(offered)}"
    )


def _range(item: str) -> tuple[str, float]:
    """One element of an Accept header -> (media range, quality). A quality that is no number refuses the range."""
    name, *parameters = (part.strip().lower() for part in item.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return name, min(1.0, max(0.0, float(quality)))
    except ValueError:
        return name, 0.0


def _quality(name: str, ranges: list[tuple[str, float]]) -> float:
    """Of the ranges that match, the most specific one decides."""
    for wanted in (name, name.split("/")[0] + "/*", "*/*"):
        if matching := [q for media, q in ranges if media == wanted]:
            return max(matching)
    return 0.0
