"""The last steps on smooth vectors: what they estimate in closed form, what they reach, and when they leave a generator alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training import finish
from training.bundle import SignGaussian
from training.clusters import Clusters
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


def test_the_gap_of_classes_is_the_mean_of_theirs():
    """Classes of which every other is moved to the right and the rest to the left: errors that would cancel."""
    generator = torch.Generator().manual_seed(0)
    rounds, n, classes, off = 1000, 512, 16, 0.2
    found = []
    for _ in range(rounds):
        y = torch.randint(classes, (n,), generator=generator)
        fake, real = torch.randn(2, 2, n, 1, generator=generator)
        found.append(gap(fake + off * (-1) ** y[:, None], real, torch.ones(1, 1), y))
    found = torch.stack(found)
    assert abs(found.mean() - off**2) < 4 * found.std() / rounds**0.5 < 0.2 * off**2


@pytest.mark.slow
def test_mean_covariance_and_classes_become_those_of_the_data():
    labels = np.random.default_rng(1).integers(0, 2, 100_000)
    for dataset in (sheet(), sheet(labels)):
        rough = Line([[0.95, 0.0], [0.0, 1.05]], [0.05, -0.04], classes=len(dataset.classes))
        steps = []
        better, ending = finished(rough, dataset, LATENT, seed=0, steps=10_000, progress=lambda done, most: steps.append((done, most)))  # noqa: B023
        floor = sliced_wasserstein(*(dataset.normalised(slice(i, i + 20_000)) for i in (0, dataset.trained)))
        assert ending["kept"] and ending["after"] < 1.5 * floor < ending["before"] and steps[-1] == (finish.STEPS, finish.STEPS)
        y = torch.from_numpy(dataset.labels[: dataset.trained]) if dataset.classes else None
        z = torch.from_numpy(LATENT.sample(seed=9, count=dataset.trained))
        fake, real = better(z, y).detach().double().numpy(), dataset.normalised(slice(0, dataset.trained))
        np.testing.assert_allclose(fake.mean(axis=0), real.mean(axis=0), atol=0.012)
        np.testing.assert_allclose(np.cov(fake.T), np.cov(real.T), atol=0.02)
        if dataset.classes:
            np.testing.assert_allclose(better.apart.detach().numpy() * dataset.scale, [0.1, 0], atol=0.05)  # from 0, with steps as small as networks take
        assert torch.equal(rough.steep, torch.tensor([[0.95, 0.0], [0.0, 1.05]]))  # as it was


@pytest.mark.slow
def test_the_same_comes_out_each_time_and_nothing_where_the_data_are_farther_off(monkeypatch):
    dataset, rough = sheet(), Line([[0.95, 0.0], [0.0, 1.05]], [0.05, -0.04])
    (one, ending), (other, again) = (finished(rough, dataset, LATENT, seed=5, steps=20) for _ in range(2))
    assert torch.equal(one.steep, other.steep) and not torch.equal(one.steep, rough.steep) and ending == again
    for rate in (10.0, 1e30):
        monkeypatch.setattr(finish, "RATES", (rate, rate))
        kept, ending = finished(rough, dataset, LATENT, seed=5, steps=20)
        assert kept is rough and not ending["kept"] and 10 * ending["before"] < ending["after"] < float("inf")


class Rings(torch.nn.Module):
    """Two rings, exact but for their shares: the right one has 5 of the 16 patterns of signs. What can be learned begins at nothing."""

    def __init__(self):
        super().__init__()
        self.classes = 0
        self.bend = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.LeakyReLU(0.2), torch.nn.Linear(64, 2))
        torch.nn.init.zeros_(self.bend[2].weight), torch.nn.init.zeros_(self.bend[2].bias)

    def forward(self, z, y=None):
        right = (z[:, :4] > 0).float() @ torch.tensor([8.0, 4.0, 2.0, 1.0]) < 5
        angle, radius = 2 * torch.pi * torch.special.ndtr(z[:, 4]), 1 + 0.03 * z[:, 5]
        x = torch.stack([radius * angle.cos() + 4 * right, radius * angle.sin()], dim=1)
        return (x - torch.tensor([4 * 5 / 16, 0.0])) / torch.tensor([2.0, 0.7]) + self.bend(z)


@pytest.mark.slow
def test_curves_whose_shares_signs_cannot_have_are_not_torn():
    torch.manual_seed(0)
    rng, n = np.random.default_rng(0), 50_000
    right, angle, radius = rng.random(n) < 0.27, rng.uniform(0, 2 * np.pi, n), 1 + 0.03 * rng.standard_normal(n)
    samples = np.stack([radius * np.cos(angle) + 4 * right, radius * np.sin(angle)], axis=1).astype(np.float32)
    dataset = Dataset("rings", samples, cells=4, counted=Clusters(2, hollow=True, signs=4))
    dataset.__dict__["shift"], dataset.__dict__["scale"] = np.float32([4 * 5 / 16, 0]), np.float32([2, 0.7])  # as Rings has them
    rings = Rings()
    kept, ending = finished(rings, dataset, SignGaussian(4, 2, 1.0), seed=0, steps=600)
    assert kept is rings and ending["after"] < ending["before"]  # nearer by distance, and between the rings


def test_heaps_images_and_very_many_coordinates_are_left_as_they_were_learned():
    noise = np.random.default_rng(0).standard_normal((5000, 600)).astype(np.float32)
    few = Dataset("few", noise[:2500, :2], cells=4)  # of which 2,000 are trained on
    assert is_smooth(sheet()) and is_smooth(DATASETS["moons"]())
    assert not any(is_smooth(d) for d in (DATASETS["grid"](), DATASETS["digits"](), few, Dataset("noise", noise, cells=4)))
