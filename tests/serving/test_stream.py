"""Streams over a real socket: whole, resumed, cut off, and read by nobody."""

import asyncio
import io
import json
import socket

import httpx
import numpy as np
import pyarrow
import pytest

from serving import rest
from serving.batcher import Batcher
from serving.request import SampleRequest
from serving.sampler import Sampler, Window
from tests.serving.conftest import publish, running
from tests.serving.test_client import server

RING = "/v1/models/ring/sample"
RAW = {"Accept": "application/octet-stream"}


@pytest.fixture
def address(registry):
    with server(registry) as (url, app):
        yield url, app


def test_a_stream_is_the_whole(address, samplers):
    url, app = address
    with httpx.stream("POST", url + RING, json={"n": 200_000, "seed": 5, "stream": True}, headers=RAW) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-length"] == str(200_000 * 8)
        assert (answer.headers["x-ganwatch-seed"], answer.headers["x-ganwatch-shape"]) == ("5", "200000,2")
        body = answer.read()
    rows = np.frombuffer(body, np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(rows, samplers["ring"].sample([Window(5, 0, 200_000)]))
    assert app.service.tap.counters['samples_total{model="ring",version="v1"}'] == 200_000
    assert app.service.tap.counters['requests_total{model="ring",status="200"}'] == 1


def test_streams_in_every_form_that_has_pieces(address, samplers):
    url, _ = address
    expected = samplers["clothes"].sample([Window(5, 3, 30_000)])
    body = {"n": 30_000, "seed": 5, "offset": 3, "stream": True}
    npy, arrow = (
        httpx.post(f"{url}/v1/models/clothes/sample", json=body, headers={"Accept": accept}, timeout=30)
        for accept in ("application/x-npy", "application/vnd.apache.arrow.stream")
    )
    np.testing.assert_array_equal(np.load(io.BytesIO(npy.content)), expected)
    with pyarrow.ipc.open_stream(arrow.content) as reader:
        batches = list(reader)
    assert len(batches) == 2  # 48 bytes a row
    np.testing.assert_array_equal(np.concatenate([b["samples"].to_numpy_ndarray() for b in batches]), expected)


def test_what_is_missing_of_a_stream_is_had_by_offset(address, samplers):
    url, app = address
    with httpx.stream("POST", url + RING, json={"n": 1_000_000, "stream": True}, headers=RAW) as answer:
        seed, got = int(answer.headers["x-ganwatch-seed"]), b""
        for chunk in answer.iter_raw():
            got += chunk
            if len(got) > 2_000_000:
                break
    begun = len(got) // 8
    rest = httpx.post(url + RING, json={"n": 70_000, "seed": seed, "offset": begun, "stream": True}, headers=RAW)
    rows = np.frombuffer(got[: begun * 8] + rest.content, np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(rows, samplers["ring"].sample([Window(seed, 0, begun + 70_000)]))


def until_cut_off(app):
    """A stream ended without its client, and the batcher has forgotten it."""
    until(lambda: app.service.tap.counters['requests_total{model="ring",status="499"}'] and not app.service.batcher.queued)


def test_who_reads_nothing_costs_two_pieces_and_is_sent_away(address, monkeypatch):
    url, app = address
    monkeypatch.setattr("serving.asgi._PATIENCE_S", 0.3)
    host, port = url.removeprefix("http://").split(":")
    counters, body = app.service.tap.counters, b'{"n": 1000000000000, "seed": 1, "stream": true}'
    with socket.create_connection((host, int(port))) as reader:
        reader.sendall(f"POST {RING} HTTP/1.1\r\nHost: x\r\nAccept: {RAW['Accept']}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        until_cut_off(app)
        drawn = app.service.batcher.batched
    # What was sent filled the sockets' buffers; beyond that one piece waited to be sent and one was drawn.
    assert counters['samples_total{model="ring",version="v1"}'] < 2_000_000
    assert httpx.post(url + RING, json={"n": 2}).status_code == 200
    assert app.service.batcher.batched <= drawn + 65536 + 2


@pytest.mark.parametrize(
    ("path", "body", "size"),
    [
        ("/v1/models/large/sample", {"n": 400, "seed": 1}, 400 * 128 * 128 * 3),
        ("/v2/models/large/infer", {"inputs": [{"name": "z", "datatype": "FP32", "shape": [100, 16], "data": [0] * 1600}]}, None),
    ],
)
def test_a_large_answer_that_nobody_reads_is_not_kept(registry, monkeypatch, path, body, size):
    publish(registry, "large", shape=(128, 128, 3))
    content = json.dumps(body).encode()
    with server(registry) as (url, app):
        counters = app.service.tap.counters
        whole = httpx.post(url + path, content=content, headers=RAW, timeout=60)
        assert len(whole.content) == int(whole.headers["content-length"]) == (size or len(whole.content)) > 10 << 20
        monkeypatch.setattr("serving.asgi._PATIENCE_S", 0.3)
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((host, int(port)))
            head = "".join(f"{name}: {value}\r\n" for name, value in {**RAW, "Host": "x", "Content-Length": len(content)}.items())
            reader.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content)
            until(lambda: counters['requests_total{model="large",status="499"}'])
    assert counters["slow_readers_total"] == 1


def test_a_stream_that_its_client_leaves_ends(address):
    url, app = address
    with httpx.stream("POST", url + RING, json={"n": 10**12, "seed": 1, "stream": True}, headers=RAW) as answer:
        next(answer.iter_raw())
    until_cut_off(app)
    assert app.service.batcher.queued == 0


def test_a_stream_whose_model_fails_is_cut_off_so_that_the_client_can_tell(address, samplers):
    class Failing(Sampler):
        def __init__(self, sampler):
            self.__dict__.update(sampler.__dict__)

        def sample(self, windows):
            if any(window.offset > 200_000 for window in windows):
                raise ArithmeticError("out of numbers")
            return super().sample(windows)

    url, app = address
    model = app.service.table.models["ring"]
    model.serving["production"] = Failing(samplers["ring"])
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("POST", url + RING, json={"n": 10**6, "stream": True}, headers=RAW) as answer:
        assert answer.status_code == 200
        answer.read()
    first = httpx.post(url + RING, json={"n": 1, "seed": 1, "offset": 200_001, "stream": True}, headers=RAW)
    assert first.status_code == 500  # nothing was sent yet, so there are words


def test_a_stream_ends_when_its_version_is_rolled_back_but_for_who_named_it(address, registry):
    url, app = address
    table = app.service.table
    publish(registry, "ring", shape=(2,), dtype="float32", shift=3.0)
    until(lambda: table.models["ring"].serving["production"].card.version == "v2")
    body = {"n": 2_000_000, "seed": 1, "stream": True}
    named = httpx.stream("POST", f"{url}/v1/models/ring/versions/v2/sample", json=body, headers=RAW)
    with httpx.stream("POST", url + RING, json=body | {"n": 10**12}, headers=RAW) as anyone, named as own:
        pieces = anyone.iter_raw(), own.iter_raw()
        got = len(next(pieces[1]))
        assert next(pieces[0]) and anyone.headers["x-ganwatch-version"] == "v2"
        registry.rollback("ring")
        until(lambda: table.models["ring"].serving["production"].card.version == "v1")
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in pieces[0]:
                pass
        assert got + sum(map(len, pieces[1])) == 2_000_000 * 8
    assert httpx.post(url + RING, json=body | {"n": 3}, headers=RAW).headers["x-ganwatch-version"] == "v1"


def until(condition):
    async def watch():
        while not condition():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(watch(), 20))


@pytest.mark.parametrize(("name", "n"), [("line", 2_000_000), ("ring", 1_000_000), ("clothes", 100_000), ("large", 90)])
def test_pieces_have_half_a_megabyte_to_four(registry, monkeypatch, name, n):
    publish(registry, "line", shape=(1,), dtype="float32")
    publish(registry, "large", shape=(128, 128, 3))
    sizes, send = [], rest.send_chunk

    async def noted(to, chunk, *, more):
        sizes.append(len(chunk))
        await send(to, chunk, more=more)

    monkeypatch.setattr(rest, "send_chunk", noted)
    with server(registry) as (url, _):
        answer = httpx.post(f"{url}/v1/models/{name}/sample", json={"n": n, "seed": 1, "stream": True}, headers=RAW, timeout=60)
    pieces = [size for size in sizes if size]
    assert sum(pieces) == len(answer.content) and len(pieces) > 3
    assert all(1 << 19 <= size <= 1 << 22 for size in pieces[:-1]), pieces


def test_a_stream_that_has_begun_waits_for_its_turn(registry, samplers):
    async def scene():
        async with running(registry, batcher=Batcher(limit=100)) as app:
            sampler = app.service.table.models["ring"].serving["production"]
            request = SampleRequest(Window(3, 0, 300), "client_seed", dtype="float32", stream=True)
            pieces = []
            async for piece in app.service.stream(sampler, request, 60, reference=None):
                pieces.append(piece)
                if len(pieces) == 1:
                    other = app.service.batcher.submit(sampler, Window(4, 0, 40))  # leaves no room for the piece after the next
            await other
            return np.concatenate(pieces)

    np.testing.assert_array_equal(asyncio.run(scene()), samplers["ring"].sample([Window(3, 0, 300)]))
