"""The Python client against a real server over a real socket (uvicorn), including a client killed mid-request."""

import asyncio
import http.client
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import numpy as np
import pytest
import uvicorn

from serving.batcher import Batcher
from serving.client import Client
from serving.errors import InvalidValue, NotAcceptable, NotFound, ServingError
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
