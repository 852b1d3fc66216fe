"""The rivals, from their papers, in numpy and in lock-step over streams: statistics whose threshold is fitted afterwards.

Each takes a reference [N, d] and streams [time, stream, d] and returns [time, stream], larger = more suspicious, where time t has
seen samples 0 .. t only. Kernels are Gaussian, exp(-|x - y|^2 / m) with m the median squared distance of the reference. Nothing
is copied from the authors' code, and none of these knows what changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy import ndarray

WINDOWS = (10, 25, 100)  # of the windowed MMD
BLOCKS, LARGEST = 15, 50  # blocks of the kernel CUSUM, and samples of the largest
SIZES = np.array([2, *range(4, LARGEST + 1, 2)])


def _standardise(reference: ndarray) -> tuple[ndarray, ndarray]:
    values, vectors = np.linalg.eigh(np.cov(reference.T.astype(np.float64)))
    return reference.mean(axis=0), vectors / np.sqrt(np.maximum(values, 1e-12))


def _radius(reference: ndarray, x: ndarray) -> ndarray:
    centre, scale = _standardise(reference)
    size = lambda x: np.linalg.norm((x - centre) @ scale, axis=-1)  # noqa: E731
    known = size(reference)
    return (size(x) - known.mean()) / known.std()


def mewma(reference: ndarray, x: ndarray, *, rate: float) -> ndarray:
    """|z|^2 for z the exponentially weighted mean of whitened samples (Lowry et al., Technometrics 1992)."""
    centre, scale = _standardise(reference)
    z, found = np.zeros(x.shape[1:]), np.empty(x.shape[:2])
    for t, y in enumerate((x - centre) @ scale):
        z += rate * (y - z)
        found[t] = (z**2).sum(axis=1)
    return found


def page_hinkley(reference: ndarray, x: ndarray, *, delta: float) -> ndarray:
    """Two-sided CUSUM of the standardised radius against its running mean (Page 1954, Hinkley 1971; forgetting 0.9999)."""
    up = down = mean = np.zeros(x.shape[1])
    found = np.empty(x.shape[:2])
    for t, y in enumerate(_radius(reference, x)):
        mean = mean + (y - mean) / (t + 1)
        up, down = np.maximum(0, 0.9999 * up + y - mean - delta), np.maximum(0, 0.9999 * down - y + mean - delta)
        found[t] = np.maximum(up, down)
    return found


def newma(reference: ndarray, x: ndarray, *, fast: float, slow: float, features: int = 131) -> ndarray:
    """|z - z'| for two exponentially weighted means of random Fourier features (Keriven et al., IEEE TSP 2020).

    Rates and number of features as the paper's Algorithm 1 gives for a window: 50 -> .0336, .0101; 20 -> .0874, .0218.
    """
    rng = np.random.default_rng(0)
    frequencies = rng.standard_normal((x.shape[2], features)) * np.sqrt(2 / _median(reference))
    psi = lambda y: np.concatenate([np.cos(y @ frequencies), np.sin(y @ frequencies)], axis=1) / np.sqrt(features)  # noqa: E731
    z = slower = psi(reference[:1000]).mean(axis=0)  # from a single sample, it would alarm at its own start for hundreds more
    found = np.empty(x.shape[:2])
    for t, y in enumerate(x):
        now = psi(y)
        z, slower = z + fast * (now - z), slower + slow * (now - slower)
        found[t] = np.linalg.norm(z - slower, axis=1)
    return found


def _median(reference: ndarray) -> float:
    x = reference[:1000].astype(np.float64)
    squares = ((x[:, None] - x) ** 2).sum(axis=2)
    return float(np.median(squares[np.triu_indices(len(x), 1)]))


def _kernel(x: ndarray, y: ndarray, median: float) -> ndarray:
    """[..., n, d], [..., m, d] -> [..., n, m]"""
    squares = (x**2).sum(axis=-1)[..., :, None] + (y**2).sum(axis=-1)[..., None, :] - 2 * x @ np.swapaxes(y, -1, -2)
    return np.exp(-np.maximum(squares, 0) / median)


def _past(x: ndarray, length: int, median: float) -> Iterator[tuple[ndarray, ndarray]]:
    """At each time: [stream, length] kernel values of the newest sample with those before it, newest first, NaN before the
    first; and [stream, length + 1] the sum of k(y_i, y_j) over i != j among the B newest samples, B = 0 .. length."""
    window = np.full((x.shape[1], length, x.shape[2]), np.nan, np.float32)
    sums = np.zeros((x.shape[1], length + 1))
    for y in x:
        k = _kernel(y[:, None], window, median)[:, 0]
        grown = np.zeros_like(sums)
        grown[:, 1:] = sums[:, :-1]
        grown[:, 2:] += 2 * np.cumsum(k[:, : length - 1], axis=1)
        sums = grown
        window = np.roll(window, 1, axis=1)
        window[:, 0] = y
        yield k, sums


def mmd_windows(reference: ndarray, x: ndarray) -> dict[str, ndarray]:
    """Unbiased MMD^2 between the reference and the last W samples (the statistic of Cobb et al., AISTATS 2022; its windows and
    thresholds by bootstrap are replaced by one fitted threshold)."""
    median = _median(reference)
    found = {f"window MMD {w}": np.full(x.shape[:2], -np.inf) for w in WINDOWS}
    cross = np.array([_kernel(y, reference, median).mean(axis=1) for y in x])
    totals = np.cumsum(np.concatenate([np.zeros((1, x.shape[1])), cross]), axis=0)
    for t, (_, sums) in enumerate(_past(x, max(WINDOWS), median)):
        for w in WINDOWS:
            if t + 1 >= w:
                found[f"window MMD {w}"][t] = sums[:, w] / (w * (w - 1)) - 2 * (totals[t + 1] - totals[t + 1 - w]) / w
    return found


def kernel_cusum(reference: ndarray, x: ndarray) -> dict[str, ndarray]:
    """Online kernel CUSUM: max over block sizes B of the standardised mean MMD^2 between the B newest samples and N blocks of
    the reference (Wei and Xie, JRSSB 2026); Scan-B: the largest B alone (Li, Xie, Dai and Song, 2019)."""
    median, rng = _median(reference), np.random.default_rng(0)
    blocks = reference[rng.permutation(len(reference))[: BLOCKS * LARGEST]].reshape(BLOCKS, LARGEST, -1)
    inner = np.mean([_kernel(b, b, median) for b in blocks], axis=0)
    own = np.array([inner[:b, :b].sum() - np.trace(inner[:b, :b]) for b in SIZES])
    # Moments of h(x, x', y, y') under the null, with y in common for the covariance.
    pick = reference[rng.integers(len(reference), size=(6, 4000))]
    k = lambda a, b: np.exp(-((pick[a] - pick[b]) ** 2).sum(axis=1) / median)  # noqa: E731
    h = k(0, 1) + k(4, 5) - k(0, 5) - k(1, 4)
    other = k(2, 3) + k(4, 5) - k(2, 5) - k(3, 4)
    deviation = np.sqrt(2 / (SIZES * (SIZES - 1)) * (np.mean(h**2) / BLOCKS + (BLOCKS - 1) / BLOCKS * np.cov(h, other)[0, 1]))

    streams = x.shape[1]
    cross = np.full((streams, LARGEST, len(SIZES)), np.nan)  # by age: sum over the first B reference points
    paired = np.full((streams, LARGEST, LARGEST), np.nan)  # by age and reference point
    found = {"OKCUSUM": np.full(x.shape[:2], -np.inf), "Scan-B 50": np.full(x.shape[:2], -np.inf)}
    ages = np.arange(LARGEST)
    for t, (_, sums) in enumerate(_past(x, LARGEST, median)):
        k_mean = _kernel(x[t], blocks.reshape(-1, x.shape[2]), median).reshape(streams, BLOCKS, LARGEST).mean(axis=1)
        cross, paired = np.roll(cross, 1, axis=1), np.roll(paired, 1, axis=1)
        cross[:, 0], paired[:, 0] = np.cumsum(k_mean, axis=1)[:, SIZES - 1], k_mean
        if t + 1 < LARGEST:
            continue
        between = np.cumsum(cross, axis=1)[:, SIZES - 1, np.arange(len(SIZES))] - np.cumsum(paired[:, ages, ages], axis=1)[:, SIZES - 1]
        z = (own + sums[:, SIZES] - 2 * between) / (SIZES * (SIZES - 1)) / deviation
        found["OKCUSUM"][t], found["Scan-B 50"][t] = z.max(axis=1), z[:, -1]
    return found


def mmdew(reference: ndarray, x: ndarray, *, least: int = 32) -> dict[str, ndarray]:
    """MMD on exponential windows (Kalinke et al., TMLR 2025): buckets of 2^i samples, of each of which at most max(least, i)
    points are kept; the statistic is the largest MMD between the buckets before and after any border. It needs no reference.

    raw: the biased MMD^2 itself; weighted: times m n / (m + n). Only borders between buckets are looked at; the newest
    sample is alone then, and merged with others of its size afterwards.
    """
    median, (steps, streams, _) = _median(reference), x.shape
    found = {"MMDEW raw": np.full((steps, streams), -np.inf), "MMDEW weighted": np.full((steps, streams), -np.inf)}
    rng = np.random.default_rng(0)
    for s in range(streams):
        buckets: list[tuple[int, ndarray]] = []  # samples that it stands for, points kept; oldest first
        gram = np.zeros((0, 0))  # mean kernel value between buckets
        for t in range(steps):
            points = x[t : t + 1, s]
            row = np.array([_kernel(points, kept, median).mean() for _, kept in buckets])
            gram = np.block([[gram, row[:, None]], [row[None], np.ones((1, 1))]])
            buckets.append((1, points))
            if t:
                sizes = np.array([n for n, _ in buckets], float)
                weighted = gram * np.outer(sizes, sizes)
                inside = np.cumsum(np.cumsum(weighted, axis=0), axis=1)
                before = np.cumsum(sizes)[:-1]
                after = sizes.sum() - before
                old = np.diag(inside)[:-1]
                across = inside[:-1, -1] - old
                new = inside[-1, -1] - old - 2 * across
                mmd = old / before**2 + new / after**2 - 2 * across / (before * after)
                found["MMDEW raw"][t, s] = mmd.max()
                found["MMDEW weighted"][t, s] = (mmd * before * after / (before + after)).max()
            while len(buckets) > 1 and buckets[-1][0] == buckets[-2][0]:
                (n, a), (_, b) = buckets[-2:]
                points = np.concatenate([a, b])
                limit = max(least, int(np.log2(2 * n)))
                if len(points) > limit:
                    points = points[rng.permutation(len(points))[:limit]]
                merged = (gram[-2] + gram[-1]) / 2
                gram = np.block([[gram[:-2, :-2], merged[:-2, None]], [merged[None, :-2], (merged[-1:] + merged[-2:-1])[None] / 2]])
                buckets[-2:] = [(2 * n, points)]
    return found


Rival = Callable[[ndarray, ndarray], dict[str, ndarray]]
RIVALS: dict[str, Rival] = {
    "mewma": lambda r, x: {f"MEWMA {rate}": mewma(r, x, rate=rate) for rate in (0.1, 0.03)},
    "page_hinkley": lambda r, x: {f"PageHinkley {d} on the radius": page_hinkley(r, x, delta=d) for d in (0.15, 0.005)},
    "newma": lambda r, x: {"NEWMA 50": newma(r, x, fast=0.0336, slow=0.0101), "NEWMA 20": newma(r, x, fast=0.0874, slow=0.0218)},
    "mmd": mmd_windows,
    "kernel_cusum": kernel_cusum,
    "mmdew": mmdew,
}

CERTIFIED: dict[str, Rival] = {  # with as many reference samples as ours is certified on
    "certified": lambda r, x: {
        "MEWMA 0.1, N_cert": mewma(r, x, rate=0.1),
        "PageHinkley 0.15 on the radius, N_cert": page_hinkley(r, x, delta=0.15),
    },
}
