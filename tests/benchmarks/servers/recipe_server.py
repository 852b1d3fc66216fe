"""python recipe_server.py MODEL.onnx PORT : Ray Serve as its documentation shows it: FastAPI, serve.batch, JSON.

POST /wait sets how long a batch waits for more, for whoever tunes it."""

import sys

import numpy as np
import onnxruntime
import ray
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve.config import HTTPOptions

model, port = sys.argv[1:]
api = FastAPI()


class Ask(BaseModel):
    n: int = 1


@serve.deployment(ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=256)
@serve.ingress(api)
class Recipe:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.width = self.session.get_inputs()[0].shape[1]
        self.rng = np.random.default_rng(0)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.01)
    async def draw(self, counts: list[int]) -> list[list]:
        z = self.rng.standard_normal((sum(counts), self.width), np.float32)
        rows = self.session.run(["samples"], {"z": z})[0]
        return [part.tolist() for part in np.split(rows, np.cumsum(counts)[:-1])]

    @api.post("/sample")
    async def sample(self, ask: Ask) -> dict:
        return {"samples": await self.draw(ask.n)}

    @api.post("/wait")
    async def wait(self, seconds: float) -> None:
        self.draw.set_batch_wait_timeout_s(seconds)


ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=2, log_to_driver=False)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(port)))
serve.run(Recipe.bind(), name="recipe", route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
