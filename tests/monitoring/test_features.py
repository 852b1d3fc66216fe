"""What is no sample is counted and never looked at; what is one comes out as the graph says, in any batch size."""

from __future__ import annotations

import numpy as np
import pytest

from monitoring.features import BATCH, Eye


def test_a_sample_is_seen_as_the_graph_says(make_bundle):
    eye = Eye(make_bundle())
    seen = eye.look(np.array([[-4.0, -1.0], [4.1, 1.0], [0.0, 0.0]], np.float32))
    assert seen.cells.tolist() == [0, 9, 10]  # the last one lies between the modes: off-manifold
    np.testing.assert_allclose(seen.scores, [[0, 0], [0.1, 0.1], [1, 1]], atol=1e-6)
    assert seen.features.shape == (3, 2) and seen.rejected == {}


def test_rows_do_not_depend_on_the_batch(make_bundle, draw):
    bundle = make_bundle()
    samples = draw(bundle, 2 * BATCH + 3)
    eye = Eye(bundle)
    whole, last = eye.look(samples), eye.look(samples[-1:])
    assert len(whole.cells) == len(samples)
    assert whole.cells[-1] == last.cells[0] and np.array_equal(whole.scores[-1], last.scores[0])


@pytest.mark.parametrize(
    ("samples", "rejected"),
    [
        (np.zeros((4, 2), np.float64), {"dtype": 4}),
        (np.zeros((4, 2), np.uint8), {"dtype": 4}),
        (np.array([["a", "b"]]), {"dtype": 1}),
        (np.zeros((4, 3), np.float32), {"shape": 4}),
        (np.zeros(4, np.float32), {"shape": 4}),
        (np.float32(1)[...], {"shape": 1}),
        (np.full((4, 2), np.nan, np.float32), {"nan": 4}),
        (np.full((4, 2), 1e38, np.float32), {"nan": 4}),  # finite, but its distance is not
        (np.zeros((0, 2), np.float32), {}),
        (np.zeros((0, 7), np.float64), {}),
    ],
)
def test_what_is_no_sample_is_counted(make_bundle, samples, rejected):
    seen = Eye(make_bundle()).look(np.asarray(samples))
    assert seen.rejected == rejected
    assert seen.samples.shape == (0, 2) and seen.features.shape == (0, 2) and seen.scores.shape == (0, 2) and len(seen.cells) == 0


def test_bad_rows_leave_the_good_ones(make_bundle, draw):
    bundle = make_bundle()
    samples = draw(bundle, 10)
    eye = Eye(bundle)
    good = eye.look(samples[2:])
    samples[0, 0], samples[1, 1] = np.nan, np.inf
    seen = eye.look(samples)
    assert seen.rejected == {"nan": 2}
    assert np.array_equal(seen.samples, samples[2:]) and np.array_equal(seen.cells, good.cells)
