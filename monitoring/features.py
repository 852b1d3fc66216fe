"""How the monitor looks at samples: it checks them, then runs the bundle's features.onnx.

Whatever cannot be looked at is counted by its reason and never passed on. This file knows nothing of what follows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from jaxtyping import Float32, Int64
from numpy import ndarray

from training.bundle import Bundle

BATCH = 1024  # samples per run of the graph, which bounds memory


class Seen(NamedTuple):
    """The n samples that were accepted, and how many were not."""

    samples: ndarray  # [n, *sample_shape]
    features: Float32[ndarray, "n p"]
    scores: Float32[ndarray, "n s"]  # larger = further from the data
    cells: Int64[ndarray, "n"]  # 0 .. K-1: the mode; K: off-manifold
    rejected: dict[str, int]  # reason -> samples: "dtype", "shape" or "nan"
    rows: Int64[ndarray, "n"] = np.empty(0, np.int64)  # which of those that were shown; left out of parts


class Eye:
    """features.onnx of one bundle, on one CPU thread."""

    def __init__(self, bundle: Bundle) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(bundle.features_path, options, providers=["CPUExecutionProvider"])
        self._shape = tuple(bundle.card.sample_shape)
        self._dtype = np.dtype(bundle.card.sample_dtype)
        self._modes = len(bundle.card.modes)
        self._nothing = Seen(
            np.empty((0, *self._shape), self._dtype),
            np.empty((0, len(bundle.reference.feature_mean)), np.float32),
            np.empty((0, len(bundle.card.scores)), np.float32),
            np.empty(0, np.int64),
            {},
            np.empty(0, np.int64),
        )

    def look(self, samples: ndarray) -> Seen:
        """The samples in the eyes of features.onnx.

        A wrong dtype or shape rejects the whole array; a row is rejected where it, its features or its scores are not finite.
        """
        count = len(samples) if samples.ndim else 1
        if count == 0:
            return self._nothing
        if samples.dtype != self._dtype:
            return self._nothing._replace(rejected={"dtype": count})
        if samples.shape[1:] != self._shape or samples.ndim == 0:
            return self._nothing._replace(rejected={"shape": count})
        samples = np.ascontiguousarray(samples)
        finite = np.isfinite(samples).all(axis=tuple(range(1, samples.ndim)))
        # A row of NaN may poison a graph's whole batch, so such rows are taken out before it runs.
        rows = np.flatnonzero(finite)
        samples = samples if finite.all() else samples[finite]
        batches = (samples[i : i + BATCH] for i in range(0, len(samples), BATCH))
        parts = [self._session.run(["features", "scores", "mode"], {"x": batch}) for batch in batches]
        if not parts:
            return self._nothing._replace(rejected={"nan": count})
        features, scores, mode = (np.concatenate(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))
        finite = np.isfinite(features).all(axis=1) & np.isfinite(scores).all(axis=1)
        if not finite.all():
            samples, features, scores, mode, rows = samples[finite], features[finite], scores[finite], mode[finite], rows[finite]
        rejected = {"nan": count - len(samples)} if len(samples) < count else {}
        cells = np.where(mode < 0, self._modes, mode).astype(np.int64)
        return Seen(samples, features, scores, cells, rejected, rows)
