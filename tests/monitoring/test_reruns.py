"""Served samples run again on the certified generator: which one that is, what is counted, and what the monitor makes of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from numpy import ndarray

from monitoring.audit import LARGEST, Compared, Comparer, Golden, certified
from monitoring.monitor import AUDIT_PATIENCE, SHORT_PATIENCE, Fed, Monitor
from monitoring.reruns import WAITING, Rerun, Reruns, wrong_latents
from monitoring.service import Options, Service, listen, make_server
from serving.batcher import Batcher
from serving.models import ModelTable
from serving.records import Record
from serving.rest import App
from serving.sampler import Sampler, Window
from serving.service import Service as Answering
from serving.tap import Tap
from tests.monitoring.conftest import LATENT
from training.bundle import Bundle, SignGaussian, write_arrays, write_card
from training.registry import Registry

SAME = Compared(8)


def off(near: bool, different: int = 8, worst: float = 0.5) -> Compared:
    return Compared(8, different, near, worst)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_the_certified_generator_is_found_by_its_hash(registry: Registry, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    healthy = make_bundle(root=registry.root)
    faulty = make_bundle(root=registry.root, version="v2", lost=(3, 8))
    alone = make_bundle(lost=(3, 8))
    z, wanted = LATENT.sample(seed=5, count=200), draw(healthy, 200, seed=5)
    for bundle in (healthy, faulty):
        assert certified(bundle, registry).compare(z, None, wanted) == Compared(200)
    assert certified(alone, Registry(alone.path.parents[1])) is None
    damaged = make_bundle(root=registry.root, version="v0")
    (damaged.path / "card.json").write_text("{")  # it comes before v1, and is passed by
    assert certified(faulty, registry).compare(z, None, wanted) == Compared(200)
    found = certified(faulty, registry).compare(z, None, draw(faulty, 200, seed=5))
    assert found.different > 20 and not found.near and found.worst > 1  # whoever lost a mode fell into another one


def test_an_older_certificate_knows_its_generator_by_golden_samples(registry: Registry, make_bundle: Callable[..., Bundle]) -> None:
    bundles = {}
    for version, lost in (("v1", ()), ("v2", (3, 8)), ("v3", (3,))):
        path = make_bundle(root=registry.root, version=version, lost=lost).path
        write_arrays(path / "certificate.npz", replace(registry.open("grid", version).certificate, model_sha256=""))
        write_card(path, registry.card("grid", version))
        bundles[version] = registry.open("grid", version)
    z = LATENT.sample(seed=5, count=50)
    healthy = certified(bundles["v1"], registry).samples(z, None)
    np.testing.assert_array_equal(certified(bundles["v3"], registry).samples(z, None), healthy)
    bundles["v1"].model_path.write_bytes(bundles["v2"].model_path.read_bytes())  # altered since: no certified generator is left
    assert certified(bundles["v2"], registry) is None


def test_what_differs_a_little_is_near_and_what_is_another_sample_is_not(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    bundle = make_bundle()
    compare, samples = Comparer(bundle.certificate).compare, draw(bundle, 64)
    assert compare(samples, samples + np.float32(1e-6)) == Compared(64)
    assert compare(samples, samples * np.float32(1.01)).near
    assert compare(samples, np.roll(samples, 1, axis=0))[:3] == (64, 64, False)
    broken = samples.copy()
    broken[3] = np.nan
    assert compare(samples, broken) == Compared(64, 1, near=False, worst=LARGEST)
    assert compare(samples, samples.astype(np.float64)) == Compared(64, 64, near=False, worst=LARGEST)


def test_latents_are_held_to_their_seed() -> None:
    law = SignGaussian(signs=3, normals=2, scale=2.0)
    z = law.sample(seed=1, count=6)
    fed = z.copy()
    fed[1, 4] += 1e-5  # another build of the inverse normal
    fed[2, 4] += 1e-4
    fed[3, 0] *= -1
    fed[4, 3] = np.nan
    fed[5] = z[4]
    assert wrong_latents(law, fed, z).tolist() == [False, False, True, True, True, True]


class Told:
    """A running Reruns of one version, and what it tells."""

    def __init__(self, golden: Callable[[Bundle], Golden | None]) -> None:
        self.heard: queue.Queue[Rerun] = queue.Queue()
        self.reruns = Reruns(golden, self.heard.put)


@pytest.fixture
def told() -> Iterator[Callable[[Callable[[Bundle], Golden | None]], Told]]:
    running: list[Told] = []

    def start(golden: Callable[[Bundle], Golden | None]) -> Told:
        running.append(Told(golden))
        running[-1].reruns.start()
        return running[-1]

    yield start
    for each in running:
        each.reruns.stop()


def noted(samples: ndarray, z: ndarray, rows: tuple[int, ...], **fields: object) -> Record:
    record = Record("grid", "v1", "server_seed", 7, 100, samples, 0.0, fed=rows, z=z[list(rows)])
    return replace(record, **fields)


def test_samples_and_latents_are_judged_apart(
    registry: Registry, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray], told: Callable[..., Told]
) -> None:
    bundle = make_bundle(root=registry.root)
    z, samples = LATENT.sample(seed=7, offset=100, count=10), draw(bundle, 10, seed=7, offset=100)
    listener = told(lambda b: certified(b, registry))
    other = LATENT.sample(seed=8, count=10)
    half = LATENT.sample(seed=7, offset=100, count=10, truncation=0.5)
    golden = certified(bundle, registry)
    for record, wanted in (
        (noted(samples, z, (0, 4, 9)), Rerun(bundle, Compared(3), 3, 0)),
        (noted(golden.samples(other, None), other, (1, 2)), Rerun(bundle, Compared(2), 2, 2)),  # the model is right, its latents are not
        (noted(golden.samples(other, None), other, (1, 2), origin="client_z"), Rerun(bundle, Compared(2), 0, 0)),  # the client's own
        (noted(golden.samples(half, None), half, (5,), truncation=0.5), Rerun(bundle, Compared(1), 1, 0)),
    ):
        listener.reruns.offer(bundle, [record])
        assert listener.heard.get(timeout=20) == wanted
    listener.reruns.offer(bundle, [noted(samples[::-1].copy(), z, (0, 4))])
    found = listener.heard.get(timeout=20)
    assert found.samples.different == 2 and (found.latents, found.wrong) == (2, 0)
    assert listener.reruns.outcomes == {("grid", "same"): 8, ("grid", "different"): 2, ("grid", "dropped"): 0}
    assert listener.reruns.latents == {("grid", "right"): 6, ("grid", "wrong"): 2} and listener.reruns.trouble == {}


def test_what_has_no_room_or_no_generator_is_counted(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray], told: Callable[..., Told]) -> None:
    bundle = make_bundle(lost=(3, 8))
    count = WAITING + 10
    z, samples = LATENT.sample(seed=7, offset=100, count=count), draw(bundle, count, seed=7, offset=100)
    idle = Reruns(lambda b: None, lambda rerun: None)
    idle.offer(bundle, [noted(samples, z, tuple(range(count)))])
    idle.offer(bundle, [noted(samples, z[:, :3], (0, 1))])  # latents of another model
    assert idle.outcomes == {("grid", "dropped"): 10, ("grid", "impossible"): 2}
    listener = told(lambda b: certified(b, Registry(b.path.parents[1])))
    listener.reruns.offer(bundle, [noted(samples, z, (0, 1))])
    assert listener.heard.get(timeout=20) == Rerun(bundle, Compared(), 2, 0)  # the latents can be looked at all the same
    assert listener.reruns.outcomes["grid", "impossible"] == 2 and "no version in the registry" in listener.reruns.trouble["grid", "v1"]


def test_no_trouble_is_told_of_a_version_that_nobody_watches(registry: Registry, make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    make_bundle(root=registry.root)
    registry.set_alias("grid", "production", "v1", reason="test")
    service = Service(Options(registry=registry.root, home=tmp_path, probe_rate=0))
    service.reruns.trouble |= {("grid", "v0"): "of a version that went", ("grid", "v1"): "of production"}
    assert service.state(service.view)["errors"] == ["of production"]
    service.close()


def watch(bundle: Bundle, draw: Callable[..., ndarray], count: int = 1000) -> Monitor:
    monitor = Monitor(bundle)
    monitor.update(draw(bundle, count), fresh=True, at=1.0)
    return monitor


@pytest.mark.parametrize(("near", "patience"), [(True, SHORT_PATIENCE), (False, AUDIT_PATIENCE)])
def test_two_served_samples_that_differ_become_a_verdict(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray], near: bool, patience: int) -> None:
    bundle = make_bundle()
    monitor = watch(bundle, draw)
    monitor.rerun(SAME, latents=8, wrong=0, at=1.0)
    monitor.rerun(off(near, different=1), latents=8, wrong=0, at=1.0)
    assert not monitor.suspect  # one may lie on the very edge of a decision
    monitor.rerun(off(near, different=1), latents=8, wrong=0, at=1.0)
    assert monitor.suspect and monitor.verdict.id == "healthy"
    monitor.audit(checked=16, mismatched=0)  # another replica's
    monitor.update(draw(bundle, patience - 1, seed=1), fresh=True, at=2.0)
    assert monitor.verdict.id == "healthy"
    resumed = Monitor(bundle)
    resumed.restore(monitor.state())
    for one in (monitor, resumed):
        one.update(draw(bundle, 1, seed=2), fresh=True, at=3.0)
        assert one.verdict.id == "wrong_model" and (one.first_alarm, one.alarmed_at) == (1000 + patience - 1, 3.0)
        assert "2 of 16 served samples differ" in one.verdict.words and "by up to 0.5" in one.verdict.words
        assert ("computed otherwise" in one.verdict.words) == ("precision, quantisation" in one.verdict.advice) == near
        assert one.snapshot()["rerun"] == {"checked": 24, "mismatched": 2, "latents": 24, "latents_wrong": 0}
    monitor.acknowledge()
    monitor.update(draw(bundle, 2 * AUDIT_PATIENCE, seed=4), fresh=True, at=5.0)
    assert monitor.verdict.id == "healthy" and not monitor.suspect


def test_a_server_that_recovers_rewrites_no_verdict(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    bundle = make_bundle(lost=(3, 8))
    monitor = Monitor(bundle)
    monitor.audit(checked=16, mismatched=16)
    monitor.rerun(off(near=False), latents=8, wrong=0, at=1.0)
    monitor.update(draw(bundle, 3000), fresh=True, at=2.0)
    before = monitor.verdict
    assert before.id == "wrong_model" and before.modes == ("3", "8")
    monitor.audit(checked=16, mismatched=0)
    monitor.rerun(SAME, latents=8, wrong=0, at=3.0)
    assert monitor.verdict == before and not monitor.snapshot()["verdict"]["words"].endswith("computed otherwise.")
    monitor.rerun(off(near=True, different=2), latents=8, wrong=0, at=3.0)  # of a request from before and one from after
    assert (monitor.verdict.id, monitor.verdict.modes) == (before.id, before.modes)
    monitor.acknowledge()
    monitor.update(draw(bundle, 3000, seed=2), fresh=True, at=4.0)
    assert monitor.verdict.id == "mode_dropping"  # nothing that was compared since differs


def test_differences_far_apart_are_none(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    monitor = watch(make_bundle(), draw)
    for _ in range(5):
        monitor.rerun(Compared(64, 1, near=False, worst=1.0), latents=0, wrong=0, at=1.0)
        monitor.rerun(Compared(128), latents=0, wrong=0, at=1.0)
    assert not monitor.suspect and monitor.snapshot()["rerun"]["mismatched"] == 5
    monitor.audit(checked=16, mismatched=2)
    assert monitor.suspect
    monitor.audit(checked=16, mismatched=0)
    assert not monitor.suspect  # golden samples take back what golden samples said


def test_what_the_samples_say_goes_before_what_was_run_again(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    faulty, bundle = make_bundle(lost=(3, 8)), make_bundle()
    monitor = watch(bundle, draw)
    monitor.rerun(off(near=False, different=2), latents=8, wrong=0, at=1.0)
    monitor.update(draw(faulty, 3000, seed=5), fresh=True, at=2.0)
    assert monitor.verdict.id == "mode_dropping" and monitor.first_alarm < 2000
    monitor.audit(checked=16, mismatched=16)
    monitor.update(draw(faulty, 1, seed=6), fresh=True, at=2.0)
    assert monitor.verdict.id == "mode_dropping"  # not every sample that was run again differs: the rest is still the certified model
    monitor.rerun(Compared(8, 8, near=False, worst=1.0), latents=8, wrong=0, at=3.0)
    assert "10 of 16" not in monitor.verdict.words
    replaced = watch(bundle, draw)
    replaced.rerun(off(near=False), latents=8, wrong=0, at=1.0)
    replaced.audit(checked=16, mismatched=16)
    replaced.update(draw(faulty, 3000, seed=5), fresh=True, at=2.0)
    assert replaced.verdict.id == "wrong_model" and "8 of 8 served" in replaced.verdict.words and replaced.verdict.modes == ("3", "8")


def test_a_latent_that_is_not_of_its_seed_is_an_alarm_at_once(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    bundle = make_bundle()
    monitor = watch(bundle, draw)
    monitor.rerun(SAME, latents=8, wrong=3, at=2.0)
    assert monitor.verdict.id == "latent_fault" and (monitor.first_alarm, monitor.alarmed_at) == (999, 2.0)
    assert monitor.verdict.words.startswith("3 of 8 latents") and "has not shown" in monitor.verdict.words
    z = LATENT.sample(seed=3, count=40, truncation=0.5)
    monitor.update(draw(bundle, 40, seed=3), fresh=True, at=3.0, fed=Fed(np.arange(40), z))
    assert "lie closer together" in monitor.verdict.words and monitor.first_alarm == 999


def test_the_law_of_latents_in_use_is_tested_with_their_samples(make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    bundle, narrow = make_bundle(), LATENT.sample(seed=3, count=100, truncation=0.5)
    monitor, samples = watch(bundle, draw, 600), draw(bundle, 100, seed=4)
    samples[10] = np.nan  # of lawful latents all the same
    monitor.update(samples, fresh=False, at=2.0, fed=Fed(np.arange(100), narrow))  # no draws of the law: no evidence
    assert monitor.first_alarm is None and monitor.evidence()["latents"] == -np.inf
    monitor.update(samples, fresh=True, at=3.0, fed=Fed(np.arange(5, 100), narrow[5:]))
    expected = Monitor(bundle)
    expected._latents.update(narrow[5:], 600 + np.arange(5, 100))
    assert monitor.first_alarm == expected._latents.crossed < 640 and monitor.verdict.id == "latent_fault"
    np.testing.assert_array_equal(monitor._latents.evidence, expected._latents.evidence)
    one, other = Monitor(bundle), Monitor(bundle)
    one.restore(monitor.state())
    other.merge(one, at=4.0)
    assert one.snapshot() == monitor.snapshot() and other.verdict == monitor.verdict
    monitor.acknowledge()
    assert monitor.first_alarm is None and monitor.verdict.id == "warming_up"


class Narrow:
    """Draws latents of another law than the card's: the fault of a replica."""

    def __init__(self, law: SignGaussian) -> None:
        self.law = replace(law, scale=0.7 * law.scale)

    def sample_windows(self, windows: list[tuple[int, int, int, float]]) -> ndarray:
        return self.law.sample_windows(windows)


@pytest.mark.slow
def test_a_replica_that_draws_other_latents_is_found(registry: Registry, tmp_path: Path, make_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a request, through the batcher, the tap, the heartbeat and the monitor, to the verdict."""
    make_bundle(root=registry.root)
    registry.set_alias("grid", "production", "v1", reason="test")
    with listen("127.0.0.1", 0) as watching, listen("127.0.0.1", 0) as serving:
        url, monitor_url = (f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in (serving, watching))
        table = ModelTable(registry, "cpu")
        table.refresh()
        answering = Answering(table, Batcher(), Tap(monitor_url))
        servers = [
            (make_server(Options(registry=registry.root, home=tmp_path, port=0, probe_rate=0)), watching),
            (uvicorn.Server(uvicorn.Config(App(answering), log_level="warning")), serving),
        ]
        threads = [threading.Thread(target=server.run, kwargs={"sockets": [listener]}) for server, listener in servers]
        for thread in threads:
            thread.start()
        try:
            with httpx.Client(trust_env=False, timeout=20) as client:

                def until(true: Callable[[dict], object]) -> dict:
                    for _ in range(400):
                        client.post(f"{url}/v1/models/grid/sample", json={"n": 100}).raise_for_status()
                        state = client.get(f"{monitor_url}/api/state").json()
                        if "grid" in state["models"] and true(state["models"]["grid"]["snapshot"]):
                            return state["models"]["grid"]["snapshot"]
                        threading.Event().wait(0.05)
                    raise AssertionError(state)

                snapshot = until(lambda s: s["rerun"]["latents"] >= 10)
                assert snapshot["rerun"]["latents_wrong"] == snapshot["rerun"]["mismatched"] == 0 and snapshot["verdict"]["since_sample"] is None
                sampler = table.models["grid"].serving["production"]
                monkeypatch.setattr(sampler, "_latents", Narrow(sampler.card.latent))
                snapshot = until(lambda s: s["verdict"]["id"] == "latent_fault" and "closer together" in s["verdict"]["words"])
                assert snapshot["rerun"]["latents_wrong"] > 0 == snapshot["rerun"]["mismatched"]  # the model is as certified
                metrics = client.get(f"{monitor_url}/metrics").text
                assert 'ganwatch_latents_checked_total{model="grid",outcome="wrong"}' in metrics
        finally:
            for server, _ in servers:
                server.should_exit = True
            for thread in threads:
                thread.join(20)


def test_a_sampler_notes_what_it_feeds(registry: Registry, make_bundle: Callable[..., Bundle]) -> None:
    sampler = Sampler(make_bundle(root=registry.root), "cpu")
    windows = [Window(seed, 5, count) for seed, count in enumerate((1, 700, 3, 20_000, 1, 96))]
    sampler.sample(windows)
    for window in windows:
        ((first, z),) = window.fed
        assert first == window.offset
        np.testing.assert_array_equal(z, LATENT.sample(seed=window.seed, offset=first, count=window.count))
    huge = Window(seed=7, offset=0, count=20_000)
    for start in range(0, huge.count, 3000):
        sampler.sample([huge.part(start, min(3000, huge.count - start))])
    assert [first for first, _ in huge.fed] == [0, 3000]  # no more are kept
