"""Probes and the states that are shipped meet servers that misbehave: it is said, and both threads go on."""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from monitoring.audit import Compared
from monitoring.probes import Prober, Target
from monitoring.shipping import Shipper
from training.bundle import Bundle

Answer = tuple[dict[str, str], bytes] | None  # headers and body; None: the connection is closed instead


@pytest.fixture
def serving() -> Iterator[Callable[[Callable[[str, bytes], Answer]], str]]:
    """serving(answer) -> the URL of a server that answers a POST with `answer(path, body)`."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[str, bytes], Answer]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                found = answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
                if found is not None:
                    self.send_response(200)
                    for name, value in (found[0] | {"Content-Length": str(len(found[1]))}).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(found[1])

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_where_production_fails_the_candidate_is_not_blamed(serving: Callable[..., str], make_bundle: Callable[..., Bundle]) -> None:
    """What the candidate was probed with, production does not answer: the probe was answered, the pair is counted as lost, and the candidate is audited."""
    bundle = make_bundle(version="v2")
    golden = bundle.certificate.golden_sample

    def answer(path: str, body: bytes) -> Answer:
        asked, buffer = json.loads(body), io.BytesIO()
        if "/v1/sample" in path:
            return None
        np.save(buffer, golden[[asked.get("offset", 0)]])
        return {"X-Ganwatch-Seed": "7", "X-Ganwatch-Offset": "0"}, buffer.getvalue()

    told: queue.Queue[Compared] = queue.Queue()
    prober = Prober(serving(answer), 1, lambda: [Target("grid", "v2", 0.0, against="v1")], lambda: [bundle], lambda _, found: told.put(found))
    prober.start()
    try:
        assert told.get(timeout=20) == Compared(16)
        assert prober.trouble == {} and prober.outcomes["grid", "unreachable"] == 0 < prober.outcomes["grid", "ok"]
        assert prober.outcomes["grid", "unpaired"] > 0
    finally:
        prober.stop()


def test_probes_to_what_is_no_address_are_said_to_fail_round_after_round() -> None:
    rounds: queue.Queue[None] = queue.Queue()
    prober = Prober("http://localhost:abc", 1, lambda: rounds.put(None) or [Target("grid", "v1", 0.0)], list, lambda *_: None)
    prober.start()
    try:
        for _ in range(2):
            rounds.get(timeout=20)
        assert "abc" in prober.trouble["grid", "v1"] and prober.outcomes["grid", "unreachable"] >= 1
    finally:
        prober.stop()


def test_a_page_in_place_of_an_answer_does_not_end_the_shipping(serving: Callable[..., str]) -> None:
    arrived: queue.Queue[str] = queue.Queue()
    answers = iter([b"<html>down for maintenance</html>", b'{"acknowledged_at": 5.0}'])

    def answer(path: str, body: bytes) -> Answer:
        arrived.put(path)
        return {}, next(answers)

    settled: queue.Queue[tuple[str, str, float]] = queue.Queue()
    shipper = Shipper(serving(answer), "here", lambda *what: settled.put(what))
    shipper.start()
    try:
        for _ in range(2):
            shipper.offer({("grid", "v1"): {"acknowledged_at": 0.0}})
            assert arrived.get(timeout=20) == "/v1/merge/grid/v1?shard=here"
        assert settled.get(timeout=20) == ("grid", "v1", 5.0) and shipper.trouble is None
    finally:
        shipper.stop()
