"""python mosec_server.py --port PORT, with MODEL in the environment."""

import json
import os

from generator import Generator
from mosec import Server, Worker


class Sample(Worker):
    def __init__(self) -> None:
        self.generator = Generator(os.environ["MODEL"])

    def deserialize(self, data: bytes) -> int:
        return json.loads(data)["n"]

    def forward(self, data: list[int]) -> list[bytes]:
        return self.generator.answer(data)

    def serialize(self, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Sample, num=1, max_batch_size=64, max_wait_time=1)
    server.run()
