"""Penalties on the critic's slope, and with them all gradients of one adversarial step.

Without R1 and R2 the networks here collapse to a few modes whatever the objective. Three ways to the same numbers:

    autograd      differentiates twice; works for any critic without batch statistics, and is the oracle of the others
    functional    the same as one function, for torch.compile, which cannot differentiate again what it has compiled
    closed_form   for perceptrons and plain convolutions with piecewise linear activations: no double backward, about twice as fast

All leave the critic's gradients in `.grad` and return what the generator needs. They neither step nor know an optimiser.
Below them: other ways to hold a critic back (clipping, spectral normalisation), the unrolled critic, and how to choose gamma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import conv2d, leaky_relu, linear, normalize
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.utils import parametrizations, parametrize

from training.networks import SLOPE, ConvCritic, Critic
from training.objectives import Objective

CONSTRAINT = 20.0  # gamma of WGAN-GP: "lambda = 10" in all their experiments
UNROLLED_RATE = 0.1  # of the plain gradient steps that the generator looks ahead


@dataclass(frozen=True)
class Penalty:
    """gamma / 2 times the mean of (|dC/dx| - target)^2 over the reals, plus that over the fakes, plus that between them."""

    real: bool = False
    fake: bool = False
    between: bool = False
    target: float = 0.0

    def price(self, slope: Float[Tensor, "m d"]) -> Float[Tensor, "m"]:
        return (slope.norm(dim=1) - self.target).square() if self.target else slope.square().sum(dim=1)

    def by_slope(self, slope: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """The derivative of the price; 0 where there is no slope."""
        return 2 * (slope - self.target * normalize(slope)) if self.target else 2 * slope

    def points_between(
        self, real: Float[Tensor, "n d"], fake: Float[Tensor, "n d"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "k d"]:
        """A uniform point on the line from each real to its fake; none where the penalty does not ask for them."""
        if not self.between:
            return real[:0]
        share = torch.rand(len(real), 1, generator=rng, device=real.device, dtype=real.dtype)
        return real + share * (fake - real)

    def charged(self, n: int, k: int, like: Tensor) -> Float[Tensor, "m"]:
        """1 / n for the rows that pay among n reals, n fakes and k points between, 0 for the others."""
        rows = [like.new_full((count,), pays / n) for count, pays in ((n, self.real), (n, self.fake), (k, self.between))]
        return torch.cat(rows)


PENALTIES: dict[str, Penalty] = {
    "r1r2": Penalty(real=True, fake=True),  # every step, as in Huang et al. 2024; Roth et al. 2017 for the fakes
    "r1": Penalty(real=True),  # Mescheder et al. 2018, eq. 9
    "r2": Penalty(fake=True),
    "gradient": Penalty(between=True, target=1.0),  # WGAN-GP, Gulrajani et al. 2017, eq. 3; their lambda is gamma / 2
    "none": Penalty(),  # the bare game: kept so that collapse can be shown, and the refusal to publish it
}


@dataclass(frozen=True)
class Gradients:
    """One step as seen by the critic, on n pairs."""

    critic_loss: Float[Tensor, ""]  # without the penalty
    generator_loss: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    by_fake: Float[Tensor, "n d"]  # of the generator's loss by each fake
    doubt: Float[Tensor, ""]  # Objective.doubt

    @classmethod
    def of(cls, objective: Objective, n: int, logit: Float[Tensor, "m"], slope: Float[Tensor, "m d"], loss: Tensor, penalty: Tensor) -> Gradients:
        """From the logits of n reals, n fakes and whatever lies between, their derivatives by the samples, and the critic's loss."""
        real, fake = logit[:n].detach(), logit[n : 2 * n].detach()
        _, pull, generator_loss = _by_logits(objective.generator_loss, real, fake)
        return cls(loss.detach(), generator_loss, penalty.detach(), pull[:, None] * slope[n : 2 * n].detach(), objective.doubt(real, fake))


def autograd(
    critic: nn.Module,
    objective: Objective,
    penalty: Penalty,
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "n d"],
    between: Float[Tensor, "k d"],
    y: Int64[Tensor, "n"] | None,
    gamma: float,
) -> Gradients:
    n = len(real)
    x = torch.cat([real, fake, between]).detach().requires_grad_()
    logit = critic(x, _labels(y, len(x)))
    charged = penalty.charged(n, len(between), x)
    (slope,) = torch.autograd.grad(logit.sum(), x, create_graph=bool(charged.any()), retain_graph=True)
    price = gamma / 2 * (charged * penalty.price(slope)).sum()
    loss = objective.critic_loss(logit[:n], logit[n : 2 * n]).mean()
    critic.zero_grad(set_to_none=True)
    (loss + price).backward()
    return Gradients.of(objective, n, logit, slope, loss, price)


def functional(
    critic: nn.Module,
    objective: Objective,
    penalty: Penalty,
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "n d"],
    between: Float[Tensor, "k d"],
    y: Int64[Tensor, "n"] | None,
    gamma: float,
    *,
    derivatives: Callable[..., Any] | None = None,  # _derivatives compiled
) -> Gradients:
    n, x = len(real), torch.cat([real, fake, between]).detach()
    weights = {name: parameter.detach() for name, parameter in critic.named_parameters() if parameter.requires_grad}
    charged = gamma / 2 * penalty.charged(n, len(between), x)
    found = (derivatives or _derivatives)(critic, objective, penalty, weights, x, _labels(y, len(x)), n, charged)
    by_weight, (loss, price, logit, slope) = found
    for name in weights:
        parameter = critic.get_parameter(name)
        parameter.grad = torch.empty_like(parameter).copy_(by_weight[name])  # compiled code chooses other strides, fused Adam reads memory
    return Gradients.of(objective, n, logit, slope, loss, price)


def _derivatives(
    critic: nn.Module, objective: Objective, penalty: Penalty, weights: dict[str, Tensor], x: Tensor, y: Tensor | None, n: int, charged: Tensor
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    def judged(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logit = functional_call(critic, weights, (x, y))
        return logit.sum(), logit

    def total(weights: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        slope, logit = grad(judged, has_aux=True)(x, weights)
        price = (charged * penalty.price(slope)).sum()
        loss = objective.critic_loss(logit[:n], logit[n : 2 * n]).mean()
        return loss + price, (loss, price, logit, slope)

    return grad(total, has_aux=True)(weights)


@torch.no_grad()
def closed_form(
    critic: Critic | ConvCritic,
    objective: Objective,
    penalty: Penalty,
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "n d"],
    between: Float[Tensor, "k d"],
    y: Int64[Tensor, "n"] | None,
    gamma: float,
) -> Gradients:
    """With slopes m_k of the leaky ReLU fixed, C is linear in each layer's weights and the logit's gradient is a product of them.

    Let h_k be the activations, v_k = dC/da_k at the pre-activations, g = dC/dx, and t_k the tangents of h_k when x moves by the
    derivative of the penalty by g. Then the gradient of (loss + penalty) by W_k is v_k^T (dL/dC h_k + t_k), for convolutions
    too: a layer is applied four times, in place of six by a double backward. The slopes' own derivative is zero almost
    everywhere, so this is exact.
    """
    n = len(real)
    x = torch.cat([real, fake, between])
    y = _labels(y, len(x))
    h, fed, bent = critic.lift(x, y), [], []
    for layer in critic.hidden:
        fed.append(h)
        bent.append(layer(h))
        h = leaky_relu(bent[-1], SLOPE)
    logit = critic.head(h, y)

    v, by_preactivation = critic.head.slope(h, y), []
    for layer, h_k, a in zip(reversed(critic.hidden), reversed(fed), reversed(bent), strict=True):
        by_preactivation.insert(0, _times_slope(v, a))
        v = _pulled(layer, by_preactivation[0], h_k)
    by_input = critic.pull_back(fed[0], v)

    by_real, by_fake, critic_loss = _by_logits(objective.critic_loss, logit[:n], logit[n : 2 * n])
    weight = torch.cat([by_real, by_fake, logit.new_zeros(len(between))])
    charged = gamma / 2 * penalty.charged(n, len(between), x)
    price = (charged * penalty.price(by_input)).sum()
    tangent = critic.push_forward(fed[0], charged[:, None] * penalty.by_slope(by_input))
    for layer, h_k, a, v in zip(critic.hidden, fed, bent, by_preactivation, strict=True):
        layer.weight.grad = _by_weight(layer, v, torch.addcmul(tangent, h_k, weight.view(-1, *[1] * (h_k.ndim - 1))))
        layer.bias.grad = (weight @ v.flatten(1)).view(v.shape[1], -1).sum(dim=1)
        tangent = _times_slope(_pushed(layer, tangent), a)
    rows = weight[:, None] * critic.head.flat(h) + critic.head.flat(tangent)
    critic.head.score.weight.grad = rows.sum(dim=0)[None]
    critic.head.score.bias.grad = weight.sum()[None]
    if critic.head.of_class is not None:
        critic.head.of_class.weight.grad = torch.zeros_like(critic.head.of_class.weight).index_add_(0, y, rows)

    return Gradients.of(objective, n, logit, by_input, critic_loss, price)


def gradients_for(critic: nn.Module, *, compiled: bool = False) -> Callable[..., Gradients]:
    """The fast way where the critic allows it; it gains nothing by being compiled."""
    plain = type(critic) in (Critic, ConvCritic) and not any(parametrize.is_parametrized(module) for module in critic.modules())
    if plain:
        return closed_form
    return partial(functional, derivatives=torch.compile(_derivatives)) if compiled else autograd


def _times_slope(v: Tensor, a: Tensor) -> Tensor:
    """v times the derivative of the leaky ReLU at a: one pass, where a comparison and a product are three."""
    return torch.ops.aten.leaky_relu_backward(v, a, SLOPE, False)


def _pushed(layer: nn.Linear | nn.Conv2d, t: Tensor) -> Tensor:
    """The layer without its bias."""
    if isinstance(layer, nn.Linear):
        return linear(t, layer.weight)
    return conv2d(t, layer.weight, None, layer.stride, layer.padding)


def _pulled(layer: nn.Linear | nn.Conv2d, v: Tensor, h: Tensor) -> Tensor:
    """The transpose of the layer, back to the shape of h."""
    if isinstance(layer, nn.Linear):
        return v @ layer.weight
    return conv2d_input(h.shape, layer.weight, v, layer.stride, layer.padding)


def _by_weight(layer: nn.Linear | nn.Conv2d, v: Tensor, h: Tensor) -> Tensor:
    """The gradient of the sum of v * layer(h) by the layer's weight."""
    if isinstance(layer, nn.Linear):
        return v.T @ h
    # laid out as the weight is: h has its channels last, the gradient then has, too, and fused Adam reads memory, not strides
    return conv2d_weight(h, layer.weight.shape, v, layer.stride, layer.padding).contiguous()


def _labels(y: Int64[Tensor, "n"] | None, rows: int) -> Int64[Tensor, "m"] | None:
    return None if y is None else y.repeat(rows // len(y))


@torch.enable_grad()
def _by_logits(
    loss: Callable[[Tensor, Tensor], Tensor], real: Float[Tensor, "n"], fake: Float[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, ""]]:
    """The derivatives of the mean loss by each real and each fake logit, and that mean."""
    real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
    mean = loss(real, fake).mean()
    by_real, by_fake = torch.autograd.grad(mean, [real, fake], allow_unused=True, materialize_grads=True)
    return by_real, by_fake, mean.detach()


# Other ways to hold the critic back, or to look ahead ------------------------------------------------------------------------


@torch.no_grad()
def clip_weights(critic: nn.Module, bound: float) -> None:
    """Every weight into [-bound, bound], after each step: the Lipschitz constraint of Arjovsky et al. 2017, algorithm 1."""
    for parameter in critic.parameters():
        if parameter.requires_grad:
            parameter.clamp_(-bound, bound)


def normalise_spectrally(critic: nn.Module) -> None:
    """Each linear or convolutional layer, and the table of class vectors, divided by its largest singular value, in place (Miyato
    et al. 2018; Miyato and Koyama 2018). Layers that begin at zero, as the last of a residual block, begin at random: nothing divides zero."""
    for module in list(critic.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            if not module.weight.any():
                nn.init.orthogonal_(module.weight)
            parametrizations.spectral_norm(module)


def unrolled_pull(
    critic: nn.Module,
    objective: Objective,
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "n d"],
    y: Int64[Tensor, "n"] | None,
    *,
    steps: int,
    rate: float = UNROLLED_RATE,
) -> Float[Tensor, "n d"]:
    """The gradient of the generator's loss by each fake when the critic answers with `steps` gradient steps of its own.

    Metz et al. 2017, eq. 8 to 11: the derivative runs through the critic's steps too, so a generator that crowds into one
    mode feels the critic about to reject it. Plain steps at a fixed rate, where the paper's are Adam's, and without the penalty that
    the critic may pay in training: at this rate steps against R1 + R2 blow up. The critic itself is left as it is.
    """
    fake = fake.detach().requires_grad_()
    weights = {name: parameter.detach().requires_grad_() for name, parameter in critic.named_parameters() if parameter.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in critic.named_buffers()}  # statistics of batches move in these
    for _ in range(steps):
        logits = (functional_call(critic, buffers | weights, (x, y)) for x in (real, fake))
        loss = objective.critic_loss(*logits).mean()
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True, materialize_grads=True)
        weights = {name: w - rate * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
    logits = (functional_call(critic, buffers | weights, (x, y)) for x in (real, fake))
    return torch.autograd.grad(objective.generator_loss(*logits).mean(), fake)[0]


def critical_gamma(objective: Objective, penalty: Penalty) -> float:
    """The weight of R1, R2 or both at which the game around its solution is critically damped.

    In the Dirac-GAN (Mescheder et al. 2018, section 2) the eigenvalues of simultaneous gradient descent are
    -s gamma / 2 +- sqrt((s gamma / 2)^2 - l^2), with l the critic's slope by a fake logit at equilibrium and s how many sides
    pay. A smaller gamma lets the players circle. Raises ValueError for penalties that are not centred at zero.
    """
    if penalty.target or not (penalty.real or penalty.fake):
        raise ValueError("only R1, R2 or both have a critical gamma; give --gamma as a number")
    chance = torch.zeros(1) if objective.optimal is None else objective.optimal(torch.zeros(1))
    _, by_fake, _ = _by_logits(objective.critic_loss, chance, chance)
    return 2 * abs(float(by_fake)) / (penalty.real + penalty.fake)
