"""The HTTP surface: a bare ASGI application from request bytes to response bytes.

    request -> route -> model -> format -> parse -> sample -> tap -> encode -> response

Every error is a ServingError and leaves as JSON that names field, value and expectation. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NoReturn

from numpy import ndarray

from serving.batcher import Batcher
from serving.errors import (
    BadRequest,
    BodyTooLarge,
    InvalidValue,
    MethodNotAllowed,
    NotFound,
    SamplingFailed,
    ServingError,
    Unavailable,
)
from serving.formats import FORMATS, negotiate
from serving.models import Model, ModelTable
from serving.openapi import DOCUMENT, MAX_SAMPLES
from serving.records import Record
from serving.sampler import Sampler, Window
from serving.tap import Tap
from training.bundle import SEED_LIMIT, Card
from training.registry import RegistryError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_BODY_LIMIT = 64 * 1024  # bytes
_INLINE_VALUES = 1 << 14  # answers with more numbers than this are encoded in a thread
_SERVER_SEED_BITS = 53  # so that every language reads a seed back from JSON exactly
_FIELDS = ("n", "seed", "offset", "label", "truncation")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleRequest:
    """What a body asks for, checked against the model's card."""

    window: Window
    seeded: bool  # by the client

    @staticmethod
    def parse(body: bytes, card: Card) -> SampleRequest:
        """Raises BadRequest where `body` is no JSON object, InvalidValue where a field is wrong."""
        fields = _read_object(body)
        if unknown := [name for name in fields if name not in _FIELDS]:
            raise InvalidValue(
                f"unknown field {unknown[0]!r}", field=unknown[0], value=fields[unknown[0]], expected=f"only {', '.join(_FIELDS)}"
            )
        n = _integer(fields, "n", 1, MAX_SAMPLES, default=1)
        seed = _integer(fields, "seed", 0, SEED_LIMIT - 1, default=None)
        offset = _integer(fields, "offset", 0, SEED_LIMIT - 1, default=0)
        if offset + n > SEED_LIMIT:
            raise InvalidValue(
                f"offset + n is {offset + n}, past the last row of a seed",
                field="offset",
                value=offset,
                expected="offset + n of at most 2^63",
            )
        window = Window(
            seed=secrets.randbits(_SERVER_SEED_BITS) if seed is None else seed,
            offset=offset,
            count=n,
            label=_label(fields, card),
            truncation=_truncation(fields),
        )
        return SampleRequest(window, seeded=seed is not None)


class App:
    """The ASGI application over the models of `table`. Its lifespan starts and stops what it is made of."""

    def __init__(self, table: ModelTable, batcher: Batcher, tap: Tap) -> None:
        self.table, self.batcher, self.tap = table, batcher, tap
        tap.gauges = self._gauges
        self._routes: dict[str, Callable[[], tuple[int, bytes]]] = {
            "/v1/models": self._models,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/openapi.json": lambda: (200, json.dumps(DOCUMENT).encode()),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        path = scope["path"][len(scope.get("root_path", "")) :]
        match path.split("/"):
            case ["", "v1", "models", model, "sample"]:
                await self._sample(scope, receive, send, model, None)
            case ["", "v1", "models", model, "versions", reference, "sample"]:
                await self._sample(scope, receive, send, model, reference)
            case _:
                await self._document(scope, send, path)

    async def _document(self, scope: Scope, send: Send, path: str) -> None:
        try:
            if path not in self._routes:
                known = [*self._routes, "/v1/models/{model}/sample", "/v1/models/{model}/versions/{version}/sample"]
                raise NotFound(f"no such path {path!r}", field="path", value=path, expected=f"one of {', '.join(known)}")
            _check_method(scope, "GET", "HEAD")
            status, body = self._routes[path]()
        except ServingError as error:
            return await _respond_error(send, error)
        await _respond(send, status, body, "application/json")

    async def _sample(self, scope: Scope, receive: Receive, send: Send, name: str, reference: str | None) -> None:
        counted = name if name in self.table.models else ""
        status = 499  # the client left before it had its answer
        try:
            _check_method(scope, "POST")
            headers = dict(scope["headers"])
            sampler = await self._sampler(name, reference)
            card = sampler.card
            media_type = negotiate(headers.get(b"accept", b"").decode("latin-1"), card.sample_shape)
            request = SampleRequest.parse(await _read_body(headers, receive), card)
            window = request.window
            samples = await _unless_gone(self.batcher.submit(sampler, window), receive)
            origin = "client_seed" if request.seeded else "probe" if b"x-ganwatch-probe" in headers else "server_seed"
            law = {"label": window.label, "truncation": window.truncation}
            self.tap.offer(Record(card.model, card.version, origin, window.seed, window.offset, samples, time.time(), **law))
            self.tap.counters[f'samples_total{{model="{card.model}",version="{card.version}"}}'] += window.count
            about = {"model": card.model, "version": card.version, "seed": window.seed, "offset": window.offset}
            encode = FORMATS[media_type]
            body = encode(samples, about) if samples.size <= _INLINE_VALUES else await asyncio.to_thread(encode, samples, about)
            status = 200
            await _respond(
                send, 200, body, media_type, {f"X-Ganwatch-{key.capitalize()}": str(value) for key, value in about.items()}
            )
        except ServingError as error:
            status = error.status
            await _respond_error(send, error)
        except _ClientGone:
            pass
        except Exception as error:
            logger.exception("sampling from model %s failed", name)
            status = 500
            await _respond_error(send, SamplingFailed(f"model {name} failed: {type(error).__name__}: {error}"))
        finally:
            self.tap.counters[f'requests_total{{model="{counted}",status="{status}"}}'] += 1

    async def _sampler(self, name: str, reference: str | None) -> Sampler:
        model = self.table.models.get(name)
        if model is None:
            raise NotFound(f"unknown model {name!r}", field="model", value=name, expected=_one_of(self.table.models))
        if sampler := model.find(reference or "production"):
            return sampler
        if reference is None and "production" not in model.aliases:
            raise NotFound(
                f"model {name} has no production version",
                field="model",
                value=name,
                expected="a model with one; promote a version first",
            )
        try:
            return await asyncio.to_thread(self.table.version, name, reference or "production")
        except RegistryError as error:
            versions = [*self.table.registry.versions(name), *model.aliases]
            raise NotFound(str(error), field="version", value=reference, expected=_one_of(versions)) from None
        except Exception as error:
            raise Unavailable(
                f"model {name}: {error}",
                field="version",
                value=reference,
                expected="a version that loads; publish it again or roll back",
            ) from error

    def _models(self) -> tuple[int, bytes]:
        return 200, json.dumps({"models": [_describe(name, model) for name, model in self.table.models.items()]}).encode()

    def _live(self) -> tuple[int, bytes]:
        if problem := self.batcher.problem():
            raise Unavailable(problem, expected="a restart of this replica")
        return 200, b'{"live": true}'

    def _ready(self) -> tuple[int, bytes]:
        if waiting := [name for name, model in self.table.models.items() if not model.is_ready]:
            why = "; ".join(f"{name}: {self.table.models[name].errors.get('production', 'loading')}" for name in waiting)
            raise Unavailable(
                f"production is not served of {why}", field="model", value=waiting, expected="every production version loaded"
            )
        return 200, b'{"ready": true}'

    def _gauges(self) -> dict[str, int | float]:
        """What the replica counts apart from requests, for the heartbeat. Zeros too: a rate needs the first of its counter."""
        gauges: dict[str, int | float] = {"queued_samples": self.batcher.queued, "batches_total": self.batcher.batches}
        for name, model in self.table.models.items():
            gauges[f'load_failures_total{{model="{name}"}}'] = self.table.load_failures[name]
            gauges.setdefault(
                f'tap_dropped_samples_total{{model="{name}"}}', self.tap.counters[f'tap_dropped_samples_total{{model="{name}"}}']
            )
            gauges |= {f'device_info{{provider="{sampler.provider}"}}': 1.0 for sampler in model.serving.values()}
        return gauges

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.table.start()
                self.tap.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.batcher.close()
                await asyncio.to_thread(self.table.close)
                await asyncio.to_thread(self.tap.close)
                return await send({"type": "lifespan.shutdown.complete"})


class _ClientGone(Exception):
    """Nobody reads the answer any more."""


async def _unless_gone(answer: asyncio.Future[ndarray], receive: Receive) -> ndarray:
    """The result of `answer`, which is cancelled when the client disconnects."""
    gone = asyncio.ensure_future(_disconnect(receive))
    gone.add_done_callback(lambda _: answer.cancel())
    try:
        return await answer
    except asyncio.CancelledError:
        if gone.done():
            raise _ClientGone from None
        raise
    finally:
        gone.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > _BODY_LIMIT:
        _refuse_body(int(declared))
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        body += message.get("body", b"")
        if len(body) > _BODY_LIMIT:
            _refuse_body(len(body))
        if not message.get("more_body", False):
            return body


def _refuse_body(size: int) -> NoReturn:
    raise BodyTooLarge(f"the body has {size} bytes or more", field="body", value=size, expected=f"at most {_BODY_LIMIT} bytes")


def _read_object(body: bytes) -> dict[str, Any]:
    """The one JSON object of a body: no duplicate keys, no NaN, nothing but UTF-8."""
    if not body.strip():
        raise BadRequest("the body is empty", field="body", value="", expected="a JSON object; {} asks for one sample")
    try:
        fields = _DECODER.decode(body.decode())
    except RecursionError:
        raise BadRequest("the body is nested too deeply", field="body", expected="a JSON object") from None
    except ValueError as error:
        raise BadRequest(
            f"the body is not JSON: {error}",
            field="body",
            value=body[:100].decode(errors="replace"),
            expected="a JSON object in UTF-8",
        ) from None
    if not isinstance(fields, dict):
        raise BadRequest("the body is not a JSON object", field="body", value=fields, expected='a JSON object such as {"n": 16}')
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _integer(fields: dict[str, Any], name: str, low: int, high: int, *, default: Any) -> Any:
    """Strict: true is no integer, and neither is 1.0, which could hide that a large seed was rounded on its way."""
    value = fields.get(name, default)
    if name in fields and (type(value) is not int or not low <= value <= high):
        raise InvalidValue(
            f"{name} is {json.dumps(value)[:100]}", field=name, value=value, expected=f"an integer from {low} to {high}"
        )
    return value


def _truncation(fields: dict[str, Any]) -> float:
    value = fields.get("truncation", 1.0)
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise InvalidValue(
            f"truncation is {json.dumps(value)[:100]}", field="truncation", value=value, expected="a number above 0 and up to 1"
        )
    return float(value)


def _label(fields: dict[str, Any], card: Card) -> int | None:
    """The index of the class named by `label`: its name, or its index."""
    if "label" not in fields:
        return None
    value = fields["label"]
    if not card.classes:
        raise InvalidValue(f"model {card.model} has no classes", field="label", value=value, expected="no label")
    if type(value) is int and 0 <= value < len(card.classes):
        return value
    if isinstance(value, str) and value in card.classes:
        return card.classes.index(value)
    raise InvalidValue(
        f"label is {json.dumps(value)[:100]}",
        field="label",
        value=value,
        expected=f"{_one_of(card.classes)}, or an index from 0 to {len(card.classes) - 1}",
    )


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


def _one_of(names: Any) -> str:
    return f"one of {', '.join(names)}" if names else "none: the registry is empty"


def _check_method(scope: Scope, *allowed: str) -> None:
    if scope["method"] not in allowed:
        raise MethodNotAllowed(
            f"{scope['method']} is not allowed here",
            field="method",
            value=scope["method"],
            expected=" or ".join(allowed),
            headers={"Allow": ", ".join(allowed)},
        )


async def _respond_error(send: Send, error: ServingError) -> None:
    await _respond(send, error.status, error.body(), "application/json", error.headers)


async def _respond(send: Send, status: int, body: bytes, media_type: str, headers: dict[str, str] | None = None) -> None:
    fields = {"Content-Type": media_type, "Content-Length": str(len(body)), **(headers or {})}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
