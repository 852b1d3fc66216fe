"""What a killed process leaves on the disk for the next one to go on with: states of Monitors, one file a version, and what the
charts showed, one file a model.

A state is an npz: a JSON header and arrays, no pickle. It is replaced in one step and is on the disk when `save` returns, so a
reader finds the state before or the state after, whole. A history is bare float64 rows, appended and not forced to the disk: a
kill loses nothing, a power cut the newest rows. It does not know what a state means, nor a column but the first, the time.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

SCHEMA = 1


class StateError(ValueError):
    """A file that holds no state that this version can read. The text says which."""


def encode(state: Mapping[str, Any]) -> bytes:
    """A state as it lies on the disk and travels between monitors. Values are arrays or what JSON can say."""
    arrays = {name: value for name, value in state.items() if isinstance(value, ndarray)}
    values = {name: value for name, value in state.items() if name not in arrays}
    header = json.dumps({"schema": SCHEMA, "values": values}, allow_nan=False)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, header=np.frombuffer(header.encode(), np.uint8), **{f"array.{name}": a for name, a in arrays.items()})
    return buffer.getvalue()


def decode(body: bytes) -> dict[str, Any]:
    """The state in `body`. Raises StateError where it is not what `encode` writes."""
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as data:
            header = json.loads(data["header"].tobytes())
            if header["schema"] != SCHEMA:
                raise ValueError(f"schema is {header['schema']!r}, this monitor reads {SCHEMA}")
            return {**header["values"], **{name.removeprefix("array."): data[name] for name in data.files if name != "header"}}
    except Exception as error:  # numpy, zipfile and json each raise their own for broken bytes
        raise StateError(f"{type(error).__name__}: {error}") from error


class States:
    """The states under `directory`, named by model and version, and the histories, named by model."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def hold(self) -> TextIO:
        """Keep other monitors away until what is returned is closed, or the process ends in whatever way. Raises OSError where there is one."""
        path = self.directory / ".lock"  # no model has such a name
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            why = "another monitor runs on this home, and each would overwrite what the other saves" if isinstance(error, BlockingIOError) else error.strerror
            raise OSError(f"cannot lock {path}: {why}; stop it or choose another --home") from None
        return lock

    def save(self, model: str, version: str, state: Mapping[str, Any]) -> None:
        """Values are arrays or what JSON can say. Raises OSError where the disk does not take them."""
        path = self._path(model, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            file.write(encode(state))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def load(self, model: str, version: str) -> dict[str, Any] | None:
        """The state that was saved last, None where there never was one. Raises StateError."""
        path = self._path(model, version)
        try:
            return decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except StateError as error:
            raise StateError(f"{path}: {error}") from error

    def append(self, model: str, rows: Float64[ndarray, "n width"], most: int) -> None:
        """More of a model's history. Its newest `most` rows are kept, and twice as many lie on the disk at most.

        Raises OSError where the disk does not take them.
        """
        path, stride = self._history(model, rows.shape[1]), 8 * rows.shape[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            size = file.truncate(file.tell() // stride * stride)  # a full disk may have torn a row
            file.write(rows.astype("<f8").tobytes())
        if size + rows.nbytes > 2 * most * stride:
            partial = path.with_suffix(".partial")
            partial.write_bytes(path.read_bytes()[-most * stride :])
            os.replace(partial, path)

    def history(self, model: str, width: int) -> Float64[ndarray, "n width"]:
        """The rows that were appended, none where there never were any; those that a clock set back has overtaken are left out."""
        try:
            body = self._history(model, width).read_bytes()
        except FileNotFoundError:
            body = b""
        rows = np.frombuffer(body[: len(body) // (8 * width) * 8 * width], "<f8").astype(np.float64).reshape(-1, width)
        later = np.fmin.accumulate(np.append(rows[1:, 0], np.inf)[::-1])[::-1]  # the earliest time that comes after each row
        return rows[rows[:, 0] < later[: len(rows)]]

    def _path(self, model: str, version: str) -> Path:
        return self.directory / model / f"{version}.npz"

    def _history(self, model: str, width: int) -> Path:
        return self.directory / model / f"history.{width}f8"
