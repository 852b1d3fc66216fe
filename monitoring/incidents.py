"""The record of every alarm, with the evidence it was raised on: one SQLite file that outlives the monitor.

At most one incident of a (model, version) is open. It opens when the alarm is crossed, follows the verdict while that
sharpens, and closes when somebody acknowledges it or the version is no longer served. It does not know what a verdict means.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

_TABLE = """
CREATE TABLE IF NOT EXISTS incident (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    verdict TEXT NOT NULL,
    words TEXT NOT NULL,
    modes TEXT NOT NULL,          -- JSON list of names
    evidence TEXT NOT NULL,       -- JSON object
    first_alarm INTEGER NOT NULL, -- 0-based index among the fresh monitored samples of the version
    opened_at REAL NOT NULL,      -- Unix seconds, as all times here
    acknowledged_at REAL,
    closed_at REAL,
    closed_by TEXT                -- acknowledged | version change
);
CREATE UNIQUE INDEX IF NOT EXISTS one_open ON incident (model, version) WHERE closed_at IS NULL;
"""


class Incidents:
    """The incidents in the SQLite file at `path`. May be used from several threads.

    refused: words on a file that is damaged, which was put aside so that a new record begins; None where there was none. Raises
    OSError where the file cannot be had.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self.refused: str | None = None
        try:
            self._database = _open(path)
        except (sqlite3.DatabaseError, ValueError) as error:
            aside = path.with_name(f"{path.name}.{time.time_ns()}.damaged")
            for part in ("", "-wal", "-shm"):  # what was written last may lie in the second, which must not be taken for the new file's
                if (old := Path(f"{path}{part}")).exists():
                    old.rename(f"{aside}{part}")
            self.refused = f"the record of alarms begins anew, the one before is damaged ({error}) and lies at {aside}"
            self._database = _open(path)

    def record(
        self,
        model: str,
        version: str,
        *,
        at: float,
        verdict: str,
        words: str,
        modes: Collection[str],
        evidence: dict[str, Any],
        first_alarm: int,
    ) -> bool:
        """Open an incident of this version, or bring the open one up to date. Returns whether it was opened now.

        What was done about it stays with it, whatever the evidence becomes.
        """
        values = (verdict, words, json.dumps(list(modes)), json.dumps(evidence, allow_nan=False))
        with self._lock:
            updated = self._database.execute(
                "UPDATE incident SET verdict = ?, words = ?, modes = ?, evidence = iif(json_extract(evidence, '$.action') IS NULL,"
                " ?, json_set(?, '$.action', json_extract(evidence, '$.action'))) WHERE model = ? AND version = ? AND closed_at IS NULL",
                (*values, values[-1], model, version),
            ).rowcount
            if not updated:
                self._database.execute(
                    "INSERT INTO incident (verdict, words, modes, evidence, model, version, first_alarm, opened_at)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (*values, model, version, first_alarm, at),
                )
        return not updated

    def act(self, model: str, version: str, action: str) -> None:
        """Keep with the open incident of this version what was done about it."""
        with self._lock:
            self._database.execute(
                "UPDATE incident SET evidence = json_set(evidence, '$.action', ?) WHERE model = ? AND version = ? AND closed_at IS NULL",
                (action, model, version),
            )

    def unsettled(self, model: str) -> set[str]:
        """Versions with an incident that nobody has acknowledged, whether or not they are still served."""
        with self._lock:
            rows = self._database.execute("SELECT DISTINCT version FROM incident WHERE model = ? AND acknowledged_at IS NULL", (model,)).fetchall()
        return {row["version"] for row in rows}

    def acknowledge(self, model: str, versions: Collection[str], *, at: float) -> list[dict[str, Any]]:
        """Settle what nobody has acknowledged of these versions, because somebody has seen it: what is open closes, what a change of
        version had closed is held against the version no longer. Returns these incidents."""
        marks = ", ".join("?" * len(versions))
        with self._lock:
            rows = self._database.execute(
                "UPDATE incident SET acknowledged_at = ?, closed_at = ifnull(closed_at, ?), closed_by = ifnull(closed_by, 'acknowledged')"
                f" WHERE model = ? AND acknowledged_at IS NULL AND version IN ({marks}) RETURNING *",
                (at, at, model, *versions),
            ).fetchall()
        return [_plain(row) for row in rows]

    def keep(self, model: str, versions: Collection[str], *, at: float) -> None:
        """Close the open incidents of a model's versions that are not among `versions`: they are served no longer."""
        marks = ", ".join("?" * len(versions))
        with self._lock:
            self._database.execute(
                "UPDATE incident SET closed_at = ?, closed_by = 'version change'"
                f" WHERE model = ? AND closed_at IS NULL AND version NOT IN ({marks})",
                (at, model, *versions),
            )

    def left(self, model: str, version: str) -> float | None:
        """When the newest incident of this version was opened, where a change of version has closed it since."""
        with self._lock:
            newest = self._database.execute("SELECT opened_at, closed_by FROM incident WHERE model = ? AND version = ? ORDER BY id DESC LIMIT 1", (model, version)).fetchone()
        return newest["opened_at"] if newest is not None and newest["closed_by"] == "version change" else None

    def newest(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest incidents, newest first."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM incident ORDER BY id DESC LIMIT ?", (limit,)).fetchall()
        return [_plain(row) for row in rows]

    def close(self) -> None:
        self._database.close()


def _open(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError where the file is damaged, OSError where it cannot be had."""
    try:
        database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")  # an alarm is on the disk before anybody is told of it
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(" ".join(found.split()))
            database.executescript(_TABLE)
            _read_all(database)
        except (sqlite3.Error, ValueError):
            database.close()
            raise
    except sqlite3.OperationalError as error:  # a directory, not to be written, held by another process
        raise OSError(f"cannot open the record of alarms {path}: {error}; make it accessible or choose another --home") from error
    return database


def _read_all(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError where a row cannot be read: the check of the file looks at its structure alone."""
    try:
        for row in database.execute("SELECT * FROM incident"):
            _plain(row)
    except (sqlite3.OperationalError, ValueError, TypeError) as error:
        raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from error


def _plain(row: sqlite3.Row) -> dict[str, Any]:
    return {**dict(row), "modes": json.loads(row["modes"]), "evidence": json.loads(row["evidence"])}
