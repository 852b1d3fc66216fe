"""Small real bundles: a linear generator of 8x8 images and one of vectors, published through the registry like any other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.batcher import Batcher
from serving.models import ModelTable
from serving.pool import Pool
from serving.rest import App
from serving.sampler import Sampler
from serving.service import Service
from serving.tap import Tap
from training.bundle import Bundle, Card, Certificate, Reference, SignGaussian, write_arrays
from training.registry import Registry

LATENT = SignGaussian(signs=4, normals=12)
CLASSES = ("zero", "one", "two")


def generator(
    shape: tuple[int, ...], dtype: str, *, classes: int = 0, shift: float = 0.0, extra: tuple[onnx.NodeProto, ...] = ()
) -> onnx.ModelProto:
    """samples = z W (+ E[y]) + shift, as bytes around 128 or as floats. `extra` nodes are added, connected to nothing."""
    rng = np.random.default_rng(0)
    width = int(np.prod(shape))
    weights = {"W": rng.normal(size=(LATENT.dim, width)).astype(np.float32), "b": np.full(width, shift, np.float32)}
    nodes = [helper.make_node("MatMul", ["z", "W"], ["a"]), helper.make_node("Add", ["a", "b"], ["c"])]
    inputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", LATENT.dim])]
    if classes:
        weights["E"] = 5 * rng.normal(size=(classes, width)).astype(np.float32)
        nodes += [helper.make_node("Gather", ["E", "y"], ["e"]), helper.make_node("Add", ["c", "e"], ["f"])]
        inputs.append(helper.make_tensor_value_info("y", TensorProto.INT64, ["n"]))
    last = "f" if classes else "c"
    if dtype == "uint8":
        weights |= {"scale": np.float32(20), "middle": np.float32(128), "low": np.float32(0), "high": np.float32(255)}
        nodes += [
            helper.make_node("Mul", [last, "scale"], ["g"]),
            helper.make_node("Add", ["g", "middle"], ["h"]),
            helper.make_node("Clip", ["h", "low", "high"], ["i"]),
            helper.make_node("Cast", ["i"], ["j"], to=TensorProto.UINT8),
        ]
        last = "j"
    weights["shape"] = np.array([-1, *shape], np.int64)
    nodes += [helper.make_node("Reshape", [last, "shape"], ["samples"]), *extra]
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info("samples", kind, ["n", *shape])]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "generator", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def features(shape: tuple[int, ...], dtype: str) -> onnx.ModelProto:
    """Two modes, told apart by the sign of the first value; two features; one score."""
    width = int(np.prod(shape))
    weights = {
        "P": np.eye(width, 2, dtype=np.float32),
        "Q": np.ones((width, 1), np.float32),
        "flat": np.array([0, width], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["a", "flat"], ["b"]),
        helper.make_node("MatMul", ["b", "P"], ["features"]),
        helper.make_node("MatMul", ["b", "Q"], ["scores"]),
        helper.make_node("Softmax", ["features"], ["probability"], axis=1),
        helper.make_node("ArgMax", ["features"], ["mode"], axis=1, keepdims=0),
    ]
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT
    outputs = [
        ("features", TensorProto.FLOAT, ["n", 2]),
        ("scores", TensorProto.FLOAT, ["n", 1]),
        ("mode", TensorProto.INT64, ["n"]),
    ]
    outputs.append(("probability", TensorProto.FLOAT, ["n", 2]))
    graph = helper.make_graph(
        nodes,
        "features",
        [helper.make_tensor_value_info("x", kind, ["n", *shape])],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def publish(
    registry: Registry,
    name: str,
    *,
    shape: tuple[int, ...] = (8, 8, 1),
    dtype: str = "uint8",
    classes: tuple[str, ...] = (),
    model: onnx.ModelProto | None = None,
    shift: float = 0.0,
    promote: bool = True,
) -> Bundle:
    """The next version of model `name`; `model` replaces its generator. The statistics are of no sample in particular."""
    reference = Reference(
        1000, np.full(3, 1 / 3), np.zeros(2), np.eye(2), np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)
    )
    tails = np.ones((1, 16))
    hits = np.ones((1, 16), np.int64)
    golden = np.zeros(1, np.int64)
    certificate = Certificate(
        count=1000, delta=0.01, cell_count=np.array([500, 490, 10]), levels=2.0 ** -np.arange(1, 17),
        upper_threshold=tails, upper_hits=hits, lower_threshold=tails, lower_hits=hits, duplicate_blocks=31, duplicate_hits=0,
        feature_mean=np.zeros(2), feature_cov=np.eye(2),
        golden_seed=golden, golden_offset=golden, golden_sample=np.zeros((1, *shape), dtype),
    )  # fmt: skip
    card = Card(
        model=name, version="", created="2026-01-01T00:00:00+00:00", files={}, latent=LATENT,
        sample_shape=shape, sample_dtype=dtype,
        modes=("left", "right"), scores=("sum",), classes=classes, class_shares=tuple(1 / len(classes) for _ in classes),
    )  # fmt: skip
    with registry.staging(name) as staged:
        onnx.save(model or generator(shape, dtype, classes=len(classes), shift=shift), staged / "model.onnx")
        onnx.save(features(shape, dtype), staged / "features.onnx")
        write_arrays(staged / "reference.npz", reference)
        write_arrays(staged / "certificate.npz", certificate)
        bundle = registry.publish(staged, card)
    if promote:
        registry.set_alias(name, "production", bundle.card.version, reason="test")
    return bundle


def fill(root: Path) -> Registry:
    """A registry with `digits` (images), `ring` (vectors) and `clothes` (images with classes), each promoted."""
    registry = Registry(root)
    publish(registry, "digits")
    publish(registry, "ring", shape=(2,), dtype="float32")
    publish(registry, "clothes", shape=(4, 4, 3), classes=CLASSES)
    return registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return fill(tmp_path / "registry")


@pytest.fixture(scope="session")
def samplers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sampler]:
    registry = fill(tmp_path_factory.mktemp("session") / "registry")
    return {name: Sampler(registry.open(name), "cpu") for name in registry.models()}


@asynccontextmanager
async def running(registry: Registry, *, batcher: Batcher | None = None, pool: Pool | None = None, tap_url: str | None = None) -> AsyncIterator[App]:
    """An app over `registry` on the CPU, loaded once; it follows the registry only when `app.service.table.refresh` is called."""
    table = ModelTable(registry, "cpu")
    table.refresh()
    app = App(Service(table, batcher or Batcher(), Tap(tap_url), pool))
    try:
        yield app
    finally:
        await app.service.batcher.close()


def connect(app: App) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ganwatch")
