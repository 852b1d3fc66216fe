"""Opens a data set by name, or reads the user's own through Ray Data: npz, npy, IDX, parquet, a folder of images.

    python training/train.py --dataset faces/                  images; labels are the names of subdirectories, where there are any
    python training/train.py --dataset s3://bucket/table.parquet    whatever pyarrow opens

Object storage is found as its own tools find it: S3 by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, AWS_REGION,
and AWS_ENDPOINT_URL where it is not Amazon's; gs:// by GOOGLE_APPLICATION_CREDENTIALS, gs://anonymous@bucket/x without any.
Ray's workers need the same variables: a cluster elsewhere gets them by `ray job submit --runtime-env-json`.

Files stream through Ray's workers into one memory-mapped array, so data may be larger than memory. A file that cannot be used
is named, with the reason, and what is left out of one is said. It knows neither networks nor training.
"""

from __future__ import annotations

import difflib
import gzip
import io
import json
import logging
import mmap
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from numpy import ndarray
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from training.data import CELLS, DATASETS, DataError, Dataset

FEWEST = 100  # samples: a fifth is held out, and the outermost hundredth of that is looked at
CHUNK = 8 << 20  # bytes of samples that travel together
NAMED = 20  # bad files named in an error
COARSE = 1e-4  # of the range of a coordinate: float32 may not round it by more
MANY = 10_000  # files: to read so many one after another takes longer than a Ray takes to start
ROOT = Path(__file__).resolve().parent.parent
SIDE_FILES = {"", ".txt", ".md", ".rst", ".html", ".csv", ".tsv", ".json", ".yaml", ".yml", ".xml", ".ini", ".log", ".db"}  # lie beside data


@runtime_checkable
class Stream(Protocol):
    """An open binary file, of Python or of pyarrow."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, position: int, /) -> int: ...


class Chunk(NamedTuple):
    """Samples as found, [n, ...], and their labels, if any, [n].

    For the words: `left_out`, what of the file is not read, and `taken`, what of it the labels are.
    """

    samples: ndarray
    labels: ndarray | None = None
    left_out: str = ""
    taken: str = ""


def open_dataset(
    name: str,
    *,
    data: str | None = None,
    cache: Path,
    skip_bad_files: bool = False,
    say: Callable[[str], None] = print,
    option: str = "--dataset",
) -> Dataset:
    """The built-in data set called `name`, or what lies at the path or URI `name`, read into the directory `cache` once.

    `data` is where the files of the data sets ON_DISK lie; `option` is what errors call `name`. Raises DataError.
    """
    if name in DATASETS:
        return DATASETS[name](*([data] if data is not None else []))
    if not (cache / "dataset.json").exists():
        _read(name, cache, skip_bad_files=skip_bad_files, say=say, option=option)
    about = json.loads((cache / "dataset.json").read_text())
    labels = np.load(cache / "labels.npy") if about["classes"] else None
    samples = np.load(cache / "samples.npy", mmap_mode="r")
    return Dataset(about["name"], samples, about["cells"], labels, tuple(about["classes"]))


def find(name: str, option: str = "--dataset", *, skip_bad_files: bool = False) -> tuple[FileSystem, str, list[str], list[str]]:
    """The file system, the root, the files at a path or URI that have a reader, and the others, both sorted.

    Hidden files have none. Raises DataError where there is nothing to read, or nothing of a class.
    """
    try:
        system, root = FileSystem.from_uri(name) if "://" in name else (LocalFileSystem(), str(Path(name).absolute()))
        about = system.get_file_info(root)
        inside = system.get_file_info(FileSelector(root, recursive=True)) if about.type == FileType.Directory else [about]
    except (OSError, ValueError) as error:
        remedy = next((f"; {words}" for sign, words in _REMEDIES if sign in str(error)), "") if "://" in name else ""
        raise DataError(f"{option} is {name}, which cannot be opened: {error}{remedy}") from None
    if about.type == FileType.NotFound and "://" in name:
        raise DataError(f"{option} is {name}, and no bucket, folder or object of that name is there; look at its spelling, and at AWS_ENDPOINT_URL where the storage is not Amazon's")
    if about.type == FileType.NotFound:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        words = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"{option} is {name}, neither a path that exists nor built in; {words}built in are {', '.join(DATASETS)}")
    root, paths = root.rstrip("/"), sorted(f.path for f in inside if f.type == FileType.File)
    files = [path for path in paths if _kind(path) in READERS and not _hidden(root, path)]
    if not files:
        raise DataError(f"{option} is {name}, where no file ends in {', '.join(READERS)}")
    if _classes(root, files) and (empty := _empty(root, inside)) and not skip_bad_files:
        one = len(empty) == 1
        words = f"{some(empty)} hold{'s' * one} no file; put images into {'it' if one else 'them'}, or remove {'it' if one else 'them'}, or go on with --skip-bad-files"
        raise DataError(f"{option} is {name}, whose folders are classes, of which {words}")
    return system, root, files, sorted(set(paths) - set(files))


_REMEDIES = (  # what storage answers, and what to do
    ("ACCESS_DENIED", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to an account that may read it"),
    ("NETWORK_CONNECTION", "AWS_ENDPOINT_URL says where the storage is, if it is not Amazon's"),
    ("PERMISSION_DENIED", "set GOOGLE_APPLICATION_CREDENTIALS to a key that may read it"),
)
_IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
_IDX_LABELS = re.compile(r"labels[-.]idx1-ubyte(\.gz)?$")


def _kind(path: str) -> str:
    """The key of READERS for a file: its suffix, or .idx for IDX images, whose names have none."""
    return ".idx" if _IDX_IMAGES.search(path) else Path(path).suffix.lower()


def _inside(root: str, path: str) -> list[str]:
    """The names on the way from the root to a file; none where it is the root."""
    return path.removeprefix(root).split("/")[1:]


def _hidden(root: str, path: str) -> bool:
    return any(part.startswith(".") for part in _inside(root, path))


def label(name: str) -> str:
    """A short name for the data at a path, fit for a model: `/data/My faces.npz` is `My-faces`."""
    last = name.split("?")[0].rstrip("/").split("/")[-1].split(".")[0]
    return name if name in DATASETS else re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_") or "data"


# One reader for each kind of file: an open file gives chunks of samples as they were found --------------------------------------


def npy(file: Stream) -> Iterator[Chunk]:
    for part in _rows(file):
        yield Chunk(part)


def npz(file: Stream) -> Iterator[Chunk]:
    """x (or samples, images, data) with y (or labels, label), or x_train, y_train, x_test, y_test; or one array of any other name."""
    with zipfile.ZipFile(file) as archive:
        names = sorted(member.removesuffix(".npy") for member in archive.namelist())
        given = _paired(names)
        others = [name for name in names if name not in sum(given, ())]
        left_out = f"arrays {', '.join(others)}" if others else ""
        for x, y in given:
            labels = np.lib.format.read_array(archive.open(f"{y}.npy"), allow_pickle=False) if y else None
            done = 0
            for part in _rows(archive.open(f"{x}.npy")):
                yield Chunk(part, None if labels is None else labels[done : done + len(part)], left_out, f"array {y}" if y else "")
                done += len(part)
            if labels is not None and len(labels) != done:
                raise ValueError(f"{y} holds {len(labels):,} labels and {x} {done:,} samples")


_SAMPLES = "x", "samples", "images", "data", "x_train", "x_test"
_LABELS = "y", "labels", "label", "y_train", "y_test"


def _paired(names: list[str]) -> list[tuple[str, str]]:
    """Arrays of samples, each with that of its labels or "". Raises ValueError where names allow of two readings, or of none."""
    samples, labels = (tuple(name for name in known if name in names) for known in (_SAMPLES, _LABELS))
    looked_for = f"samples are looked for under {', '.join(_SAMPLES)}"
    if labels and set(names) == set(labels):
        raise ValueError(f"it holds labels and no samples; {looked_for}")
    if not samples and len(names) == 1:
        return [(names[0], "")]
    if not samples:
        raise ValueError(f"it holds {', '.join(names)}; {looked_for}")
    if samples == ("x_train", "x_test") and labels in ((), ("y_train", "y_test")):
        return list(zip(samples, labels or ("", ""), strict=True))
    crossed = samples + labels in (("x_train", "y_test"), ("x_test", "y_train"))
    if len(samples) > 1 or len(labels) > 1 or crossed:
        wanted = "give one array of samples and at most one of labels, or x_train, y_train, x_test and y_test"
        raise ValueError(f"it holds {', '.join(samples + labels)}, and which of them are meant is not clear; {wanted}")
    return [(samples[0], labels[0] if labels else "")]


def _rows(file: Stream) -> Iterator[Shaped[ndarray, "n ..."]]:
    """The array of an .npy stream, a few rows at a time."""
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"its npy format is {version}, (1, 0) or (2, 0) is expected")
    shape, by_column, dtype = header(file)
    if dtype.hasobject or not shape or by_column and len(shape) > 1:
        raise ValueError(f"its array is {dtype} {shape}{' by column' * by_column}; numbers, one sample a row, are expected")
    yield from _pieces(file, shape, dtype)


def _pieces(file: Stream, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Shaped[ndarray, "n ..."]]:
    """The values that follow a header."""
    width = dtype.itemsize * int(np.prod(shape[1:]))
    step = max(1, CHUNK // max(1, width))
    for first in range(0, shape[0], step):
        count = min(step, shape[0] - first)
        raw = file.read(count * width)
        if len(raw) < count * width:
            raise ValueError(f"it is cut off: {shape[0]:,} rows are announced, and row {first + len(raw) // width:,} is missing")
        yield np.frombuffer(raw, dtype).reshape(count, *shape[1:])


def parquet(file: Stream) -> Iterator[Chunk]:
    """A column `image` of encoded images, or else all numeric columns as coordinates; a column of labels, if any.

    It is called `label`, `labels` or `y`; but `y` beside numbers `x` is a coordinate.
    """
    import pyarrow.parquet
    from pyarrow.types import is_nested

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
        names = batch.schema.names
        of_plane = "x" in names and not is_nested(batch["x"].type)
        named = next((n for n in ("label", "labels", "y") if n in names and not (n == "y" and of_plane)), None)
        taken = f"column {named}" if named is not None else ""
        others = [n for n in names if n not in ("image", named)]
        labels = None
        if named is not None:
            if batch[named].null_count:
                raise ValueError(f"column {named} misses {batch[named].null_count} labels")
            labels = np.asarray(batch[named].to_pylist())
        if "image" in names:
            encoded = [v["bytes"] if isinstance(v, dict) else v for v in batch["image"].to_pylist()]
            left_out = f"columns {', '.join(others)}" if others else ""
            for i, raw in enumerate(encoded):
                for found in image(io.BytesIO(raw)):
                    yield Chunk(found.samples, None if labels is None else labels[i : i + 1], left_out, taken)
            continue
        columns = {n: _numbers(batch[n]) for n in others}
        wrong = [n for n, c in columns.items() if c.dtype.kind not in "iuf"]
        if wrong or not columns:
            raise ValueError(f"columns {', '.join(wrong) or 'with samples'} are no numbers; give coordinates, or encoded images in `image`")
        yield Chunk(np.concatenate([c[:, None] if c.ndim == 1 else c for c in columns.values()], axis=1), labels, taken=taken)


def _numbers(column: Any) -> Shaped[ndarray, "n ..."]:
    """A column as an array, without Python's numbers in between: lists of one length become rows, a missing number NaN."""
    import pyarrow.compute as pc
    from pyarrow.types import is_fixed_size_list, is_large_list, is_list

    if not (is_list(column.type) or is_large_list(column.type) or is_fixed_size_list(column.type)):
        return column.to_numpy(zero_copy_only=False)
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] is None:
        raise ValueError(f"a column holds lists of {', '.join(map(str, lengths))} numbers; one length is expected")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def idx(file: Stream) -> Iterator[Chunk]:
    """MNIST's format, gzipped or not: two zero bytes, the code of unsigned bytes, the number of axes, each axis in big-endian."""
    values, shape = _idx(file)
    for part in _pieces(values, shape, np.dtype(np.uint8)):
        yield Chunk(part)


def _idx(file: Stream) -> tuple[Stream, tuple[int, ...]]:
    """The values and the shape of an IDX file."""
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    values = gzip.GzipFile(fileobj=file) if zipped else file
    head = values.read(4)
    if head[:3] != b"\0\0\x08" or not head[3]:
        raise ValueError(f"it begins with {head.hex()}, no IDX file of unsigned bytes does")
    return values, tuple(np.frombuffer(values.read(4 * head[3]), ">u4").tolist())


def image(file: Stream) -> Iterator[Chunk]:
    """Grey images stay grey [1, h, w, 1], all others, palettes too, become RGB [1, h, w, 3]. Transparency is dropped."""
    from PIL import Image

    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are {opened.mode}; 8 bits a channel are expected")
        left_out = "all frames but the first" if getattr(opened, "n_frames", 1) > 1 else ""
        pixels = np.asarray(opened.convert("L" if opened.mode in ("1", "L", "LA") else "RGB"))
    yield Chunk(np.atleast_3d(pixels)[None], left_out=left_out)


def _check_finite(found: Shaped[ndarray, "n ..."], first: int) -> None:
    if found.dtype.kind != "f":
        return
    bad = ~np.isfinite(found.reshape(len(found), -1)).all(axis=1)
    if bad.any():
        rows = f"{len(bad):,} samples" if not first else f"the samples from row {first:,} to {first + len(bad) - 1:,}"
        raise ValueError(f"{bad.sum():,} of {rows} hold NaN or infinity, the first in row {first + bad.argmax():,}")


READERS: dict[str, Callable[[Stream], Iterator[Chunk]]] = {
    ".npz": npz, ".npy": npy, ".idx": idx, ".parquet": parquet,
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), image),
}  # fmt: skip


def as_served(found: Shaped[ndarray, "n ..."], first: int = 0) -> Shaped[ndarray, "n ..."]:
    """uint8 [n, h, w, c] or float32 [n, d]. Raises ValueError where what was found is neither images nor vectors.

    `first`: which row of its file is the first one here, for the words.
    """
    form = f"{found.dtype} [{', '.join(map(str, found.shape))}]"
    if found.dtype.kind not in "iuf" or not 1 <= found.ndim <= 4 or 0 in found.shape[1:]:
        raise ValueError(f"samples are {form}; images are uint8 [n, h, w, c] and vectors float32 [n, d]")
    if found.ndim <= 2:
        with np.errstate(over="ignore"):
            vectors = found.reshape(len(found), -1).astype(np.float32)
        _check_finite(vectors, first)
        return vectors
    _check_finite(found, first)
    low, high = found.min(), found.max()
    if found.dtype.kind == "f" or low < 0 or high > 255:
        raise ValueError(f"pixels are {found.dtype} from {low:.4g} to {high:.4g}; uint8 from 0 to 255 is expected")
    images = found.astype(np.uint8).reshape(*found.shape[:3], -1)
    if images.shape[3] > 4:
        raise ValueError(f"images are {form}; channels come last, and at most 4 are expected")
    return images


def extent(found: Shaped[ndarray, "n ..."], served: Shaped[ndarray, "n ..."]) -> Float64[ndarray, "3 d"]:
    """By how much serving rounds at most, the least value negated, and the greatest: of each coordinate of vectors, of all pixels together.

    So the larger of two extents is that of both.
    """
    width = served.shape[1] if served.ndim == 2 else 1
    values, kept = (np.ascontiguousarray(x.reshape(-1, width).T) for x in (found, served))  # few long rows are faster than many short ones
    off = np.abs(values - kept).max(axis=1)
    return np.stack([off.astype(np.float64), -values.min(axis=1).astype(np.float64), values.max(axis=1).astype(np.float64)])


# Through Ray Data to disk ----------------------------------------------------------------------------------------------------


def _read(name: str, cache: Path, *, skip_bad_files: bool, say: Callable[[str], None], option: str) -> None:
    """Write samples.npy and labels.npy in a random order, and then dataset.json."""
    system, root, files, others = find(name, option, skip_bad_files=skip_bad_files)
    beside, bad = _unread(root, files, others)
    total = len(files) + len(bad)
    items, astray = _in_classes(root, files)
    bad |= astray

    cache.mkdir(parents=True, exist_ok=True)
    left_out: dict[str, dict[str, None]] = {}  # what, and the files of which it is
    labels: list[tuple[ndarray, str]] = []  # and what of the file they are
    first: tuple[ndarray, str] | None = None
    count, reach = 0, np.float64(-np.inf)  # reach: the extent of all
    current, before = "", (0, 0, 0, reach)  # the file being read, and what had been kept when it began
    with open(cache / "samples.raw", "wb") as raw, closing(_rows_of(items, system, say)) as rows:
        for row in rows:
            file, samples = row["file"], _unpacked(row["samples"])
            if file != current:
                current, before = file, (raw.tell(), count, len(labels), reach)
            if file in bad:
                continue
            if not row["problem"] and first is not None:
                if (form := _form(samples)) != (expected := _form(first[0])):
                    row["problem"] = f"holds {form}; {first[1]} holds {expected}"
                elif bool(row["labels"]) != bool(labels):
                    row["problem"] = f"{'has' if row['labels'] else 'lacks'} labels, unlike {first[1]}"
            if row["problem"]:
                bad[file] = row["problem"]
                position, count, kept, reach = before  # a file counts as a whole or not at all
                raw.seek(position)
                raw.truncate()
                del labels[kept:]
                first = None if count == 0 else first  # the others are not to be like a file that does not count
                continue
            first = first or (samples[:1], file)
            raw.write(samples.tobytes())
            count, reach = count + len(samples), np.maximum(reach, _unpacked(row["extent"]))
            labels += [(_unpacked(row["labels"]), row["taken"])] if row["labels"] else []
            if row["left_out"]:
                left_out.setdefault(row["left_out"], {})[file] = None
    if bad and not (skip_bad_files and count):
        listed = "".join(f"\n  {file}: {why}" for file, why in list(bad.items())[:NAMED])
        more = f"\n  and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
        raise DataError(f"{len(bad):,} of {total:,} files cannot be used; mend them, or leave them out with --skip-bad-files:{listed}{more}")
    for file, why in bad.items():
        say(f"left out {file}: {why}")
    for what, of in left_out.items():
        if kept := [file for file in of if file not in bad]:
            say(f"left out {what} of {some(kept)}")
    if beside:
        say(f"left out files that are no data: {some(beside)}")
    if count < FEWEST:
        raise DataError(f"{option} is {name}, which holds {count} sample{'s' * (count != 1)}; at least {FEWEST} are needed")
    rounded, low, high = reach * [[1], [-1], [1]]
    if (coarse := (low < high) & (rounded > COARSE * (high - low))).any():  # one that never varies has nothing to lose
        j = int(coarse.argmax())
        words = f"{option} is {name}, whose coordinate {j} (the first is 0) goes from {low[j]:.10g} to {high[j]:.10g}"
        remedy = f"subtract an offset such as {low[j]:.10g} from it, or scale what is below 1e-38"
        raise DataError(f"{words}, and float32, in which vectors are served, would round it by up to {rounded[j]:.3g}; {remedy}")
    if first[0].ndim == 4 and high[0] == 1:
        raise DataError(f"{option} is {name}, whose pixels are 0 and 1; 0 to 255 is expected: multiply them by 255")

    order = np.random.default_rng(0).permutation(count)
    found = np.memmap(cache / "samples.raw", first[0].dtype, "r", shape=(count, *first[0].shape[1:]))
    if not _shuffle(found, order, cache / "samples.npy"):
        raise DataError(f"{option} is {name}, in which all {count:,} samples are equal (as {found.dtype}); data that vary are expected")
    (cache / "samples.raw").unlink()
    classes: list[str] = []
    taken = ", ".join(dict.fromkeys(what for _, what in labels if what))
    if labels:
        values, index = np.unique(np.concatenate([part for part, _ in labels]), return_inverse=True)
        if values.dtype.kind not in "iuU" or not 2 <= len(values) <= 1000:
            where, remedy = (f" in {taken}", "; give what are no labels another name") if taken else ("", "")
            raise DataError(f"{name} has {len(values):,} labels of {values.dtype}{where}; 2 to 1,000 classes, as whole numbers or text, are expected{remedy}")
        classes = [str(v) for v in values]
        np.save(cache / "labels.npy", index[order].astype(np.int64))
    cells = len(classes) or min(CELLS, count // 20)
    (cache / "dataset.json").write_text(json.dumps({"name": label(name), "cells": cells, "classes": classes, "source": name}))
    say(f"read     {count:,} samples of {_form(first[0])} from {total - len(bad):,} files" + (f", labels from {taken}" if taken else ""))


def _unread(root: str, files: list[str], others: list[str]) -> tuple[list[str], dict[str, str]]:
    """Of the files that no reader takes: those that are no data, such as a README, and those that may be, with the reason."""
    images = {file.removesuffix(".gz") for file in files}
    beside, bad = [], {}
    for path in others:
        suffix = Path(path).suffix.lower()
        if _IDX_LABELS.search(path):
            folder, _, name = path.removesuffix(".gz").rpartition("/")
            if f"{folder}/{name.replace('labels', 'images').replace('idx1', 'idx3')}" not in images:
                bad[path] = "it holds labels, and no file of images lies beside it"
        elif suffix in SIDE_FILES or _hidden(root, path):
            beside.append(path)
        else:
            bad[path] = f"files that end in {suffix} are not read; {', '.join(READERS)} are"
    return beside, bad


def _classes(root: str, files: list[str]) -> list[str]:
    """The folders right below the root that are classes: those with images in them."""
    return sorted({_inside(root, file)[0] for file in files if _inside(root, file)[1:] and READERS[_kind(file)] is image})


def _empty(root: str, inside: list[FileInfo]) -> list[str]:
    """The paths of those folders in which nothing lies, hidden things aside."""
    seen = [f for f in inside if not _hidden(root, f.path)]
    filled = {_inside(root, f.path)[0] for f in seen if f.type == FileType.File}
    return sorted(f.path for f in seen if f.type == FileType.Directory and _inside(root, f.path)[0] not in filled and not _inside(root, f.path)[1:])


def _in_classes(root: str, files: list[str]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Each file with the class that its folder is, "" where there are none, and the files that lie beside such folders, with the reason."""
    folders = {file: [*_inside(root, file)[:-1], ""][0] for file in files}
    classes = _classes(root, files)
    why = f"it lies beside the class folders {some(classes)}; move it into one of them, or all images into one folder"
    items = [{"file": file, "folder": folder if classes else ""} for file, folder in folders.items() if folder or not classes]
    return items, {file: why for file, folder in folders.items() if classes and not folder}


def some(names: list[str], most: int = 3) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _shuffle(found: Shaped[ndarray, "n ..."], order: Int64[ndarray, "n"], path: Path) -> bool:
    """Write the rows of an array that lies on disk to `path` in this order, in pieces. Whether any of them differ."""
    shuffled, vary = np.lib.format.open_memmap(path, "w+", found.dtype, found.shape), False
    step = max(1, CHUNK // found[0].nbytes)
    for begin in range(0, len(found), step):
        part = found[order[begin : begin + step]]
        shuffled[begin : begin + step] = part
        vary = vary or bool((part != found[0]).any())
        if begin // step % 32 == 31:  # pages that were touched count as this process's memory until they are let go
            shuffled.flush()
            for mapped in (found, shuffled):
                mapped._mmap.madvise(mmap.MADV_DONTNEED)
    shuffled.flush()
    return vary


def _rows_of(items: list[dict[str, str]], system: FileSystem, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Through the Ray that runs; where none does, as when a reference is built, files are read one after another, or, where there are
    many, through one of this machine alone, which is stopped again."""
    imported = sys.modules.get("ray")
    if imported and imported.is_initialized():
        yield from _through_ray(items, system)
        return
    if len(items) >= MANY and not imported:
        before = dict(os.environ)
        # As in train.py: read when Ray is imported, it keeps all of its sockets on 127.0.0.1, which answer only who has the token.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        import ray

        how = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False, "_node_ip_address": "127.0.0.1"}
        try:
            try:
                ray.init("local", runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, **how)
            except Exception as error:  # Ray raises bare ones where it does not come up; it is not needed
                say(f"{len(items):,} files are read one after another, which takes longer: Ray does not start ({error})")
            else:
                yield from _through_ray(items, system)
                return
        finally:
            ray.shutdown()
            os.environ.clear()
            os.environ.update(before)
    yield from _here(items, system)


def _through_ray(items: list[dict[str, str]], system: FileSystem) -> Iterator[dict[str, Any]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports each plan, and that progress bars are off
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    with ray.data.DataContext.current(context):
        stream = ray.data.from_items(items).map_batches(_decoded, fn_kwargs={"system": system}, batch_size=64)
    yield from stream.iter_rows()


def _here(items: list[dict[str, str]], system: FileSystem) -> Iterator[dict[str, Any]]:
    for item in items:
        yield from ({k: v[0] for k, v in row.items()} for row in _decoded({k: np.array([v]) for k, v in item.items()}, system))


def _decoded(files: dict[str, Any], system: FileSystem) -> Iterator[dict[str, list[Any]]]:
    """In a Ray worker: one row for each chunk, or for the problem that a file has."""
    for file, folder in zip(files["file"].tolist(), files["folder"].tolist(), strict=True):
        row: dict[str, Any] = {"file": file, "samples": b"", "labels": b"", "extent": b"", "left_out": "", "taken": "", "problem": ""}
        try:
            beside, done = _beside(system, file), 0  # done: rows of the file
            with system.open_input_file(file) as opened:
                for samples, labels, left_out, taken in READERS[_kind(file)](opened):
                    if folder:
                        labels, taken = np.full(len(samples), folder), ""
                    if beside is not None:
                        labels = beside[done : done + len(samples)]
                    if labels is not None and labels.shape[1:] not in ((), (1,)):
                        form = f"{labels.dtype} [n, {', '.join(map(str, labels.shape[1:]))}]"
                        raise ValueError(f"labels are {form}; one whole number or word a sample is expected")
                    packed = b"" if labels is None else _packed(labels.reshape(-1))
                    served = as_served(samples, done)
                    chunk = {"samples": _packed(served), "labels": packed, "extent": _packed(extent(samples, served))}
                    yield {k: [v] for k, v in (row | chunk | {"left_out": left_out, "taken": taken}).items()}
                    done += len(samples)
            if not done:
                raise ValueError("it holds no samples")
        except Exception as error:  # whatever a decoder raises on a damaged file
            yield {k: [v] for k, v in (row | {"problem": str(error) or type(error).__name__}).items()}


def _beside(system: FileSystem, file: str) -> ndarray | None:
    """The labels of an IDX file of images, which lie in a file of their own beside it, if any."""
    folder, _, name = file.rpartition("/")
    other = f"{folder}/{name.replace('images', 'labels').replace('idx3', 'idx1')}"
    found = [o for o in (other, f"{other}.gz", other.removesuffix(".gz")) if _IDX_IMAGES.search(name) and system.get_file_info(o).type == FileType.File]
    if not found:
        return None
    with system.open_input_file(file) as opened:
        count = _idx(opened)[1][0]
    with system.open_input_file(found[0]) as opened:
        values, shape = _idx(opened)
        if shape != (count,):
            raise ValueError(f"it holds {count:,} images, and {found[0]} labels of shape {shape}")
        return np.concatenate([np.empty(0, np.uint8), *_pieces(values, shape, np.dtype(np.uint8))])


def _packed(array: ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _unpacked(raw: bytes) -> ndarray:
    return np.load(io.BytesIO(raw), allow_pickle=False) if raw else np.empty(0)


def _form(samples: ndarray) -> str:
    return f"images of {' x '.join(map(str, samples.shape[1:]))}" if samples.ndim == 4 else f"vectors of {samples.shape[1]}"
