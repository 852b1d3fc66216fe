"""What the monitor has to say at one moment: a View, which nobody alters once it is published, for the page, metrics and the API.

It only holds what `watch.py` found, and puts it into the form of /api/state.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from monitoring.budget import Budget
from monitoring.monitor import Gauge
from training.bundle import Bundle, Card

COLUMNS = ("t", "js", "js_low", "js_high", "log10_e")


@dataclass(frozen=True)
class Live:
    """One version that an alias names, as it stood when the view was published."""

    role: str  # the alias; the first of SHARES where several name it
    version: str
    bundle: Bundle
    share: float
    since: float
    last_sample_at: float | None
    last_fresh_at: float | None
    stale: bool  # no fresh sample lately
    fresh_rate: float  # samples a second that clients drew with the server's seeds
    tested_rate: float | None  # samples a second that were tested over the last hour
    snapshot: dict[str, Any]
    gauges: Mapping[str, Mapping[str, Gauge]]  # population -> name -> gauge
    modes: Mapping[str, list[dict[str, Any]]]  # population -> modes and off-manifold cell, as of Monitor
    coverage: Mapping[str, dict[str, int]]  # population -> what -> modes
    comparison: dict[str, Any] | None  # with production, of a candidate
    shards: int = 0  # other monitors whose samples are summed up here

    def state(self) -> dict[str, Any]:
        """What the page shows of a version beside the one it speaks of."""
        snapshot = self.snapshot
        named = {key: snapshot[key] for key in ("verdict", "monitored", "evidence", "log10_threshold", "budget", "coverage")}
        times = {"last_sample_at": self.last_sample_at, "last_fresh_at": self.last_fresh_at, "stale": self.stale}
        card = {"injected_from": self.bundle.card.injected_from, "fault": self.bundle.card.fault, "forced": self.bundle.card.forced}
        return {"alias": self.role, "version": self.version, "budget_share": self.share, "comparison": self.comparison, "card": card, **named, **times}


@dataclass(frozen=True)
class Shown:
    """A model as it stood when the view was published: above all the version that the page speaks of, production or the first there is."""

    alias: str
    version: str
    bundles: Mapping[str, Bundle]  # alias -> the version it names
    share: float
    loaded_at: float
    last_sample_at: float | None
    last_fresh_at: float | None
    stale: bool  # no fresh sample lately
    snapshot: dict[str, Any]
    gauges: Mapping[str, Mapping[str, Gauge]]  # population -> name -> gauge
    live: tuple[Live, ...]  # each version once, the one above first
    forced: str | None  # what the gate objected to the version when it was promoted all the same
    marks: tuple[dict[str, Any], ...]
    rows: tuple[tuple[float | None, ...], ...]  # COLUMNS, oldest first
    picture: tuple[ndarray, ...]

    @property
    def tested_rate(self) -> float | None:
        """Samples a second that were tested over the last hour, of the version of which it was most; None where nobody knows yet."""
        return max((live.tested_rate for live in self.live if live.tested_rate is not None), default=None)

    @property
    def cards(self) -> dict[str, Card]:
        return {alias: bundle.card for alias, bundle in self.bundles.items()}

    def samples(self) -> ndarray | None:
        """The newest samples, probes too, newest first."""
        return np.concatenate(self.picture)[::-1] if self.picture else None


@dataclass(frozen=True)
class View:
    """All that the monitor has to say at one moment."""

    at: float
    budget: Budget
    models: Mapping[str, Shown]
    observed: Mapping[tuple[str, str], int]  # (model, origin) -> samples
    rejected: Mapping[tuple[str, str], int]  # (model, reason) -> samples
    untested: Mapping[str, int]  # model -> fresh samples beyond what is tested a second
    unaliased: Mapping[str, int]  # model -> samples of versions that no alias names, which nobody judges
    alarms: Mapping[tuple[str, str], int]  # (model, verdict) -> alarms raised
    load_failures: Mapping[str, int]  # model -> bundles that could not be loaded
    restores: Mapping[tuple[str, str], int]  # (model, one of RESTORES) -> versions that came under watch
    save_failures: Mapping[str, int]  # model -> times that a version's state, or its charts, could not be written
    incidents_refused: bool  # the record of alarms was damaged and begun anew
    replays: Mapping[tuple[str, str], int]  # (model, "checked" or "mismatched") -> golden samples
    actions: Mapping[tuple[str, str], int]  # (model, alias) -> changes made for an alarm
    clock_jumps: Mapping[str, int]  # "back" or "forward" -> how often the clock was set so
    unknown_model: int  # records of models that the registry does not hold
    failed: int  # records that an unexpected error kept from being judged
    serving: Mapping[str, float | int]  # the replicas' counters, summed
    replicas: int
    heard_at: float | None
    received: int  # samples
    errors: tuple[str, ...]

    def state(self, since: float = -math.inf) -> dict[str, Any]:
        """The JSON of /api/state. `since` (Unix seconds) leaves out the older points of the histories."""
        dropped, skipped = (
            sum(value for name, value in self.serving.items() if name.startswith(f"tap_{what}_samples_total")) for what in ("dropped", "skipped")
        )
        return {
            "now": self.at,
            "budget": {"samples": self.budget.samples, "seconds": self.budget.seconds, "test_rate": self.budget.rate},
            "models": {name: self._model(name, shown, since) for name, shown in self.models.items()},
            "tap": {
                "replicas": self.replicas,
                "last_heartbeat_at": self.heard_at,
                "dropped": dropped,  # lost, since the monitor did not answer
                "skipped": skipped,  # never meant to be shown: beyond the tap's budget
                "received": self.received,
            },
            "errors": list(self.errors),
        }

    def seconds(self, shown: Shown) -> float | None:
        """The least mean time to a false alarm of a model at the rate of the last hour, that of the version tested most; None: not known."""
        rate = shown.tested_rate
        return self.budget.samples / rate if rate else None

    def _model(self, name: str, shown: Shown, since: float) -> dict[str, Any]:
        card = shown.cards[shown.alias]
        rows = shown.rows[bisect_right(shown.rows, since, key=lambda row: row[0]) :]
        history: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
        history["threshold"] = shown.snapshot["tolerance"].get("js", {}).get("threshold")
        history["log10_threshold"] = shown.snapshot["log10_threshold"]
        return {
            "alias": shown.alias,
            "version": shown.version,
            "snapshot": shown.snapshot,
            "stale": shown.stale,
            "last_sample_at": shown.last_sample_at,
            "last_fresh_at": shown.last_fresh_at,
            "loaded_at": shown.loaded_at,
            "budget_share": shown.share,
            "tested_rate": shown.tested_rate,
            "false_alarm_seconds": self.seconds(shown),
            "untested": self.untested[name],
            "unaliased": self.unaliased[name],
            "shards": shown.live[0].shards,
            "sample_shape": list(card.sample_shape),
            "card": {"created": card.created, "injected_from": card.injected_from, "fault": card.fault, "forced": card.forced},
            "history": history,
            "forced_promotion": shown.forced,
            "marks": list(shown.marks),
            "other_versions": [live.state() for live in shown.live[1:]],
        }
