"""What critic and generator minimise: pure functions of the critic's logits on paired real and fake samples.

Each returns one loss per pair; the caller takes the mean. Penalties are elsewhere, schedules too.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus


class Objective(Protocol):
    """A game: the critic scores reals above fakes, the generator makes it wrong."""

    @staticmethod
    def critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]: ...

    @staticmethod
    def generator_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]: ...


class Relativistic:
    """RpGAN: only the difference between a real and a fake counts, so one side alone cannot satisfy the critic.

    Jolicoeur-Martineau 2019, eq. 8; with R1 and R2 locally convergent: Huang et al., The GAN is dead (2024), prop. 2.
    """

    @staticmethod
    def critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return softplus(fake - real)

    @staticmethod
    def generator_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return softplus(real - fake)


class NonSaturating:
    """The classic game with -log D as the generator's loss (Goodfellow et al. 2014, section 3)."""

    @staticmethod
    def critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return softplus(-real) + softplus(fake)

    @staticmethod
    def generator_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return softplus(-fake)


OBJECTIVES: dict[str, type[Objective]] = {"relativistic": Relativistic, "non_saturating": NonSaturating}
