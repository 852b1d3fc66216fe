import importlib.util
import json
import sys
from pathlib import Path

import pytest

from training.config import Config, check
from training.objectives import OBJECTIVES

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_training.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_training", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_rows_are_appended_and_not_run_again(tmp_path, capsys, bench):
    for seeds in ((100,), (100, 101)):
        bench.main(bench.Bench(datasets=("ring",), methods=("default",), seeds=seeds, steps=50, out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"]) for r in rows] == [("perfect sampler", 0), ("default", 100), ("default", 101)]
    assert rows[0]["high_quality"] == pytest.approx(0.9889, abs=0.005) and rows[1]["seconds"] > 0
    assert len(list(tmp_path.glob("*.png"))) == 2 and "PacGAN4" in capsys.readouterr().out
    assert (tmp_path / "ring.svg").read_text().count("perfect sampler") == 1


def test_every_objective_and_way_to_hold_the_critic_is_compared(bench):
    configs = [Config(dataset="ring", **how) for how in bench.METHODS.values()]
    for config in configs:
        check(config)
    assert {config.objective for config in configs} == set(OBJECTIVES) and {config.penalty for config in configs} >= {"r1r2", "gradient", "none"}
    assert all(any(getattr(config, part) for config in configs) for part in ("clip", "spectral_norm", "unroll"))


def test_a_row_is_judged_by_the_aims_of_its_data_set(bench):
    good = {"method": "default", "modes": 8, "high_quality": 0.985, "reverse_kl": 0.0, "spread": 0.97, "cpu_seconds": 20.0}
    assert bench.judged("ring", good) == "all hit"
    assert bench.judged("ring", good | {"spread": 0.7, "reverse_kl": float("nan")}) == "miss: reverse_kl, spread"
    assert bench.judged("ring", {"method": "default"}).startswith("miss: modes")  # training was stopped
    assert bench.judged("ring", good | {"method": "perfect sampler"}) == bench.judged("nothing", good) == ""


def test_a_method_has_one_row_over_its_seeds(bench):
    assert bench.over_seeds([0.97, float("nan"), 0.99, None]) == "0.97 to 0.99" and bench.over_seeds([8, 8]) == "8"
    assert bench.over_seeds([None, float("nan")]) == "-"  # training was stopped, or nothing was good
    assert bench.over_seeds([["off_manifold: far"], None, ["off_manifold: near", "mode_dropping: 2"]]) == "off_manifold 2; mode_dropping 1"


@pytest.mark.slow
def test_steps_are_timed_beside_a_plain_loop_and_with_a_second_worker(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # where the workers find it, too
    import bench_steps

    monkeypatch.setattr(bench_steps, "GAMES", {"dcgan": Config(dataset="mnist", network="dcgan", width=8)})
    bench_steps.main(bench_steps.Bench(rounds=1, out=tmp_path))
    found = json.loads((tmp_path / "steps.json").read_text())["dcgan"]
    assert found["by plain loop"] == pytest.approx(found["ms a step"] / found["ms of the plain loop"]) and found["ms a step"] > 0
    assert 0 < found["diagnostics"] < 1 and found["two workers"] > 0 and "by plain loop" in capsys.readouterr().out
