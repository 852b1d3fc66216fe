"""Requests may be cut, mixed, cancelled and fail in any order: each answer depends on its own window alone, and comes."""

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.batcher import Batcher
from serving.errors import Overloaded, Unavailable
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


@settings(max_examples=40, deadline=None)
@given(st.lists(request, min_size=1, max_size=12), st.integers(1, 64), st.integers(1, 16))
def test_answers_depend_on_nothing_but_the_window(samplers, requests, batch, turn):
    faulty = {name: Faulty(sampler) for name, sampler in samplers.items()}

    async def ask(batcher, name, seed, offset, count, leaves):
        work = batcher.submit(faulty[name], Window(seed, offset, count))
        if leaves:
            await asyncio.sleep(0)
            work.cancel()
        return await work

    async def scene():
        async with closing(Batcher(batch=batch, turn=turn)) as batcher:
            answers = await asyncio.wait_for(asyncio.gather(*(ask(batcher, *r) for r in requests), return_exceptions=True), 20)
            assert batcher.queued == 0
            assert batcher.problem() is None
            return answers

    for (name, seed, offset, count, leaves), answer in zip(requests, asyncio.run(scene()), strict=True):
        if leaves:
            assert isinstance(answer, asyncio.CancelledError)
        elif seed == POISON:
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
