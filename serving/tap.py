"""What clients got, told to the monitor. The request path only appends; a thread sends. What does not fit is dropped and counted.

Knows nothing of how samples come about. A monitor that is slow, dead or absent costs drops, never time.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable

import httpx

from serving.records import Heartbeat, Record

_TICK_S = 0.25  # between two looks at the ring
_SILENCE_S = 1.0  # the longest time without a heartbeat
_TIMEOUT_S = 2.0
_RESERVE_S = 0.05  # seconds of the budget that lie ready before anything is shown: else answers come in crumbs of a row or two
_RING_S = 4.0  # seconds of the budget that are held while the monitor does not answer

logger = logging.getLogger(__name__)


class Tap:
    """`url`: of the monitor, None to send nothing. `rate`: samples/s shown to it, as much for fresh samples as for the others,
    so that no flood of clients' seeds hides the samples that an alarm may eat; a shadow's come on top. `gauges`: what else a heartbeat says."""

    def __init__(self, url: str | None, rate: float = 2000.0, gauges: Callable[[], dict[str, int | float]] = dict) -> None:
        self.url, self.rate, self.gauges = url, rate, gauges
        self.replica = uuid.uuid4().hex
        self.counters: Counter[str] = Counter()
        self._budgets = {fresh: _Budget(rate) for fresh in (True, False)}
        self._ring: deque[Record] = deque()
        self._held = 0  # samples in the ring
        self._lock = threading.Lock()  # held for a few appends or one swap
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def wanted(self, model: str, count: int, *, fresh: bool) -> int:
        """How many rows, the first ones, of an answer with `count` rows the monitor is shown; the rest is counted as skipped."""
        if self.url is None:
            return 0
        shown = self._budgets[fresh].take(count)
        if shown < count:
            self.counters[f'tap_skipped_samples_total{{model="{model}"}}'] += count - shown
        return shown

    def offer(self, record: Record) -> None:
        """Keep what was `wanted`, no view of more; the oldest records make room."""
        with self._lock:
            self._ring.append(record)
            self._held += len(record.samples)
            while self._held > _RING_S * 2 * self.rate and len(self._ring) > 1:
                oldest = self._ring.popleft()
                self._held -= len(oldest.samples)
                self._drop(oldest)

    def start(self) -> None:
        if self.url is not None:
            self._thread = threading.Thread(target=self._run, name="tap", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what is left, once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        sent = 0.0
        with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
            while True:
                stopped = self._stop.wait(_TICK_S)
                if self._ring or stopped or time.monotonic() - sent >= _SILENCE_S:
                    sent = time.monotonic()
                    self._send(client)
                if stopped:
                    return

    def _send(self, client: httpx.Client) -> None:
        with self._lock:
            records, self._ring, self._held = tuple(self._ring), deque(), 0
        try:
            heartbeat = Heartbeat(
                self.replica, time.time(), records, {name: float(value) for name, value in {**self.counters, **self.gauges()}.items()}
            )
            client.post(f"{self.url}/api/records", content=heartbeat.encode()).raise_for_status()
        except Exception as error:  # whatever it is, a thread that ended would leave the replica unwatched
            if not isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
                logger.exception("a heartbeat with %d records is lost", len(records))
            with self._lock:
                for record in records:
                    self._drop(record)

    def _drop(self, record: Record) -> None:
        self.counters[f'tap_dropped_samples_total{{model="{record.model}"}}'] += len(record.samples)


class _Budget:
    """A token bucket that holds one second. It gives nothing, to small answers neither, until it can give to a large one."""

    def __init__(self, rate: float) -> None:
        self._rate = self._tokens = rate
        self._at = time.monotonic()

    def take(self, wanted: int) -> int:
        now = time.monotonic()
        self._tokens = min(self._rate, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < _RESERVE_S * self._rate:
            return 0
        count = min(wanted, int(self._tokens))
        self._tokens -= count
        return count
