"""The Ray Serve application. Each replica is its own ingress, a bare ASGI app behind HAProxy: no request takes a second hop.

Knows nothing of the monitor beyond the URL to which a replica tells what it served.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from ray import serve

from serving import ingress
from serving.batcher import Batcher
from serving.logs import AccessLog, structured
from serving.models import ModelTable
from serving.pool import Pool
from serving.rest import App
from serving.rpc import Rpc
from serving.service import Service
from serving.session import Device
from serving.tap import Tap
from serving.tracing import Tracer
from training.registry import Registry

# Admission is the batcher's, counted in samples; Ray's own limit, counted in requests, must not be met before it.
_MAX_ONGOING_REQUESTS = 100_000
DRAIN_S = 30.0  # for answers under way when a replica stops; a stream that takes longer breaks off, to be resumed by offset
REPLICA_CPUS = 0.5  # logical ones that Ray sets aside for each replica


@dataclass(frozen=True)
class Settings:
    """What a replica needs to know."""

    registry: str  # directory, the same on every node
    monitor_url: str | None  # None: nothing is told to a monitor
    device: Device
    tap_rate: float  # samples/s shown to the monitor by each replica
    threads: int  # of each ONNX session
    grpc_port: int | None = None  # on 127.0.0.1, shared by the replicas of a machine; None: no gRPC
    pool: int = 0  # samples of each version drawn ahead while the device is idle
    deterministic: bool = False  # pixels bitwise the same whatever else is computed
    tensorrt: str | None = None  # directory for the engines that TensorRT builds; None: CUDA's own kernels
    access_log: str | None = None  # directory, where each replica writes one JSON line a request; None: nowhere
    trace_url: str | None = None  # of an OTLP/HTTP collector
    trace_share: float = 1.0  # of the requests that come without a trace, those that get one


@serve.ingress()
class Replica:
    """Loads every aliased version before it takes traffic; a model that fails to load does not keep the others from serving."""

    async def __init__(self, settings: Settings) -> None:
        structured()
        table = ModelTable(Registry(settings.registry), settings.device, settings.threads, settings.deterministic, settings.tensorrt)
        await asyncio.to_thread(table.refresh)
        batcher = Batcher(lanes=2)
        tap = Tap(settings.monitor_url, settings.tap_rate)
        log = AccessLog(settings.access_log and Path(settings.access_log) / f"access-{tap.replica}.jsonl")
        tracer = Tracer(settings.trace_url, settings.trace_share, tap.replica) if settings.trace_url else None
        self.service = Service(table, batcher, tap, Pool(settings.pool), log=log, tracer=tracer)
        self.rpc = Rpc(self.service, settings.grpc_port) if settings.grpc_port is not None else None

    def __serve_build_asgi_app__(self) -> App:
        ingress.answers(App(self.service))
        return App(self.service, self.rpc, echo=False)

    async def check_health(self) -> None:
        if problem := self.service.batcher.problem():
            raise RuntimeError(problem)


def build(
    registry: str,
    monitor_url: str | None = None,
    device: Device = "auto",
    num_replicas: int = 1,
    num_gpus: float = 0.0,
    tap_rate: float = 2000.0,
    threads: int = 1,
    grpc_port: int | None = None,
    pool: int = 0,
    deterministic: bool = False,
    tensorrt: str | None = None,
    access_log: str | None = None,
    trace_url: str | None = None,
    trace_share: float = 1.0,
) -> serve.Application:
    """The application, for `serve.run`. `num_gpus`: of each replica, a fraction lets replicas share a device."""
    deployment = serve.deployment(
        name="sampler",
        num_replicas=num_replicas,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        health_check_period_s=5,
        health_check_timeout_s=20,
        max_surge_percent=0 if num_gpus else 100,  # new replicas answer before old ones go, but a GPU is not there twice
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config={"enable_access_log": False},  # ours is off the hot path
        ray_actor_options={"num_cpus": REPLICA_CPUS, "num_gpus": num_gpus},
    )(Replica)
    settings = Settings(
        registry, monitor_url, device, tap_rate, threads, grpc_port, pool, deterministic, tensorrt, access_log, trace_url, trace_share
    )
    return deployment.bind(settings)
