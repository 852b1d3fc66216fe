"""What the critic is shown of a sample: augmented, blurred by noise, packed with others. Differentiable, rows in, rows out.

Real and fake samples go through the same view, so that the critic cannot tell them apart by it. It knows no objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

TARGET, RATE = 0.5, 0.02  # the controller holds the divergence at half its largest value


@dataclass
class InstanceNoise:
    """Gaussian noise on reals and fakes: blurred laws overlap, so the critic's gradient does not vanish and is not unstable.

    Arjovsky and Bottou 2017, theorems 3.1 and 3.2. `sigma` is its standard deviation now: constant, or falling to zero in a
    straight line over the run, or controlled: multiplied by exp(0.02 (share - 1/2)) each step (Objective.share), so that noise
    stays while the critic finds the laws apart and goes when they meet.
    """

    first: float
    schedule: str = "constant"
    sigma: float = field(init=False)

    def __post_init__(self) -> None:
        self.sigma = self.first

    def update(self, progress: float, divergence: float) -> None:
        """After a step: the share of the run that is done, and the divergence as a share of its largest value."""
        self.sigma = SCHEDULES[self.schedule](self, progress, divergence)

    def __call__(self, x: Float[Tensor, "n d"], rng: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        if not self.sigma:
            return x
        return x + self.sigma * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


SCHEDULES: dict[str, Callable[[InstanceNoise, float, float], float]] = {
    "constant": lambda noise, progress, divergence: noise.first,
    "linear": lambda noise, progress, divergence: noise.first * (1 - progress),
    # never more than ten times what it began with, nor so little that it could not come back
    "controlled": lambda noise, progress, divergence: min(
        max(noise.sigma * math.exp(RATE * (divergence - TARGET)), 1e-3 * noise.first), 10 * noise.first
    ),
}


def pack(x: Float[Tensor, "n d"], m: int) -> Float[Tensor, "k e"]:
    """Rows of m samples side by side: a critic of m at once sees a lack of diversity (PacGAN, Lin et al. 2018)."""
    return x.reshape(len(x) // m, -1)


def augment(x: Float[Tensor, "n d"], shape: tuple[int, ...], rng: torch.Generator | None = None) -> Float[Tensor, "n d"]:
    """Colour, translation and cutout, drawn for each image [h, w, c] in [-1, 1]: DiffAugment, Zhao et al. 2020, section 3.2."""
    n, (height, width, channels) = len(x), shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=rng, device=x.device, dtype=x.dtype)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (n, 1), generator=rng, device=x.device)

    image = x.unflatten(1, shape) + uniform(-0.5, 0.5)  # brightness
    if channels > 1:
        grey = image.mean(dim=3, keepdim=True)
        image = grey + uniform(0.0, 2.0) * (image - grey)  # saturation
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = mean + uniform(0.5, 1.5) * (image - mean)  # contrast

    reach_y, reach_x = round(height / 8), round(width / 8)
    rows = torch.arange(height, device=x.device) + whole(-reach_y, reach_y)  # [n, h]
    columns = torch.arange(width, device=x.device) + whole(-reach_x, reach_x)  # [n, w]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    each = torch.arange(n, device=x.device)[:, None, None]
    image = image[each, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]] * inside[..., None]

    def hidden(side: int) -> Tensor:  # a stretch of half a side, [n, side]; an odd one is centred on a pixel, an even one on an edge, the last too
        hole = side // 2
        first, at = whole(-(hole // 2), side - hole // 2 - hole % 2), torch.arange(side, device=x.device)
        return (at >= first) & (at < first + hole)

    hole = hidden(height)[:, :, None] & hidden(width)[:, None, :]
    return (image * ~hole[..., None]).flatten(1)
