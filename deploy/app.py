"""Composition root: wires the sampler that answers to the monitor that watches, and deploys it on Ray Serve.

`deploy.app:build` is the import path for `serve deploy deploy/config/serve.yaml` on any Ray cluster; `python -m deploy.app`
is what `ganwatch up` runs against the Ray it started.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import tyro

ROOM_PATIENCE = 10.0  # seconds in which a job that has just ended gives its CPUs back


@dataclass(frozen=True)
class Serving:
    """What one deployment serves, and whom it tells."""

    registry: str
    """Directory of bundles; every model with an alias is served."""
    monitor_url: str | None = None
    """Where samples are reported; none = unwatched."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda = an error where onnxruntime cannot use it."""
    replicas: int = 1
    """Processes that run onnxruntime."""
    num_gpus: float = 0.0
    """GPUs of each replica, fractions allowed."""
    tap_rate: float = 2000.0
    """Samples per second that each replica reports to the monitor, at most."""
    grpc_port: int | None = 9000
    """Where the replicas of a machine answer gRPC, on 127.0.0.1; none = they do not."""
    pool: int = 4096
    """Samples of each version drawn ahead while a replica is idle, for small requests without a seed; below 256 = off."""
    deterministic: bool = False
    """Pixels bitwise the same whatever else a replica computes, on GPUs, too; every run then costs a full batch."""
    tensorrt: str | None = None
    """Directory for TensorRT's engines, built in minutes when a version is first loaded; none = CUDA's own kernels."""
    access_log: str | None = None
    """Directory where each replica writes one JSON line a request, 128 MiB at most; none = nowhere."""
    trace_url: str | None = None
    """OpenTelemetry collector for traces, OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; none = no traces."""
    trace_share: float = 1.0
    """Of the requests that come without a traceparent, those that are traced."""


def build(args: dict[str, object]) -> object:
    """The Serve application for `args`, the fields of Serving."""
    from serving.deployment import build as bind

    serving = Serving(**args)
    return bind(
        registry=serving.registry,
        monitor_url=serving.monitor_url,
        device=serving.device,
        num_replicas=serving.replicas,
        num_gpus=serving.num_gpus,
        tap_rate=serving.tap_rate,
        grpc_port=serving.grpc_port,
        pool=serving.pool,
        deterministic=serving.deterministic,
        tensorrt=serving.tensorrt,
        access_log=serving.access_log,
        trace_url=serving.trace_url,
        trace_share=serving.trace_share,
    )


def deploy(serving: Serving, *, port: int = 8000) -> None:
    """Deploy on the Ray that RAY_ADDRESS names, listening on 127.0.0.1, and return when it is healthy.

    Raises RuntimeError where Ray has no room for the replicas beside those that they replace: it would wait for ever.
    """
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serving.deployment import REPLICA_CPUS

    ray.init(log_to_driver=False)
    deadline = time.monotonic() + ROOM_PATIENCE
    while REPLICA_CPUS * serving.replicas > (free := ray.available_resources().get("CPU", 0.0)):
        if time.monotonic() > deadline:
            most, anew = int(free / REPLICA_CPUS), f"`ganwatch down` and `ganwatch up --replicas {serving.replicas}`"
            raise RuntimeError(f"replicas is {serving.replicas}; Ray has CPUs for {most} beside what runs now: ask for fewer, wait for the training job, or start anew with {anew}")
        time.sleep(0.2)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(build(asdict(serving)), name="ganwatch", route_prefix="/")


def main(serving: tyro.conf.OmitArgPrefixes[Serving], port: int = 8000) -> None:
    try:
        deploy(serving, port=port)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(main)
