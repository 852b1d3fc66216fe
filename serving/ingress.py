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

Application = Callable[[MutableMapping[str, Any], Callable[..., Any], Callable[..., Any]], Awaitable[None]]

_PATHS = ("/v1/models/", "/v2/models/")
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
        if straight and scope["method"] == "POST" and hasattr(cycle := getattr(send, "__self__", None), "transport"):
            cycle.transport = Joined(cycle)
        await (_here[0] if straight else self._ray)(scope, receive, send)


class Joined:
    """The transport of one request and answer of uvicorn's, which writes head and body apart: here they leave together, in one
    system call, and wake HAProxy and the client once. `cycle`: of uvicorn's, with the transport that it would use itself."""

    def __init__(self, cycle: Any) -> None:
        self._cycle, self._transport = cycle, cycle.transport
        self._head: bytes | None = None  # None: not written yet; empty: gone

    def write(self, data: bytes) -> None:
        if self._head is None and self._cycle.response_started:  # before that, only "100 Continue" is written
            self._head = data
        elif self._head:
            head, self._head = self._head, b""
            self._transport.writelines((head, data))
        else:
            self._transport.write(data)

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
