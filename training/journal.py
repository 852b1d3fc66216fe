"""CONTRACT. What a training run says while it runs: JSON lines in `<ganwatch home>/runs/<run>/status.jsonl`, which the monitor follows.

Each line has `at` (seconds since 1970) and `stage`, and by stage:

    begin    model, dataset, steps; again when a run is resumed
    ray      seconds that the cluster took
    latent   signs, normals, clusters: the latent law, and what in the data it was chosen for
    train    at each look: step, steps, seconds_left, alarms {name: what is wrong and what to do}, failing [those that forbid
             to publish], losses and the figures of diagnostics.py (null: not finite); at the end of training, without `step`: seconds and the last figures
    finish   done, most: last steps made and to make, on smooth vectors alone (finish.py); at the end: seconds, before and after (the
             sliced Wasserstein distance to held-out data), kept
    certify  done, most: samples counted so far and at most; at the end: seconds
    publish  version, forced: why it should not have been, where --force overrode that
    failed, interrupted   reason, of the former; the run has ended without a new version

Knows the standard library only.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """What a run says: JSON lines for programs, and a line per ended stage for people."""

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)  # a worker may run on another machine
        self.path, self.said = run / "status.jsonl", time.monotonic()

    def write(self, stage: str, **values: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"at": time.time(), "stage": stage, **values}) + "\n")

    def done(self, stage: str, **values: Any) -> None:
        now = time.monotonic()
        seconds, self.said = now - self.said, now
        self.write(stage, **{"seconds": seconds} | values)
        print(f"{stage:<8} {seconds:6.1f} s", flush=True)
