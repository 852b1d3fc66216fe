"""Request -> samples, whatever protocol asked: which version answers, from memory or from the device, and who is told.

Clients see one version; the canary answers its share of the requests that name neither seed nor version; the shadow is given
the same latents afterwards, while nobody waits, and only the monitor sees its samples. Knows nothing of HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy import ndarray

from serving.batcher import Batcher, Spare
from serving.errors import NotFound, Overloaded, RolledBack, Unavailable
from serving.logs import AccessLog, Entry
from serving.models import ModelTable
from serving.pool import Pool
from serving.records import SHADOW_ROWS, Origin, Record, is_fresh
from serving.request import SampleRequest, one_of
from serving.sampler import Sampler, Window
from serving.tap import Tap
from serving.tracing import Tracer
from training.registry import RegistryError

_SHADOW_QUEUE = 64  # answers that wait for the shadow; what does not fit is dropped and counted
RERUN = 0.01  # of the rows that the monitor is shown come with their latents
_BUSY_S = 0.05  # between two attempts of a stream to be admitted
_GRACE_S = 15.0  # for those who wait when a replica stops
_LOADS = 2  # versions that no alias names loaded at once, in threads of their own: nobody else waits for one

Wait = Callable[[asyncio.Future[ndarray]], Awaitable[ndarray]]


async def _simply(answer: asyncio.Future[ndarray]) -> ndarray:
    return await answer


class Service:
    """`timeout`: seconds that a request waits for its samples at most. `log`, `tracer`: whom the surfaces tell what they answered."""

    def __init__(
        self, table: ModelTable, batcher: Batcher, tap: Tap, pool: Pool | None = None, timeout: float = 60.0,
        log: AccessLog | None = None, tracer: Tracer | None = None,
    ) -> None:  # fmt: skip
        self.log, self.tracer = log or AccessLog(), tracer
        self.table, self.batcher, self.tap, self.pool, self.timeout = table, batcher, tap, pool or Pool(), timeout
        self._shadows: deque[Spare] = deque()
        self._loader, self._loading = ThreadPoolExecutor(_LOADS, "loader"), dict[tuple[str, str], asyncio.Future[Sampler]]()
        tap.gauges = self._gauges
        batcher.spare = self._spare

    def start(self) -> None:
        """Follow the registry, report to the monitor, draw ahead. Needs a running event loop."""
        loop = asyncio.get_running_loop()
        self.table.changed = lambda: loop.call_soon_threadsafe(self.follow)
        self.batcher.start()
        self.follow()
        self.table.start()
        self.tap.start()
        self.log.start()

    async def close(self) -> None:
        await self.batcher.close(_GRACE_S)
        self._loader.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.table.close)
        await asyncio.to_thread(self.tap.close)
        await asyncio.to_thread(self.log.close)
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    def follow(self) -> None:
        """The table has changed: nothing is kept of a version that clients do not get."""
        self.pool.keep([sampler for model in self.table.models.values() for sampler in model.answering()])
        self.batcher.wake()

    async def find(self, name: str, reference: str | None) -> Sampler:
        """The version of model `name` that `reference`, an alias or a version, names; None is production.

        Raises NotFound with what there is, Unavailable where it exists and cannot be loaded.
        """
        model = self.table.models.get(name)
        if model is None:
            raise NotFound(f"unknown model {name!r}", field="model", value=name, expected=one_of(self.table.models))
        if reference == "":
            versions = [*self.table.registry.versions(name), *model.aliases]
            raise NotFound(f"no version of model {name} is named", field="version", value="", expected=one_of(versions))
        if sampler := model.find(reference or "production"):
            return sampler
        if reference is None and "production" not in model.aliases:
            raise NotFound(
                f"model {name} has no production version",
                field="model",
                value=name,
                expected="a model with one; promote a version first",
            )
        try:
            version = await asyncio.to_thread(self.table.registry.resolve, name, reference or "production")
            if sampler := self.table.loaded(name, version):
                return sampler
            return await asyncio.shield(self._load(name, version))  # others may wait for it, too
        except RegistryError as error:
            versions = [*self.table.registry.versions(name), *model.aliases]
            raise NotFound(str(error), field="version", value=reference, expected=one_of(versions)) from None
        except Exception as error:
            raise Unavailable(
                f"model {name}: {error}",
                field="version",
                value=reference,
                expected="a version that loads; publish it again or roll back",
            ) from error

    def _load(self, name: str, version: str) -> asyncio.Future[Sampler]:
        """The loading of a version, which goes on where it has begun."""
        key = name, version

        def over(done: asyncio.Future[Sampler]) -> None:
            del self._loading[key]
            _ = done.cancelled() or done.exception()  # whoever waited may have left: nobody need look

        if key not in self._loading:
            self._loading[key] = asyncio.get_running_loop().run_in_executor(self._loader, self.table.load, name, version)
            self._loading[key].add_done_callback(over)
        return self._loading[key]

    def is_rolled_back(self, sampler: Sampler, reference: str | None) -> bool:
        """Whether `sampler`, found for `reference`, must not answer any more. To be asked last, when nothing but sending is left."""
        model, version = self.table.models.get(sampler.card.model), sampler.card.version
        if model is None or version not in model.withdrawn or reference == version:
            return False
        return sampler not in model.serving.values()  # where what was gone back to cannot be loaded, it goes on serving

    def divert(self, sampler: Sampler, request: SampleRequest) -> Sampler:
        """`sampler`, or the canary for its share of the requests. A seed keeps its samples: requests with one stay."""
        model = self.table.models.get(sampler.card.model)
        canary = model and model.serving.get("canary")
        if not canary or request.origin != "server_seed" or random.random() >= model.share or not _alike(canary, sampler):
            return sampler
        return canary

    async def draw(
        self, sampler: Sampler, request: SampleRequest, *, origin: Origin, timeout: float | None = None, wait: Wait = _simply
    ) -> tuple[Window, ndarray]:
        """The window that answers `request` and its samples, in served form. `wait` awaits the batcher's future."""
        if request.anywhere and (found := self.pool.take(sampler, request.window.count)):
            if self.pool.has_room(sampler):
                self.batcher.wake()
            self._tell(sampler, origin, *found)
            return found
        window, patience = request.window, self.timeout if timeout is None else min(timeout, self.timeout)
        samples = await wait(self.batcher.submit(sampler, window, patience))
        self._tell(sampler, origin, window, samples)
        window.fed.clear()  # a view of a whole batch, which a client that reads slowly would hold
        return window, samples

    async def stream(
        self, sampler: Sampler, request: SampleRequest, rows: int, *, reference: str | None, timeout: float | None = None, wait: Wait = _simply
    ) -> AsyncIterator[ndarray]:
        """The samples of `request` in pieces of `rows`; each is drawn while the one before is sent, so two are held at most.

        Raises Overloaded and DeadlineExceeded (after `timeout` seconds) before the first piece only: a stream that has begun waits
        for its turn. Raises RolledBack as soon as `sampler`, found for `reference`, is rolled back.
        """
        whole = request.window
        parts = (_alone(whole.part(at, min(rows, whole.count - at))) for at in range(0, whole.count, rows))
        part = next(parts)
        drawing = self.batcher.submit(sampler, part, self.timeout if timeout is None else min(timeout, self.timeout))
        try:
            while part is not None:
                samples = await wait(drawing)
                if self.is_rolled_back(sampler, reference):
                    about = f"{sampler.card.version} of model {sampler.card.model} was rolled back"
                    raise RolledBack(about, field="version", value=sampler.card.version, expected="a request anew, which its successor answers")
                done, part = part, next(parts, None)
                if part is not None:
                    drawing = await self._admitted(sampler, part)
                self._tell(sampler, request.origin, done, samples)
                done.fed.clear()
                yield samples
        finally:
            drawing.cancel()

    async def _admitted(self, sampler: Sampler, window: Window) -> asyncio.Future[ndarray]:
        while True:
            try:
                return self.batcher.submit(sampler, window)
            except Overloaded:
                await asyncio.sleep(_BUSY_S)

    def _tell(self, sampler: Sampler, origin: Origin, window: Window, samples: ndarray) -> None:
        card = sampler.card
        shown = self.tap.wanted(card.model, window.count, fresh=is_fresh(origin, window.truncation, window.label))
        if shown:
            self.tap.offer(_record(sampler, origin, window.part(0, shown), samples))
        self.tap.counters[f'samples_total{{model="{card.model}",version="{card.version}"}}'] += window.count
        model = self.table.models.get(card.model)
        shadow = model and model.serving.get("shadow")
        if not shadow or not shown or model.serving.get("production") is not sampler or not _alike(shadow, sampler):
            return
        if window.z is not None and shadow.card.latent != card.latent:
            return
        part = _alone(window.part(0, min(shown, SHADOW_ROWS)))  # the monitor compares what it is shown of both

        def compare(rows: ndarray | None) -> None:
            if rows is not None:
                self.tap.offer(_record(shadow, origin, part, rows))
                self.tap.counters[f'shadow_samples_total{{model="{card.model}",version="{shadow.card.version}"}}'] += part.count

        if len(self._shadows) == _SHADOW_QUEUE:
            dropped = self._shadows.popleft()
            self.tap.counters[f'shadow_dropped_samples_total{{model="{dropped.sampler.card.model}"}}'] += dropped.window.count
        self._shadows.append(Spare(shadow, part, compare))

    def _spare(self) -> Spare | None:
        return self._shadows.popleft() if self._shadows else self.pool.want()

    def _gauges(self) -> dict[str, int | float]:
        """What the replica counts apart from requests, for the heartbeat. Zeros too: a rate needs the first of its counter."""
        gauges: dict[str, int | float] = {
            "queued_samples": self.batcher.queued,
            "oldest_wait_seconds": self.batcher.oldest_wait,
            "batches_total": self.batcher.batches,
            "batched_samples_total": self.batcher.batched,
            "access_log_dropped_total": self.log.dropped,
            "slow_readers_total": self.tap.counters["slow_readers_total"],
        }
        if self.tracer is not None:
            gauges |= {f"trace_spans_{what}_total": count for what, count in self.tracer.counts.items()}
        for name, model in self.table.models.items():
            gauges[f'load_failures_total{{model="{name}"}}'] = self.table.load_failures[name]
            dropped = f'tap_dropped_samples_total{{model="{name}"}}'
            gauges[dropped] = self.tap.counters[dropped]
            if self.pool.rows:
                gauges[f'pool_hits_total{{model="{name}"}}'] = self.pool.hits[name]
                for sampler in model.answering():
                    gauges[f'pool_samples{{model="{name}",version="{sampler.card.version}"}}'] = self.pool.left(sampler)
            for sampler in model.serving.values():
                gauges[f'device_info{{provider="{sampler.provider}"}}'] = 1.0
                gauges[f'cuda_graph_fallbacks{{model="{name}",version="{sampler.card.version}"}}'] = int(sampler.lost_graphs)
        return gauges


def note(entry: Entry, sampler: Sampler, window: Window) -> None:
    """Write down what is asked of whom."""
    entry.model, entry.version, entry.n, entry.seed = sampler.card.model, sampler.card.version, window.count, window.seed


def _alike(one: Sampler, other: Sampler) -> bool:
    """Whether a client could not tell which of two versions answered but by its samples."""
    return all(getattr(one.card, name) == getattr(other.card, name) for name in ("sample_shape", "sample_dtype", "classes"))


def _alone(part: Window) -> Window:
    """`part` with notes of its own, as another sampler runs it or while another part still runs."""
    return replace(part, fed=[])


def _record(sampler: Sampler, origin: Origin, window: Window, samples: ndarray) -> Record:
    """Of the rows of `window`, the first of `samples`, copied: a view would keep the whole batch."""
    card, rows, latents = sampler.card, samples[: window.count].copy(), {}
    for row in range(window.count):
        if random.random() < RERUN:
            latents |= {row: z[window.offset + row - start] for start, z in window.fed if 0 <= window.offset + row - start < len(z)}
    z = np.stack([*latents.values()]) if latents else None
    return Record(card.model, card.version, origin, window.seed, window.offset, rows, time.time(), window.label, window.truncation, tuple(latents), z)
