import copy
import math

import pytest
import torch
from torch import nn

from training.networks import FAMILIES, ConvCritic, Critic
from training.objectives import OBJECTIVES
from training.penalties import (
    PENALTIES,
    autograd,
    clip_weights,
    closed_form,
    critical_gamma,
    functional,
    gradients_for,
    normalise_spectrally,
    unrolled_pull,
)

NONE = torch.zeros(0, 3, dtype=torch.float64)


class Labelled(nn.Module):
    """A critic that takes a label and does not care."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return self.inner(x)


class Line(nn.Module):
    """The critic of the Dirac-GAN: C(x) = w x."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x, y=None):
        return self.w * x[:, 0]


@pytest.fixture(params=["relativistic", "non_saturating", "wasserstein"])
def objective(request):
    return OBJECTIVES[request.param]


def draw(n, d):
    return torch.randn(2, n, d, dtype=torch.float64)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(("classes", "fourier"), [(0, 0), (0, 8), (4, 8)])
def test_closed_form_equals_double_differentiation(objective, penalty, classes, fourier):
    torch.manual_seed(1)
    critic = Critic(5, width=24, classes=classes, fourier=fourier, frequency=(2.0,)).double()
    compare(critic, *draw(16, 5), objective, penalty, classes)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(("shape", "packing", "classes"), [((8, 8, 1), 1, 0), ((12, 20, 3), 2, 0), ((32, 32, 1), 1, 4)])
def test_closed_form_equals_double_differentiation_of_convolutions(penalty, shape, packing, classes):
    torch.manual_seed(1)
    critic = ConvCritic(shape, width=8, classes=classes, packing=packing).double()
    compare(critic, *draw(6, packing * math.prod(shape)), OBJECTIVES["relativistic"], penalty, classes)


def compare(critic, real, fake, objective, penalty, classes):
    between = penalty.points_between(real, fake, torch.Generator().manual_seed(4))
    y = torch.randint(classes, (len(real),)) if classes else None
    oracle = autograd(critic, objective, penalty, real, fake, between, y, 0.7)
    expected = [p.grad.clone() for p in critic.parameters()]
    found = closed_form(critic, objective, penalty, real, fake, between, y, 0.7)
    for p, gradient in zip(critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-11, atol=1e-12)
    for name in ("critic_loss", "generator_loss", "penalty", "by_fake", "doubt"):
        torch.testing.assert_close(getattr(found, name), getattr(oracle, name), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("way", [closed_form, functional, autograd])
@pytest.mark.parametrize("name", ["perceptron", "dcgan"])
def test_every_way_to_the_gradients_is_the_same_step_of_the_optimiser(name, way):
    """Which reads the memory of a gradient: strides other than its weight's would move other weights."""
    moved, real, fake = [], *torch.randn(2, 8, 32 * 32 * 3)
    for gradients in (way, autograd):
        torch.manual_seed(1)
        critic = FAMILIES[name].critic((32, 32, 3), width=16, classes=0, packing=1, fourier=0, frequency=(1.0,))
        before = [p.detach().clone() for p in critic.parameters()]
        gradients(critic, OBJECTIVES["relativistic"], PENALTIES["r1r2"], real, fake, real[:0], None, 0.7)
        torch.optim.Adam(critic.parameters(), lr=1e-3, fused=True).step()
        moved.append([p.detach() - old for p, old in zip(critic.parameters(), before, strict=True)])
    for found, expected in zip(*(steps[:-1] for steps in moved), strict=True):  # pairs leave the last bias where it is
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(("name", "classes"), [("perceptron", 0), ("dcgan", 4), ("resnet", 0)])
def test_one_function_of_the_weights_gives_the_same_gradients(objective, penalty, name, classes):
    torch.manual_seed(1)
    critic = FAMILIES[name].critic((8, 8, 1), width=16, classes=classes, packing=1, fourier=0, frequency=(6.0,)).double()
    real, fake = draw(6, 64)
    between = penalty.points_between(real, fake, torch.Generator().manual_seed(4))
    y = torch.randint(classes, (6,)) if classes else None
    oracle = autograd(critic, objective, penalty, real, fake, between, y, 0.7)
    expected = [p.grad.clone() for p in critic.parameters()]
    found = functional(critic, objective, penalty, real, fake, between, y, 0.7)
    for p, gradient in zip(critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-11, atol=1e-12)
    for part in ("critic_loss", "generator_loss", "penalty", "by_fake", "doubt"):
        torch.testing.assert_close(getattr(found, part), getattr(oracle, part), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_by_fake_is_the_generators_gradient_in_every_game(name):
    torch.manual_seed(2)
    critic, objective = Critic(3, width=16, classes=0, fourier=4).double(), OBJECTIVES[name]
    real, fake = draw(8, 3)
    fake.requires_grad_()
    objective.generator_loss(critic(real), critic(fake)).mean().backward()
    found = closed_form(critic, objective, PENALTIES["r1r2"], real, fake.detach(), NONE, None, 1.0)
    torch.testing.assert_close(found.by_fake, fake.grad)


def test_without_penalty_only_the_game_is_left(objective):
    torch.manual_seed(3)
    critic = Critic(3, width=16, classes=0).double()
    real, fake = draw(8, 3)
    seen = closed_form(critic, objective, PENALTIES["none"], real, fake, NONE, None, 5.0)
    found = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    objective.critic_loss(critic(real), critic(fake)).mean().backward()
    assert seen.penalty == 0
    for p, gradient in zip(critic.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.parametrize(
    ("name", "price"),  # of the critic C(x) = 3 x, whose slope is 3 everywhere, at gamma = 2
    [("r1r2", 9 + 9), ("r1", 9), ("r2", 9), ("gradient", (3 - 1) ** 2), ("none", 0)],
)
def test_a_penalty_costs_what_its_paper_says(name, price):
    real, fake = draw(8, 1)
    penalty = PENALTIES[name]
    between = penalty.points_between(real, fake)
    assert between.shape == (8 * penalty.between, 1)
    if penalty.between:
        assert ((between - real) * (between - fake) <= 0).all()
    seen = autograd(Line(3.0), OBJECTIVES["wasserstein"], penalty, real, fake, between, None, 2.0)
    assert float(seen.penalty) == pytest.approx(price)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "least_squares_pearson"])
@pytest.mark.parametrize("penalty", ["r1", "r1r2"])
def test_critical_gamma_critically_damps_the_dirac_gan(name, penalty):
    """The two eigenvalues of the game's vector field at its solution meet: at a smaller gamma they turn, at a larger not."""
    objective = OBJECTIVES[name]
    level = torch.zeros(1, dtype=torch.float64)
    level = level if objective.optimal is None else objective.optimal(level)

    def field(state, gamma):
        generator, critic = state[0:1], state[1:2]
        real, fake = level + 0 * critic, level + critic * generator
        cost = gamma / 2 * (PENALTIES[penalty].real + PENALTIES[penalty].fake) * critic.square()
        by_generator = torch.autograd.grad(objective.generator_loss(real, fake).sum(), generator, create_graph=True)[0]
        by_critic = torch.autograd.grad((objective.critic_loss(real, fake) + cost).sum(), critic, create_graph=True)[0]
        return -torch.cat([by_generator, by_critic])

    def discriminant(gamma):
        origin = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        jacobian = torch.autograd.functional.jacobian(lambda s: field(s, gamma), origin)
        return float(jacobian.trace() ** 2 / 4 - torch.linalg.det(jacobian))

    gamma = critical_gamma(objective, PENALTIES[penalty])
    assert discriminant(gamma) == pytest.approx(0, abs=1e-9)
    assert discriminant(0.9 * gamma) < 0 < discriminant(1.1 * gamma)


def test_gamma_of_a_penalty_that_is_not_centred_must_be_given():
    for name in ("gradient", "none"):
        with pytest.raises(ValueError, match="give --gamma"):
            critical_gamma(OBJECTIVES["hinge"], PENALTIES[name])


def test_clipping_bounds_every_weight():
    torch.manual_seed(0)
    critic = Critic(3, width=16, classes=0)
    clip_weights(critic, 0.01)
    assert max(float(p.detach().abs().max()) for p in critic.parameters()) == pytest.approx(0.01)


def test_what_does_not_learn_is_left_as_it_is():
    """Frozen weights by clipping and by the gradient that can be compiled, statistics of batches by looking ahead."""
    critic, (real, fake) = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.Linear(4, 1), nn.Flatten(0)), draw(6, 3)
    critic = Labelled(critic).double()
    critic.inner[0].weight.requires_grad_(False).fill_(0.5)
    before = copy.deepcopy(critic.state_dict())
    unrolled_pull(critic, OBJECTIVES["hinge"], real, fake, None, steps=2)
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())
    critic.inner[1] = nn.Identity()
    functional(critic, OBJECTIVES["hinge"], PENALTIES["r1r2"], real, fake, NONE, None, 1.0)
    assert critic.inner[0].weight.grad is None and critic.inner[3].weight.grad.any()
    clip_weights(critic, 0.01)
    assert (critic.inner[0].weight == 0.5).all() and critic.inner[3].weight.abs().max() <= 0.01


@pytest.mark.parametrize(("name", "shape", "classes"), [("perceptron", (3,), 0), ("dcgan", (8, 8, 1), 0), ("dcgan", (8, 8, 1), 3), ("resnet", (8, 8, 1), 3)])
def test_spectral_norm_makes_each_layer_a_contraction(name, shape, classes):
    torch.manual_seed(0)
    critic = FAMILIES[name].critic(shape, width=16, classes=classes, packing=1, fourier=0, frequency=(6.0,))
    assert (gradients_for(critic) is closed_form) == (name != "resnet")
    normalise_spectrally(critic)
    assert gradients_for(critic) is autograd
    y = torch.arange(2) if classes else None
    for _ in range(100):  # each look in training mode is one step of the power method
        assert critic(torch.randn(2, critic.dim if name == "perceptron" else 64), y).isfinite().all()
    for module in critic.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            largest = torch.linalg.matrix_norm(module.weight.detach().flatten(1), ord=2)
            assert float(largest) == pytest.approx(1, abs=0.02)


def test_any_critic_trains_by_double_differentiation():
    torch.manual_seed(0)
    critic = FAMILIES["resnet"].critic((8, 8, 1), width=16, classes=0, packing=1, fourier=0, frequency=(6.0,))
    real, fake = torch.randn(2, 6, 64)
    seen = gradients_for(critic)(critic, OBJECTIVES["hinge"], PENALTIES["r1r2"], real, fake, real[:0], None, 1.0)
    assert seen.penalty > 0 and seen.by_fake.shape == fake.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())


def test_unrolled_generator_feels_the_critics_answer():
    """C(x) = w x under Wasserstein: k steps of rate r give w + k r (m_real - m_fake), so everything is known in closed form."""
    real, fake = draw(5, 1)
    critic, steps, rate = Line(0.3), 4, 0.2
    pull = unrolled_pull(critic, OBJECTIVES["wasserstein"], real, fake, None, steps=steps, rate=rate)
    answered = 0.3 + steps * rate * (real.mean() - fake.mean())
    torch.testing.assert_close(pull, ((steps * rate * fake.mean() - answered) / 5).expand(5, 1))
    assert critic.w == 0.3 and critic.w.grad is None


def test_unrolling_nothing_is_the_plain_gradient(objective):
    torch.manual_seed(0)
    critic, (real, fake) = Critic(3, width=8, classes=0).double(), draw(6, 3)
    before = copy.deepcopy(critic.state_dict())
    plain = closed_form(critic, objective, PENALTIES["none"], real, fake, NONE, None, 0.0).by_fake
    torch.testing.assert_close(unrolled_pull(critic, objective, real, fake, None, steps=0), plain)
    unrolled_pull(critic, objective, real, fake, None, steps=3)
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())
