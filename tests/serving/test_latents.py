"""Compiled latents are the law's own, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from serving import latents
from serving.latents import _ERROR, _HIGHEST, Latents, inverse_normal
from training.bundle import SEED_LIMIT, SignGaussian

LAWS = [SignGaussian(48, 16, 0.5), SignGaussian(10, 2), SignGaussian(0, 5), SignGaussian(65, 0), SignGaussian(1, 1, -3.0), SignGaussian(129, 3, 1e-30)]
seeds = st.one_of(st.integers(0, SEED_LIMIT - 1), st.just(SEED_LIMIT - 1))
offsets = st.one_of(st.integers(0, 1000), st.integers(SEED_LIMIT - 200, SEED_LIMIT - 100), st.sampled_from([2**61, 2**62, 2**62 + 3]))
windows = st.tuples(seeds, offsets, st.integers(0, 40), st.sampled_from([1.0, 0.5, 1e-3, 1e-9]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LAWS), st.lists(windows, min_size=1, max_size=6))
def test_windows_are_the_laws_own_bit_for_bit(law: SignGaussian, asked: list[tuple[int, int, int, float]]) -> None:
    assert Latents(law).sample_windows(asked).tobytes() == law.sample_windows(asked).tobytes()


def test_millions_of_rows_are_the_laws_own_and_few_numbers_had_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    law, asked = SignGaussian(4, 12, 0.7), []
    inverse_normal()
    monkeypatch.setattr(latents, "ndtri", lambda u: asked.extend(u) or ndtri(u))
    for block in range(20):
        window = [(block, 2**40 * block, 50_000, (1.0, 0.3)[block % 2])]
        assert Latents(law).sample_windows(window).tobytes() == law.sample_windows(window).tobytes()
    assert 0 < len(asked) < 2000, "numbers that two float32 are possible for"


def test_the_polynomials_err_by_less_than_a_tenth_of_what_is_allowed_for() -> None:
    table = inverse_normal()
    first = _HIGHEST - np.arange(len(table))
    low, high = ((first + step << 47).view(np.float64) for step in (0, 1))
    inside = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 1001)  # both ends too: the upper one is 1/2 of the first
    x, y = inside - table[:, :1], np.zeros_like(inside)
    for k in range(7, 0, -1):
        y = table[:, k : k + 1] + x * y
    assert np.abs(y - ndtri(inside)).max() < _ERROR / 10


def test_what_is_compiled_rounds_a_product_before_it_adds_as_the_law_does() -> None:
    u, t, kept = np.random.default_rng(0).random(10_000), 0.999999, np.empty(10_000)

    @latents._compiled
    def truncate(t, u, kept):
        for i in range(len(u)):
            kept[i] = (1.0 - t) / 2 + t * u[i]

    truncate(t, u, kept)
    assert (kept == (1.0 - t) / 2 + t * u).all(), "where it is fused, a quarter of them are off by a last bit"


@pytest.mark.parametrize("window", [(-1, 0, 1, 1.0), (SEED_LIMIT, 0, 1, 1.0), (0, -1, 1, 1.0), (0, SEED_LIMIT - 1, 2, 1.0), (0, 0, -1, 1.0), (0, 0, 1, 0.0), (0, 0, 1, 1.5), (0, 0, 1, float("nan"))])
def test_windows_that_are_none_are_refused_in_the_laws_words(window: tuple[int, int, int, float]) -> None:
    law = SignGaussian(1, 1)
    with pytest.raises(ValueError, match=r".+ is ") as expected:
        law.sample_windows([window])
    with pytest.raises(ValueError, match=r".+ is ") as refused:
        Latents(law).sample_windows([(0, 0, 3, 1.0), window])
    assert str(refused.value) == str(expected.value)
