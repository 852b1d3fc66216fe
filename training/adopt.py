"""Makes a bundle of a generator that was trained elsewhere: any ONNX graph from latents to samples, such as a VAE, a flow, a GAN.

What its output means is found out from the reference data and from samples, and converted inside the graph to what is served.
It knows nothing of how the generator was trained.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
from jaxtyping import Shaped
from numpy import ndarray
from onnx import TensorProto, helper, numpy_helper, version_converter

from training.bundle import BundleError, Card, SignGaussian
from training.data import DataError, Dataset
from training.export import complete_bundle, session
from training.features import fit_eye
from training.registry import checked_name
from training.sources import label, open_dataset


class Step(NamedTuple):
    """An ONNX operator on one tensor, with at most one constant beside it."""

    operator: str
    constant: ndarray | None = None
    attributes: Mapping[str, Any] = MappingProxyType({})


OPSET = 9  # the oldest that has every operator of the steps below: Round, and Clip with limits as inputs, came later
INNER = "generator/"  # begins every name of the adopted graph, so that none is one of ours

_TO_UNIFORM = (Step("Mul", np.float32(0.5**0.5)), Step("Erf"))  # erf(z / sqrt 2) = 2 Phi(z) - 1
UNIFORM: dict[str, tuple[Step, ...]] = {  # what makes such latents of normals
    "uniform": _TO_UNIFORM,
    "uniform01": (*_TO_UNIFORM, Step("Mul", np.float32(0.5)), Step("Add", np.float32(0.5))),
}

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
RANDOM = re.compile("Random.*|Bernoulli|Multinomial")  # operators
# What brings pixels to 0..255: all but the outermost thousandths lie within the first two numbers, which leaves room for overshoot,
# and the brightest of all within the next two: small numbers are not 0..255, and a few bright dots on black are.
PIXELS = (
    (-0.05, 1.5, -0.05, 4.0, (255.0, 0.0)),
    (-1.5, 1.5, -1.5, 4.0, (127.5, 127.5)),
    (-32.0, 300.0, 32.0, 1000.0, (1.0, 0.0)),
)


def adopt(
    path: Path,
    reference: str,
    latent: str,
    directory: Path,
    *,
    model: str | None = None,
    skip_bad_files: bool = False,
    certify_samples: int = 1_000_000,
    certify_seconds: float = 10.0,
    say: Callable[[str], None] = lambda words: None,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> Card:
    """Write a complete bundle into the new `directory`, or nothing. `say` hears what of the reference is left out.

    Raises DataError where generator, data and latents do not fit together, RegistryError where `model` is no name for one.
    """
    model = checked_name(model or label(str(path))[:64], "model")
    (law, steps), generator = read_law(latent), _load(path)
    with whole(directory), tempfile.TemporaryDirectory(prefix="data-", dir=directory) as cache:
        dataset = open_dataset(reference, cache=Path(cache), skip_bad_files=skip_bad_files, say=say, option="--reference")
        onnx.save(as_served(generator, path, dataset, law, steps), directory / "model.onnx")
        _check(directory / "model.onnx", path, dataset, law)
        return complete_bundle(
            directory,
            model=model,
            dataset=dataset,
            latent=law,
            sight=fit_eye(dataset, seed=0),
            classes=(),
            class_shares=(),
            training={"adopted": str(path), "reference": reference, "latent": latent},
            certify_samples=certify_samples,
            certify_seconds=certify_seconds,
            keep_points=True,
            progress=progress,
        )


@contextmanager
def whole(directory: Path) -> Iterator[None]:
    """Make the new `directory`; a failure removes it, and the directories above that were made for it."""
    above = [parent for parent in directory.parents if not parent.exists()]
    directory.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # another adoption may be in there
            for parent in above:
                parent.rmdir()
        raise


def read_law(words: str) -> tuple[SignGaussian, tuple[Step, ...]]:
    """`normal:128`, `normal:64x0.5`, `signs:16+normal:48`, `uniform:100` or `uniform01:100`: what is drawn, and the steps from it to
    the law meant. Raises DataError.
    """
    if uniform := re.fullmatch(r"(uniform|uniform01):([1-9]\d{0,5})", words):
        return SignGaussian(0, int(uniform[2])), UNIFORM[uniform[1]]
    try:
        return SignGaussian.read(words), ()
    except BundleError as error:
        raise DataError(
            f"--latent is {error}, or uniform:100 (from -1 to 1) or uniform01:100 (from 0 to 1); for any other law, let the graph begin "
            "with what makes it of normals"
        ) from None


def as_served(model: onnx.ModelProto, path: Path, dataset: Dataset, law: SignGaussian, steps: Sequence[Step] = ()) -> onnx.ModelProto:
    """The graph with input `z` and output `samples` as the data are: uint8 [n, h, w, c], or float32 [n, d].

    `steps` make the generator's input of `z`. Raises DataError where generator, data and latents do not fit together.
    """
    graph = model.graph
    given, shape = _latents(model, path, law)
    steps = list(steps)
    if shape != [law.dim]:  # such as [n, 128, 1, 1]
        steps.append(Step("Reshape", np.array([-1, *shape], np.int64)))
    if (kind := given.type.tensor_type.elem_type) != TensorProto.FLOAT:
        steps.append(Step("Cast", attributes={"to": kind}))
    first, last = INNER + given.name, INNER + graph.output[0].name

    _prefix_names(graph)
    for node in reversed(_chain("given", "z", steps, first)):
        graph.node.insert(0, node)
    del graph.input[:], graph.output[1:]
    graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", law.dim]))
    model.ir_version = max(model.ir_version, 4)  # before, what is stored had to be an input, too

    graph.node.extend(_chain("served", last, _conversion(_run(model, last, law, path), dataset, path), "samples"))
    del graph.output[:]
    kind = TensorProto.UINT8 if dataset.is_image else TensorProto.FLOAT
    graph.output.append(helper.make_tensor_value_info("samples", kind, ["n", *dataset.shape]))
    return model


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own errors share no base
        raise DataError(f"{path} cannot be read as ONNX ({error})") from None
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OPSET)
    if opset >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # nor do the converter's
        raise DataError(f"{path} is of opset {opset} and cannot be brought to {OPSET} ({error}); export it for opset {OPSET} or later") from None


def _latents(model: onnx.ModelProto, path: Path, law: SignGaussian) -> tuple[onnx.ValueInfoProto, list[int]]:
    """The graph's only input and the shape of one latent there, after all that a graph must be to be certified was looked at."""
    stored = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type not in FLOATS:
        kinds = (TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower() for value in inputs)
        named = ", ".join(f"{value.name} ({kind})" for value, kind in zip(inputs, kinds, strict=True))
        raise DataError(f"{path} has inputs {named or '(none)'}; one of floats, the latents, is expected: make constants of the others")
    if not model.graph.output:
        raise DataError(f"{path} has no output; samples are expected as its first")
    nodes = (node for part in (model.graph, *model.functions) for graph in _graphs(part) for node in graph.node)
    if drawn := sorted({node.op_type for node in nodes if RANDOM.fullmatch(node.op_type)}):
        raise DataError(f"{path} draws random numbers itself ({', '.join(drawn)}); give it all its randomness as input, so that seeds repeat")
    batch, *known = [max(0, d.dim_value) for d in inputs[0].type.tensor_type.shape.dim] or [0]  # 0: any; some exporters write -1
    shape = [size or law.dim for size in known] or [law.dim]
    if int(np.prod(shape)) != law.dim:
        form = " x ".join(str(size or "any") for size in known)
        raise DataError(f"{path} takes latents of {form} numbers, and --latent gives {law.dim}")
    if batch:
        raise DataError(f"{path} has a batch of {batch} fixed in its graph; export it with a dynamic first axis")
    return inputs[0], shape


def _graphs(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, and those inside its If, Loop and Scan to any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
                yield from _graphs(inner)


def _prefix_names(graph: onnx.GraphProto) -> None:
    """Let every tensor's name begin with INNER. (onnx.compose.add_prefix misses weights that an inner graph takes from outside.)"""
    for inner in _graphs(graph):
        for node in inner.node:
            node.input[:] = [name and INNER + name for name in node.input]  # an empty name is an operand left out
            node.output[:] = [name and INNER + name for name in node.output]
        sparse = (weight.values for weight in inner.sparse_initializer)
        for named in (*inner.input, *inner.output, *inner.value_info, *inner.initializer, *sparse):
            named.name = INNER + named.name


def _chain(name: str, first: str, steps: Sequence[Step], last: str) -> list[onnx.NodeProto]:
    """Nodes that take the tensor `first` through the steps to the tensor `last`; those between are called after `name`."""
    nodes, before = [], first
    for i, step in enumerate((*steps, Step("Identity"))):
        after, constant = last if i == len(steps) else f"{name}_{i}", f"{name}_{i}_by"
        if step.constant is not None:
            nodes.append(helper.make_node("Constant", [], [constant], value=numpy_helper.from_array(np.asarray(step.constant))))
        operands = [before] if step.constant is None else [before, constant]
        nodes.append(helper.make_node(step.operator, operands, [after], **step.attributes))
        before = after
    return nodes


def _run(model: onnx.ModelProto, output: str, law: SignGaussian, path: Path) -> Shaped[ndarray, "n ..."]:
    """What the graph gives for 64 latents: numbers, all of them finite."""
    try:
        found = session(model.SerializeToString()).run([output], {"z": law.sample(seed=0, count=64)})[0]
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise DataError(f"{path} does not run on 64 latents of {law.dim}: {error}") from None
    if not isinstance(found, ndarray) or found.dtype.kind not in "buif":
        raise DataError(f"{path} gives {type(found).__name__} of {getattr(found, 'dtype', 'several')}; one tensor of numbers is expected as its first output")
    if not np.isfinite(found).all():
        raise DataError(f"{path} gives samples that are not finite")
    return found


def _conversion(found: Shaped[ndarray, "n ..."], dataset: Dataset, path: Path) -> list[Step]:
    """The steps from what the generator gives to what is served. Raises DataError where that is not what the data are."""
    wanted, steps = dataset.shape, []
    if found.shape[1:] != wanted:
        if dataset.is_image and found.shape[1:] == (wanted[2], *wanted[:2]):
            steps.append(Step("Transpose", attributes={"perm": [0, 2, 3, 1]}))
        elif int(np.prod(found.shape[1:])) == dataset.dim and (not dataset.is_image or wanted[2] == 1):
            steps.append(Step("Reshape", np.array([-1, *wanted], np.int64)))
        else:
            raise DataError(f"{path} gives samples of {list(found.shape[1:])}, and the reference holds {list(wanted)}")
    if found.dtype == dataset.samples.dtype:
        return steps
    if found.dtype != np.float32:
        steps.append(Step("Cast", attributes={"to": TensorProto.FLOAT}))
    if not dataset.is_image:
        return steps
    found = found.astype(np.float32, copy=False)
    (low, high), top = np.quantile(found, (0.001, 0.999)), found.max()
    fitting = [how for least, most, dim, bright, how in PIXELS if least <= low and high <= most and dim <= top <= bright]
    if not fitting:
        raise DataError(
            f"{path} gives pixels from {found.min():.3g} to {top:.3g}; -1 to 1, 0 to 1 or 0 to 255 is expected: "
            "let the graph end with what undoes a normalisation, or with the sigmoid of logits"
        )
    scale, shift = fitting[0]
    return [
        *steps,
        Step("Mul", np.float32(scale)),
        Step("Add", np.float32(shift + 0.5)),  # Cast cuts off
        Step("Max", np.float32(0)),
        Step("Min", np.float32(255)),
        Step("Cast", attributes={"to": TensorProto.UINT8}),
    ]


def _check(served: Path, path: Path, dataset: Dataset, law: SignGaussian) -> None:
    """Batches of any size, repeatable, finite, and not one and the same sample."""
    z = law.sample(seed=1, count=64)
    try:
        run = session(served)
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
