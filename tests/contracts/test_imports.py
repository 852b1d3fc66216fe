"""Imports follow the data and never point back; serving and monitoring work where torch and Ray are not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = {"training": {"training.bundle", "training.drops", "training.moments", "training.registry"}, "serving": {"serving.records"}}
# package -> what it may import of the other packages
ALLOWED = {
    "training": set(),
    "serving": CONTRACTS["training"],
    "monitoring": CONTRACTS["training"] | CONTRACTS["serving"],
}


def modules(package: str) -> list[str]:
    return sorted(f"{package}.{path.stem}" for path in (ROOT / package).glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_follow_the_data(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name and name.split(".")[0] in {"training", "serving", "monitoring", "deploy"} - {package}:
                    assert name in ALLOWED[package], f"{path.name} imports {name}"


def imported_with_blocked(module: str, blocked: list[str]) -> subprocess.CompletedProcess[str]:
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Absent())
import {module}
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


WITHOUT_TORCH = [m for p in ("serving", "monitoring") for m in modules(p)] + sorted(CONTRACTS["training"])
NEEDS_RAY = {"serving.deployment"}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_serving_and_monitoring_never_load_torch(module: str) -> None:
    blocked = ["torch"] if module in NEEDS_RAY else ["torch", "ray"]
    if module != "monitoring.metrics" and module != "monitoring.service":
        blocked.append("prometheus_client")
    if module in NEEDS_RAY:
        blocked.remove("prometheus_client")  # Ray brings it along
    result = imported_with_blocked(module, blocked)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", modules("deploy"))
def test_the_command_line_starts_without_torch_and_ray(module: str) -> None:
    result = imported_with_blocked(module, ["torch", "ray"])
    assert result.returncode == 0, result.stderr
