"""The seed contract, where it begins: sample i of seed s is one row, for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from training.bundle import SEED_LIMIT, BundleError, SignGaussian, philox_words, sample_classes

LAWS = [SignGaussian(48, 16, 0.5), SignGaussian(10, 2), SignGaussian(0, 5), SignGaussian(65, 0), SignGaussian(1, 1)]
laws = st.sampled_from(LAWS)
seeds = st.integers(0, SEED_LIMIT - 1)
GOLDEN = [
    ["-0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.0000000000000p+0", "0x1.22e11a0000000p-1", "-0x1.13578e0000000p-2", "-0x1.9cf7520000000p-4"],
    ["0x1.0000000000000p+0", "-0x1.0000000000000p+0", "-0x1.0000000000000p+0", "-0x1.62de1a0000000p-1", "0x1.078c180000000p-2", "-0x1.11df240000000p-2"],
    ["-0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.0000000000000p+0", "0x1.2918fa0000000p-1", "-0x1.28ab9a0000000p-2", "0x1.1a89980000000p-1"],
]
GOLDEN_PATH = [
    ["-0x1.0000000000000p+0", "-0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.d702f00000000p-1", "0x1.a3f7c60000000p-1"],
    ["-0x1.0000000000000p+0", "0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.e8bc780000000p-1", "0x1.896ba20000000p-1"],
    ["-0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.0000000000000p+0", "0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.7781240000000p-1", "0x1.0574d20000000p-1"],
    ["0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.0000000000000p+0", "0x1.0000000000000p+0", "0x1.0000000000000p+0", "-0x1.43502e0000000p-2", "0x1.db7b440000000p-4"],
]
GOLDEN_CLASSES = [8, 7, 8, 0, 2, 4, 7, 0, 4, 7, 6, 0]


@given(laws, seeds, st.integers(0, 2**62), st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from([1.0, 0.5]))
def test_any_split_gives_the_same_rows_bitwise(law: SignGaussian, seed: int, offset: int, parts: list[int], truncation: float) -> None:
    whole = law.sample(seed=seed, offset=offset, count=sum(parts), truncation=truncation)
    starts = np.cumsum([0, *parts])
    pieces = [law.sample(seed=seed, offset=offset + int(s), count=n, truncation=truncation) for s, n in zip(starts, parts, strict=False)]
    assert whole.tobytes() == np.concatenate(pieces).tobytes()


def test_golden_rows_never_change() -> None:
    law = SignGaussian(3, 3, 0.5)
    rows = np.concatenate([law.sample(seed=7, count=2), law.sample(seed=SEED_LIMIT - 1, offset=2**62, count=1)])
    assert [[float(v).hex() for v in row] for row in rows] == GOLDEN


def test_classes_never_change() -> None:
    shares = np.full(10, 0.1)
    assert sample_classes(shares, seed=7, count=12).tolist() == GOLDEN_CLASSES
    assert sample_classes(shares, seed=7, offset=5, count=7).tolist() == GOLDEN_CLASSES[5:]


def test_the_golden_path_never_changes() -> None:
    path = SignGaussian(5, 2, 0.5).interpolate(seeds=(7, 3), offset=2**62, count=4)
    assert [[float(v).hex() for v in row] for row in path] == GOLDEN_PATH


@given(laws, st.tuples(seeds, seeds), st.integers(0, 2**62), st.integers(1, 150))
def test_a_path_leads_from_row_to_row_and_flips_signs_one_by_one(law: SignGaussian, ends: tuple[int, int], offset: int, count: int) -> None:
    path = law.interpolate(seeds=ends, offset=offset, count=count)
    first, last = (law.sample(seed=seed, offset=offset, count=1)[0] for seed in ends)
    assert path[0].tobytes() == first.tobytes()
    if count > 1:
        assert path[-1].tobytes() == last.tobytes()
    signs = path[:, : law.signs]
    assert np.isin(signs, (-1.0, 1.0)).all()
    differing = int((first != last)[: law.signs].sum())
    flips = (np.diff(signs, axis=0) != 0).sum(1)
    if count > 1:
        assert flips.sum() == differing  # each once, and none that is alike at both ends
        assert flips.max(initial=0) <= -(-differing // (count - 1))
    if count > 2 * differing:
        assert flips.max(initial=0) <= 1


def test_each_row_of_a_path_has_the_law_itself() -> None:
    law = SignGaussian(4, 3, 0.5)
    rows = np.stack([law.interpolate(seeds=(2 * i, 2 * i + 1), count=5) for i in range(1500)])
    for step in range(5):
        for column in rows[:, step, law.signs :].T:
            assert stats.kstest(column / law.scale, "norm").pvalue > 1e-6
        assert np.abs(rows[:, step, : law.signs].mean(0)).max() < 5 / np.sqrt(len(rows))


def test_a_path_from_a_seed_to_itself_stays_there() -> None:
    law = SignGaussian(4, 3)
    assert np.array_equal(law.interpolate(seeds=(5, 5), offset=3, count=4), np.repeat(law.sample(seed=5, offset=3, count=1), 4, axis=0))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_law_is_the_one_on_the_card(law: SignGaussian) -> None:
    z = law.sample(seed=11, count=20_000).astype(np.float64)
    assert set(np.unique(z[:, : law.signs])) <= {-1.0, 1.0}
    assert np.abs(z[:, : law.signs].mean(0)).max(initial=0) < 5 / np.sqrt(len(z))
    for column in z[:, law.signs :].T:
        assert stats.kstest(column / law.scale, "norm").pvalue > 1e-6
    correlation = np.corrcoef(z.T) - np.eye(law.dim) if law.dim > 1 else np.zeros((1, 1))
    assert np.abs(correlation).max() < 6 / np.sqrt(len(z))


@given(st.floats(0.01, 0.99))
def test_truncation_bounds_the_gaussian_and_leaves_the_signs(truncation: float) -> None:
    law = SignGaussian(4, 4, 2.0)
    plain, cut = law.sample(seed=1, count=500), law.sample(seed=1, count=500, truncation=truncation)
    assert np.array_equal(plain[:, :4], cut[:, :4])
    assert np.abs(cut[:, 4:]).max() <= 2.0 * stats.norm.ppf((1 + truncation) / 2) * (1 + 1e-6)


def test_the_extreme_words_stay_finite() -> None:
    from training.bundle import _uniform

    u = _uniform(np.array([0, 2**64 - 1], np.uint64))
    assert 0 < u[0] < 1e-15 and 1 - 1e-15 < u[1] < 1


def test_streams_and_neighbouring_seeds_differ() -> None:
    words = [philox_words(seed, stream, 0, 1, 4).tobytes() for seed in (0, 1) for stream in (0, 1)]
    assert len(set(words)) == 4


@pytest.mark.parametrize(
    ("seed", "offset", "count", "words"),
    [(-1, 0, 1, "seed is -1"), (SEED_LIMIT, 0, 1, "seed is"), (0, -1, 1, "offset is -1"), (0, SEED_LIMIT - 1, 2, "offset + count"), (0, 0, -1, "count is -1")],
)
def test_windows_outside_the_seed_are_refused(seed: int, offset: int, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        SignGaussian(1, 1).sample(seed=seed, offset=offset, count=count)


@pytest.mark.parametrize("truncation", [0.0, -1.0, 1.5, float("nan")])
def test_truncation_outside_its_range_is_refused(truncation: float) -> None:
    with pytest.raises(ValueError, match="truncation is"):
        SignGaussian(1, 1).sample(seed=0, count=1, truncation=truncation)


def test_unknown_algorithms_are_refused() -> None:
    with pytest.raises(BundleError, match="mersenne"):
        SignGaussian(1, 1, algorithm="mersenne")
    with pytest.raises(BundleError, match="at least one coordinate"):
        SignGaussian(0, 0)
