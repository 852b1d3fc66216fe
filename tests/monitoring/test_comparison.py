"""Two versions on the same latents: one law is hardly ever called two, two laws soon are, whatever the coupling."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.comparison import ALPHA, STAKES, Comparison
from monitoring.features import Eye, Seen


@pytest.fixture
def watched(make_bundle):
    bundle = make_bundle()
    return bundle, Eye(bundle)


def compared(bundle, x: Seen, y: Seen) -> Comparison:
    comparison = Comparison(bundle.certificate, bundle.card.modes)
    comparison.update(x, y)
    return comparison


@given(st.lists(st.floats(0.001, 1), min_size=6, max_size=6), st.sampled_from(STAKES), st.sampled_from([1, -1]))
def test_the_bet_is_fair_whatever_the_coupling(weights, stake, sign):
    """E[1 + s (1{y = c} - 1{x = c})] = 1 for any joint law of three cells with uniform margins, symmetric or not.

    Those laws are the mixtures of permutations (Birkhoff 1946).
    """
    parts = [w * np.eye(3)[list(order)] for w, order in zip(weights, permutations(range(3)), strict=True)]
    joint = np.sum(parts, axis=0) / (3 * sum(weights))
    for c in range(3):
        pays = 1 + sign * stake * ((np.arange(3)[None, :] == c).astype(float) - (np.arange(3)[:, None] == c))
        assert (joint * pays).sum() == pytest.approx(1, abs=1e-12)


def test_a_coupling_that_is_not_exchangeable_is_no_difference(watched, draw):
    """z, and z with its coordinates shifted by one place: one law, pairs that are not exchangeable, never said to differ."""
    bundle, eye = watched
    session, z = ort.InferenceSession(bundle.model_path), bundle.card.latents(seed=3, count=20_000)
    x, y = (eye.look(session.run(None, {"z": latents})[0]) for latents in (z, np.roll(z, 1, axis=1)))
    found = compared(bundle, x, y)
    assert not found.differs and found.agreed < 0.2 * found.pairs


@pytest.mark.slow
def test_one_law_is_said_to_differ_as_rarely_as_promised(watched, draw):
    """200 comparisons of 2,000 independent pairs, looked at after every 64: E of the mixture is 1, so it reaches 20 in 5 % at most."""
    bundle, eye = watched
    reached = 0
    for run in range(200):
        seen = eye.look(draw(bundle, 4000, seed=10_000 + run))
        comparison, peak = Comparison(bundle.certificate, bundle.card.modes), -math.inf
        for i in range(0, 1984, 64):
            comparison.update(*(Seen(seen.samples[p], seen.features[p], seen.scores[p], seen.cells[p], {}) for p in (slice(i, i + 64), slice(2000 + i, 2064 + i))))
            peak = max(peak, comparison.evidence)
        reached += peak >= math.log(20)
    assert reached <= 18  # P(Bin(200, .05) > 18) < 0.5 %
    assert ALPHA < 1 / 20


@pytest.mark.parametrize(
    ("fault", "pairs", "words"),
    [({"lost": (3, 8)}, 300, "less 3 (0.0% instead of"), ({"fakes": 0.05}, 600, "more samples off the manifold"), ({"width": 0.9}, 1500, "is not the model")],
)
def test_differences_are_found_soon_and_said(watched, make_bundle, draw, fault, pairs, words):
    bundle, eye = watched
    other = make_bundle(**fault)
    x, y = (eye.look(draw(b, pairs, seed=5)) for b in (bundle, other))
    found = compared(bundle, x, y)
    assert found.differs and words in found.words("v1", "v2") and found.pairs == pairs
    assert not compared(bundle, x, x).differs and "100.0% of" in compared(bundle, x, x).words("v1", "v2")


def test_pairing_finds_what_unpaired_samples_hide(watched, make_bundle, draw):
    """Modes a tenth narrower: on the same latents each sample moves one way, on others that is lost in the spread."""
    bundle, eye = watched
    other = make_bundle(width=0.9)
    x, paired, unpaired = eye.look(draw(bundle, 1500, seed=5)), eye.look(draw(other, 1500, seed=5)), eye.look(draw(other, 1500, seed=6))
    assert compared(bundle, x, paired).evidence > compared(bundle, x, unpaired).evidence + 3


def test_what_has_no_partner_is_refused(watched, draw):
    bundle, eye = watched
    x = eye.look(draw(bundle, 10, seed=5))
    y = Seen(x.samples[1:], x.features[1:], x.scores[1:], x.cells[1:], {})
    with pytest.raises(ValueError, match="no pairs"):
        compared(bundle, x, y)
    nothing = Comparison(bundle.certificate, bundle.card.modes)
    assert nothing.evidence == pytest.approx(0) and "No latent" in nothing.words("v1", "v2") and nothing.snapshot("v1", "v2")["agreement"] is None
