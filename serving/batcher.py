"""Requests -> batches for one device, counted in samples.

A batch is sealed only when the device is free, so it holds whatever has come in the meantime and nothing ever waits for a
timer. A large request is cut, and every waiting request gets its turn before any gets a second: n = 1 passes n = 65536.
Knows nothing of HTTP; runs the sampler in a thread of its own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from serving.errors import Overloaded, Unavailable
from serving.sampler import Sampler, Window

_STALLED_S = 60.0  # a batch that takes longer will not come back


@dataclass(eq=False)
class _Job:
    sampler: Sampler
    window: Window
    answer: asyncio.Future[ndarray]
    sealed: int = 0  # samples handed to the device so far
    parts: list[ndarray] = field(default_factory=list)
    missing: int = 0  # samples not yet delivered

    def __post_init__(self) -> None:
        self.missing = self.window.count

    @property
    def left(self) -> int:
        return self.window.count - self.sealed

    def deliver(self, rows: ndarray) -> None:
        self.parts.append(rows)
        self.missing -= len(rows)
        if not self.missing and not self.answer.done():
            self.answer.set_result(self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts))

    def fail(self, error: Exception) -> None:
        if not self.answer.done():  # a client that left has cancelled it
            self.answer.set_exception(error)


class Batcher:
    """`batch`: samples a run of the model at most. `turn`: samples a request gets before the next one has its turn.
    `limit`: samples admitted and not yet answered, at most."""

    def __init__(self, *, batch: int = 256, turn: int = 32, limit: int = 4 * 65536) -> None:
        self.batch, self.turn, self.limit = batch, turn, limit
        self.queued = 0  # samples admitted and not yet answered
        self.batches = 0  # runs of a model since the start
        self._rate = 0.0  # samples/s while the device works, smoothed
        self._jobs: deque[_Job] = deque()  # those with samples still to be sealed
        self._open: set[_Job] = set()  # those that somebody waits for
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._running_since: float | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")

    def submit(self, sampler: Sampler, window: Window) -> asyncio.Future[ndarray]:
        """The rows of `window`, or what the sampler raised. Cancelling it drops what has not run yet.

        Raises Overloaded where too many samples wait, Unavailable where none will be answered any more.
        """
        if problem := self.problem():
            raise Unavailable(f"this replica cannot answer: {problem}", expected="a retry, which another replica answers")
        if self.queued + window.count > self.limit:
            wait = str(max(1, math.ceil(self.queued / self._rate)) if self._rate else 1)
            message = f"{self.queued} samples are waiting; {window.count} more exceed the limit of {self.limit}"
            raise Overloaded(
                message,
                field="n",
                value=window.count,
                expected=f"a retry after {wait} s, or a smaller n",
                headers={"Retry-After": wait},
            )
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
            self._loop.add_done_callback(self._abandon)
        job = _Job(sampler, window, asyncio.get_running_loop().create_future())
        job.answer.add_done_callback(lambda _: self._release(job))
        self._jobs.append(job)
        self._open.add(job)
        self.queued += window.count
        self._wake.set()
        return job.answer

    def _release(self, job: _Job) -> None:
        self._open.discard(job)
        self.queued -= job.window.count

    def problem(self) -> str | None:
        """Why no request will be answered any more, or None."""
        if self._loop is not None and self._loop.done():
            return "the batch loop has ended"
        if self._running_since is not None and time.monotonic() - self._running_since > _STALLED_S:
            return f"the device has not answered for {_STALLED_S:.0f} s"
        return None

    async def close(self) -> None:
        """Ends the loop; whoever still waits is told so."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])
        await asyncio.to_thread(self._thread.shutdown)  # waits for the batch that runs

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while pieces := self._seal():
                await self._serve(pieces)

    async def _serve(self, pieces: list[tuple[_Job, Window]]) -> None:
        """Runs one batch and hands out its rows."""
        started = self._running_since = time.monotonic()
        try:
            windows = [window for _, window in pieces]
            rows = await asyncio.get_running_loop().run_in_executor(self._thread, pieces[0][0].sampler.sample, windows)
        except Exception as error:
            if len(pieces) == 1:
                pieces[0][0].fail(error)
            else:  # one request can spoil a batch: each alone, so that only the guilty one fails
                for piece in pieces:
                    await self._serve([piece])
            return
        finally:
            self._running_since = None
        self.batches += 1
        rate = len(rows) / max(time.monotonic() - started, 1e-9)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        start = 0
        for job, window in pieces:
            job.deliver(rows[start : start + window.count])
            start += window.count

    def _abandon(self, loop: asyncio.Task[None]) -> None:
        for job in list(self._open):
            job.fail(Unavailable("this replica stops answering", expected="a retry, which another replica answers"))

    def _seal(self) -> list[tuple[_Job, Window]]:
        """The next batch, all of one sampler; requests that nobody waits for are forgotten."""
        taken: dict[_Job, int] = {}
        others: list[_Job] = []
        room = self.batch
        while self._jobs and room:
            job = self._jobs.popleft()
            if job.answer.done():
                continue
            if taken and job.sampler is not next(iter(taken)).sampler:
                others.append(job)
                continue
            taken[job] = min(self.turn, job.left, room)
            room -= taken[job]
        for job in taken:
            more = min(room, job.left - taken[job])
            taken[job] += more
            room -= more
        self._jobs.extendleft(reversed(others))
        # Who got least comes first next time.
        self._jobs.extend(sorted((job for job in taken if taken[job] < job.left), key=taken.__getitem__))
        pieces = [(job, job.window.part(job.sealed, count)) for job, count in taken.items()]
        for job, count in taken.items():
            job.sealed += count
        return pieces
