"""What a Monitor was survives: through a file, through a restart, through a kill, and joined with what other shards saw."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy import ndarray

from monitoring.asymptotic import frechet_interval
from monitoring.audit import Compared
from monitoring.divergences import INTERVALS, ShareSet
from monitoring.incidents import Incidents
from monitoring.monitor import GAUGE_DELTA, Monitor
from monitoring.points import POINT_GAUGES
from monitoring.states import StateError, States
from monitoring.replicas import STALE_AFTER
from monitoring.view import COLUMNS
from monitoring.watch import HISTORY, NOTICE, SHARDS, Watch
from serving.records import Heartbeat, Record
from training.bundle import Bundle, Certificate
from training.moments import frechet
from training.registry import Registry

START = 1_800_000_000.0
FAULTS = [{}, {"lost": (3, 8)}, {"grain": 1.0}, {"fakes": 0.05}]


def fed(bundle: Bundle, samples: ndarray, *, step: int = 50, **options: float) -> Monitor:
    monitor = Monitor(bundle, **options)
    for i in range(0, len(samples), step):
        monitor.update(samples[i : i + step], fresh=i % (3 * step) != 0, at=START + i)
    return monitor


def said(monitor: Monitor) -> str:
    return json.dumps([monitor.snapshot(), monitor.evidence(), monitor.first_alarm, monitor.alarmed_at], sort_keys=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_restored_monitor_goes_on_as_if_nothing_had_been(make_bundle, draw, tmp_path, fault):
    bundle = make_bundle(**fault)
    samples = draw(bundle, 2000, seed=5)
    straight, states = fed(bundle, samples), States(tmp_path)
    for cut in (0, 1, 50, 150, 950):
        states.save("grid", "v1", fed(bundle, samples[:cut]).state())
        resumed = Monitor(bundle)
        resumed.restore(states.load("grid", "v1"))
        assert said(resumed) == said(fed(bundle, samples[:cut]))
        for i in range(cut, len(samples), 50):
            resumed.update(samples[i : i + 50], fresh=i % 150 != 0, at=START + i)
        if cut % 50 == 0:
            assert said(resumed) == said(straight)


def test_gauges_of_a_state_that_does_not_count_its_points_begin_anew_and_the_alarm_stays(make_bundle, draw, tmp_path):
    bundle = make_bundle(lost=(3, 8))
    alarmed, states = fed(bundle, draw(bundle, 2000, seed=5)), States(tmp_path)
    states.save("grid", "v1", {name: value for name, value in alarmed.state().items() if name != "newest.count"})
    resumed = Monitor(bundle)
    resumed.restore(states.load("grid", "v1"))
    assert resumed.evidence() == alarmed.evidence() and resumed.first_alarm == alarmed.first_alarm is not None and resumed.monitored == alarmed.monitored
    assert resumed.gauges("fresh")["js"].n == 0 < alarmed.gauges("fresh")["js"].n
    resumed.update(draw(bundle, 600), fresh=True, at=START)
    assert resumed.gauges("fresh")["js"].n == 600 and resumed.gauges("fresh")["kid"].n == resumed.gauges("recent")["kid"].n == 512


def test_a_state_is_of_one_bundle_and_a_sum_of_one_budget(make_bundle, draw):
    bundle, other = make_bundle(), make_bundle(lost=(3,))
    before = fed(bundle, draw(bundle, 100))
    before.calibrate(2.0)
    state = before.state()
    with pytest.raises(ValueError, match="bundle"):
        Monitor(other).restore(state)
    for monitor, words in ((Monitor(bundle, arl=1e6), "arl is 2600000000.0, here it is 1000000.0"), (Monitor(bundle, share=0.5), "threshold")):
        with pytest.raises(ValueError, match=words):
            monitor.check(state, monitor.identity())
        monitor.restore(state)  # the evidence is what it was, whatever it is held against
        assert monitor.evidence() == before.evidence() and monitor.slack is None and monitor.log10_threshold == Monitor(bundle, arl=monitor.arl, share=monitor.share).log10_threshold
        with pytest.raises(ValueError, match="shards"):
            Monitor(bundle).merge(monitor, at=0.0)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("detector.r", lambda r: r[:-1], r"detector.r is float64 \[\d+\]; expected float64"),
        ("detector.r", lambda r: r * np.nan, "detector.r holds NaN or infinity"),
        ("detector.r", lambda r: -1 - r, "detector.r is negative somewhere"),
        ("fresh.open_cells", lambda cells: cells.astype(np.float32), "fresh.open_cells is float32"),
        ("served.open_cells", lambda cells: cells - 10_000, "served.open_cells is negative somewhere"),
        ("newest.points", lambda points: points[:, 1:], "newest.points is float32"),
        ("newest.points", lambda points: points[1:], "newest.points are 511; expected 512 at most of 1000 samples"),
        ("fresh.open_points", lambda points: points[1:], "fresh.open_points are 511; expected 512 at most of 1000 samples"),
        ("newest.count", lambda count: np.array(-count), "newest.count is -1000; expected a count"),
        ("monitored", lambda count: -1, "monitored is -1; expected a count"),
        ("monitored", lambda count: "many", "monitored is 'many'; expected a count"),
        ("identity", lambda identity: "x", "does not say which monitor it is of"),
        ("recent.cells", None, "the state lacks recent.cells"),
        ("recent.embedded_sum", None, "the state lacks recent.embedded_sum"),  # as states from before the MMD had two clocks
        ("recent.embedded_sum", lambda total: total[:-1], r"recent.embedded_sum is float64 \[255\]; expected float64 \[256\]"),
    ],
)
def test_a_damaged_state_is_refused_and_leaves_everything_as_it_was(scene, name, damage, words):
    """From the disk or from a shard, and the sum of the other shards goes on."""
    watch = scene.watch()
    scene.serve(watch, "v1", 1000, seed=1)
    good = watch.state("grid", "v1")
    watch.merge("grid", "v1", "other", good, scene.now)
    before = watch.publish(scene.now).models["grid"].snapshot
    bad = {key: damage(value) if key == name else value for key, value in good.items() if damage is not None or key != name}
    with pytest.raises(ValueError, match=words):
        watch.merge("grid", "v1", "bad", bad, scene.now)
    with pytest.raises(ValueError, match=words):
        watch.merge("grid", "v1", "other", bad, scene.now)
    assert watch.publish(scene.now).models["grid"].snapshot == before and before["monitored"] == 2000
    with pytest.raises(ValueError, match=words):
        Monitor(scene.bundles["v1"]).restore(bad)


def test_what_no_check_foresees_leaves_no_half_sum_either(scene):
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    watch = scene.watch()
    good = watch.state("grid", "v2")
    scene.serve(watch, "v2", 3000, seed=1)
    watch.merge("grid", "v2", "other", good, scene.now)
    before = watch.publish(scene.now).models["grid"].snapshot
    with pytest.raises(ValueError, match="the state of shard bad is damaged"):
        watch.merge("grid", "v2", "bad", good | {"rejected": {"nan": 0}}, scene.now)
    after = watch.publish(scene.now).models["grid"].snapshot
    assert after == before and after["verdict"]["id"] == "mode_dropping"
    for i in range(SHARDS - 1):
        watch._watched["grid", "v2"].shards[f"{i}"] = good
    with pytest.raises(ValueError, match="256 shards are summed up already"):
        watch.merge("grid", "v2", "one more", good, scene.now)


def test_a_latched_alarm_outlives_another_budget_and_an_alarm_of_the_sum_a_restart(scene, draw):
    scene.registry.set_alias("grid", "canary", "v2", reason="test", share=0.1)
    watch = scene.watch()
    scene.serve(watch, "v2", 3000, seed=1)
    scene.registry.set_alias("grid", "production", "v2", reason="promoted all the same")
    watch.follow(scene.now)
    watch.save()
    for arl in (2.6e9, 1e12):
        view = scene.watch(arl=arl).publish(scene.now)
        assert view.models["grid"].snapshot["verdict"]["id"] == "mode_dropping" and view.restores["grid", "restored"] == 1


def test_what_the_sum_alone_had_found_is_not_forgotten(scene, draw):
    """Shards none of which has an alarm of its own; the merging monitor is killed, and so is the fault."""
    watch, samples = scene.watch(), draw(scene.bundles["v2"], 1000, seed=9)
    part, fed = Monitor(scene.bundles["v1"], share=watch._watched["grid", "v1"].share), 0
    while sum(10.0**e for e in part.evidence().values()) < 10.0**part.log10_threshold / 8:
        part.update(samples[fed : fed + 1], fresh=True, at=scene.now)
        fed += 1
    assert part.first_alarm is None
    state = part.state() | {"last_sample_at": scene.now, "last_fresh_at": scene.now, "acknowledged_at": 0.0}
    for shard in range(12):
        watch.merge("grid", "v1", f"{shard}", state, scene.now)
    assert watch.publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "mode_dropping"
    again = scene.watch()
    shown = again.publish(scene.now).models["grid"].snapshot["verdict"]
    assert shown["id"] == "mode_dropping" and set(shown["modes"]) <= {"3", "8"}
    scene.serve(again, "v1", 1000, seed=3)
    assert again.publish(scene.now).models["grid"].snapshot["monitored"] == 1000
    assert again.publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "mode_dropping"
    again.acknowledge("grid", scene.now)
    assert scene.watch().publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "warming_up"


def test_a_sum_that_lost_its_state_costs_no_shard_its_alarm(scene):
    """What it acknowledged, and forgot since, lies before all that the shard has seen. And what it does acknowledge is of one version."""
    shard, lossy = scene.watch(), scene.draw(scene.bundles["v2"], 3000, seed=1)
    scene.registry.set_alias("grid", "canary", "v2", reason="test")
    shard.follow(scene.now)
    shard.acknowledged("grid", "v2", scene.now)
    shard.eat([Record("grid", version, "server_seed", 1, 0, lossy, scene.now) for version in ("v1", "v2")], scene.now)
    head = Watch(scene.registry, Incidents(scene.root / "head.db"), arl=2.6e9)
    head.follow(scene.now)
    shard.acknowledged("grid", "v2", head.merge("grid", "v2", "shard", shard.state("grid", "v2"), scene.now))
    for watch in (shard, head):
        assert watch.publish(scene.now).models["grid"].live[1].snapshot["verdict"]["id"] == "mode_dropping"
    head.acknowledge("grid", scene.now + 1)
    shard.acknowledged("grid", "v2", head.merge("grid", "v2", "shard", shard.state("grid", "v2"), scene.now + 1))
    assert {i["version"]: i["closed_by"] for i in shard.incidents.newest()} == {"v1": None, "v2": "acknowledged"}


def test_an_acknowledgement_reaches_a_shard_whose_clock_is_ahead(scene):
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    shard, head = scene.watch(), Watch(scene.registry, Incidents(scene.root / "head.db"), arl=2.6e9)
    head.follow(scene.now)
    shard.acknowledged("grid", "v2", scene.now + 3600)
    scene.serve(shard, "v2", 3000, seed=1)
    head.merge("grid", "v2", "shard", shard.state("grid", "v2"), scene.now)
    assert head.publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "mode_dropping"
    head.acknowledge("grid", scene.now)
    shard.acknowledged("grid", "v2", head.merge("grid", "v2", "shard", shard.state("grid", "v2"), scene.now))
    assert shard.publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "warming_up"


def test_shards_are_summed_once_a_second_however_often_they_report(scene, monkeypatch):
    watch = scene.watch()
    scene.serve(watch, "v1", 1000, seed=1)
    state = watch.state("grid", "v1")
    watch.merge("grid", "v1", "other", state, scene.now)
    shown = [watch.publish(scene.now, point=point).models["grid"].snapshot["monitored"] for point in (False, True)]
    assert shown == [1000, 2000]
    assert watch.publish(scene.now + 9).models["grid"].tested_rate == 0  # what came with the shard is no rate
    monkeypatch.setattr(Certificate, "lower", lambda *_: 1 / 0)  # bounds are found once
    watch.merge("grid", "v1", "other", state, scene.now)


def test_a_strict_sum_takes_no_calibrated_state(scene):
    shard, strict = scene.watch(), scene.watch()
    shard._watched["grid", "v1"].monitor.calibrate(1.5)
    state = shard.state("grid", "v1")
    with pytest.raises(ValueError, match="of a monitor with --calibrated"):
        strict.merge("grid", "v1", "other", state, scene.now)
    calibrated = Watch(scene.registry, scene.watch().incidents, arl=2.6e9, calibrated=True)
    calibrated.follow(scene.now)
    calibrated.merge("grid", "v1", "other", state, scene.now)  # though its own runs are not through yet
    calibrated.merge("grid", "v1", "strict", strict.state("grid", "v1"), scene.now)


def test_a_sum_that_is_given_up_makes_no_rate_negative(scene):
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    watch = scene.watch()
    scene.serve(watch, "v2", 3000, seed=1)
    watch.merge("grid", "v2", "other", watch.state("grid", "v2"), scene.now)
    watch.publish(scene.now)
    watch.acknowledge("grid", scene.now)  # the shards have yet to hear of it
    assert watch.publish(scene.now).models["grid"].tested_rate is None
    scene.serve(watch, "v2", 100, seed=2)
    assert watch.publish(scene.now).models["grid"].tested_rate == 100


def test_a_suspicion_waits_for_samples_of_the_shard_that_has_it(make_bundle, draw):
    """A replay that differs becomes a verdict when so many samples went by without a clean one, there and not elsewhere."""
    bundle = make_bundle()
    suspicious, busy = fed(bundle, draw(bundle, 500)), fed(bundle, draw(bundle, 20_000, seed=2))
    suspicious.audit(checked=64, mismatched=2)
    state = suspicious.state()
    busy.merge(suspicious, at=START)
    assert busy.suspect and busy.verdict.id == "healthy"
    suspicious.restore(state)
    for seed in itertools.count(10):
        suspicious.update(draw(bundle, 500, seed=seed), fresh=True, at=START)
        if suspicious.verdict.id != "healthy":
            break
    total = fed(bundle, draw(bundle, 500, seed=4))
    total.merge(suspicious, at=START)
    assert total.verdict.id == "wrong_model"
    later = fed(bundle, draw(bundle, 500, seed=5))
    later.keep_alarm(total.alarm)  # the shard's replays are clean again; nobody has acknowledged anything
    assert later.verdict == total.verdict


def test_a_state_is_a_copy(make_bundle, draw):
    bundle = make_bundle(lost=(3, 8))
    monitor = fed(bundle, draw(bundle, 100))
    state, before = monitor.state(), said(monitor)
    monitor.update(draw(bundle, 3000, seed=2), fresh=True, at=START)
    resumed = Monitor(bundle)
    resumed.restore(state)
    assert said(resumed) == before


@given(st.dictionaries(st.from_regex(r"[a-z.]{1,9}", fullmatch=True), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.lists(st.integers())))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_what_is_saved_is_what_is_loaded(tmp_path, values):
    states, array = States(tmp_path), np.arange(6, dtype=np.float64).reshape(2, 3)
    states.save("m", "v1", {**values, "AN.array": array})
    loaded = states.load("m", "v1")
    assert np.array_equal(loaded.pop("AN.array"), array) and loaded == values


def test_a_home_is_held_by_one_monitor_at_a_time(tmp_path):
    with States(tmp_path / "monitor").hold(), pytest.raises(OSError, match=r"cannot lock .*monitor/.lock: another monitor runs on this home.* choose another --home"):
        States(tmp_path / "monitor").hold()
    States(tmp_path / "monitor").hold().close()


def test_a_broken_file_is_named_and_a_missing_one_is_none(tmp_path):
    states = States(tmp_path)
    assert states.load("m", "v1") is None
    states.save("m", "v1", {"a": 1})
    path = tmp_path / "m" / "v1.npz"
    for body in (b"", b"nonsense", path.read_bytes()[:-30]):
        path.write_bytes(body)
        with pytest.raises(StateError, match="v1.npz"):
            states.load("m", "v1")


def test_a_history_is_kept_whole_bounded_and_in_order(tmp_path):
    states, rows = States(tmp_path), np.arange(50.0)[:, None] * [1.0, 10.0]
    assert states.history("m", 2).shape == (0, 2)
    for i, part in enumerate(np.array_split(rows, 17)):
        states.append("m", part, most=10)
        kept, seen = states.history("m", 2), rows[: sum(map(len, np.array_split(rows, 17)[: i + 1]))]
        assert min(len(seen), 10) <= len(kept) <= 20
        np.testing.assert_array_equal(kept, seen[-len(kept) :])
    (path,) = (tmp_path / "m").iterdir()
    path.write_bytes(path.read_bytes()[:-3])  # the disk was full in the middle of a row
    np.testing.assert_array_equal(states.history("m", 2)[-1], rows[-2])
    states.append("m", rows[-1:], most=10)
    np.testing.assert_array_equal(states.history("m", 2)[-2:], rows[-2:])
    states.append("m", np.array([[47.5, np.nan]]), most=10)  # the clock was set back: what lay ahead is not shown twice
    np.testing.assert_array_equal(states.history("m", 2)[-2:], [[47.0, 470.0], [47.5, np.nan]])


def shards(bundle: Bundle, samples: ndarray, count: int, **options: float) -> list[Monitor]:
    """Monitors of disjoint parts of a stream, dealt out 16 samples at a time, in step."""
    monitors = [Monitor(bundle, **options) for _ in range(count)]
    for i in range(0, len(samples), 16):
        monitors[i // 16 % count].update(samples[i : i + 16], fresh=True, at=START + i)
    return monitors


def merged(monitors: list[Monitor]) -> Monitor:
    for monitor in monitors[1:]:
        monitors[0].merge(monitor, at=START)
    return monitors[0]


@pytest.mark.parametrize(
    ("fault", "verdict", "modes"),
    [({}, "healthy", ()), ({"lost": (3, 8)}, "mode_dropping", ("3", "8")), ({"fakes": 0.05}, "off_manifold", ()), ({"grain": 1.0}, "latent_fault", ())],
)
def test_shards_merge_to_the_verdict_of_one(make_bundle, draw, fault, verdict, modes):
    bundle = make_bundle(**fault)
    samples = draw(bundle, 4000, seed=5)
    one = fed(bundle, samples[:0])
    one.update(samples, fresh=True, at=START)
    several = merged(shards(bundle, samples, 4))
    assert (several.verdict.id, several.verdict.modes) == (one.verdict.id, one.verdict.modes) == (verdict, modes)
    assert (several.first_alarm is None) == (one.first_alarm is None)
    fresh = one.gauges("fresh")
    for population in ("fresh", "served"):  # the very same counts, whoever saw which sample; of the points some are others
        for name, gauge in one.gauges(population).items():
            chance = {"kid": (fresh["kid"].high - fresh["kid"].low) / 4, "intrinsic_dimension": gauge.value / 5}.get(name, 0.1) if name in POINT_GAUGES else 0.0
            assert several.gauges(population)[name].value == pytest.approx(gauge.value, rel=1e-9, abs=chance), name
            assert several.gauges(population)[name].n == gauge.n
    assert several.monitored == several.served == 4000


def test_a_sum_shares_the_chance_that_an_interval_fails(make_bundle, draw):
    """Its block is read since a start of each monitor's, each bound of which has its part of GAUGE_DELTA."""
    bundle = make_bundle()
    several = merged(shards(bundle, draw(bundle, 3 * 3000, seed=5), 3))
    found, sketch, third = several.gauges("fresh"), several._blocks["fresh"].view, GAUGE_DELTA / 3
    shares = ShareSet.observed(sketch.cells, priors=several._priors, delta=third)
    assert (found["tv"].low, found["tv"].high) == INTERVALS["tv"](bundle.reference.cell_share, shares) and found["tv"].n == 9000
    assert [(mode["low"], mode["high"]) for mode in several.modes()] == list(zip(shares.low, shares.high, strict=True))
    assert (found["mmd"].low, found["mmd"].high) == several._embedding.mmd(sketch.embedded_sum, 9000, delta=third)[1:]
    distance = found["frechet"].value
    assert (found["frechet"].low, found["frechet"].high) == frechet_interval(distance, several._newest_spread().reach(9000, delta=third))
    again = Monitor(bundle)
    again.restore(several.state())
    assert again.gauges("fresh") == found


def test_a_sum_has_the_floors_of_all_its_samples(make_bundle, draw):
    """Of more samples than the bundle has real points to spare: about what as many real ones read."""
    bundle, rng, n, read = make_bundle(), np.random.default_rng(7), 16384, []
    several, reference = merged(shards(bundle, draw(bundle, n, seed=5)[: 4 * 4000], 4)), bundle.reference
    centres = 2.0 * np.stack([np.arange(10) % 5 - 2, np.arange(10) // 5 - 0.5], axis=1)
    for _ in range(20):
        real = (centres[rng.integers(10, size=n)] + 0.1 * rng.standard_normal((n, 2))).astype(np.float32)
        distance, _ = frechet(reference.feature_mean, reference.feature_cov, real.mean(axis=0, dtype=np.float64), np.cov(real.T.astype(np.float64)))
        read.append((distance, several._embedding.mmd(several._embedding(real).sum(axis=0, dtype=np.float64), n, delta=0.05)[0]))
    floors = several._floor(n)
    distance, mmd = np.mean(read, axis=0)
    assert 0.5 * distance < floors["frechet"] < 2 * distance and mmd < floors["mmd"] < 2 * mmd  # of the square more than half is below its deviation
    assert np.isfinite([gauge.floor for name, gauge in several.gauges("fresh").items()]).all()


def test_merged_evidence_is_the_sum_and_can_raise_the_alarm_by_itself(make_bundle, draw):
    bundle = make_bundle(lost=(3, 8))
    parts = shards(bundle, draw(bundle, 400, seed=5), 2)
    total = sum(10.0 ** e for part in parts for e in part.evidence().values())
    assert all(part.first_alarm is None for part in parts)
    arl = total * 0.99
    low, high = (shards(bundle, draw(bundle, 400, seed=5), 2, arl=a) for a in (arl, total * 1.01))
    assert all(part.first_alarm is None for part in low)
    assert merged(high).first_alarm is None
    alarmed = merged(low)
    assert alarmed.first_alarm == 399 and alarmed.alarmed_at == START and alarmed.verdict.id == "mode_dropping"
    assert sum(10.0 ** e for e in alarmed.evidence().values()) == pytest.approx(total)


def test_an_alarm_of_any_shard_is_the_alarm_of_all(make_bundle, draw):
    bundle, lossy = make_bundle(), make_bundle(lost=(3, 8))
    sick, well = Monitor(bundle), Monitor(bundle)
    sick.update(draw(lossy, 1000), fresh=True, at=START)
    well.update(draw(bundle, 1000), fresh=True, at=START + 1)
    first = sick.first_alarm
    well.merge(sick, at=START + 2)
    assert well.verdict.modes == ("3", "8") and well.first_alarm == first and well.alarmed_at == START
    well.update(draw(bundle, 1000, seed=2), fresh=True, at=START + 3)
    assert well.verdict.id == "mode_dropping"


@pytest.mark.slow
def test_merging_again_and_again_does_not_cry_wolf(make_bundle, draw):
    """Shards that are merged, and whose sum goes on and is merged again: R grows by at most one a sample, so the mean run is A."""
    bundle, runs, arl = make_bundle(), 30, 400.0
    lengths = []
    for run in range(runs):
        samples = draw(bundle, 4096, seed=1000 + run)
        total = Monitor(bundle, arl=arl)
        for i in range(0, len(samples), 64):
            part = Monitor(bundle, arl=arl)
            part.update(samples[i : i + 48], fresh=True, at=START)
            total.update(samples[i + 48 : i + 64], fresh=True, at=START)
            total.merge(part, at=START)
            if total.first_alarm is not None:
                break
        lengths.append(total.monitored)
    assert np.mean(lengths) > arl  # a run of one bet has a standard error of some 80, and this mixture runs thrice as long


class Scene:
    """A registry, its incidents and states on the disk, and one Watch after the other over them."""

    def __init__(self, root: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
        self.bundles = {"v1": make_bundle(root=root / "registry"), "v2": make_bundle(root=root / "registry", version="v2", lost=(3, 8))}
        self.registry, self.root, self.draw, self.now = Registry(root / "registry"), root, draw, START
        self.registry.set_alias("grid", "production", "v1", reason="test")

    def watch(self, arl: float = 2.6e9) -> Watch:
        watch = Watch(self.registry, Incidents(self.root / "incidents.db"), arl=arl, states=States(self.root / "monitor"))
        watch.follow(self.now)
        return watch

    def serve(self, watch: Watch, version: str, count: int, seed: int) -> None:
        self.now += 1.0
        watch.eat([Record("grid", version, "server_seed", seed, 0, self.draw(self.bundles[version], count, seed=seed), self.now)], self.now)


@pytest.fixture
def scene(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> Scene:
    return Scene(tmp_path, make_bundle, draw)


def test_a_restart_takes_up_where_it_was(scene: Scene) -> None:
    watch = scene.watch()
    scene.serve(watch, "v1", 1000, seed=1)
    watch.save()
    scene.serve(watch, "v1", 7, seed=2)  # what was not saved is lost, and nothing else
    again = scene.watch().publish(scene.now)
    shown = again.models["grid"]
    assert shown.snapshot["monitored"] == 1000 and shown.snapshot["verdict"]["id"] == "healthy" and shown.last_sample_at == START + 1
    assert again.restores == {("grid", "restored"): 1, ("grid", "absent"): 0, ("grid", "refused"): 0} and again.errors == ()
    assert watch.publish(scene.now).restores["grid", "absent"] == 1


def test_a_clock_that_was_set_back_while_no_monitor_ran_hides_no_silence(scene: Scene) -> None:
    watch = scene.watch()
    scene.serve(watch, "v1", 1000, seed=1)
    watch.save()
    scene.now -= 3600.0
    again = scene.watch()
    view = again.publish(scene.now)
    assert view.clock_jumps == {"back": 1, "forward": 0} and view.models["grid"].last_sample_at == view.models["grid"].last_fresh_at == scene.now
    assert again.publish(scene.now + STALE_AFTER + 1).models["grid"].stale


def test_a_suspicion_is_written_down_though_no_sample_comes(scene: Scene) -> None:
    watch = scene.watch()
    scene.serve(watch, "v1", 100, seed=1)
    watch.save()
    for found, suspect in ((Compared(16, 2), True), (Compared(16), False)):
        watch.audited(scene.bundles["v1"], found)
        watch.save()
        assert scene.watch().publish(scene.now).models["grid"].snapshot["replay"]["suspect"] == suspect


def test_the_charts_show_what_was_before_a_restart_and_that_nobody_looked_in_between(scene: Scene) -> None:
    watch = scene.watch()
    for seed in range(1, 9):
        scene.serve(watch, "v1", 100, seed=seed)
        watch.publish(scene.now)
        watch.save()
    before = watch.publish(scene.now, point=False).models["grid"].rows
    scene.now += 30.0
    for restart in (1, 2):
        scene.now += 1.0
        again = scene.watch()
        rows = again.publish(scene.now).models["grid"].rows
        assert rows[: len(before)] == before and len(rows) == len(before) + 2 * restart
        assert rows[-2][1:] == (None,) * 4 and before[-1][0] < rows[-2][0] < rows[-1][0] == scene.now
        again.save()
    scene.now += HISTORY
    assert len(scene.watch().publish(scene.now).models["grid"].rows) == 3  # the newest of them, a gap, now
    scene.now -= 2 * HISTORY  # the clock was wrong, and all that was seen lies ahead
    assert len(scene.watch().publish(scene.now).models["grid"].rows) == 1


def test_an_alarm_is_saved_before_it_is_told_and_lives_until_it_is_acknowledged(scene: Scene) -> None:
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    watch = scene.watch()
    scene.serve(watch, "v2", 3000, seed=1)  # and the process dies here, before the second is over
    again = scene.watch()
    verdict = again.publish(scene.now).models["grid"].snapshot["verdict"]
    assert verdict["id"] == "mode_dropping" and verdict["modes"] == ["3", "8"] and verdict["since"] == scene.now
    (incident,) = again.incidents.newest()
    assert incident["closed_at"] is None and not any(again.publish(scene.now).alarms.values())  # it is the same incident, not another
    again.acknowledge("grid", scene.now)
    last = scene.watch()
    assert last.publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "warming_up" and len(last.incidents.newest()) == 1


def test_an_alarm_that_a_change_of_version_has_ended_is_not_raised_again(scene: Scene) -> None:
    """The version was changed while no monitor ran, so its state is still latched when it comes back."""
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    scene.serve(scene.watch(), "v2", 3000, seed=1)
    scene.registry.set_alias("grid", "production", "v1", reason="test")
    watch = scene.watch()
    assert watch.incidents.newest()[0]["closed_by"] == "version change"
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    watch.follow(scene.now + 1e6)
    for each in (watch, scene.watch()):
        assert each.publish(scene.now + 1e6).models["grid"].snapshot["verdict"]["id"] == "warming_up" and len(each.incidents.newest()) == 1


def test_a_disk_that_refuses_costs_no_alarm(scene: Scene) -> None:
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    watch, directory = scene.watch(), scene.root / "monitor"
    directory.write_text("no directory")
    watch.incidents.close()
    scene.serve(watch, "v2", 3000, seed=1)
    watch.incidents = Incidents(scene.root / "incidents.db")
    view = watch.publish(scene.now)
    assert view.alarms["grid", "mode_dropping"] == 1 == len(watch.incidents.newest()) and view.failed == 0
    assert any("is not on the disk" in words for words in view.errors) and any("is not on record" in words for words in view.errors)
    directory.unlink()
    watch.save()
    assert scene.watch().publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "mode_dropping"


def test_a_state_that_cannot_be_written_keeps_no_other_from_the_disk(scene: Scene) -> None:
    """Nor the charts; it is said and counted, and tried again."""
    scene.registry.set_alias("grid", "canary", "v2", reason="test", share=0.1)
    watch, directory, blocks = scene.watch(), scene.root / "monitor" / "grid", []
    for blocked, other in (("v1", "v2"), ("v2", "v1")):
        for version in ("v1", "v2"):
            scene.serve(watch, version, 20, seed=1)
        watch.publish(scene.now)
        blocks.append(directory / f"{blocked}.partial")
        blocks[-1].mkdir(parents=True)
        with pytest.raises(ExceptionGroup, match=f"the state of grid {blocked} is not on the disk: .*Is a directory"):
            watch.save()
        assert watch.states.load("grid", other)["monitored"] == 20 * len(blocks) and watch.states.history("grid", len(COLUMNS))[-1, 0] == scene.now
        blocks[-1].rmdir()
    scene.serve(watch, "v1", 20, seed=2)
    watch.publish(scene.now)
    (history := directory / f"history.{len(COLUMNS)}f8").rename(directory / "before")
    history.mkdir()
    with pytest.raises(ExceptionGroup, match="the charts of grid are not on the disk") as raised:
        watch.save()
    assert len(raised.value.exceptions) == 1 and watch.publish(scene.now).save_failures == {"grid": 3}
    assert [watch.states.load("grid", version)["monitored"] for version in ("v1", "v2")] == [60, 40]
    history.rmdir()
    watch.save()
    assert len(watch.states.history("grid", len(COLUMNS))) == 1


@pytest.mark.parametrize("when", ["before the incident", "before the unlatching"])
def test_a_death_in_between_never_loses_the_alarm(scene: Scene, when: str) -> None:
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    watch = scene.watch()
    scene.serve(watch, "v2", 3000, seed=1)
    if when == "before the incident":
        (scene.root / "incidents.db").rename(scene.root / "lost.db")
    else:
        watch.incidents.acknowledge("grid", ["v2"], at=scene.now)
    again = scene.watch()
    assert again.publish(scene.now).models["grid"].snapshot["verdict"]["id"] == "mode_dropping"
    assert [i["closed_at"] for i in again.incidents.newest()][0] is None


def test_a_state_that_does_not_fit_is_said_and_counted(scene: Scene) -> None:
    watch = scene.watch()
    scene.serve(watch, "v1", 1000, seed=1)
    watch.save()
    other = scene.watch(arl=1e6)
    view = other.publish(scene.now)
    assert view.models["grid"].snapshot["monitored"] == 1000 and view.restores["grid", "restored"] == 1 and view.errors == ()
    (scene.root / "monitor" / "grid" / "v1.npz").write_bytes(b"torn")
    view = scene.watch().publish(scene.now)
    assert view.restores["grid", "refused"] == 1 and "v1.npz" in view.errors[0] and view.models["grid"].snapshot["monitored"] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"no database",
        lambda body: body[: len(body) // 2],
        lambda body: body[:4096] + bytes(len(body) - 4096),
        lambda body: body.replace(b"mode_dropping", b"\xff" * 13),  # of which the check of the file sees nothing
    ],
)
def test_a_damaged_record_of_alarms_is_put_aside_said_and_counted(scene: Scene, damage: Callable[[bytes], bytes]) -> None:
    """And what it alone knew, the alarm of a version that is still latched, is on record again."""
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    watch, path = scene.watch(), scene.root / "incidents.db"
    assert not watch.publish(scene.now).incidents_refused
    scene.serve(watch, "v2", 3000, seed=1)
    watch.incidents.close()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    again = scene.watch()
    view = again.publish(scene.now + 2 * NOTICE)
    (words,), (aside,) = view.errors, scene.root.glob("incidents.db.*.damaged")
    assert view.incidents_refused and str(aside) in words and "begins anew" in words and aside.read_bytes() == damaged
    assert [incident["version"] for incident in again.incidents.newest()] == ["v2"]
    again.incidents.close()
    assert scene.watch().incidents.refused is None


def test_a_version_that_was_long_gone_comes_back_with_its_counts(scene: Scene) -> None:
    watch = scene.watch()
    scene.serve(watch, "v1", 1000, seed=1)
    watch.save()
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    again = scene.watch()  # has never heard of v1
    scene.registry.set_alias("grid", "production", "v1", reason="test")
    again.follow(scene.now)
    assert again.publish(scene.now).models["grid"].snapshot["monitored"] == 1000


def paired(scene: Scene, watch: Watch, seed: int, count: int = 600) -> None:
    """What v1 and v2 make of the same latents, as the tap tells it: production first, so that the candidate's record makes the pair, then the other way round."""
    for offset, order in ((0, ("v1", "v2")), (50, ("v2", "v1"))):
        for start in range(offset, count, 100):
            for version in order:
                samples = scene.draw(scene.bundles[version], 50, seed=seed, offset=start)
                watch.eat([Record("grid", version, "server_seed", seed, start, samples, scene.now)], scene.now)


def compared(watch: Watch) -> dict:
    return watch._models["grid"].comparisons["v2"][1].state()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_a_comparison_goes_on_after_a_kill_to_the_last_bit(scene: Scene) -> None:
    """And what is known to differ stays known. A record of production that makes a pair has the candidate written down."""
    scene.registry.set_alias("grid", "shadow", "v2", reason="test")
    straight, watch = Watch(scene.registry, Incidents(scene.root / "straight.db"), arl=2.6e9), scene.watch()
    straight.follow(scene.now)
    for seed in range(1, 5):
        for each in (straight, watch):
            paired(scene, each, seed, count=100)
        watch.save()
        watch = scene.watch()
        assert same(compared(watch), compared(straight)) and compared(watch)["pairs"] == 100 * seed
        assert watch.publish(scene.now).errors == ()
    shown = [each.publish(scene.now).models["grid"].live[1].comparison for each in (watch, straight)]
    assert shown[0] == shown[1] and shown[0]["differs"] and shown[0]["log10_evidence"] > 3
    scene.registry.set_alias("grid", "production", None, reason="test")
    scene.watch().save()  # nothing to compare with, for a while
    scene.registry.set_alias("grid", "production", "v1", reason="test")
    assert same(compared(scene.watch()), compared(straight))


def test_latents_that_were_not_compared_stay_counted(scene: Scene) -> None:
    scene.registry.set_alias("grid", "shadow", "v2", reason="test")
    watch = scene.watch()
    for version, samples in (("v1", np.zeros((7, 2), np.float32)), ("v2", np.full((7, 2), np.nan, np.float32))):
        watch.eat([Record("grid", version, "server_seed", 1, 0, samples, scene.now)], scene.now)
    watch.save()
    assert compared(scene.watch())["dropped"] == {"rejected": 7, "unpaired": 0}


def test_a_comparison_with_another_version_begins_anew(scene: Scene, make_bundle: Callable[..., Bundle]) -> None:
    scene.bundles["v3"] = make_bundle(root=scene.root / "registry", version="v3")
    scene.registry.set_alias("grid", "shadow", "v2", reason="test")
    watch = scene.watch()
    paired(scene, watch, seed=1)
    watch.save()
    for production, pairs in (("v3", 0), ("v1", 600)):  # v3 is v1 by another name, and the pair is another one all the same
        scene.registry.set_alias("grid", "production", production, reason="test")
        again = scene.watch()
        assert compared(again)["pairs"] == pairs and compared(again)["differs"] == bool(pairs) and again.publish(scene.now).errors == ()
    again._watched["grid", "v2"].saved = -1
    again.save()
    shutil.rmtree(scene.root / "registry" / "grid" / "v1")
    make_bundle(root=scene.root / "registry", count=2**17)  # another bundle under the same name
    assert compared(scene.watch())["pairs"] == 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("log.modes", np.zeros((2, 2)), r"log.modes is float64 \[2, 2\]; expected float64 \[11, 6\]"),
        ("log.features", np.full((1, 3), np.nan), "log.features holds what no pairs"),
        ("counts", np.zeros((2, 11), np.int64), r"there are 600 pairs, \d+ agreed, and the cells of \[0, 0\] samples"),
        ("moved", None, "moved is None"),
        ("pairs", -1, "pairs, agreed, dropped, differs are -1"),
        ("dropped", {"rejected": 0}, "expected counts"),
        ("identity", "x", "does not say which pair it is of"),
    ],
)
def test_a_damaged_comparison_is_said_and_the_monitor_beside_it_is_kept(scene: Scene, name: str, value: object, words: str) -> None:
    scene.registry.set_alias("grid", "shadow", "v2", reason="test")
    watch = scene.watch()
    paired(scene, watch, seed=1)
    watch.save()
    watch.states.save("grid", "v2", watch.states.load("grid", "v2") | {f"comparison.{name}": value})
    again = scene.watch()
    (said,) = again.publish(scene.now).errors
    assert said.startswith("the comparison of grid v2 with v1 begins anew, its saved state was not taken: ") and re.search(words, said)
    assert compared(again)["pairs"] == 0 and not compared(again)["differs"] and again.state("grid", "v2")["monitored"] == 600
    paired(scene, again, seed=2)
    assert compared(again)["pairs"] == 600


def test_a_saved_comparison_disturbs_no_sum(scene: Scene) -> None:
    scene.registry.set_alias("grid", "shadow", "v2", reason="test")
    watch = scene.watch()
    paired(scene, watch, seed=1)
    watch.save()
    before, saved = compared(watch), watch.states.load("grid", "v2")
    assert any(name.startswith("comparison.") for name in saved) and not any(name.startswith("comparison.") for name in watch.state("grid", "v2"))
    watch.merge("grid", "v2", "other", saved, scene.now)
    assert watch.publish(scene.now).models["grid"].live[1].snapshot["monitored"] == 1200 and same(compared(watch), before)


class Process:
    """`python -m monitoring.service`, to be killed."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "monitoring.service", "--registry", str(root / "registry"), "--home", str(root), "--port", "0", "--probe-rate", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.url = self.process.stdout.readline().split()[-1]

    def post(self, heartbeat: Heartbeat) -> None:
        httpx.post(f"{self.url}api/records", content=heartbeat.encode(), trust_env=False).raise_for_status()

    def until(self, true: Callable[[dict], object]) -> dict:
        with httpx.stream("GET", f"{self.url}api/events", trust_env=False, timeout=30) as stream:
            states = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            for _, state in zip(range(60), states, strict=False):
                if true(state["models"]["grid"]["snapshot"]):
                    return state["models"]["grid"]
        raise AssertionError("not reached")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        self.process.stdout.close()


@pytest.mark.slow
def test_kill_9_loses_a_second_at_most_never_an_alarm_and_raises_none(scene: Scene) -> None:
    def heartbeat(version: str, seed: int, count: int) -> Heartbeat:
        record = Record("grid", version, "server_seed", seed, 0, scene.draw(scene.bundles[version], count, seed=seed), 0.0)
        return Heartbeat("a", 0.0, (record,), {})

    processes = [Process(scene.root)]
    try:
        first = processes[-1]
        first.post(heartbeat("v1", 1, 3000))
        first.until(lambda s: s["monitored"] == 3000)
        first.until(lambda s: (scene.root / "monitor" / "grid" / "v1.npz").exists() and States(scene.root / "monitor").load("grid", "v1")["monitored"] == 3000)
        first.until(lambda s: np.isfinite(States(scene.root / "monitor").history("grid", len(COLUMNS))[:, 1]).sum() > 1)
        shown = first.until(lambda s: True)["history"]  # a stream's first event carries all of it, later ones what is new
        first.post(heartbeat("v1", 2, 100))
        first.kill()
        processes.append(Process(scene.root))
        second = processes[-1]
        state = second.until(lambda s: True)
        assert state["snapshot"]["monitored"] in (3000, 3100) and state["snapshot"]["verdict"]["id"] == "healthy"
        again = state["history"]
        known = len(shown["t"]) - 1  # the newest point was shown before it was written
        assert known > 0 and all(again[column][:known] == shown[column][:known] for column in COLUMNS)
        assert None in again["js"][known:] and any(again["js"][:known])  # a gap after what was seen, then what comes now
        scene.registry.set_alias("grid", "production", "v2", reason="inject")
        second.until(lambda s: s["version"] == "v2")
        second.post(heartbeat("v2", 3, 3000))
        second.until(lambda s: s["verdict"]["id"] == "mode_dropping")
        second.kill()  # as soon as anybody has heard of the alarm
        processes.append(Process(scene.root))
        third = processes[-1]
        state = third.until(lambda s: True)
        assert state["version"] == "v2" and state["snapshot"]["verdict"]["id"] == "mode_dropping" and state["snapshot"]["verdict"]["modes"] == ["3", "8"]
        incidents = httpx.get(f"{third.url}api/incidents", trust_env=False).json()["incidents"]
        assert [(i["version"], i["closed_at"]) for i in incidents] == [("v2", None)]
    finally:
        for process in processes:
            if process.process.poll() is None:
                process.kill()
