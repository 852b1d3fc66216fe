"""Builds the reference of a data set by itself: the eye and what it sees in the real data, and what changed since the last build.

    ganwatch reference build s3://bucket/faces --name faces        .ganwatch/references/faces/v1: features.onnx, reference.npz

features.onnx is a classifier where data are labelled, else principal components and cells. reference.json comes last, so that
its presence means complete. It knows no generator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Float, Int64
from numpy import ndarray
from scipy.stats import ks_2samp

from training.bundle import clopper_pearson
from training.data import DATASETS, DataError, Dataset
from training.export import session, write_reference
from training.features import fit_eye

DELTA = 0.01  # chance that any of the statements of one report about shares, or about features, is wrong
SEEN = 10_000  # held-out samples of the new data that the old eye looks at


@dataclass(frozen=True)
class Built:
    """A reference on disk. `about` is its reference.json."""

    path: Path
    about: dict[str, Any]

    @property
    def changes(self) -> dict[str, Any] | None:
        return self.about["changes"]


def build(dataset: Dataset, name: str, source: str, root: Path, *, seed: int = 0) -> Built:
    """Write the next version below `root`/`name`, compared with the one before. Raises DataError where that one is damaged."""
    before = latest(root / name)
    number = 1 + max((int(p.name[1:]) for p in (root / name).glob("v*") if p.name[1:].isdigit()), default=0)
    directory = root / name / f"v{number}"
    directory.mkdir(parents=True)
    sight = fit_eye(dataset, seed=seed)
    reference = write_reference(directory, dataset, sight, keep_points=True)
    if dataset.labels is None:
        counts = _of_modes(reference.cell_share, reference.count)
    else:
        counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    about = {
        "name": name,
        "version": directory.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "rows": len(dataset.samples),
        "shape": list(dataset.shape),
        "dtype": str(dataset.samples.dtype),
        "labelled": dataset.labels is not None,
        "accuracy": sight.accuracy,
        "scores": list(sight.scores),
        "counts": dict(zip(sight.modes, counts.tolist(), strict=True)),
    }
    about["changes"] = None if before is None else compare(before, about, dataset)
    (directory / "reference.json").write_text(json.dumps(about, indent=2))
    return Built(directory, about)


def latest(directory: Path) -> Built | None:
    """The newest complete version in the directory of a reference."""
    complete = [p.parent for p in directory.glob("v*/reference.json") if p.parent.name[1:].isdigit()]
    return _read(max(complete, key=lambda p: int(p.name[1:]))) if complete else None


def find(where: str, root: Path) -> Built | None:
    """The reference in the directory `where`, or called that below `root`: NAME for the newest version, or NAME/v2. None where
    there is none, or where `where` means data. Raises DataError where it is damaged.
    """
    path = Path(where) if Path(where).exists() else root / where
    if where in DATASETS:
        return None
    return _read(path) if (path / "reference.json").is_file() else latest(path)


def _read(path: Path) -> Built:
    try:
        return Built(path, json.loads((path / "reference.json").read_text()))
    except ValueError as error:
        raise DataError(f"{path / 'reference.json'} is damaged ({error}); delete {path} and build again") from None


def compare(before: Built, now: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """What is different, in the eyes of the *old* features.onnx, since features of two eyes have nothing in common.

    shares: of classes by their labels, or of the old cells: before, now, and an interval for the difference, from exact binomial
    ones; all of them hold together but for DELTA. features: those in which the held-out parts differ by a Kolmogorov-Smirnov
    test, Bonferroni over the features at DELTA. Both assume that the two builds are samples drawn apart from each other; where
    they share rows, the shared ones hide changes and invent none.
    """
    old = before.about
    changes: dict[str, Any] = {"since": old["version"], "rows": [old["rows"], now["rows"]]}
    if old["shape"] != now["shape"] or old["dtype"] != now["dtype"]:
        form = [f"{each['dtype']} {each['shape']}" for each in (old, now)]
        return changes | {"form": form}  # nothing else can be compared
    eye = session(before.path / "features.onnx")
    features, nearest = _seen(eye, dataset)
    with np.load(before.path / "reference.npz", allow_pickle=False) as arrays:
        points, share, rows = arrays["held_out_points"], arrays["cell_share"], int(arrays["count"])
    was, counts = old["counts"], now["counts"]
    if old["labelled"] and now["labelled"]:
        changes |= {"classes_gone": sorted(set(was) - set(counts)), "classes_new": sorted(set(counts) - set(was))}
        both = [mode for mode in was if mode in counts]
    else:  # both as the old eye sees them: what it takes for another class than its label says is no change
        both = list(was)
        was, counts = (dict(zip(both, seen.tolist(), strict=True)) for seen in (_of_modes(share, rows), np.bincount(nearest, minlength=len(both))))
    totals = sum(was.values()), sum(counts.values())
    changes["shares"] = {}
    for mode in both:
        (low0, high0), (low1, high1) = (clopper_pearson(c[mode], n, DELTA / (4 * len(both))) for c, n in zip((was, counts), totals, strict=True))
        changes["shares"][mode] = {
            "before": was[mode] / totals[0],
            "now": counts[mode] / totals[1],
            "difference_low": float(low1 - high0),
            "difference_high": float(high1 - low0),
        }
    changes["features"] = moved(points, features)
    return changes


def moved(before: Float[ndarray, "n p"], now: Float[ndarray, "m p"]) -> dict[str, Any]:
    """The columns whose laws differ, most certain first, with the shift of their mean in standard deviations."""
    count = before.shape[1]
    p = np.array([ks_2samp(before[:, j], now[:, j], method="asymp").pvalue for j in range(count)])
    spread = np.maximum(before.std(axis=0), 1e-30)
    shift = (now.mean(axis=0) - before.mean(axis=0)) / spread
    found = [j for j in np.argsort(p, kind="stable").tolist() if p[j] * count < DELTA]
    return {"of": count, "moved": {str(j): {"p": float(min(1.0, p[j] * count)), "shift": float(shift[j])} for j in found}}


def words(about: dict[str, Any]) -> list[str]:
    """The report for people, one sentence a line."""
    changes = about["changes"]
    accuracy = f"; the classifier is right on {about['accuracy']:.1%} of held-out data" if about["accuracy"] is not None else ""
    lines = [f"{about['name']} {about['version']}: {about['rows']:,} samples of {about['dtype']} {about['shape']}, {len(about['counts'])} modes{accuracy}"]
    if changes is None:
        return [*lines, "it is the first one, so there is nothing to compare with"]
    lines.append(f"since {changes['since']}: {changes['rows'][0]:,} rows then, {changes['rows'][1]:,} now")
    if "form" in changes:
        return [*lines, f"samples are {changes['form'][1]} and were {changes['form'][0]}: nothing else can be compared"]
    for name, what in (("classes_gone", "gone"), ("classes_new", "new")):
        if changes.get(name):
            lines.append(f"classes that are {what}: {', '.join(changes[name])}")
    certain = {m: s for m, s in changes["shares"].items() if s["difference_low"] > 0 or s["difference_high"] < 0}
    for mode, s in certain.items():
        lines.append(f"share of {mode}: {s['before']:.2%} then, {s['now']:.2%} now, {s['difference_low']:+.2%} to {s['difference_high']:+.2%}")
    if not certain:
        lines.append(f"no share moved for certain: each may have by chance, all at once with probability {1 - DELTA:.0%}")
    features = changes["features"]
    if not features["moved"]:
        return [*lines, f"none of {features['of']} features moved for certain (Kolmogorov-Smirnov, {DELTA:.0%} for all of them)"]
    far = max(features["moved"].items(), key=lambda item: abs(item[1]["shift"]))
    return [*lines, f"{len(features['moved'])} of {features['of']} features moved (Kolmogorov-Smirnov, {DELTA:.0%} for all of them), feature {far[0]} farthest: {far[1]['shift']:+.2f} standard deviations"]


def _of_modes(cell_share: Float[ndarray, "cells"], rows: int) -> Int64[ndarray, "cells-1"]:
    """So many rows, shared out among the modes as the eye saw them, but for those off the manifold."""
    return np.rint(cell_share[:-1] / cell_share[:-1].sum() * rows).astype(np.int64)


def _seen(eye: onnxruntime.InferenceSession, dataset: Dataset) -> tuple[ndarray, ndarray]:
    """Features of the first held-out samples, and the nearest mode of all samples."""
    features, nearest = [], []
    for i in range(0, len(dataset.samples), 2048):
        part = np.ascontiguousarray(dataset.samples[i : i + 2048])
        f, probability = eye.run(["features", "probability"], {"x": part})
        nearest.append(probability.argmax(axis=1))
        held_out = f[max(0, dataset.trained - i) :]
        if sum(map(len, features)) < SEEN:
            features.append(held_out)
    return np.concatenate(features)[:SEEN], np.concatenate(nearest)
