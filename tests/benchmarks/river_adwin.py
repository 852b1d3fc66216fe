"""Runs in the benchmark's own venv: river's ADWIN on one standardised series a stream.

argv: an .npy of series [time, stream], where to write [time, stream] float32: the largest -log10(delta) of the grid whose ADWIN
raised an alarm at that sample, 0 for none. ADWIN says yes or no only, so the grid stands for its threshold.
"""

import sys

import numpy as np
from river.drift import ADWIN

DELTAS = 10.0 ** -np.arange(0.0, 2.01, 0.5)

series = np.load(sys.argv[1])
found = np.zeros(series.shape, np.float32)
for s, column in enumerate(series.T.tolist()):
    for delta in DELTAS:
        detector = ADWIN(delta=min(delta, 0.999), clock=1, grace_period=5)
        for t, value in enumerate(column):
            detector.update(value)
            if detector.drift_detected:
                found[t, s] = max(found[t, s], 0.5 - np.log10(delta))
np.save(sys.argv[2], found)
