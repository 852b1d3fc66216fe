"""Which version answers and from where: the pool, the canary and the shadow, under promotions and rollbacks."""

import asyncio
import io
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.pool import Pool
from serving.request import SampleRequest
from serving.sampler import Sampler, Window
from tests.serving.conftest import connect, publish, running
from training.registry import RegistryError

DIGITS, NPY = "/v1/models/digits/sample", {"Accept": "application/x-npy"}


@asynccontextmanager
async def started(registry, **options):
    """(app, client) with what the lifespan starts, but for the thread that empties the tap: `shown` looks into it."""
    async with running(registry, **options) as app, connect(app) as client:
        app.service.tap.start = lambda: None
        app.service.start()
        try:
            yield app, client
        finally:
            await app.service.close()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def rows(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def window(answer) -> tuple[str, int, int]:
    return answer.headers["x-ganwatch-version"], int(answer.headers["x-ganwatch-seed"]), int(answer.headers["x-ganwatch-offset"])


def shown(app) -> list:
    """The records that wait in the tap."""
    return list(app.service.tap._ring)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=60), st.sampled_from([256, 512, 1000]))
def test_the_pool_gives_each_row_once_and_is_what_the_seed_says(samplers, counts, capacity):
    pool, sampler, given_out = Pool(capacity), samplers["clothes"], set()
    pool.keep([sampler])
    for count in counts:
        while spare := pool.want():
            spare.done(sampler.sample([spare.window]))
        assert pool.left(sampler) <= capacity
        found = pool.take(sampler, count)
        if capacity >= 512:  # then a whole block is always there
            assert (found is None) == (count > 64)
        if found:
            window, samples = found
            assert len(samples) == window.count == count
            np.testing.assert_array_equal(samples, sampler.sample([window]))
            fresh = {(window.seed, window.offset + i) for i in range(count)}
            assert not fresh & given_out
            given_out |= fresh


def test_the_pool_is_bounded_in_bytes_and_gives_up_on_a_sampler_that_fails(samplers):
    pool = Pool(1 << 20, limit_bytes=256 * 128 * 3)  # three blocks of 8x8 bytes and 16 latents
    pool.keep([samplers["digits"]])
    for _ in range(3):
        spare = pool.want()
        assert pool.want() is None  # one block at a time
        spare.done(samplers["digits"].sample([spare.window]))
    assert pool.want() is None
    assert pool.bytes == 256 * 128 * 3
    pool.keep([samplers["ring"]])
    assert pool.bytes == 0
    pool.want().done(None)
    assert pool.want() is None


def test_only_small_requests_that_leave_all_to_the_server_are_answered_from_memory(registry, samplers):
    async def scene():
        async with started(registry, pool=Pool(512), tap_url="http://127.0.0.1:9") as (app, client):
            service, sampler = app.service, app.service.table.models["digits"].serving["production"]
            await until(lambda: service.pool.left(sampler) == 512)
            before = shown(app)
            pooled = [await client.post(DIGITS, json={"n": n}, headers=NPY) for n in (1, 5, 64)]
            assert service.pool.hits["digits"] == 3
            for body in ({"n": 65}, {"seed": 3}, {"offset": 0}, {"truncation": 0.5}, {"interpolate": [1, 2]}):
                answer = await client.post(DIGITS, json=body, headers=NPY)
                if "seed" in body:
                    np.testing.assert_array_equal(rows(answer), samplers["digits"].sample([Window(3, 0, 1)]))
            assert service.pool.hits["digits"] == 3
            gauges = service._gauges()
            assert gauges['pool_hits_total{model="digits"}'] == 3
            assert gauges['pool_samples{model="digits",version="v1"}'] > 0
            return before, pooled, shown(app)

    before, pooled, records = asyncio.run(scene())
    assert before == []  # what is drawn ahead is told when it is served
    seeds = {window(answer)[1] for answer in pooled}
    assert len(seeds) == 1
    assert [window(answer)[2] for answer in pooled] == [0, 1, 6]
    for answer, record in zip(pooled, records, strict=False):
        version, seed, offset = window(answer)
        np.testing.assert_array_equal(rows(answer), samplers["digits"].sample([Window(seed, offset, len(rows(answer)))]))
        np.testing.assert_array_equal(record.samples, rows(answer))
        assert (record.version, record.seed, record.offset, record.origin, record.is_fresh) == (version, seed, offset, "server_seed", True)


def test_a_rollback_empties_the_pool_at_once(registry):
    publish(registry, "digits", shift=3.0)

    async def scene():
        async with started(registry, pool=Pool(512)) as (app, client):
            service = app.service
            sampler = service.table.models["digits"].serving["production"]
            await until(lambda: service.pool.left(sampler) == 512)
            assert window(await client.post(DIGITS, json={}))[0] == "v2"
            await asyncio.to_thread(registry.rollback, "digits")
            await asyncio.to_thread(service.table.refresh)
            versions = {window(await client.post(DIGITS, json={}))[0] for _ in range(20)}
            assert service.pool.left(sampler) == 0
            before = service.table.models["digits"].serving["production"]
            await until(lambda: service.pool.left(before) > 200)
            hits = service.pool.hits["digits"]
            versions.add(window(await client.post(DIGITS, json={}))[0])
            assert service.pool.hits["digits"] == hits + 1
            return versions

    assert asyncio.run(scene()) == {"v1"}


def test_what_is_under_way_when_its_version_is_rolled_back_is_drawn_anew(registry):
    """Neither a batch that runs then, nor a body that comes slowly, is answered by what was rolled back; who names it has it."""
    publish(registry, "digits", shift=3.0)

    class Held(Sampler):
        def __init__(self, sampler):
            self.__dict__.update(sampler.__dict__)
            self.gate, self.entered, self._pace = threading.Event(), threading.Event(), 1.0

        def sample(self, windows):
            self.entered.set()
            assert self.gate.wait(60)
            return super().sample(windows)

    async def scene():
        async with running(registry) as app, connect(app) as client:
            table, come = app.service.table, asyncio.Event()
            held = Held(table.models["digits"].serving["production"])
            table.models["digits"].serving["production"] = held

            async def slowly():
                yield b'{"seed": 7, '
                await come.wait()
                yield b'"n": 3}'

            z = held.card.latents(seed=7, count=3)
            tensors = {"inputs": [{"name": "z", "datatype": "FP32", "shape": [3, 16], "data": z.tolist()}]}
            asked = [
                client.post(DIGITS, json={"n": 3, "seed": 7}, headers=NPY),
                client.post(DIGITS, json={"n": 3, "seed": 7, "stream": True}, headers=NPY),
                client.post("/v1/models/digits/versions/production/sample", json={"n": 3, "seed": 7}, headers=NPY),
                client.post(DIGITS, content=slowly(), headers=NPY),
                client.post("/v2/models/digits/infer", json=tensors),
                client.post("/v1/models/digits/versions/v2/sample", json={"n": 3, "seed": 7}, headers=NPY),
            ]
            asked = [asyncio.ensure_future(each) for each in asked]
            await asyncio.to_thread(held.entered.wait, 60)
            await until(lambda: app.service.batcher.queued == 3 * 5)
            await asyncio.to_thread(registry.rollback, "digits")
            await asyncio.to_thread(table.refresh)
            held.gate.set()
            come.set()
            return await asyncio.gather(*asked), table.models["digits"].serving["production"], held

    (*others, tensor, named), back, held = asyncio.run(scene())
    expected = back.sample([Window(7, 0, 3)])
    for answer in others:
        assert window(answer)[0] == "v1"
        np.testing.assert_array_equal(rows(answer), expected)
    assert tensor.json()["model_version"] == "v1"
    np.testing.assert_array_equal(tensor.json()["outputs"][0]["data"], expected.ravel())
    assert window(named)[0] == "v2"
    np.testing.assert_array_equal(rows(named), held.sample([Window(7, 0, 3)]))


def test_where_what_was_gone_back_to_cannot_be_loaded_what_serves_goes_on(registry):
    publish(registry, "digits", shift=3.0)

    async def scene():
        async with running(registry) as app, connect(app) as client:
            registry.rollback("digits")
            (registry.root / "digits" / "v1" / "model.onnx").write_bytes(b"nonsense")
            app.service.table.refresh()
            assert "v1" in app.service.table.models["digits"].errors["production"]
            async with asyncio.timeout(10):
                return [window(await client.post(DIGITS, json=body, headers=NPY))[0] for body in ({}, {"n": 3, "stream": True})]

    assert asyncio.run(scene()) == ["v2", "v2"]


def test_the_canary_answers_its_share_of_what_names_neither_seed_nor_version(registry):
    publish(registry, "digits", shift=3.0, promote=False)
    registry.set_alias("digits", "canary", "v2", reason="test", share=0.5)

    async def scene():
        async with started(registry, pool=Pool(256), tap_url="http://127.0.0.1:9") as (app, client):

            async def versions(body, path=DIGITS, count=60):
                return [window(await client.post(path, json=body, headers=NPY))[0] for _ in range(count)]

            free = await versions({})
            seeded = await versions({"seed": 1}, count=10)
            named = await versions({}, "/v1/models/digits/versions/production/sample", 10)
            billed = {record.version for record in shown(app) if record.origin == "server_seed"}
            registry.set_alias("digits", "canary", None, reason="test")
            await asyncio.to_thread(app.service.table.refresh)
            return free, seeded, named, billed, await versions({}, count=20)

    free, seeded, named, billed, after = asyncio.run(scene())
    assert 8 < free.count("v2") < 52  # a fair coin fails this once in 10^8
    assert billed == {"v1", "v2"}
    assert {*seeded, *named, *after} == {"v1"}


def test_a_canary_that_gives_other_shapes_gets_nothing(registry):
    publish(registry, "digits", shape=(4, 4, 1), promote=False)
    registry.set_alias("digits", "canary", "v2", reason="test", share=1.0)

    async def scene():
        async with started(registry) as (_, client):
            return [window(await client.post(DIGITS, json={}))[0] for _ in range(5)]

    assert set(asyncio.run(scene())) == {"v1"}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_outside_their_range_are_refused(registry, share):
    with pytest.raises(RegistryError, match="share is"):
        registry.set_alias("digits", "canary", "v1", reason="test", share=share)
    with pytest.raises(RegistryError, match="only a canary"):
        registry.set_alias("digits", "shadow", "v1", reason="test", share=0.5)


def test_the_shadow_gets_the_same_latents_and_is_told_to_the_monitor_only(registry):
    publish(registry, "digits", shift=3.0, promote=False)
    registry.set_alias("digits", "shadow", "v2", reason="test")

    async def scene():
        async with started(registry, pool=Pool(256), tap_url="http://127.0.0.1:9") as (app, client):
            answers = [await client.post(DIGITS, json=body, headers=NPY) for body in ({"n": 3}, {"n": 100, "seed": 7})]
            await client.post("/v1/models/digits/versions/v2/sample", json={})  # not production: no shadow
            counted = 'shadow_samples_total{model="digits",version="v2"}'
            await until(lambda: app.service.tap.counters[counted] == 67)
            return answers, [record for record in shown(app) if record.version == "v2" and len(record.samples) > 1]

    answers, shadowed = asyncio.run(scene())
    assert {window(answer)[0] for answer in answers} == {"v1"}
    shadow = Sampler(registry.open("digits", "v2"), "cpu")
    for answer, record in zip(answers, shadowed, strict=True):
        _, seed, offset = window(answer)
        assert (record.seed, record.offset, len(record.samples)) == (seed, offset, min(64, len(rows(answer))))
        np.testing.assert_array_equal(record.samples, shadow.sample([Window(seed, offset, len(record.samples))]))


def test_a_shadow_that_cannot_keep_up_is_dropped_and_counted(registry, samplers):
    publish(registry, "digits", promote=False)
    registry.set_alias("digits", "shadow", "v2", reason="test")

    async def scene():
        async with running(registry, tap_url="http://127.0.0.1:9") as app:
            production = app.service.table.models["digits"].serving["production"]
            samples = production.sample([Window(1, 0, 2)])
            for _ in range(100):
                app.service._tell(production, "client_seed", Window(1, 0, 2), samples)
            return app.service.tap.counters['shadow_dropped_samples_total{model="digits"}'], len(app.service._shadows)

    assert asyncio.run(scene()) == (72, 64)


def test_a_shadow_draws_what_the_monitor_is_shown(registry):
    publish(registry, "digits", promote=False)
    registry.set_alias("digits", "shadow", "v2", reason="test")

    async def scene():
        async with running(registry, tap_url="http://127.0.0.1:9") as app:
            service = app.service
            production = service.table.models["digits"].serving["production"]
            window = Window(1, 0, 100)
            samples = production.sample([window])
            for tokens in (1000, 0):
                service.tap._budgets[False]._tokens = tokens
                service._tell(production, "client_seed", window, samples)
            return [(spare.window.offset, spare.window.count) for spare in service._shadows], shown(app)

    shadows, records = asyncio.run(scene())
    assert shadows == [(0, 64)]
    assert [len(record.samples) for record in records] == [100] and records[0].samples.base is None


def test_what_is_answered_keeps_no_latents(registry):
    async def scene():
        async with started(registry, tap_url="http://127.0.0.1:9") as (app, _):
            sampler = app.service.table.models["digits"].serving["production"]
            window, rows = await app.service.draw(sampler, SampleRequest(Window(1, 0, 100), "client_seed"), origin="client_seed")
            return window.fed, len(rows)

    assert asyncio.run(scene()) == ([], 100)


def test_records_carry_the_latents_that_the_model_was_fed(registry, monkeypatch):
    """From batches, the pool, pieces of a stream, the shadow and from clients: of the very rows that the record holds."""
    publish(registry, "digits", shift=3.0, promote=False)
    registry.set_alias("digits", "shadow", "v2", reason="test")
    monkeypatch.setattr("serving.service.RERUN", 1.0)  # every row
    z = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    bodies = ({"n": 3}, {"n": 5}, {"n": 100, "seed": 7, "offset": 9}, {"n": 40, "truncation": 0.5}, {"z": z.tolist()}, {"n": 7000, "seed": 1})

    async def scene():
        async with started(registry, pool=Pool(256), tap_url="http://127.0.0.1:9") as (app, client):
            await until(lambda: app.service.pool.left(app.service.table.models["digits"].serving["production"]))
            for body in bodies:
                assert (await client.post(DIGITS, json=body, headers=NPY)).status_code == 200
            async with client.stream("POST", "/v1/models/ring/sample", json={"n": 300_000, "stream": True}) as answer:
                await answer.aread()
            counted = 'shadow_samples_total{model="digits",version="v2"}'
            await until(lambda: app.service.tap.counters[counted] == 3 + 5 + 64 + 40 + 64 + 3)
            assert app.service.pool.hits["digits"] == 2
            return shown(app)

    records = asyncio.run(scene())
    assert {(record.model, record.version) for record in records} == {("digits", "v1"), ("digits", "v2"), ("ring", "v1")}
    for record in records:
        assert record.fed == tuple(range(len(record.samples)))
        law = registry.card(record.model, record.version).latent
        drawn = law.sample(seed=record.seed, offset=record.offset, count=len(record.samples), truncation=record.truncation)
        np.testing.assert_array_equal(record.z, z if record.origin == "client_z" else drawn)
