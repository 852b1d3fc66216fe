"""What critic and generator minimise: pure functions of the critic's logits on n pairs of a real and a fake sample.

Each returns one loss per pair; the caller takes the mean. Penalties are elsewhere, schedules too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Objective:
    """A game: the critic scores reals above fakes, the generator makes it wrong."""

    critic_loss: Callable[[Tensor, Tensor], Tensor]
    generator_loss: Callable[[Tensor, Tensor], Tensor]


def paired_loss(better: Float[Tensor, "n"], worse: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log sigmoid(better - worse): only the difference within a pair counts, so one side alone cannot satisfy the critic.

    RpGAN, Jolicoeur-Martineau 2019, section 4; with R1 and R2 it converges locally: Huang et al., The GAN is dead (2024).
    """
    return softplus(worse - better)


def classic_critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log D(real) - log(1 - D(fake)) with D = sigmoid(logit): Goodfellow et al. 2014, eq. 1."""
    return softplus(-real) + softplus(fake)


def non_saturating_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log D(fake), whose gradient does not vanish where the critic is sure: Goodfellow et al. 2014, section 3."""
    return softplus(-fake)


OBJECTIVES: dict[str, Objective] = {
    "relativistic": Objective(critic_loss=paired_loss, generator_loss=lambda real, fake: paired_loss(fake, real)),
    "non_saturating": Objective(critic_loss=classic_critic_loss, generator_loss=non_saturating_loss),
}
