"""What the monitor asks of the server itself, through the endpoint that everybody uses: probes when clients draw too few fresh
samples, and the golden samples of every watched version, when it comes under watch and once a minute.

Probes come back through the tap like anybody's, marked as such, so that a fault is found also while all clients send seeds or
nobody asks for anything; their answers are not looked at.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

import httpx

from monitoring.audit import replay
from training.bundle import Bundle

HEADER = {"X-Ganwatch-Probe": "1", "Accept": "application/x-npy"}  # the mark of a probe; whoever sends a seed is a client all the same
OUTCOMES = ("ok", "refused", "timeout", "unreachable")
PERIOD = 1.0  # seconds between rounds
TIMEOUT = 2.0  # seconds a request may take
AUDIT_PERIOD = 60.0  # seconds between replays of the golden samples of a version
AUDIT_GRACE = 10.0  # seconds for which an audit may fail in silence: replicas load a new version after the monitor does


class Prober:
    """Tops up fresh samples to `rate` a second, for every model whose production version is watched.

    `fresh_rates` says, when called, how many fresh samples a second clients draw of each model. What the probes themselves bring
    back is not counted: a tap that drops some of them must not be asked for more. `bundles` says which versions to audit, and
    `audited` is told of each audit: the bundle, samples compared, samples that differ.
    """

    def __init__(
        self,
        serving_url: str,
        rate: int,
        fresh_rates: Callable[[], Mapping[str, float]],
        bundles: Callable[[], list[Bundle]],
        audited: Callable[[Bundle, int, int], None],
    ) -> None:
        self.url, self.rate, self.fresh_rates, self.bundles, self.audited = serving_url.rstrip("/"), rate, fresh_rates, bundles, audited
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (model, outcome) -> requests
        self.trouble: dict[str, str] = {}  # model -> why its last probe failed
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

    def _run(self) -> None:
        with httpx.Client(headers=HEADER, timeout=TIMEOUT, trust_env=False) as client:
            while not self._stopping.wait(PERIOD):
                rates = self.fresh_rates()
                self.trouble = {model: words for model, words in self.trouble.items() if model in rates}
                for model, fresh in rates.items():
                    count = round((self.rate - fresh) * PERIOD)
                    if count >= 1 and not self._stopping.is_set():
                        self._probe(client, model, count)
                bundles = {str(bundle.path): bundle for bundle in self.bundles()}
                self.audit_trouble = {path: words for path, words in self.audit_trouble.items() if path in bundles}
                for path, bundle in bundles.items():
                    if bundle.card.model not in self.trouble and not self._stopping.is_set():
                        self._audit(client, path, bundle)

    def _audit(self, client: httpx.Client, path: str, bundle: Bundle) -> None:
        now = time.monotonic()
        if now < self._due.get(path, now):
            return
        try:
            compared, different = replay(client, self.url, bundle)
        except (httpx.HTTPError, ValueError) as error:
            if now - self._failing_since.setdefault(path, now) > AUDIT_GRACE:
                self.audit_trouble[path] = f"the replay audit of {bundle.card.model} {bundle.card.version} fails: {error}"
            return
        self._due[path] = now + AUDIT_PERIOD
        self._failing_since.pop(path, None)
        self.audit_trouble.pop(path, None)
        self.audited(bundle, compared, different)

    def _probe(self, client: httpx.Client, model: str, count: int) -> None:
        url = f"{self.url}/v1/models/{model}/sample"
        try:
            status = client.post(url, json={"n": count}).status_code
            outcome, words = ("ok", None) if status == 200 else ("refused", f"answered {status}")
        except httpx.TimeoutException:
            outcome, words = "timeout", f"no answer within {TIMEOUT:g} s"
        except httpx.TransportError as error:
            outcome, words = "unreachable", str(error)
        for known in OUTCOMES:
            self.outcomes[model, known] += known == outcome
        if words is None:
            self.trouble.pop(model, None)
        else:
            self.trouble[model] = f"probes of {model} fail: POST {url}: {words}"
