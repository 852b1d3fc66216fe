"""The last steps on smooth vectors, without a critic: the generator is moved until random projections of it are those of the data.

The noise of a critic's last steps leaves mean, width and how densely a curve is filled a hundredth off, and the whole with them.
Along a line the best transport is known, since sorted samples belong together, so that no second network is needed (Bonneel et al.
2015; Deshpande et al., CVPR 2018). That finds no shape, so it comes after the adversarial training; and it would pull samples out of
separate heaps, whose shares are never quite right. Those, and images, stay as they were learned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor, nn

from training.bundle import SignGaussian
from training.data import Dataset
from training.evaluation import sliced_wasserstein

STEPS, HALF, DIRECTIONS, RATES = 600, 2048, 16, (1e-3, 1e-5)
DIMS = 512  # beyond, a random direction says next to nothing of the whole
APART = 1e3  # between classes, in standard deviations of the data: no sample lies that far off
JUDGED, DRAWS, CHANCE = 20_000, 4, 1.2  # held-out samples, means of so many draws, and what chance alone makes of their distance


def is_smooth(dataset: Dataset) -> bool:
    """Whether the last steps are for such data: vectors that do not fall into heaps."""
    return not (dataset.is_image or dataset.dim > DIMS or dataset.clusters.heaps)


def gap(
    fake: Float[Tensor, "2 n d"], real: Float[Tensor, "2 n d"], directions: Float[Tensor, "d k"], classes: Int64[Tensor, "2 n"] | None = None
) -> Float[Tensor, ""]:
    """An estimate, without bias, of |E sort(x w) - E sort(y w)|^2 / n: 0 where x [n, d] and y have one law; mean over `directions` w.

    Between two batches W_2^2 is |sort(x w) - sort(y w)|^2 / n, which is more than 0 between two of one law, and less where the fakes
    lie closer together: going down on it draws them in, two moons by half a percent. Two independent halves leave that term out.
    Where there are `classes`, the same ones of fakes and of real samples, each is sorted by itself.
    """
    apart = 0 if classes is None else APART * classes.double()[..., None]
    first, second = (fake @ directions + apart).sort(dim=1).values - (real @ directions + apart).sort(dim=1).values
    return (first * second).mean()


def finished(
    generator: nn.Module, dataset: Dataset, latent: SignGaussian, *, seed: int = 0, progress: Callable[[int, int], None] = lambda done, most: None
) -> tuple[nn.Module, float, float]:
    """The generator after the last steps, and its sliced Wasserstein distance to held-out data before and after, in the networks' units.

    `generator` stays as it is, and is what comes back where the held-out data are farther off afterwards, by more than chance. The same arguments give the
    same generator.
    """
    better = copy.deepcopy(generator).eval().requires_grad_(True)
    optimiser = torch.optim.Adam(better.parameters(), RATES[0], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS, RATES[1])
    labels = torch.from_numpy(dataset.labels) if generator.classes else None
    rng = np.random.default_rng(seed)

    def drawn(network: nn.Module, rows: Int64[ndarray, "n"], *, seed: int, offset: int = 0) -> Float[Tensor, "n d"]:
        z = torch.from_numpy(latent.sample(seed=seed, offset=offset, count=len(rows)))
        return network(z, None if labels is None else labels[rows])

    for step in range(STEPS):
        rows = rng.integers(dataset.trained, size=2 * HALF)
        fake, real = drawn(better, rows, seed=seed, offset=step * len(rows)), torch.from_numpy(dataset.normalised(rows))
        directions = nn.functional.normalize(torch.from_numpy(rng.standard_normal((dataset.dim, DIRECTIONS), np.float32)), dim=0)
        halves = (x.unflatten(0, (2, HALF)) for x in (fake, real))
        loss = gap(*halves, directions, None if labels is None else labels[rows].unflatten(0, (2, HALF)))
        optimiser.zero_grad()
        (loss * dataset.dim).backward()  # of all coordinates: the gradient is as large in many dimensions as in few
        optimiser.step()
        schedule.step()
        progress(step + 1, STEPS)

    rows = np.arange(dataset.trained, len(dataset.samples))[:JUDGED]
    real = dataset.normalised(rows)

    def distance(network: nn.Module) -> float:
        with torch.no_grad():
            draws = [drawn(network, rows, seed=seed + 1, offset=i * len(rows)).numpy() for i in range(DRAWS)]
        return float(np.mean([sliced_wasserstein(real, fake) for fake in draws]))

    before, after = distance(generator.eval()), distance(better)
    return (better, before, after) if after < CHANCE * before else (generator, before, before)
