"""The zero-centred gradient penalties R1 and R2, and with them all gradients of one adversarial step.

gamma / 2 * (E |grad C(real)|^2 + E |grad C(fake)|^2), every step (Mescheder et al. 2018; Roth et al. 2017 for the fakes).
Without it the networks here collapse to a few modes whatever the objective. Two ways to the same numbers:

    autograd      differentiates twice; works for any critic, and is the oracle of the other
    closed_form   for perceptrons with piecewise linear activations: no double backward, about twice as fast

Both leave the critic's gradients in `.grad` and return what the generator needs. They neither step nor know an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from training.networks import SLOPE, Critic
from training.objectives import Objective


@dataclass(frozen=True)
class Gradients:
    """One step as seen by the critic, on n pairs."""

    critic_loss: Float[Tensor, ""]  # without the penalty
    generator_loss: Float[Tensor, ""]
    penalty: Float[Tensor, ""]  # gamma / 2 (R1 + R2)
    by_fake: Float[Tensor, "n d"]  # of the generator's loss by each fake


def autograd(
    critic: Critic,
    objective: Objective,
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "n d"],
    y: Int64[Tensor, "n"] | None,
    gamma: float,
) -> Gradients:
    real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
    real_logit, fake_logit = critic(real, y), critic(fake, y)
    slope = torch.autograd.grad(real_logit.sum() + fake_logit.sum(), [real, fake], create_graph=True)
    loss = objective.critic_loss(real_logit, fake_logit).mean()
    penalty = gamma / 2 * sum(s.square().sum(dim=1).mean() for s in slope)
    critic.zero_grad(set_to_none=True)
    (loss + penalty).backward()
    _, pull, generator_loss = _by_logits(objective.generator_loss, real_logit, fake_logit)
    return Gradients(loss.detach(), generator_loss, penalty.detach(), pull[:, None] * slope[1].detach())


@torch.no_grad()
def closed_form(
    critic: Critic,
    objective: Objective,
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "n d"],
    y: Int64[Tensor, "n"] | None,
    gamma: float,
) -> Gradients:
    """With slopes m_k of the leaky ReLU fixed, C is linear in each weight matrix and the logit's gradient is a product of them.

    Let h_k be the activations, v_k = dC/da_k at the pre-activations, g = dC/dx, and t_k the tangents of h_k when x moves by
    gamma g / n. Then the gradient of (loss + penalty) by W_k is v_k^T (dL/dC h_k + t_k): eight products for two hidden layers,
    in place of a double backward. The slopes' own derivative is zero almost everywhere, so this is exact.
    """
    n = len(real)
    x = torch.cat([real, fake])
    activations, slopes = [critic.lift(x, None if y is None else torch.cat([y, y]))], []
    for layer in critic.hidden:
        a = layer(activations[-1])
        slopes.append(torch.where(a > 0, a.new_ones(()), SLOPE))
        activations.append(a * slopes[-1])
    logit = critic.head(activations[-1])[:, 0]

    by_preactivation = [slopes[-1] * critic.head.weight]
    for layer, slope in zip(reversed(critic.hidden[1:]), reversed(slopes[:-1]), strict=True):
        by_preactivation.insert(0, slope * (by_preactivation[0] @ layer.weight))
    by_input = critic.pull_back(x, by_preactivation[0] @ critic.hidden[0].weight)

    by_real, by_fake, critic_loss = _by_logits(objective.critic_loss, logit[:n], logit[n:])
    weight = torch.cat([by_real, by_fake])
    tangent = critic.push_forward(x, gamma / n * by_input)
    for layer, slope, v, h in zip(critic.hidden, slopes, by_preactivation, activations, strict=False):
        layer.weight.grad = v.T @ (weight[:, None] * h + tangent)
        layer.bias.grad = weight @ v
        tangent = slope * (tangent @ layer.weight.T)
    critic.head.weight.grad = (weight @ activations[-1] + tangent.sum(dim=0))[None]
    critic.head.bias.grad = weight.sum()[None]

    _, pull, generator_loss = _by_logits(objective.generator_loss, logit[:n], logit[n:])
    penalty = gamma / 2 * by_input.square().sum() / n
    return Gradients(critic_loss, generator_loss, penalty, pull[:, None] * by_input[n:])


def unpenalised(
    critic: Critic,
    objective: Objective,
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "n d"],
    y: Int64[Tensor, "n"] | None,
    gamma: float,
) -> Gradients:
    """The bare game: kept so that collapse can be shown, and the refusal to publish it."""
    return closed_form(critic, objective, real, fake, y, 0.0)


@torch.enable_grad()
def _by_logits(
    loss: Callable[[Tensor, Tensor], Tensor], real: Float[Tensor, "n"], fake: Float[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, ""]]:
    """The derivatives of the mean loss by each real and each fake logit, and that mean."""
    real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
    mean = loss(real, fake).mean()
    by_real, by_fake = torch.autograd.grad(mean, [real, fake], allow_unused=True, materialize_grads=True)
    return by_real, by_fake, mean.detach()


PENALTIES: dict[str, Callable[..., Gradients]] = {"closed_form": closed_form, "autograd": autograd, "none": unpenalised}
