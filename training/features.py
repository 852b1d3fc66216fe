"""Fits the eye of the monitor: one small network from a sample as served to features, scores, mode and probabilities.

It sees real data only, never a generator. How it is exported is export.py; what its numbers are tested against, monitoring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from training.bundle import AMBIGUITY, NEARER_TRAIN, NEAREST_TRAIN
from training.data import PIECE, Dataset

MANIFOLD_QUANTILE = 0.99  # of held-out real data lies inside the manifold
PROTOTYPES = 100  # cells that cover labelled data, whose modes are the classes
NETS, WIDTH, STEPS = 3, 160, 1500  # the classifier of labelled data
FEATURES, MOST_FEATURES = 32, 64
MOST_INPUTS = 1024  # numbers of an image that are looked at: larger ones are seen through coarser pixels
MOST_FITTED = 20_000  # samples to fit on
SCORES = ("manifold_distance", "radius", AMBIGUITY)
TINY = 1e-6  # distance that is none
REMEMBERED = 4096  # training samples, at most, whose features are kept, and held-out ones beside them
PLACES, TABLES = 1_048_573, 5  # of the filter that knows exact copies; a prime number
COPIED = PLACES // 16  # training samples in it, at most: of others, 16^-5 are taken for one, far fewer than the deepest tail holds


class Lens(nn.Module):
    """Served samples [n, ...] -> what the eye looks at, [n * parts, q], in the networks' units.

    Large images are averaged over squares of `pool` x `pool` pixels. Stacked images come apart: one row for each channel.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, dataset: Dataset) -> None:
        super().__init__()
        self.is_image, self.parts = dataset.is_image, dataset.shape[-1] if dataset.stacked else 1
        self.pool = math.ceil(math.sqrt(dataset.dim / self.parts / MOST_INPUTS)) if dataset.is_image else 1
        for name in ("shift", "scale"):
            value = getattr(dataset, name)
            self.register_buffer(name, torch.from_numpy(value[:1] if dataset.is_image else value))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        if self.pool > 1:
            x = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), self.pool, ceil_mode=True).permute(0, 2, 3, 1)  # no edge is left out
        x = (x.flatten(1) - self.shift) / self.scale
        return x.unflatten(1, (-1, self.parts)).transpose(1, 2).flatten(0, 1) if self.parts > 1 else x

    def together(self, x: Tensor) -> Tensor:
        """[n * parts, k] -> [n, parts, k]."""
        return x.unflatten(0, (-1, self.parts))


class Copies(nn.Module):
    """Whether images [n, ...] of bytes are among some, to the last bit: always, where they are; else with probability (m / PLACES)^TABLES.

    A Bloom filter (Comm. ACM 1970). The places of an image are random linear forms of its bytes modulo a prime, which differ for
    two images but with probability 1 / PLACES each (Carter and Wegman, J. Comput. Syst. Sci. 1979).
    """

    weights: Tensor
    tables: Tensor
    starts: Tensor

    def __init__(self, samples: ndarray, rows: Int64[ndarray, "m"], seed: int) -> None:
        super().__init__()
        weights = np.random.default_rng(seed).integers(PLACES, size=(samples[0].size, TABLES))
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float64)))  # sums below 2^53 are exact
        self.register_buffer("starts", torch.arange(TABLES) * PLACES)
        self.register_buffer("tables", torch.zeros(TABLES * PLACES, dtype=torch.uint8))
        for part in np.array_split(rows, len(rows) * samples[0].size // PIECE + 1):
            self.tables[self.places(torch.from_numpy(samples[part]))] = 1

    def places(self, x: Tensor) -> Tensor:
        return (x.flatten(1).to(torch.float64) @ self.weights).to(torch.int64) % PLACES + self.starts

    def forward(self, x: Tensor) -> Tensor:
        return self.tables[self.places(x)].to(torch.float32).amin(dim=1, keepdim=True) > 0


class Eye(nn.Module):
    """Served samples [n, ...] -> features [n, p], scores [n, s], mode [n] (-1: off the manifold), probability [n, K].

    manifold_distance: Mahalanobis distance to the nearest cell; cells are k-means centres that share one covariance.
    radius: Mahalanobis distance to the mean of all data.
    ambiguity, only where data are labelled: 1 - the largest probability; blends of two classes are near the manifold, not here.
    nearest_train, unless nothing is `remembered`: distance of the features to the nearest of some training samples; 0 is a copy,
    of these or, to the last bit, of any that `copies` knows.
    nearer_train, the same: a / (a + b) for a the distance to the nearest of the first of these, b to that of as many held-out
    samples. It is below 1/2 as often as not where the split is nothing to the generator (after Meehan et al., AISTATS 2020).
    Modes are the cells themselves, or, where data are labelled, the classes of an ensemble of classifiers. Of stacked images
    the farthest channel counts, and the classes of the channels together are the mode.
    """

    within: Tensor
    cells: Tensor
    overall: Tensor
    threshold: Tensor
    projection: Tensor
    offset: Tensor
    remembered: Tensor
    held_out: Tensor

    def __init__(self, lens: Lens, within: ndarray, cells: ndarray, overall: ndarray, centre: ndarray) -> None:
        super().__init__()
        self.lens = lens
        self.classifier: Ensemble | None = None
        self.copies: Copies | None = None
        for name, value in {
            "within": within,  # [q, q]: x @ within has unit covariance around each cell
            "cells": cells @ within,
            "overall": overall,  # [q, q]: (x - centre) @ overall has unit covariance; leading directions come last
            "offset": centre @ overall,
            "threshold": np.inf,
            "projection": np.eye(len(centre)),
            "remembered": np.zeros((0, len(centre))),  # features of training samples, [m, p]
            "held_out": np.zeros((0, len(centre))),  # of others, no more
        }.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(value), dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        served, x = x, self.lens(x)
        inner, outer = x @ self.within, x @ self.overall - self.offset
        # The expanded square only ranks the cells: it loses too many digits to be the distance itself.
        rank = (self.cells.square().sum(dim=1) - 2 * inner @ self.cells.T).argmin(dim=1)
        distance = (inner - self.cells[rank]).square().sum(dim=1).sqrt()
        radius = outer.square().sum(dim=1)
        if self.lens.parts > 1:
            distance = self.lens.together(distance[:, None]).amax(dim=1)[:, 0]
            radius = self.lens.together(radius[:, None]).sum(dim=1)[:, 0]
        if self.classifier is None:
            squares = (inner[:, None, :] - self.cells).square().sum(dim=2)
            features, probability = outer[:, -MOST_FEATURES:], torch.softmax(-squares / 2, dim=1)
            scores = torch.stack([distance, radius.sqrt()], dim=1)
        else:
            hidden, probability = self.classifier(x)
            features = (hidden - self.classifier.centre) @ self.projection
            if self.lens.parts > 1:
                features, each = self.lens.together(features).flatten(1), self.lens.together(probability)
                probability = each[:, 0]
                for part in range(1, self.lens.parts):
                    probability = (probability[:, :, None] * each[:, part, None, :]).flatten(1)
            scores = torch.stack([distance, radius.sqrt(), 1 - probability.amax(dim=1)], dim=1)
        if len(self.remembered):
            sets = self.remembered, self.remembered[: len(self.held_out)], self.held_out
            nearest, train, held_out = (_distance(features, points) for points in sets)
            if self.copies is not None:
                nearest = torch.where(self.copies(served), 0.0, nearest)
            scores = torch.cat([scores, nearest, (train + TINY) / (train + held_out + 2 * TINY)], dim=1)
        mode = torch.where(distance > self.threshold, -1, probability.argmax(dim=1))
        return features, scores, mode, probability


def _distance(x: Tensor, points: Tensor) -> Tensor:
    """[n, 1]: to the nearest of the points [m, p]. In few dimensions they lie so dense that an expanded square would take the wrong one."""
    if points.shape[1] <= 3:
        squares = torch.stack([(x[:, j, None] - points[:, j]).square() for j in range(points.shape[1])]).sum(dim=0)
    else:
        squares = points.square().sum(dim=1) - 2 * x @ points.T  # less what is the same for all
    return (x - points[squares.argmin(dim=1)]).square().sum(dim=1, keepdim=True).sqrt()


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


def fit_eye(dataset: Dataset, *, seed: int, remember: bool = True) -> Sight:
    """Fit on the training part; set the manifold's threshold on the held-out part. `remember`: keep features of training samples."""
    lens = Lens(dataset)
    rows = np.sort(np.random.default_rng(seed).permutation(dataset.trained)[: MOST_FITTED // lens.parts])
    train = np.concatenate([lens(torch.from_numpy(dataset.samples[part])).numpy() for part in dataset.pieces(rows)])
    count = min(PROTOTYPES, len(train) // 4) if dataset.classes else dataset.cells
    found = KMeans(count, n_init=4, random_state=seed).fit(train)
    centres = found.cluster_centers_
    if not dataset.classes:
        decimals = max(2, 1 - math.floor(math.log10(dataset.scale.min())))
        places = np.round(centres * dataset.scale + dataset.shift, decimals) + 0.0 if dataset.dim <= 3 else centres  # no -0.00 in names
        order = np.lexsort(places.T[::-1])
        centres, places = centres[order], places[order]
    within = _whitener(train - found.cluster_centers_[found.labels_])
    eye = Eye(lens, within, centres, _whitener(train), train.mean(axis=0))
    if dataset.labels is not None:
        labels, classes = dataset.labels[rows], len(dataset.classes)
        if dataset.stacked:
            labels, classes = (labels[:, None] // 10 ** np.arange(lens.parts)[::-1] % 10).ravel(), 10
        eye.classifier = _fit_ensemble(train, labels, classes, seed=seed)
        eye.projection = _principal(eye.classifier, torch.from_numpy(train), min(FEATURES, MOST_FEATURES // lens.parts))
    eye.eval().requires_grad_(False)
    scores = SCORES if dataset.labels is not None else SCORES[:2]
    parts = dataset.pieces(np.arange(dataset.trained, len(dataset.samples)), fewest=len(dataset.samples) // 10_000 + 1)
    some = np.random.default_rng(seed).permutation(rows)[:REMEMBERED]
    held_out, distance, seen = [], [], []
    for part in parts:
        features, scored, _, probability = eye(torch.from_numpy(dataset.samples[part]))  # a copy: a file in memory is not torch's to write
        if sum(map(len, held_out)) < len(some):
            held_out.append(features)
        distance.append(scored[:, 0].numpy().copy())  # a view would keep the others
        seen.append(probability.argmax(dim=1).numpy())
    if remember:
        eye.remembered = torch.cat([eye(torch.from_numpy(dataset.samples[part]))[0] for part in dataset.pieces(some, fewest=8)])
        eye.held_out = torch.cat(held_out)[: len(some)]
        scores = (*scores, NEAREST_TRAIN, NEARER_TRAIN)
        if dataset.samples.dtype == np.uint8 and dataset.trained > len(some):
            known = np.sort(np.random.default_rng(seed).permutation(dataset.trained)[:COPIED])
            eye.copies = Copies(dataset.samples, known, seed)
    eye.threshold.fill_(float(np.quantile(np.concatenate(distance), MANIFOLD_QUANTILE)))
    if dataset.labels is None:
        names = named(places, decimals) if dataset.dim <= 3 else tuple(f"cell-{k}" for k in range(count))
        return Sight(eye, names, scores, None)
    return Sight(eye, dataset.classes, scores, float(np.mean(np.concatenate(seen) == dataset.labels[dataset.trained :])))


def named(places: Float[ndarray, "k d"], decimals: int) -> tuple[str, ...]:
    """Each place as (x, y), with a number where it is not the first of that name."""
    spelled = [f"({', '.join(f'{v:.{decimals}f}' for v in place)})" for place in places]
    before = [spelled[:k].count(name) for k, name in enumerate(spelled)]
    return tuple(f"{name} #{n + 1}" if n else name for name, n in zip(spelled, before, strict=True))


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
def _principal(ensemble: Ensemble, x: Float[Tensor, "n d"], count: int) -> Float[Tensor, "h p"]:
    """The leading directions of the hidden activations, all divided by one number so that features have unit mean variance."""
    hidden, _ = ensemble(x)
    ensemble.centre.copy_(hidden.mean(dim=0))
    values, vectors = torch.linalg.eigh(torch.cov(hidden.T.double()))
    leading = values[-count:].flip(0)
    return (vectors[:, -count:].flip(1) / leading.mean().sqrt()).float()
