"""What the monitor asks of the server itself, through the endpoint that everybody uses: probes of every watched version of which
clients draw too few fresh samples, and its golden samples, when it comes under watch and once a minute.

Probes come back through the tap like anybody's, marked as such, so that a fault is found also while all clients send seeds or
nobody asks for anything; their answers are not looked at. What a candidate was probed with, production is asked for again by
seed, so that the monitor can compare what the two make of the same latents.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from monitoring.audit import Compared, replay
from training.bundle import Bundle

HEADER = {"X-Ganwatch-Probe": "1", "Accept": "application/x-npy"}  # the mark of a probe; whoever sends a seed is a client all the same
OUTCOMES = ("ok", "refused", "timeout", "unreachable", "unpaired")  # the last: production was asked for a candidate's rows, in vain
PERIOD = 1.0  # seconds between rounds
TIMEOUT = 2.0  # seconds a request may take
PAIRS = 16  # samples a second of each candidate that are drawn for the comparison's sake alone
AUDIT_PERIOD = 60.0  # seconds between replays of the golden samples of a version
AUDIT_GRACE = 10.0  # seconds for which an audit may fail in silence: replicas load a new version after the monitor does


@dataclass(frozen=True)
class Target:
    """A watched version: how many fresh samples a second clients draw of it, and which one it is compared with, if any."""

    model: str
    version: str
    fresh: float
    against: str | None = None


class Prober:
    """Tops up fresh samples to `rate` a second, for every version that an alias names.

    `targets` says, when called, what is watched. What the probes themselves bring back does not count as drawn by clients: a
    tap that drops some of them must not be asked for more. `bundles` says which versions to audit, and
    `audited` is told of each audit: the bundle, and what came of it.
    """

    def __init__(
        self,
        serving_url: str,
        rate: int,
        targets: Callable[[], Sequence[Target]],
        bundles: Callable[[], list[Bundle]],
        audited: Callable[[Bundle, Compared], None],
    ) -> None:
        self.url, self.rate, self.targets, self.bundles, self.audited = serving_url.rstrip("/"), rate, targets, bundles, audited
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (model, outcome) -> requests
        self.trouble: dict[tuple[str, str], str] = {}  # (model, version) -> why its last probe failed
        self.audit_trouble: dict[str, str] = {}  # directory of a bundle -> why its audit fails
        self._due: dict[str, float] = {}  # ... -> time.monotonic() of the next audit
        self._failing_since: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once the request under way has ended, at most TIMEOUT later."""
        self._stopping.set()
        self._thread.join()

    def hurry(self, bundle: Bundle) -> None:
        """Audit a version with the next round, not only when it is its turn."""
        self._due.pop(str(bundle.path), None)

    def _run(self) -> None:
        with httpx.Client(headers=HEADER, timeout=TIMEOUT, trust_env=False) as client:
            while not self._stopping.wait(PERIOD):
                targets = self.targets()
                watched = {(target.model, target.version) for target in targets}
                self.trouble = {key: words for key, words in self.trouble.items() if key in watched}
                for target in targets:
                    least = min(self.rate, PAIRS) if target.against is not None else 0
                    count = round(max(self.rate - target.fresh, least) * PERIOD)
                    if count >= 1 and not self._stopping.is_set():
                        self._probe(client, target, count)
                bundles = {str(bundle.path): bundle for bundle in self.bundles()}
                self.audit_trouble = {path: words for path, words in self.audit_trouble.items() if path in bundles}
                for path, bundle in bundles.items():
                    if (bundle.card.model, bundle.card.version) not in self.trouble and not self._stopping.is_set():
                        self._audit(client, path, bundle)

    def _audit(self, client: httpx.Client, path: str, bundle: Bundle) -> None:
        now = time.monotonic()
        if now < self._due.get(path, now):
            return
        try:
            found = replay(client, self.url, bundle)
        except Exception as error:  # httpx.InvalidURL has no base class of httpx's own, and the thread goes on
            if now - self._failing_since.setdefault(path, now) > AUDIT_GRACE:
                self.audit_trouble[path] = f"the replay audit of {bundle.card.model} {bundle.card.version} fails: {error}"
            return
        self._due[path] = now + AUDIT_PERIOD
        self._failing_since.pop(path, None)
        self.audit_trouble.pop(path, None)
        self.audited(bundle, found)

    def _probe(self, client: httpx.Client, target: Target, count: int) -> None:
        model = target.model
        url = f"{self.url}/v1/models/{model}/versions/{target.version}/sample"
        try:
            answer = client.post(url, json={"n": count})
            outcome, words = ("ok", None) if answer.status_code == 200 else ("refused", f"answered {answer.status_code}")
        except httpx.TimeoutException:
            outcome, words = "timeout", f"no answer within {TIMEOUT:g} s"
        except Exception as error:  # as above
            outcome, words = "unreachable", str(error)
        if words is None and target.against is not None:
            # Where production fails, its own probes and audit say why: the candidate has answered.
            try:
                again = {"n": count, "seed": int(answer.headers["X-Ganwatch-Seed"]), "offset": int(answer.headers["X-Ganwatch-Offset"])}
                paired = client.post(f"{self.url}/v1/models/{model}/versions/{target.against}/sample", json=again).status_code == 200
            except (httpx.HTTPError, KeyError, ValueError):
                paired = False
            self.outcomes[model, "unpaired"] += not paired
        for known in OUTCOMES:
            self.outcomes[model, known] += known == outcome
        if words is None:
            self.trouble.pop((model, target.version), None)
        else:
            self.trouble[model, target.version] = f"probes of {model} {target.version} fail: POST {url}: {words}"
