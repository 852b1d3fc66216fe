import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from training.data import DATASETS, Dataset
from training.export import Served, export_onnx
from training.networks import FAMILIES, Critic, Generator, Look, Smooth, family

SHAPES = [(8, 8, 1), (28, 28, 1), (12, 20, 3)]


def images(shape):
    return Dataset("noise", np.random.default_rng(0).integers(0, 256, (100, *shape)).astype(np.uint8), cells=2)


def test_lift_has_the_jacobian_it_claims():
    torch.manual_seed(0)
    critic = Critic(3, width=8, classes=4, fourier=5, frequency=(2.0,)).double()
    x, tangent = torch.randn(2, 6, 3, dtype=torch.float64)
    y = torch.arange(6) % 4
    cotangent = torch.randn(6, 3 + 10 + 4, dtype=torch.float64)
    _, forward = torch.autograd.functional.jvp(lambda v: critic.lift(v, y), x, tangent)
    _, pull = torch.autograd.functional.vjp(lambda v: critic.lift(v, y), x, cotangent)
    torch.testing.assert_close(critic.push_forward(critic.lift(x, y), tangent), forward)
    torch.testing.assert_close(critic.pull_back(critic.lift(x, y), cotangent), pull)


def test_class_changes_what_a_conditional_generator_makes():
    torch.manual_seed(0)
    generator = Generator(6, 4, width=16, classes=3, bounded=True)
    z = torch.randn(1, 6).expand(3, 6)
    x = generator(z, torch.arange(3))
    assert x.shape == (3, 4) and x.abs().max() <= 1
    assert not torch.allclose(x[0], x[1])


def test_pixels_are_averaged_with_their_neighbours_and_channels_kept_apart():
    x = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    found = Smooth((5, 7, 3))(x.flatten(1)).view(x.shape).numpy()
    binomial = np.outer([1, 2, 1], [1, 2, 1])[None, :, :, None] / 16
    np.testing.assert_allclose(found[:, 1:-1, 1:-1], correlate(x.numpy(), binomial)[:, 1:-1, 1:-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Smooth((5, 7, 3))(torch.ones(1, 105)), 1.0, rtol=1e-6)  # borders too


def test_only_images_that_are_fine_enough_are_smoothed():
    smooth = {shape: FAMILIES["perceptron"].generator(5, shape, width=8, classes=0, bounded=True).smooth for shape in ((2,), *SHAPES)}
    assert [isinstance(s, Smooth) for s in smooth.values()] == [False, False, True, False]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("classes", [0, 3])
def test_a_family_maps_rows_to_rows_each_by_itself(name, shape, classes):
    torch.manual_seed(0)
    generator = FAMILIES[name].generator(5, shape, width=16, classes=classes, bounded=True)
    critic = FAMILIES[name].critic(shape, width=16, classes=classes, packing=1 if classes else 2, fourier=0, frequency=(6.0,))
    y = torch.arange(4) % classes if classes else None
    x = generator(torch.randn(4, 5), y)
    assert generator.classes == classes and x.shape == (4, math.prod(shape)) and x.abs().max() <= 1
    x = torch.randn(4, critic_inputs := math.prod(shape) * (1 if classes else 2))
    assert critic(x, y).shape == (4,) and x.shape[1] == critic_inputs
    alone = torch.cat([critic(x[i : i + 1], None if y is None else y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(critic(x, y), alone)
    if classes:
        assert not torch.allclose(critic(x[:1].repeat(3, 1), torch.arange(3)), critic(x[:1], y[:1]))


@pytest.mark.parametrize("name", ["dcgan", "resnet"])
def test_scales_stay_sane_at_the_start(name):
    torch.manual_seed(0)
    x = FAMILIES[name].generator(64, (28, 28, 1), width=64, classes=0, bounded=False)(torch.randn(64, 64))
    logit = FAMILIES[name].critic((28, 28, 1), width=64, classes=0, packing=1, fourier=0, frequency=(6.0,))(torch.randn(64, 784))
    assert 0.1 < x.std() < 5 and 0.05 < logit.std() < 5


def test_packed_images_are_channels():
    critic = FAMILIES["resnet"].critic((8, 8, 3), width=8, classes=0, packing=2, fourier=0, frequency=(6.0,))
    x = torch.arange(2 * 2 * 8 * 8 * 3.0).reshape(2, -1)
    seen = critic.look(x)
    assert seen.shape == (2, 6, 8, 8)
    torch.testing.assert_close(seen[1, 3:].permute(1, 2, 0), x[1].reshape(2, 8, 8, 3)[1])


def test_blocks_of_pixels_are_channels_and_go_back():
    look = Look((8, 12, 3), packing=2, block=4)
    x = torch.arange(2 * 2 * 8 * 12 * 3.0).reshape(2, -1)
    seen = look(x)
    assert seen.shape == (2, 96, 2, 3) and seen.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(seen[1, 48:, 1, 2].reshape(4, 4, 3), x[1].reshape(2, 8, 12, 3)[1, 4:, 8:])
    torch.testing.assert_close(look.back(seen), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("classes", [0, 3])
def test_every_generator_serves_from_onnx(name, classes, tmp_path):
    torch.manual_seed(0)
    shape = (8, 12, 3)
    generator = FAMILIES[name].generator(6, shape, width=16, classes=classes, bounded=True)
    inputs = {"z": torch.randn(64, 6)} | ({"y": torch.arange(64) % classes} if classes else {})
    export_onnx(Served(generator, images(shape)), tmp_path / "model.onnx", inputs, ("samples",), tolerance=1e-5)


def test_networks_of_a_users_own_are_found_by_import_path(monkeypatch, tmp_path):
    (tmp_path / "half_done.py").write_text("def broken(:")
    (tmp_path / "their_networks.py").write_text(
        "from training.networks import FAMILIES, Family\nTINY = Family(FAMILIES['dcgan'].generator, FAMILIES['perceptron'].critic)\nSIZE = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert family("their_networks:TINY").generator is FAMILIES["dcgan"].generator
    assert family("perceptron") is FAMILIES["perceptron"]
    for name, words in {
        "dcgen": "did you mean dcgan",
        "their_networks:BIG": "cannot be imported: .*BIG",
        "no_such_module:X": "cannot be imported: .*no_such_module.*PYTHONPATH",
        "half_done:X": "cannot be imported: SyntaxError",
        "mine": "there are no networks mine. Known: perceptron",
        "their_networks:SIZE": "are a int; a training.networks.Family is expected",
    }.items():
        with pytest.raises(ValueError, match=words):
            family(name)


def test_vectors_have_a_critic_of_packed_rows():
    dataset = DATASETS["ring"]()
    critic = FAMILIES["perceptron"].critic(dataset.shape, width=8, classes=0, packing=4, fourier=3, frequency=(6.0,))
    assert critic(torch.zeros(5, 8)).shape == (5,)
