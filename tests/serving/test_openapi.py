"""The document is true: whatever schemathesis makes of it, the server answers as it says."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.serving.test_client import server


@pytest.mark.slow
def test_schemathesis_finds_nothing(registry, tmp_path, monkeypatch):
    for module in ("openapi", "request"):
        monkeypatch.setattr(f"serving.{module}.MAX_STREAM", 100_000)  # it asks for the longest stream there is
    shutil.rmtree(registry.root / "digits")  # clothes has all that it has
    config = tmp_path / "schemathesis.toml"
    config.write_text(
        """
        [checks]
        # Whoever waits 5e-324 s is told, rightly, that it was not enough.
        not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]
        """
    )
    with server(registry) as (url, _):
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", f"{url}/openapi.json", "--checks", "all"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--generation-deterministic"]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
