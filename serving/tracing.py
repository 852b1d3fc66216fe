"""OpenTelemetry traces, where somebody names a collector: one span a request, below it its wait, its batches and their runs.

A request's `traceparent` (W3C Trace Context) is continued, and the answer carries the one of its own span. Sending is a thread
of the SDK's; a collector that is slow or dead costs spans, which are counted, and no time. Without a collector nothing of the
SDK is even imported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from serving.logs import Entry

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_BATCHES = 64  # of one request that get spans; a long stream would fill the collector
_TIMEOUT_S = 5.0  # for one message to the collector

current: ContextVar[Trace | None] = ContextVar("trace", default=None)  # of the request that runs now


class Tracer:
    """Sends to the OTLP/HTTP endpoint `url`, such as http://127.0.0.1:4318/v1/traces, `share` of the traces that begin here;
    those that begin elsewhere as their beginner decided. `replica`: who says so. Headers and the like by OTEL_EXPORTER_OTLP_*."""

    def __init__(self, url: str, share: float = 1.0, replica: str = "") -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        counts = self.counts = {"ended": 0, "sent": 0}  # spans; the difference is on its way, or lost

        class Exporter(OTLPSpanExporter):
            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                result = super().export(spans)
                counts["sent"] += len(spans) if result is SpanExportResult.SUCCESS else 0
                return result

        resource = Resource.create({"service.name": "ganwatch", "service.instance.id": replica})
        self._provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)), resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(Exporter(endpoint=url, timeout=_TIMEOUT_S), schedule_delay_millis=500))
        self._tracer = self._provider.get_tracer("ganwatch.serving")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, entry: Entry, carrier: Mapping[str, str]) -> Trace | None:
        """The trace of the request `entry`, whose headers or metadata are `carrier`; None where it is not among those recorded."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract(carrier)
        span = self._tracer.start_span(entry.method, context, SpanKind.SERVER, start_time=int(entry.at * 1e9))
        if not span.is_recording():
            return None
        trace = Trace(self, span, entry)
        current.set(trace)
        return trace

    def close(self) -> None:
        """Send what is left, once."""
        self._provider.shutdown()


class Trace:
    """The span of one request, to which the batcher adds what it did for it. Times are of time.monotonic()."""

    def __init__(self, tracer: Tracer, span: Span, entry: Entry) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer, self._span, self._entry = tracer, span, entry
        self._context = set_span_in_context(span)
        self._batches = 0
        self._epoch = time.time_ns() - time.monotonic_ns()
        entry.trace_id = f"{span.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """Of the request's own span, as the answer carries it."""
        carrier: dict[str, str] = {}
        self._tracer._propagator.inject(carrier, self._context)
        return carrier["traceparent"]

    def batch(self, since: float | None, sealed: float, began: float, ended: float, rows: int, of: int) -> None:
        """`rows` of a batch of `of` were this request's: it was sealed, its run began and ended. `since`: of the first batch, when
        the request was admitted."""
        self._batches += 1
        if self._batches > _BATCHES:
            return
        if since is not None:
            self._child("queue", since, sealed, self._context)
        from opentelemetry.trace import set_span_in_context

        span = self._child("batch", sealed, time.monotonic(), self._context, {"ganwatch.rows": rows, "ganwatch.batch_rows": of})
        self._child("run", began, ended, set_span_in_context(span))

    def _child(self, name: str, began: float, ended: float, context: Any, about: dict[str, Any] | None = None) -> Span:
        span = self._tracer._tracer.start_span(name, context, attributes=about, start_time=self._epoch + int(began * 1e9))
        span.end(self._epoch + int(ended * 1e9))
        self._tracer.counts["ended"] += 1
        return span

    def end(self) -> None:
        """The request is over, and its entry says how."""
        from opentelemetry.trace import Status, StatusCode

        entry, span = self._entry, self._span
        kind = "rpc" if entry.method == "gRPC" else "http"
        about: dict[str, Any] = {"url.path": entry.path, "ganwatch.request_id": entry.id, f"{kind}.response.status_code": entry.status}
        about |= {"http.request.method": entry.method} if kind == "http" else {"rpc.system": "grpc"}
        about |= {f"ganwatch.{name}": value for name in ("model", "version", "n") if (value := getattr(entry, name))}
        about |= {"ganwatch.seed": str(entry.seed)} if entry.seed is not None else {}  # beyond 2^53 not every reader has it exactly
        about |= {"ganwatch.batches": self._batches}
        span.set_attributes(about)
        span.update_name(f"{entry.method} {entry.path}" if not entry.model else f"sample {entry.model}")
        if entry.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()
        self._tracer.counts["ended"] += 1
