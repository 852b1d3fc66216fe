"""A short benchmark, whose rows must come out as the long one's do; and the rivals against the plain formulas of their papers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import bench_monitoring as bench  # noqa: E402
import foreign  # noqa: E402
import rivals  # noqa: E402
from scenarios import SPACES, streams  # noqa: E402


@pytest.fixture
def few() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((800, 3)).astype(np.float32), rng.standard_normal((130, 2, 3)).astype(np.float32)


def kernel(a: np.ndarray, b: np.ndarray, median: float) -> np.ndarray:
    return np.exp(-((a[:, None].astype(float) - b) ** 2).sum(axis=2) / median)


def test_the_windowed_mmd_is_unbiased_mmd_without_its_constant(few):
    reference, x = few
    median, found = rivals._median(reference), rivals.mmd_windows(reference, x)
    for w, t in ((10, 9), (25, 60), (100, 129)):
        y = x[t + 1 - w : t + 1, 1]
        inner = kernel(y, y, median)
        expected = (inner.sum() - w) / (w * (w - 1)) - 2 * kernel(y, reference, median).mean()
        assert found[f"window MMD {w}"][t, 1] == pytest.approx(expected, rel=1e-4)
        assert np.isneginf(found[f"window MMD {w}"][: w - 1]).all()


def test_scan_b_is_the_mean_over_blocks_of_unbiased_mmd(few):
    reference, x = few
    median, found = rivals._median(reference), rivals.kernel_cusum(reference, x)
    blocks = reference[np.random.default_rng(0).permutation(800)[:750]].reshape(15, 50, 3)
    values = []
    for t in (49, 50, 129):
        y, off = x[t - 49 : t + 1, 0][::-1], ~np.eye(50, dtype=bool)
        values.append(np.mean([(kernel(b, b, median) + kernel(y, y, median) - kernel(b, y, median) - kernel(y, b, median))[off].mean() for b in blocks]))
    ratio = found["Scan-B 50"][[49, 50, 129], 0] / values
    assert ratio == pytest.approx([ratio[0]] * 3, rel=1e-3) and ratio[0] > 0  # one constant: the standard deviation
    assert (found["OKCUSUM"][49:] >= found["Scan-B 50"][49:]).all()


def test_packages_that_watch_one_variable_watch_each_feature_and_the_radius(few):
    reference, x = few
    y = foreign.columns(reference, x)
    found = foreign.follow_each(y, lambda column, stream: np.abs(column))
    np.testing.assert_allclose(y[..., :3], (x - reference.mean(axis=0)) / reference.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["on the radius"], np.abs(y[..., 3]), rtol=1e-6)
    np.testing.assert_allclose(found["on features + radius"], np.abs(y).max(axis=2), rtol=1e-6)


def test_mmdew_looks_at_the_borders_of_its_buckets(few):
    reference, x = few
    median, found = rivals._median(reference), rivals.mmdew(reference, x[:30])
    for t in (1, 4, 20, 29):
        sizes = [*(2**i for i in reversed(range(6)) if t >> i & 1), 1]  # nothing is thinned out below 32
        values = []
        for border in np.cumsum(sizes)[:-1]:
            a, b = x[:border, 1], x[border : t + 1, 1]
            values.append(kernel(a, a, median).mean() + kernel(b, b, median).mean() - 2 * kernel(a, b, median).mean())
        expected = max(values, default=-np.inf)
        assert found["MMDEW raw"][t, 1] == pytest.approx(expected, rel=1e-4)


def test_the_oracle_knows_the_ratio_of_the_laws():
    """The mean of a likelihood ratio under the old law is 1."""
    space = SPACES["gauss"]()
    x = streams(space, 3, 1, 1, 40_000)[:, 0]
    for change in space.changes[1:4]:
        if change.name != "0.3 N(0, 4I)":  # whose ratio has no variance to speak of
            assert np.exp(change.oracle(x)).mean() == pytest.approx(1, abs=0.25)


def test_thresholds_are_fitted_and_misses_counted():
    rng = np.random.default_rng(1)
    path = rng.random((bench.WARM + 1500, 400))
    threshold = bench.fitted(path[bench.WARM :], 1000)
    assert threshold == pytest.approx(1 - 1 / 1000, abs=2e-4) and bench.run_length(path[bench.WARM :], threshold)[0] == pytest.approx(1000, rel=0.05)
    path[bench.WARM :, 7] = 0
    path[bench.WARM + 3, :5] = 2
    found = bench.delay(path, 1.5)
    assert found["missed"] == pytest.approx(1 - 5 / found["runs"], abs=0.01) and found["runs"] == 400


@pytest.mark.slow
def test_a_short_benchmark_and_its_resumption(tmp_path):
    methods = ("ours", "oracle", "mewma", "page_hinkley")
    rows = bench.delays({"gauss": SPACES["gauss"]}, 1, 6, 100_000, 1000, methods, tmp_path)
    found = {(r["method"], r["change"]): r["delay"] for r in rows}
    assert all(300 < r["arl_checked"] < 3000 for r in rows if r["method"] == "MEWMA 0.1")  # six streams of 200 samples a change
    made = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert bench.delays({"gauss": SPACES["gauss"]}, 1, 6, 100_000, 1000, methods, tmp_path) == rows
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == made and len(made) == len(methods)
    for change, most in (("0.7 N(0, 4I)", 4), ("0.3 N(0, 4I)", 10), ("mean + 0.3", 30), ("variance x 0.8", 60), ("5 % N(0, 9I)", 90)):
        assert found["ours", change] <= most and found["oracle", change] < found["dummy", change]
    assert found["MEWMA 0.1", "mean + 0.3"] < 30 and "ours" in bench.table(rows)
    bench.plot(rows, tmp_path / "delays.svg")
    assert (tmp_path / "delays.svg").read_text().count("<circle") == len([r for r in rows if r["method"] != "dummy"])
    small = bench.dropped(10, 5, count=100_000)
    assert small["ratio"] < 1.8 and small["runs"] == 5
    alone = bench.dropped_alone(10, 20)
    assert 0.7 < alone["ratio"] < 1.3 and alone["runs"] >= 18
    verdicts = bench.judged(rows, 1000)
    assert [v["aim"] for v in verdicts] == [1.6, 4.0, 18, 27, 21] and all(v["met"] == (v["delay"] <= v["aim"]) for v in verdicts)


@pytest.mark.slow
def test_exact_intervals_hold_while_everybody_looks(monkeypatch):
    """And a set of seven tenths of the radius does not, so that it would show if the set were too small."""
    found = {row["interval"]: row for row in bench.intervals(40, block=300)}
    assert all(row["missed"] <= row["delta"] for name, row in found.items() if not name.startswith("pointwise"))

    class Smaller(bench.ShareSet):
        @classmethod
        def observed(cls, counts, **options):
            found = super().observed(counts, **options)
            return cls(found.centre, 0.7 * found.radius)

    monkeypatch.setattr(bench, "ShareSet", Smaller)
    assert {row["interval"]: row for row in bench.intervals(40, block=300)}["set of shares"]["missed"] > found["set of shares"]["delta"]


@pytest.mark.slow
def test_a_space_seen_through_a_matrix_has_the_same_cells():
    plain, seen = SPACES["digits"](), SPACES["mixed-digits"]()
    x, y = (space.draw(np.random.default_rng(3), 500, 0) for space in (plain, seen))
    assert not np.allclose(x, y) and (plain.probability(x).argmax(1) == seen.probability(y).argmax(1)).mean() > 0.99
