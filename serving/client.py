"""Samples from an application:

    with Client("http://127.0.0.1:8000") as client:
        digits = client.sample("digits", 64, seed=7).array  # uint8 [64, 8, 8, 1]
        for page in client.pages("digits", 1_000_000):      # the next page is drawn while this one is used
            train_on(page.array)

AsyncClient is the same for asyncio. Whatever breaks off is taken up where it broke: rows of a seed never change, and all pages
come from the version that gave the first. Needs numpy and httpx.
"""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
from numpy import ndarray

from serving.errors import ServingError

_PAGE, _PAGE_BYTES = 65536, 1 << 30  # rows, and bytes of them, that a server gives in one answer
_FEW = 256  # rows that are fewer than that whatever they are
_NPY = {"Accept": "application/x-npy"}
_BACKOFF_S = 0.2  # doubled with each attempt, where the server names no time itself
_LONGEST_WAIT_S = 30.0
# A replica that died or asks for patience; asking twice changes nothing, and another one may answer.
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)
_PATIENCE = (429, 502, 503)


@dataclass(frozen=True)
class Samples:
    """Rows offset .. offset + len(array) of `seed`: asking for them again gives them again."""

    array: ndarray  # uint8 [n, h, w, c] or float32 [n, d]
    seed: int
    offset: int
    model: str
    version: str


@dataclass(frozen=True)
class _Ask:
    """What to ask for. None leaves the choice to the server."""

    model: str
    n: int
    seed: int | None = None
    offset: int | None = None
    label: int | str | list[int | str] | None = None
    truncation: float = 1.0
    version: str | None = None
    z: ndarray | None = None
    interpolate: tuple[int, int] | None = None
    dtype: str | None = None

    def request(self) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        version = "" if self.version is None else f"/versions/{quote(self.version, safe='')}"
        fields = {"n": self.n, "seed": self.seed, "offset": self.offset, "label": self.label, "dtype": self.dtype}
        fields |= {"z": None if self.z is None else self.z.tolist(), "interpolate": self.interpolate}
        fields |= {"truncation": self.truncation} if self.truncation != 1.0 else {}
        return f"/v1/models/{quote(self.model, safe='')}{version}/sample", {k: v for k, v in fields.items() if v is not None}

    @property
    def is_one_page(self) -> bool:
        """Latents and paths are: their rows are not those of a seed."""
        return self.n < 1 or self.z is not None or self.interpolate is not None

    def pages(self, size: int) -> Iterator[tuple[int, int]]:
        """(rows before it, rows) of each page."""
        if self.is_one_page:
            size = max(self.n, 1)
        for done in range(0, max(self.n, 1), size):
            yield done, min(size, self.n - done)

    def fitting(self, models: list[dict[str, Any]]) -> int:
        """The largest page of this model, by what the server says of its models."""
        known = next((model for model in models if model["name"] == self.model and model["sample_shape"]), None)
        if known is None:
            return _PAGE
        return max(1, min(_PAGE, _PAGE_BYTES // (math.prod(known["sample_shape"]) * np.dtype(known["dtype"]).itemsize)))

    def page(self, done: int, count: int, first: Samples | None) -> _Ask:
        """The question for one page; `first`, the page that began at row 0, pins seed and version."""
        label = self.label[done : done + count] if isinstance(self.label, list) else self.label
        # Rows after those that a server chose itself may be other clients': who wants more pages asks for a seed of its own.
        own = 0 if count < self.n and self.offset is None else self.offset
        asked = replace(self, n=count, label=label, offset=own)
        return asked if first is None else replace(asked, seed=first.seed, offset=first.offset + done, version=first.version)


def _read(answer: httpx.Response) -> Samples:
    about = {name: answer.headers[f"X-Ganwatch-{name}"] for name in ("Seed", "Offset", "Model", "Version")}
    array = np.load(io.BytesIO(answer.content), allow_pickle=False)
    return Samples(array, int(about["Seed"]), int(about["Offset"]), about["Model"], about["Version"])


def _join(pages: list[Samples]) -> Samples:
    array = pages[0].array if len(pages) == 1 else np.concatenate([page.array for page in pages])
    return replace(pages[0], array=array)


class _Patience:
    """How long to wait before the next attempt. Raises what happened where there is none left."""

    def __init__(self, url: httpx.URL, retries: int) -> None:
        self._url, self._retries, self._attempt = url, retries, 0

    def after(self, outcome: httpx.Response | httpx.TransportError) -> float:
        self._attempt += 1
        wait = _BACKOFF_S * 2 ** (self._attempt - 1)
        if isinstance(outcome, httpx.Response):
            if self._attempt > self._retries or outcome.status_code not in _PATIENCE:
                raise ServingError.parse(outcome.status_code, outcome.content)
            asked = outcome.headers.get("Retry-After", "")
            return min(float(asked) if asked.isdecimal() else wait, _LONGEST_WAIT_S)
        if self._attempt > self._retries or not isinstance(outcome, _BROKEN):
            words = f"no answer from {self._url}: {outcome}; is the server up (`ganwatch status`)?"
            raise ConnectionError(words) from outcome
        return 0.0 if self._attempt == 1 else min(wait, _LONGEST_WAIT_S)


class Client:
    """A connection to a ganwatch server. Raises ServingError in the server's words, ConnectionError where none answers.

    `retries`: attempts after the first, where a connection breaks or the server asks for patience.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout: float = 60.0, retries: int = 1) -> None:
        self._http, self.retries = httpx.Client(base_url=url, timeout=timeout), retries

    def sample(self, model: str, n: int = 1, **law: Any) -> Samples:
        """`n` samples of `model`; more than a server gives at once are fetched page by page from one version.

        `law`, all optional: `seed`, and `offset`, the first row of it; `label`: a class by name or index, or a list with one for
        each sample; `truncation`: in (0, 1], the central mass of the latents that is kept; `version`: a version or an alias, else
        production; `z`: latents [n, latent_dim] instead of a seed; `interpolate`: two seeds, between which the n samples lead;
        `dtype`: "float32" for images from 0 to 1.
        """
        return _join(list(self.pages(model, n, **law)))

    def pages(self, model: str, n: int, *, size: int | None = None, **law: Any) -> Iterator[Samples]:
        """The samples of `sample` in pages of `size`, by default as many as a server gives at once, 65,536 or a gigabyte; the next
        page is fetched while this one is used."""
        ask, first = _Ask(model, _rows(n, law), **law), None
        with ThreadPoolExecutor(1, thread_name_prefix="pages") as ahead:
            waiting = None
            for done, count in ask.pages(size or self._size(ask)):
                if first is None:
                    first = self._page(ask.page(done, count, None))
                    page = first
                else:
                    page = waiting.result()
                following = done + count
                if following < ask.n:
                    waiting = ahead.submit(self._page, ask.page(following, min(count, ask.n - following), first))
                yield page

    def models(self) -> list[dict[str, Any]]:
        """What the server knows of each model."""
        return self._send("GET", "/v1/models").json()["models"]

    def ready(self) -> bool:
        """Whether every production model is loaded."""
        try:
            return self._http.get("/v2/health/ready").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _size(self, ask: _Ask) -> int:
        return _FEW if ask.n <= _FEW or ask.is_one_page else ask.fitting(self.models())

    def _page(self, ask: _Ask) -> Samples:
        path, body = ask.request()
        return _read(self._send("POST", path, json=body, headers=_NPY))

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        patience = _Patience(self._http.base_url, self.retries)
        while True:
            try:
                outcome: Any = self._http.request(method, path, **arguments)
            except httpx.TransportError as error:
                outcome = error
            else:
                if outcome.is_success:
                    return outcome
            time.sleep(patience.after(outcome))


class AsyncClient:
    """Client for asyncio: `async with AsyncClient(url) as client: await client.sample("digits", 64)`."""

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout: float = 60.0, retries: int = 1) -> None:
        self._http, self.retries = httpx.AsyncClient(base_url=url, timeout=timeout), retries

    async def sample(self, model: str, n: int = 1, **law: Any) -> Samples:
        """As Client.sample."""
        return _join([page async for page in self.pages(model, n, **law)])

    async def pages(self, model: str, n: int, *, size: int | None = None, **law: Any) -> AsyncIterator[Samples]:
        """As Client.pages. Closing the iterator cancels the page that is under way."""
        ask, first, waiting = _Ask(model, _rows(n, law), **law), None, None
        try:
            for done, count in ask.pages(size or await self._size(ask)):
                if first is None:
                    first = page = await self._page(ask.page(done, count, None))
                else:
                    page = await waiting
                following = done + count
                if following < ask.n:
                    following_ask = ask.page(following, min(count, ask.n - following), first)
                    waiting = asyncio.ensure_future(self._page(following_ask))
                yield page
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    async def models(self) -> list[dict[str, Any]]:
        return (await self._send("GET", "/v1/models")).json()["models"]

    async def ready(self) -> bool:
        try:
            return (await self._http.get("/v2/health/ready")).is_success
        except httpx.TransportError:
            return False

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _size(self, ask: _Ask) -> int:
        return _FEW if ask.n <= _FEW or ask.is_one_page else ask.fitting(await self.models())

    async def _page(self, ask: _Ask) -> Samples:
        path, body = ask.request()
        return _read(await self._send("POST", path, json=body, headers=_NPY))

    async def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        patience = _Patience(self._http.base_url, self.retries)
        while True:
            try:
                outcome: Any = await self._http.request(method, path, **arguments)
            except httpx.TransportError as error:
                outcome = error
            else:
                if outcome.is_success:
                    return outcome
            await asyncio.sleep(patience.after(outcome))


def _rows(n: int, law: dict[str, Any]) -> int:
    """The rows of latents, where there are any, decide."""
    z = law.get("z")
    return n if z is None else len(z)
