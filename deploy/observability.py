"""The committed Prometheus and Alertmanager configurations, with the ports of this run put in. It starts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RULES = HERE / "prometheus" / "rules.yml"


def prometheus_config(*, monitor_port: int = 9464, alertmanager_port: int | None = 9093, scrape_interval: str = "5s") -> str:
    """deploy/prometheus/prometheus.yml as YAML that may lie anywhere: rule files are absolute, targets are on 127.0.0.1.

    Without an Alertmanager (None) alerts show in Prometheus only. Raises ValueError for a port outside 1 .. 65535.
    """
    for name, port in (("monitor_port", monitor_port), ("alertmanager_port", alertmanager_port)):
        if port is not None and not 0 < port < 65536:
            raise ValueError(f"{name} is {port}; a port lies in 1 .. 65535")
    config: dict[str, Any] = yaml.safe_load((HERE / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval}
    config["rule_files"] = [str(HERE / "prometheus" / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{monitor_port}"]}]
    if alertmanager_port is None:
        del config["alerting"]
    else:
        config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{alertmanager_port}"]}]
    return yaml.safe_dump(config, sort_keys=False)


def alertmanager_config() -> str:
    """deploy/alertmanager/alertmanager.yml as it stands: it names no port."""
    return (HERE / "alertmanager" / "alertmanager.yml").read_text()


__all__ = ["RULES", "alertmanager_config", "prometheus_config"]
