"""Makes a bundle of a trained generator: ONNX with a parity check, the reference, the certificate, the card.

What is written here is what will be served: every count comes from onnxruntime and the files themselves, never from torch.
Whether the bundle is good enough to publish is decided in gate.py.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from traceback import extract_tb
from typing import Any

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float64, Int64
from numpy import ndarray
from torch import Tensor, nn

from training.bundle import (
    DUPLICATE_BLOCK,
    FILES,
    MODE_FLOOR,
    Bundle,
    BundleError,
    Card,
    Certificate,
    Reference,
    SignGaussian,
    clopper_pearson,
    sample_classes,
    sha256,
    whitening,
    write_arrays,
    write_card,
)
from training.data import Dataset
from training.drops import UNWATCHED, delay_of_loss, drop_bounds
from training.evaluation import divergences, kid_excess, mixture_fit, prdc
from training.features import Sight
from training.moments import frechet

CERTIFY_AT_LEAST, CERTIFY_CHUNK = 200_000, 2048
DELTA = 0.01
LEVELS = 0.5 ** np.arange(1, 17)
GOLDEN = 64
LIBRARIES = ("torch", "onnx", "onnxruntime-gpu", "numpy", "scikit-learn", "ray")
REFERENCE_POINTS = 10_000
PRDC_POINTS = 3_000
DETOUR_SAMPLES, DETOUR_STEPS, DETOUR_LIMIT = 10_000, 20, 2.0  # of truncated and of interpolated samples; rows of a path; times plain
TRUNCATION = 0.5  # at which truncated samples are looked at
LAW_SAMPLES, LAW_LIMIT = 1000, 8.0
ACCURATE = 0.97
ARL = 2.6e9  # samples to a false alarm for which expected delays are stated


class ExportError(BundleError):
    """A network that ONNX cannot say, or of which onnxruntime does not compute what torch does. The text says where and by how much."""


class Served(nn.Module):
    """A generator that answers in served form: uint8 [n, h, w, c], or float32 [n, d] in data units."""

    shift: Tensor
    scale: Tensor

    def __init__(self, generator: nn.Module, dataset: Dataset) -> None:
        super().__init__()
        self.generator, self.shape, self.is_image = generator, dataset.shape, dataset.is_image
        self.register_buffer("shift", torch.from_numpy(dataset.shift))
        self.register_buffer("scale", torch.from_numpy(dataset.scale))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.generator(z, y) * self.scale + self.shift
        return x.round().clamp(0, 255).to(torch.uint8).unflatten(1, self.shape) if self.is_image else x


def session(path: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def export_onnx(module: nn.Module, path: Path, inputs: dict[str, Tensor], outputs: tuple[str, ...], *, tolerance: float) -> None:
    """Write `module` in eval mode as ONNX with a free batch dimension and check it against torch on 1, 2, 7 and 64 rows.

    `inputs` are example batches of at least 64 rows. Integers may differ by one level in at most one value of a thousand,
    floats by `tolerance` relative to their scale. Raises ExportError otherwise, and where there is no such graph.
    """
    module = module.eval()
    for name in ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes"):
        logging.getLogger(name).setLevel(logging.ERROR)  # one misses torchvision, which we do not; the other announces what is raised
    with warnings.catch_warnings(), redirect_stderr(StringIO()):  # a failing exporter prints all that it has so far, twice
        # The exporter of torch 2.13 warns of its own doing, and that two inputs share the batch dimension.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name: n will not be used, since it shares", UserWarning)
        try:
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},) * len(inputs),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{path.name} cannot be made: {_cause(error)}") from None
    answers = []
    try:
        check = session(path)
        for n in (1, 2, 7, 64):
            rows = {name: value[:n] for name, value in inputs.items()}
            with torch.no_grad():
                expected = module(*rows.values())
            expected = [e.numpy() for e in (expected if isinstance(expected, tuple) else (expected,))]
            answers.append((n, expected, check.run(list(outputs), {name: value.numpy() for name, value in rows.items()})))
    except Exception as error:  # the network's own; and onnxruntime raises a dozen kinds without a common base
        raise ExportError(f"{path.name} does not run with other numbers of rows: {_cause(error)}") from None
    for n, expected, found in answers:
        for name, want, got in zip(outputs, expected, found, strict=True):
            if got.shape != want.shape or got.dtype != want.dtype:
                forms = f"{got.dtype} {got.shape}, in torch {want.dtype} {want.shape}"
                raise ExportError(f"{path.name}: {name} is {forms}, at n = {n}")
            difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
            if np.issubdtype(want.dtype, np.integer):
                agrees = difference.max() <= 1 and np.mean(difference > 0) <= max(1e-3, 1 / difference.size)
            else:
                agrees = difference.max() <= tolerance * max(1.0, float(np.abs(want).max()))
            if not agrees:
                worst = f"{difference.max():.3g} at n = {n}; the tolerance is {tolerance:g}"
                raise ExportError(f"{path.name}: {name} differs from torch by {worst}")


def _cause(error: BaseException) -> str:
    """What began it, in one line, and where in a user's code."""
    while error.__cause__ is not None:
        error = error.__cause__
    not_theirs = (str(Path(torch.__file__).parents[1]), __file__, "<")  # what is compiled from a string has no file
    where = [f"{frame.filename}:{frame.lineno}" for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(not_theirs)]
    return (str(error).strip() or repr(error)).splitlines()[0] + (f" (at {where[-1]})" if where else "")


@dataclass(frozen=True)
class Source:
    """The two exported graphs as one stream of samples and what the eye sees in them."""

    model: onnxruntime.InferenceSession
    features: onnxruntime.InferenceSession
    latent: SignGaussian
    class_shares: tuple[float, ...]

    def samples(self, *, seed: int, offset: int = 0, count: int) -> ndarray:
        feed: dict[str, Any] = {"z": self.latent.sample(seed=seed, offset=offset, count=count)}
        if self.class_shares:
            feed["y"] = self.classes(seed=seed, offset=offset, count=count)
        return self.model.run(["samples"], feed)[0]

    def classes(self, *, seed: int, offset: int = 0, count: int) -> Int64[ndarray, "count"]:
        """Of these samples; 0 of all where there are none."""
        shares = np.array(self.class_shares)
        return sample_classes(shares, seed=seed, offset=offset, count=count) if len(shares) else np.zeros(count, np.int64)

    def see(self, samples: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """features [n, p], scores [n, s], mode [n]. Raises ExportError where anything is not finite, as no certificate counts such a sample."""
        features, scores, mode = self.features.run(["features", "scores", "mode"], {"x": samples})
        if bad := sum(len(x) - np.isfinite(x).reshape(len(x), -1).all(axis=1).sum() for x in (samples, features, scores)):
            raise ExportError(f"model.onnx makes NaN, infinity or numbers too large to be looked at: {bad} among {len(samples):,} samples")
        return features, scores, mode


def open_source(directory: Path, card: Card) -> Source:
    """The graphs of the bundle at `directory`."""
    return Source(session(directory / "model.onnx"), session(directory / "features.onnx"), card.latent, card.class_shares)


def certify(
    source: Source, most: int, *, cells: int, seconds: float, progress: Callable[[int, int], None] = lambda done, most: None
) -> Certificate:
    """Count the generator's own law on fresh samples of a seed drawn for this purpose.

    Up to `most` samples are drawn, or as many as `seconds` allow, but CERTIFY_AT_LEAST in any case (or `most`, if smaller). The
    first fifth sets the tail thresholds and the whitening and is then forgotten; everything is counted on the rest. When drawing
    stops never depends on what was drawn. `progress` hears (drawn so far, most).
    """
    seed, least = secrets.randbits(53), min(most, CERTIFY_AT_LEAST)
    chunks = _chunks(source, seed, 0, least=least // 5, most=most // 5, seconds=seconds / 5)
    seen = [source.see(samples)[:2] for samples, _ in chunks]
    features, scores = (np.concatenate(column).astype(np.float64) for column in zip(*seen, strict=True))
    centre, scale, radius = whitening(features)
    first = len(scores)
    progress(first, most)
    upper = np.quantile(scores, 1 - LEVELS, axis=0, method="higher").T
    lower = np.quantile(scores, LEVELS, axis=0, method="lower").T
    golden = np.array([[secrets.randbits(53), secrets.randbits(53)] for _ in range(GOLDEN)], np.int64)
    golden[: GOLDEN // 8, 1] += 2**62  # offsets far into a stream must work too
    p = features.shape[1]
    nothing = Certificate(
        count=0,
        delta=DELTA,
        cell_count=np.zeros(cells + 1, np.int64),
        levels=LEVELS,
        upper_threshold=upper,
        upper_hits=np.zeros(upper.shape, np.int64),
        lower_threshold=lower,
        lower_hits=np.zeros(lower.shape, np.int64),
        duplicate_blocks=0,
        duplicate_hits=0,
        feature_mean=np.zeros(p),
        feature_cov=np.zeros((p, p)),
        golden_seed=golden[:, 0],
        golden_offset=golden[:, 1],
        golden_sample=np.concatenate([source.samples(seed=s, offset=o, count=1) for s, o in golden.tolist()]),
        white_centre=centre,
        white_map=scale,
        white_radius=radius,
        white_mean=np.zeros(scale.shape[1]),
        white_moment=np.zeros((scale.shape[1],) * 2),
        class_cell_count=np.zeros((len(source.class_shares), cells + 1) if source.class_shares else (0, 0), np.int64),
    )
    rest = _chunks(source, seed, first, least=least - least // 5, most=4 * first, seconds=seconds * 4 / 5)
    return count(nothing, source, rest, lambda done: progress(first + done, most))


def count(
    certificate: Certificate, source: Source, chunks: Iterable[tuple[ndarray, ndarray]], progress: Callable[[int], None]
) -> Certificate:
    """The certificate with what fresh samples, and their classes, add to its counts; its thresholds and golden samples stay."""
    upper, lower, cells = certificate.upper_threshold, certificate.lower_threshold, len(certificate.cell_count) - 1
    upper_hits, lower_hits = certificate.upper_hits.copy(), certificate.lower_hits.copy()
    cell_count, given = certificate.cell_count.copy(), certificate.class_cell_count.copy()
    n, blocks, hits = certificate.count, certificate.duplicate_blocks, certificate.duplicate_hits
    mean = certificate.feature_mean * n
    square = certificate.feature_cov * max(0, n - 1) + n * np.outer(certificate.feature_mean, certificate.feature_mean)
    white_sum, white_square = certificate.white_mean * n, certificate.white_moment * n
    for samples, classes in chunks:
        features, chunk_scores, mode = source.see(samples)
        n += len(samples)
        for s, column in enumerate(np.sort(chunk_scores.astype(np.float64), axis=0).T):
            upper_hits[s] += len(column) - np.searchsorted(column, upper[s], side="right")
            lower_hits[s] += np.searchsorted(column, lower[s], side="left")
        mode = np.where(mode < 0, cells, mode)
        cell_count += np.bincount(mode, minlength=cells + 1)
        if given.size:
            np.add.at(given, (classes, mode), 1)
        chunk_blocks, chunk_hits = _repeats(samples)
        blocks, hits = blocks + chunk_blocks, hits + chunk_hits
        features = features.astype(np.float64)
        mean, square = mean + features.sum(axis=0), square + features.T @ features
        if certificate.white_map.size:
            y = certificate.white(features)
            white_sum, white_square = white_sum + y.sum(axis=0), white_square + y.T @ y
        progress(n - certificate.count)
    mean = mean / n
    return replace(
        certificate,
        count=n,
        cell_count=cell_count,
        upper_hits=upper_hits,
        lower_hits=lower_hits,
        duplicate_blocks=blocks,
        duplicate_hits=hits,
        feature_mean=mean,
        feature_cov=(square - n * np.outer(mean, mean)) / (n - 1),
        white_mean=white_sum / n,
        white_moment=white_square / n,
        class_cell_count=given,
    )


def certify_more(
    bundle: Bundle, directory: Path, more: int, progress: Callable[[int, int], None] = lambda done, most: None
) -> Card:
    """Write into the empty `directory` the same bundle with a certificate that counts `more` fresh samples besides.

    Counts of both add up because the thresholds, set on samples that were then forgotten, stay. How many are drawn must not
    depend on what the certificate says, or its bounds would not hold.
    """
    for name in FILES[:3]:
        shutil.copyfile(bundle.path / name, directory / name)
    source, card = open_source(bundle.path, bundle.card), bundle.card
    chunks = _chunks(source, secrets.randbits(53), 0, least=more, most=more, seconds=0.0)
    certificate = count(bundle.certificate, source, chunks, lambda done: progress(done, more))
    write_arrays(directory / "certificate.npz", certificate)
    certified = card.certified | _finite(law(bundle.reference, certificate, card.modes))
    return write_card(directory, replace(card, certified=certified, created=datetime.now(UTC).isoformat(timespec="seconds")))


def _chunks(source: Source, seed: int, offset: int, *, least: int, most: int, seconds: float) -> Iterator[tuple[ndarray, ndarray]]:
    """Samples and their classes from `offset` on: `most`, or after `seconds` no more than `least`."""
    end, drawn = time.monotonic() + seconds, 0
    while drawn < most and (drawn < least or time.monotonic() < end):
        chunk = min(CERTIFY_CHUNK, most - drawn)
        window = {"seed": seed, "offset": offset + drawn, "count": chunk}
        yield source.samples(**window), source.classes(**window)
        drawn += chunk


def _repeats(samples: ndarray) -> tuple[int, int]:
    """Blocks of DUPLICATE_BLOCK consecutive samples, and how many of them hold an exact repeat. A rest is left out."""
    blocks = len(samples) // DUPLICATE_BLOCK
    rows = np.ascontiguousarray(samples[: blocks * DUPLICATE_BLOCK]).reshape(blocks * DUPLICATE_BLOCK, -1).view(np.uint8)
    rows = np.sort(rows.view(f"V{rows.shape[1]}").reshape(blocks, DUPLICATE_BLOCK), axis=1)
    return blocks, int((rows[:, 1:] == rows[:, :-1]).any(axis=1).sum())


def describe_reals(dataset: Dataset, features: onnxruntime.InferenceSession, *, keep_points: bool) -> Reference:
    """The real data through the exported eye, in one pass. Mode shares come from all data, the off-manifold share from the held-out part."""
    n, trained, p = len(dataset.samples), dataset.trained, features.get_outputs()[0].shape[1]
    rng, most = np.random.default_rng(0), REFERENCE_POINTS if keep_points else 0
    kept = rng.permutation(trained)[:most], trained + rng.permutation(n - trained)[:most]
    points = [np.empty((len(rows), p), np.float32) for rows in kept]
    count, off, mean, square = np.zeros(dataset.cells, np.int64), 0, np.zeros(p), np.zeros((p, p))
    for part in dataset.pieces(np.arange(n), fewest=math.ceil(n / CERTIFY_CHUNK)):
        seen, mode, probability = features.run(["features", "mode", "probability"], {"x": dataset.samples[part]})
        begin, end = int(part[0]), int(part[-1]) + 1
        for rows, of in zip(kept, points, strict=True):
            here = np.flatnonzero((begin <= rows) & (rows < end))
            of[here] = seen[rows[here] - begin]
        count += np.bincount(probability.argmax(axis=1), minlength=dataset.cells)
        off += int(np.count_nonzero(mode[part >= trained] < 0))
        x = seen.astype(np.float64)  # moments are merged as by Chan, Golub and LeVeque (1983): sums of squares would lose digits far from 0
        centre = x.mean(axis=0)
        step = centre - mean
        mean = mean + step * len(x) / end
        square += (x - centre).T @ (x - centre) + np.outer(step, step) * begin * len(x) / end
    off_share = off / (n - trained)
    return Reference(
        count=n,
        cell_share=np.append((1 - off_share) * (count / n), off_share),
        feature_mean=mean,
        feature_cov=square / (n - 1),
        train_points=points[0],
        held_out_points=points[1],
    )


def export_generator(path: Path, generator: nn.Module, dataset: Dataset, latent: SignGaussian) -> Served:
    """Write the generator in served form as ONNX. Raises ExportError as export_onnx does."""
    inputs = {"z": torch.from_numpy(latent.sample(seed=0, count=64))}
    if generator.classes:
        inputs["y"] = torch.arange(64) % generator.classes
    served = Served(generator, dataset)
    export_onnx(served, path, inputs, ("samples",), tolerance=1e-5)
    return served


def write_bundle(
    directory: Path,
    *,
    model: str,
    dataset: Dataset,
    generator: nn.Module,
    latent: SignGaussian,
    sight: Sight,
    training: dict[str, Any],
    certify_samples: int,
    certify_seconds: float,
    keep_points: bool,
    progress: Callable[[int, int], None],
) -> Card:
    """Write a complete bundle of a trained generator into the empty `directory`.

    Raises ExportError where onnxruntime and torch disagree, row by row or in law.
    """
    class_shares: tuple[float, ...] = ()
    if generator.classes:
        class_shares = tuple((np.bincount(dataset.labels, minlength=generator.classes) / len(dataset.labels)).tolist())
    served = export_generator(directory / "model.onnx", generator, dataset, latent)
    return complete_bundle(
        directory,
        model=model,
        dataset=dataset,
        latent=latent,
        sight=sight,
        classes=dataset.classes if generator.classes else (),
        class_shares=class_shares,
        training=training,
        certify_samples=certify_samples,
        certify_seconds=certify_seconds,
        keep_points=keep_points,
        progress=progress,
        check=partial(check_law, served),
    )


def check_law(served: nn.Module, source: Source) -> None:
    """Raise ExportError where samples of torch and of onnxruntime, of different latents, differ in law.

    A graph can agree with torch on the rows it was checked with and still answer otherwise on average; KID between features,
    in standard deviations of what it is when samples are relabelled at random, would tell.
    """
    features = []
    for seed in (1, 2):
        z = source.latent.sample(seed=seed, count=LAW_SAMPLES)
        classes = np.array(source.class_shares)
        y = sample_classes(classes, seed=seed, count=LAW_SAMPLES) if source.class_shares else None
        if seed == 1:
            with torch.no_grad():
                samples = served.eval()(*(torch.from_numpy(v) for v in (z, y) if v is not None)).numpy()
        else:
            samples = source.samples(seed=seed, count=LAW_SAMPLES)
        features.append(source.see(samples)[0])
    if not (excess := kid_excess(*features)) < LAW_LIMIT:
        raise ExportError(f"model.onnx has another law than torch: their KID is {excess:.1f} deviations off; the limit is {LAW_LIMIT}")


def complete_bundle(
    directory: Path,
    *,
    model: str,
    dataset: Dataset,
    latent: SignGaussian,
    sight: Sight,
    classes: tuple[str, ...],
    class_shares: tuple[float, ...],
    training: dict[str, Any],
    certify_samples: int,
    certify_seconds: float,
    keep_points: bool,
    progress: Callable[[int, int], None],
    check: Callable[[Source], None] = lambda source: None,
) -> Card:
    """Make a bundle of a `directory` that holds model.onnx: the eye, the reference, the certificate, the card.

    `check` raises where the exported graphs are not to be certified.
    """
    reference = write_reference(directory, dataset, sight, keep_points=keep_points)
    card = Card(
        model=model,
        version="unpublished",
        created="",
        files={},
        latent=latent,
        sample_shape=dataset.shape,
        sample_dtype=str(dataset.samples.dtype),
        modes=sight.modes,
        scores=sight.scores,
        classes=classes,
        class_shares=class_shares,
        training=training,
    )
    return certify_bundle(
        directory, card, reference, accuracy=sight.accuracy, dataset=dataset,
        certify_samples=certify_samples, certify_seconds=certify_seconds, progress=progress, check=check,
    )  # fmt: skip


def write_reference(directory: Path, dataset: Dataset, sight: Sight, *, keep_points: bool) -> Reference:
    """Write features.onnx, the eye, and reference.npz, what it sees in the real data."""
    example = {"x": torch.from_numpy(np.array(dataset.samples[:64]))}
    export_onnx(sight.eye, directory / "features.onnx", example, ("features", "scores", "mode", "probability"), tolerance=1e-3)
    reference = describe_reals(dataset, session(directory / "features.onnx"), keep_points=keep_points)
    write_arrays(directory / "reference.npz", reference)
    return reference


def certify_bundle(
    directory: Path,
    card: Card,
    reference: Reference,
    *,
    accuracy: float | None,
    dataset: Dataset | None,
    certify_samples: int,
    certify_seconds: float,
    progress: Callable[[int, int], None],
    check: Callable[[Source], None] = lambda source: None,
) -> Card:
    """Count the generator's law into the `directory`, which holds the other files, and write the card; `card` says what they are."""
    source = open_source(directory, card)
    check(source)
    certificate = certify(source, certify_samples, cells=len(card.modes), seconds=certify_seconds, progress=progress)
    certificate = replace(certificate, model_sha256=sha256(directory / "model.onnx"))
    write_arrays(directory / "certificate.npz", certificate)
    created, versions = datetime.now(UTC).isoformat(timespec="seconds"), {name: importlib.metadata.version(name) for name in LIBRARIES}
    found = figures(dataset, reference, certificate, source, card.modes, accuracy)
    return write_card(directory, replace(card, created=created, certified=found, versions={"python": platform.python_version()} | versions))


def figures(
    dataset: Dataset | None, reference: Reference, certificate: Certificate, source: Source, modes: tuple[str, ...], accuracy: float | None
) -> dict[str, Any]:
    """What the certificate says, and what 10,000 samples more do, for people. Infinite and undefined numbers become None.

    Without a `dataset`, samples are not compared with real ones one by one.
    """
    seed = secrets.randbits(53)
    parts = [source.samples(seed=seed, offset=i, count=2000) for i in range(0, 10_000, 2000)]
    samples = np.concatenate(parts)
    found = law(reference, certificate, modes) | {"classifier_accuracy": accuracy}
    if accuracy is not None and accuracy < ACCURATE:
        found["warning"] = f"the classifier that names modes is right on {accuracy:.1%} of held-out data; {ACCURATE:.0%} are wanted"
    if source.class_shares:
        probability = np.concatenate([source.features.run(["probability"], {"x": part})[0] for part in parts])
        asked = sample_classes(np.array(source.class_shares), seed=seed, count=len(samples))
        found["class_agreement"] = float(np.mean(probability.argmax(axis=1) == asked))
    found |= detours(source)
    for name in ("interpolated", "truncated"):
        share = found[f"off_manifold_{name}"]
        least = float(clopper_pearson(round(share * DETOUR_SAMPLES), DETOUR_SAMPLES, DELTA)[0])  # what so few samples prove
        if least > DETOUR_LIMIT * found["off_manifold"]:
            words = f"{share:.1%} of {name} samples are off the manifold and {found['off_manifold']:.1%} of plain ones"
            found["warning"] = "; ".join(filter(None, (found.get("warning"), words)))
    if dataset is not None and dataset.mixture is not None:
        found |= {f"mixture_{name}": value for name, value in mixture_fit(dataset.mixture, samples).items()}
    elif dataset is not None:
        real = dataset.normalised(slice(min(dataset.trained, PRDC_POINTS)))
        fake = (samples[: len(real)].reshape(-1, dataset.dim) - dataset.shift) / dataset.scale
        found |= {f"prdc_{name}": value for name, value in prdc(real, fake).items()}
    return _finite(found)


def detours(source: Source) -> dict[str, float]:
    """Shares of samples off the manifold: plain ones, those at TRUNCATION, and those on paths of DETOUR_STEPS rows between two seeds.

    The same number of each. A path keeps the class of its first row, as a served one does.
    """
    seed, count = secrets.randbits(53), DETOUR_SAMPLES
    classes = sample_classes(np.array(source.class_shares), seed=seed, count=count) if source.class_shares else None
    paths = [source.latent.interpolate(seeds=(seed + 1 + 2 * i, seed + 2 + 2 * i), count=DETOUR_STEPS) for i in range(count // DETOUR_STEPS)]
    latents = {
        "plain": (source.latent.sample(seed=seed, count=count), classes),
        "truncated": (source.latent.sample(seed=seed, count=count, truncation=TRUNCATION), classes),
        "interpolated": (np.concatenate(paths), None if classes is None else np.repeat(classes[: len(paths)], DETOUR_STEPS)),
    }
    shares = {}
    for name, (z, y) in latents.items():
        off = 0
        for i in range(0, count, 2000):
            feed = {"z": z[i : i + 2000]} | ({} if y is None else {"y": y[i : i + 2000]})
            off += int((source.see(source.model.run(["samples"], feed)[0])[2] < 0).sum())
        shares[f"off_manifold_{name}"] = off / count
    return shares


def law(reference: Reference, certificate: Certificate, modes: tuple[str, ...]) -> dict[str, Any]:
    """What the counts of a certificate say beside the real data."""
    share = certificate.cell_count / certificate.count
    delay = delay_of_loss(certificate, drop_bounds(certificate), np.ones(1), threshold=ARL)[0]
    return divergences(reference.cell_share, share) | {
        "frechet": frechet(reference.feature_mean, reference.feature_cov, certificate.feature_mean, certificate.feature_cov)[0],
        "mode_coverage": float(np.mean(share[:-1] >= MODE_FLOOR * reference.cell_share[:-1])),
        "off_manifold": float(share[-1]),
        "samples": certificate.count,
        "smallest_tail_level": float(LEVELS[LEVELS * certificate.count >= 10].min()),
        "expected_delay": dict(zip(modes, delay.tolist(), strict=True)),
        "unwatched": [mode for mode, d in zip(modes, delay, strict=True) if d > UNWATCHED],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
