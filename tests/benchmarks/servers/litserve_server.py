"""python litserve_server.py PORT, with MODEL in the environment."""

import os
import sys

import litserve
from fastapi import Response
from generator import Generator


class Sample(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.generator = Generator(os.environ["MODEL"])

    def decode_request(self, request: dict) -> int:
        return request["n"]

    def batch(self, inputs: list[int]) -> list[int]:
        return inputs

    def predict(self, counts: list[int]) -> list[bytes]:
        return self.generator.answer(counts)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    api = Sample(max_batch_size=64, batch_timeout=0.001, api_path="/sample")
    litserve.LitServer(api, accelerator="cpu").run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
