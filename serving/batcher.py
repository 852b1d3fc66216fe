"""Requests -> batches for one device, counted in samples.

A batch is sealed only when the device is free, so it holds whatever has come in the meantime and nothing ever waits for a
timer. A request that is larger than a batch is cut; those that fit into a turn or a batch pass it, n = 1 passes n = 65536, and
it has its turn among them, but all lanes save one are kept for them while they come. Where nobody waits the device takes spare
work, one batch at a time. Knows nothing of HTTP; runs the sampler in threads of its own, but for batches that take less time
than to wake a thread does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from serving.errors import DeadlineExceeded, Overloaded, Unavailable
from serving.openapi import MAX_BYTES, MAX_SAMPLES
from serving.sampler import Sampler, Window
from serving.tracing import Trace, current

_STALLED_S = 60.0  # a batch that takes longer will not come back
_INLINE_S = 500e-6  # a batch that takes less runs in the event loop: two threads that pass the GIL to and fro take longer
_KEPT_S = 1.0  # after a request that fits into a batch, all lanes but one are kept for such requests
_WINDOW_S = 2e-6  # what a window costs besides its rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spare:
    """Work that no client waits for. `done` gets the rows, or None where the sampler failed."""

    sampler: Sampler
    window: Window
    done: Callable[[ndarray | None], None]


@dataclass(eq=False)
class _Job:
    sampler: Sampler
    window: Window
    answer: asyncio.Future[ndarray]
    since: float  # time.monotonic() of its admission
    place: int  # in the order of those who wait for a turn
    trace: Trace | None = None  # which is told of each batch
    timeout: float = math.inf  # seconds
    sealed: int = 0  # samples handed to the device so far
    parts: dict[int, ndarray] = field(default_factory=dict)  # by their first row: two batches may end in either order
    missing: int = 0  # samples not yet delivered

    def __post_init__(self) -> None:
        self.missing = self.window.count

    @property
    def left(self) -> int:
        return self.window.count - self.sealed

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be sealed, or nobody waits."""
        return not self.left or self.answer.done()

    def deliver(self, start: int, rows: ndarray) -> None:
        self.parts[start] = rows
        self.missing -= len(rows)
        if not self.missing and not self.answer.done():
            parts = [self.parts[key] for key in sorted(self.parts)]
            self.answer.set_result(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def fail(self, error: Exception) -> None:
        if not self.answer.done():  # a client that left has cancelled it
            self.answer.set_exception(error)


@dataclass(frozen=True)
class _Piece:
    """Rows start .. start + count of a job's window, in one batch."""

    job: _Job
    start: int
    count: int

    @property
    def window(self) -> Window:
        whole = self.job.window
        return whole if self.count == whole.count else whole.part(self.start, self.count)


class Batcher:
    """`batch`: samples a run of the model at most, or fewer where a sampler says so. `turn`: samples that whoever has waited longest gets, whatever else waits.
    `limit`, `limit_bytes`: samples admitted and not yet answered at most, and the size of their answers.
    `lanes`: batches on the device at once. With two, one is computed while the other is copied, on a GPU, or handed out, on a CPU.
    `spare`: what to do while nobody waits; asked again after each batch and each `wake`."""

    def __init__(
        self, *, batch: int = 4096, turn: int = 32, limit: int = 16 * MAX_SAMPLES, limit_bytes: int = MAX_BYTES, lanes: int = 1
    ) -> None:
        self.batch, self.turn, self.limit, self.limit_bytes, self.lanes = batch, turn, limit, limit_bytes, lanes
        self.spare: Callable[[], Spare | None] = lambda: None
        self.queued = self.queued_bytes = 0  # admitted and not yet answered
        self.batches = self.batched = 0  # runs of a model since the start, and the samples in them
        self._rate = 0.0  # samples/s while the device works, smoothed
        self._queues: tuple[deque[_Job], ...] = (deque(), deque(), deque())  # those of a turn at most, of a batch at most, larger ones
        self._places = itertools.count()
        self._small_at = -math.inf  # time.monotonic() of the last request that fits into a batch
        self._open: dict[_Job, None] = {}  # those that somebody waits for, oldest first
        self._alarm: asyncio.TimerHandle | None = None  # goes off at the earliest deadline, or before
        self._deadline = math.inf
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._running: dict[int, float] = {}  # lane -> when its batch began
        self._last_run: dict[int, tuple[float, float]] = {}  # lane -> when the model last began and ended to compute there
        self._closing = False
        self._threads = ThreadPoolExecutor(lanes, thread_name_prefix="sampler")

    def start(self) -> None:
        """Begin to work; the first `submit` does so, too. Needs a running event loop."""
        if not self._loops:
            self._loops = [asyncio.create_task(self._run(lane)) for lane in range(self.lanes)]
            for loop in self._loops:
                loop.add_done_callback(self._abandon)

    def submit(self, sampler: Sampler, window: Window, timeout: float | None = None) -> asyncio.Future[ndarray]:
        """The rows of `window`, or what the sampler raised. Cancelling it drops what has not run yet, and so does `timeout` (s).

        Raises Overloaded where too much waits, Unavailable where nothing will be answered any more; the future may raise
        DeadlineExceeded.
        """
        if problem := self.problem():
            raise Unavailable(f"this replica cannot answer: {problem}", expected="a retry, which another replica answers")
        size = window.count * sampler.sample_bytes
        self._admit(window.count, size)
        self.start()
        loop = asyncio.get_running_loop()
        job = _Job(sampler, window, loop.create_future(), time.monotonic(), next(self._places), current.get())
        large = window.count > max(self.turn, min(self.batch, sampler.batch))
        self._queues[(window.count > self.turn) + large].append(job)
        if not large:
            self._small_at = job.since
        self._open[job] = None
        self.queued += window.count
        self.queued_bytes += size
        if timeout is not None:
            job.timeout = timeout
            self._look_at(job.since + timeout)

        def release(_: asyncio.Future[ndarray]) -> None:
            del self._open[job]
            self.queued -= window.count
            self.queued_bytes -= size

        job.answer.add_done_callback(release)
        self._wake.set()
        return job.answer

    def _admit(self, count: int, size: int) -> None:
        if self.queued + count <= self.limit and self.queued_bytes + size <= self.limit_bytes:
            return
        wait = str(max(1, math.ceil(self.queued / self._rate)) if self._rate else 1)
        limit = f"{self.limit}" if self.queued + count > self.limit else f"{self.limit_bytes} bytes"
        raise Overloaded(
            f"{self.queued} samples are waiting; {count} more exceed the limit of {limit}",
            field="n",
            value=count,
            expected=f"a retry after {wait} s, or a smaller n",
            headers={"Retry-After": wait},
        )

    def _look_at(self, deadline: float) -> None:
        """Someone may be late at `deadline`: one timer for all, since hardly anybody ever is."""
        if self._alarm is None or deadline < self._deadline:
            if self._alarm is not None:
                self._alarm.cancel()
            self._deadline = deadline
            self._alarm = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._refuse_late)

    def _refuse_late(self) -> None:
        self._alarm, now = None, time.monotonic()
        for job in list(self._open):
            if job.since + job.timeout <= now:
                expected = "more time, a smaller n, or a retry"
                job.fail(DeadlineExceeded(f"no answer within {job.timeout:g} s", field="timeout", value=job.timeout, expected=expected))
        if waiting := [job.since + job.timeout for job in self._open if job.timeout < math.inf and not job.answer.done()]:
            self._look_at(min(waiting))

    def wake(self) -> None:
        """There may be spare work."""
        self._wake.set()

    @property
    def oldest_wait(self) -> float:
        """Seconds that the longest-waiting request has waited. Other threads may ask: the copy is made in one step."""
        oldest = next(iter(self._open.copy()), None)
        return time.monotonic() - oldest.since if oldest else 0.0

    def problem(self) -> str | None:
        """Why no request will be answered any more, or None."""
        for loop in self._loops:  # a generator for `any` would take four times as long, and each request asks
            if loop.done():
                return "the batch loop has ended"
        if self._closing:
            return "it is stopping"
        if self._running and time.monotonic() - min(self._running.values()) > _STALLED_S:
            return f"the device has not answered for {_STALLED_S:.0f} s"
        return None

    async def close(self, grace: float = 0.0) -> None:
        """Admits nobody, answers those who wait for up to `grace` seconds, then ends; whoever still waits is told so."""
        self._closing = True
        self.spare = lambda: None
        if self._open and grace:
            await asyncio.wait([job.answer for job in self._open], timeout=grace)
        if self._alarm is not None:
            self._alarm.cancel()
        for loop in self._loops:
            loop.cancel()
        if self._loops:
            await asyncio.wait(self._loops)
        await asyncio.to_thread(self._threads.shutdown)  # waits for the batch that runs

    async def _run(self, lane: int) -> None:
        while True:
            if pieces := self._seal(lane):
                await self._serve(lane, pieces)
                if self._queues[-1]:
                    self._wake.set()  # other lanes may be free for it by now
            elif spare := self.spare():
                await self._serve_spare(lane, spare)
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _compute(self, lane: int, sampler: Sampler, windows: list[Window]) -> ndarray:
        started = self._running[lane] = time.monotonic()

        def run() -> ndarray:
            began = time.monotonic()
            rows = sampler.sample(windows)
            self._last_run[lane] = began, time.monotonic()
            return rows

        try:
            if sampler.seconds(sum(window.count for window in windows)) + _WINDOW_S * len(windows) <= _INLINE_S:
                rows = run()
                await asyncio.sleep(0)  # whoever came meanwhile is in the next batch
            else:
                rows = await asyncio.get_running_loop().run_in_executor(self._threads, run)
        finally:
            del self._running[lane]
        self.batches += 1
        self.batched += len(rows)
        rate = len(rows) / max(time.monotonic() - started, 1e-9)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        return rows

    async def _serve(self, lane: int, pieces: list[_Piece]) -> None:
        """Runs one batch and hands out its rows."""
        sealed = time.monotonic()
        try:
            rows = await self._compute(lane, pieces[0].job.sampler, [piece.window for piece in pieces])
        except Exception as error:
            if len(pieces) == 1:
                pieces[0].job.fail(error)
            else:  # one request can spoil a batch: each alone, so that only the guilty one fails
                for piece in pieces:
                    await self._serve(lane, [piece])
            return
        start = 0
        for piece in pieces:
            if trace := piece.job.trace:
                trace.batch(piece.job.since if piece.start == 0 else None, sealed, *self._last_run[lane], piece.count, len(rows))
            piece.job.deliver(piece.start, rows[start : start + piece.count])
            start += piece.count

    async def _serve_spare(self, lane: int, spare: Spare) -> None:
        try:
            rows = await self._compute(lane, spare.sampler, [spare.window])
        except Exception:
            logger.exception("spare work for %s %s failed", spare.sampler.card.model, spare.sampler.card.version)
            return spare.done(None)
        spare.done(rows)

    def _abandon(self, loop: asyncio.Task[None]) -> None:
        for job in list(self._open):
            job.fail(Unavailable("this replica stops answering", expected="a retry, which another replica answers"))

    def _seal(self, lane: int) -> list[_Piece]:
        """The next batch, all of one sampler; requests that nobody waits for are forgotten.

        Whoever has waited longest for a turn gets it. The rest of the room goes to what can be answered soonest. A lane that is kept
        for small requests takes none of a large one, so that they need not wait for its batches nor be in them.
        """
        for queue in self._queues:
            while queue and queue[0].is_over:
                queue.popleft()
        kept = lane > 0 and time.monotonic() - self._small_at < _KEPT_S
        queues = self._queues[:-1] if kept else self._queues
        heads = [queue[0] for queue in queues if queue]
        if not heads:
            return []
        first = min(heads, key=lambda job: job.place)
        room = min(self.batch, first.sampler.batch)
        taken = {first: min(self.turn, first.left, room)}
        room -= taken[first]
        for queue in queues:
            others: list[_Job] = []
            while queue and room:
                job = queue.popleft()
                if job.sampler is not first.sampler:
                    others.append(job)
                elif not job.is_over:
                    more = min(room, job.left - taken.get(job, 0))
                    taken[job] = taken.get(job, 0) + more
                    room -= more
                    if taken[job] < job.left:  # cut, for there is no more room
                        others.append(job)
            queue.extendleft(reversed(others))
        pieces = [_Piece(job, job.sealed, count) for job, count in taken.items()]
        for piece in pieces:
            piece.job.sealed += piece.count
        huge = self._queues[-1]
        if huge and huge[0] in taken:  # the next one's turn
            huge[0].place = next(self._places)
            huge.rotate(-1)
        return pieces
