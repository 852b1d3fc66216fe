"""Rules, dashboard and Grafana's alerts speak only of what the monitor exports, and Prometheus understands every word."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.grafana import HERE as GRAFANA
from deploy.observability import RULES, prometheus_config

no_promtool = "promtool is not installed (Debian package prometheus)"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=no_promtool)
SELECTOR = re.compile(r"\bganwatch_\w+(?:\{[^}]*\})?")
VARIABLES = {"$model": "grid", "$role": "production", "$population": "fresh", "$estimator": "js", "$__rate_interval": "30s"}
ALERTS = [
    "GanModeDropped",
    "GanOffManifold",
    "GanWithinModeCollapse",
    "GanMemorisation",
    "GanLatentFault",
    "GanQualityOutsideTolerance",
    "GanWorldMoved",
    "GanDrift",
    "GanWrongModel",
    "GanVersionsDiffer",
    "GanMonitorStale",
    "GanMonitorAbsent",
    "GanSamplesDropped",
    "GanSamplesRejected",
    "GanServingLoadFailed",
    "GanTrainingFailing",
    "GanTrainingFailed",
    "GanTrainingSilent",
]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((GRAFANA / "dashboards" / "ganwatch.json").read_text())


def panel_queries() -> Iterator[tuple[str, str]]:
    """(panel, expression with the variables of the dashboard put in)."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            yield f"{panel['title']} {target['refId']}", expr


def grafana_queries() -> Iterator[tuple[str, str]]:
    """(alert, expression) of the provisioning file."""
    for group in yaml.safe_load((GRAFANA / "provisioning" / "alerting" / "ganwatch.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["title"], rule["data"][0]["model"]["expr"]


def annotation_queries() -> Iterator[tuple[str, str]]:
    for annotation in dashboard()["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"].replace("$model", "grid")


def promtool(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)


def test_every_alert_is_there_and_tells_what_to_do() -> None:
    assert [rule["alert"] for rule in rules()] == ALERTS
    for rule in rules():
        annotations = rule["annotations"]
        assert {"summary", "description", "runbook"} <= set(annotations), rule["alert"]
        if rule["labels"]["about"] == "samples":
            assert "{{ $labels.model }} {{ $labels.version }} ({{ $labels.role }})" in annotations["summary"]
            assert "`ganwatch rollback --model {{ $labels.model }} --alias {{ $labels.role }}`" in annotations["runbook"]
            assert "for" not in rule, "the monitor latches its alarms"


@needs_promtool
@pytest.mark.slow
def test_promtool_accepts_the_committed_configuration() -> None:
    found = promtool("check", "config", RULES.parent / "prometheus.yml")
    assert found.returncode == 0 and f"{len(ALERTS)} rules found" in found.stdout, found.stdout + found.stderr


@needs_promtool
@pytest.mark.slow
def test_the_rules_pass_their_unit_tests() -> None:
    found = promtool("test", "rules", RULES.parent / "rules_test.yml")
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_unit_tests_wait_for_each_alert() -> None:
    """They compare all of ALERTS each time, so an alert that fires too often fails them; one that never does must be waited for."""
    expected = re.findall(r'alertname="(\w+)", alertstate="firing"', (RULES.parent / "rules_test.yml").read_text())
    assert set(expected) == set(ALERTS)


@settings(deadline=None)
@given(st.integers(1, 65535), st.none() | st.integers(1, 65535), st.sampled_from(["500ms", "5s", "1m"]))
def test_a_rendered_configuration_differs_in_ports_and_paths_only(monitor: int, alertmanager: int | None, interval: str) -> None:
    rendered = yaml.safe_load(prometheus_config(monitor_port=monitor, alertmanager_port=alertmanager, scrape_interval=interval))
    committed = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    assert rendered["rule_files"] == [str(RULES)]
    assert rendered["scrape_configs"] == [{"job_name": "ganwatch", "static_configs": [{"targets": [f"127.0.0.1:{monitor}"]}]}]
    wanted = [] if alertmanager is None else [f"127.0.0.1:{alertmanager}"]
    managers = rendered.get("alerting", {"alertmanagers": []})["alertmanagers"]
    assert [target for m in managers for config in m["static_configs"] for target in config["targets"]] == wanted
    assert set(committed) - set(rendered) <= {"alerting"}
    assert rendered["global"]["scrape_interval"] == interval


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"monitor_port is {port}"):
        prometheus_config(monitor_port=port)


@needs_promtool
@pytest.mark.slow
def test_a_rendered_configuration_loads_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(prometheus_config(monitor_port=9464))
    assert promtool("check", "config", tmp_path / "prometheus.yml").returncode == 0


@pytest.mark.slow
def test_every_query_returns_data_from_the_real_exporter(prometheus: Any) -> None:
    exposition = httpx.get(f"{prometheus.monitor_url}/metrics", trust_env=False).text
    exported = set(re.findall(r"^(ganwatch_\w+)", exposition, re.MULTILINE))
    alerts = [*grafana_queries(), *annotation_queries(), *((rule["alert"], rule["expr"]) for rule in rules())]
    for what, expr in [*panel_queries(), *alerts]:
        assert "$" not in expr, f"{what}: a variable of {expr} is unknown"
        names = {selector.split("{")[0] for selector in SELECTOR.findall(expr)}
        assert names, f"{what}: {expr} reads nothing of ganwatch"
        assert names <= exported, f"{what}: the monitor exports no {names - exported}"

    # Until: after a scrape that a busy machine made late there is nothing before the next.
    for what, expr in panel_queries():
        assert not all(math.isnan(value) for _, value in prometheus.until(expr)), f"{what}: {expr} gives NaN only"

    # An alert is silent while all is well, so its parts must be there; and the whole must be understood.
    for what, expr in alerts:
        prometheus.query(expr)
        for selector in SELECTOR.findall(expr):
            prometheus.until(selector)


@pytest.mark.slow
def test_lost_modes_become_an_alert_that_names_them(prometheus: Any) -> None:
    ((labels, _),) = prometheus.until('ALERTS{alertname="GanModeDropped", alertstate="firing"}')
    assert {labels[name] for name in ("model", "severity", "about")} == {"grid", "page", "samples"}
    groups = prometheus.get("rules")["groups"]
    assert {rule["name"]: rule["health"] for group in groups for rule in group["rules"]} == dict.fromkeys(ALERTS, "ok")
    (alert,) = (alert for alert in prometheus.get("alerts")["alerts"] if alert["labels"]["alertname"] == "GanModeDropped")
    assert alert["annotations"]["summary"] == "grid v1 (production) has stopped producing part of its data"
    assert alert["annotations"]["modes"] == "3, 8"
    assert "`ganwatch rollback --model grid --alias production`" in alert["annotations"]["runbook"]
    firing = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"}
    assert firing == {"GanModeDropped", "GanVersionsDiffer"}, "one fault, one alert; and the canary is not what production is"
