import torch

from training.networks import Critic, Generator


def test_lift_has_the_jacobian_it_claims():
    torch.manual_seed(0)
    critic = Critic(3, width=8, classes=4, fourier=5, fourier_scale=2.0).double()
    x, tangent = torch.randn(2, 6, 3, dtype=torch.float64)
    y = torch.arange(6) % 4
    cotangent = torch.randn(6, 3 + 10 + 4, dtype=torch.float64)
    _, forward = torch.autograd.functional.jvp(lambda v: critic.lift(v, y), x, tangent)
    _, pull = torch.autograd.functional.vjp(lambda v: critic.lift(v, y), x, cotangent)
    torch.testing.assert_close(critic.push_forward(x, tangent), forward)
    torch.testing.assert_close(critic.pull_back(x, cotangent), pull)


def test_class_changes_what_a_conditional_generator_makes():
    torch.manual_seed(0)
    generator = Generator(6, 4, width=16, classes=3, bounded=True)
    z = torch.randn(1, 6).expand(3, 6)
    x = generator(z, torch.arange(3))
    assert x.shape == (3, 4) and x.abs().max() <= 1
    assert not torch.allclose(x[0], x[1])
