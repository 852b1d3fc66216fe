"""Probes: samples that the monitor asks for through the endpoint that everybody uses, when clients draw too few fresh ones.

They come back through the tap like anybody's, marked as probes, so that a fault is found also while all clients send seeds or
nobody asks for anything. It does not look at the samples in the answers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping

import httpx

HEADER = {"X-Ganwatch-Probe": "1", "Accept": "application/x-npy"}
OUTCOMES = ("ok", "refused", "timeout", "unreachable")
PERIOD = 1.0  # seconds between rounds
TIMEOUT = 2.0  # seconds a request may take


class Prober:
    """Tops up fresh samples to `rate` a second, for every model whose production version is watched.

    `fresh_rates` says, when called, how many fresh samples a second clients draw of each model. What the probes themselves bring
    back is not counted: a tap that drops some of them must not be asked for more.
    """

    def __init__(self, serving_url: str, rate: int, fresh_rates: Callable[[], Mapping[str, float]]) -> None:
        self.url, self.rate, self.fresh_rates = serving_url.rstrip("/"), rate, fresh_rates
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (model, outcome) -> requests
        self.trouble: dict[str, str] = {}  # model -> why its last probe failed
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
