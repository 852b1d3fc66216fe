"""Training runs as the monitor follows them: what their files say is what is shown, whatever a file holds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from monitoring.incidents import Incidents
from monitoring.metrics import TRAINING, Exporter
from monitoring.runs import NEWEST, SILENCE, STATES, Runs
from monitoring.watch import Watch
from training.config import Config
from training.data import DATASETS
from training.journal import Journal
from training.registry import Registry
from training.train import adversarial_training

LOOK = {"steps": 100, "seconds_left": 30.0, "alarms": {}, "failing": [], "divergence": 0.2, "accuracy": 0.7, "mode_coverage": 1.0}
CRITIC = {"alarms": {"perfect_critic": "the critic tells 99 % of pairs apart; --penalty r1r2"}, "failing": ["perfect_critic"]}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "20261125T000000-digits-0a1b2c")
    journal.write("begin", model="digits", dataset="digits", steps=100)
    return journal


def told(journal: Journal) -> float:
    """When its last line was written."""
    return json.loads(journal.path.read_text().splitlines()[-1])["at"]


def test_a_run_from_its_first_line_to_its_version(tmp_path: Path, journal: Journal) -> None:
    runs = Runs(tmp_path)
    runs.look(told(journal))
    (run,) = runs.shown
    assert run["state"] == "running" and run["model"] == "digits" and run["progress"] == 0 and run["seconds_left"] is None
    journal.write("train", step=40, **LOOK)
    journal.write("train", step=60, **LOOK | CRITIC)
    runs.look(told(journal) + 10)
    (run,) = runs.shown
    assert (run["step"], run["progress"], run["seconds_left"]) == (60, 0.6, pytest.approx(20))
    assert run["alarms"] == CRITIC["alarms"] and run["fatal"] == {"perfect_critic": True}
    assert run["history"] == {"step": [40, 60], "divergence": [0.2] * 2, "accuracy": [0.7] * 2, "mode_coverage": [1.0] * 2}
    journal.write("publish", seconds=1.0, version="v3", forced=None)
    runs.look(told(journal) + 1e6)
    assert runs.shown[0]["state"] == "published" and runs.shown[0]["version"] == "v3"


def test_a_run_that_ended_badly_shows_its_reason(tmp_path: Path, journal: Journal) -> None:
    runs = Runs(tmp_path)
    journal.write("failed", reason="the weights are no longer finite at step 60 of 100")
    runs.look(told(journal))
    assert (runs.shown[0]["state"], runs.shown[0]["reason"]) == ("failed", "the weights are no longer finite at step 60 of 100")
    journal.write("begin", model="digits", dataset="digits", steps=100)  # resumed
    runs.look(told(journal))
    assert (runs.shown[0]["state"], runs.shown[0]["reason"]) == ("running", None)
    journal.write("interrupted")
    runs.look(told(journal))
    assert (runs.shown[0]["state"], runs.shown[0]["reason"]) == ("interrupted", None)


def test_a_run_that_says_nothing_for_long_is_silent(tmp_path: Path, journal: Journal) -> None:
    runs = Runs(tmp_path)
    journal.write("train", step=1, **LOOK)
    for wait, state in ((SILENCE - 5, "running"), (SILENCE + 5, "silent")):
        runs.look(told(journal) + wait)
        assert runs.shown[0]["state"] == state


def test_steps_that_were_lost_with_a_worker_are_drawn_once(tmp_path: Path, journal: Journal) -> None:
    runs = Runs(tmp_path)
    for step in (10, 20, 30, 20, 30, 40):
        journal.write("train", step=step, **LOOK)
    runs.look(told(journal))
    assert runs.shown[0]["history"]["step"] == [10, 20, 30, 40]


def test_half_a_line_waits_for_its_other_half(tmp_path: Path, journal: Journal) -> None:
    runs = Runs(tmp_path)
    line = json.dumps({"at": told(journal), "stage": "train", "step": 10, **LOOK}) + "\n"
    for half, step in ((line[:20], 0), (line[20:], 10)):
        with open(journal.path, "a") as file:
            file.write(half)
        runs.look(told(journal) if step else 0.0)
        assert runs.shown[0]["step"] == step and runs.trouble == {}


@given(st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=3).map(lambda v: json.dumps(v).encode())))
def test_a_file_of_somebody_else_is_named_and_harms_no_other_run(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    directory = tmp_path_factory.mktemp("runs")
    good = Journal(directory / "good")
    good.write("train", step=1, **LOOK)
    (directory / "bad").mkdir()
    (directory / "bad" / "status.jsonl").write_bytes(junk + b"\n")
    runs = Runs(directory)
    runs.look(told(good))
    assert [run["run"] for run in runs.shown] == ["good"]
    assert list(runs.trouble) == ["bad"] and "cannot be followed" in runs.trouble["bad"]


def test_only_the_newest_runs_are_followed(tmp_path: Path) -> None:
    for k in range(NEWEST + 3):
        journal = Journal(tmp_path / f"run-{k:02}")
        journal.write("begin", model="m", dataset="ring", steps=1)
        os.utime(journal.path, (1e9 + k, 1e9 + k))
    runs = Runs(tmp_path)
    runs.look(told(journal))
    assert [run["run"] for run in runs.shown] == [f"run-{k:02}" for k in range(NEWEST + 2, 2, -1)]


def test_prometheus_reads_the_figures_of_runs_under_way_and_the_fate_of_all(tmp_path: Path, journal: Journal) -> None:
    journal.write("train", step=60, gradient_norm=None, **LOOK | CRITIC)
    over = Journal(tmp_path / "over")
    over.write("begin", model="ring", dataset="ring", steps=50)
    over.write("train", step=50, **LOOK | {"steps": 50})
    over.write("failed", reason="mode 3 is dropped")
    runs = Runs(tmp_path)
    runs.look(told(over))
    incidents = Incidents(tmp_path / "incidents.db")
    view = Watch(Registry(tmp_path / "registry"), incidents, arl=1e4).publish(told(over))
    body, _ = Exporter(lambda: (view, {}, {}), lambda: runs.shown).render("")
    incidents.close()
    samples = [s for family in text_string_to_metric_families(body.decode()) for s in family.samples if s.name.startswith("ganwatch_training_")]
    ours = {"model": "digits", "run": journal.path.parent.name}
    found = {(s.name, *(s.labels[k] for k in sorted(s.labels.keys() - {"model", "run"}))): s.value for s in samples if s.labels.items() >= ours.items()}
    assert found["ganwatch_training_divergence",] == 0.2 and found["ganwatch_training_critic_accuracy_ratio",] == 0.7
    assert found["ganwatch_training_progress_ratio",] == 0.6
    assert found["ganwatch_training_alarm_active", "perfect_critic", "true"] == 1
    assert ("ganwatch_training_generator_gradient_norm",) not in found  # not finite
    assert {state: found["ganwatch_training_state", state] for state in STATES} == dict.fromkeys(STATES, 0) | {"running": 1}
    fate = {s.name: s for s in samples if s.labels["run"] == "over" and s.value == 1}
    assert fate["ganwatch_training_state"].labels["state"] == "failed" and fate.keys() == {"ganwatch_training_state", "ganwatch_training_progress_ratio"}


def test_every_figure_of_a_look_has_a_series():
    said = []
    adversarial_training(Config(dataset="ring", steps=1), DATASETS["ring"](), say=lambda *, step, steps, alarms, failing, **figures: said.append(figures))
    assert set(TRAINING) == set(said[0])
    assert len({name for name, _ in TRAINING.values()}) == len(TRAINING)
