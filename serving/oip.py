"""The Open Inference Protocol, version 2: a model is a function from tensors `z` (and `y`) to one tensor `samples`.

What REST and gRPC have in common, and the REST form with the binary tensor extension. Source: kserve/open-inference-protocol,
inference_rest.md; Triton's extension_binary_data.md. Knows nothing of ASGI or gRPC, and asks nobody to know seeds: z is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from serving.errors import BadRequest, InvalidValue, SamplingFailed, ServingError
from serving.request import SampleRequest, check_latents, holds_bool, read_object, server_seed
from serving.sampler import Window
from training.bundle import Card

if TYPE_CHECKING:
    from serving.models import Model

SERVER = {"name": "ganwatch", "version": "1", "extensions": ["binary_tensor_data", "model_repository(index)", "model_configuration"]}
HEADER_LENGTH = "Inference-Header-Content-Length"
_DATATYPES = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8"), "UINT8": np.dtype("u1")}
DATATYPE_NAMES = {dtype.name: name for name, dtype in _DATATYPES.items()}


@dataclass(frozen=True)
class Inference:
    """One request: what to draw, and how to send it back."""

    request: SampleRequest
    id: str
    binary: bool


def metadata(card: Card, versions: Sequence[str]) -> dict[str, Any]:
    inputs = [{"name": "z", "datatype": "FP32", "shape": [-1, card.latent.dim]}]
    if card.classes:
        inputs.append({"name": "y", "datatype": "INT64", "shape": [-1]})
    outputs = [{"name": "samples", "datatype": DATATYPE_NAMES[card.sample_dtype], "shape": [-1, *card.sample_shape]}]
    return {"name": card.model, "versions": list(versions), "platform": "onnx_onnxv1", "inputs": inputs, "outputs": outputs}


def config(card: Card) -> dict[str, Any]:
    """A model as Triton's perf_analyzer asks for it (extension_model_configuration.md). 0: the shapes have the batch in them."""
    about = metadata(card, ())
    sides = {
        f"{side}": [{"name": t["name"], "data_type": f"TYPE_{t['datatype']}", "dims": t["shape"]} for t in about[f"{side}s"]]
        for side in ("input", "output")
    }
    return {"name": card.model, "platform": about["platform"], "backend": "onnxruntime", "max_batch_size": 0, **sides}


def index(models: Mapping[str, Model], *, ready: bool) -> list[dict[str, str]]:
    """Every version that an alias wants, and whether it answers (Triton's extension_model_repository.md)."""
    found = []
    for name, model in models.items():
        for alias, version in sorted(model.aliases.items()):
            reason = model.errors.get(alias, "")
            found.append({"name": name, "version": version, "state": "UNAVAILABLE" if reason else "READY", "reason": reason})
    return [entry for entry in {(e["name"], e["version"]): e for e in found}.values() if not ready or entry["state"] == "READY"]


def tensor(name: str, datatype: Any, shape: Any, data: bytes | Sequence[Any] | ndarray) -> ndarray:
    """The array of one input. Raises InvalidValue, whose field is the tensor's name, where the parts do not fit."""
    if not isinstance(datatype, str) or datatype not in _DATATYPES:
        raise InvalidValue(f"datatype of {name} is {datatype!r}", field=name, value=datatype, expected="FP32 for z, INT64 for y")
    if not isinstance(shape, list | tuple) or not shape or any(type(d) is not int or d < 0 for d in shape):
        raise InvalidValue(f"shape of {name} is {shape!r}", field=name, value=shape, expected="a list of integers from 0 on")
    dtype, count = _DATATYPES[datatype], math.prod(shape)
    if isinstance(data, bytes):
        if len(data) != count * dtype.itemsize:
            expected = f"{count * dtype.itemsize} bytes for {datatype} of shape {list(shape)}"
            raise InvalidValue(f"{name} has {len(data)} bytes", field=name, value=len(data), expected=expected)
        return np.frombuffer(data, dtype).reshape(shape)
    try:
        array = np.array(data).reshape(-1)
    except (ValueError, OverflowError):  # rows of different lengths, an integer beyond all floats
        array = np.array("")
    if dtype.kind == "i" and array.dtype.kind == "f" and (array == np.trunc(array)).all() and (abs(array) <= 2**53).all():
        array = array.astype(dtype)  # 2.0 is the integer 2 in JSON
    if len(data) and (array.dtype.kind not in ("iuf" if dtype.kind == "f" else "iu") or holds_bool(data)):
        raise InvalidValue(f"{name} holds what is no {datatype}", field=name, value=str(data)[:100], expected=f"{datatype} numbers")
    if len(array) != count:
        raise InvalidValue(f"{name} has {len(array)} values", field=name, value=len(array), expected=f"{count} for shape {list(shape)}")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        return array.astype(dtype).reshape(shape)


def to_request(tensors: Mapping[str, ndarray], outputs: Sequence[Any], card: Card) -> SampleRequest:
    """What `tensors` ask of the model. Raises InvalidValue for a missing, unknown or wrong one."""
    known = ("z", "y") if card.classes else ("z",)
    for name in tensors:
        if name not in known:
            raise InvalidValue(f"unknown input {name!r}", field="inputs", value=name, expected=" and ".join(known))
    for name in outputs:
        if name != "samples":
            raise InvalidValue(f"unknown output {name!r}", field="outputs", value=name, expected="samples")
    if "z" not in tensors:
        raise InvalidValue("input z is missing", field="inputs", value=list(tensors), expected=f"z, FP32 [n, {card.latent.dim}]")
    if tensors["z"].dtype != np.float32:
        raise InvalidValue(f"z is {tensors['z'].dtype.name}", field="z", value=tensors["z"].dtype.name, expected="datatype FP32")
    z = check_latents(tensors["z"], card)
    label = None
    if "y" in tensors:
        y = tensors["y"]
        if y.dtype != np.int64 or y.shape != (len(z),) or y.min() < 0 or y.max() >= len(card.classes):
            expected = f"INT64 of shape [{len(z)}], each from 0 to {len(card.classes) - 1}"
            raise InvalidValue(f"y is {y.dtype.name} of shape {list(y.shape)}", field="y", value=str(y[:8].tolist()), expected=expected)
        label = tuple(y.tolist())
    return SampleRequest(Window(server_seed(), 0, len(z), label, z=z), "client_z", dtype=card.sample_dtype)


def decode(body: bytes, header_length: str | None, card: Card) -> Inference:
    """A REST request: JSON, followed by the tensors that it announces as binary. Raises BadRequest or InvalidValue."""
    head = len(body)
    if header_length is not None:
        # int() refuses thousands of digits.
        if not (header_length.isascii() and header_length.isdigit()) or len(header_length) > 20 or int(header_length) > len(body):
            text, expected = header_length[:100], f"the bytes of the JSON part, {len(body)} at most"
            raise BadRequest(f"{HEADER_LENGTH} is {text!r}", field=HEADER_LENGTH, value=text, expected=expected)
        head = int(header_length)
    fields = read_object(body[:head])
    rest = body[head:]
    tensors: dict[str, ndarray] = {}
    for given in _objects(fields, "inputs"):
        name = given.get("name")
        if not isinstance(name, str) or name in tensors:
            raise InvalidValue(f"an input is named {name!r}", field="inputs", value=name, expected="names, each once")
        parameters = _parameters(given)
        if (size := parameters.get("binary_data_size")) is not None:
            if type(size) is not int or not 0 <= size <= len(rest):
                expected = f"at most the {len(rest)} bytes that follow"
                raise InvalidValue(f"binary_data_size of {name} is {size!r}", field=name, value=size, expected=expected)
            data, rest = rest[:size], rest[size:]
        else:
            data = given.get("data")
            if not isinstance(data, list):
                raise InvalidValue(f"{name} has no data", field=name, value=data, expected="a list, or binary_data_size")
        tensors[name] = tensor(name, given.get("datatype"), given.get("shape"), data)
    if rest:
        raise BadRequest(f"{len(rest)} bytes belong to no input", field="body", value=len(rest), expected="what the inputs announce")
    outputs = _objects(fields, "outputs") if "outputs" in fields else []
    binary = _parameters(fields).get("binary_data_output", False)
    for output in outputs:
        binary = _parameters(output).get("binary_data", binary)
    if type(binary) is not bool:
        raise InvalidValue(f"binary_data is {binary!r}", field="outputs", value=binary, expected="true or false")
    identity = fields.get("id", "")
    if not isinstance(identity, str):
        raise InvalidValue(f"id is {identity!r}", field="id", value=identity, expected="a text")
    return Inference(to_request(tensors, [output.get("name") for output in outputs], card), identity, binary)


def encode(inference: Inference, card: Card, samples: ndarray) -> tuple[bytes, dict[str, str]]:
    """The answer and what its headers say beyond its length."""
    output: dict[str, Any] = {"name": "samples", "datatype": DATATYPE_NAMES[card.sample_dtype], "shape": list(samples.shape)}
    answer = {"model_name": card.model, "model_version": card.version, "id": inference.id, "outputs": [output]}
    if inference.binary:
        output["parameters"] = {"binary_data_size": samples.nbytes}
        head = json.dumps(answer).encode()
        return head + samples.tobytes(), {HEADER_LENGTH: str(len(head))}
    output["data"] = samples.reshape(-1).tolist()
    try:
        return json.dumps(answer, allow_nan=False).encode(), {}
    except ValueError:
        raise SamplingFailed("the model gave NaN or infinite values, which JSON cannot hold; ask for binary_data") from None


def error_text(error: ServingError) -> str:
    """An error as this protocol has it: one text."""
    return error.message + (f"; expected {error.expected}" if error.expected else "")


def _objects(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = fields.get(name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidValue(f"{name} is no list of objects", field=name, value=value, expected=f"a list of {name}")
    return value


def _parameters(fields: dict[str, Any]) -> dict[str, Any]:
    value = fields.get("parameters", {})
    if not isinstance(value, dict):
        raise InvalidValue("parameters is no object", field="parameters", value=value, expected="an object")
    return value
