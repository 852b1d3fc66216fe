"""Follows training runs: reads what each appends to its status.jsonl (training/journal.py) and says where it stands.

It only reads, never waits and knows no networks: what a figure means, the run itself says in words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEWEST = 8  # runs that are shown: each brings its own series and its own curves
SILENCE = 120.0  # seconds without a word, or five times the longest pause before, until a run counts as silent
STATES = ("running", "silent", "published", "failed", "interrupted")
CURVES = ("step", "divergence", "accuracy", "mode_coverage")
POINTS = 400  # of each curve; a run looks a hundred times


@dataclass
class Following:
    """One run, as far as its file was read."""

    path: Path
    offset: int = 0  # bytes
    told: dict[str, Any] = field(default_factory=dict)  # the newest value of each field
    stage: str = ""
    at: float = 0.0  # of the last line
    pause: float = 0.0  # the longest between two lines
    seen: dict[str, bool] = field(default_factory=dict)  # alarms that were ever up -> fatal
    rows: list[list[Any]] = field(default_factory=list)  # of CURVES

    def read(self) -> None:
        """Take in the complete lines that are new. Raises ValueError at one that is not ours."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        for line in new[: new.rfind(b"\n") + 1].splitlines(keepends=True):
            self.offset += len(line)
            said = json.loads(line)
            if not isinstance(said, dict) or not isinstance(said.get("at"), int | float) or not isinstance(said.get("stage"), str):
                raise ValueError("a line without time and stage")
            self._take(said)

    def _take(self, said: dict[str, Any]) -> None:
        at, self.stage = said.pop("at"), said.pop("stage")
        if self.stage == "begin":
            self.pause, self.told = 0.0, {}
        elif self.at:
            self.pause = max(self.pause, at - self.at)
        self.at = at
        self.told |= said
        if self.stage == "train" and "step" in said:
            self.seen |= {name: name in said.get("failing", ()) for name in said["alarms"]}
            while self.rows and self.rows[-1][0] >= said["step"]:  # resumed from a checkpoint before
                self.rows.pop()
            self.rows = [*self.rows, [said.get(name) for name in CURVES]][-POINTS:]

    def standing(self, now: float) -> dict[str, Any]:
        """Where the run stands: JSON for the page, figures for Prometheus."""
        over = {"publish": "published", "failed": "failed", "interrupted": "interrupted"}.get(self.stage)
        state = over or ("silent" if now - self.at > max(SILENCE, 5 * self.pause) else "running")
        told, apart = self.told, {"step", "steps", "seconds_left", "seconds", "loop_seconds", "done", "most"}
        done, of = told.get("step", 0), told.get("steps")
        left = told.get("seconds_left")
        return {
            "run": self.path.parent.name,
            "model": str(told.get("model", "")),
            "dataset": str(told.get("dataset", "")),
            "state": state,
            "stage": self.stage,
            "at": self.at,
            "step": done,
            "steps": of,
            "progress": done / of if of else 0.0,
            "seconds_left": max(0.0, left - (now - self.at)) if left is not None and self.stage == "train" else None,
            "alarms": told.get("alarms", {}),
            "fatal": self.seen,
            "reason": told.get("reason") if state == "failed" else None,
            "version": told.get("version") if state == "published" else None,
            "forced": told.get("forced") if state == "published" else None,
            "figures": {k: v for k, v in told.items() if isinstance(v, int | float) and not isinstance(v, bool) and k not in apart},
            "history": {name: [row[i] for row in self.rows] for i, name in enumerate(CURVES)},
        }


class Runs:
    """The newest runs under a directory. `shown` is replaced as a whole, so any thread may read it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shown: tuple[dict[str, Any], ...] = ()  # newest first
        self.trouble: dict[str, str] = {}  # run -> why its file could not be read
        self._following: dict[Path, Following] = {}

    def look(self, now: float) -> None:
        """Read what is new."""
        touched = []
        for path in self.directory.glob("*/status.jsonl"):
            try:
                touched.append((path.stat().st_mtime, path))
            except OSError:  # deleted meanwhile
                continue
        newest = [path for _, path in sorted(touched, reverse=True)[:NEWEST]]
        self._following = {path: self._following.get(path) or Following(path) for path in newest}
        self.trouble = {run: words for run, words in self.trouble.items() if self.directory / run / "status.jsonl" in self._following}
        for path, following in self._following.items():
            try:
                following.read()
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.trouble[path.parent.name] = f"{path} cannot be followed: {error}"
        self.shown = tuple(following.standing(now) for following in self._following.values() if following.at)
