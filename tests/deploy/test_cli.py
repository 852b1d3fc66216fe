"""The command line where nothing is up: registry commands work, mistakes are one line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.cli import COMMANDS, _LABEL
from training.bundle import Bundle
from training.registry import Registry

ROOT = Path(__file__).resolve().parents[2]


def ganwatch(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GANWATCH_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-m", "deploy.cli", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("sample", "nothing is up"), ("ack", "nothing is up"), ("promote v1", "there is no model yet"), ("rollback --model m", "unknown model|no earlier version"),
        ("inject nothing", "there is no model yet"), ("publish /nowhere", "no card.json"), ("publish", "name a bundle directory"),
        ("publish --onnx g.onnx", "--onnx takes --reference"), ("publish --onnx g.onnx --reference ring --latent uniform:2", "--latent is uniform:2"), ("replay --bundle /nowhere --samples x.npy", "no card.json"),
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
    before = Registry(tmp_path / "registry").open("cloud", "v1").certificate.count
    done = ganwatch(tmp_path, "certify", "v1", "--more", "3000", "--json")
    assert json.loads(done.stdout)["version"] == "v2" and json.loads(done.stdout)["samples"] == before + 3000, done.stderr


@pytest.mark.parametrize(
    ("text", "labels"),
    [("3,8", ["3", "8"]), (" 3 , 8", ["3", "8"]), ("(0.71, -0.71),(1.00, 0.00)", ["(0.71, -0.71)", "(1.00, 0.00)"]), ("Ankle boot, Bag", ["Ankle boot", "Bag"]), ("", [])],
)
def test_labels_are_split_at_commas_outside_parentheses(text: str, labels: list[str]) -> None:
    assert _LABEL.findall(text) == labels


def test_every_command_teaches() -> None:
    assert set(COMMANDS) == {
        "up", "down", "status", "demo", "publish", "certify", "reference", "promote", "rollback", "models", "sample", "inject", "replay", "ack", "grafana", "doctor",
    }  # fmt: skip
    assert all(command.__doc__ for command in COMMANDS.values())
