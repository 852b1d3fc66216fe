"""Says, while a GAN trains, what goes wrong and why: figures every hundredth of a run, and alarms in words.

A diagnosis looks at one generator and one critic on data that neither has seen, draws its own latents and changes nothing, so
that a run with it and without it end in the same weights. It knows no optimiser and no file; whether an alarm stops the run is
the caller's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from numpy import ndarray
from scipy.spatial import cKDTree
from scipy.stats import binom
from sklearn.cluster import KMeans
from torch import Tensor, nn

from training.bundle import MODE_FLOOR, SignGaussian
from training.data import Dataset
from training.objectives import Objective
from training.views import pack

ROWS = 512  # reals and fakes of one look
PATIENCE = 3  # looks in a row before an alarm is raised
LATENTS = 2**40  # added to the seed: the latents of a look are not those of training
A_MODE = 4  # fakes for each mode, at least: with fewer, chance decides which are hit
BY_CHANCE = 0.01  # how often a sound generator may be said to miss a mode, at a look
NEIGHBOUR = 5  # a sample lies among the data where it is nearer to one of them than this neighbour of theirs is


# Figures ----------------------------------------------------------------------------------------------------------------------


def hill(sizes: Float[ndarray, "n"], share: float = 0.05) -> float:
    """The tail index of positive numbers from their largest twentieth (Hill 1975). Below 2 there is no variance, at 1 no mean.

    Infinite where the largest numbers are all equal.
    """
    ordered = np.sort(sizes)[::-1].astype(np.float64)
    k = max(1, int(share * len(ordered)))
    mean = float(np.mean(np.log(np.maximum(ordered[:k], 1e-300) / max(ordered[k], 1e-300))))
    return 1 / mean if mean > 0 else math.inf


def two_nn(x: Float[ndarray, "n d"]) -> float:
    """Intrinsic dimension: n / sum log(r2 / r1) over distances to the two nearest neighbours (Facco et al. 2017, eq. 4's MLE).

    Exact repeats are left out; 0 where nothing else is left.
    """
    distinct = np.unique(x, axis=0)
    if len(distinct) < 3:
        return 0.0
    distance = cKDTree(distinct).query(distinct, 3)[0]
    ratio = distance[:, 2] / distance[:, 1]
    return float(len(ratio) / max(np.log(ratio).sum(), 1e-12))


def signal_to_noise(gradients: Float[ndarray, "n d"]) -> float:
    """|mean|^2 over the variance of that mean: below 1 the step of the generator is mostly chance."""
    variance = gradients.var(axis=0, ddof=1).sum() / len(gradients)
    return float((gradients.mean(axis=0) ** 2).sum() / max(variance, 1e-300))


def pairs_told_apart(real: Float[ndarray, "n"], fake: Float[ndarray, "m"]) -> float:
    """The share of (real, fake) pairs that the critic puts in order, ties counted half: its accuracy whatever the objective."""
    ordered = np.sort(fake)
    below, up_to = (np.searchsorted(ordered, real, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(fake)))


class Manifold:
    """Balls around real data, each as far as its NEIGHBOUR-th neighbour: what lies in one is like real (Kynkaanniemi et al. 2019)."""

    def __init__(self, real: Float32[Tensor, "n d"]) -> None:
        self.real = real
        self.radius = torch.cdist(real, real).kthvalue(min(NEIGHBOUR + 1, len(real)), dim=1).values

    def precision(self, x: Float32[Tensor, "m d"]) -> float:
        """The share of samples that lie in one."""
        return float((torch.cdist(x, self.real) < self.radius).any(dim=1).float().mean())


def kl(p: Float64[ndarray, "k"], q: Float64[ndarray, "k"]) -> float:
    return float(np.sum(p * np.log(p / q)))


class Cells:
    """The modes of the data, coarsely: known centres, class means, or k-means; every sample belongs to the nearest."""

    def __init__(self, dataset: Dataset) -> None:
        rows = np.random.default_rng(0).permutation(dataset.trained)[:5000]
        self.pooled, x = dataset.pooled, dataset.coarse(rows)
        if dataset.mixture is not None:
            centres = (dataset.mixture.centres - dataset.shift) / dataset.scale
        elif dataset.labels is not None:
            y = dataset.labels[rows]
            centres = np.stack([x[y == label].mean(axis=0) for label in np.unique(y)])
        else:
            centres = KMeans(min(dataset.cells, 50), n_init=1, random_state=0).fit(x).cluster_centers_
        self.tree, self.count = cKDTree(centres), len(centres)
        self.share = self._shares(self._counts(x))

    def _counts(self, x: Float32[ndarray, "n d"]) -> Int64[ndarray, "k"]:
        return np.bincount(self.tree.query(x)[1], minlength=self.count)

    def _shares(self, count: Int64[ndarray, "k"]) -> Float64[ndarray, "k"]:
        """With half a sample added to each mode, so that no logarithm is infinite."""
        return (count + 0.5) / (count.sum() + 0.5 * self.count)

    def figures(self, x: Float32[ndarray, "n d"]) -> dict[str, float]:
        """Coverage is divided by what as many real samples would reach: a rare mode may be missed by chance. A missing mode is none
        of these: no more than BY_CHANCE / K of real samples would hit it so seldom.
        """
        count, needed = self._counts(self.pooled(x)), np.maximum(1, np.ceil(MODE_FLOOR * self.share * len(x)))
        reached = binom.sf(needed - 1, len(x), self.share)  # how likely, of each mode
        share, missed, surely = self._shares(count), count < needed, 1 - reached < BY_CHANCE / self.count
        return {
            "mode_coverage": min(1.0, float(np.sum(~missed)) / float(reached.sum())),
            "missing_modes": float(np.sum(missed & surely)),
            "modes": float(self.count),
            "forward_kl": kl(self.share, share),
            "reverse_kl": kl(share, self.share),
        }


class Look:
    """Measures a generator and a critic on ROWS training samples, as many held-out ones and as many fakes, or what there is.

    divergence       what the critic's loss on held-out data says (objectives.py), in nats or the objective's own unit
    saturation       the same as a share of its largest value; where it has none, that of the JS which the logits mean as log
                     ratios; 0 for Wasserstein, whose critic may know all and still shows the way
    accuracy         pairs of a held-out real and a fake that the critic puts in order: 1/2 at chance
    overfitting      what that accuracy would gain on training data
    weight, pull     mean size of the derivative of the generator's loss by a logit, and by a sample in the networks' units
    gradient_norm    of the generator's loss by its weights
    tail_index       Hill's, of those pulls over the fakes
    signal_to_noise  of the mean pull
    mode_coverage    share of the data's modes that have at least a quarter of their real share, of A_MODE fakes a mode at least, by
                     what as many real samples would reach
    missing_modes    of the data's `modes`, those that have less, and too little for chance
    forward_kl, reverse_kl   between the real and the generated shares of the modes, in nats
    precision        share of the fakes that lie among the held-out data; real_precision, what the training samples reach
    dimension        intrinsic dimension of the fakes; data_dimension, of the held-out data; latent_dimension, of the latent law, to
                     which normals give one each and signs, a finite set, none
    """

    def __init__(
        self, dataset: Dataset, latent: SignGaussian, objective: Objective, *, conditional: bool, packing: int, seed: int
    ) -> None:
        self.objective, self.latent, self.packing, self.seed = objective, latent, packing, seed + LATENTS
        held_out = np.arange(dataset.trained, len(dataset.samples))
        rng = np.random.default_rng((seed, LATENTS))
        n = min(ROWS, len(held_out), dataset.trained) // packing * packing
        rows = rng.choice(dataset.trained, n, replace=False), rng.choice(held_out, n, replace=False)
        self.train, self.held_out = (torch.from_numpy(dataset.normalised(r)) for r in rows)
        labels = [torch.from_numpy(dataset.labels[r]) if conditional else None for r in rows]
        self.train_labels, self.labels = labels
        self.cells, self.manifold = Cells(dataset), Manifold(self.held_out)
        parts = math.ceil(A_MODE * self.cells.count / n)  # of n fakes each; classes of those after the first are drawn, as latents are
        self.more_labels = [torch.from_numpy(rng.choice(dataset.labels, n)) if conditional else None for _ in range(1, parts)]
        self.real_precision = self.manifold.precision(self.train)
        self.data_dimension = two_nn(self.held_out.numpy())

    def __call__(self, generator: nn.Module, critic: nn.Module) -> dict[str, float]:
        device = next(generator.parameters()).device
        generator.eval()  # what is served; and in training statistics of batches would move
        critic.eval()
        y, train_y = (None if labels is None else labels.to(device) for labels in (self.labels, self.train_labels))
        with torch.no_grad():
            on_real, on_train = critic(self._shown(self.held_out, device), y), critic(self._shown(self.train, device), train_y)
        fakes = generator(self._latents(0, device), y)
        shown = pack(fakes.detach(), self.packing).requires_grad_()
        on_fake = critic(shown, y)
        critic_loss = float(self.objective.critic_loss(on_real, on_fake).detach().mean())
        by_logit = torch.autograd.grad(self.objective.generator_loss(on_real, on_fake).sum(), on_fake, retain_graph=True)[0]
        by_sample = torch.autograd.grad(on_fake, shown, by_logit)[0]
        weights = [p for p in generator.parameters() if p.requires_grad]
        by_weight = torch.autograd.grad(fakes, weights, by_sample.view_as(fakes) / len(on_fake), allow_unused=True, materialize_grads=True)
        pull = by_sample.cpu().numpy().astype(np.float64)
        real, fake, train = (logit.detach().cpu().numpy().astype(np.float64) for logit in (on_real, on_fake, on_train))
        divergence = self.objective.estimate(critic_loss)
        if self.objective.optimal is None:  # Wasserstein, where a logit weighs 1: in units of the steepest slope seen
            divergence /= max(float(np.linalg.norm(pull, axis=1).max()), 1e-300)
        x, accuracy = fakes.detach().cpu().numpy(), pairs_told_apart(real, fake)
        with torch.no_grad():
            drawn = [(self._latents(i, device), None if y is None else y.to(device)) for i, y in enumerate(self.more_labels, 1)]
            more = [generator(z, y).cpu().numpy() for z, y in drawn]
        generator.train()
        critic.train()
        return {
            "divergence": divergence,
            "accuracy": accuracy,
            "saturation": self.objective.share(critic_loss, float(self.objective.doubt(on_real.detach(), on_fake.detach()))),
            "weight": float(by_logit.abs().mean()),
            "gradient_norm": math.sqrt(sum(float(g.double().square().sum()) for g in by_weight)),
            "pull": float(np.linalg.norm(pull, axis=1).mean()),
            "tail_index": hill(np.linalg.norm(pull, axis=1)),
            "signal_to_noise": signal_to_noise(pull),
            "overfitting": pairs_told_apart(train, fake) - accuracy,
            **self.cells.figures(np.concatenate([x, *more])),
            "precision": self.manifold.precision(fakes.detach().cpu()),
            "real_precision": self.real_precision,
            "dimension": two_nn(x),
            "data_dimension": self.data_dimension,
            "latent_dimension": float(self.latent.normals),
        }

    def _latents(self, part: int, device: torch.device) -> Tensor:
        """As many as there are held-out samples."""
        count = len(self.held_out)
        return torch.from_numpy(self.latent.sample(seed=self.seed, offset=part * count, count=count)).to(device)

    def _shown(self, x: Tensor, device: torch.device) -> Tensor:
        return pack(x.to(device), self.packing)


# Alarms -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """A rule over figures, what it means and what to change. Fatal: a generator that ends with it is not to be published."""

    fires: Callable[[dict[str, float]], bool]
    meaning: str  # a sentence with figures
    advice: str
    fatal: bool
    after: float = 0.05  # of the run: earlier, a generator may still be on its way to the data


ALARMS: dict[str, Alarm] = {
    "vanishing_gradient": Alarm(  # Arjovsky and Bottou 2017, theorem 2.4
        fires=lambda f: f["accuracy"] >= 0.99 and f["saturation"] >= 0.95 and min(f["weight"], f["gradient_share"]) <= 0.01,
        meaning="the critic tells {accuracy:.1%} of pairs apart and the generator no longer feels it: the derivative of its loss "
        "by a logit is {weight:.1e}, and by its weights {gradient_norm:.1e}, {gradient_share:.1%} of what is usual in this run",
        advice="use an objective that does not saturate (--objective relativistic), or let the laws overlap: --penalty r1r2, "
        "--noise 0.1",
        fatal=True,
    ),
    "perfect_critic": Alarm(  # theorems 2.1 and 2.2
        fires=lambda f: f["accuracy"] >= 0.98 and f["saturation"] >= 0.9,
        meaning="the critic tells {accuracy:.1%} of held-out pairs apart and its loss says {saturation:.0%} of the largest "
        "divergence: real and generated samples do not overlap, so it knows the sides but not the way",
        advice="hold the critic back: --penalty r1r2 (or a larger --gamma), --noise 0.1, or a lower --learning-rate",
        fatal=True,
    ),
    "mode_dropping": Alarm(
        fires=lambda f: f["mode_coverage"] < 0.8,
        meaning="the generator covers {mode_coverage:.0%} of the data's modes; forward KL over them is {forward_kl:.2f} nats",
        advice="--penalty r1r2 keeps all modes in every recipe; --packing 4 or --unroll 5 where the penalty must be off",
        fatal=True,
        after=0.1,
    ),
    "missing_modes": Alarm(  # the certificate, of many more samples, proves it, and what is refused for it is refused there
        fires=lambda f: f["missing_modes"] >= 1,
        meaning="{missing_modes:.0f} of the data's {modes:.0f} modes have less than a quarter of their share",
        advice="a longer run (--steps) may still find them; --penalty r1r2, or a larger --gamma to begin with, loses none in the first place",
        fatal=False,
        after=0.5,
    ),
    "off_manifold": Alarm(
        fires=lambda f: f["precision"] < 0.5 * f["real_precision"],
        meaning="{precision:.0%} of the samples lie among the data, of real ones {real_precision:.0%}: what is made hits the modes "
        "by chance, or lies between them",
        advice="--penalty r1r2 with the recipe's --gamma; more --steps, so that rates have time to fall; --packing 1",
        fatal=True,
        after=0.6,
    ),
    "unstable_gradient": Alarm(  # theorem 2.6
        fires=lambda f: f["tail_index"] <= 1,
        meaning="a few samples have pulls so large that their mean does not exist (tail index {tail_index:.2f}, signal to noise "
        "{signal_to_noise:.2g}): each step of the generator is chance",
        advice="smooth the critic: --penalty r1r2 or --noise 0.1; a lower --learning-rate only slows it down",
        fatal=True,
    ),
    "heavy_tailed_gradient": Alarm(
        fires=lambda f: 1 < f["tail_index"] < 2,
        meaning="the pulls on single samples have no variance (tail index {tail_index:.2f}, signal to noise {signal_to_noise:.2g}, "
        "below 1 a step is mostly chance): steps of the generator are erratic",
        advice="smooth the critic: --penalty r1r2 or --noise 0.1",
        fatal=False,
    ),
    "critic_overfits": Alarm(
        fires=lambda f: f["overfitting"] >= 0.15,
        meaning="the critic orders {overfitting:.0%} more pairs rightly on training data than on held-out data: it learns "
        "them by heart",
        advice="more data, --augment for images, a larger --gamma, or a smaller --width",
        fatal=False,
    ),
    "collapse_within_modes": Alarm(
        fires=lambda f: f["dimension"] < 0.5 * f["data_dimension"],
        meaning="samples fill {dimension:.1f} dimensions where the data fill {data_dimension:.1f}: they vary too little "
        "within modes",
        advice="more or wider normal latents (--latent signs:48+normal:32x0.5), a larger --gamma, or --packing 4",
        fatal=False,
        after=0.1,
    ),
    "latent_too_small": Alarm(
        fires=lambda f: f["latent_dimension"] < 0.85 * f["data_dimension"],  # which of so few samples is known to 4 %
        meaning="the latent has {latent_dimension:.0f} normals, its signs fill no dimension, and the data fill {data_dimension:.1f}: "
        "a smooth generator cannot reach them",
        advice="more normal latents (--latent normal:64, or signs:16+normal:64x0.5 where the data lie in separate heaps)",
        fatal=False,
        after=0.0,
    ),
}


class Diagnosis:
    """Which alarms are up. One rises after PATIENCE looks in a row and falls with the first look that does not show it.

    Alarms see one figure more than a look: `gradient_share`, the gradient's norm over its median in all looks so far.
    """

    def __init__(self) -> None:
        self.looks = dict.fromkeys(ALARMS, 0)
        self.norms: list[float] = []
        self.words: dict[str, str] = {}  # alarm -> what is wrong and what to change, while it is up

    def update(self, figures: dict[str, float], *, progress: float) -> None:
        self.norms.append(figures["gradient_norm"])
        figures = figures | {"gradient_share": figures["gradient_norm"] / max(median(self.norms), 1e-300)}
        for name, alarm in ALARMS.items():
            shown = progress >= alarm.after and alarm.fires(figures)
            self.looks[name] = self.looks.get(name, 0) + 1 if shown else 0  # a checkpoint of before an alarm was thought of has none
            if self.looks[name] >= PATIENCE:
                self.words[name] = f"{alarm.meaning.format(**figures)}; {alarm.advice}"
            else:
                self.words.pop(name, None)

    @property
    def failing(self) -> list[str]:
        """Why this generator is not to be published; empty: nothing speaks against it."""
        return [f"{name}: {words}" for name, words in self.words.items() if ALARMS[name].fatal]
