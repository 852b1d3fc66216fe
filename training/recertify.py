"""Certifies a published generator against other real data: the same model.onnx, byte for byte, under a new reference.

That is for a world that has moved: what is served is still what was certified, but the real data are no longer what they were. How
samples are looked at, the reference and the certificate are new; what was true of the generator stays in its card. Whether it is
good enough by the new data is decided in gate.py.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.adopt import whole
from training.bundle import Bundle, BundleError, Card, Reference, read_arrays
from training.data import DataError, Dataset
from training.export import certify_bundle, open_source, write_reference
from training.features import fit_eye
from training.reference import Built, find
from training.sources import open_dataset, some


def recertify(
    bundle: Bundle,
    reference: str,
    directory: Path,
    references: Path,
    *,
    skip_bad_files: bool = False,
    certify_samples: int = 1_000_000,
    certify_seconds: float = 10.0,
    say: Callable[[str], None] = lambda words: None,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> Card:
    """Write into the new `directory` a complete bundle of the same generator, certified against `reference`, or nothing.

    `reference` is data, or what reference.py has built, by its directory or its name below `references`. `say` hears which it is, and
    what of data is left out. Raises DataError where it does not fit the generator or is damaged.
    """
    built = find(reference, references)
    with whole(directory), tempfile.TemporaryDirectory(prefix="data-", dir=directory) as cache:
        shutil.copyfile(bundle.model_path, directory / "model.onnx")
        made_of, dataset = {"of": bundle.card.version, "data": reference}, None
        if built is not None:
            made_of |= {"data": built.about["source"], "built": f"{built.about['name']} {built.path.name}"}
            say(f"the reference is {made_of['built']}, built of {made_of['data']}")
            if not len(bundle.reference.train_points):
                raise DataError(f"{bundle.card.model} {bundle.card.version} was published so that it keeps no real data, and {built.path} does; name the data instead, {built.about['source']}")
            card, found, accuracy = _take(bundle.card, built, directory)
        else:
            dataset = open_dataset(reference, cache=Path(cache), skip_bad_files=skip_bad_files, say=say, option="--reference")
            dataset = _fitting(bundle.card, dataset)
            remember = len(bundle.reference.train_points) > 0  # else it was published so that it keeps no real data
            sight = fit_eye(dataset, seed=0, remember=remember)
            found = write_reference(directory, dataset, sight, keep_points=remember)
            card, accuracy = replace(bundle.card, modes=sight.modes, scores=sight.scores), sight.accuracy
        return certify_bundle(
            directory,
            replace(card, version="unpublished", forced=None, training=card.training | {"recertified": made_of}),
            found,
            accuracy=accuracy,
            dataset=dataset,
            certify_samples=certify_samples,
            certify_seconds=certify_seconds,
            progress=progress,
        )


def _take(card: Card, built: Built, directory: Path) -> tuple[Card, Reference, float | None]:
    """Copy what was built; the card with its modes and scores, its Reference, and how often its classifier is right."""
    about, damaged = built.about, f"the reference at {built.path} is damaged or of an earlier version"
    try:
        shape, dtype, modes, scores, accuracy = (about[name] for name in ("shape", "dtype", "counts", "scores", "accuracy"))
        labelled = about["labelled"]
    except KeyError as error:
        raise DataError(f"{damaged}: reference.json says no {error}; build it again") from None
    _check(card, f"{built.about['name']} {built.path.name}", dtype, tuple(shape), tuple(modes) if labelled else ())
    if card.classes and tuple(modes) != card.classes:
        raise DataError(f"{built.path} has the classes of {card.model} in another order, {', '.join(modes)}; name the data instead, {about['source']}")
    card = replace(card, modes=tuple(modes), scores=tuple(scores))
    try:
        for name in ("features.onnx", "reference.npz"):
            shutil.copyfile(built.path / name, directory / name)
        found, source = read_arrays(Reference, directory / "reference.npz"), open_source(directory, card)
        _, seen, _ = source.see(source.samples(seed=0, count=2))
    except (OSError, BundleError) as error:
        raise DataError(f"{damaged} ({error}); build it again") from None
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise DataError(f"{damaged}: its features.onnx does not run on samples of {card.model} ({error}); build it again") from None
    if seen.shape[1] != len(scores) or len(found.cell_share) != len(modes) + 1:
        raise DataError(f"{damaged}: its files are not of one build; build it again")
    return card, found, accuracy


def _fitting(card: Card, dataset: Dataset) -> Dataset:
    """The data with their classes in the order of the generator's. Raises DataError where they are not of its samples or classes."""
    _check(card, "--reference", str(dataset.samples.dtype), dataset.shape, dataset.classes)
    if not card.classes or dataset.classes == card.classes:
        return dataset
    place = np.array([card.classes.index(name) for name in dataset.classes])
    return replace(dataset, labels=place[dataset.labels], classes=card.classes)


def _check(card: Card, what: str, dtype: str, shape: tuple[int, ...], classes: tuple[str, ...]) -> None:
    if (dtype, shape) != (card.sample_dtype, card.sample_shape):
        raise DataError(f"{what} holds {dtype} {list(shape)}, and samples of {card.model} {card.version} are {card.sample_dtype} {list(card.sample_shape)}")
    if not card.classes or set(classes) == set(card.classes):
        return
    lacking, more = ([c for c in these if c not in those] for these, those in ((card.classes, classes), (classes, card.classes)))
    words = f"lacks {some(lacking, 20)}" if lacking else ""
    words += " and " * bool(lacking and more) + (f"has {some(more, 20)} besides" if more else "")
    raise DataError(
        f"{card.model} {card.version} generates the class that it is asked for, and {what} {words if classes else 'has no labels'}; "
        f"data with labels of all its classes and no others are expected: {some(list(card.classes), 20)}"
    )
