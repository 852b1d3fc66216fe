"""What a replica writes down: one JSON line for each request, and one for each thing worth a warning.

The request path only appends to a list; a thread writes. What does not fit is dropped and counted. A file that is full is
turned over, and one predecessor is kept; of the files of replicas that have gone the newest eight are, so that no disk fills.
Knows nothing of HTTP or gRPC.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path

_TICK_S = 0.25  # between two looks at what waits
_HELD = 65536  # entries that wait at most
_FILE_BYTES = 64 << 20  # of a file before it is turned over
_KEPT = 8  # files beside it that nobody writes any more
_QUIET_S = 3600.0  # after which nobody writes to a file: the monitor's probes alone come more often to a replica that lives
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:;=@/+-]{1,128}")

request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the request that runs now


def accepted_id(given: str | None) -> str:
    """`given` where it may stand in a header, a log and a shell, else a new one: 1 to 128 of the characters A-Z a-z 0-9 ._:;=@/+-"""
    return given if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


class Entry:
    """One request, from its arrival on. Whoever learns something about it writes it here."""

    __slots__ = ("at", "began", "bytes", "id", "method", "model", "n", "path", "seed", "status", "trace_id", "version")

    def __init__(self, given_id: str | None, method: str, path: str) -> None:
        self.at, self.began = time.time(), time.perf_counter()
        self.id, self.method, self.path = accepted_id(given_id), method, path
        self.status = self.bytes = 0  # bytes: of the answer's body
        self.model = self.version = self.trace_id = ""
        self.n: int | None = None  # samples asked for
        self.seed: int | None = None
        request_id.set(self.id)

    def line(self, ms: float) -> str:
        about = "" if self.n is None else f', "n": {self.n}'
        about += "" if self.seed is None else f', "seed": {self.seed}'
        about += f', "model": {quoted(self.model)}, "version": {quoted(self.version)}' if self.version else ""
        about += f', "trace_id": "{self.trace_id}"' if self.trace_id else ""
        return (
            f'{{"time": {self.at:.3f}, "request_id": {quoted(self.id)}, "method": {quoted(self.method)}, "path": {quoted(self.path)}, '
            f'"status": {self.status}{about}, "ms": {ms:.2f}, "bytes": {self.bytes}}}\n'
        )


class AccessLog:
    """Entries -> `path`; None writes nothing, at no cost."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._refused = self._lost = 0  # entries that did not fit, and those that the disk refused; each counted by one thread
        self._waiting: deque[tuple[Entry, float]] = deque()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """Entries that nobody will read."""
        return self._refused + self._lost

    def add(self, entry: Entry) -> None:
        """`entry` has been answered, or will not be. Never waits."""
        if self.path is None:
            return
        if len(self._waiting) >= _HELD:
            self._refused += 1
            return
        self._waiting.append((entry, (time.perf_counter() - entry.began) * 1000))

    def start(self) -> None:
        if self.path is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what waits."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        self._prune()
        while True:
            stopped = self._stop.wait(_TICK_S)
            if count := len(self._waiting):
                lines = [entry.line(ms) for entry, ms in (self._waiting.popleft() for _ in range(count))]
                self._write("".join(lines).encode(), count)
            if stopped:
                return

    def _prune(self) -> None:
        """Delete what replicas that have gone left behind, but for the newest."""
        assert self.path is not None
        quiet = []
        for file in self.path.parent.glob("access-*.jsonl"):
            with suppress(OSError):  # another replica that starts deletes, too
                if (written := file.stat().st_mtime) < time.time() - _QUIET_S:
                    quiet.append((written, file))
        for _, file in sorted(quiet)[:-_KEPT]:
            with suppress(OSError):
                file.unlink()

    def _write(self, text: bytes, count: int) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                if file.tell() + len(text) > _FILE_BYTES and file.tell():
                    self.path.replace(self.path.with_suffix(".1.jsonl"))
                    return self._write(text, count)
                if file.write(text) < len(text):
                    raise OSError("the disk is full")
        except OSError as error:  # a full disk is no reason to answer nobody
            self._lost += count
            logging.getLogger(__name__).warning("%d lines of the access log are lost: %s", count, error)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if identity := request_id.get():
            fields["request_id"] = identity
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def structured() -> None:
    """From now on what this process has to say comes as JSON lines on stderr, each with the id of the request it is about."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name in ("serving", "training"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
