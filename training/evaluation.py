"""The offline measuring stick: how far samples are from real data, as numbers for people. Pure numpy and scipy.

    python -m training.evaluation --bundle .ganwatch/registry/digits/v1          the served ONNX against its own real data
    python -m training.evaluation --real real.npy --fake fake.npy                two arrays of features, one sample a row

Beside each figure of a bundle stands what a perfect sampler would have at the same number of samples, where that is known; arrays
are compared as they are. Whether a generator may be published is gate.py's question; whether it still behaves, the monitor's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import chi2, norm

from training.bundle import Card, open_bundle
from training.data import DATASETS, STACKED, Mixture
from training.moments import frechet

PERFECT = chi2.cdf(9, 2)  # 98.89 %: what a perfect sampler has within 3 sigma in the plane
FEWEST = 100  # samples: with less, most figures are noise, and some are not defined
CONFIDENT = 0.8  # probability above which a sample belongs to a class beyond argument


def divergences(real: Float64[ndarray, "k"], generated: Float64[ndarray, "k"]) -> dict[str, float]:
    """Divergences between two laws over the same cells, in nats; infinite where a cell is unseen on the wrong side."""
    middle = (real + generated) / 2
    with np.errstate(divide="ignore"):
        terms = np.where(real > 0, (generated - real) ** 2 / real, np.where(generated > 0, np.inf, 0.0))
    return {
        "forward_kl": _kl(real, generated),
        "reverse_kl": _kl(generated, real),
        "js": (_kl(real, middle) + _kl(generated, middle)) / 2,
        "chi_squared": float(terms.sum()),
        "tv": float(np.abs(real - generated).sum() / 2),
    }


def _kl(p: Float64[ndarray, "k"], q: Float64[ndarray, "k"]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.sum(np.where(p > 0, p * np.log(p / q), 0.0)))


def fid(real: Float[ndarray, "n p"], fake: Float[ndarray, "m p"]) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017). Biased up, by O(1 / n)."""
    moments = [(x.mean(axis=0, dtype=np.float64), np.cov(x.astype(np.float64), rowvar=False).reshape(x.shape[1], -1)) for x in (real, fake)]
    return frechet(*moments[0], *moments[1])[0]


def kid(real: Float[ndarray, "n p"], fake: Float[ndarray, "m p"], *, subsets: int = 100, size: int = 1000, seed: int = 2020) -> tuple[float, float]:
    """Kernel inception distance: unbiased squared MMD with (x.y / p + 1)^3, mean and standard deviation over random subsets.

    Binkowski et al. 2018; subsets are drawn as torch-fidelity draws them. Zero on average for equal laws, so it may be below.
    """
    size, rng = min(size, len(real), len(fake)), np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (f[rng.choice(len(f), size, replace=False)].astype(np.float64) for f in (real, fake))
        values.append(squared_mmd(lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, x, y))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(kernel: Callable[[ndarray, ndarray], ndarray], x: Float[ndarray, "n p"], y: Float[ndarray, "m p"]) -> float:
    """The mean of the kernel over pairs of different points, of x and of y, less twice that across (Gretton et al. 2012, Lemma 6).

    Without bias, so it is 0 on average under equal laws and may be below. `kernel` takes [a, p] and [b, p] to [a, b].
    """
    return _likeness(kernel, x) + _likeness(kernel, y) - 2 * sum(float(kernel(part, y).sum()) for part in _parts(x)) / (len(x) * len(y))


def _likeness(kernel: Callable[[ndarray, ndarray], ndarray], x: ndarray) -> float:
    total = sum(float(kernel(part, x).sum() - np.trace(kernel(part, part))) for part in _parts(x))
    return total / (len(x) * (len(x) - 1))


def mmd(real: Float[ndarray, "n d"], fake: Float[ndarray, "m d"], *, width: float | None = None) -> float:
    """Root of the squared MMD without bias, 0 where that is negative; Gaussian kernel of that width, by default the reals' median distance.

    The monitor's gauge of this name has the same kernel by random frequencies, and so this value but for their chance.
    """
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    width = float(np.median(pdist(real[:1000]))) if width is None else width
    if not width:  # half of the real points are one: the narrower the kernel, the more it counts equal points
        return math.nan
    return math.sqrt(max(0.0, squared_mmd(lambda a, b: np.exp(-cdist(a, b, "sqeuclidean") / (2 * width**2)), real, fake)))


def kid_excess(x: Float[ndarray, "n p"], y: Float[ndarray, "n p"], relabelled: int = 200) -> float:
    """KID between samples of equal size, in standard deviations from its mean when they are relabelled at random.

    Under equal laws it is rarely above 4, whatever the law: the permutations carry the null (Gretton et al. 2012, section 5).
    """
    pooled = np.concatenate([x, y]).astype(np.float64)
    kernel = (pooled @ pooled.T / pooled.shape[1] + 1) ** 3
    sign = np.repeat([1.0, -1.0], len(x))
    signs = np.stack([sign, *(np.random.default_rng(i).permutation(sign) for i in range(relabelled))])
    values = np.einsum("ri,ri->r", signs @ kernel, signs)  # MMD^2 n^2
    return float((values[0] - values[1:].mean()) / values[1:].std())


def prdc(real: Float[ndarray, "n d"], fake: Float[ndarray, "m d"], k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020); balls are open, as in their code.

    `coverage` is divided by its expectation when both samples follow one law, so that 1 is perfect at any n and m.
    """
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    n, m = len(real), len(fake)
    real_radius, fake_radius = (np.concatenate([np.partition(cdist(p, x), k, axis=1)[:, k] for p in _parts(x)]) for x in (real, fake))
    covered, recalled, held = 0, 0, np.zeros(m, np.int64)  # held: real balls around each fake
    for part, radius in zip(_parts(real), _parts(real_radius), strict=True):
        distance = cdist(part, fake)
        held += (distance < radius[:, None]).sum(axis=0)
        covered += int((distance.min(axis=1) < radius).sum())
        recalled += int((distance < fake_radius).any(axis=1).sum())
    i = np.arange(k)
    expected = 1 - np.prod((n - 1 - i) / (n + m - 1 - i))
    return {
        "precision": float((held > 0).mean()),
        "recall": recalled / n,
        "density": float(held.mean() / k),
        "coverage": float(covered / n / expected),
    }


def _parts(x: ndarray) -> list[ndarray]:
    return [x[i : i + 512] for i in range(0, len(x), 512)]  # a distance matrix of all at once would fill the memory


def ndb(real: Float[ndarray, "n d"], fake: Float[ndarray, "m d"], *, bins: int = 100, alpha: float = 0.05, seed: int = 0) -> dict[str, float]:
    """Statistically different bins (Richardson and Weiss 2018): k-means cells of the real data, in which proportions differ.

    ndb: share of bins whose pooled two-proportion z-test rejects at alpha; a perfect sampler has about alpha.
    bin_js: Jensen-Shannon divergence between the shares in nats; bin_js_floor: what a perfect sampler has.
    """
    from sklearn.cluster import KMeans

    found = KMeans(bins, n_init=1, random_state=seed).fit(real)
    a, b = (np.bincount(found.predict(x), minlength=bins) for x in (real, fake))
    n, m = len(real), len(fake)
    pooled = (a + b) / (n + m)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    z = np.divide(a / n - b / m, error, out=np.zeros(bins), where=error > 0)
    differ = 2 * norm.sf(np.abs(z)) < alpha
    return {"ndb": float(differ.mean()), "bin_js": divergences(a / n, b / m)["js"], "bin_js_floor": (bins - 1) / 8 * (1 / n + 1 / m)}


def vendi(kernel: Float64[ndarray, "n n"]) -> float:
    """Effective number of different samples: exp of the entropy of the eigenvalues of kernel / n (Friedman and Dieng 2023)."""
    values = np.linalg.eigvalsh(kernel / len(kernel))
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))


def vendi_ratio(real: Float[ndarray, "n d"], fake: Float[ndarray, "m d"], most: int = 1000) -> float:
    """Diversity of the fakes by that of as many reals, 1 being equal; Gaussian kernel as wide as the reals' median distance."""
    n = min(most, len(real), len(fake))
    width = np.median(pdist(real[:n].astype(np.float64)))
    of_real, of_fake = (vendi(np.exp(-squareform(pdist(x[:n].astype(np.float64), "sqeuclidean")) / (2 * width**2))) for x in (real, fake))
    return of_fake / of_real


def wasserstein(x: Float[ndarray, "n"], y: Float[ndarray, "m"], p: int = 1) -> float:
    """E |F^-1 - G^-1|^p of two samples on a line: the p-th power of their Wasserstein distance, exactly."""
    n, m = len(x), len(y)
    ends = np.unique(np.concatenate([np.arange(1, n + 1) * m, np.arange(1, m + 1) * n]))  # where either quantile jumps, in 1 / (n m)
    gaps = np.abs(np.sort(x)[(ends - 1) // m] - np.sort(y)[(ends - 1) // n]) ** p
    return float(gaps @ np.diff(ends, prepend=0) / (n * m))


def sliced_wasserstein(real: Float[ndarray, "n d"], fake: Float[ndarray, "m d"], *, projections: int = 50, seed: int = 0) -> float:
    """Root of the mean squared 2-Wasserstein distance over random directions (Bonneel et al. 2015), drawn as POT draws them.

    It stays informative where supports are disjoint and Jensen-Shannon stands still at log 2. The monitor's gauge of this name is
    sliced_wasserstein1, which is no larger along the same directions.
    """
    directions = np.random.RandomState(seed).randn(real.shape[1], projections)
    directions /= np.linalg.norm(directions, axis=0)
    lines = zip((real @ directions).T, (fake @ directions).T, strict=True)
    return float(np.sqrt(np.mean([wasserstein(x, y, 2) for x, y in lines])))


def sliced_wasserstein1(real: Float[ndarray, "n d"], fake: Float[ndarray, "m d"], *, directions: Float[ndarray, "l d"] | None = None) -> float:
    """Mean 1-Wasserstein distance along unit vectors, by default the 32 of the monitor's gauge sliced_wasserstein, which this is."""
    if directions is None:
        directions = np.random.default_rng(0).standard_normal((32, real.shape[1]))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(np.mean([wasserstein(x, y) for x, y in zip(directions @ real.T, directions @ fake.T, strict=True)]))


def intrinsic_dimension(points: Float[ndarray, "n d"]) -> float:
    """TwoNN (Facco et al. 2017): (n - 1) / sum log(d2 / d1), d1 and d2 the distances of a point to its nearest two; repeats left out.

    The monitor's gauge of this name, of as many points: on a curved or noisy manifold the dimension is that at the distance of neighbours,
    so it depends on n. NaN where less than 64 different points are left.
    """
    points = np.unique(points, axis=0).astype(np.float64)
    if len(points) < 64:
        return math.nan
    nearest = np.concatenate([np.partition(cdist(part, points), 2, axis=1)[:, 1:3] for part in _parts(points)])  # column 0 is the point itself
    total = float(np.log(nearest[:, 1] / np.maximum(nearest[:, 0], 1e-150)).sum())
    return (len(points) - 1) / total if total > 0 else math.nan


def nearest_ratio(train: Float[ndarray, "n d"], held_out: Float[ndarray, "h d"], fake: Float[ndarray, "m d"]) -> float:
    """Median distance of fakes to the training data by that of held-out data: 1 is like real, far below 1 is copying."""
    tree = cKDTree(train)
    return float(np.median(tree.query(fake)[0]) / np.median(tree.query(held_out)[0]))


def class_fit(probability: Float[ndarray, "n k"], share: Float64[ndarray, "k"], parts: int = 1) -> dict[str, float | int]:
    """Modes and KL by a classifier, the protocol of stacked MNIST (Metz et al. 2017; Lin et al. 2018), with its floors.

    class_kl: of the classes' shares among samples from their shares in real data; class_kl_floor: what n samples of a perfect
    sampler have. modes: classes with at least one sample, confident_modes: with one that is beyond argument (CONFIDENT), which
    alone tells digits from noise. Stacked images are when each of their `parts` is. modes_expected: what n samples of a perfect
    sampler reach.
    """
    n, k = probability.shape
    each = probability.reshape(n, *[round(k ** (1 / parts))] * parts)
    axes = set(range(1, parts + 1))
    surest = [each.sum(axis=tuple(axes - {axis})).max(axis=1) for axis in axes]
    assigned, confident = probability.argmax(axis=1), np.min(surest, axis=0) > CONFIDENT
    count = np.bincount(assigned, minlength=k)
    return {
        "modes": int(np.count_nonzero(count)),
        "modes_expected": float(np.sum(-np.expm1(n * np.log1p(-np.minimum(share, 1 - 1e-16))))),
        "confident_modes": len(np.unique(assigned[confident])),
        "confident_share": float(confident.mean()),
        "class_kl": _kl(count / n, share),
        "class_kl_floor": (k - 1) / (2 * n),
    }


def mixture_fit(mixture: Mixture, samples: Float[ndarray, "n d"]) -> dict[str, float | int]:
    """How well samples follow a known mixture. A perfect sampler has high_quality 0.9889, not more; in the plane spread 0.974.

    high_quality: share in the balls around centres that hold as much of a Gaussian as 3 sigma do in the plane.
    modes: centres with at least one such sample nearest to them.
    reverse_kl: from the uniform law over centres, of high-quality samples (NaN where there are none).
    spread: standard deviation of high-quality samples around their centre, per dimension of the Gaussian, in sigmas.
    """
    distance, nearest = cKDTree(mixture.centres).query(samples)
    good = distance < mixture.sigma * np.sqrt(chi2.ppf(PERFECT, mixture.rank))
    count: Int64[ndarray, "k"] = np.bincount(nearest[good], minlength=len(mixture.centres))
    return {
        "high_quality": float(good.mean()),
        "modes": int(np.count_nonzero(count)),
        "reverse_kl": _kl(count / count.sum(), np.full(len(count), 1 / len(count))) if good.any() else float("nan"),
        "spread": float(np.sqrt(np.mean(distance[good] ** 2) / mixture.rank) / mixture.sigma) if good.any() else float("nan"),
    }


def mixture_floor(mixture: Mixture, n: int) -> dict[str, float]:
    """The figures of mixture_fit that n samples of the mixture itself have on average; reverse_kl by the first term of its series."""
    k, radius = len(mixture.centres), chi2.ppf(PERFECT, mixture.rank)
    return {
        "high_quality": float(PERFECT),
        "modes": float(-k * np.expm1(n * np.log1p(-PERFECT / k))),
        "reverse_kl": (k - 1) / (2 * n * PERFECT),
        "spread": float(np.sqrt(chi2.cdf(radius, mixture.rank + 2) / PERFECT)),  # E[r^2; r^2 < radius] = rank P(chi2_(rank + 2) < radius)
    }


def compare(real: Float[ndarray, "n d"], fake: Float[ndarray, "m d"]) -> dict[str, float]:
    """Every figure that needs no more than two arrays of features."""
    mean, deviation = kid(real, fake)
    figures = {"fid": fid(real, fake), "kid": mean, "kid_deviation": deviation, "mmd": mmd(real[:5000], fake[:5000]), **prdc(real[:5000], fake[:5000])}
    figures |= ndb(real, fake, bins=min(100, len(real) // 10))
    figures |= {"vendi_ratio": vendi_ratio(real, fake), "sliced_wasserstein": sliced_wasserstein(real, fake), "sliced_wasserstein1": sliced_wasserstein1(real, fake)}
    return figures | {"intrinsic_dimension": intrinsic_dimension(fake[:5000]), "real_intrinsic_dimension": intrinsic_dimension(real[:5000])}


def judge(directory: Path, samples: int, seed: int) -> tuple[dict[str, float | int], dict[str, float]]:
    """The figures of a bundle's model.onnx in the eyes of its features.onnx, and those of a perfect sampler, where they are known.

    Generated samples are compared with held-out data, and so are as many training samples: they are what a perfect sampler gives.
    The law of a mixture and the shares of classes have floors in closed form. Raises BundleError or ValueError.
    """
    from training.export import open_source

    if samples < FEWEST:
        raise ValueError(f"--samples is {samples}; at least {FEWEST} are needed")
    bundle = open_bundle(directory)
    train, held_out = bundle.reference.train_points, bundle.reference.held_out_points
    if not len(held_out):
        raise ValueError(f"{directory} was certified without reference points; compare arrays with --real and --fake")
    source = open_source(bundle.path, bundle.card)
    mixture, parts = law_of(bundle.card)

    def drawn() -> Iterator[ndarray]:
        return (source.samples(seed=seed, offset=i, count=min(2048, samples - i)) for i in range(0, samples, 2048))

    seen = [source.features.run(["features", "probability"], {"x": part}) for part in drawn()]
    features, probability = (np.concatenate(column) for column in zip(*seen, strict=True))
    share = bundle.reference.cell_share[:-1] / bundle.reference.cell_share[:-1].sum()
    equal = min(samples, len(train))
    figures = class_fit(probability, share, parts) | compare(held_out, features[:equal])
    figures["nearest_ratio"] = nearest_ratio(train, held_out, features)
    perfect = compare(held_out, train[:equal]) | {"nearest_ratio": 1.0}
    for name, floor in (("modes", "modes_expected"), ("class_kl", "class_kl_floor"), ("bin_js", "bin_js_floor")):
        perfect[name] = figures.pop(floor)
    if mixture is not None:
        figures |= {f"mixture_{name}": value for name, value in mixture_fit(mixture, np.concatenate([*drawn()])).items()}
        perfect |= {f"mixture_{name}": value for name, value in mixture_floor(mixture, samples).items()}
    return figures, {name: perfect[name] for name in figures if name in perfect}


def law_of(card: Card) -> tuple[Mixture | None, int]:
    """The law of the data behind a bundle, where they are built in and it is known, and how many images one of its samples stacks."""
    mixture = DATASETS[card.dataset]().mixture if card.dataset in DATASETS and not card.is_image else None
    return mixture, card.sample_shape[-1] if card.dataset in STACKED else 1


@dataclass(frozen=True)
class Wish:
    """Measure samples against real data."""

    bundle: Path | None = None
    """Directory of a bundle: its served generator against its own held-out data."""
    real: Path | None = None
    """.npy of features of real data [n, d]."""
    fake: Path | None = None
    """.npy of features of samples [m, d]."""
    samples: int = 10_000
    """Drawn from the bundle, 100 at least. No more are compared with held-out data than there are training samples to compare."""
    seed: int = 0
    """Of the samples that are drawn."""
    json: bool = False
    """Print JSON for a program to read."""


def main() -> None:
    import tyro

    wish = tyro.cli(Wish, description=__doc__)
    try:
        if wish.bundle is not None:
            figures, perfect = judge(wish.bundle, wish.samples, wish.seed)
        elif wish.real is not None and wish.fake is not None:
            real, fake = _features(wish.real), _features(wish.fake)
            if real.shape[1] != fake.shape[1]:
                raise ValueError(f"{wish.real} has {real.shape[1]} columns and {wish.fake} {fake.shape[1]}; the same features are expected")
            figures, perfect = compare(real, fake), {}
        else:
            raise ValueError("give --bundle DIR, or --real and --fake")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if wish.json:
        print(json.dumps(_finite(figures) | ({"perfect": _finite(perfect)} if perfect else {})))
        return
    if perfect:
        print(f"{'':<24} {'generated':<12} perfect")
    for name, value in figures.items():
        print(f"{name:<24} {value:<12.6g} {f'{perfect[name]:.6g}' if name in perfect else ''}".rstrip())


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}


def _features(path: Path) -> Float64[ndarray, "n d"]:
    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if not isinstance(array, ndarray):
        raise ValueError(f"{path} is an npz of {', '.join(array.files) or 'nothing'}; save the array of features alone, as .npy")
    if array.dtype.kind not in "biuf" or array.ndim < 2 or len(array) < FEWEST or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{path} holds {array.dtype} {array.shape}; at least {FEWEST} rows of finite numbers are expected")
    return array.reshape(len(array), -1).astype(np.float64)


if __name__ == "__main__":
    main()
