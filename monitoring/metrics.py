"""What Prometheus reads. Every series is made from the monitor's present view at the moment of the scrape, so that none outlives
its model, and the names and labels here are a contract with deploy/prometheus/rules.yml and the dashboards.

The only file that imports prometheus_client. It knows nothing of how the figures came about.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from monitoring.diagnosis import QUIET, VERDICTS
from monitoring.replicas import parse_counter
from monitoring.reruns import LATENTS, OUTCOMES
from monitoring.runs import STATES
from monitoring.view import Live, View
from serving.records import ORIGINS

ESTIMATORS = ("forward_kl", "reverse_kl", "js", "chi_squared", "tv", "frechet", "mmd", "kid", "sliced_wasserstein")
NEIGHBOURS = ("precision", "recall", "density", "coverage", "intrinsic_dimension")
RATIOS = {
    "mode_coverage": "modes of the real data that the model still serves",
    "off_manifold": "samples that look like nothing in the real data",
}
ALARMS = tuple(verdict for verdict in VERDICTS if verdict not in QUIET)
DROPPED = ("queue_full", "unknown_model", "failed")  # why records that reached the monitor were not looked at

TRAINING = {  # figure of a training run -> end of its series' name, what it is
    "critic_loss": ("critic_loss", "The critic's loss, without penalty"),
    "generator_loss": ("generator_loss", "The generator's loss"),
    "penalty": ("penalty", "What the critic pays for its slope"),
    "divergence": ("divergence", "What the critic's loss on held-out data says: JS in nats, or the objective's own divergence"),
    "saturation": ("saturation_ratio", "That as a share of its largest value; where it has none, the JS that the logits mean as a share of log 2"),
    "accuracy": ("critic_accuracy_ratio", "Pairs of a held-out real and a fake that the critic puts in order; 1/2 at chance"),
    "overfitting": ("critic_overfitting_ratio", "What that accuracy gains on training data"),
    "mode_coverage": ("mode_coverage_ratio", "Modes of the data that come at a quarter of their real share or more, by what as many real samples would reach"),
    "missing_modes": ("missing_modes", "Modes of the data that come at less than a quarter of their real share, and too seldom for chance"),
    "modes": ("modes", "Modes of the data, as the run's diagnostics tell them apart"),
    "forward_kl": ("forward_kl_nats", "KL of the real from the generated shares of the modes: dropped modes"),
    "reverse_kl": ("reverse_kl_nats", "KL of the generated from the real shares of the modes"),
    "weight": ("logit_weight", "Mean size of the derivative of the generator's loss by a logit"),
    "gradient_norm": ("generator_gradient_norm", "Norm of the gradient of the generator's loss by its weights"),
    "pull": ("sample_pull", "Mean size of the derivative of the generator's loss by a sample"),
    "tail_index": ("tail_index", "Hill's tail index of those; below 2 there is no variance"),
    "signal_to_noise": ("signal_to_noise_ratio", "Squared mean of those over its variance"),
    "precision": ("precision_ratio", "Samples that lie among held-out data, each of which reaches to its fifth neighbour"),
    "real_precision": ("real_precision_ratio", "What real samples, those of training, reach of that"),
    "dimension": ("sample_dimensions", "Intrinsic dimension of the generator's samples"),
    "data_dimension": ("data_dimensions", "Intrinsic dimension of the data"),
    "latent_dimension": ("latent_dimensions", "Normal coordinates of the latent law; its signs are a finite set and fill no dimension"),
}

Outcomes = Mapping[tuple[str, str], int]
Labelled = Iterable[tuple[Mapping[str, str], float | int | None]]  # bool counts as int


class Exporter:
    """Renders what `read` returns at each scrape: the view, the records dropped by reason, the probes by (model, outcome).

    `runs` gives where training runs stand (runs.py); `reruns` the samples run again and the latents looked at, by (model, outcome);
    `waiting` the samples that were acknowledged and are not judged yet.
    """

    def __init__(
        self,
        read: Callable[[], tuple[View, Mapping[str, int], Mapping[tuple[str, str], int]]],
        runs: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
        reruns: Callable[[], tuple[Outcomes, Outcomes]] = lambda: ({}, {}),
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_ViewCollector(read, runs, reruns, waiting))

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it, the text format otherwise."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _ViewCollector(Collector):
    def __init__(
        self,
        read: Callable[[], tuple[View, Mapping[str, int], Mapping[tuple[str, str], int]]],
        runs: Callable[[], Sequence[Mapping[str, Any]]],
        reruns: Callable[[], tuple[Outcomes, Outcomes]],
        waiting: Callable[[], int],
    ) -> None:
        self._read, self._runs, self._reruns, self._waiting = read, runs, reruns, waiting

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        view, dropped, probes = self._read()
        words = "How often the monitor's clock was set back, or went ahead by a minute at once: set forward, or the process stood still"
        yield _counter("ganwatch_clock_jumps_total", words, [({"direction": direction}, count) for direction, count in view.clock_jumps.items()])
        yield _gauge("ganwatch_monitor_up", "1 while the monitor's process answers", [({}, 1)])
        yield _gauge("ganwatch_arl_target_samples", "Monitored samples to a false alarm, on average, at least", [({}, view.budget.samples)])
        words = "The same as a time, whatever the traffic; NaN where it was stated in samples"
        yield _gauge("ganwatch_arl_target_seconds", words, [({}, view.budget.seconds)])
        words = "The same as a time, at the rate of the last hour; NaN while nothing was tested"
        yield _gauge("ganwatch_arl_seconds", words, [({"model": model}, view.seconds(shown)) for model, shown in view.models.items()])
        yield from _estimates(view)
        yield from _modes(view)
        yield from _alarms(view)
        yield from _comparisons(view)
        yield from _samples(view, dropped, probes)
        words = "Samples that were acknowledged and are not judged yet, in the monitor's inbox: a kill would lose them"
        yield _gauge("ganwatch_samples_waiting", words, [({}, self._waiting())])
        yield from _versions(view)
        yield from _run_again(view, *self._reruns())
        yield from _serving(view)
        yield from _training(self._runs())


def _estimates(view: View) -> Iterator[Metric]:
    gauges = [(labels | {"population": p}, found) for labels, live in _versions_of(view) for p, found in live.gauges.items()]
    for suffix, words, pick in (
        ("", "", lambda gauge: gauge.value),
        ("_low", ", lower end of its interval", lambda gauge: gauge.low),
        ("_high", ", upper end of its interval", lambda gauge: gauge.high),
        ("_floor", ": what as many samples of the real data itself would read", lambda gauge: gauge.floor),
    ):
        yield _gauge(
            f"ganwatch_divergence{suffix}",
            f"Divergence of served samples from the real data{words}",
            [(labels | {"estimator": e}, pick(g[e])) for labels, g in gauges for e in ESTIMATORS if e in g],
        )
        for ratio, meaning in RATIOS.items():
            samples = [(labels, pick(g[ratio])) for labels, g in gauges if ratio in g]
            yield _gauge(f"ganwatch_{ratio}_ratio{suffix}", f"Share of {meaning}{words}", samples)
    for suffix, words, pick in (("", "", lambda gauge: gauge.value), ("_floor", ": what as many samples of the real data itself would read", lambda gauge: gauge.floor)):
        found = [(labels | {"estimator": e}, pick(g[e])) for labels, g in gauges for e in NEIGHBOURS if e in g]
        yield _gauge(f"ganwatch_neighbours{suffix}", f"Fidelity and diversity by nearest neighbours, without an interval{words}", found)
    for bound, words in (("certified", "as certified"), ("threshold", "above which the quality is out of tolerance")):
        samples = [
            (labels | {"estimator": estimator}, limits[bound])
            for labels, live in _versions_of(view)
            for estimator, limits in live.snapshot["tolerance"].items()
        ]
        yield _gauge(f"ganwatch_divergence_{bound}", f"Divergence from the real data {words}", samples)
    clipped = _by_version(view, lambda live: live.snapshot["frechet_clipped"])
    yield _counter("ganwatch_frechet_clipped_total", "Eigenvalues below zero, by more than rounding explains, that Frechet gauges took for zero", clipped)
    every = [(labels | {"estimator": e}, gauge) for labels, g in gauges for e, gauge in g.items()]
    yield _gauge("ganwatch_window_samples", "Samples behind the present estimate", [(labels, gauge.n) for labels, gauge in every])
    kinds = [(labels | {"ci": gauge.ci}, 1) for labels, gauge in every]
    yield _gauge("ganwatch_interval_info", "What the estimate's interval holds for: exact, asymptotic, pointwise; or none", kinds)
    yield _gauge(
        "ganwatch_estimate_timestamp_seconds",
        "When the newest sample entered the estimates, 0 before the first",
        _by_version(view, lambda live: live.last_fresh_at or 0),
    )


def _modes(view: View) -> Iterator[Metric]:
    cells = [(labels | {"population": p, "mode": cell["name"]}, cell) for labels, live in _versions_of(view) for p, modes in live.modes.items() for cell in modes]
    for name, words, pick in (
        ("share", "Share of served samples in the mode", lambda cell: cell["served"]),
        ("share_low", "Share of served samples in the mode, lower end of its interval", lambda cell: cell["low"]),
        ("share_high", "Share of served samples in the mode, upper end of its interval", lambda cell: cell["high"]),
    ):
        yield _gauge(f"ganwatch_mode_{name}", words, [(labels, pick(cell)) for labels, cell in cells])
    cells = [(labels | {"mode": cell["name"]}, cell) for labels, live in _versions_of(view) for cell in live.modes["fresh"]]
    for name, words, pick in (
        ("share_reference", "Share of the real data in the mode", lambda cell: cell["reference"]),
        ("alarmed", "1 while an alarm names the mode", lambda cell: cell["status"] == "alarmed"),
    ):
        yield _gauge(f"ganwatch_mode_{name}", words, [(labels, pick(cell)) for labels, cell in cells])
    counts = [(labels | {"population": p, "state": s}, n) for labels, live in _versions_of(view) for p, found in live.coverage.items() for s, n in found.items()]
    yield _gauge("ganwatch_modes", "Modes of the real data, by what samples show or prove of them", counts)


def _alarms(view: View) -> Iterator[Metric]:
    active = [(labels | {"verdict": verdict}, live.snapshot["verdict"]["id"] == verdict) for labels, live in _versions_of(view) for verdict in ALARMS]
    yield _gauge("ganwatch_alarm_active", "1 while the alarm of this verdict is latched", active)
    raised = [({"model": model, "verdict": verdict}, view.alarms.get((model, verdict), 0)) for model in view.models for verdict in ALARMS]
    yield _counter("ganwatch_alarms_total", "Alarms raised, of whatever version, by the verdict they opened with", raised)
    families = [(labels | {"family": f}, e) for labels, live in _versions_of(view) for f, e in live.snapshot["evidence"].items()]
    yield _gauge("ganwatch_evidence_log10", "log10 of the family's weighted e-value", families)
    yield _gauge(
        "ganwatch_evidence_threshold_log10",
        "log10 of what the families' e-values must sum to for an alarm",
        _by_version(view, lambda live: live.snapshot["log10_threshold"]),
    )
    yield _gauge("ganwatch_shards", "Other monitors whose samples are summed up here", _by_version(view, lambda live: live.shards))
    yield _gauge("ganwatch_budget_share", "Part of the model's false-alarm budget that the version has", _by_version(view, lambda live: live.share))


def _comparisons(view: View) -> Iterator[Metric]:
    """Of candidates with production, on the same latents."""
    found = [(labels | {"against": live.comparison["against"]}, live.comparison) for labels, live in _versions_of(view) if live.comparison]
    for name, words, key in (
        ("evidence_log10", "log10 of the e-value against both versions having one law", "log10_evidence"),
        ("threshold_log10", "log10 of the e-value from which on they are said to differ", "log10_threshold"),
        ("agreement_ratio", "Share of latents that both versions put into the same mode", "agreement"),
        ("differs", "1 once the two versions are known to differ in law", "differs"),
        ("pairs", "Latents of which both versions' samples were looked at", "pairs"),
    ):
        yield _gauge(f"ganwatch_comparison_{name}", words, [(labels, comparison[key]) for labels, comparison in found])
    dropped = [(labels | {"reason": reason}, count) for labels, comparison in found for reason, count in comparison["dropped"].items()]
    yield _gauge("ganwatch_comparison_dropped", "Latents of a candidate that were not compared: a row could not be looked at, or production's side did not come", dropped)


def _samples(view: View, dropped: Mapping[str, int], probes: Mapping[tuple[str, str], int]) -> Iterator[Metric]:
    observed = [({"model": m, "origin": origin}, view.observed.get((m, origin), 0)) for m in view.models for origin in ORIGINS]
    yield _counter("ganwatch_samples_observed_total", "Served samples that reached the monitor", observed)
    reasons = [(model, reason) for model, shown in view.models.items() for reason in shown.snapshot["rejected"]]
    rejected = [({"model": model, "reason": reason}, view.rejected.get((model, reason), 0)) for model, reason in reasons]
    yield _counter("ganwatch_samples_rejected_total", "Samples that could not be looked at", rejected)
    untested = [({"model": model}, view.untested[model]) for model in view.models]
    yield _counter("ganwatch_samples_untested_total", "Fresh samples beyond as many a second as may be tested", untested)
    unaliased = [({"model": model}, view.unaliased[model]) for model in view.models]
    yield _counter("ganwatch_samples_unaliased_total", "Served samples of versions that no alias names, which are not judged", unaliased)
    rates = _by_version(view, lambda live: live.tested_rate)
    yield _gauge("ganwatch_samples_tested_per_second", "Samples that were tested over the last hour, NaN before there is a rate", rates)
    dropped = {**dropped, "unknown_model": view.unknown_model, "failed": view.failed}
    yield _counter(
        "ganwatch_records_dropped_total",
        "Records the monitor did not look at; failed: not to the end, for an error of its own",
        [({"reason": r}, dropped.get(r, 0)) for r in DROPPED],
    )
    asked = [({"model": model, "outcome": outcome}, count) for (model, outcome), count in probes.items() if model in view.models]
    words = "The monitor's own requests for samples; unpaired: production did not answer what a candidate was probed with"
    yield _counter("ganwatch_probe_requests_total", words, asked)


def _versions(view: View) -> Iterator[Metric]:
    cards = [
        {
            "model": model,
            "version": card.version,
            "alias": alias,
            "onnx_sha256": card.files["model.onnx"],
            "reference_sha256": card.files["reference.npz"],
        }
        for model, shown in view.models.items()
        for alias, card in shown.cards.items()
    ]
    yield _gauge("ganwatch_model_info", "The versions under watch", [(labels, 1) for labels in cards])
    yield _gauge(
        "ganwatch_model_loaded_timestamp_seconds",
        "When the monitor began to judge the present version",
        _by_version(view, lambda live: live.since),
    )
    failures = [({"model": model}, count) for model, count in view.load_failures.items()]
    yield _counter("ganwatch_model_load_failures_total", "Bundles that the monitor could not load", failures)
    for name, what, words in (("checked", "checked", "and compared"), ("mismatch", "mismatched", "that came back different")):
        counts = [({"model": model}, view.replays[model, what]) for model in view.models]
        yield _counter(f"ganwatch_replay_{name}_total", f"Certified samples asked of the server again {words}", counts)
    actions = [({"model": model, "alias": alias}, count) for (model, alias), count in view.actions.items()]
    yield _counter("ganwatch_actions_total", "Aliases that the monitor changed for an alarm", actions)
    restores = [({"model": model, "outcome": outcome}, count) for (model, outcome), count in view.restores.items()]
    yield _counter("ganwatch_state_restores_total", "Versions that came under watch, by what became of their saved state", restores)
    failures = [({"model": model}, count) for model, count in view.save_failures.items()]
    yield _counter("ganwatch_state_save_failures_total", "Times that a version's state, or what the charts showed, could not be written to the disk", failures)
    words = "Whether the record of alarms was damaged when the monitor started, and a new one begun"
    yield _counter("ganwatch_incident_records_refused_total", words, [({}, view.incidents_refused)])


def _run_again(view: View, samples: Outcomes, latents: Outcomes) -> Iterator[Metric]:
    for name, words, counts, outcomes in (
        ("samples_rerun", "Served samples run again on the certified generator, by what came of it", samples, OUTCOMES),
        ("latents_checked", "Latents that the model was fed, by whether they were those of their seed", latents, LATENTS),
    ):
        found = [({"model": model, "outcome": outcome}, counts.get((model, outcome), 0)) for model in view.models for outcome in outcomes]
        yield _counter(f"ganwatch_{name}_total", words, found)


def _serving(view: View) -> Iterator[Metric]:
    yield _gauge("ganwatch_serving_replicas", "Replicas heard within the last ten seconds", [({}, view.replicas)])
    yield _gauge(
        "ganwatch_serving_heartbeat_timestamp_seconds",
        "When a replica was last heard, 0 before the first",
        [({}, view.heard_at or 0)],
    )
    families: dict[str, list[tuple[Mapping[str, str], float | int | None]]] = defaultdict(list)
    for text, value in view.serving.items():
        name, labels = parse_counter(text)
        families[name].append((dict(labels), value))
    for name, samples in sorted(families.items()):
        make = _counter if name.endswith("_total") else _gauge
        yield make(f"ganwatch_serving_{name}", "Counted by the replicas, summed over them", samples)


def _training(runs: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Where runs stand, for all that are shown; figures for those that are under way only, since the last ones are no news."""
    named = [({"model": run["model"], "run": run["run"]}, run) for run in runs]
    under_way = [(labels, run) for labels, run in named if run["state"] in ("running", "silent")]
    states = [(labels | {"state": state}, run["state"] == state) for labels, run in named for state in STATES]
    yield _gauge("ganwatch_training_state", "1 for what has become of a training run", states)
    for name, words, key in (
        ("report_timestamp_seconds", "When the run last said anything", "at"),
        ("progress_ratio", "Share of the run's steps that are done", "progress"),
    ):
        yield _gauge(f"ganwatch_training_{name}", words, [(labels, run[key]) for labels, run in named])
    left = [(labels, run["seconds_left"]) for labels, run in under_way]
    yield _gauge("ganwatch_training_remaining_seconds", "Until the last step, as the run expects; NaN before the first look", left)
    alarms = [
        (labels | {"alarm": name, "fatal": str(fatal).lower()}, name in run["alarms"])
        for labels, run in under_way
        for name, fatal in run["fatal"].items()
    ]
    yield _gauge("ganwatch_training_alarm_active", "1 while the run's diagnostics say so; fatal: not to be published like this", alarms)
    for figure, (name, words) in TRAINING.items():
        samples = [(labels, run["figures"][figure]) for labels, run in under_way if figure in run["figures"]]
        yield _gauge(f"ganwatch_training_{name}", words, samples)


def _versions_of(view: View) -> Iterator[tuple[dict[str, str], Live]]:
    """Every version under watch, with the labels of its series."""
    return (({"model": model, "role": live.role, "version": live.version}, live) for model, shown in view.models.items() for live in shown.live)


def _by_version(view: View, pick: Callable[[Live], Any]) -> Labelled:
    return [(labels, pick(live)) for labels, live in _versions_of(view)]


def _gauge(name: str, words: str, samples: Labelled) -> Metric:
    metric = Metric(name, words, "gauge")
    for labels, value in samples:
        metric.add_sample(name, dict(labels), math.nan if value is None else float(value))
    return metric


def _counter(name: str, words: str, samples: Labelled) -> Metric:
    metric = Metric(name.removesuffix("_total"), words, "counter")
    for labels, value in samples:
        metric.add_sample(name, dict(labels), math.nan if value is None else float(value))
    return metric
