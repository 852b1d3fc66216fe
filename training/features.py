"""Fits the eye of the monitor: one small network from a sample as served to features, scores, mode and probabilities.

It sees real data only, never a generator. How it is exported is export.py; what its numbers are tested against, monitoring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from training.data import Dataset

MANIFOLD_QUANTILE = 0.99  # of held-out real data lies inside the manifold
PROTOTYPES = 100  # cells that cover labelled data, whose modes are the classes
NETS, WIDTH, STEPS = 3, 160, 1500  # the classifier of labelled data
FEATURES = 32
SCORES = ("manifold_distance", "radius", "ambiguity")


class Eye(nn.Module):
    """Served samples [n, ...] -> features [n, p], scores [n, s], mode [n] (-1: off the manifold), probability [n, K].

    manifold_distance: Mahalanobis distance to the nearest cell; cells are k-means centres that share one covariance.
    radius: Mahalanobis distance to the mean of all data.
    ambiguity, only where data are labelled: 1 - the largest probability; blends of two classes are near the manifold, not here.
    Modes are the cells themselves, or, where data are labelled, the classes of an ensemble of classifiers.
    """

    shift: Tensor
    scale: Tensor
    within: Tensor
    cells: Tensor
    overall: Tensor
    threshold: Tensor
    projection: Tensor
    offset: Tensor

    def __init__(
        self, shift: ndarray, scale: ndarray, within: ndarray, cells: ndarray, overall: ndarray, centre: ndarray
    ) -> None:
        super().__init__()
        self.classifier: Ensemble | None = None
        for name, value in {
            "shift": shift,
            "scale": scale,
            "within": within,  # [d, d]: x @ within has unit covariance around each cell
            "cells": cells @ within,
            "overall": overall,  # [d, d]: (x - centre) @ overall has unit covariance
            "offset": centre @ overall,
            "threshold": np.inf,
            "projection": np.eye(len(centre)),
        }.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(value), dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = (x.flatten(1).to(torch.float32) - self.shift) / self.scale
        inner, outer = x @ self.within, x @ self.overall - self.offset
        # The expanded square only ranks the cells: it loses too many digits to be the distance itself.
        rank = (self.cells.square().sum(dim=1) - 2 * inner @ self.cells.T).argmin(dim=1)
        distance = (inner - self.cells[rank]).square().sum(dim=1).sqrt()
        radius = outer.square().sum(dim=1).sqrt()
        if self.classifier is None:
            squares = (inner[:, None, :] - self.cells).square().sum(dim=2)
            features, probability = outer, torch.softmax(-squares / 2, dim=1)
            scores = torch.stack([distance, radius], dim=1)
        else:
            hidden, probability = self.classifier(x)
            features = (hidden - self.classifier.centre) @ self.projection
            scores = torch.stack([distance, radius, 1 - probability.amax(dim=1)], dim=1)
        mode = torch.where(distance > self.threshold, -1, probability.argmax(dim=1))
        return features, scores, mode, probability


class Ensemble(nn.Module):
    """The mean of several classifiers, so that a sample between two classes gets a probability between them.

    x [n, d] -> hidden activations of all nets [n, h], probability [n, c] (Lakshminarayanan et al., Deep ensembles, 2017).
    """

    centre: Tensor

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
            for _ in range(NETS)
        )
        self.register_buffer("centre", torch.zeros(NETS * WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = [net[:-1](x) for net in self.nets]
        logits = torch.stack([net[-1](h) for net, h in zip(self.nets, hidden, strict=True)])
        return torch.cat(hidden, dim=1), torch.softmax(logits, dim=2).mean(dim=0)


@dataclass(frozen=True)
class Sight:
    """An eye with the names of what it returns."""

    eye: Eye
    modes: tuple[str, ...]
    scores: tuple[str, ...]
    accuracy: float | None  # on held-out data; None without labels


def fit_eye(dataset: Dataset, *, seed: int) -> Sight:
    """Fit on the training part; set the manifold's threshold on the held-out part."""
    train = dataset.normalised()[: dataset.trained]
    held_out = torch.from_numpy(dataset.samples[dataset.trained :])
    found = KMeans(PROTOTYPES if dataset.classes else dataset.cells, n_init=4, random_state=seed).fit(train)
    places = np.round(found.cluster_centers_ * dataset.scale + dataset.shift, 2) + 0.0  # no -0.00 in names
    centres = found.cluster_centers_[np.lexsort(places.T[::-1])]
    within = _whitener(train - found.cluster_centers_[found.labels_])
    eye = Eye(dataset.shift, dataset.scale, within, centres, _whitener(train), train.mean(axis=0))
    if dataset.labels is not None:
        eye.classifier = _fit_ensemble(train, dataset.labels[: dataset.trained], len(dataset.classes), seed=seed)
        eye.projection = _principal(eye.classifier, torch.from_numpy(train))
    eye.eval().requires_grad_(False)

    _, scores, _, probability = eye(held_out)
    eye.threshold.fill_(float(np.quantile(scores[:, 0].numpy(), MANIFOLD_QUANTILE)))
    if dataset.labels is None:
        names = tuple(f"({', '.join(f'{v:.2f}' for v in place)})" for place in sorted(places.tolist()))
        return Sight(eye, names, SCORES[:2], None)
    accuracy = float(np.mean(probability.argmax(dim=1).numpy() == dataset.labels[dataset.trained :]))
    return Sight(eye, dataset.classes, SCORES, accuracy)


def _whitener(x: Float32[ndarray, "n d"]) -> Float[ndarray, "d d"]:
    """W with cov(x W) = I, of the covariance shrunk as by Ledoit and Wolf (2004): pixels that never vary stay finite."""
    covariance, _ = ledoit_wolf(x - x.mean(axis=0), assume_centered=True)
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(values)


def _fit_ensemble(x: Float32[ndarray, "n d"], labels: Int64[ndarray, "n"], classes: int, *, seed: int) -> Ensemble:
    """Noise and blends of two samples (mixup, Zhang et al. 2018) teach the nets to be unsure between the classes."""
    torch.manual_seed(seed)
    ensemble = Ensemble(x.shape[1], classes)
    data, target = torch.from_numpy(x), torch.nn.functional.one_hot(torch.from_numpy(labels), classes).float()
    optimiser = torch.optim.Adam(ensemble.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        loss = torch.zeros(())
        for net in ensemble.nets:
            pick, other = torch.randint(len(data), (2, 128))
            blend = torch.where(torch.rand(128, 1) < 0.5, torch.rand(128, 1), 1.0)
            inputs = blend * data[pick] + (1 - blend) * data[other] + 0.2 * torch.randn(128, x.shape[1])
            loss = loss + nn.functional.cross_entropy(net(inputs), blend * target[pick] + (1 - blend) * target[other])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return ensemble.eval()


@torch.no_grad()
def _principal(ensemble: Ensemble, x: Float[Tensor, "n d"]) -> Float[Tensor, "h p"]:
    """The leading directions of the hidden activations, all divided by one number so that features have unit mean variance."""
    hidden, _ = ensemble(x)
    ensemble.centre.copy_(hidden.mean(dim=0))
    values, vectors = torch.linalg.eigh(torch.cov(hidden.T.double()))
    leading = values[-FEATURES:].flip(0)
    return (vectors[:, -FEATURES:].flip(1) / leading.mean().sqrt()).float()
