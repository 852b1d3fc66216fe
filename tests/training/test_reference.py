"""References are built and built again: what changed is said, what did not is not. Whatever file the data come from, it is one."""

import gzip
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy import ndarray
from PIL import Image

from training.bundle import Reference, read_arrays
from training.data import DATASETS, Dataset
from training.reference import build, latest, moved, words
from training.sources import open_dataset

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

    with np.load(same.path / "reference.npz") as arrays:
        seen = arrays["cell_share"][:-1] / arrays["cell_share"][:-1].sum()
    shutil.copytree(tmp_path / "digits", tmp_path / "blind")
    blind = build(Dataset("digits", digits.samples, 10), "blind", "digits", tmp_path)
    assert [s["before"] for s in blind.changes["shares"].values()] == pytest.approx(seen, abs=1e-3)  # not those of the labels

    few = (digits.labels != 3) & ((digits.labels != 8) | (np.arange(1797) % 5 == 0))  # 3 is gone, four fifths of 8, pixels are dimmer
    kept, names = digits.labels[few], tuple(c for c in digits.classes if c != "3")
    changed = Dataset("digits", (digits.samples[few] * 0.7).astype(np.uint8), 9, kept - (kept > 3), names)
    again = build(changed, "digits", "digits", tmp_path)
    assert latest(tmp_path / "digits").about == again.about and again.path.name == "v3"
    assert again.changes["classes_gone"] == ["3"] and again.changes["rows"] == [1797, len(kept)]
    assert again.changes["shares"]["8"]["difference_high"] < 0 and again.changes["features"]["moved"]
    said = "\n".join(words(again.about))
    assert "classes that are gone: 3" in said and "share of 8" in said and "features moved" in said


def _idx(array: ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def _png(pixels: ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def as_npz(root: Path, x: ndarray, y: ndarray) -> Path:
    np.savez(root / "digits.npz", x=x, y=y)
    return root / "digits.npz"


def as_zipped_idx(root: Path, x: ndarray, y: ndarray) -> Path:
    (root / "digits").mkdir()
    for name, array in (("images-idx3", x), ("labels-idx1", y)):
        (root / "digits" / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(_idx(array)))
    return root / "digits"


def as_folder(root: Path, x: ndarray, y: ndarray) -> Path:
    for i, (pixels, k) in enumerate(zip(x, y, strict=True)):
        path = root / "digits" / str(k) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(pixels))
    return root / "digits"


def as_parquet_of_images(root: Path, x: ndarray, y: ndarray) -> Path:
    pq.write_table(pa.table({"image": [{"bytes": _png(pixels), "path": None} for pixels in x], "label": y}), root / "digits.parquet")
    return root / "digits.parquet"


def as_npz_of_vectors(root: Path, x: ndarray, y: ndarray) -> Path:
    return as_npz(root, x.reshape(len(x), -1).astype(np.float32), y)


def as_parquet_of_numbers(root: Path, x: ndarray, y: ndarray) -> Path:
    vectors = x.reshape(len(x), -1).astype(np.float32)
    columns = {f"p{j:02}": vectors[:, j] for j in range(32)} | {"rest": vectors[:, 32:].tolist()}
    pq.write_table(pa.table(columns | {"label": y}), root / "digits.parquet")
    return root / "digits.parquet"


def as_npz_without_labels(root: Path, x: ndarray, y: ndarray) -> Path:
    np.savez(root / "digits.npz", x=x)
    return root / "digits.npz"


def as_npy(root: Path, x: ndarray, y: ndarray) -> Path:
    np.save(root / "digits.npy", x)
    return root / "digits.npy"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plain", "others", "modes"),
    [
        (as_npz, (as_zipped_idx, as_folder, as_parquet_of_images), 10),
        (as_npz_of_vectors, (as_parquet_of_numbers,), 10),
        (as_npz_without_labels, (as_npy,), 20),
    ],
)
def test_a_reference_is_the_same_from_every_kind_of_file(
    plain: Callable[..., Path], others: tuple[Callable[..., Path], ...], modes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same digits, written down in every way that is read: shares, moments and feature points are those from npz."""
    monkeypatch.setattr("training.features.STEPS", 200)  # an eye that is half trained is as good here
    digits = DATASETS["digits"]()
    order = np.argsort(digits.labels, kind="stable")[::3]  # by class, as folders are read
    x, y = digits.samples[order, :, :, 0], digits.labels[order]

    def built(write: Callable[..., Path]) -> tuple[Reference, dict[str, int]]:
        root = tmp_path / write.__name__
        root.mkdir()
        said: list[str] = []
        path = write(root, x, y)
        made = build(open_dataset(str(path), cache=root / "cache", say=said.append), "digits", str(path), root / "references")
        assert len(said) == 1 and said[0].startswith(f"read     {len(x):,} samples")
        return read_arrays(Reference, made.path / "reference.npz"), made.about["counts"]

    wanted, counts = built(plain)
    assert len(counts) == modes and wanted.count == sum(counts.values()) == len(x) == len(wanted.train_points) + len(wanted.held_out_points)
    assert modes == 20 or list(counts.values()) == np.bincount(y).tolist()
    for write in others:
        found, theirs = built(write)
        assert theirs == counts, write.__name__
        np.testing.assert_array_equal(found.cell_share, wanted.cell_share)
        for name in ("train_points", "held_out_points", "feature_mean", "feature_cov"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4, err_msg=f"{write.__name__}: {name}")
