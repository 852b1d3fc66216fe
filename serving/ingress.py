"""The way of a request past Ray Serve's bookkeeping, straight to the replica's own application.

Around each request Ray Serve puts metadata, a context, metrics and a log record, none of which is used here and which cost
twice what it takes to answer. Its hook for HTTP middleware is called before all of them, in the process of the replica; with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.ingress:middlewares

set before Ray starts, paths of models are answered there, in one piece each, and everything else (health checks, documents,
unknown paths) goes through Ray. Where it is not set, everything does: the same answers, later. Ray's own counts of requests, by
which it could scale replicas up and down, then see only the rest. Imports nothing heavy, for Ray's fallback proxy loads it, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

Application = Callable[[MutableMapping[str, Any], Callable[..., Any], Callable[..., Any]], Awaitable[None]]

_PATHS = ("/v1/models/", "/v2/models/")
_COPIED = 1 << 16  # bytes of a body that are sooner copied behind its head than handed over beside it
_here: list[Application] = []  # the application of this process, once there is one


def answers(application: Application) -> None:
    """`application` answers for models in this process from now on."""
    _here[:] = [application]


def middlewares() -> list[Middleware]:
    """What Ray Serve is to put around a replica's application."""
    return [Middleware(Straight)]


class Straight:
    def __init__(self, ray: Application) -> None:
        self._ray = ray

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        straight = _here and scope["type"] == "http" and scope["path"].startswith(_PATHS, len(scope["root_path"]))
        if straight and scope["method"] == "POST" and hasattr(cycle := getattr(send, "__self__", None), "response_complete"):
            send = Whole(cycle)
        await (_here[0] if straight else self._ray)(scope, receive, send)


class Whole:
    """`send` of one request and answer of uvicorn's, `cycle`. An answer that comes in one piece leaves in one system call, which
    wakes HAProxy and the client once, and past uvicorn's look at each header, for all of them are ours; others go to uvicorn."""

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self._head: MutableMapping[str, Any] | None = None  # until the first piece of the body is there

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start" and not cycle.response_started:
            self._head = message
            return
        head, self._head = self._head, None
        if head is not None:
            body, headers = message["body"], head["headers"]
            length = (b"content-length", b"%d" % len(body))
            if not message.get("more_body") and length in headers and not (cycle.flow.write_paused or cycle.disconnected):
                return self._answer(cycle, head["status"], cycle.default_headers + headers, body)
            await cycle.send(head)
        await cycle.send(message)

    @staticmethod
    def _answer(cycle: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        if len(body) <= _COPIED:
            cycle.transport.write(b"".join((*lines, body)))
        else:
            cycle.transport.writelines((b"".join(lines), body))
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
