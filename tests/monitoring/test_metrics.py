"""What Prometheus reads, parsed by Prometheus' own parsers. Names and labels are a contract with rules and dashboards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from monitoring.incidents import Incidents
from monitoring.metrics import ALARMS, Exporter
from monitoring.watch import Watch
from serving.records import Heartbeat, Record
from training.bundle import Bundle
from training.registry import Registry

START = 1_800_000_000.0
CONTRACT = {  # name -> label names
    "ganwatch_divergence": {"model", "role", "version", "population", "estimator"},
    "ganwatch_divergence_low": {"model", "role", "version", "population", "estimator"},
    "ganwatch_divergence_high": {"model", "role", "version", "population", "estimator"},
    "ganwatch_divergence_floor": {"model", "role", "version", "population", "estimator"},
    "ganwatch_frechet_clipped_total": {"model", "role", "version"},
    "ganwatch_neighbours": {"model", "role", "version", "population", "estimator"},
    "ganwatch_neighbours_floor": {"model", "role", "version", "population", "estimator"},
    "ganwatch_divergence_certified": {"model", "role", "version", "estimator"},
    "ganwatch_divergence_threshold": {"model", "role", "version", "estimator"},
    "ganwatch_mode_coverage_ratio": {"model", "role", "version", "population"},
    "ganwatch_mode_coverage_ratio_low": {"model", "role", "version", "population"},
    "ganwatch_mode_coverage_ratio_high": {"model", "role", "version", "population"},
    "ganwatch_mode_coverage_ratio_floor": {"model", "role", "version", "population"},
    "ganwatch_off_manifold_ratio_floor": {"model", "role", "version", "population"},
    "ganwatch_off_manifold_ratio": {"model", "role", "version", "population"},
    "ganwatch_off_manifold_ratio_low": {"model", "role", "version", "population"},
    "ganwatch_off_manifold_ratio_high": {"model", "role", "version", "population"},
    "ganwatch_mode_share": {"model", "role", "version", "population", "mode"},
    "ganwatch_mode_share_low": {"model", "role", "version", "population", "mode"},
    "ganwatch_mode_share_high": {"model", "role", "version", "population", "mode"},
    "ganwatch_mode_share_reference": {"model", "role", "version", "mode"},
    "ganwatch_mode_alarmed": {"model", "role", "version", "mode"},
    "ganwatch_alarm_active": {"model", "role", "version", "verdict"},
    "ganwatch_alarms_total": {"model", "verdict"},
    "ganwatch_evidence_log10": {"model", "role", "version", "family"},
    "ganwatch_evidence_threshold_log10": {"model", "role", "version"},
    "ganwatch_shards": {"model", "role", "version"},
    "ganwatch_budget_share": {"model", "role", "version"},
    "ganwatch_modes": {"model", "role", "version", "population", "state"},
    "ganwatch_comparison_evidence_log10": {"model", "role", "version", "against"},
    "ganwatch_comparison_threshold_log10": {"model", "role", "version", "against"},
    "ganwatch_comparison_agreement_ratio": {"model", "role", "version", "against"},
    "ganwatch_comparison_differs": {"model", "role", "version", "against"},
    "ganwatch_comparison_pairs": {"model", "role", "version", "against"},
    "ganwatch_comparison_dropped": {"model", "role", "version", "against", "reason"},
    "ganwatch_arl_target_samples": set(),
    "ganwatch_arl_target_seconds": set(),
    "ganwatch_arl_seconds": {"model"},
    "ganwatch_samples_untested_total": {"model"},
    "ganwatch_samples_unaliased_total": {"model"},
    "ganwatch_samples_tested_per_second": {"model", "role", "version"},
    "ganwatch_window_samples": {"model", "role", "version", "population", "estimator"},
    "ganwatch_interval_info": {"model", "role", "version", "population", "estimator", "ci"},
    "ganwatch_estimate_timestamp_seconds": {"model", "role", "version"},
    "ganwatch_samples_observed_total": {"model", "origin"},
    "ganwatch_samples_rejected_total": {"model", "reason"},
    "ganwatch_records_dropped_total": {"reason"},
    "ganwatch_samples_waiting": set(),
    "ganwatch_probe_requests_total": {"model", "outcome"},
    "ganwatch_model_info": {"model", "version", "alias", "onnx_sha256", "reference_sha256"},
    "ganwatch_model_loaded_timestamp_seconds": {"model", "role", "version"},
    "ganwatch_model_load_failures_total": {"model"},
    "ganwatch_actions_total": {"model", "alias"},
    "ganwatch_clock_jumps_total": {"direction"},
    "ganwatch_replay_checked_total": {"model"},
    "ganwatch_replay_mismatch_total": {"model"},
    "ganwatch_samples_rerun_total": {"model", "outcome"},
    "ganwatch_latents_checked_total": {"model", "outcome"},
    "ganwatch_state_restores_total": {"model", "outcome"},
    "ganwatch_state_save_failures_total": {"model"},
    "ganwatch_incident_records_refused_total": set(),
    "ganwatch_serving_heartbeat_timestamp_seconds": set(),
    "ganwatch_serving_replicas": set(),
    "ganwatch_serving_requests_total": {"model", "status"},
    "ganwatch_serving_queued_samples": set(),
    "ganwatch_monitor_up": set(),
}


class Scraped:
    """Samples of the exposition of what a Watch publishes."""

    def __init__(self, watch: Watch, at: float, accept: str = "") -> None:
        view = watch.publish(at)
        exporter = Exporter(lambda: (view, {"queue_full": 3}, {("grid", "ok"): 7, ("grid", "timeout"): 0}))
        body, self.content_type = exporter.render(accept)
        self.text = body.decode()
        parse = openmetrics.text_string_to_metric_families if "openmetrics" in accept else text_string_to_metric_families
        self.families = {family.name: family for family in parse(self.text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        (value,) = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return value

    def labels(self) -> Mapping[str, set[str]]:
        return {sample.name: set(sample.labels) for sample in self.samples}


@pytest.fixture
def watch(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> Watch:
    """Over a registry whose production version has lost modes 3 and 8 and has served 3,000 samples."""
    bundle = make_bundle(root=tmp_path, lost=(3, 8))
    Registry(tmp_path).set_alias("grid", "production", "v1", reason="test")
    watch = Watch(Registry(tmp_path), Incidents(tmp_path / "incidents.db"), arl=1e6)
    watch.follow(START)
    watch.hear(Heartbeat("a", START, (), {'requests_total{model="grid",status="200"}': 12.0, "queued_samples": 2.0}), START)
    watch.hear(Heartbeat("b", START, (), {'requests_total{model="grid",status="200"}': 30.0}), START)
    watch.eat([Record("grid", "v1", "server_seed", 1, 0, draw(bundle, 3000), START)], START)
    return watch


@pytest.fixture
def candidate(watch: Watch, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> Watch:
    """The same with a healthy v2 as canary, probed 600 times; production was asked for the same rows."""
    healthy = make_bundle(root=watch.registry.root, version="v2")
    watch.registry.set_alias("grid", "canary", "v2", reason="test")
    watch.follow(START)
    rows = {v: draw(b, 600, seed=9) for v, b in (("v2", healthy), ("v1", watch.registry.open("grid", "v1")))}
    asked = [(v, origin, i) for i in range(0, 600, 50) for v, origin in (("v2", "probe"), ("v1", "client_seed"))]
    watch.eat([Record("grid", v, origin, 9, i, rows[v][i : i + 50], START) for v, origin, i in asked], START)
    return watch


def test_a_canary_has_series_of_its_own_and_is_compared_with_production(candidate: Watch) -> None:
    scraped = Scraped(candidate, START)
    active = {(s.labels["role"], s.labels["version"]): s.value for s in scraped.samples if s.name == "ganwatch_alarm_active" and s.labels["verdict"] == "mode_dropping"}
    assert active == {("production", "v1"): 1, ("canary", "v2"): 0}
    assert [scraped("ganwatch_budget_share", role=role) for role in ("production", "canary")] == [0.5, 0.25]
    assert scraped("ganwatch_evidence_threshold_log10", role="canary") > scraped("ganwatch_evidence_threshold_log10", role="production")
    assert scraped("ganwatch_window_samples", role="canary", population="fresh", estimator="js") == 600
    assert scraped("ganwatch_comparison_pairs", version="v2", against="v1") == 600 and scraped("ganwatch_comparison_differs") == 1
    assert scraped("ganwatch_comparison_dropped", reason="rejected") == scraped("ganwatch_comparison_dropped", reason="unpaired") == 0
    for population, certain in (("fresh", 8), ("recent", 8), ("served", 0)):
        modes = {state: scraped("ganwatch_modes", role="production", population=population, state=state) for state in ("covered", "certainly_covered", "certainly_dropped")}
        assert modes == {"covered": 8, "certainly_covered": certain, "certainly_dropped": certain // 4}, population
    assert scraped("ganwatch_modes", role="canary", population="fresh", state="unwatched") == 0
    nobody = {"role": "canary", "population": "served"}  # probes are not what clients got
    assert scraped("ganwatch_modes", **nobody, state="covered") == 0 == scraped("ganwatch_window_samples", **nobody, estimator="js")
    assert math.isnan(scraped("ganwatch_mode_share", **nobody, mode="3")) and math.isnan(scraped("ganwatch_divergence", **nobody, estimator="js"))
    candidate.registry.set_alias("grid", "canary", None, reason="test")
    candidate.follow(START)
    assert not [s for s in Scraped(candidate, START).samples if s.labels.get("role") == "canary" or "comparison" in s.name]


def test_the_contract(candidate: Watch) -> None:
    scraped = Scraped(candidate, START)
    assert scraped.labels() == CONTRACT
    assert scraped.content_type.startswith("text/plain; version=0.0.4")
    assert "_created" not in scraped.text
    assert all(family.documentation for family in scraped.families.values())
    assert {sample.name for f in scraped.families.values() if f.type == "counter" for sample in f.samples} == {
        n for n in CONTRACT if n.endswith("_total")
    }


def test_openmetrics_says_the_same(watch: Watch) -> None:
    plain, open_ = Scraped(watch, START), Scraped(watch, START, "application/openmetrics-text; version=1.0.0")
    assert open_.content_type.startswith("application/openmetrics-text") and open_.text.endswith("# EOF\n")
    assert "_created" not in open_.text
    assert [(s.name, s.labels, repr(s.value)) for s in plain.samples] == [
        (s.name, s.labels, repr(s.value)) for s in open_.samples
    ]


def test_the_values_are_those_of_the_monitor(watch: Watch) -> None:
    scraped, shown = Scraped(watch, START), watch.publish(START).models["grid"]
    js = shown.gauges["fresh"]["js"]
    assert scraped("ganwatch_divergence", population="fresh", estimator="js") == js.value
    assert (
        scraped("ganwatch_divergence_high", population="fresh", estimator="forward_kl")
        == shown.gauges["fresh"]["forward_kl"].high
    )
    assert math.isnan(scraped("ganwatch_divergence_low", population="served", estimator="frechet"))
    low, high = (scraped(f"ganwatch_divergence_{end}", population="fresh", estimator="frechet") for end in ("low", "high"))
    assert low <= shown.gauges["fresh"]["frechet"].value <= high and shown.gauges["fresh"]["frechet"].ci == "asymptotic"
    for estimator in ("js", "mmd", "kid", "sliced_wasserstein"):  # either clock has all of them
        assert scraped("ganwatch_divergence", population="recent", estimator=estimator) == shown.gauges["recent"][estimator].value
        assert scraped("ganwatch_divergence_low", population="recent", estimator=estimator) < scraped("ganwatch_divergence_high", population="recent", estimator=estimator)
    assert scraped("ganwatch_neighbours", population="recent", estimator="recall") < scraped("ganwatch_neighbours_floor", population="recent", estimator="recall")
    assert scraped("ganwatch_mode_coverage_ratio_floor", population="fresh") == 1 and scraped("ganwatch_off_manifold_ratio_floor", population="served") == pytest.approx(0.01)
    assert scraped("ganwatch_window_samples", population="fresh", estimator="kid") == 512
    kinds = {(s.labels["population"], s.labels["estimator"]): s.labels["ci"] for s in scraped.samples if s.name == "ganwatch_interval_info"}
    assert kinds == {(population, name): gauge.ci for population, found in shown.gauges.items() for name, gauge in found.items()}
    for population in ("fresh", "recent"):
        low, high = (scraped(f"ganwatch_mode_share_{end}", population=population, mode="3") for end in ("low", "high"))
        assert low == 0 < high < scraped("ganwatch_mode_share_reference", mode="3")
    assert math.isnan(scraped("ganwatch_mode_share_low", population="served", mode="3"))
    assert math.isnan(scraped("ganwatch_arl_target_seconds")) and scraped("ganwatch_samples_untested_total") == 0
    assert scraped("ganwatch_samples_unaliased_total") == scraped("ganwatch_incident_records_refused_total") == 0
    assert (
        js.value
        > scraped("ganwatch_divergence_threshold", estimator="js")
        > scraped("ganwatch_divergence_certified", estimator="js")
    )
    assert scraped("ganwatch_mode_coverage_ratio", population="fresh") == 0.8 and scraped("ganwatch_frechet_clipped_total") == shown.snapshot["frechet_clipped"] == 0
    assert scraped("ganwatch_mode_share", population="served", mode="3") == 0 and scraped("ganwatch_mode_share_reference", mode="3") == pytest.approx(
        0.099
    )
    assert [s.labels["mode"] for s in scraped.samples if s.name == "ganwatch_mode_alarmed" and s.value] == ["3", "8"]
    assert scraped("ganwatch_evidence_log10", family="modes") > scraped("ganwatch_evidence_threshold_log10") > 6
    assert (
        scraped("ganwatch_window_samples", population="fresh", estimator="js")
        == 3000
        == scraped("ganwatch_samples_observed_total", origin="server_seed")
    )
    assert scraped("ganwatch_estimate_timestamp_seconds") == START == scraped("ganwatch_model_loaded_timestamp_seconds")
    assert scraped("ganwatch_records_dropped_total", reason="queue_full") == 3 and scraped("ganwatch_records_dropped_total", reason="failed") == 0
    assert scraped("ganwatch_probe_requests_total", outcome="ok") == 7
    assert scraped("ganwatch_serving_requests_total", status="200") == 42 and scraped("ganwatch_serving_replicas") == 2
    files = shown.cards["production"].files
    assert (
        scraped(
            "ganwatch_model_info", alias="production", onnx_sha256=files["model.onnx"], reference_sha256=files["reference.npz"]
        )
        == 1
    )


def test_every_verdict_is_there_before_it_is_needed(watch: Watch) -> None:
    scraped = Scraped(watch, START)
    active = {s.labels["verdict"]: s.value for s in scraped.samples if s.name == "ganwatch_alarm_active"}
    assert active == {verdict: float(verdict == "mode_dropping") for verdict in ALARMS} and len(active) == 9
    assert (
        scraped("ganwatch_alarms_total", verdict="mode_dropping") == 1 and scraped("ganwatch_alarms_total", verdict="drift") == 0
    )
    watch.acknowledge("grid", START)
    scraped = Scraped(watch, START)
    assert (
        scraped("ganwatch_alarm_active", verdict="mode_dropping") == 0
        and scraped("ganwatch_alarms_total", verdict="mode_dropping") == 1
    )


def test_a_model_that_goes_leaves_no_series(watch: Watch, make_bundle: Callable[..., Bundle]) -> None:
    damaged = make_bundle(root=watch.registry.root, version="v2")
    watch.registry.set_alias("grid", "canary", "v2", reason="test")
    damaged.model_path.write_bytes(b"")
    watch.follow(START)
    assert Scraped(watch, START)("ganwatch_model_load_failures_total") == 1
    model = watch.registry.root / "grid"
    model.rename(model.parent / ".gone")
    watch.follow(START)
    scraped = Scraped(watch, START)
    assert not [s for s in scraped.samples if s.labels.get("model") == "grid" and not s.name.startswith("ganwatch_serving")]
    assert scraped("ganwatch_monitor_up") == 1


def test_a_monitor_without_models_or_replicas_is_scraped_all_the_same(tmp_path: Path) -> None:
    scraped = Scraped(Watch(Registry(tmp_path), Incidents(tmp_path / "incidents.db"), arl=1e6), START)
    assert scraped("ganwatch_monitor_up") == 1 and scraped("ganwatch_serving_replicas") == 0
    assert scraped("ganwatch_serving_heartbeat_timestamp_seconds") == 0


def test_gauges_without_a_sample_are_nan_not_zero(tmp_path: Path, make_bundle: Callable[..., Bundle]) -> None:
    make_bundle(root=tmp_path)
    Registry(tmp_path).set_alias("grid", "production", "v1", reason="test")
    watch = Watch(Registry(tmp_path), Incidents(tmp_path / "incidents.db"), arl=1e6)
    watch.follow(START)
    watch.eat([Record("grid", "v1", "server_seed", 1, 0, np.zeros((0, 2), np.float32), START)], START)
    scraped = Scraped(watch, START)
    assert math.isnan(scraped("ganwatch_divergence", population="fresh", estimator="js"))
    assert scraped("ganwatch_window_samples", population="fresh", estimator="js") == scraped("ganwatch_window_samples", population="fresh", estimator="recall") == 0
    assert scraped("ganwatch_interval_info", population="fresh", estimator="js", ci="none") == 1
