"""What a user may ask of a training run, and which wishes cannot be granted.

The command line is made of `Config`; its `recipe` is the data set's with what the user changed. It knows neither the loop nor Ray.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tyro.constructors import PrimitiveConstructorSpec

from training.bundle import BundleError, SignGaussian
from training.data import DATASETS, ON_DISK, Dataset
from training.diagnostics import ROWS
from training.networks import family
from training.objectives import OBJECTIVES
from training.penalties import CONSTRAINT, PENALTIES, critical_gamma
from training.recipes import IMAGES, RECIPES, Recipe
from training.registry import Registry
from training.sources import find, label, open_dataset


def one_of(*words: str) -> PrimitiveConstructorSpec[str]:
    """A flag that takes one of these words. Of another it says which is nearest: tyro does so for flags, not for a Literal."""

    def read(given: list[str]) -> str:
        if given[0] in words:
            return given[0]
        near = get_close_matches(given[0], words, n=1)
        raise ValueError(f"{given[0]} is none of {', '.join(words)}{f'; did you mean {near[0]}?' if near else ''}")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(words)}}}",
        instance_from_str=read,
        is_instance=lambda value: value in words,
        str_from_instance=lambda value: [value],
    )


@dataclass(frozen=True)
class Config:
    """Train a GAN, certify it, publish it. Exit status: 0 published, 1 failed or refused, 2 bad input, 130 interrupted."""

    dataset: str = "digits"
    """Real data: ring, grid, grid100, mixture1200, s-curve, moons, flower (all vectors), digits, stacked-digits, mnist,
    stacked-mnist, fashion-mnist, or a path or URI (s3://, gs://): npz, npy, IDX, parquet, images."""
    data: str | None = None
    """Where the files of mnist, stacked-mnist or fashion-mnist lie: a directory of IDX files, or an npz."""
    skip_bad_files: bool = False
    """Leave out files that cannot be used, naming each; by default they end the run."""
    like: str | None = None
    """The built-in data set whose recipe to use; by default its own. Other images take that of mnist, those with less
    than 16 pixels a side that of digits, vectors that of grid, and of 48 coordinates or more that of mixture1200."""
    model: str | None = None
    """Name of the model in the registry; by default that of the data set."""
    registry: str | None = None
    """Directory of the registry; by default GANWATCH_HOME/registry, or .ganwatch/registry here."""
    seed: int = 0
    """Fixes initial weights, batches and latents. The certificate always draws a seed of its own."""
    batch: int | None = None
    """Samples of each kind that go through the networks at once, over all workers; by default the recipe's."""
    accumulate: int = 1
    """Batches whose gradients make one update: that of a batch so many times as large, in the memory of one. Rates stay."""
    precision: Annotated[str, one_of("auto", "float32", "bf16")] = "auto"
    """Of the networks' products; weights, losses and penalties are float32 always. auto: bf16 for images on a GPU that has it."""
    compile: bool = False
    """Compile the networks first, a minute that long runs win back: the generator, and critics of your own. Those of perceptron and dcgan
    have a faster way already and stay as they are; resnet is refused."""
    workers: int = 1
    """Ray Train workers, one CPU or one GPU each. The batch is split over them evenly, so that their number changes neither the
    gradient nor the learning rate."""
    min_workers: int | None = None
    """Start and go on with as few as this while the cluster lacks workers, and take more as they come; by default all are needed."""
    max_failures: int = 3
    """Workers that may die before the run does; training then goes on from the last checkpoint."""
    checkpoint_seconds: float = 10.0
    """Time between checkpoints, which are made at the looks of diagnostics, a hundred a run: what a killed worker costs."""
    resume: str | None = None
    """Directory of an interrupted run to go on with, in its own settings."""
    device: Annotated[str, one_of("auto", "cuda", "cpu")] = "auto"
    """Where the networks are trained; auto takes CUDA where Ray has a GPU for each worker."""
    conditional: bool = False
    """Train G(z, y) and D(x, y) on the labels, so that requests may name a class."""
    steps: int | None = None
    """Updates of the critic; by default those of the recipe (6,000 for ring, 7,500 for grid, 8,000 for digits)."""
    objective: Annotated[str, one_of(*OBJECTIVES)] = "relativistic"
    """The game: paired logits (RpGAN) by default; minimax is GAN0, non_saturating GAN1, f_* the f-GANs."""
    critic_steps: int | None = None
    """Updates of the critic for each of the generator; by default the objective's: 5 for wasserstein, else 1."""
    penalty: Annotated[str, one_of(*PENALTIES)] = "r1r2"
    """On the critic's slope: at reals and fakes, at one of them, WGAN-GP's between them, or none, to see a collapse."""
    gamma: float | None = None
    """First weight of the penalty; it falls by the recipe's factor. By default the recipe's, scaled to the objective. That of
    --penalty gradient stays, as a constraint is to be kept; by default 20, the paper's lambda of 10."""
    clip: float | None = None
    """Clip the critic's weights to +- this after each step (Wasserstein); None = off."""
    spectral_norm: bool = False
    """Divide each of the critic's layers by its largest singular value."""
    noise: float | None = None
    """Standard deviation of noise on the critic's inputs, real and fake, in place of the recipe's; 0 = off."""
    noise_schedule: Annotated[str, one_of("constant", "linear", "controlled")] = "constant"
    """Let the noise stay, fall to zero over the run, or follow the divergence that the critic sees."""
    packing: int = 1
    """Samples that the critic judges together (PacGAN); 1 = off."""
    unroll: int = 0
    """Critic steps that the generator looks ahead, plain ones without the penalty, which wasserstein cannot be without; 0 = off."""
    augment: bool = False
    """Augment what the critic sees, real and fake (DiffAugment; images only)."""
    network: str | None = None
    """perceptron, dcgan, resnet (images), or package.module:NAME of a training.networks.Family of your own; by default the recipe's."""
    width: int | None = None
    """Units of a hidden layer, or channels at the coarsest size of an image; by default the recipe's."""
    latent: str | None = None
    """What the generator draws from, such as signs:16+normal:48x0.5 or normal:128: coordinates of +-1, which jump between clusters, and
    of a normal law with this standard deviation. By default the recipe's where data lie in separate heaps, else what fits them."""
    learning_rate: float | None = None
    """First learning rate of both networks, in place of the recipe's; it falls by the same factor."""
    stop_on_alarm: bool = False
    """End the run when diagnostics say that it fails; by default it goes on, and is refused if it ends that way."""
    certify_samples: int = 1_000_000
    """Fresh samples to certify with, as far as certify_seconds allow (never fewer than the smaller of this and 200,000)."""
    certify_seconds: float = 10.0
    """Time budget of certification."""
    reference_points: bool = True
    """Keep feature vectors of real data in the bundle; without them gauges that compare single samples are unavailable."""
    force: bool = False
    """Publish even when the quality gate objects; the objections are kept in the card."""

    @property
    def recipe(self) -> Recipe:
        """The data set's recipe with what the user changed; BundleError where --latent is none. Data that were not yet read count as images."""
        recipe = RECIPES.get(self.like or self.dataset, IMAGES)
        changed: dict[str, Any] = {} if self.steps is None else {"steps": self.steps}
        for name in ("gamma", "learning_rate"):
            if (first := getattr(self, name)) is not None:
                old = getattr(recipe, name)
                changed[name] = (first, first * old[1] / old[0])
        if PENALTIES[self.penalty].target:
            changed["gamma"] = (self.gamma or CONSTRAINT,) * 2
        elif self.gamma is None and self.penalty != "none":
            # The recipes were found with pairs and R1 + R2: other games get the same damping.
            equal = critical_gamma(OBJECTIVES[self.objective], PENALTIES[self.penalty])
            equal /= critical_gamma(OBJECTIVES["relativistic"], PENALTIES["r1r2"])
            changed["gamma"] = (recipe.gamma[0] * equal, recipe.gamma[1] * equal)
        changed |= {name: value for name in ("noise", "width", "network", "batch") if (value := getattr(self, name)) is not None}
        if self.latent is not None:
            law = SignGaussian.read(self.latent)
            changed |= {"signs": law.signs, "normals": law.normals, "scale": law.scale, "settled": True}
        return replace(recipe, **changed)


MAY_CHANGE = (  # from one part of a run to the next
    "model", "registry", "workers", "min_workers", "max_failures", "checkpoint_seconds", "resume", "device", "precision", "compile",
    "skip_bad_files", "certify_samples", "certify_seconds", "reference_points", "force",
)  # fmt: skip


class InputError(ValueError):
    """A wish that cannot be granted. The text says which value, what is expected and what to do."""


def check(config: Config) -> None:
    """Raise InputError, DataError or RegistryError before anything expensive begins."""
    given = {name: value for name, value in asdict(config).items() if value is not None}
    for name, low in (("workers", 1), ("min_workers", 1), ("max_failures", 0), ("steps", 1), ("certify_samples", 1000), ("seed", 0), ("packing", 1), ("critic_steps", 1), ("unroll", 0), ("width", 1), ("batch", 1), ("accumulate", 1), ("noise", 0)):
        if not low <= given.get(name, low) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {given[name]}; it must be at least {low}, and finite")
    for name in ("gamma", "learning_rate", "certify_seconds", "clip", "checkpoint_seconds"):
        if not (math.isfinite(given.get(name, 1.0)) and given.get(name, 1.0) > 0):
            words = "; --penalty none switches the penalty off" if name == "gamma" else ""
            raise InputError(f"--{name.replace('_', '-')} is {given[name]}; it must be positive{words}")
    if config.seed >= 2**32:
        raise InputError(f"--seed is {config.seed}; it must lie below 2^32")
    if config.latent is not None:
        try:
            SignGaussian.read(config.latent)
        except BundleError as error:
            raise InputError(f"--latent is {error}") from None
    if config.like is not None and config.like not in RECIPES:
        raise InputError(f"--like is {config.like}; recipes are those of {', '.join(RECIPES)}")
    if config.data is not None and config.dataset not in ON_DISK:
        raise InputError(f"--data is for {', '.join(ON_DISK)}; data of your own are named by --dataset PATH")
    if config.dataset in ON_DISK:
        open_dataset(config.dataset, data=config.data, cache=Path())
    elif config.dataset not in DATASETS:
        find(config.dataset, skip_bad_files=config.skip_bad_files)
    fewest = config.workers if config.min_workers is None else config.min_workers
    if fewest > config.workers:
        raise InputError(f"--min-workers is {fewest}; it must not exceed --workers, {config.workers}")
    even = config.packing * math.lcm(*range(fewest, config.workers + 1))
    if config.recipe.batch % even:
        among = f"{fewest} to {config.workers} workers" if fewest < config.workers else f"--workers {config.workers}"
        words = f"{among} and --packing {config.packing}" if config.packing > 1 else among
        near = [n for n in (config.recipe.batch // even * even, (config.recipe.batch // even + 1) * even) if n]
        raise InputError(f"--batch is {config.recipe.batch}, which {words} do not divide; the nearest that will do: {' and '.join(map(str, near))}")
    for reason in conflicts(config):
        raise InputError(reason)
    try:
        family(config.recipe.network)
    except ValueError as error:
        raise InputError(f"--network: {error}") from None
    if config.device == "cuda" and torch.version.cuda is None:
        raise InputError(f"--device is cuda, but torch {torch.__version__} is built without CUDA; use --device cpu")
    registry = Registry(config.registry)
    model = config.model or label(config.dataset)
    try:
        with registry.staging(model):
            pass
        with suppress(OSError):  # not empty: it has versions
            (registry.root / model).rmdir()
    except OSError as error:
        words = f"--registry is {registry.root}, which cannot be written ({error.strerror}); choose a writable directory"
        raise InputError(words) from None
    registry.history(model)  # which publishing reads, hours later


def conflicts(config: Config) -> list[str]:
    """Parts that cannot work together, one sentence each with the reason."""
    objective, held = OBJECTIVES[config.objective], config.clip or config.spectral_norm or config.penalty != "none"
    schedule = f"--noise-schedule {config.noise_schedule}"
    found = {
        f"--unroll with --objective {config.objective}: the steps that the generator looks ahead leave the penalty out, and without it "
        "this critic has no best answer to look at; choose another objective, or leave --unroll out": config.unroll and objective.optimal is None,
        "--unroll with --clip: a clipped weight has no derivative, so the generator would look ahead at a critic that stands "
        "still; use --penalty r1r2 in place of clipping": config.unroll and config.clip,
        "--unroll with --spectral-norm: the singular vectors are estimated anew at each look, so there is no fixed critic to "
        "differentiate; use --penalty r1r2": config.unroll and config.spectral_norm,
        "--clip with --spectral-norm: the layers are divided by their norm after clipping, so the bound has no effect; choose "
        "one of them": config.clip and config.spectral_norm,
        "--unroll with --accumulate or several --workers: the generator looks ahead at a critic that has seen one part of the batch, "
        "so the parts' gradients do not add up to the whole's; use a larger --batch and one worker": config.unroll
        and max(config.accumulate, config.workers) > 1,
        "--compile with --spectral-norm: the singular vectors are estimated anew in place at each look, which cannot be compiled; "
        "leave one of them out": config.compile and config.spectral_norm,
        "--compile with --network resnet: torch's compiled resnet gives gradients that are .1 % off on a CPU, for a reason not yet "
        "found; leave --compile out": config.compile and config.recipe.network == "resnet",
        "--packing with --conditional: one critic input would mix samples of different classes; use one of "
        "them": config.packing > 1 and config.conditional,
        f"--objective {config.objective} with nothing that holds the critic back: its best loss is minus infinity; add "
        "--clip 0.01, --penalty gradient or --spectral-norm": objective.optimal is None and not held,
        f"--noise-schedule controlled with --objective {config.objective}: its distance has no upper end to hold half of; use "
        "--noise-schedule linear": config.noise_schedule == "controlled" and objective.optimal is None,
        "--gamma with --penalty none: there is no penalty to weigh; leave --gamma out, or choose the penalty it is for": config.gamma is not None
        and config.penalty == "none"
        and config.resume is None,  # a run that was let begin like that goes on
        f"{schedule} without noise: give the first standard deviation by --noise": config.noise_schedule != "constant"
        and not config.recipe.noise,
    }
    return [reason for reason, applies in found.items() if applies]


def check_shape(config: Config, dataset: Dataset) -> None:
    """Raise InputError where a wish needs images and the data are vectors, or more samples than there are; or conflicts with the
    recipe, which for a user's data is known only now."""
    for reason in conflicts(config):
        raise InputError(reason)
    if config.packing > (held_out := min(ROWS, len(dataset.samples) - dataset.trained)) // 2:  # variances need two critic inputs
        words = f"a critic of {dataset.name} is judged by {held_out} held-out samples, two packs of them at least"
        raise InputError(f"--packing is {config.packing}, and {words}; use at most {held_out // 2}")
    if config.conditional:
        unseen = np.setdiff1d(dataset.labels, dataset.labels[: dataset.trained])
        if len(unseen):
            names = ", ".join(dataset.classes[i] for i in unseen[:5])
            raise InputError(f"--conditional needs samples of each class to train on; all of class {names} are held out; add some, or drop the class")
    wishes = {"--augment": config.augment, f"--network {config.recipe.network}": family(config.recipe.network).images_only}
    for wish in (wish for wish, set_ in wishes.items() if set_ and not dataset.is_image):
        raise InputError(f"{wish} needs images, and {dataset.name} has vectors of {dataset.dim} numbers")
