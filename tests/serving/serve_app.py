"""Ray Serve behind HAProxy for test_deployment.py, in a process of its own, since Ray reads its settings when imported.

python serve_app.py REGISTRY MONITOR_URL PORT GRPC_PORT LOGS    serves until its standard input closes; each number that is
written there deploys the application again, with so many replicas. A file LOGS/die-PID ends the batch loop of that replica, as a
fault of ours would.
"""

import asyncio
import itertools
import os
import sys
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from serving import deployment


class Mortal(deployment.Replica):
    async def __init__(self, settings: deployment.Settings) -> None:
        await super().__init__(settings)
        self._fate = asyncio.create_task(self._die(Path(settings.access_log) / f"die-{os.getpid()}"))

    async def _die(self, omen: Path) -> None:
        while not omen.exists():
            await asyncio.sleep(0.1)
        for loop in self.service.batcher._loops:
            loop.get_loop().call_soon_threadsafe(loop.cancel)


deployment.Replica = Mortal
registry, monitor_url, port, grpc_port, logs = sys.argv[1:]
ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=2, log_to_driver=False)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(port)))
options = {"device": "cpu", "grpc_port": int(grpc_port), "pool": 512, "access_log": logs}
for replicas in itertools.chain(["2"], sys.stdin):
    serve.run(deployment.build(registry, monitor_url, num_replicas=int(replicas), **options), name="ganwatch", route_prefix="/")
    print("ready", flush=True)
serve.shutdown()
ray.shutdown()
