"""The service's monitor over a recorded stream: the same code, guarantees and words, without the service."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from deploy.stack import StackError
from monitoring.monitor import Monitor
from training.bundle import open_bundle

BATCH = 4096


def replay(bundle: Path, samples: Path, arl: float) -> dict[str, Any]:
    """Feed `samples`, a .npy file [n, *sample_shape] in served form, to a fresh monitor of `bundle`.

    Raises BundleError, and StackError where the stream is not what the bundle serves.
    """
    if not 1 <= arl <= 1e100:
        raise StackError(f"--arl is {arl}; it is a number of samples, from 1 to 1e100")
    opened = open_bundle(bundle)
    try:
        stream = np.load(samples, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise StackError(f"--samples is {samples}, and there is no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise StackError(f"--samples is {samples}, which numpy cannot read as .npy: {error}") from None
    card = opened.card
    if not isinstance(stream, np.ndarray) or stream.shape[1:] != card.sample_shape or stream.dtype != card.sample_dtype:
        found = f"{stream.dtype} {list(stream.shape)}" if isinstance(stream, np.ndarray) else "an archive of several arrays"
        raise StackError(f"{samples} holds {found}; this bundle serves {card.sample_dtype} [n, {', '.join(map(str, card.sample_shape))}]")
    monitor = Monitor(opened, arl=arl)
    progress = Console(stderr=True)
    for start in track(range(0, len(stream), BATCH), description="replaying", transient=True, console=progress, disable=not progress.is_terminal):
        monitor.update(np.ascontiguousarray(stream[start : start + BATCH]), fresh=True, at=float(start))
    verdict = monitor.verdict
    return {
        "first_alarm": monitor.first_alarm,
        "verdict": verdict.id,
        "words": verdict.words,
        "modes": list(verdict.modes),
        "gauges": {name: {k: _finite(v) for k, v in asdict(gauge).items()} for name, gauge in monitor.gauges("fresh").items()},
        "samples": len(stream),
        "rejected": monitor.rejected,
        "arl": arl,
        "assumes": "the samples are independent draws of one law, in the order given, as you state; the guarantee rests on it",
        "model": card.model,
        "version": card.version,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
