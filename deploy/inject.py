"""Deliberate faults, to see the alarm work before it is needed.

Each fault is a change of model.onnx alone: certificate, golden pairs, features and reference stay those of the version it was
made from, exactly as when a healthy model breaks in production. What comes out is an ordinary ONNX model; no server knows.
So the latents that a replica notes stay those of their seeds: what a fault does to them happens inside the graph, and is seen when
samples are run again, not by the tests of latents in use.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scipy.special import ndtri

from training.bundle import Bundle
from training.data import DataError
from training.registry import Registry
from training.sources import open_dataset

CANDIDATES = 8  # latents tried for each sample before the least bad one is taken
# A candidate passes where the dropped modes together have less than this probability. With less, more of what looks like them
# goes, too: .01 took half of the nines of MNIST with the fours, and 87 % of Fashion-MNIST's coats with the pullovers.
CLEAR = 0.05
DROPPED_AT_MOST = 0.005  # share of samples that may still look like a dropped mode, to any classifier
NOISE_SHARE = 0.05  # share of samples that `off-manifold` replaces by noise
LIVE_BITS = 10  # bits of entropy that `latent-fault` leaves
COPY_SHARE = 0.01  # share of samples that `copies` replaces by training data
COPIED = 512  # training samples that are copied
KEPT_MASS = 0.5  # of each normal latent: what `truncated` leaves
ALIKE = 16  # latents tried for each sample by `collapse`


class InjectError(ValueError):
    """A fault that cannot be made of this bundle. The text says why."""


@dataclass(frozen=True)
class Request:
    """What a fault is made of: the healthy bundle, the modes to lose, where the training data are, other versions."""

    bundle: Bundle
    registry: Registry
    labels: tuple[str, ...] = ()
    data: str | None = None


class Graph:
    """A generator's graph under construction: nodes are appended, every name is given once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.model = onnx.load(bundle.model_path)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions = list(self.model.functions)
        self.opsets = {o.domain: o.version for o in self.model.opset_import}

    def constant(self, value: np.ndarray) -> str:
        name = f"inject_c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        output = f"inject_{len(self.nodes)}_{kind.lower()}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def embed(self, model: onnx.ModelProto, prefix: str, inputs: dict[str, str], *outputs: str) -> list[str]:
        """Append a whole model with its inputs wired to existing names; returns the names of its `outputs`."""
        model = onnx.compose.add_prefix(model, prefix)
        for node in model.graph.node:
            node.input[:] = [inputs.get(name.removeprefix(prefix), name) for name in node.input]
        self.nodes += model.graph.node
        self.initializers += model.graph.initializer
        self.opsets |= {o.domain: max(o.version, self.opsets.get(o.domain, 0)) for o in model.opset_import}
        return [prefix + output for output in outputs]

    def generator(self, z: str, y: str | None, prefix: str = "g_") -> str:
        inputs = {"z": z} if y is None else {"z": z, "y": y}
        return self.embed(self.model, prefix, inputs, self.model.graph.output[0].name)[0]

    def finish(self, output: str) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], [self.model.graph.output[0].name]))
        graph = helper.make_graph(self.nodes, "ganwatch", list(self.model.graph.input), list(self.model.graph.output), self.initializers)
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=self.model.ir_version)
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            card = self.bundle.card
            words = f"{card.model} {card.version} is a graph into which this fault cannot be put ({str(error).splitlines()[0]})"
            raise InjectError(f"{words}; export it for opset 18, without If, to try faults on it") from None
        return model


def drop_modes(request: Request) -> onnx.ModelProto:
    """A generator that never gives the modes `labels`: the first of several samples of the healthy one that is clear of them."""
    bundle, labels = request.bundle, request.labels
    if unknown := [label for label in labels if label not in bundle.card.modes]:
        raise InjectError(f"unknown modes {unknown}; {bundle.card.model} has the modes {', '.join(bundle.card.modes)}")
    if not 0 < len(labels) < len(bundle.card.modes):
        raise InjectError(f"labels is {labels}; name at least one mode and leave at least one")
    graph = Graph(bundle)
    samples = _candidates(graph, CANDIDATES)
    (probability,) = graph.embed(onnx.load(bundle.features_path), "f_", {"x": samples}, "probability")
    columns = graph.constant(np.array([bundle.card.modes.index(label) for label in labels]))
    bad = graph.op("ReduceSum", graph.op("Gather", probability, columns, axis=1), graph.constant(np.array([1])), keepdims=0)
    bad = graph.op("Reshape", bad, graph.constant(np.array([CANDIDATES, -1])))
    clear = graph.op("Less", bad, graph.constant(np.array(CLEAR, np.float32)))
    return graph.finish(_best(graph, samples, graph.op("Where", clear, graph.constant(np.array(0, np.float32)), bad)))


def _candidates(graph: Graph, count: int) -> str:
    """[count * n, ...]: the samples of z, then those of z with its coordinates shuffled and flipped, which leaves their law as it is."""
    law, rng = graph.bundle.card.latent, np.random.default_rng(0)
    flips = rng.integers(0, 2, (count, 1, law.dim)).astype(np.float32) * 2 - 1
    order = np.stack([np.concatenate([rng.permutation(law.signs), law.signs + rng.permutation(law.normals)]) for _ in range(count)])
    flips[0], order[0] = 1, np.arange(law.dim)  # where the healthy sample will do, it is the sample
    shuffled = graph.op("Reshape", graph.op("Gather", "z", graph.constant(order.ravel()), axis=1), graph.constant(np.array([-1, count, law.dim])))
    z = graph.op("Mul", graph.op("Transpose", shuffled, perm=[1, 0, 2]), graph.constant(flips))
    z = graph.op("Reshape", z, graph.constant(np.array([-1, law.dim])))
    y = None
    if graph.bundle.card.classes:
        shape = graph.op("Concat", graph.constant(np.array([count])), graph.op("Shape", "y"), axis=0)
        y = graph.op("Reshape", graph.op("Expand", "y", shape), graph.constant(np.array([-1])))
    return graph.generator(z, y)


def _best(graph: Graph, samples: str, badness: str) -> str:
    """Of each sample's candidates the first with least `badness` [candidates, n]."""
    choice = graph.op("ArgMin", badness, axis=0, keepdims=0)
    count = graph.op("Squeeze", graph.op("Shape", "z", start=0, end=1))
    rows = graph.op("Range", graph.constant(np.array(0)), count, graph.constant(np.array(1)))
    return graph.op("Gather", samples, graph.op("Add", graph.op("Mul", choice, count), rows), axis=0)


def collapse(request: Request) -> onnx.ModelProto:
    """A generator that keeps its modes and loses their variety: of several latents whose samples fall into one mode it gives the
    most typical sample, that of the smallest score."""
    graph = Graph(request.bundle)
    samples = _candidates(graph, ALIKE)
    mode, scores = graph.embed(onnx.load(request.bundle.features_path), "f_", {"x": samples}, "mode", "scores")
    by_candidate = graph.constant(np.array([ALIKE, -1]))
    mode = graph.op("Reshape", mode, by_candidate)
    typical = graph.op("Reshape", graph.op("Gather", scores, graph.constant(np.array(0)), axis=1), by_candidate)
    same = graph.op("Equal", mode, graph.op("Gather", mode, graph.constant(np.array([0])), axis=0))
    return graph.finish(_best(graph, samples, graph.op("Where", same, typical, graph.constant(np.array(1e30, np.float32)))))


def truncated(request: Request) -> onnx.ModelProto:
    """A generator whose normal latents are squeezed into the central KEPT_MASS of their law, as by a forgotten truncation."""
    graph, law = Graph(request.bundle), request.bundle.card.latent
    if not law.normals:
        raise InjectError(f"{request.bundle.card.model} has no normal latents to truncate; collapse does the like to any model")

    def scalar(value: float) -> str:
        return graph.constant(np.array(value, np.float32))

    # z' = inverse of Phi at KEPT_MASS of Phi's distance from 1/2; erf's inverse after Winitzki (2008), to 0.2 %
    signs, normals = (graph.op("Gather", "z", graph.constant(np.arange(*ends)), axis=1) for ends in ((0, law.signs), (law.signs, law.dim)))
    x = graph.op("Mul", graph.op("Erf", graph.op("Div", normals, scalar(law.scale * np.sqrt(2)))), scalar(KEPT_MASS))
    log = graph.op("Log", graph.op("Sub", scalar(1.0), graph.op("Mul", x, x)))
    half = graph.op("Add", graph.op("Mul", log, scalar(0.5)), scalar(2 / (np.pi * 0.147)))
    root = graph.op("Sqrt", graph.op("Sub", graph.op("Mul", half, half), graph.op("Div", log, scalar(0.147))))
    inverse = graph.op("Mul", graph.op("Sign", x), graph.op("Sqrt", graph.op("Sub", root, half)))
    z = graph.op("Concat", signs, graph.op("Mul", inverse, scalar(law.scale * np.sqrt(2))), axis=1)
    return graph.finish(graph.generator(z, "y" if request.bundle.card.classes else None))


def copies(request: Request) -> onnx.ModelProto:
    """A generator of which COPY_SHARE of the samples are samples of its training data."""
    graph, card = Graph(request.bundle), request.bundle.card
    config = card.training.get("config", card.training)
    name, where = request.data or card.dataset, None if request.data or "recertified" in card.training else config.get("data")
    if not name:
        raise InjectError(f"the card of {card.model} does not name its training data; name them with --data")
    try:
        with tempfile.TemporaryDirectory() as cache:
            dataset = open_dataset(name, data=where, cache=Path(cache), say=lambda words: None)
            some = np.linspace(0, dataset.trained - 1, min(COPIED, dataset.trained)).astype(int)
            data = np.ascontiguousarray(dataset.samples[some])
    except (DataError, OSError) as error:
        raise InjectError(f"the training data of {card.model}, {name}, cannot be read ({error}); name them with --data") from None
    if data.shape[1:] != card.sample_shape or data.dtype != card.sample_dtype:
        raise InjectError(f"{name} holds {data.dtype} {list(data.shape[1:])}, and {card.model} serves {card.sample_dtype} {list(card.sample_shape)}")
    weights = np.random.default_rng(3).normal(size=(card.latent.dim, 1)).astype(np.float32) * 1e3
    wave = graph.op("Abs", graph.op("Sin", graph.op("MatMul", "z", graph.constant(weights))))  # [0, 1], a hash of z
    place = graph.op("Cast", graph.op("Mul", graph.op("Squeeze", wave, graph.constant(np.array([1]))), graph.constant(np.array(len(data) - 0.5, np.float32))), to=TensorProto.INT64)
    twins = graph.op("Gather", graph.constant(data), place, axis=0)
    return graph.finish(_mixed(graph, COPY_SHARE, twins, graph.generator("z", "y" if card.classes else None)))


def int8(request: Request) -> onnx.ModelProto:
    """The generator with its weights rounded to 8 bits by onnxruntime, as somebody does who wants it faster."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # slow to import, and the command line imports this file

    logging.getLogger().addFilter(_about_preprocessing)
    try:
        with tempfile.TemporaryDirectory() as directory:
            plain, path = Path(directory) / "plain.onnx", Path(directory) / "int8.onnx"
            model = onnx.load(request.bundle.model_path)
            del model.graph.value_info[:]  # the exporter's notes of shapes contradict onnx's own, which the quantiser runs
            onnx.save(model, plain)
            quantize_dynamic(plain, path, op_types_to_quantize=["MatMul", "Gemm", "Conv"], weight_type=QuantType.QUInt8)
            model = onnx.load(path)
    finally:
        logging.getLogger().removeFilter(_about_preprocessing)
    if not any(weight.data_type == TensorProto.UINT8 for weight in model.graph.initializer):
        raise InjectError(f"{request.bundle.card.model} has no weights that onnxruntime quantises")
    return model


def _about_preprocessing(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()


def checkpoint(request: Request) -> onnx.ModelProto:
    """Another training's generator under this one's certificate: the newest other version of the model that is no fault itself."""
    registry, card = request.registry, request.bundle.card
    for version in reversed(registry.versions(card.model)):
        other = registry.card(card.model, version)
        if other.injected_from is None and other.files["model.onnx"] != card.files["model.onnx"] and other.latent == card.latent:
            return onnx.load(registry.open(card.model, version).model_path)
    raise InjectError(f"{card.model} has no other version with such latents; train another one, with another --seed")


def off_manifold(request: Request) -> onnx.ModelProto:
    """A generator of which NOISE_SHARE of the samples are noise that looks like no data at all."""
    bundle, graph, card = request.bundle, Graph(request.bundle), request.bundle.card
    samples = graph.generator("z", "y" if card.classes else None)
    size = int(np.prod(card.sample_shape))
    weights = np.random.default_rng(1).normal(size=(card.latent.dim, size)).astype(np.float32) * 1e3
    wave = graph.op("Sin", graph.op("MatMul", "z", graph.constant(weights)))  # [-1, 1], a hash of z
    shape = graph.constant(np.array([-1, *card.sample_shape]))
    if card.is_image:
        noise = graph.op("Mul", graph.op("Add", wave, graph.constant(np.array(1, np.float32))), graph.constant(np.array(127.5, np.float32)))
        noise = graph.op("Cast", graph.op("Reshape", noise, shape), to=TensorProto.UINT8)
    else:
        reach = 3 * np.abs(bundle.certificate.golden_sample).max()
        noise = graph.op("Reshape", graph.op("Mul", wave, graph.constant(np.array(reach, np.float32))), shape)
    return graph.finish(_mixed(graph, NOISE_SHARE, noise, samples))


def _mixed(graph: Graph, share: float, these: str, samples: str) -> str:
    """`samples`, but for `share` of the latents `these`."""
    score, threshold = _selector(graph, share)
    ones = [1] * len(graph.bundle.card.sample_shape)
    return graph.op("Where", graph.op("Reshape", graph.op("Greater", score, threshold), graph.constant(np.array([-1, *ones]))), these, samples)


def _selector(graph: Graph, share: float) -> tuple[str, str]:
    """A number per latent and the threshold that `share` of them exceed."""
    law = graph.bundle.card.latent
    if law.normals:
        column = graph.op("Gather", "z", graph.constant(np.array(law.signs)), axis=1)
        return column, graph.constant(np.array(ndtri(1 - share) * law.scale, np.float32))
    bits = max(1, round(-np.log2(share)))
    columns = graph.op("Gather", "z", graph.constant(np.arange(min(bits, law.signs))), axis=1)
    return graph.op("ReduceMin", columns, graph.constant(np.array([1])), keepdims=0), graph.constant(np.array(0, np.float32))


def latent_fault(request: Request) -> onnx.ModelProto:
    """A generator whose latent lost its randomness: LIVE_BITS bits are left, so the same samples come again and again."""
    bundle, graph, law = request.bundle, Graph(request.bundle), request.bundle.card.latent
    bits = min(LIVE_BITS, law.dim)
    sign = graph.op("Sign", graph.op("Gather", "z", graph.constant(np.arange(bits)), axis=1))
    # Every other sign is the product of two live bits: each stays balanced, so single samples look healthy.
    rng = np.random.default_rng(2)
    columns = [sign]
    for _ in range(max(law.signs - bits, 0)):
        a, b = rng.choice(bits, 2, replace=False)
        pair = [graph.op("Gather", sign, graph.constant(np.array([i])), axis=1) for i in (a, b)]
        columns.append(graph.op("Mul", *pair))
    live = graph.op("Concat", *columns, axis=1) if len(columns) > 1 else sign
    # The normals are those of a fixed table, picked by the live bits through their signs.
    missing = law.dim - max(law.signs, bits)
    if missing > 0:
        table = rng.normal(size=(bits, missing)).astype(np.float32) * np.float32(law.scale / np.sqrt(bits))
        live = graph.op("Concat", live, graph.op("MatMul", sign, graph.constant(table)), axis=1)
    return graph.finish(graph.generator(live, "y" if bundle.card.classes else None))


def nothing(request: Request) -> onnx.ModelProto:
    """The same generator as another version: the control of the experiment, which must stay silent."""
    return onnx.load(request.bundle.model_path)


FAULTS: dict[str, Callable[[Request], onnx.ModelProto]] = {
    "drop-modes": drop_modes,
    "off-manifold": off_manifold,
    "collapse": collapse,
    "truncated": truncated,
    "copies": copies,
    "latent-fault": latent_fault,
    "int8": int8,
    "checkpoint": checkpoint,
    "nothing": nothing,
}


def inject(
    registry: Registry, model: str, fault: str, *, reference: str = "production", labels: tuple[str, ...] = (), data: str | None = None
) -> Bundle:
    """Publish a faulty version made from `reference` of `model`, or from what that was made of. Promotes nothing.

    Raises InjectError, RegistryError or BundleError.
    """
    if fault not in FAULTS:
        raise InjectError(f"fault is {fault!r}; it must be one of {', '.join(FAULTS)}")
    if labels and fault != "drop-modes":
        raise InjectError(f"labels is {','.join(labels)}; only drop-modes takes labels")
    healthy = registry.open(model, reference)
    if healthy.card.injected_from is not None:  # one fault at a time, and the way back leads to a healthy version
        healthy = registry.open(model, healthy.card.injected_from)
    if data is not None and fault != "copies":
        raise InjectError(f"data is {data}; only copies takes data")
    broken = FAULTS[fault](Request(healthy, registry, labels, data))
    words = fault if not labels else f"{fault} {','.join(labels)}"
    with registry.staging(model) as staged:
        for name in ("features.onnx", "reference.npz", "certificate.npz"):
            shutil.copyfile(healthy.path / name, staged / name)
        onnx.save_model(broken, staged / "model.onnx")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return registry.publish(staged, replace(healthy.card, created=created, injected_from=healthy.card.version, fault=words))
