"""The service's monitor over a recorded stream: the same code, guarantees and answer, without the service."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress, track

from deploy.stack import StackError
from monitoring.budget import Budget
from monitoring.calibration import Healthy
from monitoring.monitor import Monitor
from monitoring.watch import CHUNK
from training.bundle import Card, open_bundle

BATCH = CHUNK  # as the live tap, to the last digit


def replay(bundle: Path, samples: Path, arl: float | str, *, test_rate: float | None = None, calibrated: bool = False) -> dict[str, Any]:
    """Feed `samples` [n, *sample_shape] in served form, a .npy or .parquet file, to a fresh monitor of `bundle`.

    A recorded stream has no clock: an `arl` that is a time is counted at `test_rate` samples a second, and all samples are tested.
    Returns the verdict in short, and as `snapshot` all that /api/state would show under that name, its times being numbers of samples.
    Raises BundleError, and StackError where the stream is not what the bundle serves.
    """
    try:
        budget = Budget.stated(arl, test_rate)
    except ValueError as error:
        raise StackError(f"--{error}") from None
    opened = open_bundle(bundle)
    if not samples.is_file():
        raise StackError(f"--samples is {samples}, and there is no such file")
    card = opened.card
    count, batches = (_parquet if samples.suffix == ".parquet" else _npy)(samples, card)
    monitor = Monitor(opened, arl=budget.samples)
    progress = Console(stderr=True)
    if calibrated:
        healthy, calibration = Healthy(opened), monitor.calibration()
        with Progress(transient=True, console=progress, disable=not progress.is_terminal) as bar:
            task = bar.add_task("simulating healthy runs", total=calibration.samples)
            while calibration.slack is None:
                seen = healthy.draw(BATCH)
                calibration.feed(seen.scores, seen.features, seen.cells, seen.samples)
                bar.update(task, completed=calibration.fed)
        monitor.calibrate(calibration.slack)
    steps, done = -(-count // BATCH), 0
    for batch in track(batches, description="replaying", total=steps, transient=True, console=progress, disable=not progress.is_terminal):
        monitor.update(batch, fresh=True, at=float(done))
        done += len(batch)
    snapshot = monitor.snapshot()
    return {
        "first_alarm": monitor.first_alarm,
        "verdict": snapshot["verdict"]["id"],
        **{name: snapshot["verdict"][name] for name in ("words", "advice", "modes", "classes", "risen")},
        "gauges": snapshot["gauges"]["fresh"],
        "samples": count,
        "arl_seconds": budget.seconds,
        "assumes": "the samples are independent draws of one law, in the order given, as you state; the guarantee rests on it",
        **{name: snapshot[name] for name in ("rejected", "arl", "slack", "model", "version")},
        "snapshot": snapshot,
    }


def _npy(path: Path, card: Card) -> tuple[int, Iterator[np.ndarray]]:
    """How many samples there are, and these, BATCH at a time."""
    try:
        stream = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a broken header raises whatever its tokenizer or the allocator makes of it
        raise StackError(f"--samples is {path}, which numpy cannot read as .npy: {error}") from None
    if stream.shape[1:] != card.sample_shape or stream.dtype != card.sample_dtype:
        raise _unfit(path, f"{stream.dtype} {list(stream.shape)}", card)
    return len(stream), (np.ascontiguousarray(stream[i : i + BATCH]) for i in range(0, len(stream), BATCH))


def _parquet(path: Path, card: Card) -> tuple[int, Iterator[np.ndarray]]:
    """The same of a table: one column of lists, nested or flat, each a sample; or as many columns of numbers as a vector has."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise StackError(f"--samples is {path}, which cannot be read as parquet: {error}") from None
    schema, size = file.schema_arrow, math.prod(card.sample_shape)
    fitting = [(field.name, depth) for field in schema for depth, kind in [_depth(field.type)] if kind == card.sample_dtype]
    lists, numbers = [name for name, depth in fitting if depth], [name for name, depth in fitting if not depth]
    if len(lists) != 1 and not (len(card.sample_shape) == 1 and len(numbers) == size):
        raise _unfit(path, f"the columns {', '.join(f'{field.name}: {field.type}' for field in schema)}", card)

    def batches() -> Iterator[np.ndarray]:
        for batch in file.iter_batches(BATCH, columns=lists if len(lists) == 1 else numbers):
            if len(lists) == 1:
                values = batch.column(0)
                while _depth(values.type)[0]:
                    values = values.flatten()
                flat = values.to_numpy(zero_copy_only=False)
            else:
                flat = np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1).ravel()
            if len(flat) != len(batch) * size or flat.dtype != card.sample_dtype:  # a null makes it float or shorter
                raise _unfit(path, f"rows of other than {size} values", card)
            yield flat.reshape(len(batch), *card.sample_shape)

    return file.metadata.num_rows, batches()


def _depth(kind: pa.DataType) -> tuple[int, str]:
    """How many lists are around a column's values, and numpy's name for the type of these; empty where it has none."""
    depth = 0
    while isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        kind, depth = kind.value_type, depth + 1
    try:
        return depth, str(np.dtype(kind.to_pandas_dtype()))
    except (NotImplementedError, TypeError):
        return depth, ""


def _unfit(path: Path, found: str, card: Card) -> StackError:
    return StackError(f"{path} holds {found}; this bundle serves {card.sample_dtype} [n, {', '.join(map(str, card.sample_shape))}]")
