"""CONTRACT. What a replica tells the monitor: which samples clients got, and what the replica counted.

A record holds the very array that was served, subsampled to a budget, and of about one row in a hundred the latents that the
model was fed, as they lay in memory when it ran. A heartbeat carries records and counters; it is sent also when there are none,
so that silence can be told from health. Needs numpy and the standard library, nothing else.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy import ndarray

SCHEMA = 3
SHADOW_ROWS = 64  # of an answer that the monitor is shown, those that a shadow draws, too, and the monitor compares
Origin = Literal["server_seed", "client_seed", "client_z", "probe", "observed_iid", "observed"]  # the last two: of somebody else's server
ORIGINS: tuple[Origin, ...] = get_args(Origin)


def is_independent(origin: Origin, truncation: float) -> bool:
    """Whether rows of such an answer are independent draws of the model."""
    return origin in ("server_seed", "probe", "observed_iid") and truncation == 1.0


def is_fresh(origin: Origin, truncation: float, label: int | tuple | None) -> bool:
    """Whether they are of its own law besides, classes included."""
    return is_independent(origin, truncation) and label is None


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
        return is_independent(self.origin, self.truncation)

    @property
    def is_fresh(self) -> bool:
        """Whether these are independent draws of the model's own law, classes included."""
        return is_fresh(self.origin, self.truncation, self.label)


@dataclass(frozen=True)
class Heartbeat:
    """Everything one replica has to say since its last heartbeat. Counters are totals since the replica started."""

    replica: str  # unique for the life of a replica
    at: float  # Unix seconds
    records: tuple[Record, ...]
    counters: dict[str, float]  # e.g. requests_total{status="200",model="digits"} -> 12

    def encode(self) -> bytes:
        """npz: a JSON header, and the samples and latents of all records of one shape joined, for an array costs more than a
        record. No pickle."""
        header = {"schema": SCHEMA, "replica": self.replica, "at": self.at, "counters": self.counters, "records": []}
        joined: dict[str, list[ndarray]] = {}
        for record in self.records:
            fields = {k: v for k, v in record.__dict__.items() if k not in ("samples", "z")}
            for name, rows in (("samples", record.samples), ("z", record.z)):
                if rows is not None:
                    array = f"{rows.dtype.str[1:]}{list(rows.shape[1:])}"
                    joined.setdefault(array, []).append(rows)
                    fields[name] = array, len(rows)
            header["records"].append(fields)
        buffer = io.BytesIO()
        arrays = {name: np.concatenate(rows) for name, rows in joined.items()}
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
                arrays, taken = {name: data[name] for name in data.files if name != "header"}, Counter[str]()
                for r in header["records"]:
                    for name in ("samples", "z"):
                        if name in r:
                            array, count = r[name]
                            start = taken[array]
                            taken[array] += count
                            r[name] = arrays[array][start : start + count].copy()  # a view would keep those of all records
                            if count < 0 or len(r[name]) != count:
                                raise ValueError(f"{array} has {len(arrays[array])} rows, {start} to {start + count} are asked for")
                    r["label"] = tuple(r["label"]) if isinstance(r.get("label"), list) else r.get("label")
                    r["fed"] = tuple(r["fed"])
                records = tuple(Record(**r) for r in header["records"])
                return Heartbeat(header["replica"], header["at"], records, header["counters"])
        except Exception as error:  # numpy, zipfile and json each raise their own for a broken body
            raise ValueError(f"not a heartbeat: {type(error).__name__}: {error}") from error
