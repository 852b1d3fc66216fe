"""What was found to work for each data set that is built in. Pure numbers; config.py says what a user may put in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.bundle import SignGaussian
from training.clusters import Clusters
from training.networks import FINE


@dataclass(frozen=True)
class Recipe:
    """What was found to work for one data set. Gamma falls exponentially over the whole run, the rates after `hold`: coarse to fine."""

    steps: int
    signs: int  # latent coordinates of +-1, which jump between clusters
    normals: int  # latent coordinates of N(0, scale^2); of both, see latent_law
    scale: float
    width: int  # of the hidden layers of both networks; of convolutional ones: channels at the coarsest size
    fourier: int  # directions in the critic's input, 0 = none; how finely it sees by them, see frequency
    learning_rate: tuple[float, float]  # first and last step
    gamma: tuple[float, float]  # weight of R1 + R2, first and last step
    noise: float  # standard deviation added to the critic's inputs, real and fake; 0 = none
    batch: int = 128  # over all workers, at first
    doublings: int = 0  # of the batch, in equal parts of the run: less noise in the end, where the rates are low
    hold: float = 0.0  # share of the run that keeps the first learning rate
    network: str = "perceptron"  # one of networks.FAMILIES
    frequencies: tuple[float, ...] = (24.0, 6.0)  # where there are clusters, see frequency
    settled: bool = False  # whether these latents stay whatever clusters there are


WIDE = 48  # coordinates of a vector, from which on the recipe of mixture1200 serves better than that of grid

# Each pattern of signs makes a small blob, as wide as the generator happens to be steep there. Sixteen narrow normals, in place of
# two wide ones, make these alike: modes lose their tails and keep their width. All of them together are as wide as one sign. Of
# eleven signs a grid's mode gets some 80 patterns; with fewer, chance decides how many and the modes' shares differ.
PLANE = Recipe(7500, 11, 16, 0.25, 128, 64, (4e-3, 1.2e-5), (3.0, 1e-4), 0.0)
CONTINUOUS = replace(PLANE, steps=5000, fourier=32, gamma=(1.0, 1e-4), doublings=2)
IMAGES = Recipe(8000, 48, 16, 0.5, 256, 0, (2e-3, 2e-5), (1.0, 0.1), 0.02, hold=0.5)
# Images of 28 x 28 lie further apart than digits: a stronger penalty. At the rate of digits tanh is saturated within a thousand
# steps and learns no more: strokes keep their holes, and after 2,500 steps class KL was .036, beginning with 6e-4 .010.
FINE_IMAGES = replace(IMAGES, steps=20_000, width=512, gamma=(10.0, 1.0), learning_rate=(5e-4, 1e-5))
# Table 6 of Huang et al. (2024) and ten million images, for a GPU: R3GAN of this size reached 1000 modes, KL .029. Not run here.
STACKED_MNIST = Recipe(20_000, 0, 64, 1.0, 512, 0, (2e-4, 5e-5), (1.0, 0.1), 0.0, batch=512, network="resnet")
RECIPES = {
    # eight modes far apart need no gentler start, and get one from fewer steps
    "ring": replace(PLANE, steps=6000, gamma=(1.0, 1e-4)),
    "grid": PLANE,
    # By the whole, its modes are half as wide as the grid's: twice the frequencies, narrower normals, and networks that tell so many
    # apart. With two thirds of the steps and a first gamma of 3, 76 % of the samples were good; ten, twelve or thirteen signs were worse.
    "grid100": replace(PLANE, steps=30_000, scale=0.22, width=256, fourier=128, gamma=(1.0, 1e-4), frequencies=(48.0, 12.0)),
    # Its modes are 44 units of the networks apart, in the plane one: slopes are as much smaller. With few signs nearly every pattern
    # finds a mode, and normals of .5 stay within it: with those of 1 modes were lost, with .25 patterns stayed between them.
    "mixture1200": Recipe(8000, 6, 16, 0.5, 512, 0, (2e-3, 2e-5), (100.0, 0.1), 0.0),
    "s-curve": CONTINUOUS,
    "moons": CONTINUOUS,
    "flower": CONTINUOUS,
    "digits": IMAGES,
    # Ten signs a digit: with more of them triples are more even (class KL) and fewer samples are sure.
    "stacked-digits": replace(IMAGES, steps=66_000, signs=30, width=384, hold=0.6),
    "stacked-mnist": STACKED_MNIST,
    "mnist": FINE_IMAGES,
    "fashion-mnist": FINE_IMAGES,
}


def nearest_recipe(shape: tuple[int, ...]) -> str:
    """The built-in data set whose recipe to take for samples [d] or [h, w, c] of a user's own.

    Distances grow with the number of coordinates and slopes fall: of 20 heaps in 64 dimensions the grid's recipe lost one and left
    half of the samples between the others, that of mixture1200 found all of them.
    """
    if len(shape) == 1:
        return "grid" if shape[0] < WIDE else "mixture1200"
    return "mnist" if min(shape[:2]) >= FINE else "digits"


def latent_law(recipe: Recipe, clusters: Clusters, dim: int) -> SignGaussian:
    """The latent law for data of so many coordinates that fall into such clusters.

    A smooth generator joins clusters by bridges of bad samples unless its latent jumps. But what hangs together is cut by signs
    into pieces with gaps between them: for one cluster there are none, for curves as few as can be shared out among them. There normals, as wide as a sign, do the rest: one more than the data's coordinates, for each further one is a direction
    that the generator has to learn to ignore. Who names a law gets that one.
    """
    if clusters.heaps or recipe.settled:
        return SignGaussian(recipe.signs, recipe.normals, recipe.scale)
    return SignGaussian(clusters.signs, min(recipe.signs + recipe.normals, dim + 1), 1.0)


def frequency(recipe: Recipe, clusters: Clusters) -> tuple[float, ...]:
    """Standard deviations of the critic's frequencies, in radians by a standard deviation of the data.

    High ones tell narrow clusters apart, and the highest what is within one: without them the critic remembers where clusters
    are and cannot see that they have become too narrow. Where there is one cluster, or a few curves, they are noise around what is smooth.
    """
    return recipe.frequencies if clusters.heaps else (2.0,)
