"""The way from a faulty generator to an alert, all of it real but Ray: serving, the monitor's process, Prometheus with our rules."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from deploy.observability import prometheus_config
from serving.batcher import Batcher
from serving.models import ModelTable
from serving.records import Heartbeat, Record
from serving.rest import App
from serving.service import Service
from serving.tap import Tap
from training.journal import Journal
from training.registry import Registry

ROOT = Path(__file__).parents[2]

_bundles = importlib.util.spec_from_file_location("tiny_bundles", ROOT / "tests" / "monitoring" / "conftest.py")
_module = importlib.util.module_from_spec(_bundles)
_bundles.loader.exec_module(_module)
make_bundle = _module.make_bundle  # the fixture: a bundle of ten modes in the plane


@dataclass(frozen=True)
class Prometheus:
    url: str
    monitor_url: str

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, trust_env=False)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body}"
        return body["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        return [(series["metric"], float(series["value"][1])) for series in self.get("query", query=expr)["result"]]

    def until(self, expr: str, seconds: float = 120.0) -> list[tuple[dict[str, str], float]]:
        """What `expr` gives, as soon as it gives anything."""
        return wait_for(lambda: self.query(expr), expr, seconds)


def wait_for(ready: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """The first true answer of `ready`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := ready():
                return answer
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.05)


@contextmanager
def process(command: list[str], log: Path) -> Iterator[None]:
    with open(log, "wb") as output:
        started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
        assert started.poll() is None, log.read_text()
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(60)
        finally:
            started.kill()


@contextmanager
def served(registry: Registry, port: int, monitor_url: str) -> Iterator[None]:
    """One replica's ASGI application, on uvicorn in a thread."""
    table = ModelTable(registry, "cpu")
    table.refresh()
    app = App(Service(table, Batcher(), Tap(monitor_url)))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, "serving")
        yield
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def prometheus(make_bundle: Callable[..., Any], tmp_path: Path, free_ports: Callable[[int], list[int]]) -> Iterator[Prometheus]:
    """Prometheus, having scraped the monitor of a model `grid` that lost its modes 3 and 8 and has had every kind of request;
    a healthy canary is probed beside it, and another version trains, which looked bad for a moment."""
    if (binary := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    root = tmp_path / "registry"
    make_bundle(root=root, lost=(3, 8))
    registry = Registry(root)
    registry.set_alias("grid", "production", "v1", reason="test")
    make_bundle(root=root, version="v2")  # healthy, with no traffic of its own
    registry.set_alias("grid", "canary", "v2", reason="test")
    journal = Journal(tmp_path / "runs" / "20261125T000000-grid-0a1b2c")
    journal.write("begin", model="grid", dataset="grid", steps=5000)
    figures = {"divergence": 0.2, "accuracy": 0.7, "mode_coverage": 1.0, "gradient_norm": 0.3, "weight": 0.5}
    for step, up in ((50, {"perfect_critic": "the critic tells 99.0% apart"}), (100, {})):
        journal.write("train", step=step, steps=5000, seconds_left=60.0, alarms=up, failing=[*up], **figures)
    serving_port, monitor_port, port = free_ports(3)
    serving_url, monitor_url, url = (f"http://127.0.0.1:{p}" for p in (serving_port, monitor_port, port))
    config = tmp_path / "prometheus.yml"
    config.write_text(prometheus_config(monitor_port=monitor_port, alertmanager_port=None, scrape_interval="1s"))
    monitor = [sys.executable, "-m", "monitoring.service", f"--registry={root}", f"--home={tmp_path}", f"--port={monitor_port}"]
    monitor += [f"--serving-url={serving_url}", "--arl=10000", "--probe-rate=200"]
    with ExitStack() as stack:
        stack.enter_context(process(monitor, tmp_path / "monitor.log"))
        wait_for(lambda: httpx.get(f"{monitor_url}/healthz", trust_env=False).status_code == 200, "monitor")
        stack.enter_context(served(registry, serving_port, monitor_url))
        with httpx.Client(base_url=serving_url, trust_env=False) as client:
            # The first is more than the tap shows to a monitor in a second, so that it counts what it leaves out.
            for body, status in (({"n": 5000}, 200), ({"n": 500, "seed": 7}, 200), ({"n": -1}, 422)):
                assert client.post("/v1/models/grid/sample", json=body).status_code == status
        broken = Record("grid", "v1", "server_seed", 1, 0, np.zeros((8, 3), np.float32), time.time())
        heartbeat = Heartbeat("broken", time.time(), (broken,), {}).encode()
        assert httpx.post(f"{monitor_url}/api/records", content=heartbeat, trust_env=False).status_code == 204
        command = [binary, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        stack.enter_context(process([*command, f"--web.listen-address=127.0.0.1:{port}"], tmp_path / "prometheus.log"))
        found = Prometheus(url, monitor_url)
        # A probe's counter is born with the first probe, and a rate needs two points.
        wait_for(lambda: httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200, "Prometheus")
        found.until("ganwatch_comparison_pairs > 0")
        found.until('count_over_time(ganwatch_probe_requests_total{outcome="ok"}[1m]) >= 3')
        yield found
