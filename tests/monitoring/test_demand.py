"""Samples of classes that clients ask for: tested given the class, so that demand is never taken for drift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from monitoring.diagnosis import QUIET, VERDICTS
from monitoring.edetectors import KINDS, EDetector, Fakes
from monitoring.incidents import Incidents
from monitoring.monitor import WARM_UP, Monitor
from monitoring.watch import Model, Watch, Watched
from serving.records import Record
from training.bundle import Certificate, Reference
from training.drops import RISE_WEIGHT, drop_bounds
from training.registry import Registry

CLASSES = 4
START = 1_800_000_000.0


@pytest.fixture(scope="module")
def law() -> np.ndarray:
    """Class -> the law of its cells, off-manifold last: its own mode, some confusion, a few fakes."""
    law = np.full((CLASSES, CLASSES + 1), 0.01)
    law[np.arange(CLASSES), np.arange(CLASSES)] = 0.96
    return law


def certified(law: np.ndarray, count: int, rng: np.random.Generator) -> Certificate:
    """A certificate that knows nothing but cells, of classes that are drawn evenly."""
    given = np.stack([rng.multinomial(count // CLASSES, row) for row in law])
    one, tails = np.zeros(1, np.int64), np.zeros((1, 1))
    return Certificate(
        count, 0.01, given.sum(axis=0), np.array([0.5]), tails, np.full((1, 1), count // 2), tails, np.full((1, 1), count // 2), 0, 0, np.zeros(0),
        np.zeros((0, 0)), one, one, np.zeros((1, 1)), class_cell_count=given,
    )  # fmt: skip


def detector(law: np.ndarray, rng: np.random.Generator, threshold: float, count: int = 100_000) -> EDetector:
    reference = Reference(1, np.full(CLASSES + 1, 1 / (CLASSES + 1)), np.zeros(0), np.zeros((0, 0)), *np.zeros((2, 0, 0), np.float32))
    return EDetector(certified(law, count, rng), reference, tuple("abcd"), threshold=threshold)


def feed(found: EDetector, cells: np.ndarray, classes: np.ndarray | None, index: int = 0) -> np.ndarray:
    n = len(cells)
    return found.update(np.zeros((n, 1)), np.zeros((n, 0)), cells, np.arange(index, index + n), index=index, classes=classes)


def demanded(law: np.ndarray, demand: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """cells, classes of n samples whose classes follow `demand`."""
    classes = rng.choice(CLASSES, n, p=demand)
    return (rng.random((n, 1)) > np.cumsum(law[classes], axis=1)[:, :-1]).sum(axis=1), classes


def test_given_a_class_only_what_it_makes_often_is_bet_on(law):
    low, weights = drop_bounds(certified(law, 100_000, np.random.default_rng(0)))
    assert (low[0] > 0.2).all() and np.array_equal(low[1:] > 0, np.eye(CLASSES, dtype=bool))
    assert (low[1:][low[1:] > 0] < law[0, 0] / law[0, :-1].sum()).all()
    assert weights[0] == pytest.approx(weights[1:].sum() + 2 * RISE_WEIGHT) == KINDS["drop"][1] / 2
    alone, all_of_it = drop_bounds(replace(certified(law, 100_000, np.random.default_rng(0)), class_cell_count=np.zeros((0, 0), np.int64)))
    assert alone.shape == (1, CLASSES) and all_of_it.tolist() == [KINDS["drop"][1]]


def test_no_demand_is_evidence(law):
    """The same samples asked for in another order of classes leave the same evidence; one class for ever leaves the others' alone."""
    rng = np.random.default_rng(1)
    found, sorted_ = detector(law, np.random.default_rng(0), 1e300), detector(law, np.random.default_rng(0), 1e300)
    cells, classes = demanded(law, np.full(CLASSES, 1 / CLASSES), 2000, rng)
    order = np.argsort(classes, kind="stable")
    feed(found, cells, classes)
    feed(sorted_, cells[order], classes[order])
    np.testing.assert_allclose(found.evidence, sorted_.evidence, rtol=1e-12)
    assert found.evidence[: found.groups.index("drop:a")].sum() == 0  # scores and features of these samples are no evidence
    before = found.state()["r_modes"]
    feed(found, *demanded(law, np.eye(CLASSES)[2], 500, rng))
    after = found.state()["r_modes"]
    assert np.array_equal(np.delete(before, 3, axis=0), np.delete(after, 3, axis=0)) and not np.array_equal(before[3], after[3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one class at a time", "whatever has most evidence"])
def test_run_lengths_hold_whatever_clients_ask_for(law, kind):
    """... even where they see the evidence and ask for the class that looks worst."""
    threshold, total = 50.0, 30_000
    rng, alarms, done = np.random.default_rng(2), 0, 0
    found, fakes = detector(law, np.random.default_rng(0), threshold), Fakes(certified(law, 100_000, np.random.default_rng(0)), threshold=threshold)
    for i in range(total):
        worst = (found.state()["r_modes"][1:].sum(axis=(1, 2)) + fakes.evidence).argmax() if kind != "one class at a time" else i // 300 % CLASSES
        cells, classes = demanded(law, np.eye(CLASSES)[worst], 1, rng)
        total_evidence = feed(found, cells, classes, index=i).item()
        fakes.update(classes, cells == CLASSES, index=i)
        if found.crossed is not None or fakes.crossed is not None or total_evidence + fakes.evidence.sum() >= threshold:
            alarms, done = alarms + 1, i + 1
            found.restart()
            fakes.restart()
    assert alarms == 0 or done / alarms >= threshold * (1 + 3 / np.sqrt(alarms))


def test_a_class_that_is_answered_with_another_is_found_in_any_demand(law):
    broken = law.copy()
    broken[1] = [0.3, 0.5, 0.1, 0.09, 0.01]
    delays = []
    for seed, demand in enumerate(np.random.default_rng(3).dirichlet(np.ones(CLASSES), 30)):
        rng, found = np.random.default_rng(seed), detector(law, np.random.default_rng(0), 1e6)
        feed(found, *demanded(law, demand, 3000, rng))
        assert found.crossed is None
        cells, classes = demanded(broken, demand, 8000, rng)
        feed(found, cells, classes, index=3000)
        if demand[1] > 0.01:
            delays.append((classes[: found.crossed - 3000] == 1).sum())
            assert "drop:b" in (named := {g for g, is_named in zip(found.groups, found.named, strict=True) if is_named}) <= {"drop:b", *(f"inflate:{name}" for name in "abcd")}
    # Each asked-for sample of the class brings about kl(.5, .97) = 1.4 nats; log(1e6 * 8 / .12) = 18.
    assert len(delays) > 20 and np.mean(delays) < 20


@pytest.fixture
def conditional(make_bundle, draw):
    """A bundle whose modes can be asked for, and `ask(demand, n)` -> samples, classes."""
    bundle = make_bundle()
    samples = draw(bundle, 2**17, seed=31)
    monitor = Monitor(bundle)
    seen = monitor._eye.look(samples)
    centres = np.stack([samples[seen.cells == k].mean(axis=0) for k in range(10)])
    nearest = ((samples[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)  # a class is a mode with the fakes around it
    half, given = len(samples) // 2, np.zeros((10, 11), np.int64)
    np.add.at(given, (nearest[:half], seen.cells[:half]), 1)
    bundle.__dict__["certificate"] = replace(bundle.certificate, class_cell_count=given)
    shares = tuple((given.sum(axis=1) / half).tolist())
    object.__setattr__(bundle, "card", replace(bundle.card, classes=tuple(map(str, range(10))), class_shares=shares))
    pools = [samples[half:][nearest[half:] == k] for k in range(10)]

    def ask(demand, n, seed=0, law=np.eye(10)):  # noqa: B008
        rng = np.random.default_rng(seed)
        classes = rng.choice(10, n, p=np.asarray(demand) / np.sum(demand))
        made = [rng.choice(10, p=law[c]) for c in classes]
        return np.stack([pools[k][rng.integers(len(pools[k]))] for k in made]), classes

    return bundle, ask


def test_demand_shift_is_a_verdict_and_no_alarm(conditional, draw):
    bundle, ask = conditional
    monitor = Monitor(bundle, arl=1e4)
    monitor.update(draw(bundle, WARM_UP), fresh=True, at=START)
    for step, demand in enumerate([bundle.card.class_shares, *np.eye(10)[[3, 3, 7]], np.linspace(1, 9, 10)]):
        for i in range(4):
            samples, classes = ask(demand, 1000, seed=10 * step + i)
            monitor.update(samples, fresh=True, at=START, classes=classes)
        assert monitor.first_alarm is None
        assert monitor.verdict.id == ("demand_shift" if step else "healthy")
    assert (monitor.monitored, monitor.given, monitor.served) == (WARM_UP, 20_000, 20_000 + WARM_UP)
    assert monitor.gauges("fresh")["js"].n == WARM_UP and monitor.snapshot()["verdict"]["id"] == "demand_shift"
    shown = VERDICTS["demand_shift"]
    assert shown.null is None and shown.id in QUIET and "modes and fakes were looked at" in shown.words


def test_samples_of_classes_alone_never_prove_health(conditional, draw):
    """Only modes and fakes are looked at given a class: one vector for ever passes, and so does a mode that has shrunk to a point."""
    bundle, ask = conditional
    samples, classes = ask(np.ones(10), 4096)
    for made, of in ((samples[classes == 3][:1].repeat(4096, axis=0), np.full(4096, 3)), (samples, classes)):
        monitor = Monitor(bundle)
        for _ in range(10):
            monitor.update(made, fresh=True, at=START, classes=of)
        assert monitor.verdict.id == "warming_up" and "that the model drew by itself" in monitor.verdict.words and monitor.first_alarm is None
        detectable = monitor.snapshot()["detectable"]
        assert "0 were monitored. The 40,960 of classes" in detectable and "would have been seen" not in detectable
        monitor.update(draw(bundle, WARM_UP), fresh=True, at=START)
        assert monitor.verdict.id == ("healthy" if made is samples else "demand_shift")
        monitor.acknowledge()
        assert monitor.verdict == VERDICTS["warming_up"] and "0 were monitored." in (said := monitor.snapshot()["detectable"]) and "do not count" not in said


def test_what_clients_name_no_class_for_is_asked_for_as_the_model_draws_it(conditional, draw):
    bundle, ask = conditional
    monitor, plain, probe = Monitor(bundle), draw(bundle, 20_480), np.zeros(20_480, bool)
    monitor.update(plain, fresh=True, at=START)
    monitor.update(*(asked := ask(np.eye(10)[3], 600))[:1], fresh=True, at=START, classes=asked[1])
    assert monitor.verdict.id == "healthy"
    for _ in range(10):
        monitor.update(*(asked := ask(np.eye(10)[3], 1000))[:1], fresh=True, at=START, classes=asked[1])
    assert monitor.verdict.id == "demand_shift"
    monitor.update(plain, fresh=True, at=START, received=probe)  # nobody got these
    assert monitor.verdict.id == "demand_shift"
    for _ in range(4):
        monitor.update(plain, fresh=False, at=START)
    assert monitor.verdict.id == "healthy" and monitor.first_alarm is None


def test_few_samples_and_old_certificates_say_nothing_of_demand(conditional, make_bundle):
    bundle, ask = conditional
    samples, classes = ask(np.eye(10)[3], WARM_UP - 1)
    few, old = Monitor(bundle), Monitor(make_bundle())
    for monitor in (few, old):
        monitor.update(samples, fresh=True, at=START, classes=classes)
        assert not monitor.demand_shifted and monitor.verdict.id == "warming_up" and monitor.served == WARM_UP - 1
    assert (few.given, old.given) == (WARM_UP - 1, 0)


def test_a_class_that_makes_another_alarms_in_a_monitor_and_is_named(conditional):
    bundle, ask = conditional
    monitor, law = Monitor(bundle), np.eye(10)
    law[4] = 0.5 * (law[4] + law[5])
    for i in range(4):
        samples, classes = ask(np.ones(10), 1000, seed=i, law=law)
        monitor.update(samples, fresh=True, at=START, classes=classes)
    assert (monitor.verdict.id, monitor.verdict.modes) == ("mode_dropping", ("4",)) and monitor.first_alarm < 1000


def test_an_incident_names_each_class_that_makes_junk(tmp_path, make_bundle):
    registry, bundle = Registry(tmp_path / "registry"), make_bundle(root=tmp_path / "registry", conditional=True)
    registry.set_alias("grid", "production", "v1", reason="test")
    watch = Watch(registry, Incidents(tmp_path / "incidents.db"), arl=2.6e9)
    watch.follow(START)
    junk = np.repeat(np.array([[1.0, 0.0]], bundle.certificate.golden_sample.dtype), 300, axis=0)  # between the modes
    words = []
    for label in (3, 5):
        watch.eat([Record("grid", "v1", "server_seed", label, 0, junk, START, label=label)], START)
        words += [incident["words"] for incident in watch.incidents.newest()]
    assert [w.split("these are asked for: ")[1] for w in words] == ["3.", "3, 5."]


@pytest.mark.parametrize("part", [1.0, 0.2])
def test_a_class_that_makes_junk_is_off_the_manifold_and_named_within_the_computed_delay(conditional, draw, part):
    """... also where it makes nothing else, so that no bet on a mode ever looks at its samples; none of the others is accused."""
    bundle, ask = conditional
    monitor, rng = Monitor(bundle), np.random.default_rng(7)
    monitor.update(draw(bundle, WARM_UP), fresh=True, at=START)
    for i in range(4):
        monitor.update(*(pair := ask(np.ones(10), 500, seed=i))[:1], fresh=True, at=START, classes=pair[1])
    assert (monitor.verdict.id, monitor.first_alarm) == ("healthy", None) and monitor.evidence()["modes"] < 3
    samples, classes = ask(np.ones(10), 6000, seed=9)
    samples[junk := (classes == 3) & (rng.random(6000) < part)] = (1.0, 0.0)  # between the modes
    monitor.update(samples, fresh=True, at=START, classes=classes)
    assert monitor.verdict.id == "off_manifold" and monitor.verdict.null == "A"
    assert monitor.verdict.words.endswith("So it is where these are asked for: 3.")
    hit, miss, weights = monitor._fakes._bets
    growth = part * np.log(hit[3]) + (1 - part) * np.log(miss[3])
    delay = np.log(monitor.arl / weights[3].max()) / growth.max()
    assert (classes[: monitor.first_alarm - 2000 - WARM_UP] == 3).sum() < 1.5 * delay + 1 and delay < 100
    resumed, older = Monitor(bundle), Monitor(bundle)
    resumed.restore(monitor.state())
    assert resumed.snapshot() == monitor.snapshot()
    older.update(*ask(np.ones(10), 10)[:1], fresh=True, at=START)
    older._fakes.update(np.array([3]), np.array([True]), index=10)
    older.restore({name: value for name, value in monitor.state().items() if not name.startswith("fakes.")})  # of before there were such bets
    assert older.first_alarm is None and older._fakes.evidence.sum() == 0 and older._detector.evidence.tolist() == monitor._detector.evidence.tolist()
    monitor.acknowledge()
    assert monitor.first_alarm is None and monitor._fakes.evidence.sum() == 0 and junk.any()


def test_shards_add_up_what_they_know_of_the_fakes_of_a_class(conditional):
    bundle, ask = conditional
    parts = [Monitor(bundle), Monitor(bundle)]
    for seed, monitor in enumerate(parts):
        samples, classes = ask(np.eye(10)[3], 200, seed=seed)
        samples[:3] = (1.0, 0.0)
        monitor.update(samples, fresh=True, at=START, classes=classes)
    evidence = [monitor._fakes.evidence for monitor in parts]
    parts[0].merge(parts[1], at=START)
    assert parts[0]._fakes.evidence == pytest.approx(sum(evidence)) and parts[0].first_alarm is None
    parts[1]._fakes.update(np.full(30, 3), np.ones(30, bool), index=200)
    parts[0].merge(parts[1], at=START)
    assert parts[0].first_alarm is not None
    later = Monitor(bundle)
    later.keep_alarm(parts[0].alarm)
    assert later.verdict.id == "off_manifold" and later.first_alarm == parts[0].first_alarm
    later.keep_alarm({name: value for name, value in Monitor(bundle).alarm.items() if not name.startswith("fakes.")})


def test_client_seeds_are_demand_and_no_evidence(conditional):
    bundle, ask = conditional
    monitor = Monitor(bundle)
    samples, classes = ask(np.eye(10)[2], 3000, law=np.roll(np.eye(10), 1, axis=1))  # one seed, again and again
    monitor.update(samples, fresh=False, at=START, classes=classes)
    assert (monitor.tested, monitor.served, monitor.first_alarm) == (0, 3000, None) and monitor.demand_shifted


def test_classes_that_nobody_knows_are_counted_and_rows_that_are_rejected_take_theirs_along(conditional):
    bundle, ask = conditional
    monitor, clean = Monitor(bundle), Monitor(bundle)
    samples, classes = ask(np.ones(10), 300)
    clean.update(samples[10:], fresh=True, at=START, classes=classes[10:])
    samples[:5], classes[5:10] = np.nan, [-1, 10, 99, 11, -7]
    monitor.update(samples, fresh=True, at=START, classes=classes)
    assert monitor.rejected == {"nan": 5, "shape": 0, "dtype": 0, "class": 5} and monitor.given == 290
    assert all(np.array_equal(monitor._detectors[name].evidence, clean._detectors[name].evidence) for name in ("detector", "fakes"))
    bad = np.bincount(classes[:5], minlength=10) > 0
    assert np.array_equal(monitor._no_numbers.evidence > clean._no_numbers.evidence, np.append(False, bad)) and monitor.no_numbers == 5
    with pytest.raises(ValueError, match="classes lie in 0 .. 10; the certificate knows 10"):
        feed_classes = np.array([0, 10])
        monitor._detector.update(np.zeros((2, 2)), np.zeros((2, 2)), feed_classes, np.zeros((2, 2)), index=0, classes=feed_classes)


def test_state_and_merging_know_demand(conditional, draw):
    bundle, ask = conditional
    whole, parts = Monitor(bundle), [Monitor(bundle), Monitor(bundle)]
    for seed, monitor in enumerate((whole, *parts)):
        monitor.update(draw(bundle, WARM_UP // 2 if seed else WARM_UP, seed=seed), fresh=True, at=START)
    samples, classes = ask(np.eye(10)[3] + 0.05, 2000)
    for i in range(0, 2000, 100):
        for monitor in (whole, parts[i // 100 % 2]):
            monitor.update(samples[i : i + 100], fresh=True, at=START, classes=classes[i : i + 100])
    resumed = Monitor(bundle)
    resumed.restore(whole.state())
    assert resumed.snapshot() == whole.snapshot() and np.array_equal(resumed.demand, whole.demand)
    parts[0].merge(parts[1], at=START)
    assert parts[0].given == 2000 and parts[0].verdict.id == whole.verdict.id == "demand_shift"
    assert parts[0].demand / parts[0].demand.sum() == pytest.approx(whole.demand / whole.demand.sum(), abs=0.05)


def test_records_that_name_classes_reach_the_monitor_as_such(conditional, tmp_path):
    bundle, ask = conditional
    watch = Watch(Registry(tmp_path), Incidents(tmp_path / "incidents.db"), arl=1e6)
    watch._models["grid"], watch._watched["grid", "v1"] = Model({"production": "v1"}), Watched(bundle, Monitor(bundle), 1.0)
    samples, classes = ask(np.ones(10), 90)

    def record(part: slice, origin: str, label: int | tuple | None) -> Record:
        return Record("grid", "v1", origin, 1, 0, samples[part], START, label)

    one = np.flatnonzero(classes == 4)
    records = [record(slice(0, 30), "server_seed", tuple(classes[:30].tolist())), record(one, "server_seed", 4)]
    records += [record(slice(30, 60), "server_seed", None), record(slice(60, 90), "client_seed", tuple(classes[60:].tolist()))]
    watch.eat(records, START)
    monitor = watch._watched["grid", "v1"].monitor
    assert (monitor.monitored, monitor.given, monitor.served) == (30, 30 + len(one), 90 + len(one))
    expected = np.bincount(np.concatenate([classes[:30], classes[one], classes[60:]]), minlength=10) + 30 * np.array(bundle.card.class_shares)
    assert monitor.demand == pytest.approx(expected, rel=0.05)
    assert [count for _, count in watch._watched["grid", "v1"].drawn] == [30]  # probes are still called for where these are few
