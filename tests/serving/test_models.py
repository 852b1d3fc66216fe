"""The table follows the aliases; what cannot be loaded never replaces what serves, and no request notices a swap."""

import asyncio
import io
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from serving.errors import NotFound
from serving.models import ModelTable
from serving.sampler import Sampler, Window
from serving.session import cuda_devices
from tests.serving.conftest import connect, publish, running
from training.bundle import BundleError

DIGITS = "/v1/models/digits/sample"


def spoil(path: Path, how: str) -> None:
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "altered":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.onnx", "features.onnx", "reference.npz", "certificate.npz"])
@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_a_spoilt_bundle_is_refused_and_the_serving_version_stays(registry, file, how):
    bundle = publish(registry, "digits", shift=1.0, promote=False)
    registry.set_alias(
        "digits", "canary", "v2", reason="test"
    )  # as `production` after the fact: hashes are checked when an alias is set
    spoil(bundle.path / file, how)
    aliases = registry.root / "digits" / "aliases.json"
    aliases.write_text(aliases.read_text().replace('"canary"', '"production"'))

    async def scene():
        async with running(registry) as app, connect(app) as client:
            return await client.get("/v2/health/ready"), app.service.table.load_failures["digits"]

    ready, failures = asyncio.run(scene())  # a replica that starts now has no version to fall back to
    assert ready.status_code == 503
    assert file in ready.json()["error"]["message"]
    assert failures == 1

    aliases.write_text(json.dumps({"history": json.loads(aliases.read_text())["history"][:1]}))
    table = ModelTable(registry, "cpu")
    table.refresh()
    serving = table.models["digits"].serving["production"]
    history = json.loads(aliases.read_text())["history"]
    aliases.write_text(json.dumps({"history": [*history, {**history[0], "version": "v2"}]}))
    table.refresh()
    model = table.models["digits"]
    assert model.serving["production"] is serving
    assert model.aliases == {"production": "v2"}
    assert model.is_ready
    assert file in model.errors["production"]
    assert table.load_failures["digits"] == 1
    with pytest.raises(BundleError, match=file):
        table.load("digits", "v2")


def test_a_refused_version_is_tried_again_later(registry, monkeypatch):
    bundle = publish(registry, "digits", promote=False)
    registry.set_alias("digits", "production", "v2", reason="test")
    whole = bundle.model_path.read_bytes()
    spoil(bundle.model_path, "truncated")
    table = ModelTable(registry, "cpu")
    table.refresh()
    assert not table.models["digits"].is_ready
    bundle.model_path.write_bytes(whole)
    table.refresh()
    assert not table.models["digits"].is_ready
    monkeypatch.setattr("serving.models._RETRY_S", 0.0)
    table.refresh()
    assert table.models["digits"].is_ready
    assert table.load_failures["digits"] == 1


def test_aliases_that_cannot_be_read_leave_what_serves(registry):
    table = ModelTable(registry, "cpu")
    table.refresh()
    before = table.models["digits"].serving
    (registry.root / "digits" / "aliases.json").write_text("{")
    table.refresh()
    assert table.models["digits"].serving == before
    assert "aliases.json" in table.models["digits"].errors


def test_a_registry_that_goes_away_leaves_what_serves(registry):
    table = ModelTable(registry, "cpu")
    table.refresh()
    registry.root.rename(registry.root.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError):
        table.refresh()
    assert table.models["digits"].is_ready
    registry.root.with_name("elsewhere").rename(registry.root)
    shutil.rmtree(registry.root / "ring")
    table.refresh()
    assert set(table.models) == {"clothes", "digits"}


def test_an_unchanged_registry_costs_nothing_and_changes_nothing(registry, monkeypatch):
    table = ModelTable(registry, "cpu")
    table.refresh()
    snapshot = table.models
    monkeypatch.setattr(registry, "history", None)  # would fail if it were read
    table.refresh()
    assert table.models is snapshot


def test_new_models_and_promotions_and_rollbacks_are_followed_by_themselves(registry):
    table = ModelTable(registry, "cpu")
    table.refresh()
    swapped = threading.Event()
    refresh = table.refresh

    def noticed():
        refresh()
        if "fashion" in table.models and table.models["digits"].serving["production"].card.version == "v2":
            swapped.set()

    table.refresh = noticed
    table.start()
    try:
        publish(registry, "digits", shift=1.0)
        publish(registry, "fashion")
        assert swapped.wait(10)
        first = table.loaded("digits", "v1")
        registry.rollback("digits")
        table.refresh()
        assert table.models["digits"].serving["production"] is first  # still warm: a rollback costs no load
    finally:
        table.close()


def test_few_sessions_live_for_versions_without_alias(registry):
    for _ in range(10):
        publish(registry, "ring", shape=(2,), dtype="float32", promote=False)
    table = ModelTable(registry, "cpu")
    table.refresh()
    named = {name: model.serving["production"] for name, model in table.models.items()}
    samplers = [table.load("ring", f"v{i}") for i in range(2, 12)]
    assert table.loaded("ring", "v11") is table.load("ring", "v11") is samplers[-1]
    assert table.loaded("ring", "v2") is None
    assert table.load("ring", "v2") is not samplers[0]
    assert len(table._recent) == 8 + len(named)
    registry.set_alias("ring", "shadow", "v11", reason="test")
    table.refresh()  # whatever else was asked for, what serves already is not loaded again
    assert {name: model.serving["production"] for name, model in table.models.items()} == named
    assert table.models["ring"].serving["shadow"] is samplers[-1]
    assert table.loaded("ring", "v99") is None
    with pytest.raises(FileNotFoundError):
        table.load("ring", "v99")


def test_a_version_that_loads_slowly_holds_up_nobody_else(registry, monkeypatch):
    for _ in range(6):
        publish(registry, "ring", shape=(2,), dtype="float32", promote=False)
    publish(registry, "digits", shift=1.0, promote=False)
    gate, begun = threading.Event(), []

    def slow(bundle, *rest):
        if bundle.card.model == "ring":
            begun.append(bundle.card.version)
            assert gate.wait(120)
        return Sampler(bundle, *rest)

    async def scene():
        async with running(registry) as app:
            service, table = app.service, app.service.table
            monkeypatch.setattr("serving.models.Sampler", slow)
            waiting = [asyncio.ensure_future(service.find("ring", f"v{i}")) for i in (2, 2, 3, 4, 5, 6, 7)]
            while len(begun) < 2:
                await asyncio.sleep(0.005)
            registry.set_alias("digits", "production", "v2", reason="test")
            await asyncio.wait_for(asyncio.to_thread(table.refresh), 60)
            assert table.models["digits"].serving["production"].card.version == "v2"
            assert (await asyncio.wait_for(service.find("digits", "v1"), 60)).card.version == "v1"
            with pytest.raises(NotFound):
                await asyncio.wait_for(service.find("ring", "v99"), 60)
            assert [work for work in waiting if work.done()] == []
            gate.set()
            found = await asyncio.gather(*waiting)
            assert [sampler.card.version for sampler in found] == [f"v{i}" for i in (2, 2, 3, 4, 5, 6, 7)]
            assert found[0] is found[1] and begun.count("v2") == 1

    asyncio.run(scene())


def test_a_version_published_again_under_its_old_name_is_loaded_again(registry):
    publish(registry, "ring", shape=(2,), dtype="float32", promote=False)
    table = ModelTable(registry, "cpu")
    old = table.load("ring", "v2")
    shutil.rmtree(registry.root / "ring" / "v2")
    publish(registry, "ring", shape=(2,), dtype="float32", shift=5.0, promote=False)
    assert table.load("ring", "v2") is not old


def test_cuda_asked_for_and_absent_stops_the_replica(registry):
    if cuda_devices():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        ModelTable(registry, "cuda")


def test_no_request_fails_or_mixes_versions_while_production_moves(registry, samplers):
    """Promotions and rollbacks under load: every answer is whole, and is exactly its version's."""
    publish(registry, "digits", shift=3.0, promote=False)

    async def scene():
        async with running(registry) as app, connect(app) as client:
            expected = {v: app.service.table.load("digits", v) for v in ("v1", "v2")}
            answers = []
            moving = True

            async def load(worker):
                seed = worker
                while moving or seed < 20:
                    seed += 4
                    answers.append(
                        await client.post(DIGITS, json={"n": 33, "seed": seed}, headers={"Accept": "application/x-npy"})
                    )

            workers = [asyncio.ensure_future(load(i)) for i in range(4)]
            for step in range(10):
                await asyncio.to_thread(registry.set_alias, "digits", "production", f"v{2 - step % 2}", reason="test")
                await asyncio.to_thread(app.service.table.refresh)
            moving = False
            await asyncio.gather(*workers)
            return answers, expected

    answers, expected = asyncio.run(scene())
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-ganwatch-version"] for answer in answers} == {"v1", "v2"}
    for answer in answers:
        sampler = expected[answer.headers["x-ganwatch-version"]]
        rows = np.load(io.BytesIO(answer.content))
        np.testing.assert_array_equal(rows, sampler.sample([Window(int(answer.headers["x-ganwatch-seed"]), 0, 33)]))
