"""What the servers from PyPI serve: counts -> bytes of samples, in one run of the model."""

import numpy as np
import onnxruntime


class Generator:
    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.width = self.session.get_inputs()[0].shape[1]
        self.rng = np.random.default_rng(0)

    def draw(self, count: int) -> np.ndarray:
        return self.session.run(["samples"], {"z": self.rng.standard_normal((count, self.width), np.float32)})[0]

    def answer(self, counts: list[int]) -> list[bytes]:
        return [part.tobytes() for part in np.split(self.draw(sum(counts)), np.cumsum(counts)[:-1])]
