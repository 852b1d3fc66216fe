import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.config import Config, check
from training.data import DATASETS
from training.objectives import OBJECTIVES
from training.recipes import RECIPES

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


@pytest.mark.slow
def test_rows_of_a_recipe_that_has_changed_are_neither_shown_nor_taken_for_done(tmp_path, capsys, monkeypatch, bench):
    wish = bench.Bench(datasets=("ring",), methods=("default",), seeds=(100,), steps=50, out=tmp_path)
    bench.main(wish)
    assert "have changed since" not in capsys.readouterr().out
    monkeypatch.setitem(RECIPES, "ring", replace(RECIPES["ring"], width=16))
    bench.main(wish)
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [(r["method"], r["recipe"]["width"]) for r in rows] == [("perfect sampler", 128), ("default", 128), ("default", 16)]
    said = capsys.readouterr().out
    assert "left out 1 of 2 rows in" in said and [line.split("│")[2].strip() for line in said.splitlines() if "default, 50 steps" in line] == ["1"]


@pytest.mark.slow
def test_a_row_says_how_early_an_alarm_was_up(tmp_path, bench):
    dataset = DATASETS["ring"]()
    torch.set_num_threads(1)
    found = bench.row(dataset, Config(dataset="ring", steps=1500, penalty="none"), tmp_path / "ring")
    assert found["alarms"] and found["first_alarms"].keys() >= {words.split(":")[0] for words in found["alarms"]}
    assert 0.05 <= min(found["first_alarms"].values()) < 0.5 and max(found["first_alarms"].values()) <= 1
    assert "perfect_critic" in found["first_alarms"]


def test_data_that_are_not_there_are_left_out_and_the_others_are_shown(tmp_path, capsys, bench):
    bench.main(bench.Bench(datasets=("mnist", "ring"), methods=(), data=str(tmp_path / "none"), out=tmp_path))
    said = capsys.readouterr().out
    assert "mnist is left out: " in said and "--data PATH" in said and "perfect sampler" in said


def test_without_a_wish_every_data_set_with_aims_is_run(bench):
    assert set(bench.Bench().datasets) == set(bench.AIMS) and {name: bench.SEEDS[name] for name in bench.AIMS} == {
        **dict.fromkeys(bench.AIMS, 5), "stacked-digits": 2, "mnist": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("how", "rounds"), [("BENCH=--quick", " --rounds 1"), ("BENCH=--seeds 100", "")])
def test_a_quick_bench_times_steps_once(how, rounds):
    command = ["make", "-n", "-o", ".venv/.ready", "bench-training", how]
    lines = subprocess.run(command, cwd=SCRIPT.parents[2], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition("bench_steps.py")[2].rstrip() for line in lines if "bench_steps" in line] == [rounds]


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
    assert bench.over_seeds([{"off_manifold": 0.65}, None, {}, {"off_manifold": 0.6, "mode_dropping": 0.1}]) == "off_manifold 0.6 to 0.65; mode_dropping 0.1"
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
