import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_training.py"


@pytest.mark.slow
def test_rows_are_appended_and_not_run_again(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "bench_training", bench)
    spec.loader.exec_module(bench)
    for seeds in ((100,), (100, 101)):
        bench.main(bench.Bench(datasets=("ring",), methods=("default",), seeds=seeds, steps=50, out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"]) for r in rows] == [("perfect sampler", 0), ("default", 100), ("default", 101)]
    assert rows[0]["high_quality"] == pytest.approx(0.9889, abs=0.005) and rows[1]["seconds"] > 0
    assert len(list(tmp_path.glob("*.png"))) == 2 and "PacGAN4" in capsys.readouterr().out
