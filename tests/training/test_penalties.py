import pytest
import torch

from training.networks import Critic
from training.objectives import OBJECTIVES
from training.penalties import PENALTIES, autograd, closed_form


@pytest.fixture(params=["relativistic", "non_saturating"])
def objective(request):
    return OBJECTIVES[request.param]


@pytest.mark.parametrize(("classes", "fourier"), [(0, 0), (0, 8), (4, 0), (4, 8)])
def test_closed_form_equals_double_differentiation(objective, classes, fourier):
    torch.manual_seed(1)
    critic = Critic(5, width=24, classes=classes, fourier=fourier, fourier_scale=2.0).double()
    real, fake = torch.randn(2, 16, 5, dtype=torch.float64)
    y = torch.randint(classes, (16,)) if classes else None
    oracle = autograd(critic, objective, real, fake, y, 0.7)
    expected = [p.grad.clone() for p in critic.parameters()]
    found = closed_form(critic, objective, real, fake, y, 0.7)
    for p, gradient in zip(critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-11, atol=1e-12)
    for name in ("critic_loss", "generator_loss", "penalty", "by_fake"):
        torch.testing.assert_close(getattr(found, name), getattr(oracle, name), rtol=1e-11, atol=1e-12)


def test_by_fake_is_the_generators_gradient(objective):
    torch.manual_seed(2)
    critic = Critic(3, width=16, classes=0, fourier=4).double()
    real, fake = torch.randn(2, 8, 3, dtype=torch.float64)
    fake.requires_grad_()
    objective.generator_loss(critic(real), critic(fake)).mean().backward()
    torch.testing.assert_close(closed_form(critic, objective, real, fake.detach(), None, 1.0).by_fake, fake.grad)


def test_without_penalty_only_the_game_is_left(objective):
    torch.manual_seed(3)
    critic = Critic(3, width=16, classes=0).double()
    real, fake = torch.randn(2, 8, 3, dtype=torch.float64)
    seen = PENALTIES["none"](critic, objective, real, fake, None, 5.0)
    found = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    objective.critic_loss(critic(real), critic(fake)).mean().backward()
    assert seen.penalty == 0
    for p, gradient in zip(critic.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, p.grad)
