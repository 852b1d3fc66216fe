"""Makes a bundle of a generator that was trained elsewhere: any ONNX graph from latents to samples, such as a VAE, a flow, a GAN.

What its output means is found out from the reference data and from samples, and converted inside the graph to what is served.
It knows nothing of how the generator was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy import ndarray
from onnx import TensorProto, helper, numpy_helper

from training.bundle import Card, SignGaussian
from training.data import DataError, Dataset
from training.export import complete_bundle, session
from training.features import fit_eye
from training.sources import label, open_dataset

# pixels from, to, with some overshoot, and what brings them to 0..255
PIXELS = ((-0.05, 1.5, (255.0, 0.0)), (-1.5, 1.5, (127.5, 127.5)), (-50.0, 300.0, (1.0, 0.0)))
_PART = re.compile(r"(signs|normal):(\d+)(?:x([0-9.]+))?")


def adopt(
    path: Path,
    reference: str,
    latent: str,
    directory: Path,
    *,
    model: str | None = None,
    certify_samples: int = 1_000_000,
    certify_seconds: float = 10.0,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> Card:
    """Write a complete bundle into the new `directory`. Raises DataError where generator, data and latents do not fit together."""
    law, generator = read_law(latent), _load(path)
    dataset = open_dataset(reference, cache=directory / "data", say=lambda words: None)
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(as_served(generator, path, dataset, law), directory / "model.onnx")
    _check(directory / "model.onnx", path, dataset, law)
    return complete_bundle(
        directory,
        model=model or label(str(path)),
        dataset=dataset,
        latent=law,
        sight=fit_eye(dataset, seed=0),
        classes=(),
        class_shares=(),
        training={"adopted": str(path), "reference": reference},
        certify_samples=certify_samples,
        certify_seconds=certify_seconds,
        keep_points=True,
        progress=progress,
    )


def read_law(words: str) -> SignGaussian:
    """`normal:128`, `normal:64x0.5` or `signs:16+normal:48` as a latent law. Raises DataError."""
    parts = [_PART.fullmatch(part) for part in words.split("+")]
    kinds = [part[1] for part in parts if part]
    if not all(parts) or kinds not in (["normal"], ["signs"], ["signs", "normal"]) or any(p[1] == "signs" and p[3] for p in parts):
        raise DataError(f"--latent is {words}; normal:128, normal:64x0.5, signs:16 or signs:16+normal:48 is expected")
    count = {part[1]: int(part[2]) for part in parts}
    scale = next((float(part[3]) for part in parts if part[3]), 1.0)
    return SignGaussian(count.get("signs", 0), count.get("normal", 0), scale)


def as_served(model: onnx.ModelProto, path: Path, dataset: Dataset, law: SignGaussian) -> onnx.ModelProto:
    """The graph with input `z` and output `samples` as the data are: uint8 [n, h, w, c], or float32 [n, d]."""
    graph = model.graph
    stored = {weight.name for weight in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise DataError(f"{path} has inputs {', '.join(v.name for v in inputs)}; one float32 input of latents is expected")
    if drawn := sorted({node.op_type for node in graph.node if node.op_type.startswith("Random")}):
        raise DataError(f"{path} draws random numbers itself ({', '.join(drawn)}); give it all its randomness as input, so that seeds repeat")
    shape = [d.dim_value if d.HasField("dim_value") else 0 for d in inputs[0].type.tensor_type.shape.dim]
    if shape[1:] and 0 not in shape[1:] and int(np.prod(shape[1:])) != law.dim:
        raise DataError(f"{path} takes latents of {int(np.prod(shape[1:]))} numbers, and --latent gives {law.dim}")
    if shape and shape[0] > 1 or shape[:1] == [1]:
        raise DataError(f"{path} has a batch of {shape[0]} fixed in its graph; export it with a dynamic first axis")

    rest = [s or law.dim for s in shape[1:]]
    _rename(graph, inputs[0].name, "latents_in" if len(rest) != 1 else "z")
    if len(rest) != 1:  # such as [n, 128, 1, 1]
        graph.initializer.append(numpy_helper.from_array(np.array([-1, *rest], np.int64), "z_shape"))
        graph.node.insert(0, helper.make_node("Reshape", ["z", "z_shape"], ["latents_in"]))
    while graph.input:
        graph.input.pop()
    graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", law.dim]))

    _rename(graph, graph.output[0].name, "generated")
    while graph.output:
        graph.output.pop()
    graph.output.append(helper.make_empty_tensor_value_info("generated"))
    found = _run(model, law, path)
    steps: list[onnx.NodeProto] = []
    last = "generated"

    def then(operator: str, *operands: ndarray, **attributes: object) -> None:
        nonlocal last
        names = [f"served_{len(steps)}_{i}" for i in range(len(operands))]
        graph.initializer.extend(numpy_helper.from_array(value, name) for value, name in zip(operands, names, strict=True))
        steps.append(helper.make_node(operator, [last, *names], [f"served_{len(steps)}"], **attributes))
        last = steps[-1].output[0]

    wanted = dataset.shape
    if found.shape[1:] != wanted:
        if dataset.is_image and found.shape[1:] == (wanted[2], *wanted[:2]):
            then("Transpose", perm=[0, 2, 3, 1])
        elif int(np.prod(found.shape[1:])) == dataset.dim and (not dataset.is_image or wanted[2] == 1):
            then("Reshape", np.array([-1, *wanted], np.int64))
        else:
            raise DataError(f"{path} gives samples of {list(found.shape[1:])}, and the reference holds {list(wanted)}")
    if dataset.is_image and found.dtype != np.uint8:
        low, high = float(found.min()), float(found.max())
        scale, shift = next((how for least, most, how in PIXELS if low >= least and high <= most), (0.0, 0.0))
        if not scale:
            raise DataError(f"{path} gives pixels from {low:.3g} to {high:.3g}; -1 to 1, 0 to 1 or 0 to 255 is expected")
        then("Mul", np.array(scale, np.float32))
        then("Add", np.array(shift, np.float32))
        then("Round")
        then("Clip", np.array(0, np.float32), np.array(255, np.float32))
        then("Cast", to=TensorProto.UINT8)
    elif not dataset.is_image and found.dtype != np.float32:
        then("Cast", to=TensorProto.FLOAT)
    then("Identity")
    steps[-1].output[0] = "samples"
    graph.node.extend(steps)
    graph.output.pop()
    kind = TensorProto.UINT8 if dataset.is_image else TensorProto.FLOAT
    graph.output.append(helper.make_tensor_value_info("samples", kind, ["n", *wanted]))
    return model


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's own errors share no base
        raise DataError(f"{path} cannot be read as ONNX ({error})") from None


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def _run(model: onnx.ModelProto, law: SignGaussian, path: Path) -> ndarray:
    try:
        return session(model.SerializeToString()).run(["generated"], {"z": law.sample(seed=0, count=64)})[0]
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise DataError(f"{path} does not run on 64 latents of {law.dim}: {error}") from None


def _check(served: Path, path: Path, dataset: Dataset, law: SignGaussian) -> None:
    """Batches of any size, repeatable, finite, and not one and the same sample."""
    z, run = law.sample(seed=1, count=64), session(served)
    try:
        whole, *parts = (run.run(["samples"], {"z": z[:n]})[0] for n in (64, 1, 2, 7))
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise DataError(f"{path} does not run in batches of 1, 2, 7 and 64: {error}") from None
    tolerance = 1.0 if dataset.is_image else 1e-3 * max(1.0, float(np.abs(whole).max()))
    for part, n in zip(parts, (1, 2, 7), strict=True):
        if part.shape != (n, *dataset.shape) or np.abs(part.astype(np.float64) - whole[:n]).max() > tolerance:
            raise DataError(f"{path} gives other samples in a batch of {n} than in one of 64; export it in eval mode with a dynamic batch")
    if not np.isfinite(whole.astype(np.float64)).all():
        raise DataError(f"{path} gives samples that are not finite")
    if (whole == whole[:1]).all():
        raise DataError(f"{path} gives one and the same sample for every latent")
