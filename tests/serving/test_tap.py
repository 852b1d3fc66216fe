"""The tap against a real small HTTP server: what arrives, what is dropped, and that nobody waits for it."""

import asyncio
import queue
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from serving.records import Heartbeat, Record
from serving.tap import Tap
from tests.serving.conftest import connect, running


@contextmanager
def monitor(status: int = 204):
    """A server that keeps what is posted to it. Yields (url, queue of Heartbeats, gate that holds answers back)."""
    beats: queue.Queue[Heartbeat] = queue.Queue()
    gate = threading.Event()
    gate.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            assert self.path == "/api/records"
            beats.put(Heartbeat.decode(self.rfile.read(int(self.headers["Content-Length"]))))
            gate.wait(10)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # the other side may leave
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", beats, gate
    finally:
        gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def show(tap: Tap, whole: Record) -> None:
    """What a service does: the first rows of an answer, as many as are wanted."""
    if count := tap.wanted(whole.model, len(whole.samples), fresh=whole.is_fresh):
        tap.offer(replace(whole, samples=whole.samples[:count].copy()))


def record(count: int, origin="server_seed", **fields) -> Record:
    samples = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    return Record("ring", "v1", origin, 7, 0, samples, time.time(), **fields)


def test_records_and_counters_arrive_within_a_second_and_silence_is_told_too():
    with monitor() as (url, beats, _):
        tap = Tap(url, gauges=lambda: {"queued_samples": 3})
        tap.counters['requests_total{model="ring",status="200"}'] += 2
        tap.start()
        show(tap, record(10))
        beat = beats.get(timeout=5)
        np.testing.assert_array_equal(beat.records[0].samples, record(10).samples)
        assert beat.counters == {'requests_total{model="ring",status="200"}': 2.0, "queued_samples": 3.0}
        silent = beats.get(timeout=5)
        assert silent.records == ()
        assert silent.replica == beat.replica
        assert silent.at - beat.at < 1.9
        show(tap, record(1))
        tap.close()
        rest = [beats.get_nowait() for _ in range(beats.qsize())]
        assert sum(len(beat.records) for beat in rest) == 1  # what was left is sent


def test_the_budget_takes_the_first_rows_and_fresh_samples_have_their_own():
    tap = Tap("http://127.0.0.1:9", rate=50.0)
    show(tap, record(40, origin="client_seed"))
    show(tap, record(40, origin="server_seed", truncation=0.5))  # not fresh either
    show(tap, record(100, origin="probe"))
    lengths = {(r.origin, len(r.samples)) for r in tap._ring}
    assert lengths == {("client_seed", 40), ("server_seed", 10), ("probe", 50)}
    assert tap.counters['tap_skipped_samples_total{model="ring"}'] == 80
    probe = next(r for r in tap._ring if r.origin == "probe")
    np.testing.assert_array_equal(probe.samples, record(50).samples)
    assert probe.samples.base is None


def test_small_answers_leave_room_for_large_ones():
    tap = Tap("http://127.0.0.1:9", rate=100.0)
    budget = tap._budgets[True]
    now, step = budget._at, 1 / 400  # four times the budget
    shown = {1: 0, 64: 0}
    with pytest.MonkeyPatch.context() as patch:
        for i in range(40_000):
            patch.setattr("serving.tap.time.monotonic", lambda at=now + i * step: at)
            count = 64 if i % 40 == 0 else 1
            shown[count] += tap.wanted("ring", count, fresh=True)
    assert sum(shown.values()) == pytest.approx(100 + 100 * 100, rel=0.01)  # all of the budget, and what it began with
    assert shown[64] > 1000  # of 64,000: once in twenty for each answer, as often as small ones, and five rows then


def test_without_a_monitor_nothing_is_kept():
    tap = Tap(None)
    tap.start()
    show(tap, record(10))
    tap.close()
    assert not tap._ring


def test_a_monitor_that_is_absent_or_refuses_costs_counted_drops():
    with monitor(status=500) as (url, beats, _):
        for target in (url, "http://127.0.0.1:9"):
            tap = Tap(target)
            tap.start()
            show(tap, record(10))
            tap.close()
            assert tap.counters['tap_dropped_samples_total{model="ring"}'] == 10
        assert beats.qsize() == 1


def test_a_gauge_that_fails_costs_one_heartbeat_which_is_counted_and_logged(caplog):
    failing = iter([True])

    def gauges():
        if next(failing, False):
            raise RuntimeError("dictionary changed size during iteration")
        return {}

    with monitor() as (url, beats, _):
        tap = Tap(url, gauges=gauges)
        show(tap, record(10))
        tap.start()
        beat = beats.get(timeout=5)
        tap.close()
    assert beat.records == () and beat.counters['tap_dropped_samples_total{model="ring"}'] == 10
    assert "a heartbeat with 1 records is lost" in caplog.text and "changed size" in caplog.text


def test_a_slow_monitor_bounds_memory_and_blocks_nobody(monkeypatch):
    with monitor() as (url, beats, gate):
        gate.clear()
        tap = Tap(url, rate=100.0)
        tap._budgets[True]._rate = tap._budgets[True]._tokens = 1e9
        tap.start()
        show(tap, record(1))
        beats.get(timeout=5)  # one heartbeat is now in flight, and stays there
        started = time.perf_counter()
        for _ in range(1000):
            show(tap, record(10))
        assert time.perf_counter() - started < 1
        assert tap._held <= 800  # 4 s of both budgets
        assert tap.counters['tap_dropped_samples_total{model="ring"}'] == 10_000 - tap._held
        assert beats.empty()
        gate.set()
        tap.close()
        assert sum(len(r.samples) for r in beats.get(timeout=5).records) == 800


@pytest.mark.parametrize(
    ("body", "headers", "origin", "fresh"),
    [
        ({"n": 3}, {}, "server_seed", True),
        ({"n": 3}, {"X-Ganwatch-Probe": "1"}, "probe", True),
        ({"n": 3, "seed": 1}, {}, "client_seed", False),
        ({"n": 3, "seed": 1}, {"X-Ganwatch-Probe": "1"}, "client_seed", False),
        ({"n": 3, "truncation": 0.5}, {}, "server_seed", False),
        ({"n": 3, "label": 1}, {}, "server_seed", False),
    ],
)
def test_the_monitor_sees_what_the_client_got_and_where_it_came_from(registry, body, headers, origin, fresh):
    async def scene(url):
        async with running(registry, tap_url=url) as app, connect(app) as client:
            answer = await client.post("/v1/models/clothes/sample", json=body, headers=headers)
            app.service.tap.start()
            await asyncio.to_thread(app.service.tap.close)
            return answer.json()

    with monitor() as (url, beats, _):
        answer = asyncio.run(scene(url))
        beat = beats.get(timeout=5)
    (found,) = beat.records
    np.testing.assert_array_equal(found.samples, np.array(answer["samples"], np.uint8))
    assert (found.model, found.version, found.origin, found.seed, found.offset) == ("clothes", "v1", origin, answer["seed"], 0)
    assert (found.label, found.truncation) == (body.get("label"), body.get("truncation", 1.0))
    assert found.is_fresh == fresh
    assert beat.counters['samples_total{model="clothes",version="v1"}'] == 3
    assert beat.counters['requests_total{model="clothes",status="200"}'] == 1
    assert beat.counters['device_info{provider="CPUExecutionProvider"}'] == 1
    assert beat.counters['cuda_graph_fallbacks{model="digits",version="v1"}'] == 0
    for name in ("load_failures_total", "tap_dropped_samples_total"):
        assert beat.counters[f'{name}{{model="ring"}}'] == 0
