"""bentoml serve bentoml_server:Sample --port PORT, with MODEL in the environment."""

import os

import bentoml
import numpy as np
from generator import Generator


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Sample:
    def __init__(self) -> None:
        self.generator = Generator(os.environ["MODEL"])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000, route="/sample")
    def draw(self, counts: list[int]) -> list[list]:
        """A batchable API of BentoML joins its requests' lists and splits its answer's list: bytes it cannot split."""
        return [part.tolist() for part in np.split(self.generator.draw(sum(counts)), np.cumsum(counts)[:-1])]
