"""The HTTP surface: a bare ASGI application from request bytes to response bytes.

    request -> route -> model -> format -> parse -> sample -> tap -> encode -> response

Every error is a ServingError and leaves as JSON that names field, value and expectation. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from serving import oip
from serving.asgi import (
    Call,
    ClientGone,
    ClientStuck,
    Departures,
    Receive,
    Scope,
    Send,
    begin,
    check_method,
    read_body,
    respond,
    respond_error,
    send_chunk,
)
from serving.errors import InvalidValue, NotAcceptable, NotFound, RolledBack, SamplingFailed, ServingError, Unavailable
from serving.formats import FORMATS, STREAMS, as_dtype, negotiate
from serving.models import Model
from serving.openapi import MAX_SAMPLES, document
from serving.request import SampleRequest, one_of, read_object
from serving.rpc import Rpc
from serving.sampler import Sampler, Window
from serving.service import Service, note
from training.bundle import Card

_BODY_LIMIT = 4 << 20  # bytes: a few thousand latents as text
_TENSOR_LIMIT = 64 << 20  # bytes: 65536 latents of 256 numbers
_INLINE_BODY = 1 << 14  # larger bodies are read in a thread
_INLINE_VALUES = 1 << 14  # answers with more numbers than this are encoded in a thread
_CHUNK_BYTES = 1 << 20  # of a large answer, or of a stream; half of it where rows are so narrow that these would be more than one answer holds

_PATTERNS = [
    f"/{path}"
    for model, verb in (("v1/models/{model}", "/sample"), ("v2/models/{model}", "/infer"), ("v2/models/{model}", ""), ("v2/models/{model}", "/config"))
    for path in (f"{model}{verb}", f"{model}/versions/{{version}}{verb}")
]

Headers = dict[bytes, bytes]

logger = logging.getLogger(__name__)


class App:
    """The ASGI application over `service`. Its lifespan starts and stops what it is made of, and gRPC where there is `rpc`.

    `echo`: answers carry X-Request-Id. Ray Serve sends it by itself.
    """

    def __init__(self, service: Service, rpc: Rpc | None = None, echo: bool = True) -> None:
        self.service, self.rpc, self.echo = service, rpc, echo
        self._departures = Departures()
        self._routes: dict[str, Callable[[], tuple[int, bytes]]] = {
            "/v1/models": self._models,
            "/v2": lambda: (200, json.dumps(oip.SERVER).encode()),
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/openapi.json": lambda: (200, json.dumps(document(self.service.table.models)).encode()),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        call = Call(scope, send, self.echo)
        tracer = self.service.tracer
        trace = None if tracer is None else tracer.begin(call, call.text_headers())
        if trace is not None:
            call.answer_with(b"traceparent", trace.traceparent.encode())
        try:
            await self._route(call, receive)
        finally:
            self.service.log.add(call)
            if trace is not None:
                trace.end()

    async def _route(self, call: Call, receive: Receive) -> None:
        path = call.path[len(call.scope.get("root_path", "")) :]
        match path.split("/"):
            case ["", "v1", "models", model, "sample"]:
                await self._work(self._sample, call, receive, model, None)
            case ["", "v1", "models", model, "versions", reference, "sample"]:
                await self._work(self._sample, call, receive, model, reference)
            case ["", "v2", "models", model, "infer"]:
                await self._work(self._infer, call, receive, model, None)
            case ["", "v2", "models", model, "versions", reference, "infer"]:
                await self._work(self._infer, call, receive, model, reference)
            case ["", "v2", "models", model, *rest] if rest in ([], ["ready"], ["config"]):
                await self._metadata(call, model, None, *rest)
            case ["", "v2", "models", model, "versions", reference, *rest] if rest in ([], ["ready"], ["config"]):
                await self._metadata(call, model, reference, *rest)
            case ["", "v2", "repository", "index"]:
                await self._index(call, receive)
            case _:
                await self._document(call, path)

    async def _document(self, call: Call, path: str) -> None:
        try:
            if path not in self._routes:
                known = [*self._routes, *_PATTERNS]
                raise NotFound(f"no such path {path!r}", field="path", value=path, expected=f"one of {', '.join(known)}")
            check_method(call.scope, "GET", "HEAD")
            status, body = self._routes[path]()
        except ServingError as error:
            return await respond_error(call, error)
        await respond(call.send, status, body, "application/json")

    async def _work(self, handler: Callable[..., Awaitable[None]], call: Call, receive: Receive, name: str, reference: str | None) -> None:
        """Runs `handler`, answers its errors in the words of its protocol, and counts how it ended."""
        fail = _respond_text if handler == self._infer else respond_error
        counters = self.service.tap.counters
        try:
            check_method(call.scope, "POST")
            await handler(call, receive, name, reference)
        except ServingError as error:
            await fail(call, error)
        except _BrokenOff:
            call.status = 500  # 200 is what the client has heard
        except ClientGone as error:
            call.status = 499  # the client left before it had its answer
            if isinstance(error, ClientStuck):
                counters["slow_readers_total"] += 1
        except asyncio.CancelledError:  # Ray's way of saying so
            call.status = 499
            raise
        except Exception as error:
            logger.exception("sampling from model %s failed", name)
            await fail(call, SamplingFailed(f"model {name} failed: {type(error).__name__}: {error}"))
        finally:
            counted = name if name in self.service.table.models else ""
            counters[f'requests_total{{model="{counted}",status="{call.status}"}}'] += 1

    async def _sample(self, call: Call, receive: Receive, name: str, reference: str | None) -> None:
        body = await read_body(call.headers, receive, _BODY_LIMIT)
        while not await self._answer(call, receive, body, name, reference):
            pass  # the version was rolled back meanwhile

    async def _answer(self, call: Call, receive: Receive, body: bytes, name: str, reference: str | None) -> bool:
        """Whether it was answered: not with what has been rolled back since it was found."""
        headers = call.headers
        sampler = await self.service.find(name, reference)
        card = sampler.card
        media_type = negotiate(headers.get(b"accept", b"").decode("latin-1"), card.sample_shape)
        timeout = _timeout(headers)
        if len(body) > _INLINE_BODY or b'"interpolate"' in body:
            request = await asyncio.to_thread(SampleRequest.parse, body, card)
        else:
            request = SampleRequest.parse(body, card)
        if request.stream and media_type not in STREAMS:
            media_type = _streamable(headers, media_type, card)
        _check_form(request, media_type)
        if reference is None:
            sampler = self.service.divert(sampler, request)
        origin = "probe" if request.origin == "server_seed" and b"x-ganwatch-probe" in headers else request.origin
        note(call, sampler, request.window)
        wait = partial(self._departures.unless_gone, receive=receive)
        if request.stream:  # whose pieces come at once, one after the other, long after the client has left
            pieces = partial(self.service.stream, sampler, request, reference=reference, timeout=timeout, wait=partial(wait, at_once=True))
            return await self._stream(call, sampler, request, media_type, pieces)
        window, samples = await self.service.draw(sampler, request, origin=origin, timeout=timeout, wait=wait)
        call.seed = window.seed
        about = _about(sampler, window)
        encode = FORMATS[media_type]
        if samples.size <= _INLINE_VALUES:
            answer = encode(as_dtype(samples, request.dtype), about)
        else:
            answer = await asyncio.to_thread(lambda: encode(as_dtype(samples, request.dtype), about))
        if self.service.is_rolled_back(sampler, reference):
            return False
        await _respond_whole(call.send, answer, media_type, _headers(about, media_type, samples.shape, request.dtype))
        return True

    async def _stream(
        self, call: Call, sampler: Sampler, request: SampleRequest, media_type: str, draw: Callable[[int], AsyncGenerator[ndarray]]
    ) -> bool:
        """Whether it was answered. `draw`: the rows of a piece -> the pieces."""
        window, about = request.window, _about(sampler, request.window)
        shape = (window.count, *sampler.card.sample_shape)
        form = STREAMS[media_type](shape, request.dtype, about)
        rows = max(1, min(MAX_SAMPLES, _CHUNK_BYTES // form.row_bytes), _CHUNK_BYTES // 2 // form.row_bytes)
        begun, send = False, call.send
        try:
            async with aclosing(draw(rows)) as pieces:
                async for samples in pieces:
                    if not begun:
                        begun = True
                        await begin(send, 200, media_type, form.length, _headers(about, media_type, shape, request.dtype))
                        await send_chunk(send, form.head(), more=True)
                    await send_chunk(send, form.rows(as_dtype(samples, request.dtype)), more=True)
            await send_chunk(send, form.tail(), more=False)
            return True
        except Exception as error:
            if not begun and isinstance(error, RolledBack):
                return False
            if not begun or isinstance(error, ClientGone):
                raise
            # Too late for words: the answer stays incomplete, which the client can tell, and the server closes the connection.
            logger.warning("a stream from model %s broke off: %s", sampler.card.model, error, exc_info=not isinstance(error, ServingError))
            raise _BrokenOff from None

    async def _infer(self, call: Call, receive: Receive, name: str, reference: str | None) -> None:
        headers = call.headers
        timeout = _timeout(headers)
        length = headers.get(oip.HEADER_LENGTH.lower().encode())
        body = await read_body(headers, receive, _TENSOR_LIMIT)
        wait = partial(self._departures.unless_gone, receive=receive)
        while True:
            sampler = await self.service.find(name, reference)
            inference = await asyncio.to_thread(oip.decode, body, length and length.decode("latin-1"), sampler.card)
            note(call, sampler, inference.request.window)
            _, samples = await self.service.draw(sampler, inference.request, origin="client_z", timeout=timeout, wait=wait)
            answer, about = await asyncio.to_thread(oip.encode, inference, sampler.card, samples)
            if not self.service.is_rolled_back(sampler, reference):
                break
        await _respond_whole(call.send, answer, "application/octet-stream" if about else "application/json", about)

    async def _index(self, call: Call, receive: Receive) -> None:
        try:
            check_method(call.scope, "POST")
            body = await read_body(call.headers, receive, _BODY_LIMIT)
            fields = read_object(body) if body.strip() else {}
            ready = fields.get("ready", False)
            if type(ready) is not bool or fields.keys() - {"ready"}:
                raise InvalidValue(f"the body is {str(fields)[:100]}", field="ready", value=ready, expected="ready, true or false, or nothing")
            answer = oip.index(self.service.table.models, ready=ready)
        except ServingError as error:
            return await _respond_text(call, error)
        except ClientGone:
            call.status = 499
            return
        await respond(call.send, 200, json.dumps(answer).encode(), "application/json")

    async def _metadata(self, call: Call, name: str, reference: str | None, what: str = "") -> None:
        try:
            check_method(call.scope, "GET", "HEAD")
            sampler = await self.service.find(name, reference)
        except ServingError as error:
            return await _respond_text(call, error)
        if what == "ready":
            body = {"name": name, "ready": True}
        elif what == "config":
            body = oip.config(sampler.card)
        else:
            body = oip.metadata(sampler.card, self.service.table.registry.versions(name))
        await respond(call.send, 200, json.dumps(body).encode(), "application/json")

    def _models(self) -> tuple[int, bytes]:
        models = self.service.table.models
        return 200, json.dumps({"models": [_describe(name, model) for name, model in models.items()]}).encode()

    def _live(self) -> tuple[int, bytes]:
        if problem := self.service.batcher.problem():
            raise Unavailable(problem, expected="a restart of this replica")
        return 200, b'{"live": true}'

    def _ready(self) -> tuple[int, bytes]:
        models = self.service.table.models
        if waiting := [name for name, model in models.items() if not model.is_ready]:
            why = "; ".join(f"{name}: {models[name].errors.get('production', 'loading')}" for name in waiting)
            raise Unavailable(
                f"production is not served of {why}", field="model", value=waiting, expected="every production version loaded"
            )
        return 200, b'{"ready": true}'

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.service.start()
                if self.rpc is not None:
                    await self.rpc.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                if self.rpc is not None:
                    await self.rpc.stop()
                await self.service.close()
                return await send({"type": "lifespan.shutdown.complete"})


class _BrokenOff(Exception):
    """An answer that had begun when the model failed."""


def _about(sampler: Sampler, window: Window) -> dict[str, Any]:
    return {"model": sampler.card.model, "version": sampler.card.version, "seed": window.seed, "offset": window.offset}


def _headers(about: dict[str, Any], media_type: str, shape: tuple[int, ...], dtype: str) -> dict[str, str]:
    headers = {f"x-ganwatch-{key}": str(value) for key, value in about.items()}
    if media_type == "application/octet-stream":  # which says nothing of itself
        headers |= {"x-ganwatch-shape": ",".join(map(str, shape)), "x-ganwatch-dtype": dtype}
    return headers


def _timeout(headers: Headers) -> float | None:
    if b"x-ganwatch-timeout" not in headers:
        return None
    text = headers[b"x-ganwatch-timeout"].decode("latin-1")
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InvalidValue(
            f"X-Ganwatch-Timeout is {text[:100]!r}", field="X-Ganwatch-Timeout", value=text[:100], expected="seconds above 0"
        )
    return value


def _streamable(headers: Headers, first: str, card: Card) -> str:
    """What a stream comes as where the client would rather have `first`, which has no pieces. Raises InvalidValue."""
    try:
        return negotiate(headers.get(b"accept", b"").decode("latin-1"), card.sample_shape, tuple(STREAMS))
    except NotAcceptable:
        raise InvalidValue(f"{first} cannot be streamed", field="stream", value=True, expected=f"Accept: {one_of(STREAMS)}") from None


def _check_form(request: SampleRequest, media_type: str) -> None:
    """Raises InvalidValue where the asked form and media type do not go together."""
    if media_type == "image/png" and request.dtype != "uint8":
        raise InvalidValue("a picture holds bytes", field="dtype", value=request.dtype, expected="uint8, or another media type")


async def _respond_whole(send: Send, answer: bytes, media_type: str, headers: dict[str, str]) -> None:
    """A large answer goes in pieces, so that it is not kept for a client that reads nothing. Raises ClientStuck for such a one."""
    if len(answer) <= _CHUNK_BYTES:
        return await respond(send, 200, answer, media_type, headers)
    await begin(send, 200, media_type, len(answer), headers)
    for at in range(0, len(answer), _CHUNK_BYTES):
        await send_chunk(send, answer[at : at + _CHUNK_BYTES], more=at + _CHUNK_BYTES < len(answer))


async def _respond_text(call: Call, error: ServingError) -> None:
    body = json.dumps({"error": oip.error_text(error)}).encode()
    await respond(call.send, error.status, body, "application/json", error.headers)


def _describe(name: str, model: Model) -> dict[str, Any]:
    """What `GET /v1/models` says of one model: production's shape and law, or those of any version that serves."""
    sampler = model.find("production") or next(iter(model.serving.values()), None)
    card = sampler and sampler.card
    return {
        "name": name,
        "state": "unpromoted"
        if not model.aliases
        else "failed"
        if not model.serving
        else "degraded"
        if model.errors
        else "serving",
        "aliases": dict(model.aliases),
        "serving": {alias: s.card.version for alias, s in model.serving.items()},
        "errors": dict(model.errors),
        "sample_shape": card and list(card.sample_shape),
        "dtype": card and card.sample_dtype,
        "classes": card and list(card.classes),
        "latent_dim": card and card.latent.dim,
        "provider": sampler and sampler.provider,
    }
