"""`ganwatch doctor`: one line for each thing that must be right, in the order of the way of the data."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass

import httpx

from deploy import stack
from serving.session import cuda_devices
from training.bundle import BundleError
from training.registry import Registry, RegistryError


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    words: str


def checks(run: stack.Run | None, registry: Registry) -> list[Check]:
    """Every check; those of running parts only while ganwatch is up."""
    wanted: list[Callable[[], Check]] = [_packages, _device, _disk, lambda: _registry(registry)]
    if run is None:
        wanted += [_ports]
    else:
        wanted += [lambda: _loopback(run), lambda: _sampler(run), lambda: _monitor(run), lambda: _prometheus(run)]
    return [check() for check in wanted]


def _packages() -> Check:
    wanted = {"ray": "2.60", "onnxruntime-gpu": "1.31", "torch": "2.13"}
    found = {name: importlib.metadata.version(name) for name in wanted}
    old = [f"{name} {found[name]} (needs {least})" for name, least in wanted.items() if _numbers(found[name]) < _numbers(least)]
    words = f"too old: {', '.join(old)}; run `make demo` or install with constraints.txt" if old else ", ".join(f"{k} {v}" for k, v in found.items())
    return Check("packages", not old, f"python {platform.python_version()}, {words}")


def _device() -> Check:
    gpus = cuda_devices()
    return Check("device", True, f"{gpus} CUDA devices" if gpus else "no CUDA device; sampling and training run on the CPU")


def _disk() -> Check:
    free = shutil.disk_usage(stack.ROOT).free / 1e9
    return Check("disk", free > 2, f"{free:.1f} GB free" + ("" if free > 2 else "; Ray needs at least 2 GB, free some"))


def _registry(registry: Registry) -> Check:
    broken, served = [], []
    for model in registry.models():
        try:
            for alias, version in registry.aliases(model).items():
                registry.open(model, version)
                served.append(f"{model} {alias}={version}")
        except (BundleError, RegistryError) as error:
            broken.append(str(error))
    return Check("registry", not broken, "; ".join(broken) or f"{registry.root}: {', '.join(served) or 'no model has an alias yet'}")


def _ports() -> Check:
    ports = stack.Ports()
    taken = [f"{port} ({name}) is held by {who}" for name, port in asdict(ports).items() if port and (who := stack.port_holder(port))]
    return Check("ports", not taken, "; ".join(taken) + "; choose others with --ports.*" if taken else "all free")


def _loopback(run: stack.Run) -> Check:
    sockets = stack.listening(run)
    exposed = [f"{address}:{port} ({name})" for address, port, name in sockets if not is_loopback(address) and not is_ray_grpc(address, name)]
    grpc = [str(port) for address, port, name in sockets if is_ray_grpc(address, name)]
    words = f"listening beyond this machine: {', '.join(exposed)}" if exposed else "every socket listens on 127.0.0.1"
    return Check("loopback", not exposed, words + (f"; but for Ray's gRPC between replicas, which asks for the token: {', '.join(grpc)}" if grpc else ""))


def is_loopback(address: str) -> bool:
    """Whether a listening address is reachable from this machine only."""
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def is_ray_grpc(address: str, process: str) -> bool:
    """Whether this is the gRPC server of a Serve replica, which Ray binds to every interface whatever it is told."""
    return address == "::" and process.startswith("ray::ServeReplica")


def _sampler(run: stack.Run) -> Check:
    try:
        answer = httpx.get(f"{run.url}/v2/health/ready", timeout=5)
        return Check("sampler", answer.status_code == 200, f"{run.url} answers {answer.status_code} {answer.text[:200]}")
    except httpx.HTTPError as error:
        return Check("sampler", False, f"{run.url} does not answer ({error}); see {run.logs}/serve.log")


def _monitor(run: stack.Run) -> Check:
    try:
        state = httpx.get(f"{run.monitor_url}/api/state", timeout=5).json()
    except httpx.HTTPError as error:
        return Check("monitor", False, f"{run.monitor_url} does not answer ({error}); see {run.logs}/monitor.log")
    stale = [name for name, model in state["models"].items() if model["stale"]]
    words = f"{state['tap']['replicas']} replicas report, {state['tap']['received']} samples received"
    if stale:
        words += f"; no samples lately of {', '.join(stale)}: is the sampler up, and --probe-rate above 0?"
    return Check("monitor", not stale and not state["errors"], "; ".join([words, *state["errors"]]))


def _prometheus(run: stack.Run) -> Check:
    port = run.settings.ports.prometheus
    if stack.port_holder(port) is None:
        return Check("prometheus", True, "not running (optional); deploy/prometheus/prometheus.yml scrapes the monitor")
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": 'up{job="ganwatch"}'}, timeout=5).json()
    except httpx.HTTPError as error:
        return Check("prometheus", False, f"port {port} does not answer ({error})")
    values = [float(r["value"][1]) for r in answer["data"]["result"]]
    ok = values == [1.0]
    return Check("prometheus", ok, "scrapes the monitor" if ok else f"does not scrape the monitor (up is {values or 'absent'}); check its scrape_configs")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
