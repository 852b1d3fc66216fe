"""A short confusion table over the tiny generator; the long one is `make bench-monitoring`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.benchmarks import bench_diagnosis as bench
from training.registry import Registry

_bundles = importlib.util.spec_from_file_location("tiny_bundles", Path(__file__).parents[1] / "monitoring" / "conftest.py")
_module = importlib.util.module_from_spec(_bundles)
_bundles.loader.exec_module(_module)
make_bundle = _module.make_bundle

pytestmark = pytest.mark.slow


def test_a_short_confusion_table_and_its_resumption(make_bundle, tmp_path):
    make_bundle(root=tmp_path / "registry")
    make_bundle(root=tmp_path / "registry", version="v2", honest=True, width=1.03)  # seen by golden rows only
    names = ("one mode drops", "5 % noise", "collapse within modes", "variance x 0.8", "repeating latents")
    names += ("one mode swells", "another checkpoint", "demand shift", "clients repeat seeds", "nothing")
    said: list[str] = []
    table = bench.play(Registry(tmp_path / "registry"), "grid", "v1", names, 2, tmp_path / "out", said.append)
    assert {row["scenario"]: row["right"] for row in table} == dict.fromkeys(names, 1.0), said
    assert all((row["median_delay"] is None) == (bench.SCENARIOS[row["scenario"]].right == ("healthy",)) for row in table)
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.jsonl")}
    again = bench.play(Registry(tmp_path / "registry"), "grid", "v1", names, 2, tmp_path / "out", said.append)
    assert again == table and {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.jsonl")} == times
    assert Registry(tmp_path / "registry").versions("grid") == ["v1", "v2"]  # faults go into the copy


def test_clients_who_ask_for_one_class_shift_the_demand_and_raise_no_alarm(make_bundle, tmp_path):
    make_bundle(root=tmp_path / "registry", conditional=True)
    names = ("demand shift", "clients repeat seeds")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grid.demand_shift.jsonl").write_text('{"run": 0, "verdict": "healthy", "delay": null, "right": true}\n')  # of before records were fed
    demand, repeats = bench.play(Registry(tmp_path / "registry"), "grid", "v1", names, 2, tmp_path / "out", lambda line: None)
    assert (demand["right"], demand["verdicts"]) == (1.0, {"demand_shift": 2})
    assert (repeats["right"], repeats["verdicts"]) == (1.0, {"healthy": 2})


def test_what_cannot_be_injected_is_said_and_left_out(make_bundle, tmp_path):
    make_bundle(root=tmp_path / "registry")
    said: list[str] = []
    assert bench.play(Registry(tmp_path / "registry"), "grid", "v1", ("another checkpoint",), 1, tmp_path / "out", said.append) == []
    assert said == ["| grid | another checkpoint | not run: grid has no other version with such latents; train another one, with another --seed | | |"]
