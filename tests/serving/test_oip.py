"""The Open Inference Protocol over REST and gRPC: every bad tensor is named, and tritonclient from PyPI works unchanged."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import uvicorn

from serving import oip, rpc
from serving.batcher import Batcher
from serving.protocol import ganwatch_pb2 as own
from serving.protocol import inference_pb2 as pb
from serving.rpc import Rpc
from serving.sampler import Window
from tests.serving.conftest import connect, publish, running

ROOT = Path(__file__).parents[2]
TRITON = Path(os.environ.get("GANWATCH_TRITONCLIENT", ROOT / ".venv/tritonclient/bin/python"))
TRITON_CLIENT = Path(__file__).with_name("triton_client.py")
CLOTHES = "/v2/models/clothes/infer"


def latents(samplers, count=5):
    return samplers["clothes"].card.latents(seed=3, count=count), np.arange(count) % 3


@asynccontextmanager
async def calling(registry, **options):
    """(app, gRPC channel)."""
    async with running(registry, **options) as app:
        rpc = app.rpc = Rpc(app.service, 0)
        await rpc.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{rpc.port}") as channel:
                yield app, channel
        finally:
            await rpc.stop()


def call(channel, name, message, answer):
    method = channel.unary_unary(
        f"/inference.GRPCInferenceService/{name}", request_serializer=lambda m: m.SerializeToString(), response_deserializer=answer.FromString
    )
    return method(message)


def infer(channel, inputs, model="clothes", raw=(), **fields):
    tensors = [pb.ModelInferRequest.InferInputTensor(**each) for each in inputs]
    message = pb.ModelInferRequest(model_name=model, inputs=tensors, raw_input_contents=raw, **fields)
    return call(channel, "ModelInfer", message, pb.ModelInferResponse)


def post(registry, body, headers=None, path=CLOTHES):
    async def scene():
        async with running(registry) as app:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                return await client.post(path, content=body, headers=headers or {})

    return asyncio.run(scene())


def text(value) -> bytes:
    return json.dumps(value).encode()


def test_tensors_as_text_and_as_bytes(registry, samplers):
    z, y = latents(samplers)
    expected = samplers["clothes"].run(z, y)
    inputs = [
        {"name": "z", "datatype": "FP32", "shape": [5, 16], "data": z.tolist()},
        {"name": "y", "datatype": "INT64", "shape": [5], "data": y.tolist()},
    ]
    answer = post(registry, text({"id": "a", "inputs": inputs, "outputs": [{"name": "samples"}]})).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a", "clothes", "v1")
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("samples", "UINT8", [5, 4, 4, 3])
    np.testing.assert_array_equal(np.array(output["data"], np.uint8).reshape(5, 4, 4, 3), expected)

    for tensor, array in zip(inputs, (z, y), strict=True):
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": array.nbytes}
    head = text({"inputs": inputs, "parameters": {"binary_data_output": True}})
    binary = post(registry, head + z.tobytes() + y.tobytes(), {"Inference-Header-Content-Length": str(len(head))})
    size = int(binary.headers["inference-header-content-length"])
    assert json.loads(binary.content[:size])["outputs"][0]["parameters"] == {"binary_data_size": expected.nbytes}
    np.testing.assert_array_equal(np.frombuffer(binary.content[size:], np.uint8).reshape(expected.shape), expected)


Z = {"name": "z", "datatype": "FP32", "shape": [1, 16], "data": [0.0] * 16}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "input z is missing"),
        ([{**Z, "name": "x"}], "unknown input 'x'"),
        ([Z, Z], "an input is named 'z'"),
        ([{**Z, "datatype": "FP64"}], "datatype of z is 'FP64'"),
        ([{**Z, "datatype": {}}], "datatype of z is {}"),
        ([{**Z, "data": [10**400, *([0.5] * 15)]}], "z holds what is no FP32"),
        ([{**Z, "datatype": "INT64", "data": [0] * 16}], "z is int64"),
        ([{**Z, "shape": [16]}], "z has shape [16]"),
        ([{**Z, "shape": [2, 8]}], "z has shape [2, 8]"),
        ([{**Z, "shape": [0, 16], "data": []}], "z has shape [0, 16]"),
        ([{**Z, "shape": [-1, 16]}], "shape of z is [-1, 16]"),
        ([{**Z, "shape": "many"}], "shape of z is 'many'"),
        ([{**Z, "data": [0.0] * 15}], "z has 15 values"),
        ([{**Z, "data": ["a"] * 16}], "z holds what is no FP32"),
        ([{**Z, "data": [[0.0] * 15, [1.0]]}], "z holds what is no FP32"),
        ([{**Z, "data": [0.0] * 15 + [True]}], "z holds what is no FP32"),
        ([Z, {"name": "y", "datatype": "INT64", "shape": [1], "data": [True]}], "y holds what is no INT64"),
        ([{**Z, "data": None}], "z has no data"),
        ([{**Z, "data": [1e39] * 16}], "NaN or infinity"),
        ([{**Z, "parameters": {"binary_data_size": 64}}], "binary_data_size of z is 64"),
        ([{**Z, "parameters": 3}], "parameters is no object"),
        ([Z, {"name": "y", "datatype": "INT64", "shape": [1], "data": [3]}], "y is int64 of shape [1]"),
        ([Z, {"name": "y", "datatype": "INT64", "shape": [2], "data": [0, 1]}], "y is int64 of shape [2]"),
        ([Z, {"name": "y", "datatype": "INT64", "shape": [1], "data": [0.5]}], "y holds what is no INT64"),
        ([Z, 3], "inputs is no list of objects"),
        ("z", "inputs is no list of objects"),
    ],
)
def test_a_wrong_tensor_is_named(registry, inputs, words):
    answer = post(registry, text({"inputs": inputs}))
    assert answer.status_code == 422
    assert answer.json().keys() == {"error"}
    assert words in answer.json()["error"]


def test_bytes_that_do_not_fit_the_header(registry):
    head = text({"inputs": [{"name": "z", "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}]})
    zeros = bytes(64)
    nan = np.full(16, np.nan, np.float32).tobytes()
    for body, length, status, words in [
        (head + zeros, str(len(head) + 65), 400, "Inference-Header-Content-Length is"),
        (head + zeros, "9" * 5000, 400, "Inference-Header-Content-Length is '99"),
        (head + zeros, "-1", 400, "Inference-Header-Content-Length is '-1'"),
        (head + zeros, "²".encode("latin-1"), 400, "Inference-Header-Content-Length is '²'"),
        (head + zeros[:-1], str(len(head)), 422, "binary_data_size of z is 64"),
        (head + zeros + b"x", str(len(head)), 400, "1 bytes belong to no input"),
        (head.replace(b"64", b"60") + zeros, str(len(head)), 422, "z has 60 bytes"),
        (head + zeros, str(len(head) - 1), 400, "not JSON"),
        (head + nan, str(len(head)), 422, "NaN or infinity in row 0"),
        (b"", None, 400, "the body is empty"),
    ]:
        answer = post(registry, body, {} if length is None else {"Inference-Header-Content-Length": length})
        assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text


def test_metadata_and_readiness_over_rest(registry):
    async def scene():
        async with running(registry) as app:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                paths = ("/v2", "/v2/models/ring", "/v2/models/ring/versions/v1/ready", "/v2/models/none", "/v2/models/ring/ready")
                return [await client.get(path) for path in paths] + [await client.get(CLOTHES)]

    server, ring, ready, unknown, also_ready, wrong = asyncio.run(scene())
    assert "binary_tensor_data" in server.json()["extensions"]
    assert ring.json() == {
        "name": "ring", "versions": ["v1"], "platform": "onnx_onnxv1",
        "inputs": [{"name": "z", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [{"name": "samples", "datatype": "FP32", "shape": [-1, 2]}],
    }  # fmt: skip
    assert ready.json() == also_ready.json() == {"name": "ring", "ready": True}
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert "unknown model 'none'" in unknown.json()["error"]


@pytest.mark.slow
def test_clients_that_ask_whether_we_live_keep_their_connection(registry):
    """gRPC by itself allows a ping in five minutes, and ends the connection of whoever sends a third one too early."""

    async def scene():
        async with calling(registry) as (app, _):
            options = [("grpc.keepalive_time_ms", 6_000), ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{app.rpc.port}", options) as channel:
                await call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 26)

    asyncio.run(scene())


def test_the_index_of_the_repository_says_what_answers(registry):
    publish(registry, "digits", promote=False)
    registry.set_alias("digits", "canary", "v2", reason="test")
    (registry.root / "digits" / "v2" / "model.onnx").write_bytes(b"nonsense")

    async def scene():
        async with calling(registry) as (app, channel):
            over_grpc = await call(channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True), pb.RepositoryIndexResponse)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                answers = [await client.post("/v2/repository/index", content=body) for body in (b"", b'{"ready": true}', b'{"ready": 1}', b"[")]
                return over_grpc, answers, await client.get("/v2/models/ring/config")

    over_grpc, (all_of_them, ready, wrong, broken), config = asyncio.run(scene())
    states = {(e["name"], e["version"]): e["state"] for e in all_of_them.json()}
    assert states == {("clothes", "v1"): "READY", ("digits", "v1"): "READY", ("digits", "v2"): "UNAVAILABLE", ("ring", "v1"): "READY"}
    assert [(e["name"], e["version"]) for e in ready.json()] == [(e.name, e.version) for e in over_grpc.models]
    assert len(over_grpc.models) == 3
    assert (wrong.status_code, broken.status_code) == (422, 400)
    assert config.json()["output"] == [{"name": "samples", "data_type": "TYPE_FP32", "dims": [-1, 2]}]


def test_grpc_answers_and_names_what_is_wrong(registry, samplers):
    z, y = latents(samplers)
    inputs = [{"name": "z", "datatype": "FP32", "shape": z.shape}, {"name": "y", "datatype": "INT64", "shape": y.shape}]
    as_lists = [
        {**inputs[0], "contents": pb.InferTensorContents(fp32_contents=z.ravel())},
        {**inputs[1], "contents": pb.InferTensorContents(int64_contents=y)},
    ]

    async def refused(answer):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await answer
        return error.value.code().name, error.value.details()

    async def scene():
        async with calling(registry) as (app, channel):
            answers = [
                await infer(channel, inputs, raw=[z.tobytes(), y.tobytes()], id="3"),
                await infer(channel, as_lists, model_version="production"),
            ]
            errors = [
                await refused(infer(channel, inputs, raw=[z.tobytes()])),
                await refused(infer(channel, inputs[:1], raw=[z.tobytes()[:-1]])),
                await refused(infer(channel, inputs[:1], model="none", raw=[z.tobytes()])),
                await refused(infer(channel, inputs[:1])),
                await refused(infer(channel, inputs[:1], raw=[np.full_like(z, np.nan).tobytes()])),
            ]
            config = await call(channel, "ModelConfig", pb.ModelConfigRequest(name="clothes"), pb.ModelConfigResponse)
            assert [(each.name, each.data_type, list(each.dims)) for each in (*config.config.input, *config.config.output)] == [
                ("z", pb.ModelConfigResponse.TYPE_FP32, [-1, 16]), ("y", pb.ModelConfigResponse.TYPE_INT64, [-1]),
                ("samples", pb.ModelConfigResponse.TYPE_UINT8, [-1, 4, 4, 3]),
            ]  # fmt: skip
            live = await call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)
            ready = await call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
            assert live.live and ready.ready
            return answers, errors, app.service.tap.counters

    answers, errors, counters = asyncio.run(scene())
    for answer in answers:
        found = np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(answer.outputs[0].shape)
        np.testing.assert_array_equal(found, samplers["clothes"].run(z, y))
    assert (answers[0].id, answers[0].model_version) == ("3", "v1")
    assert [code for code, _ in errors] == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "NOT_FOUND", "INVALID_ARGUMENT", "INVALID_ARGUMENT"]
    assert "1 raw contents" in errors[0][1] and "319 bytes" in errors[1][1] and "unknown model" in errors[2][1] and "NaN or infinity" in errors[4][1]
    assert counters['requests_total{model="clothes",status="200"}'] == 2
    assert counters['requests_total{model="clothes",status="422"}'] == 4


@pytest.mark.parametrize(("count", "aside"), [(5, False), (3000, True)])
def test_large_tensors_are_read_and_written_beside_the_event_loop(registry, samplers, monkeypatch, count, aside):
    z, y = latents(samplers, count)
    inputs = [
        {"name": "z", "datatype": "FP32", "shape": z.shape, "contents": pb.InferTensorContents(fp32_contents=z.ravel())},
        {"name": "y", "datatype": "INT64", "shape": y.shape, "contents": pb.InferTensorContents(int64_contents=y)},
    ]
    threads = {}

    def noting(module, name):
        work = getattr(module, name)

        def noted(*given):
            threads[name] = threading.current_thread() is not threading.main_thread()
            return work(*given)

        monkeypatch.setattr(module, name, noted)

    for module, name in ((rpc, "_read"), (oip, "tensor"), (oip, "to_request"), (rpc, "_answer")):
        noting(module, name)

    async def scene():
        async with calling(registry) as (_, channel):
            return await infer(channel, inputs)

    answer = asyncio.run(scene())
    found = np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(answer.outputs[0].shape)
    np.testing.assert_array_equal(found, samplers["clothes"].run(z, y))
    assert threads == dict.fromkeys(("_read", "tensor", "to_request", "_answer"), aside)


def test_a_message_that_cannot_be_read_is_refused_and_counted(registry):
    async def scene():
        async with calling(registry) as (app, channel):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff")
            return error.value.code().name, app.service.tap.counters

    code, counters = asyncio.run(scene())
    assert code == "INVALID_ARGUMENT" and counters['requests_total{model="",status="400"}'] == 1


def test_a_grpc_deadline_drops_what_waits(registry, samplers):
    z, _ = latents(samplers)

    async def scene():
        async with calling(registry) as (app, channel):
            app.service.batcher._seal = lambda lane: []  # the device never becomes free
            message = pb.ModelInferRequest(
                model_name="clothes",
                inputs=[pb.ModelInferRequest.InferInputTensor(name="z", datatype="FP32", shape=z.shape)],
                raw_input_contents=[z.tobytes()],
            )
            method = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer", request_serializer=lambda m: m.SerializeToString()
            )
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await method(message, timeout=0.2)
            assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            async with asyncio.timeout(5):
                while app.service.batcher.queued:
                    await asyncio.sleep(0.005)

    asyncio.run(scene())


def samples_of(channel, **fields):
    return channel.unary_stream(
        "/ganwatch.v1.Generator/Sample", request_serializer=lambda m: m.SerializeToString(), response_deserializer=own.Piece.FromString
    )(own.SampleRequest(**fields), timeout=fields.pop("timeout", None))


def test_what_is_refused_for_now_says_when_to_come_again(registry):
    """By HTTP's Retry-After and by gRPC's own word for it, which its clients obey."""

    async def scene():
        async with calling(registry, batcher=Batcher(limit=100)) as (app, channel), connect(app) as client:
            app.service.batcher._seal, app.service.batcher._rate = lambda lane: [], 20.0  # the device never becomes free
            waiting = asyncio.ensure_future(client.post("/v1/models/ring/sample", json={"n": 90}))
            while not app.service.batcher.queued:
                await asyncio.sleep(0.005)
            http = await client.post("/v1/models/ring/sample", json={"n": 11})
            with pytest.raises(grpc.aio.AioRpcError) as full:
                await samples_of(channel, model="ring", n=11).read()
            waiting.cancel()
            app.service.batcher._closing = True
            stopping = await client.post("/v1/models/ring/sample", json={"n": 11})
            with pytest.raises(grpc.aio.AioRpcError) as stopped:
                await samples_of(channel, model="ring", n=11).read()
            return http, full.value, stopping, stopped.value

    http, full, stopping, stopped = asyncio.run(scene())
    assert (http.status_code, http.headers["retry-after"], stopping.status_code, stopping.headers["retry-after"]) == (429, "5", 503, "1")
    assert (full.code(), dict(full.trailing_metadata())["grpc-retry-pushback-ms"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "5000")
    assert (stopped.code(), dict(stopped.trailing_metadata())["grpc-retry-pushback-ms"]) == (grpc.StatusCode.UNAVAILABLE, "1000")


def test_a_grpc_stream_that_is_late_or_read_by_nobody_ends(registry, monkeypatch):
    monkeypatch.setattr("serving.rpc._PATIENCE_S", 0.3)

    async def scene():
        async with calling(registry) as (app, channel):
            counters = app.service.tap.counters
            idle = samples_of(channel, model="ring", n=10**9)
            await idle.read()
            async with asyncio.timeout(30):
                while not counters["slow_readers_total"]:
                    await asyncio.sleep(0.01)
            late = channel.unary_stream("/ganwatch.v1.Generator/Sample", request_serializer=lambda m: m.SerializeToString())
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async for _ in late(own.SampleRequest(model="digits", n=10**9), timeout=0.3):
                    pass
            async with asyncio.timeout(30):
                while app.service.batcher.queued or not counters['requests_total{model="digits",status="504"}']:
                    await asyncio.sleep(0.01)
            return error.value.code()

    assert asyncio.run(scene()) == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_grpc_stream_ends_when_its_version_is_rolled_back(registry):
    publish(registry, "ring", shape=(2,), dtype="float32", shift=3.0)

    async def scene():
        async with calling(registry) as (app, channel):
            anyone, named = (samples_of(channel, model="ring", n=3_000_000, version=version) for version in ("", "v2"))
            assert (await anyone.read()).version == "v2"
            registry.rollback("ring")
            app.service.table.refresh()
            with pytest.raises(grpc.aio.AioRpcError, match="v2 of model ring was rolled back") as error:
                while await anyone.read():
                    pass
            rows = [len(piece.samples) async for piece in named]
            return error.value.code(), sum(rows)

    assert asyncio.run(scene()) == (grpc.StatusCode.UNAVAILABLE, 3_000_000 * 8)


def test_a_grpc_port_that_is_taken_is_an_error(registry):
    async def scene():
        async with running(registry) as app:
            with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RuntimeError, match=str(taken.getsockname()[1])):
                await Rpc(app.service, taken.getsockname()[1]).start()

    asyncio.run(scene())


def test_samples_stream_over_grpc(registry, samplers):
    async def scene():
        async with calling(registry) as (app, channel):
            sample = channel.unary_stream(
                "/ganwatch.v1.Generator/Sample",
                request_serializer=lambda m: m.SerializeToString(),
                response_deserializer=own.Piece.FromString,
            )
            pieces = [piece async for piece in sample(own.SampleRequest(model="ring", n=150_000, seed=7, offset=5))]
            labelled = [p async for p in sample(own.SampleRequest(model="clothes", n=4, seed=7, label="two", truncation=0.5))]
            with pytest.raises(grpc.aio.AioRpcError, match="n is 0"):
                async for _ in sample(own.SampleRequest(model="ring")):
                    pass
            async for _ in sample(own.SampleRequest(model="ring", n=10**9)):
                break  # the client leaves
            async with asyncio.timeout(5):
                while app.service.batcher.queued:
                    await asyncio.sleep(0.005)
            return pieces, labelled

    pieces, (labelled,) = asyncio.run(scene())
    rows = np.concatenate([np.frombuffer(piece.samples, piece.dtype).reshape(piece.shape) for piece in pieces])
    np.testing.assert_array_equal(rows, samplers["ring"].sample([Window(7, 5, 150_000)]))
    assert [piece.offset for piece in pieces] == [5, 65541, 131077]
    expected = samplers["clothes"].sample([Window(7, 0, 4, label=2, truncation=0.5)])
    np.testing.assert_array_equal(np.frombuffer(labelled.samples, np.uint8).reshape(expected.shape), expected)


@pytest.mark.slow
@pytest.mark.skipif(not TRITON.exists(), reason=f"no {TRITON}; `make tritonclient` installs it")
def test_tritonclient_works_unchanged_over_both_protocols(registry, samplers, tmp_path):
    z, y = latents(samplers)
    np.savez(tmp_path / "latents.npz", z=z, y=y)

    async def scene():
        async with running(registry) as app:
            rpc = app.rpc = Rpc(app.service, 0)
            listening = socket.create_server(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
            serving = asyncio.ensure_future(server.serve([listening]))
            while not server.started:
                await asyncio.sleep(0.005)
            addresses = [f"127.0.0.1:{port}" for port in (listening.getsockname()[1], rpc.port)]
            command = [TRITON, TRITON_CLIENT, *addresses, tmp_path / "latents.npz", tmp_path / "out.npz"]
            result = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
            server.should_exit = True
            await serving
            listening.close()
            return result

    result = asyncio.run(scene())
    assert result.stdout == "done\n", result.stderr
    answers = np.load(tmp_path / "out.npz")
    expected = samplers["clothes"].run(z, y)
    assert answers["grpc_large"].shape == (65536, 4, 4, 3)
    for name in ("http_both", "grpc_both", "http_text", "http_gzip", "http_deflate"):
        np.testing.assert_array_equal(answers[name], expected)
    by_class = [samplers["clothes"].run(z, np.full(5, label)) for label in range(3)]
    for name in ("http_drawn", "grpc_drawn"):  # each row is of some class of the class law
        assert all(any((row == rows[i]).all() for rows in by_class) for i, row in enumerate(answers[name]))


def test_the_client_protocol_needs_no_generated_module():
    """Whoever has tritonclient loaded, whose own generated module names the same messages, may use our client beside it."""
    code = "import sys; import serving.client; assert not [m for m in sys.modules if 'pb2' in m]"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
