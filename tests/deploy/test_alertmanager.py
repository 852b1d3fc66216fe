"""The committed Alertmanager configuration: valid, silent towards the outside, and grouping and inhibiting as it says."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.observability import RULES, alertmanager_config

CONFIG = Path(RULES).parent.parent / "alertmanager" / "alertmanager.yml"
needs_amtool = pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed (Debian package prometheus-alertmanager)")


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}


def matches(matchers: list[str], labels: dict[str, str]) -> bool:
    """Alertmanager's matchers, as far as they are used here: name="value", !=, and =~ with alternatives."""
    for matcher in matchers:
        name, operator, value = next((n, o, v.strip('"')) for o in ("=~", "!=", "=") for n, found, v in [matcher.partition(o)] if found)
        present = labels.get(name, "")
        if not {"=": present == value, "!=": present != value, "=~": present in value.split("|")}[operator]:
            return False
    return True


def inhibited(source: dict[str, str], target: dict[str, str]) -> bool:
    rules = yaml.safe_load(alertmanager_config())["inhibit_rules"]
    return any(
        matches(rule["source_matchers"], source)
        and matches(rule["target_matchers"], target)
        and all(source.get(name, "") == target.get(name, "") for name in rule.get("equal", []))
        for rule in rules
    )


@needs_amtool
@pytest.mark.slow
def test_amtool_accepts_it_and_routes_every_alert() -> None:
    check = subprocess.run(["amtool", "check-config", CONFIG], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    for severity in ("page", "ticket"):
        route = subprocess.run(["amtool", "config", "routes", "test", f"--config.file={CONFIG}", f"severity={severity}"], capture_output=True, text=True)
        assert (route.returncode, route.stdout.strip()) == (0, "local"), route.stderr


def test_nothing_leaves_the_machine_unless_somebody_says_where_to() -> None:
    for receiver in yaml.safe_load(alertmanager_config())["receivers"]:
        assert set(receiver) == {"name"}


def test_the_commented_webhook_is_valid_once_uncommented(tmp_path: Path) -> None:
    text = alertmanager_config().replace("    # ", "    ")
    assert [c["url"] for r in yaml.safe_load(text)["receivers"] for c in r["webhook_configs"]] == ["http://127.0.0.1:9099/alerts"]
    if shutil.which("amtool"):
        (tmp_path / "alertmanager.yml").write_text(text)
        subprocess.run(["amtool", "check-config", tmp_path / "alertmanager.yml"], check=True, capture_output=True)


def test_one_notification_for_each_alert_of_each_model() -> None:
    assert yaml.safe_load(alertmanager_config())["route"]["group_by"] == ["alertname", "model"]


def test_every_alert_says_what_it_is_about() -> None:
    for name, alert in alerts().items():
        assert alert["labels"]["about"] in ("samples", "monitor", "serving"), name
        assert alert["labels"]["severity"] in ("page", "ticket"), name


@pytest.mark.parametrize("name", sorted(alerts()))
def test_what_a_blind_monitor_silences(name: str) -> None:
    own = {"alertname": name, **alerts()[name]["labels"]}
    stale, absent = ({"alertname": a, **alerts()[a]["labels"]} for a in ("GanMonitorStale", "GanMonitorAbsent"))
    assert inhibited(absent, {**own, "model": "digits"}) == (name != "GanMonitorAbsent")
    assert inhibited({**stale, "model": "digits"}, {**own, "model": "digits"}) == (own["about"] == "samples")
    assert not inhibited({**stale, "model": "ring"}, {**own, "model": "digits"})
