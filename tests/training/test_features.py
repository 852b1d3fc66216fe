import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training.bundle import NEARER_TRAIN, NEAREST_TRAIN
from training.data import DATASETS, Dataset
from training.export import export_onnx, session
from training.features import COPIED, Copies, Lens, fit_eye, named

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    return DATASETS["digits"](), fit_eye(DATASETS["digits"](), seed=0)


def test_the_classifier_knows_digits_it_never_saw(digits):
    dataset, sight = digits
    assert sight.accuracy >= 0.97
    _, _, mode, probability = sight.eye(torch.from_numpy(dataset.samples[dataset.trained :]))
    assert 0.005 <= float((mode < 0).float().mean()) <= 0.02
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(len(mode)))


def test_noise_is_off_the_manifold_and_blends_are_ambiguous(digits):
    dataset, sight = digits
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(256, size=(500, 8, 8, 1), dtype=np.uint8))
    assert float((sight.eye(noise)[2] == -1).float().mean()) == 1.0
    a, b = (dataset.samples[rng.integers(dataset.trained, size=500)].astype(np.float32) for _ in range(2))
    ambiguity = sight.scores.index("ambiguity")
    blends = sight.eye(torch.from_numpy(np.rint((a + b) / 2).astype(np.uint8)))[1][:, ambiguity]
    reals = sight.eye(torch.from_numpy(dataset.samples[dataset.trained :]))[1][:, ambiguity]
    assert float(blends.median()) > float(reals.quantile(0.95))


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_cells_of_unlabelled_data_are_the_true_modes(name):
    dataset = DATASETS[name]()
    sight = fit_eye(dataset, seed=0)
    places = np.array([[float(v) for v in mode.strip("()").split(",")] for mode in sight.modes])
    assert np.abs(places[:, None] - dataset.mixture.centres).sum(axis=2).min(axis=1).max() < 0.05
    for k, place in enumerate(places):  # names follow the order of `mode`
        assert int(sight.eye(torch.tensor(place, dtype=torch.float32)[None])[2]) == k
    assert int(sight.eye(torch.tensor([[20.0, 20.0]]))[2]) == -1


@pytest.mark.parametrize("name", ["grid", "digits"])
def test_training_and_held_out_samples_are_told_apart_and_others_are_near_either(name):
    dataset = DATASETS[name]()
    sight = fit_eye(dataset, seed=0)
    held_out = torch.from_numpy(dataset.samples[dataset.trained :])
    size, scores = len(sight.eye.held_out), {n: sight.scores.index(n) for n in (NEAREST_TRAIN, NEARER_TRAIN)}
    assert size == min(len(held_out), len(sight.eye.remembered)) > 300
    assert float(sight.eye(held_out[:size])[1][:, scores[NEARER_TRAIN]].min()) > 0.9
    seen = torch.cat([sight.eye(torch.from_numpy(part))[1] for part in np.array_split(dataset.samples[: dataset.trained], 20)])
    copies = seen[:, scores[NEAREST_TRAIN]] < 1e-4
    assert int(copies.sum()) >= len(sight.eye.remembered) and int((seen[copies][:, scores[NEARER_TRAIN]] < 0.01).sum()) >= size
    others = seen[~copies] if name == "grid" else sight.eye(torch.from_numpy(255 - dataset.samples[:1000]))[1]
    coin = (others[:, scores[NEARER_TRAIN]] < 0.5).float()
    assert 0.4 < float(coin.mean()) < 0.6
    eye, noise = sight.eye, torch.from_numpy(np.random.default_rng(0).permutation(dataset.samples)[:500])
    one_way = eye(noise)[1][:, scores[NEARER_TRAIN]]
    eye.remembered, eye.held_out = eye.held_out.clone(), eye.remembered[:size].clone()
    torch.testing.assert_close(eye(noise)[1][:, scores[NEARER_TRAIN]], 1 - one_way)  # hence a fair coin over all splits


def test_exact_copies_are_known_of_more_than_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr("training.features.REMEMBERED", 100)
    dataset = DATASETS["digits"]()
    sight = fit_eye(dataset, seed=0)
    export_onnx(sight.eye, tmp_path / "features.onnx", {"x": torch.from_numpy(dataset.samples[:64])}, ("features", "scores", "mode", "probability"), tolerance=1e-3)
    eye, column = session(tmp_path / "features.onnx"), sight.scores.index(NEAREST_TRAIN)
    near = dataset.samples[: dataset.trained].copy()
    near[:, 3, 3] ^= 1
    seen = [eye.run(["scores"], {"x": x})[0][:, column] for x in (dataset.samples[: dataset.trained], dataset.samples[dataset.trained :], near)]
    assert (seen[0] == 0).all()
    assert all((others > 0).mean() > 0.99 for others in seen[1:])  # some digits are alike
    assert fit_eye(dataset, seed=0, remember=False).eye.copies is None


@pytest.mark.parametrize("shape", [(4, 4, 1), (3, 3, 3)])
def test_a_full_filter_knows_all_that_is_in_it_and_takes_hardly_anything_else_for_it(shape):
    rng = np.random.default_rng(0)
    known, others = rng.integers(256, size=(2, COPIED, *shape), dtype=np.uint8)
    copies = Copies(known, np.arange(COPIED), seed=1)
    assert bool(copies(torch.from_numpy(known)).all())
    assert int(copies(torch.from_numpy(others)).sum()) <= 2  # one in 16^5 on average


def test_nothing_is_remembered_where_that_is_not_wanted():
    sight = fit_eye(DATASETS["ring"](), seed=0, remember=False)
    assert not {NEAREST_TRAIN, NEARER_TRAIN} & set(sight.scores) and not len(sight.eye.remembered) and not len(sight.eye.held_out)
    assert sight.eye(torch.zeros(3, 2))[1].shape == (3, len(sight.scores))


def test_stacked_images_are_seen_channel_by_channel():
    dataset = DATASETS["stacked-digits"]()
    sight = fit_eye(dataset, seed=0)
    assert sight.accuracy >= 0.93  # of three digits at once
    points, scores, mode, probability = sight.eye(torch.from_numpy(dataset.samples[-500:]))
    assert points.shape[1] <= 64 and probability.shape[1] == len(sight.modes) == 1000
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(500))
    broken = dataset.samples[-500:].copy()
    broken[..., 1] = np.random.default_rng(0).integers(256, size=broken.shape[:3])  # one channel in three is noise
    assert float((sight.eye(torch.from_numpy(broken))[2] == -1).float().mean()) == 1.0


def test_large_images_and_long_vectors_keep_features_short():
    rng = np.random.default_rng(0)
    for samples in (rng.integers(256, size=(300, 40, 40, 3), dtype=np.uint8), rng.standard_normal((300, 90)).astype(np.float32)):
        sight = fit_eye(Dataset("noise", samples, cells=3), seed=0)
        points, _, mode, _ = sight.eye(torch.from_numpy(samples))
        assert points.shape == (300, 64) and sight.modes == ("cell-0", "cell-1", "cell-2")
        assert float((mode < 0).float().mean()) < 0.3


@pytest.mark.parametrize("scale", [1e-6, 0.001, 1.0, 1e5])
def test_every_mode_of_the_plane_has_a_name_of_its_own(scale):
    sight = fit_eye(Dataset("noise", scale * np.random.default_rng(0).standard_normal((2000, 2)), cells=20), seed=0)
    assert len(set(sight.modes)) == 20
    assert max(map(len, sight.modes)) < 30


def test_modes_whose_places_cannot_be_told_apart_are_numbered():
    assert named(np.array([[0.5], [0.5], [0.7]]), decimals=2) == ("(0.50)", "(0.50) #2", "(0.70)")


@pytest.mark.parametrize("shape", [(50, 50, 3), (218, 178, 3), (400, 3, 1)])
def test_every_pixel_of_a_large_image_is_seen(shape):
    lens = Lens(Dataset("noise", np.random.default_rng(0).integers(256, size=(10, *shape), dtype=np.uint8), cells=2))
    x = torch.zeros(1, *shape, dtype=torch.float32, requires_grad=True)
    lens(x).sum().backward()
    assert (x.grad != 0).all()


LIMITED = """
import resource, sys
import numpy as np, torch
from training.data import Dataset
from training.diagnostics import Cells
import training.features
from training.features import fit_eye
torch.set_num_threads(1)
training.features.REMEMBERED = 100  # copies are then looked for among the others
looks = {"clusters": lambda dataset: dataset.clusters, "cells": Cells, "eye": lambda dataset: fit_eye(dataset, seed=0)}
look = looks[sys.argv[2]]
samples = np.load(sys.argv[1], mmap_mode="r")
look(Dataset("few", np.array(samples[:100]), cells=2))  # what the first call keeps
held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + (int(sys.argv[3]) << 20),) * 2)
look(Dataset("large", samples, cells=2))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """1,000 images of 200 MB as whole numbers, of which the training part is 630 MB as float32."""
    samples = np.lib.format.open_memmap(path := tmp_path_factory.mktemp("large") / "x.npy", "w+", np.uint8, (1000, 256, 256, 3))
    samples[:] = np.random.default_rng(0).integers(256, size=(1000, 8, 1, 3), dtype=np.uint8).repeat(32, axis=1)
    return path


@pytest.mark.parametrize("look", ["clusters", "cells", "eye"])
def test_large_images_are_looked_at_a_few_at_a_time(look, large):
    command, environment = [sys.executable, "-c", LIMITED, large, look, 300], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=Path(__file__).resolve().parents[2], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_images_are_pooled_only_where_they_are_large():
    rng = np.random.default_rng(0)
    stacked, large = (Dataset("noise", rng.integers(256, size=(3, *shape), dtype=np.uint8), cells=2) for shape in ((28, 28, 3), (70, 90, 3)))
    rows = np.arange(2)
    np.testing.assert_array_equal(stacked.coarse(rows), stacked.normalised(rows))
    found = large.coarse(rows).reshape(2, 24, 30, 3)  # 18,900 numbers, by squares of 3 x 3
    whole = large.normalised(rows).reshape(2, 70, 90, 3)
    np.testing.assert_allclose(found[:, :23], whole[:, :69].reshape(2, 23, 3, 30, 3, 3).mean(axis=(2, 4)), atol=1e-6)
    np.testing.assert_allclose(found[:, 23], whole[:, 69].reshape(2, 30, 3, 3).sum(axis=2) / 9, atol=1e-6)  # no edge is left out
