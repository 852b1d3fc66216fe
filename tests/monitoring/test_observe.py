"""Samples that somebody else serves, posted to the monitor: the same verdicts, refusals in words."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy import ndarray

from monitoring.service import Options, Service, build
from training.bundle import Bundle
from training.registry import Registry


class Client:
    """Of a monitor whose threads do not run: `step` is what they would do."""

    def __init__(self, options: Options) -> None:
        self.app = build(options)
        self.service: Service = self.app.state.service

    def post(self, path: str, **request: object) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1") as client:
                return await client.post(path, **request)

        return asyncio.run(ask())

    def step(self) -> dict:
        self.service.watch.eat(self.service.inbox.take(0.0), 1_800_000_000.0)
        return self.service.watch.publish(1_800_000_000.0).models["grid"].snapshot


@pytest.fixture
def client(tmp_path: Path, make_bundle: Callable[..., Bundle]) -> Iterator[Client]:
    """A monitor of a model `grid` that nobody of ours serves."""
    make_bundle(root=tmp_path / "registry")
    Registry(tmp_path / "registry").set_alias("grid", "production", "v1", reason="test")
    client = Client(Options(registry=tmp_path / "registry", home=tmp_path, probe_rate=0, inbox=5000))
    yield client
    client.service.close()


def npy(array: ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_independent_samples_are_judged_and_others_only_shown(client, make_bundle, draw):
    lossy = draw(make_bundle(lost=(3, 8)), 3000)
    answer = client.post("/v1/observe/grid", content=npy(lossy))
    assert answer.status_code == 202 and answer.json() == {"model": "grid", "version": "v1", "received": 3000, "judged": False}
    seen = client.step()
    assert (seen["monitored"], seen["served"], seen["verdict"]["id"]) == (0, 3000, "warming_up")
    assert client.post("/v1/observe/grid?iid=true&version=production", content=npy(lossy)).json()["judged"]
    seen = client.step()
    assert (seen["monitored"], seen["served"], seen["verdict"]["modes"]) == (3000, 6000, ["3", "8"])
    view = client.service.watch.publish(1_800_000_000.0)
    assert view.observed == {("grid", "observed"): 3000, ("grid", "observed_iid"): 3000}  # nobody's traffic is counted as that of our servers
    assert view.models["grid"].live[0].fresh_rate == 1500  # and no probe is sent where samples come


def test_raw_values_are_the_same_samples(client, make_bundle, draw):
    healthy = draw(make_bundle(), 1000)
    headers = {"X-Ganwatch-Shape": "1000,2", "X-Ganwatch-Dtype": "float32", "X-Ganwatch-Iid": "true"}
    assert client.post("/v1/observe/grid?version=v1", content=healthy.tobytes(), headers=headers).status_code == 202
    assert client.step()["verdict"]["id"] == "healthy"


GOOD = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("other", npy(GOOD), {}, 404, "no watched model 'other'"),
        ("grid?version=v9", npy(GOOD), {}, 404, "'v9' of grid is not watched"),
        ("grid?iid=perhaps", npy(GOOD), {}, 422, "iid is 'perhaps'"),
        ("grid", b"", {}, 422, "no npy"),
        ("grid", b"nonsense", {}, 422, "no npy"),
        ("grid", b"PK\x03\x04junk", {}, 422, "no npy"),
        ("grid", npy(GOOD).replace(b"{'descr'", b"{'descr\n"), {}, 422, "no npy"),
        ("grid", npy(GOOD).replace(b"(4, 2)", b"(9**9)"), {}, 422, "no npy"),
        ("grid", npy(GOOD), {"Content-Length": "many"}, 202, ""),
        ("grid", npy(GOOD.astype(np.float64)), {}, 422, "float64 [4, 2]"),
        ("grid", npy(np.zeros((4, 3), np.float32)), {}, 422, "float32 [4, 3]"),
        ("grid", npy(np.float32(1)), {}, 422, "no single array"),
        ("grid", npy(GOOD)[:-3], {}, 422, "no npy"),
        ("grid", bytes(8), {"X-Ganwatch-Shape": "4,2", "X-Ganwatch-Dtype": "float32"}, 422, "takes 32"),
        ("grid", bytes(8), {"X-Ganwatch-Shape": "-4,-2", "X-Ganwatch-Dtype": "float32"}, 422, "must be like"),
        ("grid", bytes(8), {"X-Ganwatch-Shape": "4,2", "X-Ganwatch-Dtype": "object"}, 422, "uint8 or float32"),
        ("grid", npy(GOOD), {"Origin": "http://evil.example"}, 403, "only this monitor's own page"),
        ("grid", npy(np.zeros((5001, 2), np.float32)), {}, 503, "no room"),
    ],
)
def test_what_is_no_observation_is_refused_in_words(client, path, body, headers, status, words):
    answer = client.post(f"/v1/observe/{path}", content=body, headers=headers)
    assert answer.status_code == status and (status == 202 or words in answer.json()["error"]["message"]), answer.text
    assert bool(client.service.inbox.take(0.0)) == (status == 202)


def test_what_fails_is_told_until_it_succeeds(client):
    def step(error: Exception | None) -> None:
        if error is not None:
            raise error

    client.service._step(step, OSError("no space left"))
    assert "no space left" in client.service.state(client.service.view)["errors"][0]
    client.service._step(step, None)
    assert client.service.state(client.service.view)["errors"] == []
