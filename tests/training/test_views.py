import math

import pytest
import torch

from training.views import SCHEDULES, InstanceNoise, augment, pack


def test_noise_has_the_variance_it_says_and_none_is_free():
    x, rng = torch.zeros(4000, 3), torch.Generator().manual_seed(0)
    state = rng.get_state()
    assert InstanceNoise(0.0)(x, rng) is x and torch.equal(rng.get_state(), state)
    assert float(InstanceNoise(0.3)(x, rng).std()) == pytest.approx(0.3, rel=0.03)


def test_schedules():
    noise = {name: InstanceNoise(0.5, name) for name in SCHEDULES}
    for step in range(50):
        for each in noise.values():
            each.update(step / 100, divergence=1.0)
    assert noise["constant"].sigma == 0.5
    assert noise["linear"].sigma == pytest.approx(0.5 * (1 - 49 / 100))
    assert noise["controlled"].sigma == pytest.approx(0.5 * math.exp(50 * 0.02 * 0.5))


def test_controller_settles_where_half_of_the_divergence_is_left():
    """Two points at distance 1, blurred: with sigma the divergence falls smoothly, here as exp(-sigma)."""
    noise = InstanceNoise(0.01, "controlled")
    for _ in range(2000):
        noise.update(0.0, math.exp(-noise.sigma))
    assert noise.sigma < 0.11  # ten times what it began with is the most
    noise = InstanceNoise(2.0, "controlled")
    for _ in range(2000):
        noise.update(0.0, math.exp(-noise.sigma))
    assert math.exp(-noise.sigma) == pytest.approx(0.5, abs=0.01)


def test_packing_puts_neighbours_in_one_row():
    x = torch.arange(12.0).reshape(6, 2)
    assert pack(x, 3).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert torch.equal(pack(x, 1), x)


@pytest.mark.parametrize("shape", [(8, 8, 1), (12, 20, 3)])
def test_augmentation_is_differentiable_and_drawn_for_each_image(shape):
    image = torch.rand(1, math.prod(shape)) * 2 - 1
    x = image.repeat(40, 1).requires_grad_()
    shown = augment(x, shape, torch.Generator().manual_seed(0))
    assert shown.shape == x.shape and not torch.allclose(shown[0], shown[1])
    again = augment(x, shape, torch.Generator().manual_seed(0))
    assert torch.equal(shown, again)
    (gradient,) = torch.autograd.grad(shown.square().sum(), x)
    assert gradient.isfinite().all() and (gradient.abs().sum(dim=1) > 0).all()
    # What is cut out or moved in is zero: a quarter at least of some image, never all of any.
    blank = (shown.detach().unflatten(1, shape) == 0).all(dim=3).float().mean(dim=(1, 2))
    assert blank.max() >= 0.25 and blank.max() < 1


@pytest.mark.parametrize("shape", [(8, 12, 1), (6, 9, 1)])
def test_augmentation_hides_what_is_above_as_often_as_what_is_below(shape):
    shown = augment(torch.rand(20_000, math.prod(shape)), shape, torch.Generator().manual_seed(0)).unflatten(1, shape)
    often = (shown == 0).float().mean(dim=(0, 3))
    for turned in (often.flip(0), often.flip(1)):
        torch.testing.assert_close(often, turned, rtol=0, atol=0.015)
