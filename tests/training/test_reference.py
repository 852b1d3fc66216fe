"""References are built and built again: what changed is said, what did not is not."""

import numpy as np
import pytest

from training.data import DATASETS, Dataset
from training.reference import build, latest, moved, words

rng = np.random.default_rng(0)


def test_features_move_only_when_they_do():
    before = rng.standard_normal((3000, 20))
    assert moved(before, rng.standard_normal((3000, 20))) == {"of": 20, "moved": {}}
    shifted = rng.standard_normal((3000, 20))
    shifted[:, 7] += 0.5
    found = moved(before, shifted)["moved"]
    assert list(found) == ["7"] and found["7"]["shift"] == pytest.approx(0.5, abs=0.1) and found["7"]["p"] < 1e-6


def test_two_builds_of_one_law_differ_in_about_delta_of_all_cases():
    false = sum(bool(moved(rng.standard_normal((300, 5)), rng.standard_normal((300, 5)))["moved"]) for _ in range(300))
    assert false <= 10  # 3 are expected


@pytest.mark.slow
def test_a_reference_of_digits_is_built_and_built_again(tmp_path):
    digits = DATASETS["digits"]()
    first = build(digits, "digits", "digits", tmp_path)
    assert first.changes is None and first.about["accuracy"] > 0.95 and sum(first.about["counts"].values()) == 1797
    assert {p.name for p in first.path.iterdir()} == {"features.onnx", "reference.npz", "reference.json"}

    same = build(digits, "digits", "digits", tmp_path)
    assert not same.changes["features"]["moved"] and not same.changes["classes_gone"]
    assert all(s["difference_low"] <= 0 <= s["difference_high"] for s in same.changes["shares"].values())

    few = (digits.labels != 3) & ((digits.labels != 8) | (np.arange(1797) % 5 == 0))  # 3 is gone, four fifths of 8, pixels are dimmer
    kept, names = digits.labels[few], tuple(c for c in digits.classes if c != "3")
    changed = Dataset("digits", (digits.samples[few] * 0.7).astype(np.uint8), 9, kept - (kept > 3), names)
    again = build(changed, "digits", "digits", tmp_path)
    assert latest(tmp_path / "digits").about == again.about and again.path.name == "v3"
    assert again.changes["classes_gone"] == ["3"] and again.changes["rows"] == [1797, len(kept)]
    assert again.changes["shares"]["8"]["difference_high"] < 0 and again.changes["features"]["moved"]
    said = "\n".join(words(again.about))
    assert "classes that are gone: 3" in said and "share of 8" in said and "features moved" in said
