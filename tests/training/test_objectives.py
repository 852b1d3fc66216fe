import math
from typing import get_args, get_type_hints

import pytest
import torch

from training.objectives import OBJECTIVES
from training.train import Config


def test_at_chance_the_critic_pays_what_theory_says():
    zero = torch.zeros(4)
    assert OBJECTIVES["relativistic"].critic_loss(zero, zero).mean() == pytest.approx(math.log(2))
    assert OBJECTIVES["non_saturating"].critic_loss(zero, zero).mean() == pytest.approx(math.log(4))


def test_relativistic_loss_sees_differences_only():
    objective, (real, fake) = OBJECTIVES["relativistic"], torch.randn(2, 8)
    torch.testing.assert_close(objective.critic_loss(real + 3, fake + 3), objective.critic_loss(real, fake))
    torch.testing.assert_close(objective.generator_loss(real, fake), objective.critic_loss(fake, real))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_players_pull_the_fake_logit_apart(name):
    real, fake = torch.zeros(2, 3, requires_grad=True)
    by_critic = torch.autograd.grad(OBJECTIVES[name].critic_loss(real, fake).sum(), fake)[0]
    by_generator = torch.autograd.grad(OBJECTIVES[name].generator_loss(real, fake).sum(), fake)[0]
    assert (by_critic > 0).all() and (by_generator < 0).all()


def test_command_line_offers_every_objective():
    assert set(get_args(get_type_hints(Config)["objective"])) == set(OBJECTIVES)
