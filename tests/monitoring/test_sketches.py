"""Sketches merge to the sketch of the whole; blocks show between READABLE and BLOCK + READABLE samples, whatever the split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.sketches import BLOCK, READABLE, Blocks, Sketch

RNG = np.random.default_rng(3)
CELLS, FEATURES = RNG.integers(0, 4, 3 * BLOCK), RNG.standard_normal((3 * BLOCK, 3)).astype(np.float32)


def same(a: Sketch, b: Sketch) -> bool:
    moments = (a.feature_sum, b.feature_sum), (a.feature_outer, b.feature_outer)
    return np.array_equal(a.cells, b.cells) and all(np.allclose(one, other) for one, other in moments)


@given(st.lists(st.integers(0, 500), max_size=5))
def test_the_sum_of_parts_is_the_whole(cuts):
    edges = [0, *sorted(cuts), 500]
    parts = [Sketch.of(CELLS[a:b], FEATURES[a:b], size=4) for a, b in zip(edges, edges[1:], strict=False)]
    assert same(sum(parts, Sketch.empty(4, 3)), Sketch.of(CELLS[:500], FEATURES[:500], size=4))
    assert same(sum(reversed(parts), Sketch.empty(4, 3)), Sketch.of(CELLS[:500], FEATURES[:500], size=4))


def test_moments():
    sketch = Sketch.of(CELLS, FEATURES, size=4)
    assert sketch.count == len(CELLS)
    np.testing.assert_allclose(sketch.mean, FEATURES.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(sketch.covariance, np.cov(FEATURES.T.astype(np.float64), bias=True), atol=1e-12)


@settings(max_examples=20)
@given(st.lists(st.integers(1, BLOCK + 100), min_size=1, max_size=6))
def test_blocks_do_not_depend_on_the_split(sizes):
    one, many = Blocks(4, 3), Blocks(4, 3)
    total = min(sum(sizes), len(CELLS))
    one.add(CELLS[:total], FEATURES[:total])
    done = 0
    for size in sizes:
        many.add(CELLS[done : min(done + size, total)], FEATURES[done : min(done + size, total)])
        done += size
    assert same(one.view, many.view)


@pytest.mark.parametrize(
    ("seen", "shown"),
    [
        (0, 0),
        (10, 10),
        (BLOCK - 1, BLOCK - 1),
        (BLOCK, BLOCK),
        (BLOCK + READABLE - 1, BLOCK + READABLE - 1),
        (BLOCK + READABLE, READABLE),
        (2 * BLOCK + 7, BLOCK + 7),
    ],
)
def test_what_a_block_shows(seen, shown):
    blocks = Blocks(4, 3)
    blocks.add(CELLS[:seen], FEATURES[:seen])
    assert blocks.view.count == shown
    assert same(blocks.view, Sketch.of(CELLS[seen - shown : seen], FEATURES[seen - shown : seen], size=4))
