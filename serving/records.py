"""CONTRACT. What a replica tells the monitor: which samples clients got, and what the replica counted.

A record holds the very array that was served, subsampled to a budget, and of about one row in a hundred the latents that the
model was fed, as they lay in memory when it ran. A heartbeat carries records and counters; it is sent also when there are none,
so that silence can be told from health. Needs numpy and the standard library, nothing else.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy import ndarray

SCHEMA = 2
Origin = Literal["server_seed", "client_seed", "client_z", "probe"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)


@dataclass(frozen=True)
class Record:
    """Rows offset .. offset + len(samples) of `seed`, as they were answered at `at` (Unix seconds)."""

    model: str
    version: str
    origin: Origin
    seed: int
    offset: int
    samples: ndarray  # [k, *sample_shape], uint8 or float32
    at: float
    label: int | tuple | None = None  # the class the request named, or one (int) for each row; None: drawn, or no classes
    truncation: float = 1.0
    fed: tuple = ()  # of int: rows, counted from 0, of which there are latents; ascending
    z: ndarray | None = None  # float32 [len(fed), d], those latents; None where there are none

    @property
    def is_independent(self) -> bool:
        """Whether these are independent draws of the model, of its own law or of the classes asked for: what an alarm may eat."""
        return self.origin in ("server_seed", "probe") and self.truncation == 1.0

    @property
    def is_fresh(self) -> bool:
        """Whether these are independent draws of the model's own law, classes included."""
        return self.is_independent and self.label is None

    def head(self, count: int) -> Record:
        """The first `count` rows, copied: a view would keep the whole batch alive."""
        label = self.label[:count] if isinstance(self.label, tuple) else self.label
        fed = tuple(row for row in self.fed if row < count)
        return replace(self, samples=self.samples[:count].copy(), label=label, fed=fed, z=self.z[: len(fed)] if self.z is not None and fed else None)


@dataclass(frozen=True)
class Heartbeat:
    """Everything one replica has to say since its last heartbeat. Counters are totals since the replica started."""

    replica: str  # unique for the life of a replica
    at: float  # Unix seconds
    records: tuple[Record, ...]
    counters: dict[str, float]  # e.g. requests_total{status="200",model="digits"} -> 12

    def encode(self) -> bytes:
        """npz: a JSON header and one or two arrays per record. No pickle."""
        header = {"schema": SCHEMA, "replica": self.replica, "at": self.at, "counters": self.counters}
        header["records"] = [{k: v for k, v in r.__dict__.items() if k not in ("samples", "z")} for r in self.records]
        buffer = io.BytesIO()
        arrays = {f"r{i}": r.samples for i, r in enumerate(self.records)} | {f"z{i}": r.z for i, r in enumerate(self.records) if r.z is not None}
        np.savez(buffer, allow_pickle=False, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
        return buffer.getvalue()

    @staticmethod
    def decode(body: bytes) -> Heartbeat:
        """Raises ValueError where `body` is not what `encode` writes."""
        try:
            with np.load(io.BytesIO(body), allow_pickle=False) as data:
                header = json.loads(data["header"].tobytes())
                if header["schema"] != SCHEMA:
                    raise ValueError(f"schema is {header['schema']!r}, this monitor reads {SCHEMA}")
                for r in header["records"]:
                    r["label"] = tuple(r["label"]) if isinstance(r.get("label"), list) else r.get("label")
                    r["fed"] = tuple(r["fed"])
                records = tuple(Record(**r, samples=data[f"r{i}"], z=data[f"z{i}"] if r["fed"] else None) for i, r in enumerate(header["records"]))
                return Heartbeat(header["replica"], header["at"], records, header["counters"])
        except Exception as error:  # numpy, zipfile and json each raise their own for a broken body
            raise ValueError(f"not a heartbeat: {type(error).__name__}: {error}") from error
