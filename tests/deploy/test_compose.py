"""deploy/compose.yaml: the shape that the Compose specification asks for, loopback only, every mounted path there."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PORTS = {"prometheus": 9090, "alertmanager": 9093, "grafana": 3000}

# The part of the Compose specification's schema that the file uses; any key beyond it is an error.
TEXTS = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "network_mode", "volumes"],
    "properties": {
        "image": {"type": "string", "pattern": r"^[a-z0-9./-]+:v?\d+\.\d+\.\d+$"},
        "network_mode": {"type": "string"},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "command": {"type": "array", "items": {"type": "string"}},
        "depends_on": TEXTS,
        "environment": {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
        "volumes": TEXTS,
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "services": {"type": "object", "patternProperties": {"^[a-zA-Z0-9._-]+$": SERVICE}, "additionalProperties": False},
        "volumes": {"type": "object", "additionalProperties": {"type": ["object", "null"]}},
    },
}


def mounts(service: str) -> dict[str, tuple[str, str]]:
    """Target -> (source, mode)."""
    found = [volume.split(":") for volume in COMPOSE["services"][service]["volumes"]]
    return {target: (source, mode[0] if mode else "rw") for source, target, *mode in found}


def test_it_has_the_shape_of_a_compose_file() -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(COMPOSE)
    assert set(COMPOSE["services"]) == set(PORTS)


@pytest.mark.parametrize("service", sorted(PORTS))
def test_every_mounted_path_exists_and_every_volume_is_declared(service: str) -> None:
    for source, mode in mounts(service).values():
        if source.startswith("."):
            assert (DEPLOY / source).is_dir(), source
            assert mode == "ro"
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("service", sorted(PORTS))
def test_everything_listens_on_loopback_only(service: str) -> None:
    wanted = COMPOSE["services"][service]
    assert wanted["network_mode"] == "host"
    if service == "grafana":
        environment = wanted["environment"]
        assert (environment["GF_SERVER_HTTP_ADDR"], environment["GF_SERVER_HTTP_PORT"]) == ("127.0.0.1", str(PORTS[service]))
    else:
        assert f"--web.listen-address=127.0.0.1:{PORTS[service]}" in wanted["command"]
    if service == "alertmanager":
        assert "--cluster.listen-address=" in wanted["command"]


@pytest.mark.parametrize("service", ["prometheus", "alertmanager"])
def test_the_configuration_named_on_the_command_line_is_mounted(service: str) -> None:
    (config,) = (Path(flag.partition("=")[2]) for flag in COMPOSE["services"][service]["command"] if "--config.file=" in flag)
    source, _ = mounts(service)[str(config.parent)]
    assert (DEPLOY / source / config.name).is_file()


def test_every_variable_of_the_provisioning_files_is_set() -> None:
    files = (DEPLOY / "grafana" / "provisioning").rglob("*.yaml")
    values = [value for file in files for value in strings(yaml.safe_load(file.read_text())) if "{{" not in value]
    used = {name for value in values for name in re.findall(r"\$\{?(\w+)", value)}
    environment = COMPOSE["services"]["grafana"]["environment"]
    assert used == {"GANWATCH_PROMETHEUS_URL", "GANWATCH_DASHBOARDS"}
    assert used <= set(environment)
    assert environment["GANWATCH_PROMETHEUS_URL"] == f"http://127.0.0.1:{PORTS['prometheus']}"
    source, _ = mounts("grafana")[environment["GANWATCH_DASHBOARDS"]]
    assert (DEPLOY / source / "ganwatch.json").is_file()


def test_no_password_is_written_down() -> None:
    assert COMPOSE["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []
