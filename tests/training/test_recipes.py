from dataclasses import replace

import pytest
import torch

from training.config import Config
from training.data import DATASETS, ON_DISK
from training.evaluation import mixture_fit
from training.recipes import RECIPES, nearest_recipe
from training.train import adversarial_training, build

VECTORS = sorted(name for name in set(DATASETS) - set(ON_DISK) if "digits" not in name)


@pytest.mark.parametrize("name", VECTORS)
def test_the_first_steps_of_a_default_run_are_finite(name):
    dataset = DATASETS[name]()
    generator, last = adversarial_training(Config(dataset=name, steps=10), dataset)
    latent = build(Config(dataset=name), dataset)[0]
    samples = generator(torch.from_numpy(latent.sample(seed=0, count=64)))
    assert samples.shape == (64, dataset.dim) and samples.isfinite().all()
    assert None not in (last["critic_loss"], last["generator_loss"], last["penalty"])


def test_a_batch_doubles_in_equal_parts_of_a_run_and_reads_no_latent_twice(monkeypatch):
    dataset, recipe, drawn = DATASETS["ring"](), RECIPES["ring"], []
    latent_type = type(build(Config(dataset="ring"), dataset)[0])
    sample = latent_type.sample

    def watched(self, *, seed, offset=0, count, **rest):
        if seed == 3:  # a look at the run draws from a seed of its own
            drawn.append((offset, count))
        return sample(self, seed=seed, offset=offset, count=count, **rest)

    monkeypatch.setattr(latent_type, "sample", watched)
    monkeypatch.setitem(RECIPES, "ring", replace(recipe, doublings=2, batch=4))
    adversarial_training(Config(dataset="ring", steps=9, seed=3), dataset)
    assert [count for _, count in drawn] == [4] * 3 + [8] * 3 + [16] * 3
    ends = [offset + count for offset, count in drawn]
    assert all(end <= offset for end, (offset, _) in zip(ends, drawn[1:], strict=False))


@pytest.mark.parametrize(("shape", "name"), [((3,), "grid"), ((47,), "grid"), ((48,), "mixture1200"), ((8, 8, 1), "digits"), ((28, 28, 1), "mnist"), ((64, 12, 3), "digits")])
def test_data_of_a_users_own_take_the_recipe_of_what_is_as_large(shape, name):
    assert nearest_recipe(shape) == name


@pytest.mark.slow
def test_the_default_recipe_finds_every_mode_of_the_ring_in_its_width():
    torch.set_num_threads(1)
    config, dataset = Config(dataset="ring", seed=1), DATASETS["ring"]()
    generator, _ = adversarial_training(config, dataset)
    with torch.no_grad():
        samples = generator(torch.from_numpy(build(config, dataset)[0].sample(seed=7, count=20_000))).numpy()
    fit = mixture_fit(dataset.mixture, samples * dataset.scale + dataset.shift)
    assert fit["modes"] == 8 and fit["reverse_kl"] < 0.003
    assert 0.975 < fit["high_quality"] < 0.992 and 0.9 < fit["spread"] < 1.05
