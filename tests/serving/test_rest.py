"""The HTTP surface, driven in-process: the seed contract, every bad input, and what a client that leaves disturbs (nothing)."""

import asyncio
import io
import json
import threading
from itertools import pairwise

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.batcher import Batcher
from serving.models import Model, ModelTable
from serving.openapi import MAX_OFFSET, MAX_SAMPLES, document
from serving.rest import App
from serving.sampler import Sampler, Window
from serving.service import Service
from serving.tap import Tap
from tests.serving.conftest import CLASSES, connect, publish, running
from training.bundle import SEED_LIMIT
from training.registry import Registry

NPY = {"Accept": "application/x-npy"}
DIGITS = "/v1/models/digits/sample"


def talk(registry, conversation, **options):
    """The result of `conversation(client, app)` with an app over `registry`."""

    async def scene():
        async with running(registry, **options) as app, connect(app) as client:
            return await conversation(client, app)

    return asyncio.run(scene())


def ask(registry, method, path, **arguments) -> httpx.Response:
    return talk(registry, lambda client, app: client.request(method, path, **arguments))


def array(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content), allow_pickle=False)


def served(sampler: Sampler) -> Model:
    return Model(aliases={"production": sampler.card.version}, serving={"production": sampler})


def error(answer: httpx.Response) -> dict:
    fields = json.loads(answer.content)["error"]
    assert fields.keys() == {"code", "message", "field", "value", "expected", "request_id"}
    assert fields["message"]
    assert fields["request_id"] == answer.headers["x-request-id"]
    return fields


def test_the_answer_says_which_rows_it_holds(registry, samplers):
    answer = ask(registry, "POST", DIGITS, json={"n": 3, "seed": 7, "offset": 5})
    fields = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert {k: answer.headers[f"x-ganwatch-{k}"] for k in ("model", "version", "seed", "offset")} == {
        "model": "digits",
        "version": "v1",
        "seed": "7",
        "offset": "5",
    }
    assert {k: fields[k] for k in ("model", "version", "seed", "offset")} == {
        "model": "digits",
        "version": "v1",
        "seed": 7,
        "offset": 5,
    }
    assert np.array(fields["samples"]).shape == (3, 8, 8, 1)


def test_a_seed_that_the_server_drew_gives_the_same_samples_again(registry):
    async def conversation(client, app):
        first = await client.post(DIGITS, json={"n": 4}, headers=NPY)
        other = await client.post(DIGITS, json={"n": 4}, headers=NPY)
        again = await client.post(DIGITS, json={"n": 4, "seed": int(first.headers["x-ganwatch-seed"])}, headers=NPY)
        return first, other, again

    first, other, again = talk(registry, conversation)
    assert 0 <= int(first.headers["x-ganwatch-seed"]) < 2**53
    np.testing.assert_array_equal(array(first), array(again))
    assert first.headers["x-ganwatch-seed"] != other.headers["x-ganwatch-seed"]


windows = st.tuples(st.sampled_from([0, 7, SEED_LIMIT - 1]), st.sampled_from([0, 1, 30, 2**62]), st.integers(1, 60))


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["digits", "ring", "clothes"]),
    st.lists(windows, min_size=1, max_size=4),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_split_requests_in_any_order_on_two_replicas_make_up_the_whole(samplers, model, asked, pieces, random):
    """The seed contract, through HTTP: whatever runs beside a request, on whichever replica."""

    def replica() -> App:
        table = ModelTable(Registry("nowhere"), "cpu")
        table.models = {name: served(sampler) for name, sampler in samplers.items()}
        return App(Service(table, Batcher(batch=16, turn=4), Tap(None)))

    requests = []  # (which window, its row, replica, body), drawn before anything runs
    for index, (seed, offset, count) in enumerate(asked):
        cuts = sorted({0, count, *(random.randrange(count) for _ in range(pieces))})
        for start, end in pairwise(cuts):
            requests.append((index, start, random.randrange(2), {"n": end - start, "seed": seed, "offset": offset + start}))
    random.shuffle(requests)

    async def scene():
        apps = [replica(), replica()]
        clients = [connect(app) for app in apps]
        try:
            answers = await asyncio.gather(
                *(clients[at].post(f"/v1/models/{model}/sample", json=body, headers=NPY) for _, _, at, body in requests)
            )
        finally:
            for app, client in zip(apps, clients, strict=True):
                await client.aclose()
                await app.service.batcher.close()
        return [(index, start, array(answer)) for (index, start, _, _), answer in zip(requests, answers, strict=True)]

    parts = asyncio.run(scene())
    for index, (seed, offset, count) in enumerate(asked):
        joined = np.concatenate([rows for _, _, rows in sorted((p for p in parts if p[0] == index), key=lambda p: p[1])])
        np.testing.assert_array_equal(joined, samplers[model].sample([Window(seed, offset, count)]))


def test_formats(registry):
    async def conversation(client, app):
        body = {"n": 5, "seed": 1}
        return [
            await client.post("/v1/models/clothes/sample", json=body, headers={"Accept": accept})
            for accept in ("application/x-npy", "application/json", "image/png")
        ]

    npy, text, png = talk(registry, conversation)
    np.testing.assert_array_equal(array(npy), np.array(text.json()["samples"], np.uint8))
    with Image.open(io.BytesIO(png.content)) as image:
        assert image.size == (12, 8)
        np.testing.assert_array_equal(np.asarray(image)[:4, :4], array(npy)[0])


def test_labels_by_name_and_index(registry):
    async def conversation(client, app):
        return [
            array(await client.post("/v1/models/clothes/sample", json={"n": 9, "seed": 1, "label": label}, headers=NPY))
            for label in (CLASSES[2], 2, 0)
        ]

    by_name, by_index, other = talk(registry, conversation)
    np.testing.assert_array_equal(by_name, by_index)
    assert (by_name != other).any()


def test_integers_may_be_written_as_json_allows(registry, samplers):
    answer = ask(registry, "POST", "/v1/models/clothes/sample", content=b'{"n": 2.0, "seed": 7e0, "label": 1.0, "offset": 30e-1}', headers=NPY)
    np.testing.assert_array_equal(array(answer), samplers["clothes"].sample([Window(7, 3, 2, label=1)]))


def test_n_at_the_limit_comes_whole(registry):
    assert array(ask(registry, "POST", "/v1/models/ring/sample", json={"n": MAX_SAMPLES, "seed": 3}, headers=NPY)).shape == (
        MAX_SAMPLES,
        2,
    )


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        ({"n": 0}, "n", 0),
        ({"n": -1}, "n", -1),
        ({"n": 1.5}, "n", 1.5),
        ({"n": "4"}, "n", "4"),
        ({"n": True}, "n", True),
        ({"n": None}, "n", None),
        ({"n": MAX_SAMPLES + 1}, "n", MAX_SAMPLES + 1),
        ({"seed": -1}, "seed", -1),
        ({"seed": SEED_LIMIT}, "seed", SEED_LIMIT),
        ({"seed": 2.0**60}, "seed", 2.0**60),
        ({"seed": "seven"}, "seed", "seven"),
        ({"offset": -1}, "offset", -1),
        ({"offset": MAX_OFFSET + 1}, "offset", MAX_OFFSET + 1),
        ({"truncation": 0}, "truncation", 0),
        ({"truncation": 1.01}, "truncation", 1.01),
        ({"truncation": -0.5}, "truncation", -0.5),
        ({"truncation": "half"}, "truncation", "half"),
        ({"truncation": False}, "truncation", False),
        ({"label": 3}, "label", 3),
        ({"count": 3}, "count", 3),
        ({"stream": 1}, "stream", 1),
        ({"dtype": "float16"}, "dtype", "float16"),
        ({"interpolate": [1]}, "interpolate", [1]),
        ({"interpolate": [1, -2]}, "interpolate", [1, -2]),
        ({"interpolate": [1, 2], "seed": 1}, "seed", 1),
        ({"interpolate": [1, 2], "truncation": 0.5}, "truncation", 0.5),
        ({"z": []}, "z", [0]),
        ({"z": [[1, 2], [3]]}, "z", [[1, 2], [3]]),
        ({"z": [[10**30, 0.5]]}, "z", [[10**30, 0.5]]),
        ({"z": [["1"] * 16]}, "z", [["1"] * 16]),
        ({"z": [[0.0] * 16, [1.1e6, *[0.0] * 15]]}, "z", str([np.float32(1.1e6).item(), *[0.0] * 15])),
        ({"z": [[0.0] * 15]}, "z", [1, 15]),
        ({"z": [[0.0] * 15 + [True]]}, "z", [[0.0] * 15 + [True]]),
        ({"z": [[0.0] * 16], "seed": 3}, "seed", 3),
        ({"z": [[0.0] * 16], "n": 2}, "n", 2),
    ],
)
def test_a_wrong_field_is_named(registry, fields, field, value):
    answer = ask(registry, "POST", DIGITS, json=fields)
    assert answer.status_code == 422
    found = error(answer)
    assert (found["field"], found["value"]) == (field, value)
    assert found["expected"]


def test_the_last_rows_that_can_be_named_can_be_had(registry):
    body = {"n": MAX_SAMPLES, "seed": SEED_LIMIT - 1, "offset": MAX_OFFSET}
    assert len(array(ask(registry, "POST", "/v1/models/ring/sample", json=body, headers=NPY))) == MAX_SAMPLES


def test_a_stream_comes_as_what_has_pieces_unless_the_client_wants_what_has_none(registry):
    async def conversation(client, app):
        accepts = ("*/*", "", "application/json, application/vnd.apache.arrow.stream;q=0.5", "application/json", "image/png")
        return [await client.post(DIGITS, json={"n": 2, "stream": True}, headers={"Accept": accept}) for accept in accepts]

    *fine, text, picture = talk(registry, conversation)
    assert [answer.headers["content-type"] for answer in fine] == ["application/x-npy", "application/x-npy", "application/vnd.apache.arrow.stream"]
    for answer in (text, picture):
        assert (answer.status_code, error(answer)["field"]) == (422, "stream")


def test_labels_that_do_not_exist(registry):
    for label in (3, -1, "three", True, None, 1.5, ["nine"], ["one", "two"], []):
        answer = ask(registry, "POST", "/v1/models/clothes/sample", json={"label": label} | ({"n": 3} if label == ["one", "two"] else {}))
        assert answer.status_code == 422
        assert error(answer)["field"] == "label"
        assert "zero, one, two" in error(answer)["expected"] or label in (["one", "two"], [])
    assert error(ask(registry, "POST", DIGITS, json={"label": 0}))["message"] == "model digits has no classes"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"{",
        b"nonsense",
        b"[1]",
        b"3",
        b'{"n": 1, "n": 2}',
        b'{"truncation": NaN}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 60000,
        b'{"n": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object(registry, body):
    answer = ask(registry, "POST", DIGITS, content=body)
    assert answer.status_code == 400
    assert error(answer)["field"] == "body"


def test_a_body_of_10_mb_is_refused_declared_or_streamed(registry):
    async def stream():
        for _ in range(160):
            yield b" " * 65536

    for content in (b" " * 10_000_000, stream()):
        answer = ask(registry, "POST", DIGITS, content=content)
        assert answer.status_code == 413
        assert error(answer)["expected"] == "at most 4194304 bytes"


def test_unknown_names_are_answered_with_those_there_are(registry):
    publish(registry, "unpromoted", promote=False)
    cases = [
        ("POST", "/v1/models/digit/sample", "model", "clothes, digits, ring, unpromoted"),
        ("POST", "/v1/models/../sample", "path", "/v1/models"),
        ("POST", "/v1/models/unpromoted/sample", "model", "promote a version"),
        ("POST", "/v1/models/digits/versions/v7/sample", "version", "v1, production"),
        ("POST", "/v1/models/digits/versions/canary/sample", "version", "v1, production"),
        ("POST", "/v1/models/digits/versions//sample", "version", "v1, production"),
        ("POST", "/v1/models/digits/versions/..%2Fring%2Fv1/sample", "path", "/v1/models"),
        ("GET", "/", "path", "/v1/models"),
        ("GET", "/v1/models/", "path", "/v1/models"),
    ]
    for method, path, field, expected in cases:
        answer = ask(registry, method, path, json={})
        assert answer.status_code == 404, path
        assert error(answer)["field"] == field
        assert expected in error(answer)["expected"]


def test_other_methods_are_refused_with_the_right_one(registry):
    for method, path, allowed in [
        ("GET", DIGITS, "POST"),
        ("DELETE", DIGITS, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v2/health/live", "GET, HEAD"),
    ]:
        answer = ask(registry, method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert error(answer)["value"] == method


def test_formats_that_cannot_be_given(registry):
    for path, accept in [(DIGITS, "text/html"), ("/v1/models/ring/sample", "image/png")]:
        answer = ask(registry, "POST", path, json={}, headers={"Accept": accept})
        assert answer.status_code == 406
        assert "application/x-npy" in error(answer)["expected"]


def test_versions_and_aliases_by_path(registry):
    publish(registry, "digits", shift=1.0, promote=False)
    registry.set_alias("digits", "canary", "v2", reason="test")
    publish(registry, "digits", shift=2.0, promote=False)

    async def conversation(client, app):
        return [
            await client.post(f"/v1/models/digits/versions/{v}/sample", json={"n": 2, "seed": 1}, headers=NPY)
            for v in ("production", "v1", "canary", "v2", "v3")
        ]

    answers = talk(registry, conversation)
    assert [a.headers["x-ganwatch-version"] for a in answers] == ["v1", "v1", "v2", "v2", "v3"]
    brightness = [array(a).mean() for a in answers]
    assert brightness[0] == brightness[1] < brightness[2] == brightness[3] < brightness[4]


def test_the_list_of_models(registry):
    publish(registry, "unpromoted", promote=False)
    models = {model["name"]: model for model in ask(registry, "GET", "/v1/models").json()["models"]}
    assert models["clothes"] == {
        "name": "clothes", "state": "serving", "aliases": {"production": "v1"}, "serving": {"production": "v1"}, "errors": {},
        "sample_shape": [4, 4, 3], "dtype": "uint8", "classes": list(CLASSES), "latent_dim": 16,
        "provider": "CPUExecutionProvider",
    }  # fmt: skip
    assert models["unpromoted"]["state"] == "unpromoted"
    assert ask(registry, "GET", "/v2/health/ready").json() == {"ready": True}
    assert ask(registry, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(registry, "HEAD", "/v1/models").status_code == 200


def test_a_client_that_leaves_frees_its_place_and_disturbs_nobody(registry, samplers):
    class Slow(Sampler):
        def __init__(self, sampler):
            self.__dict__.update(sampler.__dict__)
            self.entered, self.gate = threading.Event(), threading.Event()
            self._pace = 1.0

        def sample(self, windows):
            self.entered.set()
            assert self.gate.wait(10)
            return super().sample(windows)

    async def conversation(client, app):
        slow = Slow(samplers["digits"])
        app.service.table.models = {"digits": served(slow)}
        messages = asyncio.Queue()
        await messages.put({"type": "http.request", "body": b'{"n": 60000, "seed": 1}'})
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": DIGITS, "headers": []}
        leaving = asyncio.ensure_future(app(scope, messages.get, send))
        await asyncio.to_thread(slow.entered.wait)
        staying = asyncio.ensure_future(client.post(DIGITS, json={"n": 3, "seed": 7}, headers=NPY))
        while app.service.batcher.queued < 60003:  # the other request is on its way in
            await asyncio.sleep(0)
        await messages.put({"type": "http.disconnect"})
        await leaving
        queued = app.service.batcher.queued
        slow.gate.set()
        return sent, queued, await staying, app.service.tap.counters

    sent, queued, staying, counters = talk(registry, conversation)
    assert sent == []
    assert queued <= 3
    assert len(array(staying)) == 3
    assert counters['requests_total{model="digits",status="499"}'] == 1
    assert counters['requests_total{model="digits",status="200"}'] == 1


def test_a_model_that_fails_answers_500_and_the_next_request_is_fine(registry, samplers):
    class Failing(Sampler):
        def __init__(self, sampler):
            self.__dict__.update(sampler.__dict__)

        def sample(self, windows):
            if windows[0].seed == 666:
                raise ArithmeticError("out of numbers")
            return super().sample(windows)

    async def conversation(client, app):
        app.service.table.models = {"digits": served(Failing(samplers["digits"]))}
        return [await client.post(DIGITS, json={"seed": seed}) for seed in (666, 1)]

    failed, fine = talk(registry, conversation)
    assert (failed.status_code, fine.status_code) == (500, 200)
    assert error(failed)["message"] == "model digits failed: ArithmeticError: out of numbers"


def test_a_full_queue_answers_429(registry):
    answer = talk(registry, lambda client, app: client.post(DIGITS, json={"n": 101}), batcher=Batcher(limit=100))
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert error(answer)["field"] == "n"


def test_latents_of_the_client(registry, samplers):
    z = samplers["clothes"].card.latents(seed=5, count=6)

    async def conversation(client, app):
        bodies = [{"z": z.tolist(), "label": 1}, {"z": z.tolist()}, {"z": [[1e39] + 15 * [0]]}]
        return [await client.post("/v1/models/clothes/sample", json=body, headers=NPY) for body in bodies]

    named, drawn, infinite = talk(registry, conversation)
    np.testing.assert_array_equal(array(named), samplers["clothes"].run(z, np.full(6, 1)))
    seed = int(drawn.headers["x-ganwatch-seed"])  # which drew the classes
    np.testing.assert_array_equal(array(drawn), samplers["clothes"].sample([Window(seed, 0, 6, z=z)]))
    assert "NaN or infinity in row 0" in error(infinite)["message"]


def test_a_path_between_two_seeds(registry, samplers):
    async def conversation(client, app):
        return [
            array(await client.post("/v1/models/clothes/sample", json=body, headers=NPY))
            for body in ({"interpolate": [3, 4], "n": 7, "offset": 2}, {"interpolate": [3, 4], "n": 7, "offset": 2, "label": "one"})
        ]

    drawn, named = talk(registry, conversation)
    sampler = samplers["clothes"]
    z = sampler.card.latent.interpolate(seeds=(3, 4), offset=2, count=7)
    np.testing.assert_array_equal(drawn[0], sampler.sample([Window(3, 2, 1)])[0])  # the class too is that of its first row
    np.testing.assert_array_equal(named, sampler.run(z, np.full(7, 1)))
    np.testing.assert_array_equal(named[-1], sampler.sample([Window(4, 2, 1, label=1)])[0])


def test_a_class_for_each_sample(registry, samplers):
    answer = ask(registry, "POST", "/v1/models/clothes/sample", json={"seed": 1, "label": ["two", 0, "one"]}, headers=NPY)
    np.testing.assert_array_equal(array(answer), samplers["clothes"].sample([Window(1, 0, 3, label=(2, 0, 1))]))


def test_images_as_numbers(registry):
    async def conversation(client, app):
        bodies = [{"n": 3, "seed": 1}, {"n": 3, "seed": 1, "dtype": "float32"}]
        pages = [await client.post(DIGITS, json=body, headers=NPY) for body in bodies]
        raw = await client.post(DIGITS, json=bodies[1], headers={"Accept": "application/octet-stream"})
        picture = await client.post(DIGITS, json=bodies[1], headers={"Accept": "image/png"})
        return *pages, raw, picture

    as_bytes, as_numbers, raw, picture = talk(registry, conversation)
    np.testing.assert_allclose(array(as_numbers) * 255, array(as_bytes), atol=1e-4)
    assert (raw.headers["x-ganwatch-shape"], raw.headers["x-ganwatch-dtype"]) == ("3,8,8,1", "float32")
    np.testing.assert_array_equal(np.frombuffer(raw.content, np.float32).reshape(3, 8, 8, 1), array(as_numbers))
    assert (picture.status_code, error(picture)["field"]) == (422, "dtype")


def test_a_client_says_how_long_it_waits(registry, samplers):
    class Stuck(Sampler):
        def __init__(self, sampler):
            self.__dict__.update(sampler.__dict__)
            self.gate, self._pace = threading.Event(), 1.0

        def sample(self, windows):
            assert self.gate.wait(10)
            return super().sample(windows)

    async def conversation(client, app):
        stuck = Stuck(samplers["digits"])
        app.service.table.models = {"digits": served(stuck)}
        answers = [await client.post(DIGITS, json={"n": 9, "stream": True}, headers={"X-Ganwatch-Timeout": "0.01", **NPY})]
        answers += [await client.post(DIGITS, json={}, headers={"X-Ganwatch-Timeout": text}) for text in ("0.01", "0", "soon", "nan", "1_0")]
        stuck.gate.set()
        return answers

    stream, late, *wrong = talk(registry, conversation)
    for answer in (stream, late):
        assert answer.status_code == 504
        assert error(answer)["code"] == "deadline_exceeded"
    assert all(answer.status_code == 422 and error(answer)["field"] == "X-Ganwatch-Timeout" for answer in wrong)


def test_an_answer_that_would_exceed_a_gigabyte_is_refused_for_good(registry):
    """No retry could help: so it is the request that is wrong, and told what would be right."""
    publish(registry, "large", shape=(128, 128, 3))
    most = 2**30 // (128 * 128 * 3)
    refused = ask(registry, "POST", "/v1/models/large/sample", json={"n": most + 1})
    assert (refused.status_code, error(refused)["expected"]) == (422, f"an integer from 1 to {most}")
    paths = ask(registry, "GET", "/openapi.json").json()
    index = next(i for i, name in enumerate(sorted(("clothes", "digits", "large", "ring"))) if name == "large")
    assert paths["components"]["schemas"][f"Draw{index}"]["oneOf"][0]["properties"]["n"]["maximum"] == most
    assert Batcher().limit_bytes >= most * 128 * 128 * 3


def test_every_answer_is_in_the_document(registry):
    """The statuses that the tests above provoke are those that the document lists, and each model says what it takes."""
    publish(registry, "unpromoted", promote=False)
    found = ask(registry, "GET", "/openapi.json").json()
    paths, schemas = found["paths"], found["components"]["schemas"]
    assert [path for path in paths if path.endswith("/sample")] == [
        f"/v1/models/{name}{under}/sample" for name in ("clothes", "digits", "ring") for under in ("", "/versions/{version}")
    ]
    listed = paths["/v1/models/clothes/sample"]["post"]["responses"].keys()
    assert listed == {"200", "400", "404", "406", "413", "415", "422", "429", "500", "503", "504"}
    for path, item in paths.items():
        assert ("post" in item) == path.endswith(("/sample", "/infer", "/index"))
    assert schemas["Draw0"]["oneOf"][0]["properties"]["label"]["enum"] == [*CLASSES, 0, 1, 2]
    assert "image/png" not in paths["/v1/models/ring/sample"]["post"]["responses"]["200"]["content"]
    assert found == json.loads(json.dumps(talk(registry, lambda client, app: as_coroutine(document(app.service.table.models)))))


async def as_coroutine(value):
    return value
