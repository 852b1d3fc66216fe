"""Sends the states of this monitor to the one that sums up several: each monitor looks at a part of the samples, one verdict is given.

Once a second the newest state of every live version goes to `POST /v1/merge/{model}/{version}`. A state holds all that the
monitor ever saw, so one that is lost costs nothing and one that comes twice counts once. It does not know what a state means.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from monitoring.states import encode

TIMEOUT = 5.0  # seconds a request may take


def shard_name(home: Path) -> str:
    """The name of the monitor whose states lie under `home`, as long as they lie there: the same one after a restart, as
    otherwise its samples would be counted twice."""
    path = home / "monitor" / "shard"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()


class Shipper:
    """`offer` is given what is to be sent and never waits; `acknowledged` is told of alarms that were acknowledged over there."""

    def __init__(self, url: str, shard: str, acknowledged: Callable[[str, str, float], None]) -> None:
        self.url, self.shard, self.acknowledged = url.rstrip("/"), shard, acknowledged
        self.trouble: str | None = None  # why nothing arrives over there
        self._waiting: dict[tuple[str, str], dict[str, Any]] = {}
        self._news, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="shipping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once the request under way has ended."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    def offer(self, states: dict[tuple[str, str], dict[str, Any]]) -> None:
        """The newest state by model and version; what waited of them is out of date."""
        with self._news:
            self._waiting |= states
            self._news.notify()

    def _run(self) -> None:
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._waiting or self._stopping)
                    if self._stopping:
                        return
                    states, self._waiting = self._waiting, {}
                for (model, version), state in states.items():
                    self._send(client, model, version, state)

    def _send(self, client: httpx.Client, model: str, version: str, state: dict[str, Any]) -> None:
        url = f"{self.url}/v1/merge/{model}/{version}"
        try:
            answer = client.post(url, params={"shard": self.shard}, content=encode(state))
            if answer.status_code != 200:
                self.trouble = f"states are refused by the monitor that sums them up: POST {url}: {answer.status_code} {answer.text[:300]}"
                return
            at = float(answer.json()["acknowledged_at"])
        except Exception as error:  # httpx.InvalidURL is no HTTPError, a proxy's page no answer of ours; the next state is sent all the same
            self.trouble = f"states do not reach the monitor that sums them up: POST {url}: {error}"
            return
        self.trouble = None
        if at > state["acknowledged_at"]:
            self.acknowledged(model, version, at)
