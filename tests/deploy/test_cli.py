"""The command line where nothing is up: registry commands work, mistakes are one line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest

from deploy.cli import COMMANDS, _LABEL, _await_action, doctor, inject, models, promote
from deploy.stack import RUN_VARIABLE, Ports, Run, Settings, StackError, begin, processes
from monitoring.acting import ACTED
from monitoring.incidents import Incidents
from tests.deploy.conftest import process, wait_for
from training.bundle import Bundle
from training.registry import Registry

ROOT = Path(__file__).resolve().parents[2]


def ganwatch(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GANWATCH_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-m", "deploy.cli", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("sample", "nothing is up"), ("scale 2", "nothing is up"), ("scale 0", "replicas is 0"), ("ack", "nothing is up"), ("promote v1", "there is no model yet"), ("rollback --model m", "unknown model|no earlier version"),
        ("inject nothing", "there is no model yet"), ("certify v1", "give --more N, to count so many samples besides, or --reference DATA"),
        ("certify v1 --more 5 --reference ring", "--reference makes a new one that begins at 0"), ("certify v1 --more 5 --force", "--force is for --reference"), ("certify v1 --reference ring", "there is no model yet"), ("certify v1 --reference ring --model m", "unknown model 'm'"),
        ("reference build ring --name ../x", "reference name is '../x'; use letters"), ("publish /nowhere", "no card.json"), ("publish", "name a bundle directory"),
        ("publish /nowhere --reference x.npz", "/nowhere is certified already; --reference, --latent and --skip-bad-files are for --onnx"),
        ("publish --onnx g.onnx", "--onnx takes --reference"), ("publish --onnx g.onnx --reference ring --latent gamma:2", "--latent is 'gamma:2'"), ("replay --bundle /nowhere --samples x.npy", "no card.json"),
        ("inject drop-mode", "invalid choice 'drop-mode'"), ("up --device gpu", "invalid choice 'gpu'"), ("promte v1", "promte"), ("grafana apply", "GRAFANA_TOKEN"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_words(tmp_path: Path, words: str, wanted: str) -> None:
    done = ganwatch(tmp_path, *words.split())
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert any(text in done.stdout + done.stderr for text in wanted.split("|")), done.stdout + done.stderr
    assert done.stdout == "" or "invalid" in done.stdout.lower() or "promte" in done.stdout


@pytest.mark.slow
def test_versions_are_handled_without_a_server(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    root = tmp_path / "registry"
    make_bundle(root=root)
    assert json.loads(ganwatch(tmp_path, "promote", "v1", "--json").stdout)["version"] == "v1"
    made = json.loads(ganwatch(tmp_path, "inject", "drop-modes", "--labels", "3,8", "--json").stdout)
    assert made == {"model": "grid", "version": "v2", "fault": "drop-modes 3,8", "injected_from": "v1"}
    listed = json.loads(ganwatch(tmp_path, "models", "--json").stdout)["grid"]
    assert listed["aliases"] == {"production": "v2"} and [v["version"] for v in listed["versions"]] == ["v1", "v2"]
    assert json.loads(ganwatch(tmp_path, "rollback", "--json").stdout)["version"] == "v1"
    assert json.loads(ganwatch(tmp_path, "status", "--json").stdout)["up"] is False


def test_a_version_whose_card_is_unreadable_does_not_hide_the_others(
    make_bundle: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(root=tmp_path)
    broken = make_bundle(root=tmp_path, version="v2")
    (broken.path / "card.json").write_text("{")
    models(tmp_path, as_json=True)
    good, bad = json.loads(capsys.readouterr().out)["grid"]["versions"]
    assert good["version"] == "v1" and good["created"] and bad["version"] == "v2" and "not JSON" in bad["error"]
    models(tmp_path)
    table = capsys.readouterr().out
    assert "v1" in table and "v2" in table


@pytest.mark.slow
def test_a_generator_from_elsewhere_is_certified_and_published(tmp_path: Path) -> None:
    code = onnx.helper.make_tensor_value_info("code", onnx.TensorProto.FLOAT, ["n", 2])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["n", 2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["code"], ["out"])], "normal", [code], [out])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), tmp_path / "cloud.onnx")
    np.save(tmp_path / "real.npy", np.random.default_rng(0).standard_normal((3000, 2)))
    done = ganwatch(tmp_path, "publish", "--onnx", str(tmp_path / "cloud.onnx"), "--reference", str(tmp_path / "real.npy"), "--latent", "normal:2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "cloud" and json.loads(done.stdout)["forced"] is None
    assert list((tmp_path / "adopted").iterdir()) == []
    before = Registry(tmp_path / "registry").open("cloud", "v1").certificate.count
    done = ganwatch(tmp_path, "certify", "v1", "--more", "3000", "--json")
    assert json.loads(done.stdout)["version"] == "v2" and json.loads(done.stdout)["samples"] == before + 3000, done.stderr


@pytest.mark.slow
def test_a_version_is_certified_against_other_data(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """Of the new data nothing lies where the generator gives samples: it is refused, and published by force."""
    old = make_bundle(root=tmp_path / "registry")
    np.save(tmp_path / "far.npy", 50 + np.random.default_rng(0).standard_normal((1000, 2)))
    built = ganwatch(tmp_path, "reference", "build", str(tmp_path / "far.npy"), "--name", "away", "--json")
    assert built.returncode == 0, built.stderr
    done = ganwatch(tmp_path, "certify", "v1", "--reference", "away")
    (left,) = (tmp_path / "recertified").iterdir()
    assert done.returncode == 2 and "samples are off the manifold of the real data" in done.stderr and "the reference is away v1" in done.stderr, done.stderr
    assert f"ganwatch publish {left.resolve()} --force --registry {tmp_path / 'registry'}" in done.stderr and "Traceback" not in done.stderr
    done = ganwatch(tmp_path, "certify", "v1", "--reference", "away", "--force", "--json")
    told, made = json.loads(done.stdout), Registry(tmp_path / "registry").open("grid", "v2")
    assert told["version"] == "v2" and "off the manifold" in told["forced"] and told["samples"] >= 160_000, done.stderr
    assert made.card.files["model.onnx"] == old.card.files["model.onnx"] and made.card.training["recertified"]["built"] == "away v1"
    assert list((tmp_path / "recertified").iterdir()) == [left]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(arl="moth"), "--arl is 'moth'; expected a number of samples"), (Settings(arl="month", test_rate=-1.0), "--test_rate is -1.0"),
        (Settings(replicas=0), "replicas is 0; it must be at least 1"), (Settings(Ports(http=80_000)), "--ports.http is 80000; it must lie between 0 and 65535"),
        (Settings(Ports(prometheus=-1)), "--ports.prometheus is -1"), (Settings(Ports(ingress=65_530)), "--ports.ingress is 65530; it must lie between 0 and 65485"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, words: str) -> None:
    monkeypatch.setenv("GANWATCH_HOME", str(tmp_path))
    with pytest.raises(StackError, match=words):
        begin(settings, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_not_published_where_nobody_could_act_on_it(make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANWATCH_HOME", str(tmp_path))
    make_bundle(root=tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    registry.set_alias("grid", "production", "v1", reason="test")
    with pytest.raises(StackError, match="nothing is up"):
        inject("nothing", act=True)
    assert registry.versions("grid") == ["v1"]


def test_another_registry_than_the_one_that_is_served_waits_for_nobody(
    make_bundle: Callable[..., Bundle], tmp_path: Path, free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GANWATCH_HOME", str(tmp_path))
    make_bundle(root=tmp_path / "other")
    http, monitor, prometheus = free_ports(3)
    run = Run("of a test", str(tmp_path), str(tmp_path / "served"), str(tmp_path / "temp"), 0.0, Settings(Ports(http=http, monitor=monitor, prometheus=prometheus)))
    (tmp_path / "run.json").write_text(json.dumps(asdict(run)))
    monkeypatch.setenv(RUN_VARIABLE, run.run_id)
    with process([sys.executable, "-c", "import signal; signal.pause()"], tmp_path / "log"):
        wait_for(lambda: processes(run), "process of the run")
        promote("v1", registry=tmp_path / "other", as_json=True)
        assert json.loads(capsys.readouterr().out)["version"] == "v1"
        with pytest.raises(StackError, match="nothing is up that serves"):
            inject("nothing", act=True, registry=tmp_path / "other")
        with pytest.raises(SystemExit):  # for nothing answers
            doctor(as_json=True)
    checks = {check["name"]: check["words"] for check in json.loads(capsys.readouterr().out)}
    assert checks["registry"].startswith(str(tmp_path / "served"))


@pytest.mark.slow
def test_act_waits_for_the_record_of_what_was_done(
    make_bundle: Callable[..., Bundle], tmp_path: Path, free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias changes first, the record follows: whoever looks in between has not seen the end of it. A real monitor, no Ray."""
    make_bundle(root=tmp_path / "registry")
    make_bundle(root=tmp_path / "registry", version="v2", lost=(3, 8))
    registry = Registry(tmp_path / "registry")
    for version, reason in (("v1", "test"), ("v2", "inject"), ("v1", ACTED + "v2 is mode_dropping 3 8")):
        registry.set_alias("grid", "production", version, reason=reason)
    (port,) = free_ports(1)
    run = Run("of a test", str(tmp_path), str(registry.root), str(tmp_path / "temp"), 0.0, Settings(ports=Ports(monitor=port)))
    (tmp_path / "run.json").write_text(json.dumps(asdict(run)))
    monkeypatch.setenv("GANWATCH_HOME", str(tmp_path))
    monitor = [sys.executable, "-m", "monitoring.service", f"--home={tmp_path}", f"--port={port}", "--probe-rate=0"]
    with process(monitor, tmp_path / "monitor.log"), ThreadPoolExecutor(1) as pool:
        wait_for(lambda: httpx.get(f"{run.monitor_url}/healthz", trust_env=False).status_code == 200, "monitor")
        incidents = Incidents(tmp_path / "incidents.db")
        incidents.record("grid", "v2", at=1.0, verdict="mode_dropping", words="3 and 8 are gone", modes=("3", "8"), evidence={}, first_alarm=99)
        waiting = pool.submit(_await_action, registry, "grid", "production", "v2")
        with pytest.raises(TimeoutError):
            waiting.result(1.0)
        incidents.act("grid", "v2", "production -> v1")
        assert waiting.result(60) == {"verdict": "mode_dropping", "modes": ["3", "8"], "first_alarm": 99, "action": "production -> v1"}
        incidents.close()
        registry.set_alias("grid", "production", "v2", reason="inject")
        registry.set_alias("grid", "production", "v1", reason="rollback")
        make_bundle(root=tmp_path / "registry", version="v3", lost=(3, 8))
        with pytest.raises(StackError, match=r"changed to v1 \(rollback\) before the monitor acted"):
            _await_action(registry, "grid", "production", "v3")


@pytest.mark.parametrize(
    ("text", "labels"),
    [("3,8", ["3", "8"]), (" 3 , 8", ["3", "8"]), ("(0.71, -0.71),(1.00, 0.00)", ["(0.71, -0.71)", "(1.00, 0.00)"]), ("Ankle boot, Bag", ["Ankle boot", "Bag"]), ("", [])],
)
def test_labels_are_split_at_commas_outside_parentheses(text: str, labels: list[str]) -> None:
    assert _LABEL.findall(text) == labels


def test_every_command_teaches() -> None:
    assert set(COMMANDS) == {
        "up", "down", "status", "scale", "demo", "publish", "certify", "reference", "promote", "rollback", "models", "sample", "inject", "replay", "ack", "grafana", "doctor",
    }  # fmt: skip
    assert all(command.__doc__ for command in COMMANDS.values())
