"""The committed Alertmanager configuration: valid, silent towards the outside, and grouping and inhibiting as it says."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from deploy.observability import RULES, alertmanager_config

CONFIG = RULES.parent.parent / "alertmanager" / "alertmanager.yml"
RULE_LIST = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
LABELS = {rule["alert"]: {"alertname": rule["alert"], **rule["labels"]} for rule in RULE_LIST}
BINARY = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
no_amtool = "amtool is not installed (Debian package prometheus-alertmanager)"
needs_amtool = pytest.mark.skipif(shutil.which("amtool") is None, reason=no_amtool)


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[httpx.Client]:
    """A real one with the committed configuration."""
    if BINARY is None:
        pytest.skip("Alertmanager is not installed (Debian package prometheus-alertmanager)")
    home, (port,) = tmp_path_factory.mktemp("alertmanager"), free_ports(1)
    command = [BINARY, f"--config.file={CONFIG}", f"--storage.path={home}", "--cluster.listen-address="]
    with open(home / "log", "wb") as log, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    if client.get("/-/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.05)
            yield client
        finally:
            process.terminate()
            process.wait(10)


def inhibited(client: httpx.Client, *alerts: dict[str, str], wanted: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Which of `alerts` are inhibited by the others, as (name, model), when they are all that fires; waits for `wanted`.

    Alertmanager lists an alert before its inhibitor has heard of it.
    """
    resolved = [{"labels": alert["labels"], "endsAt": "2026-01-01T00:00:00Z"} for alert in client.get("/api/v2/alerts").json()]
    firing = [{"labels": alert} for alert in alerts]
    for posted in (resolved, firing):
        assert client.post("/api/v2/alerts", json=posted).status_code == 200
    deadline = time.monotonic() + 60
    while True:
        shown = client.get("/api/v2/alerts").json()
        found = {(a["labels"]["alertname"], a["labels"].get("model", "")) for a in shown if a["status"]["inhibitedBy"]}
        if len(shown) == len(alerts) and found == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


@needs_amtool
@pytest.mark.slow
def test_amtool_accepts_it_and_routes_every_alert() -> None:
    check = subprocess.run(["amtool", "check-config", CONFIG], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    for severity in ("page", "ticket"):
        command = ["amtool", "config", "routes", "test", f"--config.file={CONFIG}", f"severity={severity}"]
        route = subprocess.run(command, capture_output=True, text=True)
        assert (route.returncode, route.stdout.strip()) == (0, "local"), route.stderr


def test_nothing_leaves_the_machine_unless_somebody_says_where_to() -> None:
    for receiver in yaml.safe_load(alertmanager_config())["receivers"]:
        assert set(receiver) == {"name"}


@needs_amtool
def test_the_commented_webhook_is_valid_once_uncommented(tmp_path: Path) -> None:
    text = alertmanager_config().replace("    # ", "    ")
    assert [c["url"] for r in yaml.safe_load(text)["receivers"] for c in r["webhook_configs"]] == ["http://127.0.0.1:9099/alerts"]
    (tmp_path / "alertmanager.yml").write_text(text)
    subprocess.run(["amtool", "check-config", tmp_path / "alertmanager.yml"], check=True, capture_output=True)


def test_every_alert_says_what_it_is_about() -> None:
    for name, labels in LABELS.items():
        assert labels["about"] in ("samples", "monitor", "serving", "versions", "training"), name
        assert labels["severity"] in ("page", "ticket"), name


@pytest.mark.slow
def test_one_notification_for_each_alert_of_each_model(alertmanager: httpx.Client) -> None:
    drift, mode = LABELS["GanDrift"], LABELS["GanModeDropped"]
    alerts = [{"labels": {**alert, "model": model}} for alert in (drift, mode) for model in ("digits", "ring")]
    assert alertmanager.post("/api/v2/alerts", json=alerts).status_code == 200
    groups = alertmanager.get("/api/v2/alerts/groups").json()
    found = {(g["labels"]["alertname"], g["labels"].get("model")): len(g["alerts"]) for g in groups}
    assert {(alert["labels"]["alertname"], alert["labels"]["model"]): 1 for alert in alerts}.items() <= found.items()


@pytest.mark.slow
def test_a_monitor_that_sees_nothing_of_a_model_silences_that_models_drift_alerts(alertmanager: httpx.Client) -> None:
    of_digits = [{**labels, "model": "digits"} for labels in LABELS.values() if labels["alertname"] != "GanMonitorAbsent"]
    of_ring = {**LABELS["GanDrift"], "model": "ring"}
    wanted = {(name, "digits") for name, labels in LABELS.items() if labels["about"] == "samples"}
    assert inhibited(alertmanager, *of_digits, of_ring, wanted=wanted) == wanted


@pytest.mark.slow
def test_a_monitor_that_is_gone_silences_everything_else(alertmanager: httpx.Client) -> None:
    others = [{**labels, "model": "digits"} for name, labels in LABELS.items() if name != "GanMonitorAbsent"]
    wanted = {(alert["alertname"], "digits") for alert in others}
    assert inhibited(alertmanager, LABELS["GanMonitorAbsent"], *others, wanted=wanted) == wanted


@pytest.mark.slow
def test_drift_alone_silences_nothing(alertmanager: httpx.Client) -> None:
    drift = [{**labels, "model": "digits"} for labels in LABELS.values() if labels["about"] == "samples"]
    of_ring = [{**LABELS[name], "model": "ring"} for name in ("GanMonitorStale", "GanDrift")]  # heard of last, so digits' have been
    wanted = {("GanDrift", "ring")}
    assert inhibited(alertmanager, *drift, *of_ring, wanted=wanted) == wanted
