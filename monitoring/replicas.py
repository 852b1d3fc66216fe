"""What the replicas of serving say of themselves: counters, told by heartbeats. It knows no sample, and no clock but the `at` it is given."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

STALE_AFTER = 10.0  # seconds without a fresh sample, or without a heartbeat
REPLICAS = 256  # silent replicas whose counters are kept apart, in case they speak again

_COUNTER = re.compile(r'([a-z_][a-z0-9_]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})?')
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\.)*)"')
_OURS = {"replicas", "heartbeat_timestamp_seconds"}  # ganwatch_serving_* that the monitor itself says


def parse_counter(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """`samples_total{model="digits"}` -> ("samples_total", (("model", "digits"),)). Raises ValueError for anything else."""
    found = _COUNTER.fullmatch(text)
    if found is None or found[1] in _OURS:
        raise ValueError(
            f'counter is {text!r}; expected a name with labels in Prometheus form, like samples_total{{model="digits"}}'
        )
    unescape = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
    labels = {name: re.sub(r"\\.", lambda m: unescape.get(m[0], m[0]), value) for name, value in _LABEL.findall(found[2] or "")}
    return found[1], tuple(sorted(labels.items()))


@dataclass
class Replicas:
    """The counters of every replica that ever spoke, summed so that totals never go backwards when one goes away."""

    last: OrderedDict[str, tuple[float, Mapping[str, float | int]]] = field(default_factory=OrderedDict)
    gone: Counter[str] = field(default_factory=Counter)
    heard_at: float | None = None

    def hear(self, replica: str, counters: Mapping[str, float | int], at: float) -> None:
        self.last[replica] = (at, counters)
        self.last.move_to_end(replica)
        self.heard_at = at
        while len(self.last) > REPLICAS:
            _, (_, counters) = self.last.popitem(last=False)
            self.gone.update({name: value for name, value in counters.items() if _is_total(name)})

    def speaking(self, at: float) -> int:
        return sum(at - heard <= STALE_AFTER for heard, _ in self.last.values())

    def totals(self, at: float) -> dict[str, float | int]:
        """Counters over all replicas there ever were; everything else over those that still speak."""
        totals = Counter(self.gone)
        for heard, counters in self.last.values():
            for name, value in counters.items():
                if _is_total(name) or at - heard <= STALE_AFTER:
                    totals[name] += value
        return dict(totals)


def _is_total(counter: str) -> bool:
    return counter.partition("{")[0].endswith("_total")
