"""Which requests pass Ray Serve's bookkeeping. That they are answered as ever is tested behind HAProxy, in test_deployment.py."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from serving import ingress
from serving.asgi import respond


def saying(word: bytes):
    async def application(scope, receive, send):
        await respond(send, 200, word, "text/plain")

    return application


@pytest.fixture
def nobody_here(monkeypatch):
    monkeypatch.setattr(ingress, "_here", [])


def who_answers(*paths: str, root_path: str = "") -> list[str]:
    async def ask() -> list[str]:
        (middleware,) = ingress.middlewares()
        transport = httpx.ASGITransport(middleware.cls(saying(b"ray"), *middleware.args, **middleware.kwargs), root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
            return [(await client.post(path)).text for path in paths]

    return asyncio.run(ask())


def test_paths_of_models_go_straight_to_the_application_and_all_others_through_ray(nobody_here):
    paths = ["/v1/models/digits/sample", "/v2/models/digits/infer", "/v1/models", "/-/healthz", "/v2/health/ready", "/openapi.json", "/elsewhere/v1/models/digits/sample"]
    assert who_answers(*paths) == ["ray"] * 7, "before there is an application"
    ingress.answers(saying(b"ours"))
    assert who_answers(*paths) == ["ours", "ours", *["ray"] * 5]
    assert who_answers("/base/v1/models/digits/sample", "/v1/models/digits/sample", root_path="/base") == ["ours", "ray"]
