"""`ganwatch reference build`, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def reference(home: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GANWATCH_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "deploy.cli", "reference", "build", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_reference_is_built_from_a_file_and_built_again(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4000, 4)).astype(np.float32)
    np.save(tmp_path / "points.npy", x)
    first = json.loads((done := reference(tmp_path, tmp_path / "points.npy", "--json")).stdout)
    assert first["rows"] == 4000 and first["changes"] is None and first["path"] == str(tmp_path / "references/points/v1"), done.stderr
    x[:, 2] += 1
    np.save(tmp_path / "points.npy", x[:3000])
    done = reference(tmp_path, tmp_path / "points.npy")
    assert done.returncode == 0 and "since v1: 4,000 rows then, 3,000 now" in done.stdout and "features moved" in done.stdout, done.stderr
    assert json.loads((tmp_path / "references/points/v2/reference.json").read_text())["changes"]["features"]["moved"]


@pytest.mark.slow
def test_what_cannot_be_built_is_said(tmp_path: Path) -> None:
    done = reference(tmp_path, "/nowhere")
    assert done.returncode == 2 and "data is /nowhere, neither a path that exists nor built in" in done.stderr and "Traceback" not in done.stderr
