"""The record of alarms: one open incident a version, nothing lost, readable by the next process."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitoring.incidents import Incidents

ALARM = {"verdict": "drift", "words": "Something changed.", "modes": (), "evidence": {"tails": 9.9}, "first_alarm": 41}


def test_an_alarm_is_opened_once_and_sharpened_in_place(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.db")
    assert incidents.record("digits", "v2", at=10.0, **ALARM)
    sharper = {**ALARM, "verdict": "mode_dropping", "modes": ("3", "8"), "first_alarm": 77}
    assert not incidents.record("digits", "v2", at=11.0, **sharper)
    (only,) = incidents.newest()
    assert (only["verdict"], only["modes"], only["evidence"]) == ("mode_dropping", ["3", "8"], {"tails": 9.9})
    assert (only["opened_at"], only["first_alarm"], only["closed_at"]) == (10.0, 41, None)  # when it began does not change


def test_what_was_done_stays_while_the_evidence_changes(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.db")
    incidents.record("digits", "v2", at=10.0, **ALARM)
    incidents.act("digits", "v2", "production -> v1")
    incidents.record("digits", "v2", at=11.0, **{**ALARM, "evidence": {"modes": 12.0}})
    assert incidents.newest()[0]["evidence"] == {"modes": 12.0, "action": "production -> v1"}


def test_acknowledging_closes_the_open_incidents_of_one_model(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.db")
    for model in ("digits", "ring"):
        incidents.record(model, "v1", at=10.0, **ALARM)
    (closed,) = incidents.acknowledge("digits", ["v1"], at=20.0)
    assert (closed["model"], closed["acknowledged_at"], closed["closed_at"], closed["closed_by"]) == (
        "digits",
        20.0,
        20.0,
        "acknowledged",
    )
    assert incidents.acknowledge("digits", ["v1"], at=21.0) == []
    assert incidents.record("digits", "v1", at=30.0, **ALARM)  # the next alarm is a new incident
    assert [(i["model"], i["closed_at"]) for i in incidents.newest()] == [("digits", None), ("ring", None), ("digits", 20.0)]


def test_acknowledging_settles_what_a_change_of_version_had_closed(tmp_path: Path) -> None:
    """A false alarm of a canary, which was taken away at once, must not speak against the version for ever."""
    incidents = Incidents(tmp_path / "incidents.db")
    for version in ("v1", "v2"):
        incidents.record("digits", version, at=10.0, **ALARM)
    incidents.keep("digits", [], at=20.0)
    assert incidents.unsettled("digits") == {"v1", "v2"}
    (settled,) = incidents.acknowledge("digits", ["v2"], at=30.0)
    assert (settled["acknowledged_at"], settled["closed_at"], settled["closed_by"]) == (30.0, 20.0, "version change")
    assert incidents.unsettled("digits") == {"v1"} and incidents.acknowledge("digits", ["v2"], at=40.0) == []


def test_a_version_change_closes_what_is_no_longer_served(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.db")
    for version in ("v1", "v2"):
        incidents.record("digits", version, at=10.0, **ALARM)
    incidents.keep("digits", ["v1"], at=20.0)
    assert {i["version"]: i["closed_by"] for i in incidents.newest()} == {"v1": None, "v2": "version change"}
    incidents.keep("digits", [], at=30.0)
    assert [i["closed_at"] for i in incidents.newest()] == [20.0, 30.0]


def test_what_was_recorded_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = Incidents(tmp_path / "incidents.db")
    writer.record("digits", "v1", at=10.0, **ALARM)
    assert Incidents(tmp_path / "incidents.db").newest() == writer.newest()  # a second process, the first one still running


def test_a_file_that_cannot_be_had_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "incidents.db").mkdir()
    with pytest.raises(OSError, match=r"incidents.db: unable to open database file; make it accessible"):
        Incidents(tmp_path / "incidents.db")


def test_newest_is_bounded(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.db")
    for i in range(5):
        incidents.record("digits", f"v{i}", at=float(i), **ALARM)
    assert [i["version"] for i in incidents.newest(limit=2)] == ["v4", "v3"]
