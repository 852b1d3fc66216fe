"""What the gate says of a version that would take production's place, and that force is written down."""

from dataclasses import replace

import numpy as np
import pytest

from tests.serving.conftest import publish
from training.bundle import clopper_pearson
from training.gate import QualityRefused, promote, promotion_objections, quality_figures
from training.registry import Registry, RegistryError


@pytest.fixture
def registry(tmp_path):
    """`digits` with two versions, v1 in production; their real data: a third each of left, right and off-manifold."""
    found = Registry(tmp_path / "registry")
    publish(found, "digits")
    publish(found, "digits", shift=1.0, promote=False)
    return found


def counted(bundle, cells):
    """The bundle as if its certificate had counted `cells`."""
    bundle.__dict__["certificate"] = replace(bundle.certificate, count=sum(cells), cell_count=np.array(cells))
    return bundle


def test_a_version_that_is_worse_by_more_than_the_tolerance_is_objected_to_with_the_figures_of_both(registry):
    production = counted(registry.open("digits", "v1"), [400_000, 400_000, 200_000])
    worse = counted(registry.open("digits", "v2"), [300_000, 100_000, 600_000])
    said = promotion_objections(worse, production)
    assert [text.split(":")[0] for text in said] == [
        "off-manifold share", "total variation to the real mode shares", "shortfall of the worst-served mode",
    ]  # fmt: skip
    assert all("for v2" in text and "for v1 in production" in text and "the tolerance is 0.1" in text for text in said)
    assert "0.59" in said[0] and "0.20" in said[0]
    assert promotion_objections(worse, production, tolerance=0.8) == []
    assert promotion_objections(production, worse) == []  # better is no objection


@pytest.mark.parametrize("count", [300, 1_000_000])
def test_a_difference_that_few_samples_cannot_prove_is_no_objection(registry, count):
    production = counted(registry.open("digits", "v1"), [40 * count // 100, 40 * count // 100, 20 * count // 100])
    candidate = counted(registry.open("digits", "v2"), [34 * count // 100, 34 * count // 100, 32 * count // 100])
    said = promotion_objections(candidate, production)
    assert bool([text for text in said if text.startswith("off-manifold")]) == (count == 1_000_000)


def test_figures_lie_within_their_bounds(registry):
    bundle, rng = registry.open("digits", "v1"), np.random.default_rng(0)
    real = bundle.reference.cell_share
    for count in (50, 1000, 100_000):
        shares = rng.dirichlet(np.ones(3))
        bounds = quality_figures(bundle.reference, counted(bundle, rng.multinomial(count, shares).tolist()).certificate)
        truth = (shares[-1], np.abs(shares - real).sum() / 2, max(0.0, 1 - (shares[:-1] / real[:-1]).min()))
        for (low, high), value in zip(bounds.values(), truth, strict=True):
            assert 0 <= low <= value <= high <= 1  # fails in one of a hundred, by the certificate's delta; the seed is fixed
    assert clopper_pearson(0, 10, 0.01)[0] == 0


def test_a_refused_promotion_changes_nothing_and_force_is_recorded(registry, monkeypatch):
    monkeypatch.setattr("training.gate.promotion_objections", lambda candidate, production, tolerance: [f"too bad by {tolerance}"])
    with pytest.raises(QualityRefused, match=r"too bad by 0\.1") as refused:
        promote(registry, "digits", "v2")
    assert "ganwatch promote v2 --model digits --force" in refused.value.remedy
    assert registry.aliases("digits") == {"production": "v1"}
    assert promote(registry, "digits", "v2", "canary", share=0.1).version == "v2"  # that is how one tries it
    change = promote(registry, "digits", "v2", tolerance=0.2, force=True)
    assert change.forced == "too bad by 0.2" == registry.forced("digits")
    assert registry.history("digits")[-1] == change
    registry.rollback("digits")
    assert registry.forced("digits") is None


def test_the_version_in_production_and_the_first_one_are_not_compared(registry):
    assert promote(registry, "digits", "v1").forced is None
    registry.set_alias("digits", "production", None, reason="test")
    assert promote(registry, "digits", "v2").version == "v2"
    with pytest.raises(ValueError, match=r"tolerance is -1\.0"):
        promote(registry, "digits", "v1", tolerance=-1.0)


def test_a_damaged_version_bars_neither_the_way_forward_nor_the_way_back(registry):
    publish(registry, "digits", promote=False)
    for version in ("v2", "v3"):
        promote(registry, "digits", version, force=True)
    (registry.root / "digits" / "v2" / "card.json").write_text("{")
    assert registry.rollback("digits").version == "v1"
    (registry.root / "digits" / "v1" / "model.onnx").write_bytes(b"")
    assert promote(registry, "digits", "v3").version == "v3"
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback("digits")


def test_what_the_gate_said_of_a_version_is_known_after_the_way_back_to_it(registry, monkeypatch):
    publish(registry, "digits", promote=False)
    monkeypatch.setattr("training.gate.promotion_objections", lambda *_: ["worse"])
    promote(registry, "digits", "v2", force=True)
    monkeypatch.setattr("training.gate.promotion_objections", lambda *_: [])
    promote(registry, "digits", "v3")
    assert registry.forced("digits") is None
    registry.rollback("digits")
    assert registry.forced("digits") == "worse"
