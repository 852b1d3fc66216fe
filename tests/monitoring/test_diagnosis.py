"""Which failure the evidence names, and what silence is said to prove."""

from __future__ import annotations

import numpy as np
import pytest

from monitoring.diagnosis import EXPLANATIONS, QUIET, VERDICTS, detectable, diagnose
from monitoring.edetectors import KINDS
from training.drops import delay_of_loss, drop_bounds

MODES = tuple(str(k) for k in range(10))


@pytest.mark.parametrize(
    ("groups", "id", "modes", "null"),
    [
        (["drop:8", "drop:3"], "mode_dropping", ("3", "8"), "A"),
        (["drop:3", "inflate:8", "upper", "lower", "quality"], "mode_dropping", ("3",), "A"),
        (["duplicates", "drop:3", "lower"], "latent_fault", ("3",), "A"),
        (["copies", "lower", "narrower"], "memorisation", (), "A"),
        (["upper", "lower", "quality"], "off_manifold", (), "A"),
        (["lower", "inflate:8", "quality"], "within_mode_collapse", (), "A"),
        (["quality", "inflate:8"], "quality_outside_tolerance", (), "B"),
        (["inflate:8"], "drift", (), "A"),
    ],
)
def test_diagnosis(groups, id, modes, null):
    verdict = diagnose(groups, MODES)
    assert (verdict.id, verdict.modes, verdict.null) == (id, modes, null)
    assert verdict.words.endswith(".") and verdict.advice.endswith(".") and "{" not in verdict.words


def test_the_same_generator_that_once_passed_is_not_to_blame():
    verdict = diagnose(["quality"], MODES, passed_as="v1")
    assert (verdict.id, verdict.null) == ("world_moved", "B") and "passed as v1" in verdict.words and "rollback to v1" in verdict.advice
    assert diagnose(["drop:3", "quality"], MODES, passed_as="v1").id == "mode_dropping"


def test_the_words_name_the_modes():
    assert "3, 8" in diagnose(["drop:3", "drop:8"], MODES).words
    risen = diagnose(["inflate:8", "moved", "inflate:3"], MODES)
    assert (risen.id, risen.modes) == ("drift", ()) and risen.words.endswith("These come too often: 3, 8.")
    assert "too often" not in diagnose(["moved"], MODES).words


def test_what_is_no_number_is_called_so_and_given_a_class_that_is_named():
    verdict = diagnose(["nan", "drop:3", "upper:1", "nan:2"], MODES, classes=("a", "b", "c"))
    assert (verdict.id, verdict.modes, verdict.classes) == ("off_manifold", ("3",), ("c",)) and "NaN" in verdict.words and verdict.words.endswith("asked for: c.")
    assert diagnose(["nan", "duplicates"], MODES).id == "latent_fault"


def test_every_kind_of_evidence_has_an_explanation():
    assert set(EXPLANATIONS) == set(KINDS)
    assert set(EXPLANATIONS.values()) | {*QUIET, "wrong_model", "world_moved"} == set(VERDICTS)


def test_delay_of_loss(make_bundle):
    certificate = make_bundle().certificate
    delays = delay_of_loss(certificate, drop_bounds(certificate), np.array([1.0, 0.5, 0.1]), threshold=2.6e9)
    assert delays.shape == (3, 10)
    # log(A / w) / -log(1 - pi) for a mode that is gone, up to the certificate's slack and the share that is off-manifold
    share = certificate.cell_count[0] / certificate.count
    assert delays[0, 0] == pytest.approx(np.log(2.6e9 * 30 / 0.3) / -np.log(1 - share), rel=0.03)
    assert (delays[0] < delays[1]).all() and np.isinf(delays[2]).all()  # no bet of ours grows on a tenth


def test_what_silence_proves(make_bundle):
    certificate = make_bundle().certificate
    assert "within about" in detectable(certificate, drop_bounds(certificate), MODES, monitored=0, threshold=2.6e9)
    some, many = (detectable(certificate, drop_bounds(certificate), MODES, monitored=n, threshold=2.6e9) for n in (1000, 1_000_000))
    percent = [int(words.partition(" %")[0].split()[-1]) for words in (some, many)]
    assert 100 > percent[0] > percent[1] > 10


def test_what_is_not_watched_is_said(make_bundle):
    certificate = make_bundle(lost=(3, 8), honest=True).certificate
    assert detectable(certificate, drop_bounds(certificate), MODES, monitored=0, threshold=2.6e9).endswith("hardly produces them: 3, 8.")
    nothing = make_bundle(lost=tuple(range(1, 10)), fakes=1.0, honest=True).certificate
    assert "never be seen" in detectable(nothing, drop_bounds(nothing), MODES, monitored=0, threshold=2.6e9)
