"""What a replica writes down: a line for each request, whatever became of it, never in the way of one, never more than fits."""

import asyncio
import gzip
import io
import json
import logging
import os
import re
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.client import Client
from serving.errors import InvalidValue
from serving.logs import AccessLog, Entry, accepted_id, request_id, structured
from serving.protocol import inference_pb2 as pb
from serving.sampler import Window
from tests.serving.conftest import connect, running
from tests.serving.test_client import server
from tests.serving.test_oip import calling, infer

NPY = {"Accept": "application/x-npy"}
DIGITS = "/v1/models/digits/sample"


@given(st.one_of(st.none(), st.text(max_size=200), st.from_regex(r"[A-Za-z0-9._:;=@/+-]{1,140}", fullmatch=True)))
def test_an_id_is_taken_over_only_where_it_can_stand_anywhere(given_id):
    found = accepted_id(given_id)
    assert re.fullmatch(r"[!-~]{1,128}", found)
    assert not set(found) & set("\"'\\,<>%{}")
    assert found == given_id or not re.fullmatch(r"[A-Za-z0-9._:;=@/+-]{1,128}", given_id or "")


@given(st.text(), st.text(), st.text())
def test_every_line_is_one_json_object(method, path, model):
    entry = Entry("7", method, path)
    entry.model, entry.version, entry.n, entry.seed, entry.status = model, "v1", 3, 2**63 - 1, 200
    (line,) = entry.line(1.5).splitlines()
    found = json.loads(line)
    assert (found["method"], found["path"], found["model"], found["seed"]) == (method, path, model, 2**63 - 1)


def test_each_request_is_one_line_with_what_became_of_it(registry, tmp_path):
    log = AccessLog(tmp_path / "logs" / "access.jsonl")

    async def scene():
        async with running(registry) as app, connect(app) as client:
            app.service.log = log
            log.start()
            answers = [
                await client.post(DIGITS, json={"n": 5, "seed": 7}, headers=NPY | {"X-Request-Id": "mine-1"}),
                await client.post(DIGITS, json={"n": 0}, headers={"X-Request-Id": 'no"good'}),
                await client.get("/v2/health/live"),
                await client.get('/no"where/ü'),
            ]
            await asyncio.to_thread(log.close)
            return answers

    answers = asyncio.run(scene())
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == [answer.headers["x-request-id"] for answer in answers]
    assert [line["status"] for line in lines] == [200, 422, 200, 404]
    assert [line["bytes"] for line in lines] == [len(answer.content) for answer in answers]
    drawn, refused = lines[:2]
    expected = {"request_id": "mine-1", "method": "POST", "path": DIGITS, "n": 5, "seed": 7, "model": "digits", "version": "v1"}
    assert expected.items() <= drawn.items()
    assert 0 < drawn["ms"] < 60_000
    assert refused["request_id"] != 'no"good'
    assert "seed" not in refused
    assert lines[3]["path"] == '/no"where/ü'
    assert log.dropped == 0


def test_grpc_calls_are_written_too_and_answer_with_their_id(registry, samplers, tmp_path):
    z = samplers["ring"].card.latents(seed=3, count=4)
    log = AccessLog(tmp_path / "access.jsonl")

    async def scene():
        async with calling(registry) as (app, channel):
            app.service.log = log
            log.start()
            inputs = [{"name": "z", "datatype": "FP32", "shape": z.shape}]
            method = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer", request_serializer=pb.ModelInferRequest.SerializeToString
            )
            message = pb.ModelInferRequest(
                model_name="ring", inputs=[pb.ModelInferRequest.InferInputTensor(**inputs[0])], raw_input_contents=[z.tobytes()]
            )
            call = method(message, metadata=(("x-request-id", "mine-2"),))
            await call
            metadata = dict(await call.trailing_metadata())
            with pytest.raises(Exception, match="unknown model") as refused:
                await infer(channel, inputs, model="none", raw=[z.tobytes()])
            await asyncio.to_thread(log.close)
            return metadata, dict(refused.value.trailing_metadata())

    metadata, refused = asyncio.run(scene())
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert metadata["x-request-id"] == "mine-2"
    assert [line["request_id"] for line in lines] == ["mine-2", refused["x-request-id"]]
    assert [(line["status"], line["method"], line["path"][-11:]) for line in lines] == [(200, "gRPC", "/ModelInfer"), (404, "gRPC", "/ModelInfer")]
    assert (lines[0]["n"], lines[0]["bytes"], lines[0]["version"]) == (4, 32, "v1")


def test_what_does_not_fit_is_dropped_and_counted_and_files_are_turned_over(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.logs._HELD", 100)
    log = AccessLog(tmp_path / "access.jsonl")
    for _ in range(130):
        log.add(Entry("1", "GET", "/"))
    assert log.dropped == 30
    monkeypatch.setattr("serving.logs._FILE_BYTES", 12_000)
    for _ in range(4):
        log.start()
        log.close()
        log._thread = None
        for _ in range(50):
            log.add(Entry("1", "GET", "/"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["access.1.jsonl", "access.jsonl"]
    assert log.path.stat().st_size <= 12_000
    assert all(json.loads(line) for line in log.path.read_text().splitlines())


def test_a_disk_that_refuses_costs_lines_and_no_answers(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    log = AccessLog(tmp_path / "file" / "access.jsonl")  # no directory
    log.start()
    log.add(Entry("1", "GET", "/"))
    log.close()
    assert log.dropped == 1
    assert "1 lines of the access log are lost" in caplog.text


def test_what_the_server_has_to_say_names_the_request(registry):
    lines = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("serving", "training")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    try:
        structured()
        loggers[0].handlers[0].setStream(lines)

        async def scene():
            async with running(registry) as app, connect(app) as client:
                sampler = app.service.table.models["digits"].serving["production"]
                sampler.sample = None  # whatever calls it fails
                return await client.post(DIGITS, json={}, headers={"X-Request-Id": "broken-1"})

        answer = asyncio.run(scene())
        assert answer.status_code == 500
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        request_id.set("")
    (line,) = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert (line["request_id"], line["level"], line["message"]) == ("broken-1", "ERROR", "sampling from model digits failed")
    assert "TypeError" in line["traceback"]


def test_errors_of_the_client_name_the_request(registry):
    with server(registry) as (url, _), Client(url) as client:
        with pytest.raises(InvalidValue) as refused:
            client.sample("digits", 0)
    assert re.fullmatch("[0-9a-f]{32}", refused.value.request_id)


def compressed(body, kind):
    return gzip.compress(body) if kind == "gzip" else zlib.compress(body)


@pytest.mark.parametrize("kind", ["gzip", "deflate"])
def test_bodies_may_come_compressed_and_cannot_unfold_without_bound(registry, samplers, kind):
    body = b'{"n": 3, "seed": 7}'

    async def scene():
        async with running(registry) as app, connect(app) as client:

            async def post(content, encoding=kind):
                return await client.post(DIGITS, content=content, headers=NPY | {"Content-Encoding": encoding})

            return [
                await post(compressed(body, kind)),
                await post(compressed(b" " * (4 << 20) + body, kind)),  # 4 kB on the wire
                await post(compressed(body, kind)[:-3]),
                await post(body),
                await post(compressed(body, kind), "br"),
                await post(body, "identity"),
                await post(body, ""),
            ]

    fine, bomb, cut, plain, unknown, identity, nothing = asyncio.run(scene())
    for answer in (fine, identity, nothing):
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), samplers["digits"].sample([Window(7, 0, 3)]))
    assert [answer.status_code for answer in (bomb, cut, plain, unknown)] == [413, 400, 400, 415]
    assert unknown.headers["accept-encoding"] == "gzip, deflate"
    assert "gzip, deflate" in unknown.json()["error"]["expected"]
    assert f"the body is no {kind}" in cut.json()["error"]["message"]


def test_members_of_a_gzip_body_follow_each_other(registry):
    async def scene():
        async with running(registry) as app, connect(app) as client:
            content = gzip.compress(b'{"n": 3,') + gzip.compress(b' "seed": 7}')
            return await client.post(DIGITS, content=content, headers={"Content-Encoding": "gzip"})

    assert asyncio.run(scene()).json()["seed"] == 7


def test_of_what_replicas_left_behind_the_newest_few_are_kept(tmp_path):
    names = [f"access-{i:02}{part}.jsonl" for i in range(10) for part in (".1", "")]
    for age, name in enumerate(reversed(names)):
        (tmp_path / name).write_text("{}")
        written = time.time() - 3000 - 300 * age  # the last two are being written, who knows
        os.utime(tmp_path / name, (written, written))
    (tmp_path / "monitor.log").write_text("")
    os.utime(tmp_path / "monitor.log", (0, 0))
    log = AccessLog(tmp_path / "access-new.jsonl")
    log.start()
    log.add(Entry(None, "GET", "/"))
    log.close()
    assert {file.name for file in tmp_path.iterdir()} == {*names[-10:], "access-new.jsonl", "monitor.log"}
