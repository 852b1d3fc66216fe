"""Runs again what was served, in a thread of its own: the rows of records that come with the latents the model was fed.

Two questions are kept apart. Are these the latents of their seed, as the law says? And does the certified generator make of
them what was served? So wrong latents are told from a wrong model. Rows that find no room are dropped and counted. It knows
neither verdicts nor HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from monitoring.audit import Compared, Golden, drawn_classes
from serving.records import Record
from training.bundle import Bundle, Card, SignGaussian

WAITING, WAITING_BYTES = 1024, 64 << 20  # rows that may wait, of all versions together, and the size of their samples
AT_ONCE = 64  # rows of one version in a run of its generator
GENERATORS = 8  # that are held ready
REST = 9.0  # times as long as a run took, before the next: a tenth of one core is the most that this costs
LATENT_TOLERANCE = 1e-5  # of the law's scale: by what two builds of the inverse normal may differ; signs may not
OUTCOMES = ("same", "different", "dropped", "impossible")  # impossible: the certified generator is not there, or did not run
LATENTS = ("right", "wrong")

log = logging.getLogger("ganwatch.monitor")


@dataclass(frozen=True)
class Rerun:
    """What came of rows of one version: the samples, and how many latents were looked at and were not those of their seed."""

    bundle: Bundle
    samples: Compared
    latents: int
    wrong: int


@dataclass(frozen=True)
class _Row:
    bundle: Bundle
    seed: int
    index: int
    label: int | None
    truncation: float
    drawn: bool  # by a seed; else by the client
    z: Float32[ndarray, "d"]
    sample: ndarray


def wrong_latents(law: SignGaussian, fed: Float32[ndarray, "n d"], z: Float32[ndarray, "n d"]) -> Bool[ndarray, "n"]:
    """Which rows of `fed` are not the latents `z` that their seeds stand for; NaN is never right."""
    close = np.abs(fed.astype(np.float64) - z) <= LATENT_TOLERANCE * law.scale
    close[:, : law.signs] = fed[:, : law.signs] == z[:, : law.signs]
    return ~close.all(axis=1)


class Reruns:
    """`certified`: the generator that a bundle was certified on, None where it is not to be had. `told` hears of every run, in the
    thread of this class; `offer` never waits."""

    def __init__(self, certified: Callable[[Bundle], Golden | None], told: Callable[[Rerun], object]) -> None:
        self.certified, self.told = certified, told
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (model, one of OUTCOMES) -> samples
        self.latents: Counter[tuple[str, str]] = Counter()  # (model, one of LATENTS) -> rows of latents
        self.trouble: dict[tuple[str, str], str] = {}  # (model, version) -> why its samples are not run again
        self._goldens: OrderedDict[str, tuple[str, Golden | None]] = OrderedDict()  # directory -> hash of the certificate, generator
        self._waiting: deque[_Row] = deque()
        self._news, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="reruns", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once the run under way has ended; what waits is forgotten."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    def offer(self, bundle: Bundle, records: Iterable[Record]) -> None:
        """Rows of `bundle`'s version to be run again: those with latents that its model takes."""
        card, rows = bundle.card, []
        for record in records:
            if record.z is not None:
                if record.z.shape[1:] == (card.latent.dim,) and record.samples.shape[1:] == card.sample_shape and record.samples.dtype == card.sample_dtype:
                    rows += _rows(bundle, record, record.z)
                else:
                    self.outcomes[card.model, "impossible"] += len(record.fed)
        if not rows:
            return
        with self._news:
            room = max(0, min(WAITING, WAITING_BYTES // rows[0].sample.nbytes) - len(self._waiting))
            self._waiting.extend(rows[:room])
            self.outcomes[card.model, "dropped"] += len(rows[room:])
            self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                rows = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            began = time.monotonic()
            by_version = lambda row: str(row.bundle.path)  # noqa: E731
            for _, group in groupby(sorted(rows, key=by_version), key=by_version):
                self._audit(list(group))
            with self._news:
                self._news.wait_for(lambda: self._stopping, timeout=REST * (time.monotonic() - began))

    def _audit(self, rows: list[_Row]) -> None:
        bundle = rows[0].bundle
        card, key = bundle.card, (bundle.card.model, bundle.card.version)
        drawn = [row for row in rows if row.drawn]
        wrong, found = 0, Compared()
        try:
            if drawn:
                meant = card.latent.sample_windows([(row.seed, row.index, 1, row.truncation) for row in drawn])
                wrong = int(wrong_latents(card.latent, np.stack([row.z for row in drawn]), meant).sum())
            if (golden := self._golden(bundle)) is None:
                raise LookupError("no version in the registry holds the generator that its certificate was counted on")
            found = golden.compare(np.stack([row.z for row in rows]), _classes(card, rows), np.stack([row.sample for row in rows]))
            self.trouble.pop(key, None)
        except Exception as error:  # onnxruntime's have no base class of their own; the thread goes on
            if key not in self.trouble:
                log.warning("samples of %s %s are not run again: %s", *key, error)
            self.trouble[key] = f"samples of {key[0]} {key[1]} are not run again: {error}"
            self.outcomes[card.model, "impossible"] += len(rows)
        self.latents[card.model, "right"] += len(drawn) - wrong
        self.latents[card.model, "wrong"] += wrong
        self.outcomes[card.model, "same"] += found.checked - found.different
        self.outcomes[card.model, "different"] += found.different
        self.told(Rerun(bundle, found, len(drawn), wrong))

    def _golden(self, bundle: Bundle) -> Golden | None:
        """Looked for once for each certificate; where the search fails it is tried again with the next rows."""
        path, certificate = str(bundle.path), bundle.card.files["certificate.npz"]
        if self._goldens.get(path, ("", None))[0] != certificate:
            self._goldens[path] = (certificate, self.certified(bundle))
            while len(self._goldens) > GENERATORS:
                self._goldens.popitem(last=False)
        self._goldens.move_to_end(path)
        return self._goldens[path][1]


def _rows(bundle: Bundle, record: Record, z: Float32[ndarray, "n d"]) -> list[_Row]:
    """The rows of a record of which there are latents, copied: the record need not be kept for their sake."""
    labels = record.label if isinstance(record.label, tuple) else (record.label,) * len(record.samples)
    return [
        _Row(bundle, record.seed, record.offset + row, labels[row], record.truncation, record.origin != "client_z", latents.copy(), record.samples[row].copy())
        for row, latents in zip(record.fed, z, strict=True)
    ]


def _classes(card: Card, rows: list[_Row]) -> Int64[ndarray, "n"] | None:
    """Those that were asked for, or that the seeds draw; None where the model has none."""
    if not card.classes:
        return None
    drawn = [drawn_classes(card, seed=row.seed, offset=row.index, count=1) for row in rows]
    return np.array([c if row.label is None else [row.label] for row, c in zip(rows, drawn, strict=True)], np.int64)[:, 0]
