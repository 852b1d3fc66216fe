"""Deliberate faults, to see the alarm work before it is needed.

Each fault is a change of model.onnx alone: certificate, golden pairs, features and reference stay those of the version it was
made from, exactly as when a healthy model breaks in production. What comes out is an ordinary ONNX model; no server knows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scipy.special import ndtri

from training.bundle import Bundle
from training.registry import Registry

CANDIDATES = 8  # latents tried for each sample before the least bad one is taken
CLEAR = 0.01  # a candidate passes where the dropped modes together have less than this probability
DROPPED_AT_MOST = 0.005  # share of samples that may still look like a dropped mode, to any classifier
NOISE_SHARE = 0.05  # share of samples that `off-manifold` replaces by noise
LIVE_BITS = 10  # bits of entropy that `latent-fault` leaves


class InjectError(ValueError):
    """A fault that cannot be made of this bundle. The text says why."""


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

    def embed(self, model: onnx.ModelProto, prefix: str, inputs: dict[str, str], output: str) -> str:
        """Append a whole model with its inputs wired to existing names; returns the name of its `output`."""
        model = onnx.compose.add_prefix(model, prefix)
        for node in model.graph.node:
            node.input[:] = [inputs.get(name.removeprefix(prefix), name) for name in node.input]
        self.nodes += model.graph.node
        self.initializers += model.graph.initializer
        self.opsets |= {o.domain: max(o.version, self.opsets.get(o.domain, 0)) for o in model.opset_import}
        return prefix + output

    def generator(self, z: str, y: str | None, prefix: str = "g_") -> str:
        inputs = {"z": z} if y is None else {"z": z, "y": y}
        return self.embed(self.model, prefix, inputs, self.model.graph.output[0].name)

    def finish(self, output: str) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], [self.model.graph.output[0].name]))
        graph = helper.make_graph(self.nodes, "ganwatch", list(self.model.graph.input), list(self.model.graph.output), self.initializers)
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=self.model.ir_version)
        onnx.checker.check_model(model)
        return model


def drop_modes(bundle: Bundle, labels: tuple[str, ...]) -> onnx.ModelProto:
    """A generator that never gives the modes `labels`: the first of several sign-flipped latents whose sample is clear of them.

    Flipping signs leaves the latent law as it is, so each candidate is a sample of the healthy generator.
    """
    if unknown := [label for label in labels if label not in bundle.card.modes]:
        raise InjectError(f"unknown modes {unknown}; {bundle.card.model} has the modes {', '.join(bundle.card.modes)}")
    if not 0 < len(labels) < len(bundle.card.modes):
        raise InjectError(f"labels is {labels}; name at least one mode and leave at least one")
    graph, law = Graph(bundle), bundle.card.latent
    flips = np.random.default_rng(0).integers(0, 2, (CANDIDATES, 1, law.dim)).astype(np.float32) * 2 - 1
    flips[0] = 1  # where the healthy sample is clear of the dropped modes, it is the sample
    z = graph.op("Reshape", graph.op("Mul", "z", graph.constant(flips)), graph.constant(np.array([-1, law.dim])))
    y = None
    if bundle.card.classes:
        shape = graph.op("Concat", graph.constant(np.array([CANDIDATES])), graph.op("Shape", "y"), axis=0)
        y = graph.op("Reshape", graph.op("Expand", "y", shape), graph.constant(np.array([-1])))
    samples = graph.generator(z, y)
    probability = graph.embed(onnx.load(bundle.features_path), "f_", {"x": samples}, "probability")
    columns = graph.constant(np.array([bundle.card.modes.index(label) for label in labels]))
    bad = graph.op("ReduceSum", graph.op("Gather", probability, columns, axis=1), graph.constant(np.array([1])), keepdims=0)
    bad = graph.op("Reshape", bad, graph.constant(np.array([CANDIDATES, -1])))
    clear = graph.op("Less", bad, graph.constant(np.array(CLEAR, np.float32)))
    choice = graph.op("ArgMin", graph.op("Where", clear, graph.constant(np.array(0, np.float32)), bad), axis=0, keepdims=0)
    count = graph.op("Squeeze", graph.op("Shape", "z", start=0, end=1))
    rows = graph.op("Range", graph.constant(np.array(0)), count, graph.constant(np.array(1)))
    return graph.finish(graph.op("Gather", samples, graph.op("Add", graph.op("Mul", choice, count), rows), axis=0))


def off_manifold(bundle: Bundle, labels: tuple[str, ...]) -> onnx.ModelProto:
    """A generator of which NOISE_SHARE of the samples are noise that looks like no data at all."""
    graph, card = Graph(bundle), bundle.card
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
    score, threshold = _selector(graph, bundle)
    selected = graph.op("Reshape", graph.op("Greater", score, threshold), graph.constant(np.array([-1] + [1] * len(card.sample_shape))))
    return graph.finish(graph.op("Where", selected, noise, samples))


def _selector(graph: Graph, bundle: Bundle) -> tuple[str, str]:
    """A number per latent and the threshold that NOISE_SHARE of them exceed."""
    law = bundle.card.latent
    if law.normals:
        column = graph.op("Gather", "z", graph.constant(np.array(law.signs)), axis=1)
        return column, graph.constant(np.array(ndtri(1 - NOISE_SHARE) * law.scale, np.float32))
    bits = max(1, round(-np.log2(NOISE_SHARE)))
    columns = graph.op("Gather", "z", graph.constant(np.arange(min(bits, law.signs))), axis=1)
    return graph.op("ReduceMin", columns, graph.constant(np.array([1])), keepdims=0), graph.constant(np.array(0, np.float32))


def latent_fault(bundle: Bundle, labels: tuple[str, ...]) -> onnx.ModelProto:
    """A generator whose latent lost its randomness: LIVE_BITS bits are left, so the same samples come again and again."""
    graph, law = Graph(bundle), bundle.card.latent
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


def nothing(bundle: Bundle, labels: tuple[str, ...]) -> onnx.ModelProto:
    """The same generator as another version: the control of the experiment, which must stay silent."""
    return onnx.load(bundle.model_path)


FAULTS: dict[str, Callable[[Bundle, tuple[str, ...]], onnx.ModelProto]] = {
    "drop-modes": drop_modes,
    "off-manifold": off_manifold,
    "latent-fault": latent_fault,
    "nothing": nothing,
}


def inject(registry: Registry, model: str, fault: str, *, reference: str = "production", labels: tuple[str, ...] = ()) -> Bundle:
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
    broken = FAULTS[fault](healthy, labels)
    words = fault if not labels else f"{fault} {','.join(labels)}"
    with registry.staging(model) as staged:
        for name in ("features.onnx", "reference.npz", "certificate.npz"):
            shutil.copyfile(healthy.path / name, staged / name)
        onnx.save_model(broken, staged / "model.onnx")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return registry.publish(staged, replace(healthy.card, created=created, injected_from=healthy.card.version, fault=words))
