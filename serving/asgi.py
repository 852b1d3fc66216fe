"""What every HTTP surface here needs of ASGI: bodies read within a limit, answers, and clients that leave.

Knows nothing of models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from numpy import ndarray

from serving.errors import BodyTooLarge, MethodNotAllowed, ServingError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PATIENCE_S = 30.0  # with a client that reads nothing


class ClientGone(Exception):
    """Nobody reads the answer any more."""


async def unless_gone(answer: asyncio.Future[ndarray], receive: Receive) -> ndarray:
    """The result of `answer`, which is cancelled when the client disconnects."""
    gone = asyncio.ensure_future(_disconnect(receive))
    gone.add_done_callback(lambda _: answer.cancel())
    try:
        return await answer
    except asyncio.CancelledError:
        if gone.done():
            raise ClientGone from None
        raise
    finally:
        gone.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Raises BodyTooLarge as soon as more than `limit` bytes are declared or come, ClientGone where the client leaves."""
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
            return bytes(body)


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


async def respond_error(send: Send, error: ServingError) -> None:
    await respond(send, error.status, error.body(), "application/json", error.headers)


async def respond(send: Send, status: int, body: bytes, media_type: str, headers: dict[str, str] | None = None) -> None:
    await begin(send, status, media_type, len(body), headers)
    await send({"type": "http.response.body", "body": body})


async def begin(send: Send, status: int, media_type: str, length: int | None, headers: dict[str, str] | None = None) -> None:
    """The head of an answer. `length`: bytes of the body; None where only its end will tell."""
    fields = {"Content-Type": media_type, **({} if length is None else {"Content-Length": str(length)}), **(headers or {})}
    head = [(k.lower().encode(), v.encode()) for k, v in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": head})


async def send_chunk(send: Send, chunk: bytes, *, more: bool) -> None:
    """Raises ClientGone where the client does not read on for half a minute: what waits for it would fill the memory."""
    try:
        await asyncio.wait_for(send({"type": "http.response.body", "body": chunk, "more_body": more}), _PATIENCE_S)
    except TimeoutError:
        raise ClientGone from None
