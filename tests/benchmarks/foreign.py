"""Runs in the benchmark's own venv: detectors of river, frouros and alibi-detect, the packages themselves, over streams.

    python foreign.py METHOD in.npz out.npz

in.npz: reference [N, d] and parts x0, x1 ... [time, stream, d]; out.npz: by "label|part", [time, stream], larger = more suspicious,
where time t has seen samples 0 .. t only. Thresholds are fitted by the caller, so the packages' own are set out of the way; `own` is the exception:
alarms (1 or 0) at the threshold that alibi-detect calibrates for the run length it is asked for.
alibi-detect's licence (BSL 1.1) allows benchmarks: it is run here, and nothing of it is in ganwatch.
"""

import logging
import random
import sys
import warnings
from types import SimpleNamespace

import numpy as np

ADWIN_DELTAS = 10.0 ** -np.arange(0.0, 2.01, 0.5)


def radius(reference, x):
    values, vectors = np.linalg.eigh(np.cov(reference.T.astype(np.float64)))
    size = lambda x: np.linalg.norm((x - reference.mean(axis=0)) @ (vectors / np.sqrt(np.maximum(values, 1e-12))), axis=-1)  # noqa: E731
    known = size(reference)
    return (size(x) - known.mean()) / known.std()


def columns(reference, x):
    """Each feature, standardised, and the radius last: [time, stream, d + 1]."""
    return np.concatenate([(x - reference.mean(axis=0)) / reference.std(axis=0), radius(reference, x)[..., None]], axis=2)


def follow_each(y, follow):
    """`follow` a column of a stream [time] -> [time], over all of y [time, stream, column]: the radius alone, and the largest of all
    columns, since one threshold serves all: an alarm of any is an alarm."""
    found = np.stack([[follow(y[:, s, c].tolist(), s) for s in range(y.shape[1])] for c in range(y.shape[2])]).astype(np.float32)
    return {"on the radius": found[-1].T, "on features + radius": found.max(axis=0).T}


def adwin(reference, x):
    """ADWIN says yes or no only, so a grid of deltas stands for its threshold: the largest -log10(delta) that raised an alarm."""
    from river.drift import ADWIN

    def follow(column, stream):
        found = np.zeros(len(column))
        for delta in ADWIN_DELTAS:
            detector = ADWIN(delta=min(delta, 0.999), clock=1, grace_period=5)
            for t, value in enumerate(column):
                detector.update(value)
                if detector.drift_detected:
                    found[t] = max(found[t], 0.5 - np.log10(delta))
        return found

    return {f"river ADWIN {where}": found for where, found in follow_each(columns(reference, x), follow).items()}


def kswin(reference, x):
    """Minus the logarithm of its p-value; alpha so small that it never resets. Ties of its lattice are broken at random.

    scipy, whose exact p-value depends on the statistic alone, is asked once for each of these: it takes 300 us.
    """
    from river.drift import KSWIN
    from river.drift import kswin as module

    rng, asked, known = np.random.default_rng(0), module.stats.ks_2samp, {}

    def ks_2samp(a, b, method):
        a, b = np.sort(a), np.sort(b)
        both = np.concatenate([a, b])
        gap = int(np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max())
        if gap not in known:
            known[gap] = asked(a, b, method=method)
        return known[gap]

    module.stats = SimpleNamespace(ks_2samp=ks_2samp)

    def follow(column, stream):
        found = np.full(len(column), -np.inf)
        detector = KSWIN(alpha=1e-300, window_size=100, stat_size=30, seed=stream)
        for t, value in enumerate(column):
            detector.update(value)
            if t >= 100:
                found[t] = -np.log(max(detector.p_value, 1e-300)) + 1e-3 * rng.random()
        return found

    return {f"river KSWIN 100/30 {where}": found for where, found in follow_each(columns(reference, x), follow).items()}


def page_hinkley(reference, x):
    """Of each feature and the radius; the largest, as one threshold serves all. Two-sided."""
    from river.drift import PageHinkley

    def follow(column, stream):
        found = np.zeros(len(column))
        d = PageHinkley(min_instances=1, delta=0.15, threshold=1e300, alpha=0.9999)
        for t, value in enumerate(column):
            d.update(value)
            found[t] = max(d._sum_increase - d._min_increase, d._max_decrease - d._sum_decrease)
        return found

    return {f"river PageHinkley 0.15 {where}": found for where, found in follow_each(columns(reference, x), follow).items()}


def frouros(reference, x):
    from frouros.detectors.data_drift import MMDStreaming
    from frouros.utils.kernels import rbf_kernel

    pairs = reference[:1000].astype(np.float64)
    squares = ((pairs[:, None] - pairs) ** 2).sum(axis=2)
    sigma = np.sqrt(np.median(squares[np.triu_indices(len(pairs), 1)]) / 2)
    found = np.full(x.shape[:2], -np.inf, np.float32)
    for s in range(x.shape[1]):
        detector = MMDStreaming(window_size=25, kernel=lambda a, b: rbf_kernel(a, b, sigma))
        detector.fit(X=reference)
        for t in range(len(x)):
            result, _ = detector.update(x[t, s])
            if result is not None:
                found[t, s] = result.distance
    return {"frouros MMDStreaming 25": found}


def _online(detectors, x, statistic):
    found = {label: np.full(x.shape[:2], -np.inf, np.float32) for label in detectors}
    for label, detector in detectors.items():
        for s in range(x.shape[1]):
            detector.reset_state()
            for t in range(len(x)):
                data = detector.predict(x[t, s])["data"]
                found[label][t, s] = statistic(data)
    return found


def alibi(reference, x):
    from alibi_detect.cd import LSDDDriftOnline, MMDDriftOnline

    settings = {"backend": "pytorch", "n_bootstraps": 200, "verbose": False}  # of a threshold that nobody looks at
    made = {
        "alibi-detect MMD 25": MMDDriftOnline(reference, ert=30, window_size=25, **settings),
        "alibi-detect LSDD 25": LSDDDriftOnline(reference, ert=30, window_size=25, **settings),
    }
    return _online(made, x, lambda data: float(data["test_stat"]))


def alibi_cvm(reference, x):
    from alibi_detect.cd import CVMDriftOnline

    detector = CVMDriftOnline(reference, ert=30, window_sizes=[10, 50], n_bootstraps=2000, verbose=False)
    return _online({"alibi-detect CVM 10, 50": detector}, x, lambda data: float(np.nanmax(np.asarray(data["test_stat"]) / np.asarray(data["threshold"]))))


def own(reference, x):
    """Alarms of alibi-detect at the threshold that its bootstrap gives for a run length of 1,000, with its recommended 10 x that many."""
    from alibi_detect.cd import MMDDriftOnline

    detector = MMDDriftOnline(reference, ert=1000, window_size=25, backend="pytorch", n_bootstraps=10_000, verbose=False)
    return _online({"alibi-detect MMD 25, own threshold": detector}, x, lambda data: float(data["is_drift"]))


METHODS = {
    "adwin": adwin,
    "kswin": kswin,
    "page_hinkley_all": page_hinkley,
    "frouros": frouros,
    "alibi": alibi,
    "alibi_cvm": alibi_cvm,
    "own": own,
}

if __name__ == "__main__":
    method, source, target = sys.argv[1:]
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    random.seed(0)
    np.random.seed(0)
    try:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
    except ImportError:
        pass
    with np.load(source) as data:
        parts = [data[f"x{i}"] for i in range(len(data.files) - 1)]
        found = [METHODS[method](data["reference"], x) for x in parts]
    np.savez(target, **{f"{label}|{i}": path for i, paths in enumerate(found) for label, path in paths.items()})
