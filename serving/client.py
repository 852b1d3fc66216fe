"""Samples from an application:

    with Client("http://127.0.0.1:8000") as client:
        digits = client.sample("digits", 64, seed=7).array  # uint8 [64, 8, 8, 1]

Needs numpy and httpx.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
from numpy import ndarray

from serving.errors import ServingError

_PAGE = 65536  # rows a server gives in one answer


@dataclass(frozen=True)
class Samples:
    """Rows offset .. offset + len(array) of `seed`: asking for them again gives them again."""

    array: ndarray  # uint8 [n, h, w, c] or float32 [n, d]
    seed: int
    offset: int
    model: str
    version: str


class Client:
    """A connection to a ganwatch server. Raises ServingError in the server's words, ConnectionError where none answers."""

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout: float = 60.0) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout)

    def sample(
        self,
        model: str,
        n: int = 1,
        *,
        seed: int | None = None,
        offset: int = 0,
        label: int | str | None = None,
        truncation: float = 1.0,
        version: str | None = None,
    ) -> Samples:
        """`n` samples of `model`; more than a server gives at once are fetched page by page from one version.

        `label`: a class by name or index. `truncation`: in (0, 1], the central mass of the latents that is kept.
        `version`: a version or an alias; None is production.
        """
        pages: list[Samples] = []
        done = 0
        while not pages or done < n:
            body = {"n": min(n - done, _PAGE), "offset": offset + done, "truncation": truncation}
            body |= {name: value for name, value in (("seed", seed), ("label", label)) if value is not None}
            page = self._page(model, version, body)
            pages.append(page)
            done += len(page.array)
            seed, version = page.seed, page.version
        array = pages[0].array if len(pages) == 1 else np.concatenate([page.array for page in pages])
        return Samples(array, pages[0].seed, offset, model, pages[0].version)

    def models(self) -> list[dict[str, Any]]:
        """What the server knows of each model."""
        return self._send("GET", "/v1/models").json()["models"]

    def ready(self) -> bool:
        """Whether every production model is loaded."""
        try:
            return self._send("GET", "/v2/health/ready").is_success
        except (ServingError, ConnectionError):
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _page(self, model: str, version: str | None, body: dict[str, Any]) -> Samples:
        path = (
            f"/v1/models/{quote(model, safe='')}"
            + ("" if version is None else f"/versions/{quote(version, safe='')}")
            + "/sample"
        )
        answer = self._send("POST", path, json=body, headers={"Accept": "application/x-npy"})
        about = {name: answer.headers[f"X-Ganwatch-{name}"] for name in ("Seed", "Offset", "Model", "Version")}
        array = np.load(io.BytesIO(answer.content), allow_pickle=False)
        return Samples(array, int(about["Seed"]), int(about["Offset"]), about["Model"], about["Version"])

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            try:
                answer = self._http.request(method, path, **arguments)
            except (
                httpx.NetworkError,
                httpx.RemoteProtocolError,
            ):  # a replica died; asking twice changes nothing, and another one answers
                answer = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise ConnectionError(
                f"no answer from {self._http.base_url}: {error}; is the server up (`ganwatch status`)?"
            ) from error
        if not answer.is_success:
            raise ServingError.parse(answer.status_code, answer.content)
        return answer
