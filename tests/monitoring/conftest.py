"""A tiny real bundle: ten modes on a grid in the plane, generator and features as ONNX graphs, certified by counting.

`make_bundle` builds one, `draw` samples its model.onnx as serving would. Faults are put into the graph, as a broken
deployment would have them, and the certificate stays that of the healthy generator unless the bundle is `honest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy import ndarray
from onnx import TensorProto, helper, numpy_helper

from training.bundle import (
    DUPLICATE_BLOCK,
    FILES,
    Bundle,
    Card,
    Certificate,
    Reference,
    SignGaussian,
    open_bundle,
    sample_classes,
    whiten,
    whitening,
    write_arrays,
    write_card,
)

K = 10
CENTRES = 2.0 * np.stack([np.arange(K) % 5 - 2, np.arange(K) // 5 - 0.5], axis=1).astype(np.float32)
SD = 0.1
OFF_MANIFOLD = SD * np.sqrt(-2 * np.log(0.01))  # 99 % of the real data of a mode lie within
LEVELS = 2.0 ** -np.arange(1.0, 17.0)
LATENT = SignGaussian(signs=0, normals=4)
HEALTHY_SHARES = 1 + 0.1 * np.cos(np.arange(K))
HEALTHY_SHARES /= HEALTHY_SHARES.sum()  # a GAN never equals the real data, whose modes weigh 1/10 each
HEALTHY_WIDTH = 0.95


def _graph(nodes: list, name: str, inputs: list, outputs: list, constants: dict[str, ndarray]) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def generator(lost: tuple[int, ...], fakes: float, width: float, grain: float, conditional: bool = False) -> onnx.ModelProto:
    """z [n, 4] -> a mode by Phi(z_2), or that of the class y [n], a place within it by z_0 and z_1, a jump between the modes where
    Phi(z_3) < fakes."""
    shares = HEALTHY_SHARES.copy()
    shares[list(lost)] = 0
    edges = np.cumsum(shares / shares.sum())[:-1]
    node = helper.make_node
    nodes = [
        node("Slice", ["z", "zero", "two", "one"], ["fine_place"]),
        node("Slice", ["z", "two", "four", "one"], ["choice"]),
        node("Mul", ["choice", "root_half"], ["scaled"]),
        node("Erf", ["scaled"], ["erf"]),
        node("Mul", ["erf", "half"], ["half_erf"]),
        node("Add", ["half_erf", "half"], ["u"]),
        node("Slice", ["u", "zero", "one", "one"], ["u_mode"]),
        node("Slice", ["u", "one", "two", "one"], ["u_fake"]),
        node("Greater", ["u_mode", "edges"], ["above"]),
        node("Cast", ["above"], ["above_int"], to=TensorProto.INT64),
        node("ReduceSum", ["above_int", "one"], ["mode"], keepdims=0),
        node("Gather", ["centres", "mode"], ["centre"]),
        node("Mul", ["place", "sd"], ["offset"]),
        node("Add", ["centre", "offset"], ["real"]),
        node("Less", ["u_fake", "fakes"], ["is_fake"]),
        node("Cast", ["is_fake"], ["jumps"], to=TensorProto.FLOAT),
        node("Add", ["real", "jumps"], ["samples"]),
    ]
    if grain:
        nodes[1:1] = [
            node("Div", ["fine_place", "grain"], ["grains"]),
            node("Round", ["grains"], ["whole"]),
            node("Mul", ["whole", "grain"], ["place"]),
        ]
    else:
        nodes[1:1] = [node("Identity", ["fine_place"], ["place"])]
    if conditional:
        nodes = [node("Identity", ["y"], ["mode"]), *(n for n in nodes if n.output[0] not in ("u_mode", "above", "above_int", "mode"))]
    ints = {"zero": 0, "two": 2, "four": 4, "one": 1}
    constants = {name: np.array([value], np.int64) for name, value in ints.items()}
    spread = SD * HEALTHY_WIDTH * width
    floats = {"root_half": np.sqrt(0.5), "half": 0.5, "edges": edges, "centres": CENTRES, "sd": spread, "fakes": fakes}
    constants |= {name: np.asarray(value, np.float32) for name, value in floats.items()}
    if grain:
        constants["grain"] = np.float32(grain)
    if conditional:
        del constants["edges"]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", d]) for name, d in (("z", 4), ("samples", 2))]
    asked = [helper.make_tensor_value_info("y", TensorProto.INT64, ["n"])] if conditional else []
    return _graph(nodes, "grid", ends[:1] + asked, ends[1:], constants)


def eye() -> onnx.ModelProto:
    """x [n, 2] -> features (x), scores (distance to the nearest centre as the crow flies and by taxi), mode, probability."""
    node = helper.make_node
    nodes = [
        node("Identity", ["x"], ["features"]),
        node("Unsqueeze", ["x", "one"], ["x_row"]),
        node("Sub", ["x_row", "centres"], ["to_centres"]),
        node("Mul", ["to_centres", "to_centres"], ["squares"]),
        node("ReduceSum", ["squares", "two"], ["distance_squared"], keepdims=0),
        node("Sqrt", ["distance_squared"], ["distances"]),
        node("ReduceMin", ["distances"], ["distance"], axes=[1], keepdims=1),
        node("Abs", ["to_centres"], ["sides"]),
        node("ReduceSum", ["sides", "two"], ["taxi_distances"], keepdims=0),
        node("ReduceMin", ["taxi_distances"], ["taxi"], axes=[1], keepdims=1),
        node("Concat", ["distance", "taxi"], ["scores"], axis=1),
        node("ArgMin", ["distances"], ["nearest"], axis=1, keepdims=0),
        node("Squeeze", ["distance", "one"], ["flat_distance"]),
        node("Greater", ["flat_distance", "limit"], ["off"]),
        node("Where", ["off", "minus_one", "nearest"], ["mode"]),
        node("Mul", ["distance_squared", "minus_half_precision"], ["logits"]),
        node("Softmax", ["logits"], ["probability"], axis=1),
    ]
    constants = {"one": np.array([1]), "two": np.array([2]), "minus_one": np.array([-1]), "centres": CENTRES[None]}
    constants |= {"limit": np.float32(OFF_MANIFOLD), "minus_half_precision": np.float32(-0.5 / SD**2)}
    outputs = [("features", TensorProto.FLOAT, ["n", 2]), ("scores", TensorProto.FLOAT, ["n", 2])]
    outputs += [("mode", TensorProto.INT64, ["n"]), ("probability", TensorProto.FLOAT, ["n", K])]
    return _graph(
        nodes,
        "eye",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info(*output) for output in outputs],
        constants,
    )


def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _look(samples: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    return tuple(_session(eye().SerializeToString()).run(["features", "scores", "mode"], {"x": samples}))


def _cells(mode: ndarray) -> ndarray:
    return np.bincount(np.where(mode < 0, K, mode), minlength=K + 1)


def _inputs(conditional: bool, seed: int, count: int) -> dict[str, ndarray]:
    """What the generator makes of the first rows of a seed."""
    z = {"z": LATENT.sample(seed=seed, count=count)}
    return z | {"y": sample_classes(HEALTHY_SHARES, seed=seed, count=count)} if conditional else z


@lru_cache
def _reference() -> Reference:
    rng = np.random.default_rng(12)
    points = (CENTRES[rng.integers(K, size=20_000)] + SD * rng.standard_normal((20_000, 2))).astype(np.float32)
    features, _, mode = _look(points)
    share = np.append(np.full(K, 0.099), 0.01)
    assert np.abs(_cells(mode) / len(mode) - share).max() < 0.01
    covariance = np.cov(features.T.astype(np.float64), bias=True)
    return Reference(len(points), share, features.mean(0, dtype=np.float64), covariance, features[:1000], features[1000:2000])


@lru_cache
def _certificate(lost: tuple[int, ...], fakes: float, width: float, grain: float, conditional: bool, count: int) -> Certificate:
    graph = generator(lost, fakes, width, grain, conditional).SerializeToString()
    model = _session(graph)
    first, golden_seed = 1_000_001, 1_000_003
    features, scores, _ = _look(model.run(None, _inputs(conditional, first, 2**18))[0])
    white = whitening(features)
    upper, lower = (np.quantile(scores, q, axis=0).T.astype(np.float64) for q in (1 - LEVELS, LEVELS))
    fed = _inputs(conditional, first + 1, count)
    samples = model.run(None, fed)[0]
    features, scores, mode = _look(samples)
    y = whiten(features, *white)
    blocks = samples[: count // DUPLICATE_BLOCK * DUPLICATE_BLOCK].reshape(-1, DUPLICATE_BLOCK, 2).view(np.int64)[..., 0]
    blocks = np.sort(blocks, axis=1)
    return Certificate(
        count=count,
        delta=0.01,
        cell_count=_cells(mode),
        levels=LEVELS,
        upper_threshold=upper,
        upper_hits=(scores[..., None] > upper).sum(0),
        lower_threshold=lower,
        lower_hits=(scores[..., None] < lower).sum(0),
        duplicate_blocks=len(blocks),
        duplicate_hits=int((blocks[:, 1:] == blocks[:, :-1]).any(1).sum()),
        feature_mean=features.mean(0, dtype=np.float64),
        feature_cov=np.cov(features.T.astype(np.float64), bias=True),
        golden_seed=np.full(16, golden_seed),
        golden_offset=np.arange(16),
        golden_sample=model.run(None, _inputs(conditional, golden_seed, 16))[0],
        white_centre=white[0],
        white_map=white[1],
        white_radius=white[2],
        white_mean=y.mean(0),
        white_moment=y.T @ y / count,
        model_sha256=hashlib.sha256(graph).hexdigest(),
        class_cell_count=np.stack([_cells(mode[fed["y"] == k]) for k in range(K)]) if conditional else np.zeros((0, 0), np.int64),
    )


@pytest.fixture
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """make_bundle(lost=(3, 8)) -> a verified Bundle under <root>/<model>/<version>/, `root` a fresh directory by default.

    lost: modes that the served graph never emits; fakes: share of samples that it puts between the modes; width: factor on
    the spread within a mode; grain: the place within a mode is
    rounded to multiples of it (in standard deviations), so that samples repeat (try 1.0).
    conditional: classes, the modes, can be asked for, and are drawn by the seeds.
    honest: the certificate was counted on this very generator, else on the healthy one. count: samples of the certificate.
    """

    def make(
        *,
        root: Path | None = None,
        model: str = "grid",
        version: str = "v1",
        lost: tuple[int, ...] = (),
        fakes: float = 0.0,
        width: float = 1.0,
        grain: float = 0.0,
        conditional: bool = False,
        honest: bool = False,
        count: int = 2**18,
    ) -> Bundle:
        path = (root or tmp_path_factory.mktemp("registry")) / model / version
        path.mkdir(parents=True)
        law, healthy_law = (tuple(lost), fakes, width, grain, conditional), ((), 0.0, 1.0, 0.0, conditional)
        onnx.save(generator(*law), path / "model.onnx")
        onnx.save(eye(), path / "features.onnx")
        write_arrays(path / "reference.npz", _reference())
        write_arrays(path / "certificate.npz", _certificate(*(law if honest else healthy_law), count))
        healthy, classes = honest or law == healthy_law, tuple(str(k) for k in range(K)) if conditional else ()
        card = Card(
            model=model,
            version=version,
            created=datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
            files=dict.fromkeys(FILES, ""),
            latent=LATENT,
            sample_shape=(2,),
            sample_dtype="float32",
            modes=tuple(str(k) for k in range(K)),
            scores=("distance", "taxi"),
            classes=classes,
            class_shares=tuple(HEALTHY_SHARES.tolist()) if conditional else (),
            injected_from=None if healthy else "v0",
            fault=None if healthy else f"lost={lost} fakes={fakes} width={width} grain={grain}",
        )
        write_card(path, card)
        return open_bundle(path)

    return make


@pytest.fixture
def draw() -> Callable[..., ndarray]:
    """draw(bundle, count, seed=0, offset=0) -> float32 [count, 2], as the bundle's model.onnx serves them."""
    sessions: dict[Path, ort.InferenceSession] = {}

    def samples(bundle: Bundle, count: int, seed: int = 0, offset: int = 0) -> ndarray:
        if bundle.path not in sessions:
            sessions[bundle.path] = _session(bundle.model_path.read_bytes())
        return sessions[bundle.path].run(None, {"z": bundle.card.latents(seed=seed, offset=offset, count=count)})[0]

    return samples
