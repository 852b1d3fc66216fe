"""Ray Serve behind HAProxy for test_deployment.py, in a process of its own, since Ray reads its settings when imported.

python serve_app.py REGISTRY MONITOR_URL PORT GRPC_PORT LOGS    serves until its standard input closes
"""

import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from serving.deployment import build

registry, monitor_url, port, grpc_port, logs = sys.argv[1:]
ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=2, log_to_driver=False)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(port)))
options = {"device": "cpu", "num_replicas": 2, "grpc_port": int(grpc_port), "pool": 512, "access_log": logs}
serve.run(build(registry, monitor_url, **options), name="ganwatch", route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
