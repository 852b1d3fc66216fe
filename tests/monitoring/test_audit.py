"""The replay audit against the real server: golden samples come back as certified, or they do not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from numpy import ndarray

from monitoring.audit import Compared, differing, replay
from monitoring.probes import Prober
from monitoring.service import Options, Service, listen
from serving.batcher import Batcher
from serving.models import ModelTable
from serving.records import Heartbeat, Record
from serving.rest import App
from serving.service import Service as Answering
from serving.tap import Tap
from training.bundle import Bundle
from training.registry import Registry

FLOATS = np.linspace(-4, 4, 12, dtype=np.float32).reshape(3, 2, 2)
BYTES = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)


def changed(array: ndarray, by: float) -> ndarray:
    array = array.copy()
    array[1, 0, 1] += by
    return array


@pytest.mark.parametrize(
    ("golden", "answered", "wanted"),
    [
        (BYTES, changed(BYTES, 1), [False] * 3),
        (BYTES, changed(BYTES, 2), [False, True, False]),
        (BYTES, changed(BYTES, 250), [False, True, False]),
        (FLOATS, changed(FLOATS, 0.0039), [False] * 3),
        (FLOATS, changed(FLOATS, -0.0041), [False, True, False]),
        (FLOATS, changed(FLOATS, np.nan), [False, True, False]),
        (FLOATS, FLOATS.astype(np.float64), [True] * 3),
        (FLOATS, FLOATS[:, :1], [True] * 3),
        (FLOATS, FLOATS[:2], [True] * 3),
    ],
)
def test_what_counts_as_different(golden: ndarray, answered: ndarray, wanted: list[bool]) -> None:
    assert differing(golden, answered).tolist() == wanted


@contextmanager
def served(registry: Registry) -> Iterator[str]:
    """One replica's ASGI application on a free port; its tap shows nobody anything."""
    with listen("127.0.0.1", 0) as listener:
        table = ModelTable(registry, "cpu")
        table.refresh()
        server = uvicorn.Server(uvicorn.Config(App(Answering(table, Batcher(), Tap(None))), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture
def registry(tmp_path: Path, make_bundle: Callable[..., Bundle]) -> Registry:
    """v1 is healthy, v2 almost: three per cent too wide within its modes, which hardly any statistic sees."""
    for version, width in (("v1", 1.0), ("v2", 1.03)):
        make_bundle(root=tmp_path / "registry", version=version, width=width)
    registry = Registry(tmp_path / "registry")
    registry.set_alias("grid", "production", "v1", reason="test")
    return registry


@pytest.mark.slow
def test_the_server_is_asked_for_golden_samples(registry: Registry) -> None:
    registry.set_alias("grid", "canary", "v2", reason="test")
    with served(registry) as url, httpx.Client(headers={"Accept": "application/x-npy"}, trust_env=False) as client:
        assert replay(client, url, registry.open("grid", "v1")) == Compared(16, 0, near=True, worst=0.0)
        found = replay(client, url, registry.open("grid", "v2"))
        assert found.checked == 16 and found.different > 4 and found.near and 0 < found.worst < 0.02
        with pytest.raises(httpx.HTTPError, match="404"):
            replay(client, url, Bundle(registry.path("grid", "v1"), replace(registry.card("grid", "v1"), version="v9")))


@pytest.mark.slow
def test_a_slightly_wrong_model_is_found_by_the_audit_alone(registry: Registry, tmp_path: Path, draw: Callable[..., ndarray]) -> None:
    registry.set_alias("grid", "production", "v2", reason="test")
    with served(registry) as url:
        service = Service(Options(registry=registry.root, home=tmp_path, serving_url=url, probe_rate=1))
        service.start()
        try:
            wait(lambda: service.view.replays["grid", "mismatched"] > 4)
            assert service.view.models["grid"].snapshot["verdict"]["id"] == "warming_up"
            bundle = registry.open("grid", "v2")
            for seed in range(3):
                record = Record("grid", "v2", "server_seed", seed, 0, draw(bundle, 2048, seed=seed), 0.0)
                service.inbox.put(Heartbeat("a", 0.0, (record,), {}))
            wait(lambda: service.view.models["grid"].snapshot["verdict"]["id"] == "wrong_model")
            assert service.view.alarms == {("grid", "wrong_model"): 1}
            (incident,) = service.incidents.newest()
            assert incident["verdict"] == "wrong_model" and incident["evidence"]["replay"]["mismatched"] > 4
            assert service.state(service.view)["errors"] == []
        finally:
            service.stop()


def wait(true: Callable[[], object]) -> None:
    """Until the service's thread has got there; it has no event for everything."""
    for _ in range(400):
        if true():
            return
        threading.Event().wait(0.05)
    raise AssertionError("not reached")


@pytest.mark.slow
def test_an_audit_that_cannot_be_done_is_said_after_a_while_and_tried_again(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Compared]] = []
    bundle = registry.open("grid", "v1")
    monkeypatch.setattr("monitoring.probes.AUDIT_GRACE", 0.0)
    with listen("127.0.0.1", 0) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    prober = Prober(nowhere, 1, dict, lambda: [bundle], lambda b, found: told.append((b.card.version, found)))
    prober.start()
    try:
        wait(lambda: prober.audit_trouble)
        assert "audit of grid v1 fails" in next(iter(prober.audit_trouble.values())) and told == []
        with served(registry) as url:
            prober.url = url
            wait(lambda: told)
        assert told == [("v1", Compared(16))] and prober.audit_trouble == {}
    finally:
        prober.stop()
