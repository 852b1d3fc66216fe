"""The monitor of one version of one model: samples in; gauges, evidence and a verdict out.

Two hypotheses, never confused. Null A: what is served follows the certified generator's law; it is true by construction while
nothing is broken. Null B: modes and off-manifold share stay within tolerance of the real data. Alarms eat fresh samples only,
that is independent draws of the model's own law; whatever clients got feeds the "served" gauges. "Served equals
real" is never a hypothesis.

Pure: no clock (the caller says when), no network, no file but the bundle's. See README.md beside it for the mathematics.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from monitoring.asymptotic import READINGS, Real, Spread, frechet_interval, moments_spread
from monitoring.audit import Compared
from monitoring.calibration import SAMPLES, Calibration
from monitoring.coverage import covered, mode_coverage, mode_status
from monitoring.diagnosis import VERDICTS, Verdict, detectable, diagnose, replaced, warming_up, wrong_model
from monitoring.divergences import DIVERGENCES, INTERVALS, ShareSet, smoothed, total_variation
from monitoring.edetectors import FAMILIES, NULLS, EDetector, Fakes, NoNumbers
from monitoring.features import Eye, Seen
from monitoring.latents import LatentDetector
from monitoring.points import LEAST, POINT_GAUGES, Cloud, Embedding
from monitoring.sketches import BLOCK, NEWEST, Blocks, Decayed, Newest, Sketch
from training.bundle import Bundle
from training.drops import UNWATCHED, delay_of_loss, drop_bounds
from training.moments import frechet

POPULATIONS = ("fresh", "recent", "served")
"""fresh: the block of fresh samples now being filled; recent: fresh samples, the older the less they weigh; served: the block
of whatever clients got."""
GAUGES = (*DIVERGENCES, "mode_coverage", "off_manifold", "frechet")
ALL_GAUGES = (*GAUGES, "mmd", *POINT_GAUGES)  # the latter only where the bundle has real points
REAL_POINTS = 1024  # real points that served ones are compared with
WIDTH_POINTS = 512  # training points that set the width of the kernel
AUDIT_PATIENCE = 4096  # samples tested for which a failed replay audit waits for the samples to say which failure it is
SHORT_PATIENCE = 512  # ... where no failure that needs longer is possible
DIFFERING = 2  # golden samples of a replay that must differ: one latent may lie on the very edge of a decision in the graph
RECENT_RERUNS = 128  # samples run again, of which two must differ: a latent on the very edge of a decision in the graph may
WARM_UP = 512  # samples of the whole law tested before silence is called health
FLOOR_DRAWS = 64
GAUGE_DELTA = 0.05  # chance that an interval fails at any sample of a block
_COUNTS = (  # what a Monitor counts over its whole life
    *("monitored", "given", "no_numbers", "served", "frechet_clipped", "replay_checked", "replay_mismatched"),
    *("rerun_checked", "rerun_mismatched", "latents_checked", "latents_wrong"),
)
_MARKS = ("slack", "alarmed_at", "_since", "_given_since", "_suspected", "_wrong", "_golden", "_again", "_near", "_misdrawn")  # when something happened to it
PRIOR_SAMPLES = 1024  # how strongly one of the two priors of the intervals believes in the certificate

TOLERANCES = {"forward_kl": 0.1, "reverse_kl": 0.08, "js": 0.02, "chi_squared": 0.08, "tv": 0.08, "frechet": 0.05}
"""How far above its certified value a gauge may lie before it deserves a look: nats for KL and JS, Frechet as a part of the
real features' total variance. The loss of one mode in ten exceeds each but Frechet's, which depends on where the mode lay; the
noise of a full block does not. Alarms do not depend on them."""


@dataclass(frozen=True)
class Gauge:
    """An estimate from n samples. exact: [low, high] holds at every sample of a block at once, with probability >= 1 -
    GAUGE_DELTA; asymptotic: so it does for many samples; pointwise: at any one moment, for many samples (mmd: for any number);
    none: nobody has derived an interval, or there are too few points for one, low and high are NaN.
    floor: what as many samples of the real data itself would read, about; NaN where nobody knows."""

    value: float
    low: float
    high: float
    n: int
    ci: Literal["exact", "asymptotic", "pointwise", "none"]
    floor: float = math.nan


class Fed(NamedTuple):
    """Latents that the model was fed, of some of a batch of samples: z [m, d] of the rows [m], ascending."""

    rows: Int64[ndarray, "m"]
    z: Float32[ndarray, "m d"]


class Monitor:
    """Watches one bundle. arl: least mean number of samples eaten to a false alarm; share: this version's part of that budget.

    verdict; first_alarm: 0-based number among the samples eaten of the one at which the alarm was raised; alarmed_at: the `at`
    of its update; monitored: fresh samples eaten; given: samples eaten of classes that were asked for; no_numbers: what came in place of
    either and is none, which is eaten too; served: all samples looked at; demand [classes]: of which class what clients got is, the
    older the less it weighs, and what they named no class for as the certified model draws it; rejected: reason -> samples; tolerance:
    divergence -> its value for the certified generator and the threshold above which it deserves a look.
    """

    def __init__(self, bundle: Bundle, *, arl: float = 2.6e9, share: float = 1.0) -> None:
        if not 1 <= arl <= 1e100:
            raise ValueError(f"arl is {arl}; it must lie in [1, 1e100] samples (2.6e9: one a month at 1,000 samples/s)")
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it must lie in (0, 1], and those of all live versions must sum to 1 at most")
        self.bundle, self.arl, self.share = bundle, arl, share
        certificate, reference = bundle.certificate, bundle.reference
        self._eye = Eye(bundle)
        self._detector = EDetector(certificate, reference, bundle.card.modes, threshold=arl / share, scores=bundle.card.scores)
        self._latents = LatentDetector(bundle.card.latent, threshold=arl / share)
        self._fakes = Fakes(certificate, threshold=arl / share)
        self._no_numbers = NoNumbers(certificate, threshold=arl / share)
        self._bounds = drop_bounds(certificate)  # kept, since states are restored again and again where shards are summed up
        cells, features = len(bundle.card.modes) + 1, len(reference.feature_mean)
        rng = np.random.default_rng(0)  # which of the real points: the same ones in every process
        real, self._spare = rng.permutation(reference.held_out_points)[:REAL_POINTS], rng.permutation(reference.train_points)[:BLOCK]
        self._cloud, self._embedding, self._real_points = Cloud(real), Embedding(real, width_from=self._spare[:WIDTH_POINTS]), Real(real)
        self._blocks = {population: Blocks(cells, features, self._embedding.size) for population in ("fresh", "served")}
        self._recent, self._newest = Decayed(cells, features, self._embedding.size), Newest(features)
        self._gauges: dict[str, tuple[int, dict[str, Gauge]]] = {}  # as last read, and at how many samples
        self._floors: dict[int, dict[str, float]] = {}
        self._point_gauges: dict[str, tuple[int, int, dict[str, Gauge]]] = {}  # by population: since which sample they were read, of how many, and as what
        self._spread: tuple[int, Spread | None] = (0, None)  # of the newest points, and of how many samples
        self._real = reference.cell_share
        if not (self._real > 0).all():  # a cell without real data has some share all the same
            self._real = smoothed(np.rint(self._real * reference.count).astype(np.int64))
        self._certified = certificate.cell_count / certificate.count
        self.tolerance = self._tolerance()
        self._priors = np.stack([np.full(cells, 0.5), 0.5 + PRIOR_SAMPLES * self._certified])
        self.monitored = self.given = self.no_numbers = self.served = 0
        self.demand = np.zeros(len(certificate.class_cell_count))
        self.rejected = {"nan": 0, "shape": 0, "dtype": 0, "class": 0}
        self.frechet_clipped = 0  # eigenvalues below zero that rounding cannot explain, over all Frechet gauges read
        self._since = self._given_since = 0  # monitored and given at the last restart of the detectors
        self.replay_checked = self.replay_mismatched = 0  # golden samples asked for again, and those that came back different
        self._suspected: int | None = None  # samples eaten when the replay audit failed, None while it last passed
        self._golden = [0, 0]  # golden samples compared in the last replay, the worst since an alarm, and those that differed
        self._wrong: int | None = None  # number of the sample with which that became the verdict
        self.rerun_checked = self.rerun_mismatched = 0  # served samples run again, and those that came out different
        self.latents_checked = self.latents_wrong = 0  # latents in use, and those that were not of their seed
        self._again: dict[str, float] | None = None  # since the first that differed; what is right after an alarm is left out: Compared without `near`, `rerun_checked` at the newest, whether two came close together
        self._near = True  # whether all that differed, golden or served, were near what they should have been
        self._misdrawn: int | None = None  # number of the newest sample when a latent was not of its seed
        self.alarmed_at: float | None = None
        self.passed_as: str | None = None  # a version of the same generator that was good enough by another reference
        self.verdict = VERDICTS["warming_up"]
        self.calibrate(None)

    @property
    def tested(self) -> int:
        """Samples that the detectors have eaten and could look at."""
        return self.monitored + self.given

    @property
    def eaten(self) -> int:
        """All that the detectors have eaten: the number of the next sample."""
        return self.tested + self.no_numbers

    @property
    def first_alarm(self) -> int | None:
        return _earliest(*(detector.crossed for detector in self._detectors.values()), self._wrong, self._misdrawn)

    @property
    def suspect(self) -> bool:
        """Whether samples differ from what the certified model makes of their latents, and nothing has cleared that up."""
        return self._suspected is not None

    @property
    def log10_threshold(self) -> float:
        return math.log10(self._detector.threshold)

    def look(self, samples: ndarray) -> Seen:
        """Samples in the eyes of this version's features.onnx; nothing is counted."""
        return self._eye.look(samples)

    def update(
        self,
        samples: ndarray,
        *,
        fresh: bool,
        at: float,
        classes: Int64[ndarray, "n"] | None = None,
        fed: Fed | None = None,
        received: Bool[ndarray, "n"] | None = None,
    ) -> None:
        """Look at n samples [n, *sample_shape], n >= 0; `at`: Unix seconds. What is no sample is counted, never an error; where it should
        have been a fresh one and is no number, it is evidence. A wrong shape or dtype is none: that is no draw of any law, but how
        whoever sends a whole array has made it.

        fresh: independent draws of the model's law, or of `classes`, those that clients asked for (None: they named none).
        Samples of given classes are tested given these, and are no part of the fresh population. fed: latents that the model was
        fed; they are tested together with their samples, where these are. received: those that clients got (None: all), which alone are
        of the population "served": probes and what a shadow makes are not.
        """
        rows = np.arange(len(samples) if samples.ndim else 1)
        if classes is not None and self.demand.size and (known := (classes >= 0) & (classes < self.demand.size)).sum() < len(classes):
            self.rejected["class"] += int((~known).sum())
            samples, classes, rows = samples[known], classes[known], rows[known]
        seen = self._eye.look(samples)
        for reason, count in seen.rejected.items():
            self.rejected[reason] += count
        self.served += len(seen.cells)
        embedded = self._embedding(seen.features)
        got = np.full(len(rows), True) if received is None else received[rows]
        got = got[seen.rows]
        self._blocks["served"].add(seen.cells[got], seen.features[got], embedded[got])
        if self.demand.size:
            self._demanded(int(got.sum()) if classes is None else classes[seen.rows][got])
        certified = classes is None or self.demand.size > 0  # before classes were counted, nothing was known of them
        if fresh and certified and not seen.rejected.keys() - {"nan"}:
            self._eat(seen, classes, embedded, fed, rows)
        if len(rows):
            self._judge(at)

    def _demanded(self, got: Int64[ndarray, "n"] | int) -> None:
        """Clients got samples of these classes, or so many that they named none for: of those the model has drawn the classes."""
        n = got if isinstance(got, int) else len(got)
        asked = n * np.array(self.bundle.card.class_shares) if isinstance(got, int) else np.bincount(got, minlength=self.demand.size)
        self.demand = self.demand * 0.5 ** (n / BLOCK) + asked

    def _eat(self, seen: Seen, classes: Int64[ndarray, "n"] | None, embedded: Float32[ndarray, "m e"], fed: Fed | None, rows: Int64[ndarray, "n"]) -> None:
        """Test n fresh samples, which were the `rows` of their batch and of which m were looked at: of given classes, their modes and fakes
        are evidence given these; else they are of the fresh population, too."""
        begin, missing = self.eaten, np.ones(len(rows), bool)
        missing[seen.rows] = False
        self._no_numbers.update(np.zeros(len(rows), np.int64) if classes is None else classes + 1, missing, index=begin)
        self.no_numbers += len(rows) - len(seen.rows)
        if fed is not None and len(fed.rows):  # of whatever became of them: to leave out those of what is no number would make another law of the rest
            tested = np.isin(fed.rows, rows)
            self._latents.update(fed.z[tested], begin + np.searchsorted(rows, fed.rows[tested]))
        given, numbers = None if classes is None else classes[seen.rows], begin + seen.rows
        self._detector.update(seen.scores, seen.features, seen.cells, seen.samples, index=numbers, classes=given)
        if given is not None:
            self._fakes.update(given, seen.cells == len(self.bundle.card.modes), index=numbers)
            self.given += len(given)
            return
        self._blocks["fresh"].add(seen.cells, seen.features, embedded)
        self._recent.add(seen.cells, seen.features, embedded)
        self._newest.add(seen.features)
        self.monitored += len(seen.cells)

    @property
    def demand_shifted(self) -> bool:
        """Whether clients get other classes than the model draws: by more than the tolerance and what chance would explain."""
        drawn, n = np.array(self.bundle.card.class_shares), self.demand.sum()
        if n < WARM_UP:
            return False
        chance = np.sqrt(drawn * (1 - drawn) / (2 * math.pi * n)).sum()  # E TV of n draws
        return bool(total_variation(drawn, self.demand / n) > TOLERANCES["tv"] + chance)

    def audit(self, *, checked: int, mismatched: int, near: bool = False) -> None:
        """Take in a replay of the certificate's golden samples: how many were compared, how many came back different, and whether
        each of these was near what it should have been (`audit.Compared`).

        DIFFERING of them prove that something else serves than was certified; one alone is counted, shown and no more. They say nothing
        of what that something does, so the verdict is left to the samples for AUDIT_PATIENCE of them, which find any gross failure sooner and name it; only
        where they stay silent is it `wrong_model`, and should they speak later, theirs is the sharper word. But where not one
        golden sample comes back, another model serves, and whatever is wrong with the law is its doing. Then SHORT_PATIENCE
        is enough, as no later word could be another one; and so it is where the samples are the same ones, slightly off: a mode that
        is gone, noise and copies are other samples, and what is left, a loss of variety, shows sooner than that.

        After an alarm the worst replay stands until it is acknowledged: a server that recovers does not change what was wrong with it.
        """
        alarmed = self.first_alarm is not None
        if not alarmed or mismatched * self._golden[0] > self._golden[1] * checked or not self._golden[0]:
            self._golden = [checked, mismatched]
        self.replay_checked += checked
        self.replay_mismatched += mismatched
        if mismatched >= DIFFERING:
            self._suspect(near)
        elif self._again is None or not self._again["twice"]:
            self._suspected, self._near = None, self._near if alarmed else True

    def rerun(self, found: Compared, *, latents: int, wrong: int, at: float) -> None:
        """Take in served samples that were run again on the certified generator, and how many latents were not of their seed.

        A difference means what it means for a golden sample, but it takes two among RECENT_RERUNS. A wrong latent is an alarm at
        once: it comes before all that samples could say. What comes out right after an alarm is no word on what was wrong.
        """
        right = 0 if self.first_alarm is not None else found.checked - found.different
        self.latents_checked += latents
        self.latents_wrong += wrong
        if wrong and self._misdrawn is None:
            self._misdrawn = max(0, self.eaten - 1)
        self.rerun_checked += found.checked
        self.rerun_mismatched += found.different
        if found.different:
            before = self._again or {"checked": 0, "different": 0, "worst": 0.0, "newest": -math.inf, "twice": False}
            twice = found.different > 1 or self.rerun_checked - before["newest"] <= RECENT_RERUNS
            self._again = {
                "checked": before["checked"] + right + found.different,
                "different": before["different"] + found.different,
                "worst": max(before["worst"], found.worst),
                "newest": self.rerun_checked,
                "twice": before["twice"] or twice,
            }
            if twice:
                self._suspect(found.near)
            else:
                self._near &= found.near
        elif self._again is not None:
            self._again = self._again | {"checked": self._again["checked"] + right}
        self._judge(at)

    def _suspect(self, near: bool) -> None:
        self._near &= near
        if self._suspected is None:
            self._suspected = self.eaten

    @property
    def _replaced(self) -> bool:
        """Whether not one sample, golden or served, is what the certified generator makes of its latents."""
        checked, mismatched = self._golden
        return bool(0 < checked == mismatched) and (self._again is None or self._again["checked"] == self._again["different"])

    def state(self) -> dict[str, Any]:
        """All that the past has left here, under plain names: arrays, and values that JSON can say."""
        flat: dict[str, Any] = {name: getattr(self, name) for name in (*_COUNTS, *_MARKS)} | {"rejected": dict(self.rejected), "demand": self.demand}
        parts = {name: owner.state() for name, owner in self._parts().items()}
        flat |= {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return {name: value.copy() if isinstance(value, ndarray) else value for name, value in flat.items()} | {"identity": self.identity()}

    @property
    def _detectors(self) -> dict[str, Any]:
        """All that latches an alarm, under the names in states."""
        return {"detector": self._detector, "latents": self._latents, "fakes": self._fakes, "no_numbers": self._no_numbers}

    def _parts(self) -> dict[str, Any]:
        """Whatever has a state of its own."""
        return {**self._detectors, **self._blocks, "recent": self._recent, "newest": self._newest}

    def identity(self) -> dict[str, Any]:
        """What a state must have in common with this monitor to mean anything to it."""
        files = hashlib.sha256(repr(sorted(self.bundle.card.files.items())).encode()).hexdigest()
        return {"bundle": files[:16], "arl": self.arl, "threshold": self.arl / self.share, "bets": self._detector.layout[:16] + self._latents.layout[:16]}

    def check(self, state: Mapping[str, Any], names: Collection[str]) -> None:
        """Raise ValueError where `state` differs in these parts of `identity`, or holds what no monitor of this version can have."""
        ours, theirs = self.identity(), state.get("identity")
        if not isinstance(theirs, dict):
            raise ValueError("the state does not say which monitor it is of")
        if differing := [f"{name} is {theirs.get(name)!r}, here it is {ours[name]!r}" for name in names if theirs.get(name) != ours[name]]:
            raise ValueError(f"the state is of another monitor: {'; '.join(differing)}")
        for name, own in self.state().items():
            if _begins_anew(name, state):
                continue
            if name not in state:
                raise ValueError(f"the state lacks {name}")
            if isinstance(own, ndarray):
                _check_array(name, state[name], own)
            elif name in _COUNTS and not (type(state[name]) is int and state[name] >= 0):
                raise ValueError(f"{name} is {state[name]!r}; expected a count")
        if "newest.count" not in state:
            return
        for name, blocks in self._blocks.items():
            if state[f"{name}.total"] < sum(int(state[f"{name}.{part}_cells"].sum()) for part in ("closed", "open")):
                raise ValueError(f"{name}.total is {state[f'{name}.total']}; expected the samples of its blocks at least")
        counts = {"newest.points": state["newest.count"]} | {f"{b}.{s}_points": state[f"{b}.{s}_cells"].sum() for b in self._blocks for s in ("closed", "open")}
        for name, count in counts.items():
            if len(state[name]) != min(int(count), NEWEST):
                raise ValueError(f"{name} are {len(state[name])}; expected {NEWEST} at most of {count} samples")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the monitor stood whose `state` this is, without a false alarm and with any latched one. It may have had
        another arl or share, as with `reshare`; then it is judged by the guaranteed threshold. The gauges of a state that does not say of
        how many samples its points are, so that no sum could tell what to keep of them, begin anew. So do bets on the fakes of a class
        that the state does not know; all other evidence is kept.

        Raises ValueError where it watched another bundle or with other bets, or where the state is damaged.
        """
        self.check(state, ("bundle", "bets"))
        for name in (*_COUNTS, *_MARKS):
            setattr(self, name, state[name])
        self.rejected, self.demand = dict(state["rejected"]), np.array(state["demand"])
        self.calibrate(self.slack if state["identity"] == self.identity() else None)
        self._gauges.clear()
        self._fakes.restart()
        for part, owner in self._parts().items():
            if _begins_anew(part, state):
                continue
            owner.restore({name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")})
        self._judge()

    def merge(self, other: Monitor, *, at: float) -> None:
        """Take over what another monitor of the same version saw in other samples, none of which this one has seen.

        An alarm of either stays; the evidence adds up, so that there is an alarm as soon as the sum calls for one: then `at` is
        its time. first_alarm counts the samples of the shard that raised it, or of both where the sum did. Raises ValueError
        where the two do not watch the same bundle with the same bets and threshold.
        """
        if self.identity() != other.identity():
            raise ValueError("the monitors are of different bundles, thresholds or bets: only shards of one version can be merged")
        waited = [monitor.eaten - monitor._suspected for monitor in (self, other) if monitor._suspected is not None]
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._suspected = self.eaten - max(waited) if waited else None  # each has waited for a clean replay of its own
        self.rejected = {reason: count + other.rejected[reason] for reason, count in self.rejected.items()}
        self._since, self._given_since = self._since + other._since, self._given_since + other._given_since
        theirs = other._parts()
        for name, owner in self._parts().items():
            owner.merge(theirs[name], **({"index": self.eaten - 1} if name in self._detectors else {}))
        self.demand = self.demand + other.demand
        for name in ("_wrong", "_misdrawn", "alarmed_at"):
            setattr(self, name, _earliest(getattr(self, name), getattr(other, name)))
        self._golden = max(self._golden, other._golden, key=lambda golden: golden[1] / max(1, golden[0]))
        self._near &= other._near
        if self._again is None or other._again is None:
            self._again = self._again or other._again
        else:
            self._again = {key: (sum if key in ("checked", "different") else max)((value, other._again[key])) for key, value in self._again.items()}
        self._judge(at)

    def keep_alarm(self, alarm: Mapping[str, Any]) -> None:
        """Latch what an earlier sum of the same shards, or an earlier process, had latched, as `alarm` says it: the evidence may
        have gone since. Raises ValueError or KeyError where it is of other bets."""
        for name, detector in self._detectors.items():
            if _begins_anew(f"{name}.named", alarm):
                continue
            _check_array(f"{name}.named", alarm[f"{name}.named"], detector.named)
            detector.latch(alarm[f"{name}.crossed"], alarm[f"{name}.named"])
        for name in ("_wrong", "_misdrawn", "alarmed_at"):
            setattr(self, name, _earliest(getattr(self, name), alarm[name]))
        if self._again is None and not self._golden[1]:  # the evidence that the sum had for it
            self._again, self._golden, self._near = alarm["_again"], alarm["_golden"], alarm["_near"]
        self._judge()

    @property
    def alarm(self) -> dict[str, Any]:
        """What `keep_alarm` takes: what of a state is latched."""
        latched = {f"{name}.{part}" for name in self._detectors for part in ("crossed", "named")}
        latched |= {"_wrong", "_misdrawn", "alarmed_at", "_again", "_golden", "_near"}
        return {name: value for name, value in self.state().items() if name in latched}

    def reshare(self, share: float) -> None:
        """Another part of the false-alarm budget from now on. The evidence stays, and so does a latched alarm: what bounds the
        mean run length is the mixture itself, whatever threshold it is held against and whenever that was set.
        """
        self.share = share
        self.calibrate(self.slack)

    def calibrate(self, slack: float | None) -> None:
        """Hold the evidence against arl / share / slack from now on: measured (`calibration.py`) in place of guaranteed. None: guaranteed."""
        self.slack: float | None = slack  # by which the threshold lies below the guaranteed one; None: it does not
        self._detector.threshold = self.arl / self.share / (slack or 1.0)
        self._latents.threshold = self._fakes.threshold = self._no_numbers.threshold = self.arl / self.share  # no samples were simulated through these
        self._delays = delay_of_loss(self.bundle.certificate, self._bounds, np.ones(1), threshold=self._detector.threshold)[0]  # samples until the loss of each mode is seen, about

    def calibration(self, samples: int = SAMPLES) -> Calibration:
        """What finds the slack of this monitor, with bets of its own."""
        card = self.bundle.card
        found = EDetector(self.bundle.certificate, self.bundle.reference, card.modes, threshold=self.arl / self.share, scores=card.scores)
        return Calibration(found, arl=self.arl / self.share, samples=samples)

    def acknowledge(self) -> None:
        """Unlatch: the detectors forget everything and start again; counts and gauges go on."""
        for detector in self._detectors.values():
            detector.restart()
        self.alarmed_at = self._suspected = self._wrong = self._misdrawn = self._again = None
        self._golden, self._near = [0, 0], True
        self._since, self._given_since = self.monitored, self.given
        self._judge()

    def evidence(self) -> dict[str, float]:
        """Family -> log10 of its weighted evidence, -inf before the first sample. The evidence adds up to that of the alarm."""
        found = self._detector.family_evidence() | {"latents": float(self._latents.evidence.sum())}
        found["modes"] += float(self._fakes.evidence.sum())
        found["tails"] += float(self._no_numbers.evidence.sum())
        return {family: math.log10(e) if e > 0 else -math.inf for family, e in found.items()}

    def gauges(self, population: str) -> dict[str, Gauge]:
        """The estimates of a population against the real data. NaN before the first sample.

        What else is served is no independent draw (a seed may be asked for twice), so "served" has no intervals, and what comes
        again counts as often as it was got, but in intrinsic_dimension.
        """
        if self._gauges.get(population, (None,))[0] != self.served:
            self._gauges[population] = (self.served, self._estimate(population))
        return self._gauges[population][1]

    @property
    def _delta(self) -> float:
        """What of GAUGE_DELTA each stream has that a block of fresh samples is read as: a block of a sum is read since several starts."""
        return GAUGE_DELTA / self._blocks["fresh"].streams

    def _sketch(self, population: str) -> Sketch | Decayed:
        if population not in POPULATIONS:
            raise ValueError(f"population is {population!r}; it must be one of {', '.join(POPULATIONS)}")
        return self._recent if population == "recent" else self._blocks[population].view

    def _shares(self, sketch: Sketch | Decayed) -> ShareSet:
        """Exact of a block, pointwise of what is recent. Only where samples are independent draws do they bound anything."""
        if isinstance(sketch, Decayed):
            return ShareSet.pointwise(sketch.cells, count=sketch.effective, delta=GAUGE_DELTA)
        return ShareSet.observed(sketch.cells, priors=self._priors, delta=self._delta)

    def _estimate(self, population: str) -> dict[str, Gauge]:
        sketch = self._sketch(population)
        n, real = sketch.count, self._real
        if n == 0:
            return {name: Gauge(math.nan, math.nan, math.nan, 0, "none") for name in ALL_GAUGES}
        shares = self._shares(sketch)
        values = self._divergences(sketch.cells)
        coverage = mode_coverage(real, shares)
        values |= {"mode_coverage": coverage.value, "off_manifold": float(shares.centre[-1])}
        bounds = {name: (math.nan, math.nan) for name in values}
        if population != "served":
            bounds = {name: interval(real, shares) for name, interval in INTERVALS.items()}
            bounds["mode_coverage"] = (coverage.low, coverage.high)
            bounds["off_manifold"] = (float(shares.low[-1]), float(shares.high[-1]))
        ci = {"fresh": "exact", "recent": "pointwise", "served": "none"}[population]
        floors = self._floor(n)
        found = {name: Gauge(value, *bounds[name], n, ci, floors.get(name, math.nan)) for name, value in values.items()}
        reference = self.bundle.reference
        distance, clipped = frechet(reference.feature_mean, reference.feature_cov, sketch.mean, sketch.covariance)
        self.frechet_clipped += clipped
        found["frechet"] = Gauge(distance, math.nan, math.nan, n, "none", floors["frechet"])
        if population == "served":
            mmd = self._embedding.mmd(sketch.embedded_sum, n, delta=self._delta)[0]
            return found | {"mmd": Gauge(mmd, math.nan, math.nan, n, "none", floors["mmd"])} | self._points(population, sketch.points, n)
        if (spread := self._newest_spread()) is not None:
            error = spread.reach(n, delta=self._delta) if isinstance(sketch, Sketch) else spread.reach_now(sketch.effective, delta=GAUGE_DELTA)
            found["frechet"] = Gauge(distance, *frechet_interval(distance, error), n, "asymptotic" if isinstance(sketch, Sketch) else "pointwise", floors["frechet"])
        if isinstance(sketch, Sketch):
            mmd = self._embedding.mmd(sketch.embedded_sum, n, delta=self._delta)
        else:
            mmd = self._embedding.mmd_now(sketch.embedded_sum, sketch.weight, sketch.squares, delta=GAUGE_DELTA)
        found["mmd"] = Gauge(*mmd, n, ci if math.isfinite(mmd[0]) else "none", floors["mmd"])
        return found | (self._points(population, sketch.points, n) if isinstance(sketch, Sketch) else self._points(population, self._newest.points, self._newest.count))

    def _points(self, population: str, points: Float32[ndarray, "n p"], count: int) -> dict[str, Gauge]:
        """The gauges from points themselves, in which they are quadratic. Those of a block are read when another one begins and when it
        has doubled, so seldom that all readings can share GAUGE_DELTA; the recent ones anew as soon as every point is another one."""
        start = 0 if population == "recent" else self._blocks[population].start
        since, read, found = self._point_gauges.get(population, (start, 0, {}))
        if since != start or _outdated(read, count, NEWEST if population == "recent" else math.inf):
            floors, values, bounds = self._floor(len(points)), self._cloud.gauges(points), {}
            delta, ci = (self._delta / READINGS, "asymptotic") if population == "fresh" else (GAUGE_DELTA, "pointwise")
            if math.isfinite(values["kid"]) and population != "served":
                for name, interval in (("kid", self._real_points.kid_interval), ("sliced_wasserstein", self._real_points.sliced_wasserstein_interval)):
                    bounds[name] = (*interval(values[name], points, delta=delta), len(points), ci)
            none = (math.nan, math.nan, len(points), "none")
            found = {name: Gauge(value, *bounds.get(name, none), floors[name]) for name, value in values.items()}
            self._point_gauges[population] = (start, count, found)
        return found

    def _newest_spread(self) -> Spread | None:
        """That of the newest points, once a block: in 64 dimensions it takes as long as all gauges of points together."""
        read, spread = self._spread
        if _outdated(read, self._newest.count, BLOCK):
            points = self._newest.points
            spread = moments_spread(points) if len(points) >= LEAST else None
            self._spread = (self._newest.count, spread)
        return spread

    def _floor(self, n: int) -> dict[str, float]:
        """What n samples of the real data itself would read, n rounded down to a power of two. Shares: the mean over FLOOR_DRAWS
        draws of n real cells; mmd: the root of the standard deviation that its unbiased square has around zero, sqrt(2 tr C^2)
        (1 / n + 1 / m) against m real points, C the covariance of embedded ones (Gretton et al., JMLR 2012); the rest: other real points.
        Where the bundle has not nearly as many, as the sum of several monitors may want, frechet is its first-order mean,
        tr G / n for the samples and tr G / N for the N real ones whose moments are given (`asymptotic.moments_spread`)."""
        n = 1 << (n.bit_length() - 1)
        if n not in self._floors:
            draws = np.random.default_rng(n).multinomial(n, self._real / self._real.sum(), FLOOR_DRAWS)
            read = [self._divergences(draw) for draw in draws]
            floors = {name: float(np.mean([r[name] for r in read])) for name in DIVERGENCES}
            floors |= {"mode_coverage": float(covered(self._real, draws / n).mean()), "off_manifold": float(self._real[-1] / self._real.sum())}
            points, real = self._spare[:n].astype(np.float64), self.bundle.reference
            floors |= dict.fromkeys(("frechet", "mmd", *POINT_GAUGES), math.nan)
            if self._embedding.count and len(self._spare) >= LEAST:
                variety = float((np.cov(self._embedding(self._spare).T.astype(np.float64)) ** 2).sum())
                floors["mmd"] = math.sqrt(math.sqrt(2 * variety) * (1 / n + 1 / self._embedding.count))
            if len(points) >= 0.9 * n:
                floors["frechet"] = frechet(real.feature_mean, real.feature_cov, points.mean(axis=0), np.cov(points.T, bias=True).reshape(real.feature_cov.shape))[0]
                floors |= self._cloud.gauges(points[:NEWEST])
            elif len(points) >= LEAST:
                floors["frechet"] = moments_spread(points[:NEWEST]).trace * (1 / n + 1 / real.count)
            self._floors[n] = floors
        return self._floors[n]

    def modes(self, population: str = "fresh") -> list[dict[str, Any]]:
        """The K modes, then the off-manifold cell: real, certified and served shares, bounds of the latter, status.

        Status: alarmed, covered or dropped where the bounds prove it, else uncertain; unwatched where even the loss of the whole
        mode would take more than UNWATCHED samples to be seen. The bounds are those of the population's gauges: exact of "fresh",
        pointwise of "recent"; "served" has none, so that nothing is proven by it.
        """
        sketch = self._sketch(population)
        names = (*self.bundle.card.modes, "off-manifold")
        served = low = high = np.full(len(names), np.nan)
        status = ["uncertain"] * len(names)
        if sketch.count:
            served = (shares := self._shares(sketch)).centre
        if sketch.count and population != "served":
            low, high = shares.low, shares.high
            certain = "covered" if shares.high[-1] >= self._real[-1] else "uncertain"
            status = [*mode_status(mode_coverage(self._real, shares)), certain]
        blind = [*(self._delays > UNWATCHED), False]
        status = ["alarmed" if name in self.verdict.modes else "unwatched" if b else s for name, b, s in zip(names, blind, status, strict=True)]
        if self.verdict.id == "off_manifold":
            status[-1] = "alarmed"
        columns = zip(names, self.bundle.reference.cell_share, self._certified, served, low, high, status, strict=True)
        keys = ("name", "reference", "certified", "served", "low", "high", "status")
        return [dict(zip(keys, (row[0], *map(float, row[1:6]), row[6]), strict=True)) for row in columns]

    def coverage(self, population: str = "fresh") -> dict[str, int]:
        """How many modes the real data have, and of how many the samples of a population show or prove what, by the same bounds as
        `modes`: "served" proves nothing. Unwatched modes are counted besides: what is said of them rests on the estimate alone, no alarm would tell of their loss."""
        found = {"real": len(self.bundle.card.modes), "covered": 0, "certainly_covered": 0, "certainly_dropped": 0}
        sketch = self._sketch(population)
        if sketch.count:
            coverage = mode_coverage(self._real, self._shares(sketch))
            found["covered"] = round(coverage.value * found["real"])
            if population != "served":
                found |= {"certainly_covered": int(coverage.surely_covered.sum()), "certainly_dropped": int(coverage.surely_dropped.sum())}
        return found | {"unwatched": int((self._delays > UNWATCHED).sum())}

    def snapshot(self) -> dict[str, Any]:
        """Everything there is to show of this version, JSON-able; what is not finite is None."""
        card, verdict = self.bundle.card, self.verdict
        gauges = {population: {name: asdict(g) for name, g in self.gauges(population).items()} for population in POPULATIONS}
        counted = {"monitored": self.monitored - self._since, "given": self.given - self._given_since, "threshold": self._detector.threshold}
        return _jsonable(
            {
                "model": card.model,
                "version": card.version,
                "verdict": {**asdict(verdict), "since_sample": self.first_alarm, "since": self.alarmed_at},
                "monitored": self.monitored,
                "given": self.given,
                "served": self.served,
                "rejected": dict(self.rejected),
                "frechet_clipped": self.frechet_clipped,
                "evidence": self.evidence(),
                "log10_threshold": self.log10_threshold,
                "arl": self.arl,
                "slack": self.slack,
                "budget": {"version": self.share, "families": {f: {"null": NULLS[f], "weight": w} for f, w in FAMILIES.items()}},
                "gauges": gauges,
                "tolerance": self.tolerance,
                "modes": self.modes(),
                "coverage": self.coverage(),
                "replay": {"checked": self.replay_checked, "mismatched": self.replay_mismatched, "suspect": self.suspect},
                "rerun": {"checked": self.rerun_checked, "mismatched": self.rerun_mismatched, "latents": self.latents_checked, "latents_wrong": self.latents_wrong},
                "detectable": detectable(self.bundle.certificate, self._bounds, card.modes, **counted),
            }
        )

    def _judge(self, at: float | None = None) -> None:
        """The verdict as of now; `at` is the time of an alarm that is raised by it."""
        if self.first_alarm is None and self._suspected is not None:
            patience = SHORT_PATIENCE if self._near or self._replaced else AUDIT_PATIENCE
            self._wrong = self._suspected + patience - 1 if self.eaten - self._suspected >= patience else None
        if self.first_alarm is not None and self.alarmed_at is None:
            self.alarmed_at = at
        groups = [g for d in self._detectors.values() for g, named in zip(d.groups, d.named, strict=True) if named]
        if groups or self._misdrawn is not None:
            misdrawn = (self.latents_wrong, self.latents_checked) if self._misdrawn is not None else None
            self.verdict = diagnose(groups, self.bundle.card.modes, classes=self.bundle.card.classes, passed_as=self.passed_as, misdrawn=misdrawn)
            if self._replaced:
                self.verdict = replaced(self.verdict, self._wrong_model())
        elif self._wrong is not None:
            self.verdict = self._wrong_model()
        elif self.monitored - self._since < WARM_UP:
            self.verdict = warming_up(given=self.given > self._given_since)
        else:
            self.verdict = VERDICTS["demand_shift" if self.demand_shifted else "healthy"]

    def _wrong_model(self) -> Verdict:
        again = self._again or {"checked": 0, "different": 0, "worst": 0.0}
        served = Compared(int(again["checked"]), int(again["different"]), self._near, again["worst"])
        return wrong_model(golden=(self._golden[0], self._golden[1]), served=served, levels=self.bundle.card.is_image)

    def _tolerance(self) -> dict[str, dict[str, float]]:
        ours, real = self.bundle.certificate, self.bundle.reference
        certified = self._divergences(ours.cell_count)
        certified["frechet"] = frechet(real.feature_mean, real.feature_cov, ours.feature_mean, ours.feature_cov)[0]
        unit = {"frechet": float(np.trace(real.feature_cov))}
        return {name: {"certified": v, "threshold": v + TOLERANCES[name] * unit.get(name, 1.0)} for name, v in certified.items()}

    def _divergences(self, counts: ndarray) -> dict[str, float]:
        """Plug-in estimates; where one is infinite, that of the shares with half a sample added to each cell."""
        plain, finite = counts / counts.sum(), smoothed(counts)
        values = {name: divergence(self._real, plain) for name, divergence in DIVERGENCES.items()}
        return {name: v if math.isfinite(v) else DIVERGENCES[name](self._real, finite) for name, v in values.items()}


def _outdated(read: int, count: int, after: int | float) -> bool:
    """Whether what was read at `read` samples is to be read again at `count`: `after` samples later, once there are twice as many, or
    where there are fewer than there were."""
    return not read <= count < min(2 * read, read + after)


def _begins_anew(name: str, state: Mapping[str, Any]) -> bool:
    """Whether this is of the gauges of a state that does not count what its points are of, or of bets that it does not know, see `Monitor.restore`."""
    part = name.partition(".")[0]
    return (part in ("fresh", "served", "recent", "newest") and "newest.count" not in state) or (part == "fakes" and "fakes.named" not in state)


def _check_array(name: str, found: Any, own: ndarray) -> None:
    """Raise ValueError where `found` could not have been in the place of `own`."""
    free = own.ndim if name == "detector.block" else int(name.endswith("points"))  # leading axes that grow with what was seen
    if not isinstance(found, ndarray) or found.dtype != own.dtype or found.ndim != own.ndim or found.shape[free:] != own.shape[free:]:
        about = f"{found.dtype} {list(found.shape)}" if isinstance(found, ndarray) else repr(found)[:50]
        raise ValueError(f"{name} is {about}; expected {own.dtype} {list(own.shape)}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if name.endswith(".streams") and found < 1:
        raise ValueError(f"{name} is {found}; expected how many monitors are summed up")
    if name == "newest.count" and found < 0:
        raise ValueError(f"{name} is {found}; expected a count")
    if name.rpartition(".")[2].removeprefix("closed_").removeprefix("open_") in ("cells", "r", "r_modes", "r_quality") and (found < 0).any():
        raise ValueError(f"{name} is negative somewhere")


def _earliest(*times: Any) -> Any:
    return min((t for t in times if t is not None), default=None)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["FAMILIES", "GAUGES", "POPULATIONS", "VERDICTS", "Gauge", "Monitor", "Verdict"]
