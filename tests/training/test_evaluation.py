import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

from training.bundle import Card, SignGaussian, open_bundle
from training.data import DATASETS
from training.evaluation import (
    class_fit,
    compare,
    divergences,
    fid,
    intrinsic_dimension,
    kid,
    kid_excess,
    law_of,
    main,
    mixture_fit,
    mixture_floor,
    mmd,
    ndb,
    nearest_ratio,
    prdc,
    sliced_wasserstein,
    sliced_wasserstein1,
    vendi,
    vendi_ratio,
    wasserstein,
)


def test_divergences_of_a_known_pair():
    found = divergences(np.array([0.5, 0.5, 0.0]), np.array([0.75, 0.0, 0.25]))
    assert found["tv"] == pytest.approx(0.5)
    assert found["forward_kl"] == math.inf and found["reverse_kl"] == math.inf and found["chi_squared"] == math.inf
    found = divergences(np.array([0.5, 0.5]), np.array([0.25, 0.75]))
    assert found["forward_kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found["chi_squared"] == pytest.approx(0.25)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=12), st.randoms())
def test_divergences_are_bounded_and_zero_on_the_diagonal(counts, random):
    p = np.array(counts) / sum(counts)
    q = np.array(random.sample(list(p), len(p)))
    found = divergences(p, q)
    assert all(value >= -1e-12 for value in found.values())
    assert found["js"] <= math.log(2) + 1e-12 and found["tv"] <= 1 + 1e-12
    assert found["tv"] ** 2 <= 2 * found["js"] + 1e-9 * 8 + found["forward_kl"]  # Pinsker, loosely
    assert all(abs(value) < 1e-12 for value in divergences(p, p).values())


def test_prdc_of_equal_and_of_disjoint_laws():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((2, 600, 2)).astype(np.float32)
    same = prdc(real, fake)
    assert same["coverage"] == pytest.approx(1, abs=0.05) and same["density"] == pytest.approx(1, abs=0.1)
    assert same["precision"] > 0.95 and same["recall"] > 0.95
    assert prdc(real, fake + 100) == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}


def test_a_perfect_sampler_is_not_better_than_theory():
    dataset = DATASETS["ring"]()
    fit = mixture_fit(dataset.mixture, dataset.samples.astype(np.float64))
    assert fit["modes"] == 8 and fit["reverse_kl"] < 1e-3
    assert fit["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert fit["spread"] == pytest.approx(0.974, abs=0.005)


@pytest.mark.parametrize(("name", "count"), [("ring", 2500), ("grid100", 400), ("mixture1200", 2000)])
def test_the_floor_of_a_mixture_is_what_its_own_samples_have(name, count):
    """On average over draws of `count` samples, so few that modes of grid100 are missed and shares are uneven."""
    dataset = DATASETS[name]()
    fits = [mixture_fit(dataset.mixture, part) for part in dataset.samples.reshape(-1, count, dataset.dim)[:50]]
    floor = mixture_floor(dataset.mixture, count)
    for figure, tolerance in (("high_quality", 0.003), ("modes", 0.005), ("reverse_kl", 0.25), ("spread", 0.003)):
        assert np.mean([fit[figure] for fit in fits]) == pytest.approx(floor[figure], rel=tolerance), figure


def card(name, *shape, **training):
    law = SignGaussian(0, 2)
    dtype = "uint8" if len(shape) == 3 else "float32"
    return Card("m", "v1", "now", {}, law, shape, dtype, ("0",), ("a",), training=training or {"config": {"dataset": name}})


def test_a_bundle_of_built_in_data_knows_their_law():
    assert len(law_of(card("ring", 2))[0].centres) == 8 and law_of(card("ring", 2))[1] == 1
    assert len(law_of(card("", 2, adopted="g.onnx", reference="grid"))[0].centres) == 25
    assert law_of(card("stacked-digits", 8, 8, 3)) == (None, 3) and law_of(card("stacked-mnist", 28, 28, 3)) == (None, 3)
    for name, *shape in (("moons", 2), ("digits", 8, 8, 1), ("mnist", 28, 28, 1), ("/data/ring.npz", 2), ("", 2)):
        assert law_of(card(name, *shape)) == (None, 1)
    assert law_of(card("", 2, metrics={})) == (None, 1)


def test_no_sample_near_any_mode_is_not_a_number_but_no_error():
    fit = mixture_fit(DATASETS["ring"]().mixture, np.full((10, 2), 50.0))
    assert fit["modes"] == 0 and fit["high_quality"] == 0 and math.isnan(fit["reverse_kl"])


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(1)
    return rng.standard_normal((600, 5)), 1.3 * rng.standard_normal((450, 5)) + 0.2


def test_prdc_is_that_of_its_authors(arrays, capsys):
    theirs = pytest.importorskip("prdc").compute_prdc(*arrays, nearest_k=5)
    ours = prdc(*arrays)
    n, m = len(arrays[0]), len(arrays[1])
    ours["coverage"] *= 1 - np.prod([(n - 1 - i) / (n + m - 1 - i) for i in range(5)])
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_sliced_wasserstein_is_that_of_pot(arrays):
    ot = pytest.importorskip("ot")
    assert sliced_wasserstein(*arrays, seed=3) == pytest.approx(ot.sliced_wasserstein_distance(*arrays, n_projections=50, p=2, seed=3), abs=1e-6)


def test_the_mean_distance_along_directions_is_that_of_scipy(arrays):
    x, y = arrays
    ways = np.eye(5)[:3]
    assert sliced_wasserstein1(x, y, directions=ways) == pytest.approx(np.mean([wasserstein_distance(x[:, i], y[:, i]) for i in range(3)]), abs=1e-9)
    random = np.random.RandomState(0).randn(5, 50)  # as sliced_wasserstein draws them
    assert 0 < sliced_wasserstein1(x, y, directions=(random / np.linalg.norm(random, axis=0)).T) <= sliced_wasserstein(x, y)
    assert sliced_wasserstein1(x, y) == pytest.approx(sliced_wasserstein1(y, x)) and sliced_wasserstein1(x, x[::-1]) == 0


def test_the_dimension_is_that_of_the_manifold():
    rng = np.random.default_rng(0)
    turned = rng.uniform(size=(2000, 3)) @ np.linalg.qr(rng.standard_normal((12, 12)))[0][:3]
    assert intrinsic_dimension(turned) == pytest.approx(3, abs=0.3)
    assert intrinsic_dimension(np.repeat(turned, 3, axis=0)) == intrinsic_dimension(turned)  # what comes again says nothing of the dimension
    distances = np.sort(np.linalg.norm(turned[:100, None] - turned[:100], axis=2), axis=1)
    assert intrinsic_dimension(turned[:100]) == pytest.approx(99 / np.log(distances[:, 2] / distances[:, 1]).sum())
    assert math.isnan(intrinsic_dimension(np.repeat(turned[:63], 3, axis=0))) and math.isnan(intrinsic_dimension(np.ones((200, 2))))
    grid = np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), axis=-1).reshape(-1, 2)  # all neighbours are as far, so no ratio says anything
    assert math.isnan(intrinsic_dimension(grid))


@given(st.integers(1, 30), st.integers(1, 30))
def test_wasserstein_on_a_line_is_that_of_scipy(n, m):
    rng = np.random.default_rng(n * 31 + m)
    x, y = rng.standard_normal(n), rng.standard_normal(m) + 1
    assert wasserstein(x, y) == pytest.approx(wasserstein_distance(x, y), abs=1e-9)


def test_fid_and_kid_agree_with_scipy_and_scikit_learn(arrays):
    (mean1, cov1), (mean2, cov2) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in arrays)
    cross = np.trace(np.real(sqrtm(cov1 @ cov2)))
    assert fid(*arrays) == pytest.approx(np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2) - 2 * cross, abs=1e-6)
    x, y = arrays[0][:450], arrays[1]
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, gamma=1 / 5, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    off = ~np.eye(450, dtype=bool)
    assert kid(x, y, subsets=1)[0] == pytest.approx(xx[off].mean() + yy[off].mean() - 2 * xy.mean(), abs=1e-6)


def test_mmd_agrees_with_scikit_learn_and_with_the_closed_form_of_normal_laws(arrays):
    x, y = arrays
    width = np.median(pdist(x))
    xx, yy, xy = (rbf_kernel(a, b, gamma=1 / (2 * width**2)) for a, b in ((x, x), (y, y), (x, y)))
    square = xx[~np.eye(600, dtype=bool)].mean() + yy[~np.eye(450, dtype=bool)].mean() - 2 * xy.mean()
    assert mmd(x, y) == pytest.approx(np.sqrt(square), abs=1e-6)
    assert mmd(x, x[::-1]) == 0.0 and np.isnan(mmd(np.ones((200, 3)), x[:, :3]))
    # Of N(0, I) and N(m, I) the difference of two points is N(0 or m, 2 I), whose mean kernel is a Gaussian integral.
    rng, mean, wide = np.random.default_rng(5), 0.5 * np.ones(3), 1.5**2 + 2
    exact = 2 * (1.5**2 / wide) ** 1.5 * (1 - np.exp(-mean @ mean / (2 * wide)))
    squares = [mmd(rng.standard_normal((1000, 3)), rng.standard_normal((800, 3)) + mean, width=1.5) ** 2 for _ in range(20)]
    assert np.mean(squares) == pytest.approx(exact, abs=4 * np.std(squares) / np.sqrt(20))


def test_vendi_counts_what_is_different():
    points = np.array([0, 0, 10, 10, 20, 20])
    assert vendi(np.exp(-np.abs(points[:, None] - points).astype(float))) == pytest.approx(2.9999, abs=1e-4)  # its authors' example
    x = np.random.default_rng(0).standard_normal((300, 3))
    assert vendi_ratio(x, x) == pytest.approx(1) and vendi_ratio(x, np.repeat(x[:30], 10, axis=0)) < 0.9


def test_bins_differ_at_the_rate_of_the_test_until_a_mode_is_gone():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((2, 5000, 2))
    same = ndb(real, fake, bins=50)
    assert same["ndb"] <= 0.14 and same["bin_js"] < 3 * same["bin_js_floor"]
    assert ndb(real, fake[fake[:, 0] > 0], bins=50)["ndb"] > 0.5


def test_copies_are_nearer_than_fresh_samples():
    train, held_out, fresh = np.random.default_rng(0).standard_normal((3, 500, 4))
    assert nearest_ratio(train, held_out, fresh) == pytest.approx(1, abs=0.1)
    assert nearest_ratio(train, held_out, train + 1e-3) < 0.01


def test_classes_are_counted_beside_what_a_perfect_sampler_has():
    rng, share = np.random.default_rng(0), np.full(1000, 1e-3)
    perfect = np.eye(1000)[rng.integers(1000, size=2500)]
    fit = class_fit(perfect, share)
    assert fit["modes"] == fit["confident_modes"] == pytest.approx(fit["modes_expected"], abs=30) and fit["confident_share"] == 1
    assert fit["class_kl"] == pytest.approx(fit["class_kl_floor"], rel=0.25)  # the floor is the first term of a series
    noise = class_fit(rng.dirichlet(np.ones(1000), size=2500), share)
    assert noise["modes"] > 880 and noise["confident_modes"] == 0


def test_a_stacked_image_is_beyond_argument_when_each_part_is():
    part = np.array([[0.85, 0.15], [0.7, 0.3]])  # by itself, the first is and the second is not
    for first, second, beyond in ((0, 0, 1), (0, 1, 0), (1, 1, 0)):
        probability = np.outer(part[first], part[second]).reshape(1, 4)
        assert probability.max() < 0.8
        assert class_fit(probability, np.full(4, 0.25), parts=2)["confident_share"] == beyond


def evaluate(*flags):
    command = [sys.executable, "-m", "training.evaluation", *map(str, flags)]
    return subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_command_line_measures_arrays_and_bundles(arrays, ring, tmp_path):
    for name, array in zip(("real", "fake"), arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    done = evaluate("--real", tmp_path / "real.npy", "--fake", tmp_path / "fake.npy", "--json")
    assert json.loads(done.stdout) == pytest.approx(compare(*arrays)), done.stderr
    for flags, words in ((("--real", "nothing.npy", "--fake", "x"), "nothing.npy cannot be read"), ((), "give --bundle DIR")):
        done = evaluate(*flags)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    for count in (0, 3):
        done = evaluate("--bundle", ring, "--samples", count)
        assert done.returncode == 2 and f"error: --samples is {count}; at least 100 are needed" in done.stderr and not done.stdout


@pytest.mark.slow
def test_a_bundle_is_judged_beside_a_perfect_sampler(ring):
    done = evaluate("--bundle", ring, "--samples", 2000)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    rows = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines}
    assert head.split() == ["generated", "perfect"]
    assert rows["mixture_modes"] == [8, 8] and rows["confident_modes"] == [8] and rows["modes"][1] == pytest.approx(8)
    assert rows["mixture_high_quality"][0] < rows["mixture_high_quality"][1] == pytest.approx(0.9889, abs=1e-4)
    assert rows["mixture_reverse_kl"][1] == pytest.approx(7 / (2 * 2000 * 0.9889), rel=1e-3)
    for name in ("fid", "kid", "mmd", "precision", "recall", "density", "coverage", "ndb", "bin_js", "vendi_ratio", "nearest_ratio"):
        assert len(rows[name]) == 2, name
    assert all(len(rows[name]) == 2 for name in ("sliced_wasserstein", "sliced_wasserstein1", "intrinsic_dimension"))
    assert rows["real_intrinsic_dimension"][0] == rows["real_intrinsic_dimension"][1]
    assert rows["fid"][1] < rows["fid"][0] and rows["precision"][0] < rows["precision"][1] and rows["nearest_ratio"][1] == 1
    reference = open_bundle(ring).reference
    assert rows["coverage"][1] == pytest.approx(prdc(reference.held_out_points[:5000], reference.train_points[:2000])["coverage"], rel=1e-5)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda file: np.save(file, np.full((200, 2), "a")), "holds <U1 (200, 2); at least 100 rows of finite numbers are expected"),
        (lambda file: np.save(file, np.full((200, 2), 1j)), "holds complex128 (200, 2); at least"),
        (lambda file: np.save(file, np.full((200, 2), np.nan)), "holds float64 (200, 2); at least"),
        (lambda file: np.save(file, np.zeros((200, 0))), "holds float64 (200, 0); at least"),
        (lambda file: np.savez(file, x=np.full((200, 2), "a"), y=np.zeros(200)), "is an npz of x, y; save the array of features alone, as .npy"),
        (lambda file: file.write(b"PK\x03\x04 but no more"), "cannot be read (File is not a zip file)"),
        (lambda file: None, "cannot be read (No data left in file)"),
    ],
)
def test_files_that_hold_no_features_are_refused(save, words, tmp_path, monkeypatch, capsys):
    with open(tmp_path / "a.npy", "wb") as file:
        save(file)
    monkeypatch.setattr("sys.argv", ["evaluation", "--real", str(tmp_path / "a.npy"), "--fake", str(tmp_path / "a.npy")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'a.npy'} {words}")


def test_json_has_both_columns_and_no_number_that_json_lacks(monkeypatch, capsys):
    monkeypatch.setattr("training.evaluation.judge", lambda *how: ({"fid": 0.5, "mixture_reverse_kl": math.nan}, {"fid": 0.25}))
    monkeypatch.setattr("sys.argv", ["evaluation", "--bundle", "v1", "--json"])
    main()
    assert json.loads(capsys.readouterr().out) == {"fid": 0.5, "mixture_reverse_kl": None, "perfect": {"fid": 0.25}}


def test_a_shift_stands_out_of_random_labels():
    x, y = np.random.default_rng(0).standard_normal((2, 400, 6))
    assert abs(kid_excess(x, y)) < 4
    assert kid_excess(x, y + 0.3) > 8
