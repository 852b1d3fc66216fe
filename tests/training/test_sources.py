import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training.data import DataError
from training.sources import READERS, as_served, find, label, open_dataset

rng = np.random.default_rng(0)


def read(path):
    with open(path, "rb") as file:
        chunks = list(READERS[path.suffix](file))
    labels = [y for _, y, *_ in chunks if y is not None]
    return np.concatenate([x for x, *_ in chunks]), np.concatenate(labels) if labels else None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(["u1", "<i4", ">f4", "<f8"]))
def test_npy_gives_back_what_was_saved(shape, dtype):
    array, file = rng.integers(100, size=shape).astype(dtype), io.BytesIO()
    np.save(file, array)
    file.seek(0)
    np.testing.assert_array_equal(np.concatenate([x for x, *_ in READERS[".npy"](file)]), array)


def test_large_arrays_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("training.sources.CHUNK", 1000)
    x, y = rng.integers(256, size=(300, 4, 4), dtype=np.uint8), np.arange(300) % 7
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with open(tmp_path / "a.npz", "rb") as file:
        assert max(part.nbytes for part, *_ in READERS[".npz"](file)) <= 1000
    found, labels = read(tmp_path / "a.npz")
    np.testing.assert_array_equal(found, x)
    np.testing.assert_array_equal(labels, y)


def test_parquet_of_numbers_and_of_images(tmp_path):
    x = rng.standard_normal((1500, 3))
    pq.write_table(pa.table({"a": x[:, 0], "label": ["odd", "even"] * 750, "rest": x[:, 1:].tolist()}), tmp_path / "t.parquet")
    found, labels = read(tmp_path / "t.parquet")
    np.testing.assert_allclose(found, x)
    assert labels[:2].tolist() == ["odd", "even"]
    encoded = io.BytesIO()
    Image.fromarray(np.full((6, 5), 7, np.uint8)).save(encoded, "png")
    pq.write_table(pa.table({"image": [{"bytes": encoded.getvalue(), "path": "x"}] * 3, "y": [0, 1, 2]}), tmp_path / "i.parquet")
    found, labels = read(tmp_path / "i.parquet")
    assert found.shape == (3, 6, 5, 1) and (found == 7).all() and labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (np.array([[1.0, 2.0], [np.nan, 1.0]]), "1 of 2 samples hold NaN or infinity, the first in row 1"),
        (np.full((2, 2), 1e300), "NaN or infinity"),
        (np.where(np.arange(48).reshape(3, 4, 4) == 40, np.nan, 7.0), "1 of 3 samples hold NaN or infinity, the first in row 2"),
        (np.full((2, 4, 4), 0.5), "pixels are float64 from 0.5 to 0.5; uint8 from 0 to 255"),
        (np.full((2, 4, 4), 300), "pixels are int64 from 300 to 300"),
        (np.zeros((2, 3, 28, 28), np.uint8), r"uint8 \[2, 3, 28, 28\]; channels come last"),
        (np.zeros((2, 2, 2, 2, 2)), "images are uint8"),
        (np.array([["a"]]), "images are uint8"),
        (np.zeros((300, 0)), r"samples are float64 \[300, 0\]; images are uint8 \[n, h, w, c\] and vectors float32 \[n, d\]"),
        (np.zeros((300, 0, 28), np.uint8), r"samples are uint8 \[300, 0, 28\]"),
    ],
)
def test_what_is_neither_images_nor_vectors_is_refused(found, words):
    with pytest.raises(ValueError, match=words):
        as_served(found)


def test_what_can_be_served_is_brought_into_form():
    assert as_served(np.zeros((3, 4, 5), np.int64)).shape == (3, 4, 5, 1)
    assert as_served(np.zeros(3)).dtype == np.float32 and as_served(np.zeros(3)).shape == (3, 1)


def test_a_model_gets_a_name_from_the_path():
    assert label("s3://bucket/My faces.v2.npz") == "My-faces" and label("digits") == "digits" and label("/data/x/") == "x"


def test_unknown_file_systems_are_refused():
    with pytest.raises(DataError, match="gopher://x, which cannot be opened"):
        find("gopher://x")


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens what lies at a path below tmp_path without Ray, and returns the data set and what was said of it."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)

    def opened(name, **options):
        said: list[str] = []
        cache = tmp_path / "cache" / str(len(list(tmp_path.glob("cache/*"))))
        return open_dataset(str(tmp_path / name), cache=cache, say=said.append, **options), said[:-1]  # the last is "read ..."

    return opened


X = rng.standard_normal((120, 2)).astype(np.float32)
Y = np.arange(120) % 3


@pytest.mark.parametrize("samples", ["x", "samples", "images", "data", "x_train", "x_test"])
@pytest.mark.parametrize("labels", ["y", "labels", "label"])
def test_any_name_of_samples_goes_with_any_name_of_labels(samples, labels, tmp_path, opened):
    np.savez(tmp_path / "a.npz", **{samples: X, labels: Y})
    dataset, said = opened("a.npz")
    by_content = {x.tobytes(): int(y) for x, y in zip(X, Y, strict=True)}
    assert dataset.classes == ("0", "1", "2") and [by_content[x.tobytes()] for x in dataset.samples] == dataset.labels.tolist()
    assert not said


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (("y",), "a.npz: it holds labels and no samples"),
        (("label",), "it holds labels and no samples"),
        (("y_train", "y_test"), "it holds labels and no samples"),
        (("labels", "meta"), "it holds labels, meta; samples are looked for under x, samples"),
        (("x", "data", "y"), "it holds x, data, y, and which of them are meant is not clear; give one array of samples and"),
        (("x", "y", "label"), "it holds x, y, label, and which"),
        (("x", "x_train", "x_test"), "it holds x, x_train, x_test, and which"),
        (("x_train", "x_test", "y_test"), "it holds x_train, x_test, y_test, and which"),
        (("x_train", "y_test"), "it holds x_train, y_test, and which"),
    ],
)
def test_arrays_that_allow_of_two_readings_are_refused(arrays, words, tmp_path, opened):
    np.savez(tmp_path / "a.npz", **{name: X if name[0] in "xd" else Y for name in arrays})
    with pytest.raises(DataError, match=words):
        opened("a.npz")


def test_training_and_test_parts_are_read_both(tmp_path, opened):
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X, y_test=Y[:, None])  # a column of labels is as good
    dataset, said = opened("a.npz")
    assert len(dataset.samples) == 240 and np.bincount(dataset.labels).tolist() == [80, 80, 80] and not said


def test_what_is_left_out_of_a_file_is_said(tmp_path, opened):
    np.savez(tmp_path / "a.npz", x=X, y=Y, meta=np.arange(3), id=np.arange(120))
    assert opened("a.npz")[1] == [f"left out arrays id, meta of {tmp_path / 'a.npz'}"]
    encoded = [picture(tmp_path / f"{k}").read_bytes() for k in range(100)]
    pq.write_table(pa.table({"image": encoded, "id": range(100), "label": Y[:100]}), tmp_path / "a.parquet")
    assert opened("a.parquet")[1] == [f"left out columns id of {tmp_path / 'a.parquet'}"]


@pytest.mark.parametrize(
    ("columns", "taken", "dim"),
    [
        ({"x": X[:, 0], "y": X[:, 1]}, "", 2),
        ({"x": X[:, 0], "y": Y}, "", 2),  # a point of the plane, though whole numbers could be classes
        ({"x": X[:, 0], "y": Y, "label": Y}, ", labels from column label", 2),
        ({"x": X.tolist(), "y": Y}, ", labels from column y", 2),
        ({"a": X[:, 0], "y": Y}, ", labels from column y", 1),
    ],
)
def test_a_column_y_is_a_coordinate_beside_x_and_else_the_labels(columns, taken, dim, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    dataset = open_dataset(str(tmp_path / "t.parquet"), cache=tmp_path / "cache")
    assert dataset.shape == (dim,) and len(dataset.classes) == (3 if taken else 0)
    assert capsys.readouterr().out == f"read     120 samples of vectors of {dim} from 1 files{taken}" + "\n"


def test_labels_that_are_no_classes_are_named(tmp_path, opened):
    pq.write_table(pa.table({"a": X[:, 0], "y": X[:, 1]}), tmp_path / "t.parquet")
    np.savez(tmp_path / "a.npz", x=X, y=X[:, 1])
    for name, where in (("t.parquet", "column y"), ("a.npz", "array y")):
        with pytest.raises(DataError, match=f"has 120 labels of float\\d+ in {where}; 2 to 1,000 classes, .* are expected; give what are no labels another name"):
            opened(name)


def test_labels_are_one_a_sample(tmp_path, opened):
    np.savez(tmp_path / "a.npz", x=X, y=np.eye(3, dtype=int)[Y])
    with pytest.raises(DataError, match=r"a\.npz: labels are int64 \[n, 3\]; one whole number or word a sample is expected"):
        opened("a.npz")


def test_a_first_file_that_turns_out_bad_late_is_no_measure_of_the_others(tmp_path, opened):
    (tmp_path / "tables").mkdir()
    many = np.tile(X, (20, 1))
    many[-1] = np.nan
    pq.write_table(pa.table({"x": many[:, 0], "y": many[:, 1], "label": np.arange(2400) % 3}), tmp_path / "tables" / "a.parquet")
    pq.write_table(pa.table({"x": X[:, 0], "y": X[:, 1], "label": Y}), tmp_path / "tables" / "b.parquet")
    with pytest.raises(DataError, match=r"(?s)1 of 2 files.*a\.parquet"):
        opened("tables")
    dataset, said = opened("tables", skip_bad_files=True)
    assert len(dataset.samples) == 120 and len(said) == 1 and "a.parquet" in said[0]


@pytest.mark.parametrize("same", [np.full((200, 2), 0.5), np.full((200, 4, 4), 7, np.uint8)])
def test_data_that_never_vary_are_refused(same, tmp_path, opened):
    np.save(tmp_path / "a.npy", same)
    with pytest.raises(DataError, match=r"a\.npy, in which all 200 samples are equal"):
        opened("a.npy")
    same.reshape(200, -1)[199, 1] += 1  # one is different, in one coordinate
    np.save(tmp_path / "a.npy", same)
    assert len(opened("a.npy")[0].samples) == 200


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (5e6 + rng.standard_normal(300), r"from 49999\d\d\.\d+ to 50000\d\d\.\d+, and .* round it by up to 0\.\d+; subtract an offset such as 49999"),
        (2**25 + np.arange(300), "from 33554432 to 33554731, and .* round it by up to 2; subtract an offset such as 33554432 from it"),
        (5e8 + np.arange(300) / 100, "from 500000000 to 500000003, and"),  # of which float32 keeps one value
        (1e-50 * np.arange(300), "from 0 to 2.99e-48, and .* round it by up to 2.99e-48; .* or scale what is below 1e-38"),
        (np.linspace(0, 1e9, 300), ""),  # each value by 32 at most
        (2**25 + 4 * np.arange(300), ""),
        (np.full(300, 0.1), ""),
    ],
)
def test_vectors_that_float32_would_coarsen_are_refused(column, words, tmp_path, opened, monkeypatch):
    monkeypatch.setattr("training.sources.CHUNK", 1)  # a row: how far the values reach only all of them show
    (tmp_path / "tables").mkdir()
    bad = np.stack([np.arange(300.0), 1e12 * np.arange(300)], axis=1)  # reaches far, and is not counted
    bad[299] = np.nan
    np.save(tmp_path / "tables" / "a.npy", bad)
    np.save(tmp_path / "tables" / "b.npy", np.stack([np.arange(300) % 7, column], axis=1))
    if words:
        with pytest.raises(DataError, match=f"/tables, whose coordinate 1 \\(the first is 0\\) goes {words}"):
            opened("tables", skip_bad_files=True)
    else:
        assert len(opened("tables", skip_bad_files=True)[0].samples) == 300


def test_images_of_0_and_1_are_refused(tmp_path, opened):
    pixels = rng.integers(2, size=(200, 4, 4))
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(DataError, match=r"/a\.npy, whose pixels are 0 and 1; 0 to 255 is expected: multiply them by 255"):
        opened("a.npy")
    np.save(tmp_path / "a.npy", 255 * pixels)
    assert opened("a.npy")[0].samples.max() == 255
    np.save(tmp_path / "a.npy", pixels.reshape(200, -1))
    assert opened("a.npy")[0].samples.dtype == np.float32  # vectors have no range that they should have


def picture(path, suffix="png", frames=1):
    """Random pixels, grey, 6 x 5, written to a file, whose path is returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(rng.integers(256, size=(6, 5), dtype=np.uint8)) for _ in range(frames))
    path = path.with_suffix(f".{suffix}")
    first.save(path, **({"save_all": True, "append_images": rest} if rest else {}))
    return path


@pytest.fixture
def faces(tmp_path):
    """120 pictures in the class folders a and b."""
    for k in range(120):
        picture(tmp_path / "faces" / "ab"[k % 2] / f"{k:03}")
    return tmp_path / "faces"


def test_a_stray_file_among_class_folders_is_named(faces, opened):
    picture(faces / "stray")
    with pytest.raises(DataError, match=r"1 of 121 files cannot be used(.|\n)*stray\.png: it lies beside the class folders a, b; move it into one of them"):
        opened("faces")
    dataset, said = opened("faces", skip_bad_files=True)
    assert len(dataset.samples) == 120 and dataset.classes == ("a", "b") and "stray.png" in said[0] and said[0].startswith("left out")


def test_tiff_and_gif_are_images_of_which_the_first_frame_counts(faces, opened):
    for k in range(5):
        picture(faces / "c" / f"{k}", "tif", frames=2)
    dataset, said = opened("faces")
    assert np.bincount(dataset.labels).tolist() == [60, 60, 5] and dataset.shape == (6, 5, 1)
    assert said == [f"left out all frames but the first of {', '.join(f'{faces}/c/{k}.tif' for k in range(3))} and 2 more"]
    with open(picture(faces / "moving", "gif", frames=2), "rb") as file:
        ((pixels, _, left_out, _),) = READERS[".gif"](file)
    assert pixels.shape == (1, 6, 5, 3) and left_out == "all frames but the first"


def test_files_that_no_reader_takes_are_refused_unless_they_are_no_data(faces, opened):
    for name in ("README.md", "LICENSE", ".DS_Store", "a/labels.csv", "b/.thumbnails/000.png"):
        (faces / name).parent.mkdir(exist_ok=True)
        (faces / name).write_text("no picture")
    dataset, said = opened("faces")
    assert len(dataset.samples) == 120 and dataset.classes == ("a", "b")
    assert said == [f"left out files that are no data: {faces}/.DS_Store, {faces}/LICENSE, {faces}/README.md and 2 more"]
    (faces / "a" / "x.heic").write_text("a picture")
    with pytest.raises(DataError, match=r"1 of 121 files cannot be used(.|\n)*x\.heic: files that end in \.heic are not read; \.npz, .* are"):
        opened("faces")
    dataset, said = opened("faces", skip_bad_files=True)
    assert len(dataset.samples) == 120 and any("x.heic" in words for words in said)


def test_classes_without_images_are_named(faces, opened):
    (faces / "c" / "deeper").mkdir(parents=True)
    for folder in ("a/deeper", ".thumbnails", "notes"):  # no classes, or said to be left out
        (faces / folder).mkdir()
    (faces / "notes" / "README.md").write_text("no picture")
    with pytest.raises(DataError, match=r"/faces, whose folders are classes, of which \S+/faces/c holds no file; put images into it, or remove it"):
        find(str(faces))
    (faces / "d").mkdir()
    (faces / "d" / ".gitkeep").write_text("")
    with pytest.raises(DataError, match=r"of which \S+/faces/c, \S+/faces/d hold no file; put images into them, or remove them, or go on with --skip-bad-files"):
        opened("faces")
    assert opened("faces", skip_bad_files=True)[0].classes == ("a", "b")
    picture(faces / "c" / "000")
    picture(faces / "d" / "000")
    dataset, said = opened("faces")
    assert dataset.classes == ("a", "b", "c", "d") and len(said) == 1


def test_a_flat_folder_may_have_empty_ones_in_it(tmp_path, opened):
    for k in range(100):
        picture(tmp_path / "flat" / f"{k}")
    (tmp_path / "flat" / "empty").mkdir()
    dataset, said = opened("flat")
    assert dataset.labels is None and len(dataset.samples) == 100 and not said


def test_labels_without_their_images_are_named(tmp_path, opened):
    pixels = rng.integers(256, size=(120, 6, 5), dtype=np.uint8)
    for name, array in (("a-images-idx3", pixels), ("a-labels-idx1", Y), ("b-labels-idx1", Y)):
        head = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (tmp_path / "idx").mkdir(exist_ok=True)
        (tmp_path / "idx" / f"{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    with pytest.raises(DataError, match=r"1 of 2 files cannot be used(.|\n)*b-labels-idx1-ubyte: it holds labels, and no file of images lies beside it"):
        opened("idx")
    (tmp_path / "idx" / "b-labels-idx1-ubyte").unlink()
    dataset, said = opened("idx")
    assert np.bincount(dataset.labels).tolist() == [40, 40, 40] and not said


def test_files_without_samples_are_named(tmp_path, opened):
    (tmp_path / "some").mkdir()
    for name, rows in (("a", X), ("b", X[:0])):
        np.save(tmp_path / "some" / f"{name}.npy", rows)
        np.savez(tmp_path / "some" / f"{name}.npz", x=rows)
        pq.write_table(pa.table({"a": rows[:, 0], "b": rows[:, 1]}), tmp_path / "some" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"3 of 6 files cannot be used(.|\n)*/b\.npy: it holds no samples(.|\n)*/b\.npz: it holds(.|\n)*/b\.parquet: it holds"):
        opened("some")
    dataset, said = opened("some", skip_bad_files=True)
    assert len(dataset.samples) == 360 and said == [f"left out {tmp_path}/some/b.{kind}: it holds no samples" for kind in ("npy", "npz", "parquet")]
    (tmp_path / "idx").mkdir()
    for name, head in (("images-idx3", b"\0\0\x08\3" + b"\0" * 8 + b"\0\0\0\6"), ("labels-idx1", b"\0\0\x08\1" + b"\0" * 4)):
        (tmp_path / "idx" / f"{name}-ubyte").write_bytes(head)
    with pytest.raises(DataError, match="images-idx3-ubyte: it holds no samples"):
        opened("idx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning")  # Ray Data warns of its own doing
def test_data_of_ones_own_go_through_ray(tmp_path, ray):
    said: list[str] = []

    def opened(name, **options):
        return open_dataset(str(tmp_path / name), cache=tmp_path / "cache" / name, say=said.append, **options)

    faces = tmp_path / "faces"
    pixels = rng.integers(256, size=(120, 6, 5), dtype=np.uint8)
    for k, image in enumerate(pixels):
        path = faces / ("cat" if k % 3 else "dog") / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    dataset = opened("faces")
    assert dataset.samples.shape == (120, 6, 5, 1) and dataset.classes == ("cat", "dog") and dataset.trained == 96
    by_content = {image.tobytes(): int(k % 3 == 0) for k, image in enumerate(pixels)}
    assert [by_content[image.tobytes()] for image in dataset.samples] == dataset.labels.tolist()
    assert dataset.samples[:2].tobytes() != pixels[:2].tobytes() and not list(tmp_path.rglob("samples.raw"))
    (faces / "cat" / "001.png").unlink()  # what was read once is not read again
    assert np.array_equal(opened("faces").samples, dataset.samples)

    (faces / "cat" / "broken.png").write_bytes(b"\x89PNG but no more")
    Image.fromarray(pixels[0, :4]).save(faces / "dog" / "small.png")
    with pytest.raises(DataError, match=r"2 of 121 files cannot be used(.|\n)*broken\.png: (.|\n)*small\.png: holds images of 4 x 5 x 1; .*holds images of 6 x 5 x 1"):
        open_dataset(str(faces), cache=tmp_path / "again", say=said.append)
    (faces / "README.md").write_text("no picture")
    kept = open_dataset(str(faces), cache=tmp_path / "again", skip_bad_files=True, say=said.append)
    assert len(kept.samples) == 119 and [w for w in said if "left out" in w and "broken.png" in w]
    assert f"left out files that are no data: {faces}/README.md" in said

    x = rng.standard_normal((150, 2)).astype(np.float32)
    np.save(tmp_path / "v.npy", x)
    unlabelled = opened("v.npy")
    assert unlabelled.labels is None and unlabelled.cells == 7 and np.isclose(unlabelled.samples.sum(), x.sum(), atol=1e-3)
    np.savez(tmp_path / "more.npz", x=x, meta=x)
    assert len(opened("more.npz").samples) == 150 and f"left out arrays meta of {tmp_path / 'more.npz'}" in said
    x[7, 1] = np.inf
    np.save(tmp_path / "bad.npy", x)
    late = np.zeros((600_000, 4), np.float32)  # more than travels together
    late[540_007, 2] = np.nan
    np.save(tmp_path / "late.npy", late)
    np.save(tmp_path / "pixels.npy", np.where(np.isin(np.arange(120), (3, 99))[:, None, None], np.nan, pixels))
    np.save(tmp_path / "one.npy", pixels[:1])
    np.savez(tmp_path / "orphans.npz", x=pixels, y=np.arange(7))
    np.savez(tmp_path / "other.npz", pixels=pixels, more=pixels)
    for name, words in (
        ("bad.npy", "1 of 150 samples hold NaN or infinity, the first in row 7"),
        ("late.npy", "1 of the samples from row 524,288 to 599,999 hold NaN or infinity, the first in row 540,007"),
        ("pixels.npy", "2 of 120 samples hold NaN or infinity, the first in row 3"),
        ("one.npy", "which holds 1 sample; at least 100 are needed"),
        ("orphans.npz", "y holds 7 labels and x 120 samples"),
        ("other.npz", "it holds more, pixels; samples are looked for under x, samples"),
    ):
        with pytest.raises(DataError, match=words):
            opened(name)


MANY_FILES = """
import os, sys
from pathlib import Path
from training import sources
sources.MANY = int(sys.argv[2])
assert "ray" not in sys.modules
before = dict(os.environ)
dataset = sources.open_dataset(sys.argv[1], cache=Path(sys.argv[3]))
assert dict(os.environ) == before
print("ray.data" in sys.modules, "ray" in sys.modules and sys.modules["ray"].is_initialized(), dataset.samples.tobytes().hex())
"""


@pytest.mark.slow
def test_many_files_are_read_through_a_ray_that_is_started_for_them(tmp_path, faces):
    def read(many, cache, **environment):
        command = [sys.executable, "-W", "ignore", "-c", MANY_FILES, faces, many, tmp_path / cache]
        directory, variables = Path(__file__).resolve().parents[2], {**os.environ, **environment}
        done = subprocess.run([*map(str, command)], cwd=directory, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
        *said, _, last = done.stdout.splitlines()  # the one before is "read ..."
        return said, *last.split()

    said, through, running, samples = read(120, "through")
    assert (said, through, running) == ([], "True", "False")  # it is gone
    assert read(121, "here") == ([], "False", "False", samples)
    (said,), through, running, found = read(120, "without", RAY_TMPDIR=str(tmp_path / ("x" * 100)))  # too long for a socket's name
    assert said.startswith("120 files are read one after another, which takes longer: Ray does not start (") and "107 bytes" in said
    assert (through, running, found) == ("False", "False", samples)


LIMITED = """
import pyarrow, pyarrow.parquet, resource, sys
pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve a gigabyte at once
from pathlib import Path
import training.features
from training.export import write_reference
from training.features import fit_eye
from training.sources import open_dataset
training.features.REMEMBERED = 100  # else distances to those fill 64 MB, however few samples there are

def look(name, cache):
    dataset = open_dataset(f"{sys.argv[1]}/{name}", cache=cache)
    assert dataset.scale.shape == (64,)
    if name.endswith(".npy"):  # the other is the same from here on
        write_reference(cache, dataset, fit_eye(dataset, seed=0), keep_points=True)

look("small" + Path(sys.argv[2]).suffix, Path(sys.argv[1], "warm"))  # what the first call keeps
held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + (int(sys.argv[3]) << 20),) * 2)
look(sys.argv[2], Path(sys.argv[1], sys.argv[2] + ".cache"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
def test_data_may_be_larger_than_memory(name, tmp_path):
    """256 MB in a process that may take 128 MB more of its own (it takes some 50, of which the allocator keeps more on some
    machines): the array is written, shuffled, measured and described in pieces."""
    x = rng.standard_normal((1_000_000, 64), np.float32)
    for file, rows in (("small", x[:200]), ("x", x)):
        if name == "x.npy":
            np.save(tmp_path / f"{file}.npy", rows)
        else:
            table = pa.table({f"c{j}": rows[:, j] for j in range(64)})
            pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=20_000, compression="none")

    def opened(limit):
        command = [sys.executable, "-c", LIMITED, tmp_path, name, limit]
        return subprocess.run([*map(str, command)], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=300)

    done = opened(128)
    assert done.returncode == 0, done.stderr[-2000:]
    for left in (tmp_path / f"{name}.cache").iterdir():
        left.unlink()
    assert opened(1).returncode != 0  # the limit is one
