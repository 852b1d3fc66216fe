from typing import get_args, get_type_hints

import numpy as np
import pytest

from training.data import DATASETS
from training.train import RECIPES, Config


def test_registries_agree():
    assert set(get_args(get_type_hints(Config)["dataset"])) == set(DATASETS) == set(RECIPES)


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_the_same_every_time_and_holds_out_a_fifth(name):
    dataset, again = DATASETS[name](), DATASETS[name]()
    np.testing.assert_array_equal(dataset.samples, again.samples)
    assert dataset.trained == pytest.approx(0.8 * len(dataset.samples), abs=1)
    assert dataset.samples.dtype == (np.uint8 if dataset.is_image else np.float32)
    x = dataset.normalised()
    assert x.shape == (len(dataset.samples), dataset.dim)
    assert np.abs(x.mean(axis=0)).max() < 1.01


def test_digits_are_all_of_scikit_learns():
    from sklearn.datasets import load_digits

    dataset = DATASETS["digits"]()
    assert dataset.shape == (8, 8, 1)
    assert np.array_equal(np.sort(np.bincount(dataset.labels)), np.sort(np.bincount(load_digits().target)))
    grey = np.rint(dataset.samples / 255 * 16)
    assert np.array_equal(np.sort(grey.reshape(-1, 64), axis=0), np.sort(load_digits().data, axis=0))


@pytest.mark.parametrize(("name", "modes", "sigma"), [("ring", 8, 0.01), ("grid", 25, 0.05)])
def test_mixtures_have_distinct_equal_modes(name, modes, sigma):
    mixture = DATASETS[name]().mixture
    assert len(np.unique(np.round(mixture.centres, 6), axis=0)) == modes and mixture.sigma == sigma
