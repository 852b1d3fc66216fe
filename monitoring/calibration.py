"""By how much the guarantee is too careful, measured: simulated runs of the certified generator through its own detector.

The mean run length to a false alarm is at least A at a threshold of A, but longer, as bounds are not reached and evidence jumps
beyond the threshold. `Calibration` simulates runs of healthy samples, reads off at which threshold b the mean run length is A, and
says slack = A / b. Held against A / slack, the same evidence rings about once in A healthy samples, sooner where something is
wrong. That is a measurement and no bound: its error is 1 / sqrt(alarms seen), a tenth at most at the sizes below.

A larger A than can be simulated is given the slack of the largest that can: slack grows with A, since bets lose by their bounds
at every sample, so what is measured at a smaller A is the careful side. Pure: draws from the bundle's model.onnx, no clock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from jaxtyping import Float, Int64
from numpy import ndarray

from monitoring.edetectors import EDetector
from monitoring.features import Eye, Seen
from training.bundle import Bundle, sample_classes

SAMPLES = 1_000_000  # healthy samples to simulate
TARGET_RUNS = 200  # A beyond SAMPLES / TARGET_RUNS is not simulated
RUN = 3  # mean run lengths after which a run is cut
PIECE = 256  # samples fed at once: of a run that ends among them, the rest is fed again
GRID = 1.02  # ratio of the thresholds between which it reads


class Calibration:
    """Runs of healthy samples through the bets of `detector`, which is this calibration's own and is restarted for each run.

    arl: the mean run length that is wanted, at a threshold of `arl` guaranteed. `slack` is None until `samples` were fed.
    """

    def __init__(self, detector: EDetector, *, arl: float, samples: int = SAMPLES) -> None:
        self.samples, self.fed, self.slack = samples, 0, None
        self._detector, self._target = detector, max(2.0, min(arl, samples / TARGET_RUNS))
        detector.threshold = np.inf
        self._length = int(RUN * self._target)
        self._grid = self._target * GRID ** np.arange(-int(np.log(self._target) / np.log(GRID)), 1.0)  # 1 .. target
        self._exposure, self._alarms = np.zeros(len(self._grid)), np.zeros(len(self._grid))
        self._done, self._reached = 0, 0  # samples of the run now simulated; thresholds that it has crossed

    def feed(
        self, scores: Float[ndarray, "n s"], features: Float[ndarray, "n p"], cells: Int64[ndarray, "n"], samples: ndarray
    ) -> None:
        """Healthy samples, drawn from the certified law; any split of them comes to the same."""
        start = 0
        while start < len(cells) and self.slack is None:
            part = slice(start, min(len(cells), start + PIECE, start + self._length - self._done))
            peaks = np.maximum.accumulate(self._detector.update(scores[part], features[part], cells[part], samples[part], index=0))
            first = peaks.searchsorted(self._grid[self._reached :])
            first = first[first < len(peaks)]
            crossed = slice(self._reached, self._reached + len(first))
            self._exposure[crossed] += self._done + first + 1
            self._alarms[crossed] += 1
            self._reached += len(first)
            over = self._reached == len(self._grid)  # nothing is left to be learned from this run: the next one begins
            taken = int(first[-1]) + 1 if over else len(peaks)
            start, self._done, self.fed = start + taken, self._done + taken, self.fed + taken
            if over or self._done == self._length:
                self._exposure[self._reached :] += self._length
                self._done = self._reached = 0
                self._detector.restart()
                if self.fed >= self.samples:
                    self.slack = self._read()

    def _read(self) -> float:
        """At least 1: the threshold that is guaranteed is never raised, since where this comes out below 1 it is by chance."""
        enough = np.append(self._exposure / np.maximum(self._alarms, 1) >= self._target, True)
        return max(1.0, float(self._target / np.append(self._grid, self._target)[enough.argmax()]))


class Healthy:
    """Fresh samples of the certified generator itself: of its own file, on one CPU thread, in the eyes of features.onnx."""

    def __init__(self, bundle: Bundle) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(bundle.model_path, options, providers=["CPUExecutionProvider"])
        self._card, self._eye, self._offset = bundle.card, Eye(bundle), 0
        self._seed = int(bundle.card.files["model.onnx"][:12], 16)  # the same for the same generator, so that runs can be repeated

    def draw(self, count: int) -> Seen:
        """The next `count` of the stream."""
        law = {"seed": self._seed, "offset": self._offset, "count": count}
        feed: dict[str, Any] = {"z": self._card.latents(**law)}
        if self._card.classes:
            feed["y"] = sample_classes(np.array(self._card.class_shares), **law)
        self._offset += count
        return self._eye.look(self._session.run(["samples"], feed)[0])
