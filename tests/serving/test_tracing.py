"""Traces as a collector gets them: over real HTTP, in OTLP's own protobuf."""

import asyncio
import contextlib
import http.server
import json
import subprocess
import sys
import threading
import time

import numpy as np
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.batcher import Batcher
from serving.logs import AccessLog
from serving.protocol import ganwatch_pb2 as own
from serving.tracing import Tracer
from tests.serving.conftest import connect, running
from tests.serving.test_oip import ROOT, calling

DIGITS = "/v1/models/digits/sample"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextlib.contextmanager
def collector():
    """(url, spans): an OTLP/HTTP receiver, and what it got."""
    spans = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/traces"
            for resource in request.resource_spans:
                assert {"service.name", "service.instance.id"} <= {a.key for a in resource.resource.attributes}
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{receiver.server_port}/v1/traces", spans
        finally:
            receiver.shutdown()
            thread.join()


def about(span) -> dict:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_its_wait_its_batches_and_their_runs(registry, tmp_path):
    log = AccessLog(tmp_path / "access.jsonl")

    async def scene(tracer):
        async with running(registry, batcher=Batcher(batch=64)) as app, connect(app) as client:
            app.service.tracer, app.service.log = tracer, log
            log.start()
            answers = [
                await client.post(DIGITS, json={"n": 100, "seed": 2**63 - 1}, headers={"traceparent": PARENT, "X-Request-Id": "mine"}),
                await client.post(DIGITS, json={"n": 0}),
                await client.post(DIGITS, json={}, headers={"traceparent": PARENT[:-1] + "0"}),  # whoever began it does not record it
                await client.post(DIGITS, json={}, headers={"traceparent": "nonsense"}),
            ]
            await asyncio.to_thread(log.close)
            return answers

    with collector() as (url, spans):
        tracer = Tracer(url, replica="r1")
        drawn, refused, unrecorded, nonsense = asyncio.run(scene(tracer))
        tracer.close()
        assert tracer.counts == {"ended": len(spans), "sent": len(spans)}
    trace_id, parent_id = PARENT.split("-")[1:3]
    ours = [span for span in spans if span.trace_id.hex() == trace_id]
    (request,) = [span for span in ours if span.parent_span_id.hex() == parent_id]
    assert drawn.headers["traceparent"] == f"00-{trace_id}-{request.span_id.hex()}-01"
    found = about(request)
    assert (request.name, found["ganwatch.n"], found["ganwatch.seed"], found["ganwatch.version"]) == ("sample digits", 100, str(2**63 - 1), "v1")
    assert (found["http.response.status_code"], found["ganwatch.request_id"], found["ganwatch.batches"]) == (200, "mine", 2)
    children = {name: [span for span in ours if span.name == name] for name in ("queue", "batch", "run")}
    assert [len(spans) for spans in children.values()] == [1, 2, 2]
    assert all(span.parent_span_id == request.span_id for span in children["queue"] + children["batch"])
    assert [about(span)["ganwatch.rows"] for span in children["batch"]] == [64, 36]
    for run in children["run"]:
        (batch,) = [span for span in children["batch"] if span.span_id == run.parent_span_id]
        times = [request, batch, run]
        assert all(a.start_time_unix_nano - 1e6 <= b.start_time_unix_nano for a, b in zip(times, times[1:], strict=False))
        assert run.start_time_unix_nano <= run.end_time_unix_nano <= batch.end_time_unix_nano <= request.end_time_unix_nano + 1e6
    (failed,) = [span for span in spans if about(span).get("http.response.status_code") == 422]
    assert refused.headers["traceparent"].split("-")[1] == failed.trace_id.hex()
    assert "traceparent" not in unrecorded.headers
    assert nonsense.headers["traceparent"].split("-")[1] not in (trace_id, "nonsense")
    assert json.loads(log.path.read_text().splitlines()[0])["trace_id"] == trace_id


def test_grpc_streams_have_traces_and_long_ones_few_spans(registry, samplers, monkeypatch):
    monkeypatch.setattr("serving.tracing._BATCHES", 3)

    async def scene(tracer):
        async with calling(registry) as (app, channel):
            app.service.tracer, app.service.batcher.batch = tracer, 256
            sample = channel.unary_stream(
                "/ganwatch.v1.Generator/Sample",
                request_serializer=own.SampleRequest.SerializeToString,
                response_deserializer=own.Piece.FromString,
            )
            call = sample(own.SampleRequest(model="ring", n=2000, seed=7), metadata=(("traceparent", PARENT),))
            rows = [np.frombuffer(piece.samples, np.float32) async for piece in call]
            return sum(map(len, rows)), dict(await call.trailing_metadata())

    with collector() as (url, spans):
        tracer = Tracer(url)
        count, metadata = asyncio.run(scene(tracer))
        tracer.close()
    assert count == 4000
    (request,) = [span for span in spans if span.parent_span_id.hex() == PARENT.split("-")[2]]
    assert metadata["traceparent"] == f"00-{request.trace_id.hex()}-{request.span_id.hex()}-01"
    assert about(request)["ganwatch.batches"] == 8
    assert sum(span.name == "batch" for span in spans) == 3


def test_only_the_share_that_is_asked_for_is_traced(registry):
    async def scene(tracer):
        async with running(registry) as app, connect(app) as client:
            app.service.tracer = tracer
            return [await client.post(DIGITS, json={}) for _ in range(3)] + [await client.post(DIGITS, json={}, headers={"traceparent": PARENT})]

    with collector() as (url, spans):
        tracer = Tracer(url, share=0.0)
        *free, traced = asyncio.run(scene(tracer))
        tracer.close()
    assert not any("traceparent" in answer.headers for answer in free)
    assert "traceparent" in traced.headers
    assert {span.trace_id.hex() for span in spans} == {PARENT.split("-")[1]}


def test_a_collector_that_is_not_there_costs_spans_and_no_answers(registry, free_ports, caplog):
    async def scene(tracer):
        async with running(registry) as app, connect(app) as client:
            app.service.tracer = tracer
            answer = await client.post(DIGITS, json={})
            before = time.monotonic()
            await asyncio.to_thread(tracer.close)
            return answer, time.monotonic() - before, app.service._gauges()

    (port,) = free_ports(1)
    answer, seconds, gauges = asyncio.run(scene(Tracer(f"http://127.0.0.1:{port}/v1/traces")))
    assert answer.status_code == 200
    assert seconds < 20
    assert (gauges["trace_spans_ended_total"], gauges["trace_spans_sent_total"]) == (4, 0)


def test_without_a_collector_nothing_of_the_sdk_is_imported():
    code = "import sys; import serving.service; assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
