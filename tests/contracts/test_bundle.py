"""The bundle and registry contracts: complete or refused, immutable, aliases in one step."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from training.bundle import FILES, BundleError, Card, Certificate, Reference, SignGaussian, clopper_pearson, open_bundle, read_arrays, write_arrays, write_card
from training.registry import Registry, RegistryError

CARD = Card(
    model="toy", version="", created="2026-01-01T00:00:00+00:00", files={}, latent=SignGaussian(2, 2), sample_shape=(2,), sample_dtype="float32",
    modes=("a", "b"), scores=("distance",),
)  # fmt: skip


def arrays() -> tuple[Reference, Certificate]:
    k1, p, s, levels = 3, 2, 1, 2.0 ** -np.arange(1, 4)
    reference = Reference(
        100, np.array([0.5, 0.49, 0.01]), np.zeros(p), np.eye(p), np.zeros((4, p), np.float32), np.zeros((0, p), np.float32)
    )  # fmt: skip
    certificate = Certificate(
        1000, 0.01, np.array([500, 490, 10]), levels, np.ones((s, 3)), np.full((s, 3), 7), np.ones((s, 3)), np.full((s, 3), 7), 31, 0,
        np.zeros(p), np.eye(p), np.arange(2), np.arange(2), np.zeros((2, 2), np.float32),
    )  # fmt: skip
    assert certificate.cell_count.shape == (k1,)
    return reference, certificate


def fill(directory: Path) -> Path:
    """The files of a bundle whose models are never opened here."""
    for name in ("model.onnx", "features.onnx"):
        (directory / name).write_bytes(name.encode() * 100)
    reference, certificate = arrays()
    write_arrays(directory / "reference.npz", reference)
    write_arrays(directory / "certificate.npz", certificate)
    return directory


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def publish(registry: Registry, model: str = "toy") -> str:
    with registry.staging(model) as staged:
        return registry.publish(fill(staged), replace(CARD, model=model)).card.version


def test_what_is_written_is_read_back(registry: Registry) -> None:
    bundle = registry.open("toy", publish(registry))
    assert bundle.card == replace(CARD, version="v1", files=bundle.card.files)
    for got, wanted in zip((bundle.reference, bundle.certificate), arrays(), strict=True):
        for field in fields(wanted):
            assert np.array_equal(getattr(got, field.name), getattr(wanted, field.name)), field.name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_bundle_is_refused_by_the_file_name(registry: Registry, name: str, damage: str) -> None:
    path = registry.path("toy", publish(registry)) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        open_bundle(path.parent)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK" + bytes(40)])
def test_arrays_that_cannot_be_read_are_refused_by_the_file_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(BundleError, match=r"/reference\.npz: "):
        read_arrays(Reference, tmp_path / "reference.npz")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "surprise": 1}'])
def test_a_bad_card_is_refused(registry: Registry, text: str) -> None:
    path = registry.path("toy", publish(registry))
    (path / "card.json").write_text(text)
    with pytest.raises(BundleError, match="card"):
        open_bundle(path)


def test_a_directory_without_a_card_is_no_version(registry: Registry) -> None:
    version = publish(registry)
    (registry.path("toy", version) / "card.json").unlink()
    assert registry.versions("toy") == []
    with pytest.raises(RegistryError, match="versions: none"):
        registry.resolve("toy", version)


def test_versions_count_up_and_nothing_half_written_stays(registry: Registry) -> None:
    assert [publish(registry) for _ in range(11)] == [f"v{i}" for i in range(1, 12)]
    assert registry.versions("toy")[-2:] == ["v10", "v11"]

    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), registry.staging("toy") as staged:
        fill(staged)
        raise Interrupted
    assert not list((registry.root / "toy").glob(".staging-*"))


def test_aliases_flip_and_roll_back(registry: Registry) -> None:
    for _ in range(3):
        publish(registry)
    for version in ("v1", "v2", "v3"):
        registry.set_alias("toy", "production", version, reason="test")
    assert registry.rollback("toy").version == "v2"
    assert registry.rollback("toy").version == "v1"
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback("toy")
    registry.set_alias("toy", "canary", "v3", reason="test")
    assert registry.aliases("toy") == {"production": "v1", "canary": "v3"}
    registry.set_alias("toy", "canary", None, reason="test")
    assert registry.aliases("toy") == {"production": "v1"}
    assert [c.version for c in registry.history("toy")] == ["v1", "v2", "v3", "v2", "v1", "v3", None]


def test_what_an_alias_went_back_from_is_withdrawn_until_it_is_named_again(registry: Registry) -> None:
    for _ in range(4):
        publish(registry)

    def after(alias: str, version: str | None) -> set[str]:
        registry.set_alias("toy", alias, version, reason="test")
        return set(registry.withdrawn("toy"))

    assert [after("production", version) for version in ("v1", "v2", "v3")] == [set(), set(), set()]
    registry.rollback("toy")
    assert registry.withdrawn("toy") == {"v3"}
    assert after("canary", "v3") == set()  # on trial again
    assert after("canary", None) == {"v3"}
    assert after("production", "v1") == {"v2", "v3"}  # promoting an earlier version is going back, too
    assert after("canary", "v4") == {"v2", "v3"}
    assert after("production", "v4") == {"v2", "v3"}
    assert after("canary", None) == {"v2", "v3"}  # v4 has become production
    assert after("production", "v3") == {"v2"}


def test_an_altered_version_is_never_promoted(registry: Registry) -> None:
    registry.set_alias("toy", "production", publish(registry), reason="test")
    (registry.path("toy", publish(registry)) / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="model.onnx"):
        registry.set_alias("toy", "production", "v2", reason="test")
    assert registry.aliases("toy") == {"production": "v1"}


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65, "a b"])
def test_names_that_could_leave_the_registry_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="name is|unknown model"):
        registry.set_alias(name, "production", "v1", reason="test")
    with pytest.raises(RegistryError, match="name is"):
        registry.versions(name)


def test_unknown_names_list_what_there_is(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(RegistryError, match=r"unknown model 'other'.*\['toy'\]"):
        registry.resolve("other")
    with pytest.raises(RegistryError, match=r"unknown version 'v9'.*\['v1'\]"):
        registry.resolve("toy", "v9")
    with pytest.raises(RegistryError, match="alias is 'staging'"):
        registry.set_alias("toy", "staging", "v1", reason="test")
    with pytest.raises(RegistryError, match="local directories"):
        Registry("s3://bucket/registry")


def _publish_many(root: str, times: int) -> None:
    for _ in range(times):
        publish(Registry(root))


@pytest.mark.slow
def test_processes_that_publish_at_once_lose_nothing(registry: Registry) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_publish_many, args=(str(registry.root), 5)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert registry.versions("toy") == [f"v{i}" for i in range(1, 16)]
    assert all(open_bundle(registry.path("toy", v)) for v in registry.versions("toy"))


def test_the_card_is_written_last(tmp_path: Path) -> None:
    fill(tmp_path)
    card = write_card(tmp_path, CARD)
    assert json.loads((tmp_path / "card.json").read_text())["files"] == card.files
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (1, 10), (5, 10), (10, 10), (3, 100_000)])
def test_clopper_pearson_is_exact(hits: int, count: int) -> None:
    low, high = clopper_pearson(hits, count, 0.01)
    if hits > 0:
        assert stats.binom.sf(hits - 1, count, low) == pytest.approx(0.01, rel=1e-6)
    if hits < count:
        assert stats.binom.cdf(hits, count, high) == pytest.approx(0.01, rel=1e-6)
    assert (hits > 0 or low == 0) and (hits < count or high == 1)
