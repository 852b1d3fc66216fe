"""Which requests pass Ray Serve's bookkeeping. That they are answered as ever is tested behind HAProxy, in test_deployment.py."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import uvicorn

from serving import ingress
from serving.asgi import respond


def saying(word: bytes):
    async def application(scope, receive, send):
        await respond(send, 200, word, "text/plain")

    return application


@pytest.fixture
def nobody_here(monkeypatch):
    monkeypatch.setattr(ingress, "_here", [])


def who_answers(*paths: str, root_path: str = "") -> list[str]:
    async def ask() -> list[str]:
        (middleware,) = ingress.middlewares()
        transport = httpx.ASGITransport(middleware.cls(saying(b"ray"), *middleware.args, **middleware.kwargs), root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
            return [(await client.post(path)).text for path in paths]

    return asyncio.run(ask())


def test_paths_of_models_go_straight_to_the_application_and_all_others_through_ray(nobody_here):
    paths = ["/v1/models/digits/sample", "/v2/models/digits/infer", "/v1/models", "/-/healthz", "/v2/health/ready", "/openapi.json", "/elsewhere/v1/models/digits/sample"]
    assert who_answers(*paths) == ["ray"] * 7, "before there is an application"
    ingress.answers(saying(b"ours"))
    assert who_answers(*paths) == ["ours", "ours", *["ray"] * 5]
    assert who_answers("/base/v1/models/digits/sample", "/v1/models/digits/sample", root_path="/base") == ["ours", "ray"]


def written(answer: list[dict], method: str = "POST", head: str = "") -> tuple[list[bytes], bool]:
    """What uvicorn writes to its transport, call by call, while our application answers with `answer`; whether it closes it."""

    class Transport(asyncio.Transport):
        def __init__(self):
            super().__init__()
            self.calls, self.closed = [], False

        def write(self, data):
            self.calls.append(bytes(data))

        def writelines(self, pieces):
            self.calls.append(b"".join(pieces))

        def close(self):
            self.closed = True

        def is_closing(self):
            return self.closed

        def pause_reading(self): ...

        def resume_reading(self): ...

    async def application(scope, receive, send):
        await receive()
        for message in answer:
            await send(message)

    async def scene():
        (middleware,) = ingress.middlewares()
        ingress.answers(application)
        config = uvicorn.Config(middleware.cls(saying(b"ray")), log_config=None, access_log=False, lifespan="off")
        config.load()
        transport, protocol = Transport(), config.http_protocol_class(config, uvicorn.server.ServerState(), {}, asyncio.get_running_loop())
        protocol.connection_made(transport)
        protocol.data_received(f"{method} /v1/models/digits/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n{head}\r\n{{}}".encode())
        await asyncio.gather(*protocol.tasks)
        protocol.timeout_keep_alive_task and protocol.timeout_keep_alive_task.cancel()
        return transport.calls, transport.closed

    return asyncio.run(scene())


def start(*headers: tuple[bytes, bytes]) -> dict:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(data: bytes, more: bool = False) -> dict:
    return {"type": "http.response.body", "body": data, "more_body": more}


@pytest.mark.parametrize("size", [3, 1 << 20])
def test_head_and_body_leave_together_and_every_byte_is_in_its_place(nobody_here, size):
    (whole,), closed = written([start((b"content-length", b"%d" % size), (b"x-model", b"m")), body(size * b"a")])
    assert whole == b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nx-model: m\r\n\r\n" % size + size * b"a" and not closed


def test_an_answer_in_pieces_is_uvicorns_and_so_is_one_of_another_length_than_it_says(nobody_here):
    head, *pieces = written([start((b"content-length", b"13")), body(b"HTTP/1.1 ", True), body(b"last")])[0]
    assert head.endswith(b"content-length: 13\r\n\r\n") and pieces == [b"HTTP/1.1 ", b"last"]
    head, *pieces = written([start(), body(b"", True), body(b"abc", True), body(b"")])[0]
    assert head.endswith(b"transfer-encoding: chunked\r\n\r\n") and [p for p in pieces if p] == [b"3\r\nabc\r\n", b"0\r\n\r\n"]
    calls, closed = written([start((b"content-length", b"4")), body(b"abc")])
    assert closed and b"".join(calls).endswith(b"content-length: 4\r\n\r\nabc"), "the client can tell that it is incomplete"


def test_what_uvicorn_does_before_and_after_stays(nobody_here):
    going, whole = written([start((b"content-length", b"0")), body(b"")], head="Expect: 100-continue\r\n")[0]
    assert going == b"HTTP/1.1 100 Continue\r\n\r\n" and whole.startswith(b"HTTP/1.1 200 OK")
    calls, closed = written([start((b"content-length", b"1")), body(b"x")], head="Connection: close\r\n")
    assert b"connection: close" in calls[0] and calls[0].endswith(b"x") and closed
    (head,), _ = written([start((b"content-length", b"5")), body(b"")], method="HEAD")
    assert head.endswith(b"\r\n\r\n")
    calls, closed = written([start((b"content-length", b"5"))])  # and then nothing, as after an error
    assert closed and b"".join(calls).startswith(b"HTTP/1.1 500")
