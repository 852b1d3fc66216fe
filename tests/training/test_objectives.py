import math

import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import Config
from training.objectives import F_DIVERGENCES, OBJECTIVES, classic_critic_loss

RATIO_GAMES = [name for name, objective in OBJECTIVES.items() if objective.optimal]


def kl(p, q):
    return float(torch.xlogy(p, p / q).sum())


def js(p, q):
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


# Each divergence as a textbook defines it, on laws p and q over the same cells.
DEFINITIONS = {
    "JS": js,
    "JS of pairs": lambda p, q: js(torch.outer(p, q).flatten(), torch.outer(q, p).flatten()),
    "Le Cam's distance": lambda p, q: float(((p - q) ** 2 / (p + q)).sum()),
    "total variation": lambda p, q: float((p - q).abs().sum() / 2),
    "KL(p, q)": kl,
    "KL(q, p)": lambda p, q: kl(q, p),
    "Pearson's chi-squared": lambda p, q: float(((p - q) ** 2 / q).sum()),
    "Neyman's chi-squared": lambda p, q: float(((p - q) ** 2 / p).sum()),
    "squared Hellinger": lambda p, q: float(((p.sqrt() - q.sqrt()) ** 2).sum()),
    "2 JS": lambda p, q: 2 * js(p, q),
}
law = st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4).map(lambda v: torch.tensor(v, dtype=torch.float64) / sum(v))


def mean_loss(loss, p, q, logit):
    """The expectation of a loss over independent pairs of a real ~ p and a fake ~ q, where the critic answers `logit`."""
    i, j = torch.meshgrid(torch.arange(len(p)), torch.arange(len(q)), indexing="ij")
    return float((torch.outer(p, q).flatten() * loss(logit[i.flatten()], logit[j.flatten()])).sum())


@pytest.mark.parametrize("name", RATIO_GAMES)
@settings(max_examples=25, deadline=None)
@given(p=law, q=law)
def test_the_optimal_critics_loss_is_the_divergence(name, p, q):
    objective = OBJECTIVES[name]
    loss = mean_loss(objective.critic_loss, p, q, objective.optimal((p / q).log()))
    expected = DEFINITIONS[objective.divergence](p, q)
    assert objective.estimate(loss) == pytest.approx(expected, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", RATIO_GAMES)
def test_no_other_critic_claims_more(name):
    torch.manual_seed(0)
    objective = OBJECTIVES[name]
    p, q = torch.softmax(torch.randn(2, 6, dtype=torch.float64), dim=1)
    best = objective.optimal((p / q).log())
    least = mean_loss(objective.critic_loss, p, q, best)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            assert mean_loss(objective.critic_loss, p, q, best + size * torch.randn(6, dtype=torch.float64)) >= least - 1e-12


@pytest.mark.parametrize("name", RATIO_GAMES)
def test_laws_apart_reach_the_largest_value(name):
    objective = OBJECTIVES[name]
    p, q = (torch.tensor(v, dtype=torch.float64) for v in ((0.5, 0.5, 1e-9, 1e-9), (1e-9, 1e-9, 0.5, 0.5)))
    found = objective.estimate(mean_loss(objective.critic_loss, p, q, objective.optimal((p / q).log())))
    assert found == pytest.approx(objective.largest, rel=1e-3) if math.isfinite(objective.largest) else found > 5


@pytest.mark.parametrize("name", RATIO_GAMES)
@given(p=law, q=law)
@settings(max_examples=10, deadline=None)
def test_the_share_of_an_optimal_critic_lies_between_none_and_all(name, p, q):
    objective = OBJECTIVES[name]

    def share(p, q):
        logit = objective.optimal((p / q).log())
        # p and q weigh the logits of reals and of fakes, so the mean of the doubt is taken by hand
        doubt = 0.0 if objective.ratio is None else mean_loss(lambda *logits: classic_critic_loss(*map(objective.ratio, logits)), p, q, logit)
        return objective.share(mean_loss(objective.critic_loss, p, q, logit), doubt)

    assert share(p, p) == pytest.approx(0, abs=1e-6)
    apart = (torch.tensor(v, dtype=torch.float64) for v in ((0.5, 0.5, 1e-9, 1e-9), (1e-9, 1e-9, 0.5, 0.5)))
    assert share(*apart) == pytest.approx(1, rel=1e-3)
    assert -1e-9 <= share(p, q) <= 1 + 1e-9
    if objective.ratio is not None:
        assert share(p, q) == pytest.approx(js(p, q) / math.log(2), abs=1e-6)


def test_wasserstein_measures_the_distance_on_a_line():
    torch.manual_seed(0)
    p, q = torch.softmax(torch.randn(2, 9, dtype=torch.float64), dim=1)
    surplus = (p - q).cumsum(0)[:-1]  # between neighbours at distance 1, the potential falls where p lies to the left
    potential = torch.cat([torch.zeros(1, dtype=torch.float64), -surplus.sign().cumsum(0)])
    found = OBJECTIVES["wasserstein"].estimate(mean_loss(OBJECTIVES["wasserstein"].critic_loss, p, q, potential))
    assert found == pytest.approx(float(surplus.abs().sum()))


@given(p=law, q=law)
@settings(max_examples=25, deadline=None)
def test_generators_of_2014_descend_what_theory_says(p, q):
    logit = (p / q).log()
    critic = mean_loss(OBJECTIVES["minimax"].critic_loss, p, q, logit)
    assert -critic == pytest.approx(-math.log(4) + 2 * js(p, q))
    # With the critic fixed at its optimum, the gradient by q of -log D is that of KL(q, p) - 2 JS(p, q), up to a constant.
    law_of_g = q.clone().requires_grad_()
    middle = (p + law_of_g) / 2
    twice_js = torch.xlogy(p, p / middle).sum() + torch.xlogy(law_of_g, law_of_g / middle).sum()
    (expected,) = torch.autograd.grad(torch.xlogy(law_of_g, law_of_g / p).sum() - twice_js, law_of_g)
    found = OBJECTIVES["non_saturating"].generator_loss(logit, logit)
    torch.testing.assert_close(found - found.mean(), expected - expected.mean())


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_conjugate_is_fenchels(name):
    divergence = F_DIVERGENCES[name]
    u = torch.logspace(-6, 6, 200_001, dtype=torch.float64)
    logit = divergence.optimal(torch.linspace(-1.5, 1.5, 7, dtype=torch.float64))
    by_search = (u * divergence.output(logit)[:, None] - divergence.f(u)).amax(dim=1)
    torch.testing.assert_close(divergence.conjugate(logit), by_search, rtol=1e-5, atol=1e-5)
    assert divergence.f(torch.ones(1, dtype=torch.float64)) == 0


def test_relativistic_loss_sees_differences_only():
    objective, (real, fake) = OBJECTIVES["relativistic"], torch.randn(2, 8)
    torch.testing.assert_close(objective.critic_loss(real + 3, fake + 3), objective.critic_loss(real, fake))
    torch.testing.assert_close(objective.generator_loss(real, fake), objective.critic_loss(fake, real))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_players_pull_the_fake_logit_apart(name):
    objective = OBJECTIVES[name]
    real, fake = torch.zeros(2, 3, requires_grad=True)
    if name == "least_squares_pearson":  # its generator wants the middle, 0, where the pull is none
        fake = torch.full((3,), -0.5, requires_grad=True)
    by_critic = torch.autograd.grad(objective.critic_loss(real, fake).sum(), fake)[0]
    by_generator = torch.autograd.grad(objective.generator_loss(real, fake).sum(), fake)[0]
    assert (by_critic > 0).all() or name == "least_squares"  # whose label of fakes is 0, where the logit already is
    assert (by_generator < 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_finite_with_finite_gradients_a_pair_each(name):
    real, fake = 15 * torch.tensor([[-1.0, -0.1, 0.0, 0.1, 1.0], [1.0, 0.1, 0.0, -0.1, -1.0]])
    real.requires_grad_(), fake.requires_grad_()
    for loss in (OBJECTIVES[name].critic_loss, OBJECTIVES[name].generator_loss):
        value = loss(real, fake)
        assert value.shape == (5,) and value.isfinite().all()
        gradients = torch.autograd.grad(value.sum(), [real, fake], allow_unused=True, materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_command_line_offers_every_objective():
    assert all(tyro.cli(Config, args=["--objective", name]).objective == name for name in OBJECTIVES)
