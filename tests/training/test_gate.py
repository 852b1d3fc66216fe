from dataclasses import replace

import numpy as np
import pytest

from training.bundle import BundleError, open_bundle
from training.gate import MODE_FLOOR, QualityRefused, publish, quality_objections
from training.registry import Registry

pytestmark = pytest.mark.slow


def objections(bundle, shares):
    """What the gate says of a certificate that counted `shares` of the cells, off-manifold last."""
    count = 100_000
    counted = np.rint(np.array(shares) * count).astype(np.int64)
    certificate = replace(bundle.certificate, count=count, cell_count=counted)
    return quality_objections(bundle.reference, certificate, bundle.card.modes)


def test_gate_names_what_is_proven_and_nothing_else(ring):
    bundle = open_bundle(ring)
    real = bundle.reference.cell_share
    assert objections(bundle, real) == []

    dropped = real.copy()
    dropped[2] *= 0.9 * MODE_FLOOR
    said = objections(bundle, dropped)
    assert len(said) == 1 and said[0].startswith(f"mode {bundle.card.modes[2]} is dropped")

    at_floor = real.copy()  # below the floor by less than the certificate can prove
    at_floor[2] *= MODE_FLOOR * 0.999
    assert objections(bundle, at_floor) == []

    off = real * 0.45
    off[-1] = 0.55
    assert [s for s in objections(bundle, off) if "off the manifold" in s]
    skewed = np.array([0.4, 0.3, 0.06, 0.05, 0.05, 0.05, 0.04, 0.04, 0.01])
    assert [s for s in objections(bundle, skewed) if "total variation" in s]


def test_a_good_generator_becomes_the_next_version(ring, tmp_path):
    registry = Registry(tmp_path)
    assert publish(ring, registry).card.version == "v1"
    second = publish(ring, registry, model="other-name")
    assert (second.card.model, second.card.version, second.card.forced) == ("other-name", "v1", None)
    assert registry.open("ring", "v1").certificate.count == 80_000


def test_a_collapsed_generator_is_refused_unless_forced(collapsed, tmp_path):
    registry = Registry(tmp_path)
    with pytest.raises(QualityRefused, match="is dropped") as refusal:
        publish(collapsed, registry)
    assert f"ganwatch publish {collapsed} --force" in refusal.value.remedy
    assert registry.versions("ring") == []
    forced = publish(collapsed, registry, force=True)
    assert "is dropped" in forced.card.forced
    assert registry.card("ring", "v1") == forced.card


def test_an_altered_bundle_is_not_published(ring, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ring.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx"):
        publish(copy, Registry(tmp_path / "registry"))
