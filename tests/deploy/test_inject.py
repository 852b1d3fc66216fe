"""Faults change model.onnx and nothing else, do what their names say, and are found by the monitor through `replay`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy import cli
from deploy.cli import Fault
from deploy.inject import COPY_SHARE, DROPPED_AT_MOST, FAULTS, NOISE_SHARE, InjectError, inject
from deploy.replay import replay
from deploy.stack import StackError
from monitoring.diagnosis import VERDICTS
from monitoring.edetectors import FAMILIES
from monitoring.features import Eye
from monitoring.incidents import Incidents
from monitoring.watch import Watch
from serving.records import Record
from serving.sampler import Sampler, Window
from training.bundle import Bundle
from training.registry import Registry, RegistryError


@pytest.fixture
def registry(make_bundle: Callable[..., Bundle], tmp_path: Path) -> Registry:
    """A healthy ten-mode generator in production."""
    make_bundle(root=tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    registry.set_alias("grid", "production", "v1", reason="test")
    return registry


def cells_of(bundle: Bundle, samples: np.ndarray) -> np.ndarray:
    """0 .. 9: the mode; 10: off-manifold."""
    return Eye(bundle).look(samples).cells


def draw(bundle: Bundle, n: int, seed: int = 5) -> np.ndarray:
    return Sampler(bundle).sample([Window(seed, 0, n)])


def made(registry: Registry, fault: str, tmp_path: Path, **more: Any) -> Bundle:
    """The fault with what it needs: modes to drop, data to copy, nothing else."""
    if fault == "copies":
        np.save(tmp_path / "data.npy", draw(registry.open("grid"), 2000, seed=77))
    needs = {"drop-modes": {"labels": ("3", "8")}, "copies": {"data": str(tmp_path / "data.npy")}}
    return inject(registry, "grid", fault, **needs.get(fault, {}), **more)


def test_the_command_line_knows_every_fault() -> None:
    assert get_args(Fault) == tuple(FAULTS)


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"int8", "checkpoint"}))
def test_only_the_model_changes(registry: Registry, tmp_path: Path, fault: str) -> None:
    healthy = registry.open("grid")
    broken = made(registry, fault, tmp_path)
    for name in ("features.onnx", "reference.npz", "certificate.npz"):
        assert broken.card.files[name] == healthy.card.files[name]
    assert (broken.card.files["model.onnx"] == healthy.card.files["model.onnx"]) == (fault == "nothing")
    assert broken.card.injected_from == "v1" and broken.card.fault.startswith(fault) and broken.card.version == "v2"
    assert registry.aliases("grid") == {"production": "v1"}
    for n in (1, 2, 33):
        assert draw(broken, n).shape == (n, *healthy.card.sample_shape)


def test_dropped_modes_never_come(registry: Registry) -> None:
    broken = inject(registry, "grid", "drop-modes", labels=("3", "8"))
    shares = np.bincount(cells_of(broken, draw(broken, 10_000)), minlength=11) / 10_000
    assert shares[[3, 8]].sum() <= DROPPED_AT_MOST
    assert np.delete(shares, [3, 8, 10]).min() > 0.08  # the others take their place, none of them goes


def test_off_manifold_replaces_its_share(registry: Registry) -> None:
    healthy, broken = registry.open("grid"), inject(registry, "grid", "off-manifold")
    before, after = draw(healthy, 20_000), draw(broken, 20_000)
    changed = (before != after).any(1)
    assert changed.mean() == pytest.approx(NOISE_SHARE, rel=0.15)
    assert (cells_of(broken, after[changed]) == 10).mean() > 0.9


def test_a_collapse_keeps_the_modes_and_loses_their_variety(registry: Registry) -> None:
    healthy = draw(registry.open("grid"), 20_000)
    for fault, most in (("collapse", 0.85), ("truncated", 0.5)):
        samples = draw(inject(registry, "grid", fault), 20_000)
        cells, before = cells_of(registry.open("grid"), samples), cells_of(registry.open("grid"), healthy)
        assert np.std(samples[cells == 4], axis=0).mean() < most * np.std(healthy[before == 4], axis=0).mean()
        if fault == "collapse":
            assert np.abs(np.bincount(cells, minlength=11) / 20_000 - np.bincount(before, minlength=11) / 20_000).max() < 0.015


def test_copies_are_samples_of_the_data(registry: Registry, tmp_path: Path) -> None:
    samples, data = draw(made(registry, "copies", tmp_path), 20_000), np.load(tmp_path / "data.npy")
    copied = (samples[:, None] == data).all(axis=2).any(axis=1)
    assert copied.mean() == pytest.approx(COPY_SHARE, rel=0.3)
    assert len(np.unique(samples[copied], axis=0)) > 100  # not one and the same
    with pytest.raises(InjectError, match="--data"):
        inject(registry, "grid", "copies")
    with pytest.raises(InjectError, match="only copies takes data"):
        inject(registry, "grid", "nothing", data="data.npy")
    np.save(tmp_path / "other.npy", np.eye(2000, 3, dtype=np.float32))
    with pytest.raises(InjectError, match="serves float32"):
        inject(registry, "grid", "copies", data=str(tmp_path / "other.npy"))
    card = registry.path("grid", "v1") / "card.json"  # of a generator that was trained on files of a built-in data set
    config = {"dataset": "mnist", "data": str(tmp_path / "mnist.npz")}
    card.write_text(json.dumps(json.loads(card.read_text()) | {"training": {"config": config}}))
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((50, 28, 28), np.uint8), y_train=np.arange(50) % 10)
    with pytest.raises(InjectError, match="mnist holds uint8"):
        inject(registry, "grid", "copies")


def test_weights_and_checkpoints_that_are_not_there_are_said(registry: Registry, make_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(InjectError, match="no weights that onnxruntime quantises"):
        inject(registry, "grid", "int8")
    with pytest.raises(InjectError, match="no other version"):
        inject(registry, "grid", "checkpoint")
    make_bundle(root=registry.root, version="v2", width=1.5, honest=True)
    made = inject(registry, "grid", "checkpoint")
    assert made.card.files["model.onnx"] == registry.card("grid", "v2").files["model.onnx"] and made.card.injected_from == "v1"
    assert made.card.files["certificate.npz"] == registry.card("grid", "v1").files["certificate.npz"]


def test_a_latent_fault_repeats_samples(registry: Registry) -> None:
    samples = draw(inject(registry, "grid", "latent-fault"), 20_000)
    assert len(np.unique(samples, axis=0)) <= 2**10


@pytest.mark.parametrize(
    ("fault", "labels", "words"),
    [("drop-modes", ("nine",), "unknown modes"), ("drop-modes", (), "at least one"), ("drop-modes", tuple("0123456789"), "leave at least one"),
     ("off-manifold", ("3",), "only drop-modes"), ("melt", (), "must be one of")],
)  # fmt: skip
def test_faults_that_cannot_be_made_are_refused(registry: Registry, fault: str, labels: tuple[str, ...], words: str) -> None:
    with pytest.raises(InjectError, match=words):
        inject(registry, "grid", fault, labels=labels)
    with pytest.raises(RegistryError, match="unknown model"):
        inject(registry, "other", "nothing")
    assert registry.versions("grid") == ["v1"]


@pytest.mark.parametrize(
    ("fault", "verdict", "modes"),
    [
        ("drop-modes", "mode_dropping", ["3", "8"]), ("off-manifold", "off_manifold", []), ("collapse", "within_mode_collapse", []),
        ("latent-fault", "latent_fault", None), ("nothing", "healthy", []),
    ],
)  # fmt: skip
def test_replay_names_each_fault(registry: Registry, tmp_path: Path, fault: str, verdict: str, modes: list[str] | None) -> None:
    broken = made(registry, fault, tmp_path)
    np.save(tmp_path / "stream.npy", draw(broken, 20_000))
    report = replay(broken.path, tmp_path / "stream.npy", 2.6e9)
    assert report["verdict"] == verdict
    assert modes is None or report["modes"] == modes  # few distinct samples may well miss a mode, too
    assert (report["first_alarm"] is None) == (fault == "nothing")
    if fault != "nothing":
        assert report["first_alarm"] < 3000
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["advice"] == VERDICTS[verdict].advice
    assert set(report["gauges"]["js"]) == {"value", "low", "high", "n", "ci", "floor"} and "independent" in report["assumes"]


def test_replay_says_what_the_live_tap_would(registry: Registry, tmp_path: Path) -> None:
    """The same samples served, and read where the page reads; only when it was differs."""
    broken = made(registry, "drop-modes", tmp_path)
    registry.set_alias("grid", "production", broken.card.version, reason="test")
    stream = draw(broken, 9000)  # more than two blocks: what points say is read once more after the alarm
    np.save(tmp_path / "stream.npy", stream)
    replayed = replay(broken.path, tmp_path / "stream.npy", 1e6)["snapshot"]
    watch = Watch(registry, Incidents(tmp_path / "incidents.db"), arl=5e5)  # half of which is production's
    watch.follow(0.0)
    watch.eat([Record("grid", broken.card.version, "server_seed", 5, 0, stream, 0.0)], 0.0)
    live = watch.publish(0.0).state()["models"]["grid"]["snapshot"]
    assert set(replayed) == set(live) and replayed["arl"] == 2 * live["arl"]
    own = {"arl", "budget"}
    verdict = [{key: value for key, value in snapshot.pop("verdict").items() if key != "since"} for snapshot in (replayed, live)]
    assert verdict[0] == verdict[1] and verdict[0]["id"] == "mode_dropping"
    assert {key: value for key, value in replayed.items() if key not in own} == {key: value for key, value in live.items() if key not in own}


def test_the_report_is_readable(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    broken = made(registry, "drop-modes", tmp_path)
    np.save(tmp_path / "stream.npy", draw(broken, 6000))
    for shown, few in ((20, False), (5, True)):
        monkeypatch.setattr(cli, "MODES_SHOWN", shown)
        cli.replay(broken.path, tmp_path / "stream.npy")
        printed = capsys.readouterr().out
        assert printed.startswith("mode_dropping: ") and f"what to do: {VERDICTS['mode_dropping'].advice}" in printed
        assert "8 of 10 modes covered: 8 certainly, 2 certainly dropped; 0 unwatched" in printed and "reaches 9.41" in printed
        rows = {words[0]: words[1:] for line in printed.splitlines() if (words := line.split())}
        assert rows["3"][-1] == rows["8"][-1] == "alarmed" and len(rows["3"]) == 6 and float(rows["modes"][1]) > 9.41
        assert ("1" in rows, "9 rows are left out" in printed) == (not few, few)
        assert rows["mmd"][-1] == "exact" and set(FAMILIES) <= set(rows)


def table(kind: str, stream: np.ndarray) -> pa.Table:
    if kind == "columns":
        return pa.table({"x": stream[:, 0], "y": stream[:, 1], "id": np.arange(len(stream))})
    flat = pa.FixedSizeListArray.from_arrays(pa.array(stream.ravel()), 2)
    return pa.table({"id": np.arange(len(stream)), "sample": flat if kind == "fixed" else pa.array([[list(row)] for row in stream], pa.list_(pa.list_(pa.float32())))})


@pytest.mark.parametrize("kind", ["columns", "fixed", "nested"])
def test_a_table_is_the_same_stream(registry: Registry, tmp_path: Path, kind: str) -> None:
    broken = inject(registry, "grid", "drop-modes", labels=("3", "8"))
    stream = draw(broken, 6000)
    np.save(tmp_path / "stream.npy", stream)
    pq.write_table(table(kind, stream), tmp_path / "stream.parquet")
    assert replay(broken.path, tmp_path / "stream.parquet", 1e4) == replay(broken.path, tmp_path / "stream.npy", 1e4)
    timed = replay(broken.path, tmp_path / "stream.npy", "2h", test_rate=1.0)
    assert timed == replay(broken.path, tmp_path / "stream.npy", 7200.0) | {"arl_seconds": 7200.0}


@pytest.mark.parametrize(
    ("columns", "words"),
    [({"x": np.zeros(3)}, "the columns x: double"), ({"x": np.zeros(3, np.float32)}, "this bundle serves float32"), (None, "cannot be read as parquet"),
     ({"s": pa.array([[1.0, 2.0], None, [1.0, 2.0]], pa.list_(pa.float32()))}, "other than 2 values"),
     ({"s": pa.array([[1.0, 2.0], [1.0], [1.0, 2.0]], pa.list_(pa.float32()))}, "other than 2 values")],
)  # fmt: skip
def test_replay_refuses_a_table_that_is_no_stream(registry: Registry, tmp_path: Path, columns: dict | None, words: str) -> None:
    path = tmp_path / "stream.parquet"
    if columns is None:
        path.write_bytes(b"PAR1")
    else:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(StackError, match=words):
        replay(registry.path("grid"), path, 1e4)


def test_replay_finds_the_very_sample(registry: Registry, tmp_path: Path) -> None:
    """The crossing does not depend on how the stream is cut: a stream that ends with the crossing sample has the alarm at its end."""
    broken = inject(registry, "grid", "drop-modes", labels=("3", "8"))
    stream = draw(broken, 4000)
    np.save(tmp_path / "stream.npy", stream)
    first = replay(broken.path, tmp_path / "stream.npy", 1e4)["first_alarm"]
    for n, wanted in ((first, None), (first + 1, first)):
        np.save(tmp_path / "cut.npy", stream[:n])
        assert replay(broken.path, tmp_path / "cut.npy", 1e4)["first_alarm"] == wanted


def test_replay_counts_the_samples_that_it_could_not_look_at(registry: Registry, tmp_path: Path) -> None:
    broken = inject(registry, "grid", "drop-modes", labels=("3", "8"))
    stream = draw(broken, 4000)
    np.save(tmp_path / "stream.npy", stream)
    first = replay(broken.path, tmp_path / "stream.npy", 1e4)["first_alarm"]
    for bad in (np.nan, 3e38):  # finite, but not what is made of it
        np.save(tmp_path / "stream.npy", np.insert(stream, 5, bad, axis=0))  # one says nothing, but has a number
        report = replay(broken.path, tmp_path / "stream.npy", 1e4)
        assert report["first_alarm"] == first + 1 and report["rejected"]["nan"] == 1
        np.save(tmp_path / "stream.npy", np.insert(stream, [5] * 100, bad, axis=0))
        report = replay(broken.path, tmp_path / "stream.npy", 1e4)
        assert report["first_alarm"] in (6, 7) and report["rejected"]["nan"] == 100 and "NaN" in report["words"]


@pytest.mark.parametrize(
    ("stream", "words"),
    [(np.zeros((5, 3), np.float32), "this bundle serves float32"), (np.zeros((5, 2)), "float64"), (b"not numpy", "cannot read"), (b"PK\x03\x04junk", "cannot read"), (None, "no such file")],
)
def test_replay_refuses_what_is_not_a_stream(registry: Registry, tmp_path: Path, stream: np.ndarray | bytes | None, words: str) -> None:
    path = tmp_path / "stream.npy"
    if isinstance(stream, bytes):
        path.write_bytes(stream)
    elif stream is not None:
        np.save(path, stream)
    with pytest.raises(StackError, match=words):
        replay(registry.path("grid"), path, 1e4)
    with pytest.raises(StackError, match="--arl is 0"):
        replay(registry.path("grid"), path, 0.0)
    with pytest.raises(StackError, match="--arl is 'moth'; expected a number of samples"):
        replay(registry.path("grid"), path, "moth")
