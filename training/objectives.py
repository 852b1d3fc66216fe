"""What critic and generator minimise: pure functions of the critic's logits on n pairs of a real and a fake sample.

Each loss is one number a pair; the caller takes the mean. With p the law of the data, q the generator's and T = log p/q, an
objective also knows its optimal critic as a function of T, and what its critic's loss says about the distance of p and q.
Penalties and schedules are elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu, softplus

SURE = 20.0  # a logit that stands for infinity where only its sign matters


@dataclass(frozen=True)
class Objective:
    """A game: the critic scores reals above fakes, the generator makes it wrong."""

    critic_loss: Callable[[Tensor, Tensor], Tensor]  # (real, fake) logits [n] -> [n]
    generator_loss: Callable[[Tensor, Tensor], Tensor]
    divergence: str  # what the critic's loss measures, in words
    estimate: Callable[[float], float]  # its mean loss -> that divergence: exact for the optimal critic, else a lower bound
    largest: float  # the divergence of laws that do not overlap
    optimal: Callable[[Tensor], Tensor] | None  # T -> the optimal critic's logit; None where it is no function of T
    critic_steps: int = 1  # for each of the generator's
    ratio: Callable[[Tensor], Tensor] | None = None  # back from that logit to T, where the divergence has no largest value

    def doubt(self, real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, ""]:
        """Of a critic whose divergence has no largest value: the classic loss of the T that its logits mean, log 4 at chance. Else 0."""
        return real.new_zeros(()) if self.ratio is None else classic_critic_loss(self.ratio(real), self.ratio(fake)).mean()

    def share(self, loss: float, doubt: float) -> float:
        """The divergence that a mean loss says, as a share of its largest value; where it has none, that of JS by the doubt."""
        return self.estimate(loss) / self.largest if self.ratio is None else 1 - doubt / math.log(4)


# Goodfellow et al. 2014: D = sigmoid(logit) -----------------------------------------------------------------------------------


def classic_critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log D(real) - log(1 - D(fake)), eq. 1. With the optimal D = p / (p + q) its mean is log 4 - 2 JS(p, q), theorem 1."""
    return softplus(-real) + softplus(fake)


def minimax_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """log(1 - D(fake)), eq. 1; its gradient by the logit is -D(fake), nothing where the critic is sure."""
    return -softplus(fake)


def non_saturating_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log D(fake), section 3, which follows KL(q || p) - 2 JS(p, q): Arjovsky and Bottou 2017, theorem 2.5."""
    return softplus(-fake)


# Mao et al. 2017: the critic regresses on a label for reals and one for fakes -------------------------------------------------


def least_squares(fake_label: float, real_label: float, wanted: float) -> Objective:
    """Half the squared error to the labels a and b, and for the generator to c: eq. 2.

    For the optimal critic (b p + a q) / (p + q) the loss says Le Cam's distance, the integral of (p - q)^2 / (p + q), which the
    paper writes as Pearson's divergence of p + q from 2 q. It is at most 2 and flat between laws that do not overlap.
    """
    middle, half = (real_label + fake_label) / 2, (real_label - fake_label) / 2
    return Objective(
        critic_loss=lambda real, fake: ((real - real_label).square() + (fake - fake_label).square()) / 2,
        generator_loss=lambda real, fake: (fake - wanted).square() / 2,
        divergence="Le Cam's distance",
        estimate=lambda loss: 2 - 2 * loss / half**2,
        largest=2.0,
        optimal=lambda t: middle + half * torch.tanh(t / 2),
    )


# Arjovsky et al. 2017 and Lim and Ye 2017 -------------------------------------------------------------------------------------


def wasserstein_critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """C(fake) - C(real): minus the Wasserstein-1 distance at best, if C is kept 1-Lipschitz (Arjovsky et al. 2017, eq. 2)."""
    return fake - real


def hinge_critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """max(0, 1 - C(real)) + max(0, 1 + C(fake)): Lim and Ye 2017, eq. 8. The optimal critic is sign(T), the mean 2 (1 - TV)."""
    return relu(1 - real) + relu(1 + fake)


def raise_fakes(real: Float[Tensor, "n"], fake: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return -fake


# Jolicoeur-Martineau 2019 -----------------------------------------------------------------------------------------------------


def paired_loss(better: Float[Tensor, "n"], worse: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log sigmoid(better - worse): only the difference within a pair counts, so one side alone cannot satisfy the critic.

    RpGAN, section 4; with R1 and R2 it converges locally: Huang et al., The GAN is dead (2024). With the optimal critic T its
    mean is log 2 - JS(p x q, q x p).
    """
    return softplus(worse - better)


# Nowozin et al. 2016 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FDivergence:
    """The f-GAN of D_f(p, q) = E_q f(p/q): the critic maximises E_p g(v) - E_q f*(g(v)) over logits v, eq. 6.

    `output` is g, which takes every logit into the domain of the conjugate f*; `conjugate` is f* after g in a form that cannot
    overflow where g does (tables 2 and 6). At the optimum g(v) = f'(p/q).
    """

    name: str
    f: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]
    optimal: Callable[[Tensor], Tensor]
    largest: float
    ratio: Callable[[Tensor], Tensor] | None = None

    def game(self) -> Objective:
        """Both players fight over one value, as in the paper's eq. 6."""
        return Objective(
            critic_loss=lambda real, fake: self.conjugate(fake) - self.output(real),
            generator_loss=lambda real, fake: -self.conjugate(fake),
            divergence=self.name,
            estimate=lambda loss: -loss,
            largest=self.largest,
            optimal=self.optimal,
            ratio=self.ratio,
        )


F_DIVERGENCES: dict[str, FDivergence] = {
    "f_kl": FDivergence(
        name="KL(p, q)",
        f=lambda u: torch.xlogy(u, u),
        output=lambda v: v,
        conjugate=lambda v: torch.exp(v - 1),
        optimal=lambda t: t + 1,
        largest=math.inf,
        ratio=lambda v: v - 1,
    ),
    "f_reverse_kl": FDivergence(
        name="KL(q, p)",
        f=lambda u: -u.log(),
        output=lambda v: -torch.exp(-v),
        conjugate=lambda v: v - 1,
        optimal=lambda t: t,
        largest=math.inf,
        ratio=lambda v: v,
    ),
    "f_pearson": FDivergence(
        name="Pearson's chi-squared",
        f=lambda u: (u - 1).square(),
        output=lambda v: v,
        conjugate=lambda v: v.square() / 4 + v,
        optimal=lambda t: 2 * torch.expm1(t),
        largest=math.inf,
        ratio=lambda v: torch.log1p(v.clamp(min=-2 + 1e-6) / 2),  # no ratio gives a logit below -2
    ),
    "f_neyman": FDivergence(
        name="Neyman's chi-squared",
        f=lambda u: (1 - u).square() / u,
        output=lambda v: -torch.expm1(-v),
        conjugate=lambda v: -2 * torch.expm1(-v / 2),
        optimal=lambda t: 2 * t,
        largest=math.inf,
        ratio=lambda v: v / 2,
    ),
    "f_hellinger": FDivergence(
        name="squared Hellinger",
        f=lambda u: (u.sqrt() - 1).square(),
        output=lambda v: -torch.expm1(-v),
        conjugate=torch.expm1,
        optimal=lambda t: t / 2,
        largest=2.0,
    ),
    "f_js": FDivergence(  # the paper's table calls it JS, but this f gives twice that
        name="2 JS",
        f=lambda u: torch.xlogy(u, u) - (u + 1) * ((1 + u) / 2).log(),
        output=lambda v: math.log(2) - softplus(-v),
        conjugate=lambda v: softplus(v) - math.log(2),
        optimal=lambda t: t,
        largest=2 * math.log(2),
    ),
    "f_total_variation": FDivergence(
        name="total variation",
        f=lambda u: (u - 1).abs() / 2,
        output=lambda v: torch.tanh(v) / 2,
        conjugate=lambda v: torch.tanh(v) / 2,
        optimal=lambda t: SURE * t.sign(),
        largest=1.0,
    ),
}


def _classic(generator_loss: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    return Objective(classic_critic_loss, generator_loss, "JS", lambda loss: math.log(2) - loss / 2, math.log(2), lambda t: t)


OBJECTIVES: dict[str, Objective] = {
    "relativistic": Objective(
        critic_loss=paired_loss,
        generator_loss=lambda real, fake: paired_loss(fake, real),
        divergence="JS of pairs",
        estimate=lambda loss: math.log(2) - loss,
        largest=math.log(2),
        optimal=lambda t: t,
    ),
    "minimax": _classic(minimax_loss),
    "non_saturating": _classic(non_saturating_loss),
    "least_squares": least_squares(fake_label=0.0, real_label=1.0, wanted=1.0),  # eq. 9
    "least_squares_pearson": least_squares(fake_label=-1.0, real_label=1.0, wanted=0.0),  # eq. 8
    "wasserstein": Objective(wasserstein_critic_loss, raise_fakes, "Wasserstein-1", lambda loss: -loss, math.inf, None, critic_steps=5),  # algorithm 1
    "hinge": Objective(
        critic_loss=hinge_critic_loss,
        generator_loss=raise_fakes,
        divergence="total variation",
        estimate=lambda loss: 1 - loss / 2,
        largest=1.0,
        optimal=torch.sign,
    ),
} | {name: divergence.game() for name, divergence in F_DIVERGENCES.items()}
