"""Requests may be cut, mixed, cancelled and fail in any order: each answer depends on its own window alone, and comes."""

import asyncio
import sys
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.batcher import Batcher, Spare
from serving.errors import DeadlineExceeded, Overloaded, Unavailable
from serving.sampler import Sampler, Window

POISON = 666  # a seed on which the faulty sampler fails


class Faulty(Sampler):
    """A sampler that fails on one seed, whatever else is in the batch."""

    def __init__(self, sampler: Sampler) -> None:
        self.__dict__.update(sampler.__dict__)

    def sample(self, windows):
        if any(window.seed == POISON for window in windows):
            raise ArithmeticError("poisoned")
        return super().sample(windows)


class Gated(Sampler):
    """A sampler that waits for a gate, and notes the batches it is given."""

    def __init__(self, sampler: Sampler) -> None:
        self.__dict__.update(sampler.__dict__)
        self.gate, self.entered, self.batches = threading.Event(), threading.Event(), []
        self._pace = 1.0

    def sample(self, windows):
        self.batches.append([(window.seed, window.count) for window in windows])
        self.entered.set()
        assert self.gate.wait(10)
        return super().sample(windows)


@asynccontextmanager
async def closing(batcher: Batcher):
    try:
        yield batcher
    finally:
        await batcher.close()


request = st.tuples(
    st.sampled_from(["digits", "ring", "clothes"]),
    st.sampled_from([1, 2, 3, POISON]),
    st.integers(0, 50),
    st.integers(1, 40),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(request, min_size=1, max_size=12), st.integers(1, 64), st.integers(1, 16), st.integers(1, 3), st.booleans())
def test_answers_depend_on_nothing_but_the_window(samplers, requests, batch, turn, lanes, threads):
    faulty = {name: Faulty(sampler) for name, sampler in samplers.items()}
    for sampler in faulty.values():
        sampler._pace = 1.0 if threads else 0.0  # batches run in threads, or in the event loop

    async def ask(batcher, name, seed, offset, count, leaves):
        work = batcher.submit(faulty[name], Window(seed, offset, count))
        if leaves:
            await asyncio.sleep(0)
            work.cancel()
        return await work

    async def scene():
        async with closing(Batcher(batch=batch, turn=turn, lanes=lanes)) as batcher:
            answers = await asyncio.wait_for(asyncio.gather(*(ask(batcher, *r) for r in requests), return_exceptions=True), 20)
            assert batcher.queued == batcher.queued_bytes == 0
            assert batcher.oldest_wait == 0
            assert batcher.problem() is None
            return answers

    for (name, seed, offset, count, leaves), answer in zip(requests, asyncio.run(scene()), strict=True):
        if leaves and isinstance(answer, asyncio.CancelledError):
            continue  # who leaves too late is answered
        if seed == POISON:
            assert isinstance(answer, ArithmeticError)
        else:
            np.testing.assert_array_equal(answer, samplers[name].sample([Window(seed, offset, count)]))


def test_a_batch_is_sealed_when_the_device_is_free_and_small_requests_pass_large_ones(samplers):
    gated = Gated(samplers["digits"])

    async def scene():
        async with closing(Batcher(batch=16, turn=4)) as batcher:
            large = batcher.submit(gated, Window(0, 0, 1000))
            await asyncio.to_thread(gated.entered.wait)
            small = [batcher.submit(gated, Window(seed, 0, 1)) for seed in (1, 2, 3)]
            await asyncio.sleep(0)
            gated.gate.set()
            await asyncio.gather(*small)
            assert not large.done()
            assert gated.batches[:2] == [[(0, 16)], [(0, 13), (1, 1), (2, 1), (3, 1)]]
            large.cancel()

    asyncio.run(scene())


def test_a_full_queue_is_refused_with_the_time_it_takes(samplers):
    gated = Gated(samplers["digits"])

    async def scene():
        async with closing(Batcher(batch=8, limit=100)) as batcher:
            batcher._rate = 20.0
            first = batcher.submit(gated, Window(0, 0, 90))
            await asyncio.to_thread(gated.entered.wait)
            with pytest.raises(Overloaded, match="90 samples are waiting; 11 more exceed the limit of 100") as refused:
                await batcher.submit(gated, Window(1, 0, 11))
            assert refused.value.headers == {"Retry-After": "5"}  # 90 samples at 20 a second, rounded up
            second = batcher.submit(gated, Window(1, 0, 10))
            gated.gate.set()
            assert [len(rows) for rows in await asyncio.gather(first, second)] == [90, 10]

    asyncio.run(scene())


def test_nobody_waits_for_a_batcher_that_has_ended(samplers):
    gated = Gated(samplers["digits"])

    async def scene():
        batcher = Batcher()
        waiting = batcher.submit(gated, Window(0, 0, 1))
        await asyncio.to_thread(gated.entered.wait)
        asyncio.get_running_loop().call_later(0.05, gated.gate.set)
        await batcher.close()
        with pytest.raises(Unavailable, match="stops answering"):
            await waiting
        with pytest.raises(Unavailable, match="the batch loop has ended"):
            await batcher.submit(gated, Window(0, 0, 1))

    asyncio.run(scene())


def test_a_device_that_does_not_answer_is_noticed(samplers, monkeypatch):
    gated = Gated(samplers["digits"])
    monkeypatch.setattr("serving.batcher._STALLED_S", 0.0)

    async def scene():
        async with closing(Batcher()) as batcher:
            waiting = batcher.submit(gated, Window(0, 0, 1))
            await asyncio.to_thread(gated.entered.wait)
            assert "the device has not answered" in (batcher.problem() or "")
            gated.gate.set()
            await waiting
            assert batcher.problem() is None

    asyncio.run(scene())


class Counting(Sampler):
    """A sampler that counts its runs, those of each thread, and the rows of all."""

    def __init__(self, sampler: Sampler) -> None:
        self.__dict__.update(sampler.__dict__)
        self.runs, self.rows, self.batch = Counter(), 0, 256

    def sample(self, windows):
        self.runs[threading.current_thread().name] += 1
        self.rows += sum(window.count for window in windows)
        return super().sample(windows)


def test_a_run_that_takes_long_whatever_its_rows_leaves_the_event_loop_alone(registry):
    """With fixed shapes one row costs a whole run: so it is not its share of one that decides where it is computed."""
    sampler = Counting(Sampler(registry.open("ring"), "cpu", deterministic=True))
    sampler._times = {256: 1e-3}
    assert [sampler.seconds(rows) for rows in (1, 256, 257)] == pytest.approx([1e-3, 1e-3, 2e-3])

    async def scene():
        async with closing(Batcher()) as batcher:
            await batcher.submit(sampler, Window(1, 0, 1))
            sampler._times = {256: 1e-6}
            await batcher.submit(sampler, Window(1, 0, 1))

    asyncio.run(scene())
    assert list(sampler.runs) == ["sampler_0", "MainThread"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 4), st.sampled_from([(1, 0.0), (1, 1.0), (2, 1.0)]))
def test_beside_a_large_request_a_small_one_waits_for_three_batches_at_most(samplers, pauses, large, how):
    """`pauses`: turns of the event loop between two requests of one sample, beside `large` requests of 200,000. `how`: lanes, and
    whether batches run in threads. Two lanes run two batches in the time of one, and any number of smaller ones beside one."""
    lanes, pace = how

    async def small(batcher, counting, seed):
        before = counting.rows
        await batcher.submit(counting, Window(seed, 0, 1))
        return (counting.rows - before) / counting.batch

    async def scene():
        counting = Counting(samplers["ring"])
        counting._pace = pace
        async with closing(Batcher(limit=1 << 20, lanes=lanes)) as batcher:
            endless = [batcher.submit(counting, Window(seed, 0, 200_000)) for seed in range(large)]
            waits = []
            for seed, pause in enumerate(pauses):
                waits.append(asyncio.ensure_future(small(batcher, counting, seed)))
                for _ in range(pause):
                    await asyncio.sleep(0)
            for work in endless:
                assert not work.done()
            counts = await asyncio.gather(*waits)
            for work in endless:
                work.cancel()
            return counts

    assert max(asyncio.run(scene())) <= 3 * lanes


@pytest.mark.parametrize("count", [40, 500])
def test_a_large_request_is_answered_beside_any_number_of_small_ones(samplers, count):
    """Two models under a flood that fills every batch: whoever has waited longest has its turn."""

    async def flood(batcher, sampler):
        while True:
            await batcher.submit(sampler, Window(1, 0, 8))

    async def scene():
        async with closing(Batcher(batch=64, turn=32)) as batcher:
            floods = [asyncio.ensure_future(flood(batcher, samplers[name])) for name in ("ring", "digits") for _ in range(12)]
            await asyncio.sleep(0)
            rows = await asyncio.wait_for(batcher.submit(samplers["ring"], Window(5, 0, count)), 60)
            for work in floods:
                work.cancel()
            return rows

    np.testing.assert_array_equal(asyncio.run(scene()), samplers["ring"].sample([Window(5, 0, count)]))


def test_what_hangs_a_naive_batch_loop_for_good(samplers):
    """A request whose size cannot be told, and a cancelled one larger than a batch: the next one is answered."""

    class Sizeless(Window):
        @property
        def z(self):
            raise TypeError("no size")

        @z.setter
        def z(self, value):
            pass

    gated = Gated(samplers["digits"])

    async def scene():
        async with closing(Batcher(batch=16)) as batcher:
            running = batcher.submit(gated, Window(0, 0, 1))
            await asyncio.to_thread(gated.entered.wait)
            sizeless = batcher.submit(gated, Sizeless(1, 0, 3))
            oversized = batcher.submit(gated, Window(2, 0, 1000))
            oversized.cancel()
            after = batcher.submit(gated, Window(3, 0, 2))
            gated.gate.set()
            assert len(await running) == 1
            with pytest.raises(TypeError, match="no size"):
                await sizeless
            assert len(await after) == 2
            assert len(await batcher.submit(gated, Window(4, 0, 40))) == 40
            assert batcher.problem() is None

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_who_waits_too_long_is_told_so_and_is_not_computed(samplers):
    gated = Gated(samplers["digits"])

    async def scene():
        async with closing(Batcher()) as batcher:
            first = batcher.submit(gated, Window(0, 0, 1), timeout=60.0)
            await asyncio.to_thread(gated.entered.wait)
            with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.01 s"):
                await batcher.submit(gated, Window(1, 0, 1), timeout=0.01)
            assert batcher.queued == 1
            gated.gate.set()
            await first
            await batcher.submit(gated, Window(2, 0, 1))
            assert gated.batches == [[(0, 1)], [(2, 1)]]

    asyncio.run(scene())


def test_the_size_of_the_answers_is_limited_too(samplers):
    async def scene():
        async with closing(Batcher(limit_bytes=64 * 10)) as batcher:
            with pytest.raises(Overloaded, match="11 more exceed the limit of 640 bytes"):
                await batcher.submit(samplers["digits"], Window(0, 0, 11))
            assert len(await batcher.submit(samplers["digits"], Window(0, 0, 10))) == 10
            assert len(await batcher.submit(samplers["ring"], Window(0, 0, 80))) == 80

    asyncio.run(scene())


def test_a_batcher_that_stops_answers_those_who_wait_and_admits_nobody(samplers):
    gated = Gated(samplers["digits"])

    async def scene():
        batcher = Batcher(batch=8)
        waiting = batcher.submit(gated, Window(0, 0, 30))
        await asyncio.to_thread(gated.entered.wait)
        closing = asyncio.ensure_future(batcher.close(grace=20))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="it is stopping"):
            await batcher.submit(gated, Window(1, 0, 1))
        gated.gate.set()
        assert len(await waiting) == 30
        await closing

    asyncio.run(scene())


def test_two_lanes_keep_two_batches_on_the_device(samplers):
    gated = Gated(samplers["digits"])

    async def scene():
        async with closing(Batcher(batch=4, lanes=2)) as batcher:
            work = batcher.submit(gated, Window(0, 0, 10))
            while len(gated.batches) < 2:
                await asyncio.sleep(0.001)
            assert gated.batches == [[(0, 4)], [(0, 4)]]
            gated.gate.set()
            np.testing.assert_array_equal(await work, samplers["digits"].sample([Window(0, 0, 10)]))

    asyncio.run(scene())


def test_all_lanes_but_one_are_kept_for_small_requests_while_they_come(samplers, monkeypatch):
    async def scene():
        async with closing(Batcher(batch=64, turn=16, lanes=2)) as batcher:
            sampler, now = samplers["digits"], time.monotonic()
            monkeypatch.setattr("serving.batcher.time.monotonic", lambda: now)
            large = batcher.submit(sampler, Window(1, 0, 1000))
            sealed = [batcher._seal(1)]
            small = [batcher.submit(sampler, Window(seed, 0, 20)) for seed in (2, 3)]
            sealed += [batcher._seal(1), batcher._seal(1), batcher._seal(0)]
            now += 0.9
            sealed.append(batcher._seal(1))
            now += 0.2
            sealed.append(batcher._seal(1))
            for answer in (large, *small):
                answer.cancel()
            return [[(piece.window.seed, piece.count) for piece in pieces] for pieces in sealed]

    assert asyncio.run(scene()) == [[(1, 64)], [(2, 20), (3, 20)], [], [(1, 64)], [], [(1, 64)]]


def test_spare_work_is_done_only_while_nobody_waits_and_its_failure_harms_nobody(samplers):
    gated, events = Gated(samplers["digits"]), []
    spare = [
        Spare(Faulty(samplers["digits"]), Window(POISON, 0, 2), lambda rows: events.append(("failed", rows))),
        Spare(samplers["ring"], Window(5, 0, 3), lambda rows: events.append(("drawn", len(rows)))),
    ]

    async def scene():
        async with closing(Batcher()) as batcher:
            waiting = [batcher.submit(gated, Window(seed, 0, 1)) for seed in (0, 1)]
            batcher.spare = lambda: spare.pop() if spare else None
            for work in waiting:
                work.add_done_callback(lambda _: events.append("answered"))
            gated.gate.set()
            await asyncio.gather(*waiting)
            while len(events) < 4:
                await asyncio.sleep(0.001)
            assert len(await batcher.submit(gated, Window(2, 0, 1))) == 1

    asyncio.run(scene())
    assert events == ["answered", "answered", ("drawn", 3), ("failed", None)]


def test_another_thread_asks_for_the_oldest_wait_while_requests_come_and_go(samplers):
    async def scene():
        async with closing(Batcher()) as batcher:
            over = threading.Event()

            def ask():
                while not over.is_set():
                    assert batcher.oldest_wait >= 0

            asking = asyncio.create_task(asyncio.to_thread(ask))
            for _ in range(300):
                batcher.submit(samplers["ring"], Window(1, 0, 1)).cancel()
                await asyncio.sleep(0)
            over.set()
            await asking

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asyncio.run(scene())
    finally:
        sys.setswitchinterval(interval)
