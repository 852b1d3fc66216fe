"""CONTRACT. What a training run says while it runs, for programs: JSON lines in `<run>/status.jsonl`, one a line of progress."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """What a run says: JSON lines in `<run>/status.jsonl` for programs, and a line per ended stage for people."""

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
