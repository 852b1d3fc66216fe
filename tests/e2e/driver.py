"""A ganwatch of the tests' own, driven as a user drives it: by its command line, its ports and its page."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PORTS = ("http", "grpc", "monitor", "dashboard", "prometheus", "alertmanager")  # the rest is chosen by `up`


@dataclass
class Stack:
    """A ganwatch of our own: its home, its ports, and the command line that talks to it."""

    home: Path
    ports: dict[str, int]
    model: str = "digits"
    lines: list[str] = field(default_factory=list)  # what was printed

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "GANWATCH_HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "200"}

    @property
    def flags(self) -> list[str]:
        return [part for name, port in self.ports.items() for part in (f"--ports.{name}", str(port))]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "deploy.cli", *words]

    def run(self, *words: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*words), cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json").stdout)

    def url(self, name: str, path: str = "") -> str:
        return f"http://127.0.0.1:{self.ports[name]}{path}"

    def state(self) -> dict[str, Any]:
        return httpx.get(self.url("monitor", "/api/state"), timeout=60).json()["models"][self.model]

    def sample(self, **body: Any) -> httpx.Response:
        return httpx.post(self.url("http", f"/v1/models/{self.model}/sample"), json=body, headers={"Accept": "application/x-npy"}, timeout=60).raise_for_status()

    def verdict(self, wanted: str, seconds: float = 240, traffic: Callable[[], object] | None = None) -> dict[str, Any]:
        """The monitor's state once its verdict is `wanted`, read from its event stream; `traffic` is sent meanwhile."""
        deadline = time.monotonic() + seconds
        model: dict[str, Any] = {}
        with httpx.stream("GET", self.url("monitor", "/api/events"), timeout=60) as events:
            for line in events.iter_lines():
                if line.startswith("data:"):
                    model = json.loads(line[5:])["models"].get(self.model, {})
                    if model and model["snapshot"]["verdict"]["id"] == wanted:
                        return model
                    if traffic is not None:
                        traffic()
                assert time.monotonic() < deadline, f"no {wanted} within {seconds} s; the monitor says {model.get('snapshot', {}).get('verdict')}"
        raise AssertionError("the monitor ended its event stream")

    def query(self, expression: str, wanted: Callable[[list[dict[str, Any]]], bool], seconds: float = 120) -> list[dict[str, Any]]:
        """What Prometheus answers, asked until it is as `wanted`."""
        deadline = time.monotonic() + seconds
        while True:
            answer = httpx.get(self.url("prometheus", "/api/v1/query"), params={"query": expression}, timeout=60).json()["data"]["result"]
            if wanted(answer):
                return answer
            assert time.monotonic() < deadline, f"{expression}: {answer}"
            threading.Event().wait(0.2)

    def page_says(self, picture: Path, verdict: str, modes: list[str]) -> None:
        """The live page in a real browser shows `verdict` and names the modes; leaves a screenshot."""
        if shutil.which("chromium") is None:
            pytest.skip("chromium is not installed (.ci/debian-packages installs it); everything up to the page passed")
        from playwright.sync_api import sync_playwright

        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        with sync_playwright() as play, contextlib.closing(play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)) as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(self.url("monitor", "/"))
            page.wait_for_selector(f"#verdict[data-verdict={verdict}]", timeout=60_000)
            text = page.inner_text("#verdict")
            page.screenshot(path=picture, full_page=True)
        assert all(mode in text for mode in modes)
        with Image.open(picture) as image:
            assert np.asarray(image).std() > 5

    def assert_gone(self, run: dict[str, Any]) -> None:
        """No process, no listening port and no temporary file of that run is left."""
        assert not (self.home / "run.json").exists() and not Path(run["temp"]).exists()
        assert [port for port in run["settings"]["ports"].values() if _listens(port)] == []
        assert [p.pid for p in psutil.process_iter() if run["run_id"] in _environment(p)] == []


def _listens(port: int) -> bool:
    """Whether somebody answers there. A port whose last connections the system still remembers is free."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _environment(process: psutil.Process) -> set[str]:
    with contextlib.suppress(psutil.Error):
        return set(process.environ().values())
    return set()
