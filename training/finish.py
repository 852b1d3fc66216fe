"""The last steps on smooth vectors, without a critic: the generator is moved until random projections of it are those of the data.

The noise of a critic's last steps leaves mean, width and how densely a curve is filled a hundredth off, and the whole with them.
Along a line the best transport is known, since sorted samples belong together, so that no second network is needed (Bonneel et al.
2015; Deshpande et al., CVPR 2018). That finds no shape, so it comes after the adversarial training; and it would pull samples out of
separate heaps, whose shares are never quite right. Those, and images, stay as they were learned. The figures and alarms of training
are those of the generator before these steps; the certificate is of what is served.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor, nn

from training.bundle import SignGaussian
from training.data import Dataset
from training.evaluation import prdc, sliced_wasserstein

STEPS, HALF, DIRECTIONS, RATES = 600, 2048, 16, (1e-3, 1e-5)
DIMS = 512  # beyond, a random direction says next to nothing of the whole
APART = 1e6  # between classes, in standard deviations of the data
JUDGED, DRAWS, NEAR = 20_000, 4, 3000  # held-out samples, draws of as many generated ones, and of how many neighbours are sought
FARTHER, STRAYED = 1.2, 0.02  # what chance may make of a distance that has not changed, and what must not leave the data


def is_smooth(dataset: Dataset) -> bool:
    """Whether the last steps are for such data: vectors that do not fall into heaps, and enough of them not to be learned by heart."""
    return not (dataset.is_image or dataset.dim > DIMS or dataset.clusters.heaps or dataset.trained < HALF)


def gap(
    fake: Float[Tensor, "2 n d"], real: Float[Tensor, "2 n d"], directions: Float[Tensor, "d k"], classes: Int64[Tensor, "n"] | None = None
) -> Float[Tensor, ""]:
    """An estimate, without bias, of |E sort(x w) - E sort(y w)|^2 / n: 0 where x [n, d] and y have one law; mean over `directions` w.

    Between two batches W_2^2 is |sort(x w) - sort(y w)|^2 / n, which is more than 0 between two of one law, and less where the fakes
    lie closer together: going down on it draws them in. Two independent halves leave that term out. Where there are `classes`, which
    are those of the fakes and of the real samples in both halves, each is sorted by itself.
    """
    apart = 0 if classes is None else APART * classes.double()[:, None]
    first, second = (fake @ directions + apart).sort(dim=1).values - (real @ directions + apart).sort(dim=1).values
    return (first * second).mean()


def finished(
    generator: nn.Module,
    dataset: Dataset,
    latent: SignGaussian,
    *,
    seed: int,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> tuple[nn.Module, dict[str, float | bool]]:
    """The generator after the last steps, of which there are no more than `steps`, in eval mode, and what became of it.

    before, after: its mean sliced Wasserstein distance to held-out data, in the networks' units; kept: whether the steps were. They
    are not where the distance has grown by more than chance, or where samples have left the data: two curves that signs share out
    unevenly are torn, to the distance's delight. Then `generator` comes back.
    """
    better, steps = copy.deepcopy(generator).eval(), min(STEPS, steps)
    optimiser = torch.optim.Adam([p for p in better.parameters() if p.requires_grad], RATES[0], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, RATES[1])
    labels = torch.from_numpy(dataset.labels) if generator.classes else None
    rng = np.random.default_rng(seed)

    def drawn(network: nn.Module, rows: Int64[ndarray, "n"], *, seed: int, offset: int) -> Float[Tensor, "n d"]:
        z = torch.from_numpy(latent.sample(seed=seed, offset=offset, count=len(rows)))
        return network(z, None if labels is None else labels[rows])

    for step, rows in zip(range(steps), _halves(dataset, rng, of_one_class=labels is not None), strict=False):
        fake, real = drawn(better, rows, seed=seed, offset=step * len(rows)), torch.from_numpy(dataset.normalised(rows))
        directions = nn.functional.normalize(torch.from_numpy(rng.standard_normal((dataset.dim, DIRECTIONS), np.float32)), dim=0)
        halves = (x.unflatten(0, (2, HALF)) for x in (fake, real))
        optimiser.zero_grad()
        gap(*halves, directions, None if labels is None else labels[rows[:HALF]]).backward()
        optimiser.step()
        schedule.step()
        progress(step + 1, steps)

    rows = np.arange(dataset.trained, len(dataset.samples))[:JUDGED]
    real = dataset.normalised(rows)

    def judged(network: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            draws = [drawn(network, rows, seed=seed + 1, offset=i * len(rows)).nan_to_num(1e6, 1e6, -1e6).numpy() for i in range(DRAWS)]
        return float(np.mean([sliced_wasserstein(real, x) for x in draws])), prdc(real[:NEAR], draws[0][:NEAR])["precision"]

    (before, near), (after, still_near) = judged(generator.eval()), judged(better)
    kept = after < FARTHER * before and still_near > near - STRAYED
    return better if kept else generator, {"before": before, "after": after, "kept": kept}


def _halves(dataset: Dataset, rng: np.random.Generator, *, of_one_class: bool) -> Iterator[Int64[ndarray, "rows"]]:
    """Twice HALF training rows, with replacement, for ever. Where asked, each of the second half is of the class of that in the first."""
    if not of_one_class:
        while True:
            yield rng.integers(dataset.trained, size=2 * HALF)
    labels = dataset.labels[: dataset.trained]
    by_class, count = np.argsort(labels, kind="stable"), np.bincount(labels)
    start = np.cumsum(count) - count
    while True:
        first = rng.integers(dataset.trained, size=HALF)
        wanted = labels[first]
        yield np.concatenate([first, by_class[start[wanted] + rng.integers(count[wanted])]])
