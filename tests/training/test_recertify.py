"""A published generator is certified against other data: the graph stays to the last bit, all that is said of it is new."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from training.bundle import open_bundle
from training.data import DATASETS, DataError, Dataset
from training.gate import QualityRefused, publish
from training.recertify import _fitting, recertify
from training.reference import build, find
from training.registry import Registry

rng = np.random.default_rng(0)


def points(centres, count=4000):
    return (np.array(centres)[rng.integers(len(centres), size=count)] + 0.01 * rng.standard_normal((count, 2))).astype(np.float32)


RING = np.stack([np.cos(np.pi / 4 * np.arange(8)), np.sin(np.pi / 4 * np.arange(8))], axis=1)


@pytest.fixture
def published(ring, tmp_path):
    """The half-learned ring as v1 of a registry."""
    return publish(ring, Registry(tmp_path / "registry"))


@pytest.mark.slow
def test_the_same_graph_is_certified_against_other_data(published, tmp_path):
    """Of the new data a ninth lies where the generator gives nothing."""
    registry, said = Registry(tmp_path / "registry"), []
    np.save(tmp_path / "new.npy", points([*RING, (3, 3)]))
    card = recertify(published, str(tmp_path / "new.npy"), tmp_path / "made", tmp_path / "references", certify_samples=20_000, say=said.append)
    made, old = open_bundle(tmp_path / "made"), published.card
    assert made.model_path.read_bytes() == published.model_path.read_bytes() and made.certificate.model_sha256 == old.files["model.onnx"]
    assert all(card.files[name] != old.files[name] for name in ("features.onnx", "reference.npz", "certificate.npz"))
    assert made.certificate.count == 16_000 and made.reference.count == 4000 and "prdc_recall" in card.certified
    assert (card.model, card.latent, card.training["config"]) == ("ring", old.latent, old.training["config"])
    assert card.training["recertified"] == {"of": "v1", "data": str(tmp_path / "new.npy")} and card.dataset == str(tmp_path / "new.npy")
    assert said == ["read     4,000 samples of vectors of 2 from 1 files"] and not list((tmp_path / "made").glob("data-*"))
    with pytest.raises(QualityRefused, match=r"mode \(3\.00, [23]\.\d\d\).* is dropped"):
        publish(tmp_path / "made", registry)
    assert registry.versions("ring") == ["v1"]
    forced = publish(tmp_path / "made", registry, force=True)
    assert forced.card.version == "v2" and "is dropped" in forced.card.forced

    np.save(tmp_path / "same.npy", points(RING))  # v2 was forced; what is made of it passes, and says nothing of force
    card = recertify(forced, str(tmp_path / "same.npy"), tmp_path / "again", tmp_path / "references", certify_samples=20_000)
    assert publish(tmp_path / "again", registry).card.forced is None and card.training["recertified"]["of"] == "v2"


@pytest.mark.slow
def test_what_reference_build_made_is_taken_as_it_is(published, tmp_path):
    references, said = tmp_path / "references", []
    built = build(Dataset("ring", points(RING), 8), "faces", "s3://bucket/faces.npy", references)
    card = recertify(published, "faces", tmp_path / "made", references, certify_samples=20_000, say=said.append)
    for name in ("features.onnx", "reference.npz"):
        assert (tmp_path / "made" / name).read_bytes() == (built.path / name).read_bytes()
    assert card.training["recertified"] == {"of": "v1", "data": "s3://bucket/faces.npy", "built": "faces v1"}
    assert card.modes == tuple(built.about["counts"]) and len(card.modes) == 8 and card.certified["tv"] < 0.4
    assert said == ["the reference is faces v1, built of s3://bucket/faces.npy"]
    assert publish(tmp_path / "made", Registry(tmp_path / "registry")).card.forced is None

    about = json.loads((built.path / "reference.json").read_text())

    def refused(words):
        with pytest.raises(DataError, match=words):
            recertify(published, str(built.path), tmp_path / "refused", references)
        assert not (tmp_path / "refused").exists()

    for change, words in (
        ({"shape": [3]}, r"faces v1 holds float32 \[3\], and samples of ring v1 are float32 \[2\]"),
        ({"counts": {"a": 1}}, "its files are not of one build; build it again"),
        ({"scores": ["radius"]}, "its files are not of one build; build it again"),
    ):
        (built.path / "reference.json").write_text(json.dumps(about | change))
        refused(words)
    del about["scores"]
    (built.path / "reference.json").write_text(json.dumps(about))
    refused("of an earlier version: reference.json says no 'scores'; build it again")
    (built.path / "reference.json").write_text(json.dumps(about | {"scores": card.scores}))
    (built.path / "features.onnx").write_bytes(b"junk")
    refused("its features.onnx does not run on samples of ring .*; build it again")
    (built.path / "reference.npz").write_bytes(b"junk")
    refused(r"is damaged .*reference\.npz.*; build it again")


@pytest.mark.slow
def test_who_kept_no_real_data_takes_no_built_reference_that_does(published, tmp_path):
    build(Dataset("ring", points(RING), 8), "faces", "faces.npy", tmp_path / "references")
    none = replace(published.reference, train_points=published.reference.train_points[:0])
    published.__dict__["reference"] = none
    with pytest.raises(DataError, match="was published so that it keeps no real data, .*; name the data instead, faces.npy"):
        recertify(published, "faces", tmp_path / "made", tmp_path / "references")
    assert not (tmp_path / "made").exists()


def test_a_built_reference_is_found_by_name_and_by_directory(tmp_path, monkeypatch):
    for name in ("faces/v1", "faces/v2", "faces/v3", "ring/v1"):
        (tmp_path / "references" / name).mkdir(parents=True)
        if name != "faces/v3":  # which was cut off
            (tmp_path / "references" / name / "reference.json").write_text("{}")
    root = tmp_path / "references"
    for where, path in (("faces", "faces/v2"), ("faces/v1", "faces/v1"), (str(root / "faces"), "faces/v2"), (str(root / "faces/v1"), "faces/v1")):
        assert find(where, root).path == root / path
    assert find("faces/v3", root) is find("ring", root) is find("nobody", root) is find("s3://bucket/faces", root) is None  # ring is built in
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    assert find("faces", root) is None  # data of that name lie here


@pytest.mark.slow
def test_data_of_another_form_are_refused(published, tmp_path):
    for array, words in (
        (rng.standard_normal((200, 3)).astype(np.float32), r"--reference holds float32 \[3\], and samples of ring v1 are float32 \[2\]"),
        (rng.integers(256, size=(200, 4, 4), dtype=np.uint8), r"--reference holds uint8 \[4, 4, 1\], and samples of ring v1 are float32 \[2\]"),
    ):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match=words):
            recertify(published, str(tmp_path / "x.npy"), tmp_path / "made", tmp_path / "references")
        assert not (tmp_path / "made").exists()
    with pytest.raises(DataError, match="--reference is nobody, neither a path that exists nor built in"):
        recertify(published, "nobody", tmp_path / "made", tmp_path / "references")


@pytest.mark.slow
def test_classes_that_are_asked_for_must_be_those_of_the_data(conditional, tmp_path):
    bundle, digits = open_bundle(conditional), DATASETS["digits"]()
    card = recertify(bundle, "digits", tmp_path / "made", tmp_path / "references", certify_samples=4000)
    old = bundle.card
    assert (card.classes, card.class_shares, card.files["model.onnx"]) == (old.classes, old.class_shares, old.files["model.onnx"])
    assert card.certified["class_agreement"] > 0.6 and open_bundle(tmp_path / "made").certificate.class_cell_count.shape == (10, 11)

    backwards = replace(digits, labels=9 - digits.labels, classes=digits.classes[::-1])  # the same data, their classes listed otherwise
    fitting = _fitting(old, backwards)
    assert fitting.classes == old.classes and np.array_equal(fitting.labels, digits.labels)
    few, names = digits.labels < 8, digits.classes
    for dataset, words in (
        (replace(digits, samples=digits.samples[few], labels=digits.labels[few], classes=names[:8]), "--reference lacks 8, 9; data with labels of all its classes"),
        (replace(digits, classes=(*names, "dog", "cat")), "--reference has dog, cat besides; "),
        (replace(digits, classes=(*names[:9], "nine")), "--reference lacks 9 and has nine besides; "),
        (replace(digits, labels=None, classes=()), "--reference has no labels; "),
    ):
        with pytest.raises(DataError, match=words):
            _fitting(old, dataset)

    built = build(digits, "digits", "digits", tmp_path / "references")
    about = json.loads((built.path / "reference.json").read_text())
    shuffled = about | {"counts": dict(reversed(about["counts"].items()))}
    (built.path / "reference.json").write_text(json.dumps(shuffled))
    with pytest.raises(DataError, match="has the classes of digits in another order, 9, 8, .*; name the data instead, digits"):
        recertify(bundle, str(built.path), tmp_path / "refused", tmp_path / "references")


@pytest.mark.slow
def test_who_kept_no_real_data_keeps_none_of_the_new_ones(published, tmp_path):
    none = replace(published.reference, train_points=np.zeros((0, 2), np.float32), held_out_points=np.zeros((0, 2), np.float32))
    published.__dict__["reference"] = none
    np.save(tmp_path / "same.npy", points(RING))
    card = recertify(published, str(tmp_path / "same.npy"), tmp_path / "made", tmp_path / "references", certify_samples=4000)
    assert card.scores == ("manifold_distance", "radius") and not len(open_bundle(tmp_path / "made").reference.train_points)
    weights = {w.name: w.dims for w in onnx.load(tmp_path / "made" / "features.onnx").graph.initializer}
    assert not any("remembered" in name for name in weights)
