"""The last steps on smooth vectors: what they estimate in closed form, what they reach, and when they leave a generator alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training import finish
from training.bundle import SignGaussian
from training.data import DATASETS, Dataset
from training.evaluation import sliced_wasserstein
from training.finish import finished, gap, is_smooth

LATENT = SignGaussian(0, 2, 1.0)


class Line(torch.nn.Module):
    """z times `steep`, moved by `off`, and by `apart` in class 1."""

    def __init__(self, steep, off, classes=0):
        super().__init__()
        self.steep, self.off, self.classes = torch.nn.Parameter(torch.tensor(steep)), torch.nn.Parameter(torch.tensor(off)), classes
        self.apart = torch.nn.Parameter(torch.zeros(2))

    def forward(self, z, y=None):
        x = z @ self.steep + self.off
        return x if y is None else x + y[:, None] * self.apart


def sheet(labels: np.ndarray | None = None) -> Dataset:
    samples = np.random.default_rng(0).multivariate_normal([3, 4], [[4, 0.2], [0.2, 1]], 100_000).astype(np.float32)
    if labels is None:
        return Dataset("sheet", samples, cells=4)
    return Dataset("sheet", samples + np.float32([0.1, 0]) * labels[:, None], cells=4, labels=labels, classes=("a", "b"))


def test_the_gap_is_that_of_sorted_means_and_nothing_where_laws_are_the_same():
    generator = torch.Generator().manual_seed(0)
    rounds, n, off = 2000, 64, torch.tensor([0.3, -0.1])
    w = torch.nn.functional.normalize(torch.randn(2, 5, generator=generator), dim=0)
    same, moved, naive = [], [], []
    for _ in range(rounds):
        fake, real = torch.randn(2, 2, n, 2, generator=generator)
        same.append(gap(fake, real, w))
        moved.append(gap(fake + off, real, w))
        naive.append(((fake[0] @ w).sort(dim=0).values - (real[0] @ w).sort(dim=0).values).square().mean())
    same, moved, naive = map(torch.stack, (same, moved, naive))
    expected = (off @ w).square().mean()
    assert abs(same.mean()) < 4 * same.std() / rounds**0.5 < 0.1 * naive.mean()
    assert abs(moved.mean() - expected) < 4 * moved.std() / rounds**0.5 < 0.1 * expected


@pytest.mark.slow
def test_mean_covariance_and_classes_become_those_of_the_data():
    labels = np.random.default_rng(1).integers(0, 2, 100_000)
    for dataset in (sheet(), sheet(labels)):
        rough = Line([[0.95, 0.0], [0.0, 1.05]], [0.05, -0.04], classes=len(dataset.classes))
        steps = []
        better, before, after = finished(rough, dataset, LATENT, progress=lambda done, most: steps.append((done, most)))  # noqa: B023
        floor = sliced_wasserstein(*(dataset.normalised(slice(i, i + 20_000)) for i in (0, dataset.trained)))
        assert after < 1.5 * floor < before and steps[-1] == (finish.STEPS, finish.STEPS)
        y = torch.from_numpy(dataset.labels[: dataset.trained]) if dataset.classes else None
        z = torch.from_numpy(LATENT.sample(seed=9, count=dataset.trained))
        fake, real = better(z, y).detach().double().numpy(), dataset.normalised(slice(0, dataset.trained))
        np.testing.assert_allclose(fake.mean(axis=0), real.mean(axis=0), atol=0.012)
        np.testing.assert_allclose(np.cov(fake.T), np.cov(real.T), atol=0.02)
        if dataset.classes:
            np.testing.assert_allclose(better.apart.detach().numpy() * dataset.scale, [0.1, 0], atol=0.05)  # from 0, with steps as small as networks take
        assert torch.equal(rough.steep, torch.tensor([[0.95, 0.0], [0.0, 1.05]]))  # as it was


@pytest.mark.slow
def test_the_same_comes_out_each_time_and_nothing_where_the_data_are_no_nearer(monkeypatch):
    dataset, rough = sheet(), Line([[0.95, 0.0], [0.0, 1.05]], [0.05, -0.04])
    monkeypatch.setattr(finish, "STEPS", 20)
    one, other = (finished(rough, dataset, LATENT, seed=5) for _ in range(2))
    assert torch.equal(one[0].steep, other[0].steep) and one[1:] == other[1:]
    for rate in (10.0, 1e30):
        monkeypatch.setattr(finish, "RATES", (rate, rate))
        kept, before, after = finished(rough, dataset, LATENT)
        assert kept is rough and before == after


def test_heaps_images_and_very_many_coordinates_are_left_as_they_were_learned():
    noise = np.random.default_rng(0).standard_normal((2000, 600)).astype(np.float32)
    assert is_smooth(sheet()) and is_smooth(DATASETS["moons"]())
    assert not any(is_smooth(d) for d in (DATASETS["grid"](), DATASETS["digits"](), Dataset("noise", noise, cells=4)))
