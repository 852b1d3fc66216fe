import gzip
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.datasets import load_sample_image

from training.data import DATASETS, DEBIAN, ON_DISK, STACKED, DataError, mnist
from training.evaluation import mixture_fit, sliced_wasserstein
from training.recipes import RECIPES

MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist.npz"


def test_every_data_set_has_a_recipe():
    assert set(RECIPES) == set(DATASETS)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - set(ON_DISK)))
def test_a_data_set_is_the_same_every_time_and_holds_out_a_fifth(name):
    dataset, again = DATASETS[name](), DATASETS[name]()
    np.testing.assert_array_equal(dataset.samples, again.samples)
    assert dataset.trained == pytest.approx(0.8 * len(dataset.samples), abs=1)
    assert dataset.samples.dtype == (np.uint8 if dataset.is_image else np.float32)
    assert dataset.stacked == (name in STACKED)
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


@pytest.mark.parametrize(("name", "modes", "sigma"), [("ring", 8, 0.01), ("grid", 25, 0.05), ("grid100", 100, 0.05)])
def test_mixtures_have_distinct_equal_modes(name, modes, sigma):
    mixture = DATASETS[name]().mixture
    assert len(np.unique(np.round(mixture.centres, 6), axis=0)) == modes and mixture.sigma == sigma


def test_a_mixture_in_1200_dimensions_is_judged_like_one_in_the_plane():
    dataset = DATASETS["mixture1200"]()
    assert pdist(dataset.mixture.centres).min() > 2 * 28
    fit = mixture_fit(dataset.mixture, dataset.samples.astype(np.float64))
    assert fit["modes"] == 10 and fit["reverse_kl"] < 1e-3
    assert fit["high_quality"] == pytest.approx(0.9889, abs=0.003)


@pytest.mark.parametrize("name", ["s-curve", "moons", "flower"])
def test_continuous_data_of_another_seed_are_other_samples_of_one_law(name):
    first, other = DATASETS[name](), DATASETS[name](seed=1)
    assert not np.array_equal(first.samples, other.samples)
    assert sliced_wasserstein(first.normalised(), (other.samples - first.shift) / first.scale) < 0.01


def test_the_flower_is_as_dense_as_its_photograph_is_bright():
    samples, photograph = DATASETS["flower"]().samples, load_sample_image("flower.jpg")  # 427 x 640
    brightness = photograph[:400].sum(axis=2, dtype=np.float64).reshape(16, 25, 32, 20).sum(axis=(1, 3))
    count = np.histogram2d(-samples[:, 1], samples[:, 0], bins=(16, 32), range=[[-2.135, 1.865], [-3.2, 3.2]])[0]
    assert np.corrcoef(count.ravel(), brightness.ravel())[0, 1] > 0.99


def test_stacked_digits_are_three_digits_with_their_labels():
    single, stacked = DATASETS["digits"](), DATASETS["stacked-digits"]()
    assert len(np.unique(stacked.labels)) == len(stacked.classes) == 1000
    held_out = {image.tobytes(): label for image, label in zip(single.samples[single.trained :], single.labels[single.trained :])}
    for sample, label in zip(stacked.samples[-200:], stacked.labels[-200:], strict=True):
        assert [held_out[sample[:, :, c].tobytes()] for c in range(3)] == [int(c) for c in stacked.classes[label]]


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(tmp_path):
    """A directory of IDX files, one of them gzipped, as MNIST is given out."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 50), ("t10k", 20)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(256, size=(count, 5, 4))))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 10)))
    return tmp_path


def test_idx_files_and_npz_give_the_same_data(files):
    from_idx = mnist(files)
    assert from_idx.shape == (5, 4, 1) and len(from_idx.samples) == 70 and np.bincount(from_idx.labels).tolist() == [7] * 10
    raw = {name: np.frombuffer((files / f"{part}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 5, 4)
           for name, part in (("x_train", "train"), ("x_test", "t10k"))}  # fmt: skip
    np.savez(files / "all.npz", **raw, y_train=np.arange(50) % 10, y_test=np.arange(20) % 10)
    from_npz = mnist(files / "all.npz")
    np.testing.assert_array_equal(from_idx.samples, from_npz.samples)
    np.testing.assert_array_equal(from_idx.labels, from_npz.labels)


def test_damaged_files_are_named(files, tmp_path):
    images = files / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-7])
    with pytest.raises(DataError, match="train-images-idx3-ubyte is damaged"):
        mnist(files)
    images.unlink()
    with pytest.raises(DataError, match="holds no file train-images-idx3-ubyte"):
        mnist(files)
    with pytest.raises(DataError, match="there is nothing at .*--data PATH"):
        mnist(tmp_path / "absent")
    (tmp_path / "bad.npz").write_bytes(b"no zip file")
    with pytest.raises(DataError, match=r"bad\.npz cannot be read"):
        mnist(tmp_path / "bad.npz")


@pytest.mark.skipif(not MNIST.exists(), reason="mnist.npz is not there")
def test_the_real_mnist():
    dataset = mnist(MNIST)
    assert dataset.samples.shape == (70_000, 28, 28, 1) and np.bincount(dataset.labels).min() == 6313


@pytest.mark.skipif(not (DEBIAN / "fashion-mnist").exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    dataset = DATASETS["fashion-mnist"]()
    assert dataset.samples.shape == (70_000, 28, 28, 1) and np.bincount(dataset.labels).tolist() == [7000] * 10
    raw = gzip.decompress((DEBIAN / "fashion-mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    last = {raw[i : i + 784] for i in range(0, len(raw), 784)}
    assert last <= {image.tobytes() for image in dataset.samples}
