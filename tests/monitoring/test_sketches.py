"""Sketches merge to the sketch of the whole; blocks show between READABLE and BLOCK + READABLE samples, what decays weighs as it
should; whatever the split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.sketches import BLOCK, HALF_LIFE, NEWEST, READABLE, Blocks, Decayed, Newest, Sketch

RNG = np.random.default_rng(3)
CELLS, FEATURES = RNG.integers(0, 4, 3 * BLOCK), RNG.standard_normal((3 * BLOCK, 3)).astype(np.float32)
EMBEDDED = RNG.standard_normal((3 * BLOCK, 2)).astype(np.float32)


def same(a: Sketch, b: Sketch) -> bool:
    moments = (a.feature_sum, b.feature_sum), (a.feature_outer, b.feature_outer), (a.embedded_sum, b.embedded_sum)
    return np.array_equal(a.cells, b.cells) and all(np.allclose(one, other) for one, other in moments)


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), max_size=5))
def test_the_sum_of_parts_is_the_whole(cuts):
    edges = [0, *sorted(cuts), 500]
    parts = [Sketch.of(CELLS[a:b], FEATURES[a:b], EMBEDDED[a:b], size=4) for a, b in zip(edges, edges[1:], strict=False)]
    assert same(sum(parts, Sketch.empty(4, 3, 2)), Sketch.of(CELLS[:500], FEATURES[:500], EMBEDDED[:500], size=4))
    assert same(sum(reversed(parts), Sketch.empty(4, 3, 2)), Sketch.of(CELLS[:500], FEATURES[:500], EMBEDDED[:500], size=4))


def test_moments():
    sketch = Sketch.of(CELLS, FEATURES, EMBEDDED, size=4)
    assert sketch.count == len(CELLS)
    np.testing.assert_allclose(sketch.mean, FEATURES.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(sketch.covariance, np.cov(FEATURES.T.astype(np.float64), bias=True), atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, BLOCK + 100), min_size=1, max_size=6))
def test_blocks_do_not_depend_on_the_split(sizes):
    one, many = Blocks(4, 3, 2), Blocks(4, 3, 2)
    total = min(sum(sizes), len(CELLS))
    one.add(CELLS[:total], FEATURES[:total], EMBEDDED[:total])
    done = 0
    for size in sizes:
        part = slice(done, min(done + size, total))
        many.add(CELLS[part], FEATURES[part], EMBEDDED[part])
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
    blocks = Blocks(4, 3, 2)
    blocks.add(CELLS[:seen], FEATURES[:seen], EMBEDDED[:seen])
    assert blocks.view.count == shown
    assert same(blocks.view, Sketch.of(*(x[seen - shown : seen] for x in (CELLS, FEATURES, EMBEDDED)), size=4))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, BLOCK + READABLE - 1), st.integers(1, 700))
def test_points_of_a_block_speak_of_all_of_it(seen, step):
    blocks = Blocks(1, 1)
    for i in range(0, seen, step):
        rows = np.arange(i, min(i + step, seen), dtype=np.float32)[:, None]
        blocks.add(np.zeros(len(rows), np.int64), rows, np.empty((len(rows), 0), np.float32))
    points = np.sort(blocks.view.points[:, 0])
    assert len(np.unique(points)) == len(points) == min(NEWEST, seen)
    share = np.arange(0, seen, 64) / seen  # of all samples that came before the i-th, and of the points
    assert np.abs(np.searchsorted(points, np.arange(0, seen, 64)) / len(points) - share).max() < 0.03
    whole = Blocks(1, 1)
    whole.add(np.zeros(seen, np.int64), np.arange(seen, dtype=np.float32)[:, None], np.empty((seen, 0), np.float32))
    assert np.array_equal(whole.view.points, blocks.view.points)


def test_points_of_a_sum_of_blocks_are_of_each_as_many_as_its_part():
    parts = [Sketch.of(np.zeros(n, np.int64), np.full((n, 1), i, np.float32), np.empty((n, 0), np.float32), size=1) for i, n in enumerate((4096, 1024, 2048, 700))]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        held = np.bincount(sum((parts[i] for i in order), Sketch.empty(1, 1, 0)).points[:, 0].astype(int), minlength=4)
        assert np.abs(held - 512 * np.array([4096, 1024, 2048, 700]) / 7868).max() <= 2


@pytest.mark.parametrize("rates", [(1, 1, 1), (5, 2, 1)])
def test_a_block_of_a_sum_is_read_since_as_many_starts_as_streams(rates):
    """What every stream shows, none left out; and as the streams go on to their next blocks, another start once in BLOCK samples of all."""
    streams, seen, starts, step = [Blocks(2, 1) for _ in rates], np.zeros(len(rates), int), set(), 128
    for _ in range(60):
        for i, rate in enumerate(rates):
            streams[i].add(np.zeros(rate * step, np.int64), np.ones((rate * step, 1), np.float32), np.empty((rate * step, 0), np.float32))
            seen[i] += rate * step
            merged = Blocks(2, 1)
            merged.restore(streams[0].state())
            for other in streams[1:]:
                merged.merge(other)
            shown = [stream.view.count for stream in streams]
            assert merged.view.count == sum(shown) == merged.view.feature_sum[0] and merged.streams == len(rates)
            starts.add(tuple(seen - shown))
    assert abs(len(starts) - seen.sum() / BLOCK) <= len(rates)


def test_a_sum_that_goes_on_begins_a_block():
    one, other = Blocks(4, 3, 2), Blocks(4, 3, 2)
    for blocks in (one, other):
        blocks.add(CELLS[:BLOCK], FEATURES[:BLOCK], EMBEDDED[:BLOCK])
    one.merge(other)
    one.add(CELLS[: READABLE - 1], FEATURES[: READABLE - 1], EMBEDDED[: READABLE - 1])
    assert one.view.count == 2 * BLOCK + READABLE - 1
    one.add(CELLS[:1], FEATURES[:1], EMBEDDED[:1])
    assert one.view.count == READABLE and one.streams == 2


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=5))
def test_what_decays_weighs_as_it_should_whatever_the_split(cuts):
    edges, decayed = [0, *sorted(cuts), 700], Decayed(4, 3, 2)
    for a, b in zip(edges, edges[1:], strict=False):
        decayed.add(CELLS[a:b], FEATURES[a:b], EMBEDDED[a:b])
    weight = 0.5 ** (np.arange(699, -1, -1) / HALF_LIFE)
    np.testing.assert_allclose(decayed.cells, np.bincount(CELLS[:700], weight, minlength=4))
    np.testing.assert_allclose(decayed.mean, np.average(FEATURES[:700], axis=0, weights=weight), atol=1e-6)
    np.testing.assert_allclose(decayed.covariance, np.cov(FEATURES[:700].T.astype(np.float64), aweights=weight, bias=True), atol=1e-6)
    np.testing.assert_allclose(decayed.embedded_sum, weight @ EMBEDDED[:700], atol=1e-9)
    assert (decayed.weight, decayed.squares) == pytest.approx((weight.sum(), (weight**2).sum()))
    assert decayed.effective == pytest.approx(weight.sum() ** 2 / (weight**2).sum())


def test_in_the_long_run_a_decayed_stream_is_worth_three_half_lives():
    decayed = Decayed(4, 3)
    decayed.add(CELLS, FEATURES, EMBEDDED[:, :0])
    assert decayed.effective == pytest.approx(2 / np.log(2) * HALF_LIFE, rel=0.01)


def test_two_decayed_streams_add_up():
    one, other, again = (Decayed(4, 3, 2) for _ in range(3))
    one.add(CELLS[:300], FEATURES[:300], EMBEDDED[:300])
    other.add(CELLS[300:1000], FEATURES[300:1000], EMBEDDED[300:1000])
    again.restore({name: value for name, value in one.state().items()})
    one.merge(other)
    for name, value in one.state().items():
        np.testing.assert_allclose(value, again.state()[name] + other.state()[name], rtol=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 900), max_size=5), st.integers(0, 2000), st.integers(0, 2000))
def test_the_newest_are_kept(sizes, ours, theirs):
    newest, done = Newest(3), 0
    for size in sizes:
        newest.add(FEATURES[done : done + size])
        done += size
    assert np.array_equal(newest.points, FEATURES[max(0, done - NEWEST) : done])
    one, other = Newest(3), Newest(3)
    one.add(FEATURES[:ours])
    other.add(FEATURES[5000 : 5000 + theirs])
    one.merge(other)
    kept = [*map(bytes, one.points)]
    total = ours + theirs
    assert len({*kept}) == len(kept) == min(NEWEST, total) and one.count == total
    of_ours, of_theirs = ([bytes(row) for row in FEATURES[a:b] if bytes(row) in {*kept}] for a, b in ((0, ours), (5000, 5000 + theirs)))
    assert of_ours == [bytes(row) for row in FEATURES[ours - len(of_ours) : ours]]  # the newest of each
    assert of_theirs == [bytes(row) for row in FEATURES[5000 + theirs - len(of_theirs) : 5000 + theirs]]
    assert abs(len(of_ours) - len(kept) * ours / max(1, total)) <= 1
    assert [row for row in kept if row in {*of_ours}] == of_ours  # oldest first


@pytest.mark.parametrize("counts", [(2048,) * 8, (600, 1200, 3000), (40, 5000, 100), (100, 100, 100), (9000,) + (300,) * 20, (1000,) * 256])
def test_a_sum_holds_of_each_part_what_it_is_of_the_whole(counts):
    """In whatever order and however the parts are put together; and so does what is left of it once others came in."""
    rng, parts = np.random.default_rng(4), range(len(counts))

    def part(i):
        newest = Newest(1)
        newest.add(np.full((counts[i], 1), i, np.float32))
        return newest

    orders = [[*parts], [*reversed(parts)], *(rng.permutation(len(counts)) for _ in range(4))]
    sums = []
    for order in orders:
        chain = [part(i) for i in order]
        for other in chain[1:]:
            chain[0].merge(other)
        pairs = [part(i) for i in order]
        while len(pairs) > 1:
            for one, other in zip(pairs[::2], pairs[1::2], strict=False):
                one.merge(other)
            pairs = pairs[::2]
        sums += [chain[0], pairs[0]]
    for found in sums:
        assert len(found.points) == min(NEWEST, sum(counts)) and found.count == sum(counts)
        for left in (len(found.points), 256):
            held = np.bincount(found.points[len(found.points) - min(left, len(found.points)) :, 0].astype(int), minlength=len(counts))
            assert np.abs(held - held.sum() * np.array(counts) / sum(counts)).max() <= 2 + held.sum() / 100
        found.add(np.full((100, 1), -1, np.float32))
        assert (found.points[-100:] == -1).all() and len(found.points) == min(NEWEST, sum(counts) + 100)
