"""The gRPC surface: the Open Inference Protocol's service, so that its clients work unchanged, and samples as a stream.

A replica runs the server itself, beside the HTTP that Ray gives it: no call takes a second hop, any number of applications may
share the Ray Serve around it, and all replicas of one machine listen on one port (SO_REUSEPORT). Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy import ndarray

from serving import oip
from serving.errors import BadRequest, InvalidValue, ServingError
from serving.logs import Entry
from serving.openapi import MAX_SAMPLES
from serving.protocol import ganwatch_pb2 as own
from serving.protocol import inference_pb2 as pb
from serving.request import SampleRequest
from serving.sampler import Sampler
from serving.service import Service, note
from training.bundle import Card

_MESSAGE_LIMIT = 64 << 20  # bytes of a request; an answer has no limit
_PING_MS = 5_000
_PIECE_BYTES = 1 << 20
_INLINE_BYTES = 1 << 16  # larger tensors are read and written in a thread
_NUMBERS = 1 << 16  # of a message, taken out of it at once
_PATIENCE_S = 30.0  # with a client that reads nothing
_GRACE_S = 15.0  # for calls under way when a replica stops
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {"FP32": ("fp32_contents", np.float32), "INT64": ("int64_contents", np.int64)}

logger = logging.getLogger(__name__)


class Rpc:
    """A gRPC server over `service`, which somebody else starts and stops. `port`: on 127.0.0.1; 0 takes a free one."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port = service, port
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Raises RuntimeError where the port is taken by a process that does not share it."""
        options = [("grpc.so_reuseport", 1), ("grpc.max_receive_message_length", _MESSAGE_LIMIT), ("grpc.max_send_message_length", -1)]
        # Clients that ask every ten seconds whether we live are answered; gRPC's own measure, five minutes, sends them away.
        options += [("grpc.http2.min_ping_interval_without_data_ms", _PING_MS), ("grpc.keepalive_permit_without_calls", 1)]
        self._server = grpc.aio.server(options=options)
        calls = {
            "ServerLive": (pb.ServerLiveRequest, self._live),
            "ServerReady": (pb.ServerReadyRequest, self._ready),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self._model_metadata),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self._index),
            "ModelConfig": (pb.ModelConfigRequest, self._config),
        }
        inference = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(f"/inference.GRPCInferenceService/{name}", call), request_deserializer=kind.FromString, response_serializer=lambda answer: answer.SerializeToString()
            )
            for name, (kind, call) in calls.items()
        }
        # In bytes, for gRPC would turn messages into them and back in the event loop.
        inference["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self._guarded("/inference.GRPCInferenceService/ModelInfer", self._infer))
        sampling = grpc.unary_stream_rpc_method_handler(
            self._guarded("/ganwatch.v1.Generator/Sample", self._sample),
            request_deserializer=own.SampleRequest.FromString,
            response_serializer=lambda piece: piece.SerializeToString(),
        )
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("inference.GRPCInferenceService", inference),
                grpc.method_handlers_generic_handler("ganwatch.v1.Generator", {"Sample": sampling}),
            )
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(_GRACE_S)

    def _guarded(self, method: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """`call` with errors told in gRPC's own codes; those that ask for samples are counted like their HTTP siblings."""

        async def guarded(message: Any, context: grpc.aio.ServicerContext) -> Any:
            given = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            entry = Entry(given.get("x-request-id"), "gRPC", method)
            trace = self.service.tracer and self.service.tracer.begin(entry, given)
            about = (("x-request-id", entry.id), *([("traceparent", trace.traceparent)] if trace else []))
            context.set_trailing_metadata(about)
            entry.status = 499  # stays where the client has left
            try:
                if call == self._infer:
                    message = await _aside(len(message), _read, message)
                answer = await call(message, context, entry)
                entry.status = 200
                return answer
            except ServingError as error:
                entry.status = error.status
                if wait := error.headers.get("Retry-After"):  # in the words of gRPC's own retries (proposal A6)
                    context.set_trailing_metadata((*about, ("grpc-retry-pushback-ms", f"{1000 * int(wait)}")))
                await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), oip.error_text(error))
            except asyncio.CancelledError:
                entry.status = 504 if _is_late(context) else 499
                raise
            except TimeoutError:
                self.service.tap.counters["slow_readers_total"] += 1
                await context.abort(grpc.StatusCode.ABORTED, f"the client has read nothing for {_PATIENCE_S:g} s")
            except Exception as error:
                if _is_late(context):  # what failed is to write to a client that hears no more
                    entry.status = 504
                    raise asyncio.CancelledError from error
                logger.exception("a gRPC call failed")
                entry.status = 500
                await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
            finally:
                self.service.log.add(entry)
                if trace:
                    trace.end()
                if call in (self._infer, self._sample):
                    name = message.model if call == self._sample else getattr(message, "model_name", "")  # unless it could not be read
                    counted = name if name in self.service.table.models else ""
                    self.service.tap.counters[f'requests_total{{model="{counted}",status="{entry.status}"}}'] += 1

        return guarded

    async def _live(self, message: pb.ServerLiveRequest, context: Any, entry: Entry) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self.service.batcher.problem() is None)

    async def _ready(self, message: pb.ServerReadyRequest, context: Any, entry: Entry) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=all(model.is_ready for model in self.service.table.models.values()))

    async def _server_metadata(self, message: pb.ServerMetadataRequest, context: Any, entry: Entry) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**oip.SERVER)

    async def _model_ready(self, message: pb.ModelReadyRequest, context: Any, entry: Entry) -> pb.ModelReadyResponse:
        await self.service.find(message.name, message.version or None)
        return pb.ModelReadyResponse(ready=True)

    async def _model_metadata(self, message: pb.ModelMetadataRequest, context: Any, entry: Entry) -> pb.ModelMetadataResponse:
        sampler = await self.service.find(message.name, message.version or None)
        return pb.ModelMetadataResponse(**oip.metadata(sampler.card, self.service.table.registry.versions(message.name)))

    async def _index(self, message: pb.RepositoryIndexRequest, context: Any, entry: Entry) -> pb.RepositoryIndexResponse:
        return pb.RepositoryIndexResponse(models=oip.index(self.service.table.models, ready=message.ready))

    async def _config(self, message: pb.ModelConfigRequest, context: Any, entry: Entry) -> pb.ModelConfigResponse:
        sampler = await self.service.find(message.name, message.version or None)
        return pb.ModelConfigResponse(config=pb.ModelConfigResponse.Config(**oip.config(sampler.card)))

    async def _infer(self, message: pb.ModelInferRequest, context: grpc.aio.ServicerContext, entry: Entry) -> bytes:
        reference, size = message.model_version or None, message.ByteSize()
        tensors, outputs = await _aside(size, _tensors, message), [output.name for output in message.outputs]
        while True:
            sampler = await self.service.find(message.model_name, reference)
            request = await _aside(size, oip.to_request, tensors, outputs, sampler.card)
            note(entry, sampler, request.window)
            _, samples = await self.service.draw(sampler, request, origin="client_z", timeout=context.time_remaining())
            answer = await _aside(samples.nbytes, _answer, message.id, sampler.card, samples)
            if not self.service.is_rolled_back(sampler, reference):
                break
        entry.bytes = samples.nbytes
        return answer

    async def _sample(self, message: own.SampleRequest, context: grpc.aio.ServicerContext, entry: Entry) -> None:
        sampler = await self.service.find(message.model, message.version or None)
        optional = {name: getattr(message, name) for name in ("seed", "label", "truncation") if message.HasField(name)}
        fields = {"n": message.n, "offset": message.offset, "stream": True, **optional}
        request = SampleRequest.parse(json.dumps(fields).encode(), sampler.card)
        if not message.version:
            sampler = self.service.divert(sampler, request)
        note(entry, sampler, request.window)
        at = request.window.offset
        rows = min(MAX_SAMPLES, max(1, _PIECE_BYTES // sampler.sample_bytes))
        async for samples in self.service.stream(sampler, request, rows, reference=message.version or None, timeout=context.time_remaining()):
            await asyncio.wait_for(context.write(_piece(sampler, request.window.seed, at, samples)), _PATIENCE_S)
            at += len(samples)
            entry.bytes += samples.nbytes


def _is_late(context: Any) -> bool:
    """Whether the time that the client gave its call is over."""
    left = context.time_remaining()
    return left is not None and left <= 0


def _piece(sampler: Sampler, seed: int, offset: int, samples: ndarray) -> own.Piece:
    card = sampler.card
    about = {"model": card.model, "version": card.version, "seed": seed, "offset": offset, "dtype": card.sample_dtype}
    return own.Piece(**about, shape=samples.shape, samples=samples.tobytes())


async def _aside(size: int, work: Callable[..., Any], *given: Any) -> Any:
    """What `work` gives; in a thread, where it is on so many bytes that others would wait."""
    return work(*given) if size <= _INLINE_BYTES else await asyncio.to_thread(work, *given)


def _read(body: bytes) -> pb.ModelInferRequest:
    try:
        return pb.ModelInferRequest.FromString(body)
    except DecodeError as error:
        raise BadRequest(f"the message cannot be read: {error}", field="message", expected="a ModelInferRequest") from None


def _answer(identity: str, card: Card, samples: ndarray) -> bytes:
    output = pb.ModelInferResponse.InferOutputTensor(name="samples", datatype=oip.DATATYPE_NAMES[card.sample_dtype], shape=samples.shape)
    about = {"model_name": card.model, "model_version": card.version, "id": identity}
    return pb.ModelInferResponse(**about, outputs=[output], raw_output_contents=[samples.tobytes()]).SerializeToString()


def _tensors(message: pb.ModelInferRequest) -> dict[str, ndarray]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        expected = f"{len(message.inputs)}, one for each input, or none"
        raise InvalidValue(f"there are {len(raw)} raw contents", field="raw_input_contents", value=len(raw), expected=expected)
    tensors = {}
    for i, given in enumerate(message.inputs):
        contents, dtype = _CONTENTS.get(given.datatype, _CONTENTS["FP32"])
        data = raw[i] if raw else _numbers(getattr(given.contents, contents), dtype)
        tensors[given.name] = oip.tensor(given.name, given.datatype, list(given.shape), data)
    return tensors


def _numbers(contents: Sequence[Any], dtype: type[np.number]) -> ndarray:
    """Taken in pieces, between which the event loop has its turn: numpy cannot look into what protobuf holds."""
    pieces = [np.array(contents[at : at + _NUMBERS], dtype) for at in range(0, len(contents), _NUMBERS)]
    return np.concatenate([np.empty(0, dtype), *pieces])
