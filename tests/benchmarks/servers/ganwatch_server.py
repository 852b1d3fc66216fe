"""python ganwatch_server.py REGISTRY PORT POOL MONITOR_URL|- : the product, one replica, until standard input closes."""

import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from serving.deployment import build

registry, port, pool, monitor = sys.argv[1:]
ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=2, log_to_driver=False)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(port)))
application = build(registry, None if monitor == "-" else monitor, device="cpu", pool=int(pool))
serve.run(application, name="ganwatch", route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
