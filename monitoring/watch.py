"""What is being watched: a Monitor for each version that an alias names, fed by records, and the view that page and metrics read.

    registry -> follow --.
    tap -> hear, eat ----+--> Monitors --> publish --> View, replaced whole once a second

It knows neither HTTP nor threads, and no clock but the `at` (Unix seconds) that every call brings and the one that says how long a
calibration has held it up. One thread calls it; any thread may read a View.
"""

from __future__ import annotations

import itertools
import math
import sqlite3
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from monitoring import acting, picture
from monitoring.audit import Compared
from monitoring.budget import Allowance, Budget
from monitoring.calibration import Calibration, Healthy
from monitoring.comparison import Comparison
from monitoring.incidents import Incidents
from monitoring.monitor import POPULATIONS, Fed, Gauge, Monitor
from monitoring.replicas import STALE_AFTER, Replicas
from monitoring.reruns import Rerun
from monitoring.states import StateError, States
from monitoring.view import COLUMNS, Live, Shown, View
from serving.records import SHADOW_ROWS, Heartbeat, Record
from training.bundle import Bundle, BundleError, open_bundle
from training.registry import AliasChange, Registry, RegistryError

SHARES = {"production": 0.5, "canary": 0.25, "shadow": 0.25}  # of a model's false-alarm budget; they sum to 1
SIMULATED = 1024  # healthy samples a second that a version is calibrated with at most, until it is
SIMULATED_AT_ONCE, SIMULATING = 64, 0.2  # ... in such pieces, and the seconds after which none is begun: a slow generator holds nobody up
LEAP = 60.0  # seconds by which the clock went ahead: it is looked at every second, and no step takes nearly as long; else the process stood still
HISTORY = 3600  # seconds that the page can look back, one point each
RATE_WINDOW = 2.0  # seconds over which the rate of fresh samples is taken
PACE_STEP, PACE_STEPS = 60.0, 60  # seconds between the counts, and how many of them, over which the rate of tested samples is taken: an hour
CHUNK = 1024  # samples a Monitor eats at once, so that no single record holds up the rest
RETIRED = 8  # versions no alias names any more whose Monitor is kept, for a rollback
RESTORES = ("restored", "absent", "refused")  # what became of the saved state of a version that comes under watch
NOTICE = 60.0  # seconds for which a state that could not be restored is said
UNPAIRED, UNPAIRED_BYTES = 256, 64 * 2**20  # records of a model that wait for what another version makes of the same latents, and their samples
NO_SEED = -1  # of samples that somebody else's server drew
SHARDS = 256  # monitors that are summed up at most
_SUM = "sum."  # how the names begin, in a saved state, of what the sum of the shards has latched
_COMPARISON = "comparison."  # ... of its comparison with production
_TIMES = ("last_sample_at", "last_fresh_at")  # of a version; what else of it is saved is its Monitor


@dataclass
class Watched:
    """One version under watch."""

    bundle: Bundle
    monitor: Monitor
    share: float
    last_sample_at: float | None = None
    last_fresh_at: float | None = None  # of a sample that the detectors ate: without those, silence means nothing
    recorded: tuple[Any, ...] | None = None  # verdict, modes, classes and risen modes of the open incident, as last written down
    newest: deque[ndarray] = field(default_factory=deque)  # newest samples, probes too, a few arrays, newest last
    since: float = 0.0  # when an alias first named it, Unix seconds
    drawn: deque[tuple[float, int]] = field(default_factory=deque)  # (at, samples) that clients drew with the server's seeds
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))  # (at, samples tested until then)
    allowance: Allowance = field(default_factory=Allowance)
    saved: int = 0  # samples that the state on the disk knows of, looked at or rejected
    acknowledged_at: float = 0.0  # when its alarm was last acknowledged; what shards say from before counts no more
    calibration: tuple[Healthy, Calibration] | None = None  # while it runs
    unrunnable: bool = False  # its generator, here
    shards: OrderedDict[str, Mapping[str, Any]] = field(default_factory=OrderedDict)  # name of another monitor -> its newest state
    sum: Monitor | None = None  # of this monitor and all shards
    summed: int = 0  # shards in it
    clipped: int = 0  # what it and its shards counted themselves when they were last summed up, see Monitor.frechet_clipped
    compared: Mapping[str, Any] = field(default_factory=dict)  # the saved comparison with production, until that is known
    scratch: tuple[Monitor, Monitor] | None = None  # through which shards are read and tried

    @property
    def judged(self) -> Monitor:
        """What the verdict, the gauges and the alarm are taken from."""
        return self.monitor if self.sum is None else self.sum

    @property
    def eaten(self) -> int:
        return self.monitor.served + sum(self.monitor.rejected.values())

    def fresh_rate(self, at: float) -> float:
        """Samples a second that clients drew of late."""
        while self.drawn and self.drawn[0][0] < at - RATE_WINDOW:
            self.drawn.popleft()
        return sum(count for _, count in self.drawn) / RATE_WINDOW

    def begin(self, at: float) -> None:
        """An alias names it from now on."""
        self.since = at
        self.pace.clear()
        self.tested_rate(at)

    def tested_rate(self, at: float) -> float | None:
        """Samples a second that were tested over the last hour, or since there is a count; None where that was only now."""
        tested = self.judged.tested
        if not self.pace or not self.pace[-1][0] <= at < self.pace[-1][0] + PACE_STEP:
            self.pace.append((at, tested))
        begin, before = self.pace[0]
        return (tested - before) / (at - begin) if at > begin else None

    def is_stale(self, at: float) -> bool:
        """No fresh sample lately."""
        return at - max(self.last_fresh_at or 0.0, self.since) > STALE_AFTER

    def show(self, samples: ndarray) -> None:
        """Keep the newest samples for the picture, copies, so that a request of 65,536 is not held for the sake of 64."""
        if samples.shape[1:] == self.bundle.card.sample_shape and samples.dtype == self.bundle.card.sample_dtype:
            wanted = picture.wanted(self.bundle.card.sample_shape)
            self.newest.append(samples[-wanted:].copy())
            while sum(map(len, self.newest)) - len(self.newest[0]) >= wanted:
                self.newest.popleft()


@dataclass
class Model:
    """What is remembered of a model while its versions change."""

    aliases: dict[str, str] = field(default_factory=dict)  # alias -> version, those whose bundle could be loaded
    history: tuple[AliasChange, ...] = ()
    comparisons: dict[str, tuple[str, Comparison]] = field(default_factory=dict)  # candidate -> the production version it is compared with
    unpaired: OrderedDict[tuple[str, str, int, int], Record] = field(default_factory=OrderedDict)  # (candidate, whose it is, seed, offset)
    rows: deque[tuple[float | None, ...]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    written: float = -math.inf  # time of the newest row on the disk

    @property
    def shown(self) -> str | None:
        """The alias that page and metrics speak of: production, or the first there is."""
        return next((alias for alias in SHARES if alias in self.aliases), None)


class Watch:
    """The registry's aliased versions, each under its Monitor.

    `arl`: samples to a false alarm, on average, for all versions of a model together; each alias gets its SHARES of it.
    `test_rate`: samples a second of each version that are tested at most, None for all: the rest is looked at and is no evidence.
    `states`: where Monitors outlive the process, None for nowhere. An alarm is written there before it is recorded, and an
    acknowledgement after: whenever the process dies, a latched alarm is either there or was acknowledged, unless the disk refuses, which
    is said.
    `policy`: what an alarm may change by itself, None for nothing. `calibrated`: each version's threshold is lowered once enough runs
    of its generator were simulated, SIMULATED samples at most with each point that is published.
    """

    def __init__(
        self,
        registry: Registry,
        incidents: Incidents,
        *,
        arl: float,
        test_rate: float | None = None,
        states: States | None = None,
        policy: acting.Policy | None = None,
        calibrated: bool = False,
    ) -> None:
        self.calibrated = calibrated
        self.registry, self.incidents, self.states, self.policy = registry, incidents, states, policy
        self.budget = Budget(arl, test_rate)
        self.replicas = Replicas()
        self.changed = True  # something happened that a reader should see before the second is over
        self._models: dict[str, Model] = {}
        self._watched: OrderedDict[tuple[str, str], Watched] = OrderedDict()
        self._failed: dict[tuple[str, str], tuple[Any, str]] = {}  # what the files looked like, and why they could not be loaded
        self._unreadable: dict[str, str] = {}
        self._observed: Counter[tuple[str, str]] = Counter()
        self._rejected: Counter[tuple[str, str]] = Counter()
        self._untested: Counter[str] = Counter()
        self._unaliased: Counter[str] = Counter()
        self._alarms: Counter[tuple[str, str]] = Counter()
        self._load_failures: Counter[str] = Counter()
        self._restores: Counter[tuple[str, str]] = Counter()
        self._save_failures: Counter[str] = Counter()
        self._held: dict[tuple[str, str], str] = {}  # (model, alias) -> why an alarm did not change it
        self._actions: Counter[tuple[str, str]] = Counter()
        self._latest, self._clock_jumps = math.nan, {"back": 0, "forward": 0}
        self._replays: Counter[tuple[str, str]] = Counter()
        self._notices: deque[tuple[float, str]] = deque(maxlen=8)
        self._unknown_model = self._failed_records = 0

    def follow(self, at: float) -> None:
        """Bring the Monitors into line with the aliases. A bundle that fails to load leaves the version before it watched."""
        self._tell_time(at)
        present = self.registry.models()
        self._unreadable.clear()
        for name in set(self._models) - set(present):
            del self._models[name]
            self._failed = {key: failure for key, failure in self._failed.items() if key[0] != name}
            self._watched = OrderedDict((key, watched) for key, watched in self._watched.items() if key[0] != name)
            self.incidents.keep(name, (), at=at)
            self.changed = True
        for name in present:
            try:
                history, aliases = tuple(self.registry.history(name)), self.registry.aliases(name)
            except RegistryError as error:
                self._unreadable[name] = str(error)
                continue
            if name not in self._models:
                self._models[name] = self._recall(name, at)
            self._follow_model(name, self._models[name], history, aliases, at)

    def _recall(self, name: str, at: float) -> Model:
        """A model as it comes under watch, with what its charts showed before; the time in which nobody looked is a gap in them."""
        model = Model()
        if self.states is not None:
            kept = self.states.history(name, len(COLUMNS))
            kept = kept[(kept[:, 0] >= at - HISTORY) & (kept[:, 0] < at)]
            model.rows.extend((row[0], *(_short(value) for value in row[1:])) for row in kept.tolist())
            if model.rows:
                model.written = model.rows[-1][0]
                model.rows.append(((model.written + at) / 2, *[None] * (len(COLUMNS) - 1)))
        return model

    def _follow_model(self, name: str, model: Model, history: tuple[AliasChange, ...], wanted: dict[str, str], at: float) -> None:
        settled = dict(model.aliases)
        self._failed = {key: failure for key, failure in self._failed.items() if key[0] != name or key[1] in wanted.values()}
        for alias in SHARES:
            if alias not in wanted:
                settled.pop(alias, None)
            elif self._load(name, wanted[alias], max(SHARES[a] for a in wanted if wanted[a] == wanted[alias]), at):
                settled[alias] = wanted[alias]
        if settled == model.aliases and history == model.history:
            return
        before = set(model.aliases.values())
        model.aliases, model.history = settled, history
        for version in set(settled.values()) - before:
            self._watched[name, version].begin(at)
        self._pair(name, model, at)
        self.incidents.keep(name, {*settled.values(), *wanted.values()}, at=at)
        aliased = {(n, v) for n, m in self._models.items() for v in m.aliases.values()}
        retired = [key for key in self._watched if key not in aliased]
        for key in retired:
            self._unlatch(*key, at)
        for key in retired[:-RETIRED]:
            del self._watched[key]
        for version in set(settled.values()):
            self._watched.move_to_end((name, version))
        self.changed = True

    def _pair(self, name: str, model: Model, at: float) -> None:
        """A comparison of production with each candidate whose samples have its form; those that go on keep what they know, and so do those
        of the very same pair that an earlier process has left."""
        production, before = model.aliases.get("production"), model.comparisons
        model.comparisons = {}
        if production is not None:
            ours = self._watched[name, production].bundle
            for candidate in dict.fromkeys(v for alias, v in model.aliases.items() if v != production):
                theirs = self._watched[name, candidate].bundle.card
                if (theirs.sample_shape, theirs.sample_dtype) == (ours.card.sample_shape, ours.card.sample_dtype):
                    kept = before.get(candidate)
                    model.comparisons[candidate] = kept if kept is not None and kept[0] == production else (production, self._comparison(name, production, candidate, at))
        sides = {(candidate, version) for candidate in model.comparisons for version in (candidate, production)}
        model.unpaired = OrderedDict((key, record) for key, record in model.unpaired.items() if key[:2] in sides)

    def _comparison(self, name: str, production: str, candidate: str, at: float) -> Comparison:
        """One that begins, or goes on where an earlier process left it: once, and only with the same two bundles."""
        ours, theirs = self._watched[name, production], self._watched[name, candidate]
        identity = {"production": [production, ours.monitor.identity()["bundle"]], "candidate": theirs.monitor.identity()["bundle"]}
        comparison = Comparison(ours.bundle.certificate, ours.bundle.card.modes, identity)
        try:
            if theirs.compared:
                comparison.restore(theirs.compared)
        except ValueError as error:
            self._notices.append((at, f"the comparison of {name} {candidate} with {production} begins anew, its saved state was not taken: {error}"))
        theirs.compared = {}
        return comparison

    def _compare(self, name: str, model: Model, record: Record) -> None:
        """Join the record with what other versions made of the same latents: a shadow is given production's own, and what any candidate was
        probed with, the prober asks production for by seed; nobody else knows a probe's. A candidate's side must be fresh."""
        production, shadow = model.aliases.get("production"), model.aliases.get("shadow")
        if record.version not in {production, *model.comparisons} or record.truncation != 1.0 or record.label is not None or record.origin == "client_z":
            return
        if record.seed == NO_SEED:  # nobody knows of which latents these are
            return
        for candidate, (_, comparison) in model.comparisons.items():
            if record.version not in (candidate, production):
                continue
            partner = candidate if record.version == production else production
            # Neither side is ever paired again: what is known of it already would be no bet on the future.
            other = model.unpaired.pop((candidate, partner, record.seed, record.offset), None)
            if other is None:
                asked = "client_seed" if record.version == production else "probe"
                if record.origin == asked or (candidate == shadow and record.is_fresh):  # else no partner ever comes
                    rows = record.samples[:SHADOW_ROWS].copy()  # a view would keep them all
                    model.unpaired[candidate, record.version, record.seed, record.offset] = replace(record, samples=rows, fed=(), z=None)
                continue
            ours, theirs = (record, other) if record.version == production else (other, record)
            if theirs.is_fresh and (ours.is_fresh or theirs.origin == "probe"):
                n = min(len(ours.samples), len(theirs.samples))
                self._watched[name, candidate].saved = -1  # so that it is written down, whosever record came last
                look = self._watched[name, production].monitor.look
                x, y = look(ours.samples[:n]), look(theirs.samples[:n])
                if len(x.cells) == len(y.cells) == n:
                    comparison.update(x, y)
                else:  # some row could not be looked at, and rows lost their partners
                    comparison.dropped["rejected"] += n
        while len(model.unpaired) > UNPAIRED or sum(waiting.samples.nbytes for waiting in model.unpaired.values()) > UNPAIRED_BYTES:
            (candidate, version, *_), gone = model.unpaired.popitem(last=False)
            if version == candidate:  # most of production's were never asked of anybody else
                model.comparisons[candidate][1].dropped["unpaired"] += len(gone.samples)
                self._watched[name, candidate].saved = -1

    def _load(self, name: str, version: str, share: float, at: float) -> bool:
        """Whether the version is under watch with this share; loads it if need be. A failure is retried when the files change."""
        key = (name, version)
        if (watched := self._watched.get(key)) is not None:
            if watched.share != share:
                watched.share = share
                watched.monitor.reshare(share)
                watched.saved = -1  # so that it is written down
            return True
        path = self.registry.root / name / version
        look = _look_of(path)
        if key in self._failed and self._failed[key][0] == look:
            return False
        try:
            bundle = open_bundle(path)
            if (bundle.card.model, bundle.card.version) != key:
                raise BundleError(f"its card says {bundle.card.model} {bundle.card.version}")
            self._watched[key] = Watched(bundle, self._monitor(bundle, share), share)
            self._restore(name, version, at)
        except Exception as error:  # whatever is wrong with one bundle, the others stay watched
            self._failed[key] = (look, f"{name} {version} is not watched, its bundle could not be loaded: {error}")
            self._load_failures[name] += 1
            self.changed = True
            return False
        self._failed.pop(key, None)
        return True

    def _monitor(self, bundle: Bundle, share: float) -> Monitor:
        monitor, ours = Monitor(bundle, arl=self.budget.samples, share=share), bundle.card
        for version in self.registry.versions(ours.model):  # the oldest first
            if version == ours.version:
                break  # whatever came later has not passed before
            try:
                other = self.registry.card(ours.model, version)
            except (RegistryError, BundleError):
                continue  # deleted or damaged, and no concern of this version's
            same, judged = (ours.files[name] == other.files[name] for name in ("model.onnx", "reference.npz"))
            if same and not judged and other.forced is None and other.injected_from is None:
                monitor.passed_as = version
        return monitor

    def _restore(self, name: str, version: str, at: float) -> None:
        """Let a version that comes under watch go on where the state on the disk left it, or say why it starts anew."""
        if self.states is None:
            return
        watched, outcome = self._watched[name, version], "restored"
        try:
            state = self.states.load(name, version)
            if state is None:
                outcome = "absent"
            else:
                watched.monitor.restore(state)
                if not self.calibrated:
                    watched.monitor.calibrate(None)
                if sum_alarm := {name.removeprefix(_SUM): value for name, value in state.items() if name.startswith(_SUM)}:
                    self._latch_sum(watched, sum_alarm)
                watched.compared = {key.removeprefix(_COMPARISON): value for key, value in state.items() if key.startswith(_COMPARISON)}
                for key in _TIMES:
                    setattr(watched, key, state[key])
                # Had the clock been set back while no monitor ran, the next look at it finds that out, and nothing is left in the future.
                self._latest = max([self._latest, *(state[key] for key in _TIMES if state[key] is not None)])
                watched.acknowledged_at = state["acknowledged_at"]
                watched.saved = watched.eaten
        except (StateError, ValueError, KeyError) as error:
            outcome = "refused"
            watched.monitor, watched.sum, watched.compared = self._monitor(watched.bundle, watched.share), None, {}  # nothing half restored
            self._notices.append((at, f"{name} {version} is watched from the start again, its saved state was not taken: {error}"))
        self._restores[name, outcome] += 1
        alarmed_at, left = watched.judged.alarmed_at, self.incidents.left(name, version)
        if alarmed_at is not None and left is not None and left >= alarmed_at:
            self._unlatch(name, version, at)  # its version was changed while no monitor ran
        self._raise_alarm(name, version, at)

    def save(self) -> None:
        """Write down every Monitor that has seen samples since it was written last, and what is new in the charts.

        What cannot be written keeps nothing else from it: it is counted, and raised as an ExceptionGroup when all have had their turn.
        It is tried again the next time.
        """
        failures: list[tuple[str, Exception]] = []
        for name, version in self.live():
            try:
                if self._watched[name, version].eaten != self._watched[name, version].saved:
                    self._save(name, version)
            except Exception as error:  # the disk's, mostly
                self._save_failures[name] += 1
                failures.append((f"the state of {name} {version} is not on the disk", error))
        for name, model in self._models.items():
            new = [row for row in model.rows if row[0] > model.written]
            try:
                if new and self.states is not None:
                    self.states.append(name, np.array(new, np.float64), HISTORY)
                    model.written = new[-1][0]
            except Exception as error:
                self._save_failures[name] += 1
                failures.append((f"the charts of {name} are not on the disk", error))
        if failures:
            raise ExceptionGroup("; ".join(f"{what}: {error}" for what, error in failures), [error for _, error in failures])

    def _save(self, name: str, version: str) -> None:
        if self.states is not None:
            watched = self._watched[name, version]
            latched = {f"{_SUM}{key}": value for key, value in watched.sum.alarm.items()} if watched.sum is not None else {}
            _, comparison = self._models[name].comparisons.get(version, (None, None))
            compared = {f"{_COMPARISON}{key}": value for key, value in (watched.compared if comparison is None else comparison.state()).items()}
            self.states.save(name, version, self.state(name, version) | latched | compared)
            watched.saved = watched.eaten

    def state(self, name: str, version: str) -> dict[str, Any]:
        """What this monitor itself knows of a version, without its shards: for the disk, and for a monitor that sums shards up."""
        watched = self._watched[name, version]
        return watched.monitor.state() | {key: getattr(watched, key) for key in (*_TIMES, "acknowledged_at")}

    def live(self) -> list[tuple[str, str]]:
        """(model, version) of everything that an alias names."""
        return sorted({(name, version) for name, model in self._models.items() for version in model.aliases.values()})

    def merge(self, name: str, version: str, shard: str, state: Mapping[str, Any], at: float) -> float:
        """Take in the newest state of a version's shard: another monitor, which looks at other samples of the same version.

        It replaces that shard's last one, so it may be sent again and again, and the verdict is that of the sum from the next point that
        is published on.
        Returns when the version's alarm was last acknowledged: a state from before that is not taken, and its sender must
        acknowledge, too. Raises KeyError where the version is not live, ValueError where the state is of another bundle or budget, or
        calibrated where this monitor is strict, or damaged, where there are too many shards, or where there is a test_rate, which the sum of several would exceed.
        """
        if (name, version) not in self.live():
            raise KeyError(f"{name} {version}")
        if self.budget.rate is not None:
            raise ValueError("this monitor tests so many samples a second and no more, and shards would add theirs; state its --arl in samples")
        watched = self._watched[name, version]
        watched.monitor.check(state, watched.monitor.identity())
        if not self.calibrated and state["slack"] is not None:
            raise ValueError("the state is of a monitor with --calibrated, whose alarm may come below the threshold that is guaranteed here; start both with it or neither")
        times, settled = [state.get(key) for key in _TIMES], state.get("acknowledged_at")
        if not isinstance(settled, int | float) or not all(t is None or isinstance(t, int | float) for t in times):
            raise ValueError(f"{', '.join(_TIMES)}, acknowledged_at are {[*times, settled]}; expected Unix seconds")
        if settled < watched.acknowledged_at:  # later ones are as good: they were acknowledged over there, or this monitor lost its state
            return watched.acknowledged_at
        if shard not in watched.shards and len(watched.shards) >= SHARDS:
            raise ValueError(f"{SHARDS} shards are summed up already; give each monitor one name that it keeps")
        scratch, trial = self._scratch(watched)
        try:
            scratch.restore(state)
            trial.restore(watched.monitor.state())
            trial.merge(scratch, at=at)
        except Exception as error:  # a state that fits and cannot be summed up all the same
            raise ValueError(f"the state of shard {shard} is damaged: {type(error).__name__}: {error}") from error
        watched.shards[shard] = state
        watched.shards.move_to_end(shard)
        for key, then in zip(_TIMES, times, strict=True):
            if (newest := max(filter(None, (getattr(watched, key), then)), default=None)) is not None:
                setattr(watched, key, min(newest, at))
        return watched.acknowledged_at

    def _calibrate(self, name: str, version: str, at: float) -> None:
        """Simulate some more of the runs that calibrate a version, which is judged strictly until they are through."""
        watched = self._watched[name, version]
        if not self.calibrated or watched.unrunnable or watched.monitor.slack is not None:
            return
        try:
            healthy, calibration = watched.calibration or (Healthy(watched.bundle), watched.monitor.calibration())
            begun, drawn = time.monotonic(), 0
            while drawn == 0 or (drawn < SIMULATED and calibration.slack is None and time.monotonic() - begun < SIMULATING):
                seen = healthy.draw(SIMULATED_AT_ONCE)
                calibration.feed(seen.scores, seen.features, seen.cells, seen.samples)
                drawn += SIMULATED_AT_ONCE
            watched.calibration = (healthy, calibration) if calibration.slack is None else None
        except Exception as error:  # whatever the runtime has against the file; it is served elsewhere
            watched.unrunnable = True
            self._notices.append((at, f"{name} {version} stays under its guaranteed threshold, its generator could not be run here: {error}"))
            return
        if calibration.slack is not None:
            watched.monitor.calibrate(calibration.slack)
            watched.saved = -1  # so that it is written down

    def _sum(self, name: str, version: str, at: float) -> None:
        """Sum up this monitor and its shards anew; an alarm of an earlier sum stays."""
        watched = self._watched[name, version]
        if not watched.shards and watched.sum is None:
            return
        alarm, read = (None, 0) if watched.sum is None else (watched.sum.alarm, watched.sum.frechet_clipped - watched.clipped)
        if watched.sum is not None and watched.sum.share != watched.monitor.share:  # of another share of the budget: older states do not fit
            watched.shards.clear()
            watched.sum = None
        if watched.sum is None or watched.summed != len(watched.shards):
            watched.pace.clear()  # the samples of other monitors would come or go all at once
        found, (scratch, _) = watched.sum or self._monitor(watched.bundle, watched.share), self._scratch(watched)
        try:
            found.restore(watched.monitor.state())
            if alarm is not None:  # what is named already has a say in what is named next
                found.keep_alarm(alarm)
            for state in watched.shards.values():
                scratch.restore(state)
                found.merge(scratch, at=at)
            watched.clipped = found.frechet_clipped
            found.frechet_clipped += read  # what the sum's own gauges clipped, which no state of a part holds
        finally:
            if alarm is not None:
                found.keep_alarm(alarm)
        watched.sum, watched.summed = found, len(watched.shards)

    def _scratch(self, watched: Watched) -> tuple[Monitor, Monitor]:
        """Monitors held against the present share: one through which shards are read, and one with which each is tried."""
        if watched.scratch is None or watched.scratch[0].share != watched.share:
            watched.scratch = (self._monitor(watched.bundle, watched.share), self._monitor(watched.bundle, watched.share))
        return watched.scratch

    def _latch_sum(self, watched: Watched, alarm: Mapping[str, Any]) -> None:
        """What the sum had latched when the process before ended: its shards have not reported yet."""
        watched.sum = self._monitor(watched.bundle, watched.share)
        watched.sum.restore(watched.monitor.state())
        watched.sum.keep_alarm(alarm)
        watched.clipped = watched.sum.frechet_clipped

    def act(self, at: float) -> None:
        """Let the policy change the aliases whose version is alarmed. `follow` then sees the change like anybody's."""
        self._held.clear()
        if self.policy is None:
            return
        for name, model in self._models.items():
            alarmed = {v for v in model.aliases.values() if self._watched[name, v].judged.first_alarm is not None}
            wanted = self.registry.aliases(name) if alarmed else {}
            for alias in acting.ALIASES:
                version = model.aliases.get(alias)
                if version not in alarmed or wanted.get(alias) != version:  # else `follow` has not caught up
                    continue
                if not self.policy.allows(model.history, alias):
                    continue
                verdict = self._watched[name, version].judged.verdict
                if alias == "production" and verdict.stays is not None:  # a canary loses its traffic, whatever the alarm
                    self._held[name, alias] = f"{alias} of {name} is alarmed, {version} is {verdict.id}, and stays as it is: {verdict.stays}"
                    continue
                why = f"{version} is {' '.join([verdict.id, *verdict.modes])}"
                try:
                    change = self.policy.act(name, alias, version, why=why, alarmed=alarmed | self.incidents.unsettled(name), at=at)
                except (RegistryError, BundleError) as error:
                    self._held[name, alias] = str(error)
                else:
                    self.incidents.act(name, version, f"{alias} -> {change.version or 'none'}")
                    self._actions[name, alias] += 1
                    self.changed = True

    def _tell_time(self, at: float) -> None:
        """Where the clock was set back, nothing may lie in the future: it would look fresh until the clock has caught up. Where it went ahead,
        all is as old as it says, and silent replicas, staleness and the end of a cool-down are believed until they speak again."""
        if at > self._latest + LEAP:
            self._clock_jumps["forward"] += 1
        if at < self._latest - 1.0:
            self._clock_jumps["back"] += 1
            self.replicas.last = OrderedDict((replica, (min(heard, at), counters)) for replica, (heard, counters) in self.replicas.last.items())
            self.replicas.heard_at = min(self.replicas.heard_at or at, at)
            for watched in self._watched.values():
                for name in _TIMES:
                    if (then := getattr(watched, name)) is not None:
                        setattr(watched, name, min(then, at))
                watched.since = min(watched.since, at)
                watched.drawn.clear()
                watched.pace.clear()
            for model in self._models.values():
                model.rows = deque((row for row in model.rows if row[0] < at), maxlen=HISTORY)
                model.written = min(model.written, at)
            self._notices = deque(((min(noticed, at), words) for noticed, words in self._notices), maxlen=8)
        self._latest = at

    def hear(self, heartbeat: Heartbeat, at: float) -> None:
        """Take in what a replica counted and served; `at` is when it arrived."""
        self.replicas.hear(heartbeat.replica, heartbeat.counters, at)

    def eat(self, records: Iterable[Record], at: float, between: Callable[[], object] = lambda: None) -> None:
        """Feed the Monitors. Records of one version are joined, since small batches cost a run of features.onnx each. `between` is called after
        every CHUNK of samples, when all that there is may be saved.

        What fails costs the others nothing: it is counted, and raised as an ExceptionGroup when all have had their turn. It is not
        tried again, since a Monitor may have seen a part of it, and a sample that counts twice is no evidence.
        """
        groups: dict[tuple[Any, ...], list[Record]] = {}
        failures: list[tuple[str, Exception]] = []
        for record in records:
            model = self._models.get(record.model)
            if model is None:
                self._unknown_model += 1
                continue
            self._observed[record.model, record.origin] += len(record.samples)
            if record.version not in model.aliases.values():
                self._unaliased[record.model] += len(record.samples)
                continue  # asked for by its number, or served before a rollback reached every replica
            if record.origin != "probe" and record.is_fresh:
                self._watched[record.model, record.version].drawn.append((at, len(record.samples)))
            if model.comparisons:
                try:
                    self._compare(record.model, model, record)
                except Exception as error:  # the record is judged all the same
                    failures.append((f"{record.model} {record.version}, compared", error))
            kind = (record.samples.dtype.str, record.samples.shape[1:], record.label is None)
            groups.setdefault((record.model, record.version, record.is_independent, kind), []).append(record)
        for (name, version, fresh, _), group in groups.items():
            try:
                self._eat_joined(name, version, group, fresh, at, between)
            except Exception as error:  # whatever it is: the other groups are of other versions or other samples
                self._failed_records += len(group)
                failures.append((f"{name} {version}, {len(group)} records", error))
        if failures:
            words = dict.fromkeys(f"{where}: {type(error).__name__}: {error}" for where, error in failures)
            raise ExceptionGroup("; ".join(words), [error for _, error in failures])

    def _eat_joined(self, name: str, version: str, group: list[Record], fresh: bool, at: float, between: Callable[[], object]) -> None:
        """Feed one Monitor records whose samples have one form, all or none of which name classes."""
        samples = np.concatenate([record.samples for record in group])
        unlabelled = group[0].label is None
        classes = None if unlabelled else np.concatenate([np.broadcast_to(np.asarray(r.label, np.int64), len(r.samples)) for r in group])
        tested = self._watched[name, version].allowance.take(len(samples), self.budget.rate, at) if fresh else 0
        if fresh:
            self._untested[name] += len(samples) - tested
        fed = self._fed(name, version, group) if tested else None
        shadow = {alias for alias, named in self._models[name].aliases.items() if named == version} == {"shadow"}
        received = np.repeat([record.origin != "probe" and not shadow for record in group], [len(record.samples) for record in group])
        for start, stop in itertools.pairwise((*range(0, tested, CHUNK), *range(tested, len(samples), CHUNK), len(samples))):
            part, noted = slice(start, stop), None
            if fed is not None and start < tested:
                rows = slice(*np.searchsorted(fed.rows, (start, stop)))
                noted = Fed(fed.rows[rows] - start, fed.z[rows])
            self._update(name, version, samples[part], start < tested, at, None if classes is None else classes[part], noted, received[part])
            between()

    def _fed(self, name: str, version: str, group: list[Record]) -> Fed | None:
        """The latents of records that are joined. Those that the model does not take are counted where they are run again."""
        dim = self._watched[name, version].bundle.card.latent.dim
        starts = np.cumsum([0, *(len(record.samples) for record in group)])
        found = [(start + np.array(record.fed), record.z) for start, record in zip(starts, group, strict=False) if record.z is not None and record.z.shape[1] == dim]
        return Fed(*(np.concatenate(column) for column in zip(*found, strict=True))) if found else None

    def bundle(self, name: str, version: str) -> Bundle | None:
        """What is watched of a version that an alias names."""
        model = self._models.get(name)
        return self._watched[name, version].bundle if model is not None and version in model.aliases.values() else None

    def audited(self, bundle: Bundle, found: Compared) -> None:
        """Take in a replay audit of a version's golden samples, unless that very bundle is watched no longer."""
        if (watched := self._still(bundle)) is None:
            return
        before = watched.monitor.suspect
        watched.monitor.audit(checked=found.checked, mismatched=found.different, near=found.near)
        if found.different or watched.monitor.suspect != before:
            watched.saved = -1  # so that it is written down, whether more samples come or not
        self._replays[bundle.card.model, "checked"] += found.checked
        self._replays[bundle.card.model, "mismatched"] += found.different
        self.changed |= found.different > 0

    def reran(self, rerun: Rerun, at: float) -> bool:
        """Take in what came of served samples that were run again, unless that very bundle is watched no longer. Returns whether this
        has raised a suspicion."""
        if (watched := self._still(rerun.bundle)) is None:
            return False
        before = watched.monitor.suspect
        watched.monitor.rerun(rerun.samples, latents=rerun.latents, wrong=rerun.wrong, at=at)
        if rerun.samples.different or watched.monitor.suspect != before:
            watched.saved = -1
        self.changed |= rerun.samples.different + rerun.wrong > 0
        self._raise_alarm(rerun.bundle.card.model, rerun.bundle.card.version, at)
        return watched.monitor.suspect and not before

    def _still(self, bundle: Bundle) -> Watched | None:
        watched = self._watched.get((bundle.card.model, bundle.card.version))
        return watched if watched is not None and watched.bundle.card == bundle.card else None

    def _update(self, name: str, version: str, samples: ndarray, fresh: bool, at: float, classes: ndarray | None, fed: Fed | None, received: ndarray) -> None:
        watched = self._watched[name, version]
        served, eaten, rejected = watched.monitor.served, watched.monitor.eaten, dict(watched.monitor.rejected)
        watched.monitor.update(samples, fresh=fresh, at=at, classes=classes, fed=fed, received=received)
        for reason, count in watched.monitor.rejected.items():
            self._rejected[name, reason] += count - rejected.get(reason, 0)
        if watched.monitor.served > served:  # samples of which none could be looked at leave the estimates as old as they are
            watched.last_sample_at = at
            watched.show(samples)
        if watched.monitor.eaten > eaten:
            watched.last_fresh_at = at
        self._raise_alarm(name, version, at)

    def _raise_alarm(self, name: str, version: str, at: float) -> None:
        """Write an alarm down before anybody can read of it, and follow its verdict while that sharpens."""
        watched = self._watched[name, version]
        monitor, verdict = watched.judged, watched.judged.verdict
        told = (verdict.id, verdict.modes, verdict.classes, verdict.risen)  # words hold counts, which grow with every sample
        if monitor.first_alarm is None or watched.recorded == told:
            return
        try:
            self._save(name, version)
        except OSError as error:  # a full disk, say: better an alarm that dies with the process than one that nobody hears of
            watched.saved = -1  # so that it is written down as soon as it can be
            self._notices.append((at, f"the alarm of {name} {version} is not on the disk: {error}"))
        snapshot = monitor.snapshot()
        evidence = {key: snapshot[key] for key in ("evidence", "log10_threshold", "arl", "gauges", "modes", "replay", "rerun")}
        evidence |= {name: list(getattr(verdict, name)) for name in ("classes", "risen")}
        try:
            opened = self.incidents.record(
                name,
                version,
                at=at,
                verdict=verdict.id,
                words=verdict.words,
                modes=verdict.modes,
                evidence=evidence,
                first_alarm=monitor.first_alarm,
            )
        except sqlite3.Error as error:  # tried again with the next samples, and with the next view
            self._notices.append((at, f"the alarm of {name} {version} is not on record: {error}"))
            return
        watched.recorded = told
        self._alarms[name, verdict.id] += opened
        self.changed = True

    def acknowledged(self, name: str, version: str, at: float) -> None:
        """The monitor that sums up this one's samples has acknowledged its alarm, at `at`: the evidence here from before is settled as well."""
        if (watched := self._watched.get((name, version))) is not None and watched.acknowledged_at < at:
            watched.monitor.acknowledge()
            self.incidents.acknowledge(name, {version}, at=at)
            watched.recorded, watched.acknowledged_at = None, at
            self._save(name, version)
            self.changed = True

    def _unlatch(self, name: str, version: str, at: float) -> None:
        watched = self._watched[name, version]
        watched.recorded = None
        if watched.judged.first_alarm is not None:
            watched.monitor.acknowledge()
            # Later than anything the shards know of, or they would go on: their clocks may be ahead, or this one was set back.
            latest = max((watched.acknowledged_at, *(state["acknowledged_at"] for state in watched.shards.values())))
            watched.shards.clear()
            watched.pace.clear()  # it counted the shards' samples, too
            watched.sum, watched.summed, watched.acknowledged_at = None, 0, max(at, math.nextafter(latest, math.inf))
            self._save(name, version)

    def acknowledge(self, name: str, at: float) -> list[dict[str, Any]]:
        """Unlatch the alarms of a model's versions. Returns the incidents that this settled. Raises KeyError for a model not watched."""
        versions = set(self._models[name].aliases.values())
        closed = self.incidents.acknowledge(name, versions | {version for model, version in self._failed if model == name}, at=at)
        for version in versions:
            self._unlatch(name, version, at)
        self.changed = True
        return closed

    def publish(self, at: float, *, point: bool = True) -> View:
        """The view as of now, in milliseconds; with `point`, the histories grow by one."""
        self._tell_time(at)
        self.changed = False
        at = round(at, 3)
        for name, version in self.live():
            if point:
                self._calibrate(name, version, at)
                self._sum(name, version, at)
                self._raise_alarm(name, version, at)
        errors = [*filter(None, [self.incidents.refused]), *self._unreadable.values(), *(words for _, words in self._failed.values())]
        errors += self._held.values()
        errors += [words for noticed, words in self._notices if at - noticed < NOTICE]
        return View(
            at=at,
            budget=self.budget,
            models={name: self._shown(name, model, at, point) for name, model in sorted(self._models.items()) if model.shown},
            observed=dict(self._observed),
            rejected=dict(self._rejected),
            untested={name: self._untested[name] for name in self._models},
            unaliased={name: self._unaliased[name] for name in self._models},
            alarms=dict(self._alarms),
            load_failures={name: self._load_failures[name] for name in self._models},
            restores={(name, outcome): self._restores[name, outcome] for name in self._models for outcome in RESTORES},
            save_failures={name: self._save_failures[name] for name in self._models},
            incidents_refused=self.incidents.refused is not None,
            replays={(name, what): self._replays[name, what] for name in self._models for what in ("checked", "mismatched")},
            actions={(name, alias): self._actions[name, alias] for name in self._models for alias in acting.ALIASES},
            clock_jumps=dict(self._clock_jumps),
            unknown_model=self._unknown_model,
            failed=self._failed_records,
            serving=self.replicas.totals(at),
            replicas=self.replicas.speaking(at),
            heard_at=self.replicas.heard_at,
            received=sum(self._observed.values()),
            errors=tuple(dict.fromkeys(errors)),
        )

    def _shown(self, name: str, model: Model, at: float, point: bool) -> Shown:
        alias = model.shown
        assert alias is not None
        version = model.aliases[alias]
        watched = self._watched[name, version]
        roles = {v: next(a for a in SHARES if model.aliases.get(a) == v) for v in (version, *model.aliases.values())}
        live = tuple(self._live(name, model, role, v, at) for v, role in roles.items())
        first = live[0]
        if point:
            js = first.gauges["fresh"]["js"]
            values = (js.value, js.low, js.high, total_log10(watched.judged.evidence()))
            model.rows.append((at, *(None if first.stale else _short(value) for value in values)))
        return Shown(
            alias=alias,
            version=version,
            bundles={a: self._watched[name, v].bundle for a, v in model.aliases.items()},
            share=first.share,
            loaded_at=first.since,
            last_sample_at=first.last_sample_at,
            last_fresh_at=first.last_fresh_at,
            stale=first.stale,
            snapshot=first.snapshot,
            gauges=first.gauges,
            live=live,
            forced=next((change.forced for change in reversed(model.history) if change.alias == alias), None),
            marks=tuple(self._marks(name, model, at)),
            rows=tuple(model.rows),
            picture=tuple(watched.newest),
        )

    def _live(self, name: str, model: Model, role: str, version: str, at: float) -> Live:
        watched = self._watched[name, version]
        production, comparison = model.comparisons.get(version, (None, None))
        return Live(
            role=role,
            version=version,
            bundle=watched.bundle,
            share=watched.share,
            since=watched.since,
            last_sample_at=watched.last_sample_at,
            last_fresh_at=watched.last_fresh_at,
            stale=watched.is_stale(at),
            fresh_rate=watched.fresh_rate(at),
            tested_rate=watched.tested_rate(at),
            shards=watched.summed,
            snapshot=watched.judged.snapshot(),
            gauges={population: watched.judged.gauges(population) for population in POPULATIONS},
            modes={population: watched.judged.modes(population) for population in POPULATIONS},
            coverage={population: watched.judged.coverage(population) for population in POPULATIONS},
            comparison=comparison.snapshot(production, version) if comparison is not None else None,
        )

    def _marks(self, name: str, model: Model, at: float) -> list[dict[str, Any]]:
        """What the charts mark within the time they show: changes of the shown alias, and alarms."""
        changes = [(datetime.fromisoformat(c.at).timestamp(), c) for c in model.history if c.alias == model.shown]
        marks = [{"t": t, "text": f"{c.alias}: {c.version or 'none'} ({c.reason})", "kind": "version"} for t, c in changes if c.forced is None]
        marks += [{"t": t, "text": f"{c.alias}: {c.version} (forced)", "kind": "forced", "why": c.forced} for t, c in changes if c.forced is not None]
        alarms = [incident for incident in self.incidents.newest() if incident["model"] == name]
        marks += [
            {"t": i["opened_at"], "text": f"alarm on {i['version']}: {i['verdict'].replace('_', ' ')}", "kind": "alarm"}
            for i in alarms
        ]
        return sorted((mark for mark in marks if mark["t"] >= at - HISTORY), key=lambda mark: mark["t"])


def total_log10(evidence: Mapping[str, float]) -> float:
    """log10 of the sum of the families' weighted e-values, which is what the threshold is held against."""
    top = max(evidence.values(), default=-math.inf)
    return top if math.isinf(top) else top + math.log10(sum(10.0 ** (value - top) for value in evidence.values()))


def _short(value: float) -> float | None:
    """Five digits are more than a chart shows."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _look_of(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of a bundle's files: when these change it is worth trying again."""
    entries = sorted(path.iterdir()) if path.is_dir() else []
    return tuple((entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in entries)
