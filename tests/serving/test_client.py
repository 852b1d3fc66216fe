"""The Python client against a real server over a real socket (uvicorn), including a client killed mid-request."""

import asyncio
import http.client
import json
import select
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import numpy as np
import pytest
import uvicorn

from serving import client as client_module
from serving import openapi
from serving.batcher import Batcher
from serving.client import AsyncClient, Client
from serving.dataset import dataset
from serving.errors import InvalidValue, NotAcceptable, NotFound, Overloaded, ServingError, Unavailable
from serving.models import ModelTable
from serving.rest import App
from serving.sampler import Window
from serving.service import Service
from serving.tap import Tap
from tests.serving.conftest import CLASSES


@contextmanager
def server(registry):
    """(url, app) of a server with its whole lifespan, on a free port."""
    table = ModelTable(registry, "cpu")
    table.refresh()
    app = App(Service(table, Batcher(), Tap(None)))
    listening = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    thread = threading.Thread(target=asyncio.run, args=(uvicorn_server.serve([listening]),))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        uvicorn_server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def address(registry):
    with server(registry) as (url, app):
        yield url, app


def test_the_client_gets_what_the_sampler_gives(address, samplers):
    with Client(address[0]) as client:
        assert client.ready()
        drawn = client.sample("digits", 5)
        again = client.sample("digits", 5, seed=drawn.seed)
        np.testing.assert_array_equal(drawn.array, again.array)
        window = client.sample("clothes", 4, seed=3, offset=2, label="two", truncation=0.5, version="production")
        expected = samplers["clothes"].sample([Window(3, 2, 4, label=CLASSES.index("two"), truncation=0.5)])
        np.testing.assert_array_equal(window.array, expected)
        assert (window.seed, window.offset, window.model, window.version) == (3, 2, "clothes", "v1")
        assert [model["name"] for model in client.models()] == ["clothes", "digits", "ring"]


def test_more_than_one_answer_holds_is_fetched_by_pages(address, samplers):
    with Client(address[0]) as client:
        drawn = client.sample("ring", 70_000)
    assert drawn.array.shape == (70_000, 2)
    np.testing.assert_array_equal(drawn.array[65_530:65_540], samplers["ring"].sample([Window(drawn.seed, 65_530, 10)]))


def test_errors_carry_the_words_of_the_server(address):
    with Client(address[0]) as client:
        with pytest.raises(NotFound, match="unknown model 'letters'") as refused:
            client.sample("letters")
        assert (refused.value.status, refused.value.field, refused.value.value) == (404, "model", "letters")
        with pytest.raises(InvalidValue, match="n is 0"):
            client.sample("digits", 0)
        with pytest.raises(InvalidValue, match="model digits has no classes"):
            client.sample("digits", label=1)
        with pytest.raises(NotFound, match="no such path"):
            client.sample("../digits")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        assert not client.ready()
        with pytest.raises(ConnectionError, match="is the server up"):
            client.sample("digits")


def test_errors_survive_the_wire_and_foreign_pages_are_shown():
    sent = NotAcceptable("cannot", field="Accept", value="text/html", expected="json")
    got = ServingError.parse(sent.status, sent.body())
    assert type(got) is NotAcceptable
    assert vars(got) == vars(sent) | {"status": 406, "code": "not_acceptable"}
    for body in (b"<html>Bad gateway</html>", b"", b'"text"', b'{"error": 3}'):
        assert "HTTP 502" in str(ServingError.parse(502, body))


def test_a_connection_that_dies_is_tried_once_more(address, samplers):
    requests = []

    class Dropping(BaseHTTPRequestHandler):
        """Forgets the first request it reads, and passes on the second."""

        def do_POST(self):
            requests.append(self.rfile.read(int(self.headers["Content-Length"])))
            if len(requests) == 2:
                answer = httpx.post(address[0] + self.path, content=requests[1], headers={"Accept": self.headers["Accept"]})
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Dropping) as proxy, Client(f"http://127.0.0.1:{proxy.server_port}") as client:
        thread = threading.Thread(target=lambda: [proxy.handle_request() for _ in range(2)])
        thread.start()
        np.testing.assert_array_equal(client.sample("ring", 2, seed=1).array, samplers["ring"].sample([Window(1, 0, 2)]))
        thread.join()
    assert requests[0] == requests[1]


@contextmanager
def cutting(url: str, sizes: list[int]):
    """The URL of a proxy that passes bytes through, and cuts its i-th connection after sizes[i] bytes of answers."""
    host, port = url.removeprefix("http://").split(":")
    listening, stop, threads = socket.create_server(("127.0.0.1", 0)), threading.Event(), []

    def serve(inside: socket.socket, limit: float) -> None:
        with inside, socket.create_connection((host, int(port))) as outside:
            while not stop.is_set():
                for source in select.select([inside, outside], [], [], 0.05)[0]:
                    piece = source.recv(1 << 14)
                    if source is outside:
                        piece, limit = piece[: int(min(limit, len(piece)))], limit - len(piece)
                    if not piece:
                        return
                    (inside if source is outside else outside).sendall(piece)
                    if limit <= 0:
                        return

    def accept() -> None:
        for limit in (*sizes, *[float("inf")] * 1000):
            try:
                inside, _ = listening.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(inside, limit)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stop.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for thread in (accepting, *threads):
            thread.join()


@pytest.mark.parametrize("law", [{"seed": 5, "offset": 3}, {}])
def test_a_connection_cut_in_the_middle_of_an_answer_is_taken_up_and_every_byte_is_right(address, samplers, law):
    """Once in its head, once in the first page, once in the third, by which the server has been chosen and must not change."""

    def whole(drawn, seed):
        assert drawn.seed == seed
        np.testing.assert_array_equal(drawn.array, samplers["ring"].sample([Window(seed, law.get("offset", 0), 200_000)]))

    sizes = [10, 200_000, 65536 * 8 * 2 + 100_000]
    with cutting(address[0], sizes) as url, Client(url, retries=3) as client:
        drawn = client.sample("ring", 200_000, **law)
        whole(drawn, law.get("seed", drawn.seed))

    async def scene(url):
        async with AsyncClient(url, retries=3) as client:
            return await client.sample("ring", 200_000, **law)

    with cutting(address[0], sizes) as url:
        drawn = asyncio.run(scene(url))
        whole(drawn, law.get("seed", drawn.seed))


def test_a_stream_that_is_cut_is_seen_to_be_cut_and_its_rest_is_had_by_offset(address, samplers):
    body = {"n": 300_000, "seed": 5, "stream": True}
    headers = {"Accept": "application/octet-stream"}
    got = b""
    with cutting(address[0], [1_000_000, 700_003]) as url:
        for _ in range(5):
            asked = body | {"n": body["n"] - len(got) // 8, "offset": len(got) // 8}
            got = got[: len(got) // 8 * 8]
            try:
                with httpx.stream("POST", f"{url}/v1/models/ring/sample", json=asked, headers=headers) as answer:
                    for piece in answer.iter_raw():
                        got += piece
                break
            except httpx.RemoteProtocolError:
                pass
    np.testing.assert_array_equal(np.frombuffer(got, np.float32).reshape(-1, 2), samplers["ring"].sample([Window(5, 0, 300_000)]))


def test_a_client_killed_while_it_waits_leaves_nothing_behind(address):
    url, app = address
    host = url.removeprefix("http://")
    entered = threading.Event()
    submit = app.service.batcher.submit

    def noticed(*arguments):
        entered.set()
        return submit(*arguments)

    app.service.batcher.submit = noticed
    dying = http.client.HTTPConnection(host)
    dying.request("POST", "/v1/models/ring/sample", json.dumps({"n": 65536, "seed": 1}))
    assert entered.wait(5)
    dying.sock.close()
    with Client(url) as client:
        assert len(client.sample("ring", 3).array) == 3
    for connection in (http.client.HTTPConnection(host), http.client.HTTPConnection(host)):  # half a request
        connection.putrequest("POST", "/v1/models/ring/sample")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"n": ')
        connection.close()
    with Client(url) as client:
        assert len(client.sample("ring", 3).array) == 3
    assert app.service.batcher.problem() is None


def test_everything_that_can_be_asked_for(address, samplers):
    sampler = samplers["clothes"]
    z = sampler.card.latents(seed=3, count=4)
    with Client(address[0]) as client:
        np.testing.assert_array_equal(client.sample("clothes", z=z, label=[0, 1, "two", 1]).array, sampler.run(z, np.array([0, 1, 2, 1])))
        path = client.sample("digits", 9, interpolate=(3, 4)).array
        np.testing.assert_array_equal(path[[0, -1]], np.stack([client.sample("digits", 1, seed=s).array[0] for s in (3, 4)]))
        numbers = client.sample("digits", 2, seed=1, dtype="float32").array
        np.testing.assert_allclose(numbers * 255, client.sample("digits", 2, seed=1).array, atol=1e-4)


def test_rows_from_the_pool_are_had_again_by_seed_and_offset(address):
    url, app = address
    app.service.pool.rows = 512
    app.service.follow()
    sampler = app.service.table.models["digits"].serving["production"]
    while app.service.pool.left(sampler) < 512:
        time.sleep(0.002)
    with Client(url) as client:
        client.sample("digits", 3)
        drawn = client.sample("digits", 5)
        assert drawn.offset == 3
        np.testing.assert_array_equal(client.sample("digits", 5, seed=drawn.seed, offset=drawn.offset).array, drawn.array)
        pages = list(client.pages("digits", 100, size=40))
    assert [page.offset for page in pages] == [0, 40, 80]  # of a seed that no other client gets rows of
    assert len({page.seed for page in pages}) == 1


@pytest.mark.parametrize("n", [1, 30, 100])
def test_pages_make_up_the_whole(address, samplers, n):
    async def scene():
        async with AsyncClient(address[0]) as client:
            assert await client.ready()
            assert len(await client.models()) == 3
            pages = [page async for page in client.pages("ring", n, size=30, seed=5, offset=2)]
            return pages, await client.sample("clothes", n, seed=5, label="one")

    expected = samplers["ring"].sample([Window(5, 2, n)])
    pages, clothes = asyncio.run(scene())
    with Client(address[0]) as client:
        again = list(client.pages("ring", n, size=30, seed=5, offset=2))
    for found in (pages, again):
        np.testing.assert_array_equal(np.concatenate([page.array for page in found]), expected)
        assert [page.offset for page in found] == list(range(2, 2 + n, 30))
    np.testing.assert_array_equal(clothes.array, samplers["clothes"].sample([Window(5, 0, n, label=1)]))


def test_a_page_is_no_larger_than_what_the_server_gives_of_such_samples(address, samplers, monkeypatch):
    for module, name in ((openapi, "MAX_BYTES"), (client_module, "_PAGE_BYTES")):
        monkeypatch.setattr(module, name, 64 * 300)  # as if images were large
    expected = samplers["digits"].sample([Window(5, 0, 1000)])

    async def scene():
        async with AsyncClient(address[0]) as client:
            return [page.array async for page in client.pages("digits", 1000, seed=5)]

    with Client(address[0]) as client:
        pages = [page.array for page in client.pages("digits", 1000, seed=5)]
        with pytest.raises(ServingError, match="nothing"):
            client.sample("nothing", 1000)
    for found in (pages, asyncio.run(scene())):
        assert [len(page) for page in found] == [300, 300, 300, 100]
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_the_next_page_is_fetched_while_this_one_is_used(address):
    url, app = address
    with Client(url) as client:
        pages = client.pages("ring", 100_000, size=40_000)
        next(pages)
        late = time.monotonic() + 60
        while (batched := app.service.batcher.batched) < 80_000 and time.monotonic() < late:
            time.sleep(0.005)
        pages.close()
    assert batched == 80_000  # the second page, while only the first was asked for, and no third


def test_a_server_that_asks_for_patience_is_asked_again_and_the_rest_is_resumed(address, samplers, monkeypatch):
    url, app = address
    waits, refusals = [], iter([429, 503, None, 503, None, 502])
    submit = app.service.batcher.submit

    def moody(*arguments):
        status = next(refusals, None)
        if status:
            error = Overloaded("too much", headers={"Retry-After": "3"}) if status == 429 else Unavailable("later")
            error.status = status
            error.headers = error.headers if status == 429 else {}  # of the others nobody says when
            raise error
        return submit(*arguments)

    app.service.batcher.submit = moody
    monkeypatch.setattr("serving.client.time.sleep", waits.append)
    with Client(url, retries=3) as client:
        drawn = client.sample("ring", 140_000)
    np.testing.assert_array_equal(drawn.array, samplers["ring"].sample([Window(drawn.seed, 0, 140_000)]))
    assert waits == [3.0, 0.4, 0.2, 0.2]
    app.service.batcher.submit = submit
    refusals = iter([429, 429])
    app.service.batcher.submit = moody
    with Client(url) as client, pytest.raises(Overloaded, match="too much"):
        client.sample("ring")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "spawn")])
def test_a_torch_dataset(address, samplers, workers, context):
    torch = pytest.importorskip("torch")
    rows = dataset(address[0], "ring", 1001, size=100, seed=5, offset=7)
    loader = torch.utils.data.DataLoader(rows, batch_size=64, num_workers=workers, multiprocessing_context=context)
    expected = samplers["ring"].sample([Window(5, 7, 1001)])
    for _ in range(2):
        found = np.concatenate([batch.numpy() for batch in loader])
        assert found.shape == (1001, 2)
        np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
    assert len(rows) == 1001
