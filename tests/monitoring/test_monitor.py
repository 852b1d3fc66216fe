"""One version, watched: the verdict on each failure at its exact sample, silence while nothing is wrong, what is shown."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from monitoring.divergences import DIVERGENCES
from monitoring.monitor import ALL_GAUGES, AUDIT_PATIENCE, FAMILIES, POPULATIONS, VERDICTS, WARM_UP, Fed, Monitor
from monitoring.points import LEAST, POINT_GAUGES
from monitoring.sketches import BLOCK, HALF_LIFE, NEWEST
from training.export import law


def watch(bundle, samples, *, step=64, arl=2.6e9, fresh=True) -> Monitor:
    monitor = Monitor(bundle, arl=arl)
    for i in range(0, len(samples), step):
        monitor.update(samples[i : i + step], fresh=fresh, at=1000.0 + i)
    return monitor


@pytest.mark.parametrize(
    ("fault", "verdict", "modes", "first_alarm"),
    [
        ({"lost": (3, 8)}, "mode_dropping", ("3", "8"), 230),
        ({"fakes": 0.05}, "off_manifold", (), 109),
        ({"fakes": 0.5}, "off_manifold", (), 7),
        ({"width": 0.8}, "within_mode_collapse", (), 291),
        ({"width": 1.2}, "off_manifold", (), 543),
        ({"grain": 1.0}, "latent_fault", (), 33),
        ({"lost": (3, 8), "honest": True}, "quality_outside_tolerance", (), 1040),
        ({"fakes": 0.5, "honest": True}, "quality_outside_tolerance", (), 276),
    ],
)
def test_each_failure_is_named(make_bundle, draw, fault, verdict, modes, first_alarm):
    bundle = make_bundle(**fault)
    monitor = watch(bundle, draw(bundle, 3000, seed=5))
    assert (monitor.verdict.id, monitor.verdict.modes, monitor.first_alarm) == (verdict, modes, first_alarm)
    assert monitor.alarmed_at == 1000.0 + first_alarm // 64 * 64
    assert monitor.verdict.null == ("B" if verdict == "quality_outside_tolerance" else "A")


@pytest.mark.slow
def test_lost_modes_are_named_exactly_whatever_the_seed(make_bundle, draw):
    bundle = make_bundle(lost=(3, 8), width=0.97)
    for seed in range(30):
        monitor = watch(bundle, draw(bundle, 3000, seed=seed), step=1000)
        assert (monitor.verdict.id, monitor.verdict.modes) == ("mode_dropping", ("3", "8"))
        assert monitor.first_alarm < 300


@pytest.mark.slow
def test_silence_while_nothing_is_wrong(make_bundle, draw):
    bundle = make_bundle()
    monitor = watch(bundle, draw(bundle, 200_000, seed=99), step=4096)
    assert monitor.verdict == VERDICTS["healthy"] and monitor.first_alarm is None and monitor.monitored == 200_000


def test_a_fault_after_a_healthy_while(make_bundle, draw):
    healthy, faulty = make_bundle(), make_bundle(lost=(4,))
    samples = np.concatenate([draw(healthy, 5000, seed=1), draw(faulty, 1000, seed=2)])
    monitor = watch(healthy, samples)
    assert monitor.first_alarm == 5231 and monitor.verdict.modes == ("4",)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 37, 10_000])
def test_any_split_comes_to_the_same(make_bundle, draw, step):
    bundle = make_bundle(lost=(3, 8))
    samples = draw(bundle, 1500, seed=5)
    monitor, other = watch(bundle, samples, step=step), watch(bundle, samples, step=64)
    assert monitor.first_alarm == other.first_alarm and monitor.verdict == other.verdict
    assert monitor.evidence() == pytest.approx(other.evidence(), rel=1e-9)
    for name, gauge in monitor.gauges("fresh").items():
        assert gauge.value == pytest.approx(other.gauges("fresh")[name].value)


def test_the_alarm_latches_until_it_is_acknowledged(make_bundle, draw):
    healthy, faulty = make_bundle(), make_bundle(lost=(3, 8))
    monitor = watch(healthy, np.concatenate([draw(faulty, 600), draw(healthy, 3000)]))
    assert monitor.verdict.id == "mode_dropping"
    first = monitor.first_alarm
    monitor.acknowledge()
    assert monitor.verdict.id == "warming_up" and monitor.first_alarm is None and monitor.alarmed_at is None  # it knows nothing yet
    assert monitor.monitored == 3600
    monitor.update(draw(faulty, 600, seed=3), fresh=True, at=5.0)
    assert monitor.first_alarm > 3600 > first and monitor.alarmed_at == 5.0


def test_a_failed_replay_waits_for_the_samples_to_name_the_failure(make_bundle, draw):
    """A failed audit alone becomes a verdict only after AUDIT_PATIENCE samples that nothing else is wrong with."""
    bundle = make_bundle()
    monitor = Monitor(bundle)
    monitor.update(draw(bundle, 1000), fresh=True, at=1.0)
    monitor.audit(checked=16, mismatched=2)
    monitor.update(draw(bundle, AUDIT_PATIENCE - 1, seed=1), fresh=True, at=2.0)
    assert monitor.verdict.id == "healthy" and monitor.suspect and monitor.first_alarm is None
    monitor.update(draw(bundle, 1, seed=2), fresh=True, at=3.0)
    assert monitor.verdict.id == "wrong_model" and monitor.first_alarm == 1000 + AUDIT_PATIENCE - 1 and monitor.alarmed_at == 3.0
    monitor.audit(checked=16, mismatched=0)
    monitor.update(draw(bundle, 100, seed=3), fresh=True, at=4.0)
    assert monitor.verdict.id == "wrong_model"  # latched, also when the right model is back
    resumed = Monitor(bundle)
    resumed.restore(monitor.state())
    assert resumed.snapshot() == monitor.snapshot() and resumed.snapshot()["replay"] == {"checked": 32, "mismatched": 2, "suspect": False}
    monitor.acknowledge()
    assert monitor.verdict.id == "warming_up" and monitor.first_alarm is None
    monitor.update(draw(bundle, 2 * AUDIT_PATIENCE, seed=4), fresh=True, at=5.0)
    assert monitor.verdict.id == "healthy"


def test_one_golden_sample_that_differs_is_shown_and_no_alarm(make_bundle, draw):
    """Its latent may lie on the very edge of a decision, and then it differs in every replay. Nor does it keep a suspicion alive."""
    bundle = make_bundle()
    monitor = Monitor(bundle)
    for seed in range(3):
        monitor.audit(checked=64, mismatched=1)
        monitor.update(draw(bundle, AUDIT_PATIENCE, seed=seed), fresh=True, at=1.0)
    assert monitor.verdict.id == "healthy" and monitor.first_alarm is None
    assert monitor.snapshot()["replay"] == {"checked": 192, "mismatched": 3, "suspect": False}
    for mismatched, suspect in ((2, True), (1, False)):
        monitor.audit(checked=64, mismatched=mismatched)
        assert monitor.suspect == suspect


@pytest.mark.parametrize(("fault", "verdict"), [({"lost": (3, 8)}, "mode_dropping"), ({"fakes": 0.05}, "off_manifold"), ({"grain": 1.0}, "latent_fault")])
def test_what_the_samples_say_goes_before_a_failed_replay(make_bundle, draw, fault, verdict):
    bundle, healthy = make_bundle(**fault), make_bundle()
    monitor = Monitor(bundle)
    monitor.audit(checked=16, mismatched=15)
    monitor.update(draw(bundle, 2 * AUDIT_PATIENCE), fresh=True, at=1.0)
    assert monitor.verdict.id == verdict and monitor.first_alarm < 3000
    late = Monitor(bundle)
    late.audit(checked=16, mismatched=15)
    late.update(draw(healthy, AUDIT_PATIENCE), fresh=True, at=1.0)
    assert late.verdict.id == "wrong_model"
    late.update(draw(bundle, 3000), fresh=True, at=2.0)
    assert late.verdict.id == verdict and late.first_alarm == AUDIT_PATIENCE - 1 and late.alarmed_at == 1.0  # one alarm, a sharper word


def test_only_fresh_samples_are_evidence(make_bundle, draw):
    bundle = make_bundle()
    one_seed = np.repeat(draw(bundle, 1), 10_000, axis=0)
    monitor = watch(bundle, one_seed, fresh=False)
    assert monitor.verdict.id == "warming_up" and monitor.monitored == 0 and monitor.served == 10_000
    assert set(monitor.evidence().values()) == {-math.inf}
    assert monitor.gauges("fresh")["tv"].n == 0 and monitor.gauges("served")["mode_coverage"].value == pytest.approx(0.1)
    assert monitor.gauges("served")["frechet"].ci == "none"
    assert monitor.gauges("served")["tv"].ci == "none" and math.isnan(monitor.gauges("served")["tv"].low)


def test_constant_fresh_samples_alarm(make_bundle, draw):
    bundle = make_bundle()
    monitor = watch(bundle, np.repeat(draw(bundle, 1), 500, axis=0))
    assert monitor.verdict.id == "latent_fault" and all(math.isfinite(e) for family, e in monitor.evidence().items() if family not in ("copies", "latents"))


def test_what_has_another_form_or_is_no_fresh_sample_is_counted_and_changes_nothing(make_bundle, draw):
    bundle = make_bundle()
    samples = draw(bundle, 2000)
    plain, pestered = Monitor(bundle), Monitor(bundle)
    for i in range(0, 2000, 100):
        plain.update(samples[i : i + 100], fresh=True, at=0.0)
        pestered.update(np.full((4, 2), np.nan, np.float32), fresh=False, at=0.0)
        pestered.update(samples[i : i + 100], fresh=True, at=0.0)
        pestered.update(np.zeros((2, 5), np.float32), fresh=True, at=0.0)
        pestered.update(np.zeros((4, 2)), fresh=True, at=0.0)
        pestered.update(np.zeros((0, 2), np.float32), fresh=True, at=0.0)
    assert pestered.rejected == {"nan": 20 * 4, "shape": 20 * 2, "dtype": 20 * 4, "class": 0}
    assert pestered.evidence() == plain.evidence() and pestered.eaten == pestered.monitored == plain.monitored == 2000


@pytest.mark.parametrize("step", [1, 100, 20_000])
def test_what_is_no_number_is_evidence_and_takes_a_number(make_bundle, draw, step):
    """... the same one however the stream is cut; other bets see what is left."""
    bundle = make_bundle()
    samples = draw(bundle, 20_000)
    samples[1000:19_040] = np.nan
    samples[5000:10_000] = 3e38  # finite, but not what is made of it
    monitor, clean = watch(bundle, samples[: 20_000 if step > 1 else 1100], step=step), watch(bundle, samples[:1000])
    assert monitor.verdict.id == "off_manifold" and "NaN" in monitor.verdict.words and monitor.verdict.null == "A"
    assert monitor.first_alarm == 1002  # 2.6e9 is two or three of the like, of which the certificate had none among 2^18
    if step > 1:
        assert (monitor.monitored, monitor.no_numbers, monitor.eaten, monitor.rejected["nan"]) == (1960, 18_040, 20_000, 18_040)
    else:
        assert np.array_equal(monitor._detector.evidence, clean._detector.evidence)
    resumed, other = Monitor(bundle), Monitor(bundle)
    resumed.restore(monitor.state())
    assert resumed.snapshot() == monitor.snapshot()
    other.merge(resumed, at=4.0)
    assert (other.verdict.id, other.first_alarm) == ("off_manifold", 1002)
    monitor.acknowledge()
    assert monitor.verdict.id == "warming_up" and monitor._no_numbers.evidence.sum() == 0
    monitor.update(draw(make_bundle(lost=(3, 8)), 1000), fresh=True, at=5.0)
    assert monitor.verdict.id == "mode_dropping" and monitor.eaten > monitor.first_alarm > monitor.eaten - 1000


def test_a_rare_sample_that_is_no_number_raises_nothing(make_bundle, draw):
    bundle = make_bundle()
    monitor = watch(bundle, np.insert(draw(bundle, 3000), [500, 1500], np.nan, axis=0))
    assert monitor.verdict.id == "healthy" and monitor.rejected["nan"] == 2


def test_warming_up_ends(make_bundle, draw):
    bundle = make_bundle()
    samples = draw(bundle, WARM_UP)
    monitor = watch(bundle, samples[:-1])
    assert monitor.verdict.id == "warming_up"
    monitor.update(samples[-1:], fresh=True, at=0.0)
    assert monitor.verdict.id == "healthy"


def test_gauges_tell_lost_modes_from_fakes(make_bundle, draw):
    gauges = {
        name: watch(make_bundle(), draw(make_bundle(**fault), 4096, seed=6), step=4096).gauges("fresh")
        for name, fault in {"healthy": {}, "lost": {"lost": (3, 8)}, "fakes": {"fakes": 0.05}}.items()
    }
    healthy, lost, fakes = (gauges[name] for name in ("healthy", "lost", "fakes"))
    assert lost["forward_kl"].low > healthy["forward_kl"].high and lost["forward_kl"].high == math.inf
    assert lost["reverse_kl"].value < 1.05 * math.log(1 / 0.8)
    assert lost["mode_coverage"].value == lost["mode_coverage"].high == 0.8 and healthy["mode_coverage"].low == 1
    assert fakes["reverse_kl"].value > healthy["reverse_kl"].high and fakes["mode_coverage"] == healthy["mode_coverage"]
    assert fakes["off_manifold"].low > healthy["off_manifold"].high
    for found in gauges.values():
        assert tuple(found) == ALL_GAUGES
        for name, gauge in found.items():
            exact, asymptotic = name in (*DIVERGENCES, "mode_coverage", "off_manifold", "mmd"), name in ("frechet", "kid", "sliced_wasserstein")
            assert gauge.n == (NEWEST if name in POINT_GAUGES else 4096)
            assert gauge.ci == ("exact" if exact else "asymptotic" if asymptotic else "none") and math.isnan(gauge.low) == (gauge.ci == "none")
            assert gauge.ci == "none" or gauge.low <= max(gauge.value, 0) <= gauge.high
    assert lost["coverage"].value < healthy["coverage"].value - 0.1 < healthy["coverage"].floor
    assert lost["recall"].value < healthy["recall"].value and fakes["precision"].value < healthy["precision"].value
    assert 3 * healthy["mmd"].value < lost["mmd"].value < lost["mmd"].high < 1
    for name in ("sliced_wasserstein", "kid"):
        assert lost[name].value > 2 * max(healthy[name].floor, 0)
    assert healthy["intrinsic_dimension"].value == pytest.approx(2, abs=0.3)


def test_what_is_recent_forgets(make_bundle, draw):
    """A fault an hour ago is out of the decayed gauges soon, and its interval is that of any one moment."""
    healthy, lossy = make_bundle(), make_bundle(lost=(3, 8))
    monitor = watch(healthy, np.concatenate([draw(lossy, 3000), draw(healthy, 1000)]))
    recent, fresh = monitor.gauges("recent"), monitor.gauges("fresh")
    assert tuple(recent) == tuple(fresh) == tuple(monitor.gauges("served")) == ALL_GAUGES
    for name, gauge in recent.items():
        assert gauge.ci == ("none" if math.isnan(gauge.low) else "pointwise") and (gauge.low <= max(gauge.value, 0) <= gauge.high or gauge.ci == "none")
        assert (gauge.ci == "none") == (fresh[name].ci == "none")
    for name, factor in (("js", 0.6), ("mmd", 0.8)):  # the one is quadratic in what is lost, the other linear
        assert recent[name].value < factor * fresh[name].value and 1000 < recent[name].n < 2 / math.log(2) * HALF_LIFE + 1
    clocks = {population: (monitor.modes(population)[3], monitor.coverage(population)) for population in POPULATIONS}
    (now, counted), (block, _), (got, shown) = clocks["recent"], clocks["fresh"], clocks["served"]
    assert block["served"] < now["served"] and block["high"] < now["high"] and block["low"] < now["low"] < now["served"] < now["high"]
    assert got["served"] == block["served"] and math.isnan(got["low"]) and math.isnan(got["high"]) and monitor.modes("served")[0]["status"] == "uncertain"
    assert monitor.modes() == monitor.modes("fresh") and counted["real"] == 10 and (shown["certainly_covered"], shown["certainly_dropped"]) == (0, 0)
    for name in ("mmd", "kid", "sliced_wasserstein"):
        assert recent[name].high - recent[name].low < fresh[name].high - fresh[name].low, name


def test_gauges_of_points_follow_their_clock(make_bundle, draw):
    """Of a block they are read when it begins to be read alone and when it has doubled, the recent ones when no point is what it was; while
    there are few, whenever they have doubled."""
    bundle, read = make_bundle(), {"fresh": [], "recent": [], "served": []}
    monitor, samples = Monitor(bundle), draw(bundle, 2 * BLOCK, seed=3)
    for part in np.split(samples, [*range(LEAST, NEWEST, LEAST), *range(NEWEST, 2 * BLOCK, NEWEST // 2)]):
        monitor.update(part, fresh=True, at=0.0)
        for population, times in read.items():
            gauge = monitor.gauges(population)["kid"]
            if not times or times[-1][1] is not gauge:
                times.append((monitor.monitored, gauge))
    early = [64, 128, 256, 512]
    for population in ("fresh", "served"):
        assert [n for n, _ in read[population]] == [*early, 1024, 2048, 4096, BLOCK + 512, BLOCK + 1024, BLOCK + 2048, 2 * BLOCK]
    assert [n for n, _ in read["recent"]] == [*early, *range(1024, 2 * BLOCK + 1, NEWEST)]
    faulty = make_bundle(fakes=0.5)
    for part in (draw(bundle, 1024), draw(faulty, 1024)):
        monitor.update(part, fresh=True, at=0.0)
        recent, fresh = monitor.gauges("recent"), monitor.gauges("fresh")
    assert recent["precision"].value < 0.6 < fresh["precision"].value - 0.05 < 0.8  # half of the newest, a quarter of the block
    assert recent["kid"].low > 0


def test_gauges_of_points_are_read_anew_with_another_block_however_long_nobody_looked(make_bundle, draw):
    """... and of a sum whenever one of its parts begins one."""
    bundle, faulty = make_bundle(), make_bundle(fakes=0.5)
    healthy, broken = draw(bundle, 2100, seed=5), draw(faulty, 2 * BLOCK, seed=6)
    parts = [Monitor(bundle) for _ in range(5)]
    for monitor in parts:
        monitor.update(healthy, fresh=True, at=0.0)
    assert parts[0].gauges("fresh")["precision"].value > 0.9
    total = Monitor(bundle)

    def summed():
        total.restore(parts[0].state())
        for part in parts[1:]:
            total.merge(part, at=0.0)
        return total.gauges("fresh")["precision"].value

    assert summed() > 0.9
    for monitor in parts:
        monitor.update(broken[: BLOCK + 100], fresh=True, at=0.0)
    assert parts[0].gauges("fresh")["precision"].value < 0.7 and summed() < 0.7


def test_latents_are_tested_whatever_became_of_them(make_bundle, draw):
    """Those of what is no number, too: a law of what is left would be another."""
    bundle = make_bundle()
    monitor, samples = Monitor(bundle), draw(bundle, 64, seed=5)
    samples[::4] = np.nan
    fed = Fed(np.arange(64), bundle.card.latents(seed=5, offset=0, count=64))
    before = monitor._latents.state()
    monitor.update(samples, fresh=True, at=0.0, fed=fed)
    alone = Monitor(bundle)._latents
    alone.update(fed.z, np.arange(64))
    assert (monitor.no_numbers, monitor.monitored) == (16, 48)
    assert any(not np.array_equal(before[name], value) for name, value in alone.state().items())
    for name, value in alone.state().items():
        np.testing.assert_array_equal(monitor._latents.state()[name], value)


def test_points_of_what_clients_got_are_its_own(make_bundle, draw):
    """Of samples that were asked for and of nothing else, without an interval."""
    bundle, faulty = make_bundle(), make_bundle(fakes=0.5)
    monitor = Monitor(bundle)
    monitor.update(draw(bundle, 2000), fresh=True, at=0.0, received=np.full(2000, False))
    assert all(gauge.n == 0 for gauge in monitor.gauges("served").values())
    monitor.update(draw(faulty, 1000), fresh=False, at=0.0)
    served, fresh = monitor.gauges("served"), monitor.gauges("fresh")
    assert all(gauge.ci == "none" and math.isnan(gauge.low) and math.isfinite(gauge.floor) for gauge in served.values())
    assert served["precision"].value < 0.7 < fresh["precision"].value and served["kid"].n == NEWEST and served["mmd"].n == 1000
    assert served["intrinsic_dimension"].value == pytest.approx(2, abs=0.5) and served["mmd"].value > fresh["mmd"].value


def test_a_floor_is_what_real_data_reads(make_bundle, draw):
    bundle = make_bundle()
    monitor, real = watch(bundle, draw(bundle, 3000)), bundle.reference.cell_share
    gauges = monitor.gauges("fresh")
    for name, factor in (("chi_squared", 1.0), ("reverse_kl", 0.5), ("js", 0.125)):
        assert gauges[name].floor == pytest.approx(factor * (len(real) - 1) / 2048, rel=0.3)  # chi-squared with K degrees of freedom
    assert 0 < gauges["sliced_wasserstein"].floor < 2 * gauges["sliced_wasserstein"].value
    assert 0 < gauges["frechet"].floor < 0.02 and 0 < gauges["mmd"].floor < 0.05  # though the bundle has 1,000 real points to spare, not 2,048
    assert gauges["mode_coverage"].floor == 1 and gauges["off_manifold"].floor == real[-1]
    few = watch(bundle, draw(bundle, 16)).gauges("fresh")["mode_coverage"]
    assert few.floor == pytest.approx(1 - (1 - real[0]) ** 16, abs=0.02)  # of 16 real samples a mode has one, or is missed


def test_without_real_points_their_gauges_say_so(make_bundle, draw, monkeypatch):
    bundle = make_bundle()
    for name in ("train_points", "held_out_points"):
        monkeypatch.setitem(bundle.reference.__dict__, name, bundle.reference.held_out_points[:0])
    monitor = watch(bundle, draw(bundle, 2000))
    for gauges in map(monitor.gauges, POPULATIONS):
        for name in ("mmd", *POINT_GAUGES):
            assert gauges[name].ci == "none" and math.isnan(gauges[name].value)
        assert math.isfinite(gauges["frechet"].value)


def test_one_sample_has_no_distance_to_anything(make_bundle, draw):
    bundle = make_bundle()
    monitor = watch(bundle, draw(bundle, 1))
    for population in POPULATIONS:
        assert all(g.ci == "none" or math.isfinite(g.value) for g in monitor.gauges(population).values()) and monitor.gauges(population)["js"].n == 1
    assert monitor.gauges("fresh")["mmd"].ci == monitor.gauges("recent")["mmd"].ci == "none"


def test_snapshot_is_json_and_complete(make_bundle, draw):
    bundle = make_bundle(lost=(3, 8))
    for samples in (draw(bundle, 1)[:0], draw(bundle, 100), draw(bundle, 3000)):
        snapshot = watch(bundle, samples).snapshot()
        assert json.loads(json.dumps(snapshot, allow_nan=False)) == json.loads(json.dumps(snapshot))
    assert set(snapshot) == {
        *("model", "version", "verdict", "monitored", "given", "served", "rejected", "frechet_clipped", "evidence", "log10_threshold", "arl"),
        *("budget", "gauges", "tolerance", "modes", "coverage", "replay", "rerun", "detectable", "slack"),
    }
    assert set(snapshot["verdict"]) == {"id", "words", "advice", "modes", "classes", "risen", "null", "stays", "since_sample", "since"}
    assert snapshot["verdict"]["modes"] == ["3", "8"] and snapshot["gauges"]["fresh"]["forward_kl"]["high"] is None
    assert set(snapshot["evidence"]) == set(FAMILIES) and sum(FAMILIES.values()) == pytest.approx(1)
    assert [m["name"] for m in snapshot["modes"]] == [*bundle.card.modes, "off-manifold"]
    assert [m["name"] for m in snapshot["modes"] if m["status"] == "alarmed"] == ["3", "8"]
    for name, tolerance in snapshot["tolerance"].items():
        exceeded = tolerance["threshold"] < snapshot["gauges"]["fresh"][name]["value"]
        assert tolerance["certified"] < tolerance["threshold"] and (exceeded or name == "frechet"), name


def test_the_budget_is_split_between_versions(make_bundle):
    bundle = make_bundle()
    half = Monitor(bundle, arl=1e6, share=0.5)
    assert half.log10_threshold == pytest.approx(math.log10(2e6))
    budget = half.snapshot()["budget"]
    assert budget["version"] == 0.5 and sum(f["weight"] for f in budget["families"].values()) == pytest.approx(1)
    assert {name for name, f in budget["families"].items() if f["null"] == "B"} == {"quality"}
    for wrong in ({"arl": 0.5}, {"arl": math.nan}, {"arl": math.inf}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(ValueError, match="must"):
            Monitor(bundle, **wrong)
    with pytest.raises(ValueError, match="fresh, recent, served"):
        Monitor(bundle).gauges("stale")


def test_a_real_cell_without_data_keeps_every_gauge_finite(make_bundle, draw, monkeypatch):
    bundle = make_bundle(fakes=0.05)
    share = bundle.reference.cell_share
    monkeypatch.setitem(bundle.reference.__dict__, "cell_share", np.append(share[:-1], 0.0) / share[:-1].sum())
    gauges = watch(bundle, draw(bundle, 2000)).gauges("fresh")
    assert all(math.isfinite(g.value) for g in gauges.values()) and gauges["reverse_kl"].value > 0.1


@pytest.mark.parametrize(("fault", "mismatched", "verdict"), [
    ({"width": 0.8}, 64, "wrong_model"), ({"width": 0.8}, 63, "within_mode_collapse"), ({"lost": (3, 8)}, 64, "wrong_model"),
    ({"lost": (3, 8)}, 63, "mode_dropping"), ({"fakes": 0.05}, 64, "wrong_model"), ({"grain": 1.0}, 64, "latent_fault"),
])  # fmt: skip
def test_where_no_golden_sample_comes_back_another_model_serves_and_the_symptom_is_kept(make_bundle, draw, fault, mismatched, verdict):
    bundle = make_bundle(**fault)
    monitor = Monitor(bundle)
    monitor.audit(checked=64, mismatched=mismatched)
    monitor.update(draw(bundle, 3000, seed=5), fresh=True, at=0.0)
    assert monitor.verdict.id == verdict and monitor.verdict.modes == (("3", "8") if "lost" in fault else ())
    assert ("What shows: " in monitor.verdict.words) == (verdict == "wrong_model")
    resumed = Monitor(bundle)
    resumed.restore(monitor.state())
    assert resumed.verdict == monitor.verdict


@pytest.mark.parametrize("how", [{}, {"count": 2**12}, {"lost": (3, 8), "honest": True}])
def test_the_delays_that_a_card_states_are_those_of_the_monitor(make_bundle, how):
    bundle = make_bundle(**how)
    monitor, card = Monitor(bundle), law(bundle.reference, bundle.certificate, bundle.card.modes)
    assert list(card["expected_delay"].values()) == monitor._delays.tolist()
    assert card["unwatched"] == [mode["name"] for mode in monitor.modes() if mode["status"] == "unwatched"] == [str(k) for k in how.get("lost", ())]
