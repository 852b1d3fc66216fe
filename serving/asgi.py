"""What every HTTP surface here needs of ASGI: requests with an id, bodies read within a limit, answers, clients that leave.

Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from numpy import ndarray

from serving.errors import BadRequest, BodyTooLarge, MethodNotAllowed, ServingError, UnsupportedEncoding
from serving.logs import Entry

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PATIENCE_S = 30.0  # with a client that reads nothing
_GLANCE_S = 0.01  # between two looks at who still waits: a task for each request would cost a tenth of its time


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class ClientStuck(ClientGone):
    """Somebody keeps the connection and reads nothing."""


class Call(Entry):
    """One HTTP request with what became of it. `echo`: whether the answer carries its id; Ray Serve adds it by itself."""

    __slots__ = ("_head", "_send", "headers", "scope")

    def __init__(self, scope: Scope, send: Send, echo: bool) -> None:
        self.scope, self._send = scope, send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        super().__init__(self.headers.get(b"x-request-id", b"").decode("latin-1"), scope["method"], scope["path"])
        self._head = [(b"x-request-id", self.id.encode())] if echo else []

    def text_headers(self) -> dict[str, str]:
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers.items()}

    def answer_with(self, name: bytes, value: bytes) -> None:
        """The answer carries this header, too."""
        self._head.append((name, value))

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] += self._head
        else:
            self.bytes += len(message["body"])
        await self._send(message)


class Departures:
    """Cancels what nobody waits for any more: answers to clients that have disconnected.

    Looks after whoever has waited for one to two glances, all with one timer: nearly all have their answer by then.
    """

    def __init__(self) -> None:
        self._young: dict[asyncio.Future[ndarray], Receive] = {}  # came since the last look
        self._old: dict[asyncio.Future[ndarray], Receive] = {}  # came before it
        self._watches: dict[asyncio.Future[ndarray], asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def unless_gone(self, answer: asyncio.Future[ndarray], receive: Receive, at_once: bool = False) -> ndarray:
        """The result of `answer`, which is cancelled when the client disconnects. `at_once`: watch from now on.

        Raises ClientGone where it did.
        """
        if at_once:
            self._watch(answer, receive)
        else:
            self._young[answer] = receive
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_GLANCE_S, self._look)
        try:
            return await answer
        except asyncio.CancelledError:
            if (watch := self._watches.get(answer)) and watch.done():
                raise ClientGone from None
            raise
        finally:
            self._young.pop(answer, None) or self._old.pop(answer, None)
            if watch := self._watches.pop(answer, None):
                watch.cancel()

    def _look(self) -> None:
        for answer, receive in self._old.items():
            self._watch(answer, receive)
        self._old, self._young = self._young, {}
        self._timer = asyncio.get_running_loop().call_later(_GLANCE_S, self._look) if self._old else None

    def _watch(self, answer: asyncio.Future[ndarray], receive: Receive) -> None:
        watch = self._watches[answer] = asyncio.ensure_future(_disconnect(receive))
        watch.add_done_callback(lambda _: answer.cancel())


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The body, inflated where it is compressed.

    Raises BodyTooLarge as soon as more than `limit` bytes are declared, come or unfold, ClientGone where the client leaves,
    UnsupportedEncoding and BadRequest where a compressed body cannot be read.
    """
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        _refuse_body(int(declared), limit)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            _refuse_body(len(body), limit)
        if not message.get("more_body", False):
            break
    if b"content-encoding" not in headers:
        return bytes(body)
    encoding = headers[b"content-encoding"].decode("latin-1").strip().lower() or "identity"
    return bytes(body) if encoding == "identity" else await asyncio.to_thread(_inflated, bytes(body), encoding, limit)


def _inflated(body: bytes, encoding: str, limit: int) -> bytes:
    """`body` without its content coding. Never holds more than `limit` bytes and a few: a small body may announce terabytes."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedEncoding(
            f"Content-Encoding is {encoding[:100]!r}",
            field="Content-Encoding",
            value=encoding,
            expected="gzip, deflate, or a body as it is",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    plain = bytearray()
    try:
        while body:  # gzip allows several members, one after the other
            member = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, whichever it is
            plain += member.decompress(body, limit + 1 - len(plain))
            if len(plain) > limit:
                _refuse_body(len(plain), limit)
            if not member.eof:
                raise zlib.error("it ends too early")
            body = member.unused_data
    except zlib.error as error:
        raise BadRequest(f"the body is no {encoding}: {error}", field="body", expected=f"what {encoding} writes") from None
    return bytes(plain)


def _refuse_body(size: int, limit: int) -> NoReturn:
    raise BodyTooLarge(f"the body has {size} bytes or more", field="body", value=size, expected=f"at most {limit} bytes")


def check_method(scope: Scope, *allowed: str) -> None:
    if scope["method"] not in allowed:
        raise MethodNotAllowed(
            f"{scope['method']} is not allowed here",
            field="method",
            value=scope["method"],
            expected=" or ".join(allowed),
            headers={"Allow": ", ".join(allowed)},
        )


async def respond_error(call: Call, error: ServingError) -> None:
    error.request_id = call.id
    await respond(call.send, error.status, error.body(), "application/json", error.headers)


async def respond(send: Send, status: int, body: bytes, media_type: str, headers: dict[str, str] | None = None) -> None:
    await begin(send, status, media_type, len(body), headers)
    await send({"type": "http.response.body", "body": body})


async def begin(send: Send, status: int, media_type: str, length: int | None, headers: dict[str, str] | None = None) -> None:
    """The head of an answer. `length`: bytes of the body; None where only its end will tell."""
    fields = {"Content-Type": media_type, **({} if length is None else {"Content-Length": str(length)}), **(headers or {})}
    head = [(k.lower().encode(), v.encode()) for k, v in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": head})


async def send_chunk(send: Send, chunk: bytes, *, more: bool) -> None:
    """Raises ClientStuck where the client does not read on for half a minute: what waits for it would fill the memory."""
    try:
        await asyncio.wait_for(send({"type": "http.response.body", "body": chunk, "more_body": more}), _PATIENCE_S)
    except TimeoutError:
        raise ClientStuck from None
