"""The OpenAPI 3.1 document of the HTTP surface: what a client may send, and every answer it may get.

Each model has paths of its own, for what it takes depends on its classes, latents and shape. Whatever a schema here allows is
answered with samples; whatever it forbids is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from serving.formats import available

if TYPE_CHECKING:
    from serving.models import Model
    from training.bundle import Card

MAX_SAMPLES = 65536  # of one answer
MAX_BYTES = 1 << 30  # of one answer, as the model gives it; see most_samples
MAX_STREAM = 2**40  # of one stream
MAX_OFFSET = 2**63 - MAX_STREAM  # of the first row: no request reaches past the last row of a seed
MAX_LATENT = 1e6  # magnitude of a coordinate of a latent that a client gives
_SEED_MAX = 2**63 - 1
_SPELLED_OUT = 4  # rows up to which the tensors of the Open Inference Protocol are


def most_samples(card: Card) -> int:
    """How many samples one answer holds at most."""
    return max(1, min(MAX_SAMPLES, MAX_BYTES // (math.prod(card.sample_shape) * (1 if card.sample_dtype == "uint8" else 4))))


_ERROR_WORDS = {
    "400": "The body is empty, not JSON, not an object, or has a key twice.",
    "404": "No such model or version; `expected` lists those there are.",
    "405": "Another method is expected, see the header Allow.",
    "406": "None of the accepted media types can be given; `expected` lists those that can.",
    "413": "The body exceeds 4 MiB, as it is or unfolded.",
    "415": "The body's Content-Encoding is none of those in Accept-Encoding.",
    "422": "A field has a wrong type or value, or is unknown.",
    "429": "Too many samples are waiting; retry after the seconds in Retry-After.",
    "500": "The model failed, or gave values that the format cannot hold.",
    "503": "The version exists but cannot be loaded, or this replica has stopped.",
    "504": "No samples within the time of X-Ganwatch-Timeout, or within the server's own.",
}


def _errors(*statuses: str) -> dict[str, Any]:
    return {
        status: {
            "description": _ERROR_WORDS[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            **({"headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}} if status in ("429", "503") else {}),
            **({"headers": {"Allow": {"schema": {"type": "string"}}}} if status == "405" else {}),
        }
        for status in statuses
    }


def _json(words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def _header(words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": words, "required": True, "schema": schema}


_SAMPLE_HEADERS = {
        "X-Ganwatch-Model": _header("The model.", {"type": "string"}),
        "X-Ganwatch-Version": _header("The version that answered.", {"type": "string"}),
        "X-Ganwatch-Seed": _header(
            "The seed: as asked for, or one that the server drew.", {"type": "integer", "minimum": 0, "maximum": _SEED_MAX}
        ),
        "X-Ganwatch-Offset": _header(
            "The first row. Where neither seed nor offset was asked for it need not be 0, and rows beside it may be others'.",
            {"type": "integer", "minimum": 0, "maximum": _SEED_MAX},
        ),
        "X-Ganwatch-Shape": {"description": "Of application/octet-stream: such as 64,8,8,1.", "schema": {"type": "string"}},
        "X-Ganwatch-Dtype": {"description": "Of application/octet-stream.", "schema": {"enum": ["uint8", "float32"]}},
    }

_TIMEOUT = {
    "name": "X-Ganwatch-Timeout",
    "in": "header",
    "required": False,
    "description": "Seconds after which nobody waits for the answer any more.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "1 to 128 letters, digits and ._:;=@/+- that come back in the answer and stand in the logs. Anything else is replaced.",
    "schema": {"type": "string"},
}
_SEED = {"type": "integer", "minimum": 0, "maximum": _SEED_MAX}


def document(models: Mapping[str, Model]) -> dict[str, Any]:
    """The document of a server of `models`: those that have a version that answers."""
    answering = {name: sampler for name, model in models.items() if (sampler := model.find("production"))}
    paths, schemas = dict(_FIXED_PATHS), dict(_FIXED_SCHEMAS)
    for index, (name, sampler) in enumerate(answering.items()):
        card, model = sampler.card, models[name]
        alike = [alias for alias, other in model.serving.items() if _takes(other.card) == _takes(card)]
        versions = sorted({*alike, *(model.serving[alias].card.version for alias in alike)})
        paths |= _model_paths(f"{index}", card, versions)
        schemas |= {f"Draw{index}": _draw(card), f"Infer{index}": _infer(card)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ganwatch", "version": "1", "description": "Samples from generators that are watched."},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _takes(card: Card) -> tuple[Any, ...]:
    return card.latent.dim, card.classes, card.sample_dtype, card.sample_shape


def _draw(card: Card) -> dict[str, Any]:
    """The body of a request for samples, in the five forms that exclude each other."""
    n = {"type": "integer", "minimum": 1, "maximum": most_samples(card), "default": 1, "description": "How many samples."}
    offset = {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET, "default": 0, "description": "The first row."}
    truncation = {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "default": 1.0,
        "description": "The central mass of the Gaussian latents that is kept.",
    }
    dtype = {"enum": ["uint8", "float32"] if card.is_image else ["float32"]}
    dtype["description"] = "Of images: bytes, or numbers from 0 to 1. Vectors are float32."
    seed = {**_SEED, "description": "Left out: the server draws one."}
    row = {"seed": seed, "offset": offset, "truncation": truncation, "dtype": dtype}
    one: dict[str, Any] = {}
    if card.classes:
        one = {"enum": [*card.classes, *range(len(card.classes))], "description": "A class. Left out: drawn from the class law."}
    label = {"label": one} if one else {}
    latents = {
        "type": "array",
        "minItems": 1,
        "maxItems": most_samples(card),
        "items": {"type": "array", "items": _number(), "minItems": card.latent.dim, "maxItems": card.latent.dim},
        "description": "Latents, n x latent_dim, within the limit of a body.",
    }
    seeds = {"type": "array", "items": _SEED, "minItems": 2, "maxItems": 2}
    seeds["description"] = (
        "Two seeds: n steps from row `offset` of the one to row `offset` of the other, by the model's latent law. "
        "Each step alone is an ordinary sample."
    )
    pieces = {"const": True, "description": "Send the samples in pieces: application/x-npy, application/octet-stream or Arrow."}
    not_pieces = {"const": False}
    many = {**n, "maximum": MAX_STREAM}
    listed = {"type": "array", "minItems": 1, "maxItems": most_samples(card), "items": one}
    listed["description"] = "A class for each sample. n, where it is given, is their number."
    forms = [
        _form({"n": n, "stream": not_pieces, **row, **label}),
        _form({"n": many, "stream": pieces, **row, **label}, "stream"),
        *([_form({"label": listed, "stream": not_pieces, **row}, "label")] if one else []),
        _form({"z": latents, "dtype": dtype, **label}, "z"),
        _form({"interpolate": seeds, "n": n, "offset": offset, "dtype": dtype, **label}, "interpolate"),
    ]
    return {"oneOf": forms, "examples": [{"n": 64, "seed": 7}]}


def _form(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


def _number() -> dict[str, Any]:
    return {"type": "number", "minimum": -MAX_LATENT, "maximum": MAX_LATENT}


def _infer(card: Card) -> dict[str, Any]:
    """The JSON body of the Open Inference Protocol. No schema can tie a shape to its data: a few sizes are spelled out."""
    rows = []
    for n in range(1, _SPELLED_OUT + 1):
        z = _tensor("z", "FP32", [n, card.latent.dim], _number())
        y = _tensor("y", "INT64", [n], {"type": "integer", "minimum": 0, "maximum": len(card.classes) - 1})
        for inputs in ([z], [z, y]) if card.classes else ([z],):
            rows.append({"type": "array", "prefixItems": inputs, "minItems": len(inputs), "maxItems": len(inputs), "items": False})
    binary = {"binary_data_output": {"type": "boolean"}}
    output = _form({"name": {"const": "samples"}, "parameters": _form({"binary_data": {"type": "boolean"}})}, "name")
    return {
        **_form(
            {
                "id": {"type": "string"},
                "inputs": {"oneOf": rows},
                "outputs": {"type": "array", "items": output, "maxItems": 1},
                "parameters": _form(binary),
            },
            "inputs",
        ),
        "description": f"Any number of rows up to {most_samples(card)} goes the same way as those spelled out here.",
    }


def _tensor(name: str, datatype: str, shape: list[int], item: dict[str, Any]) -> dict[str, Any]:
    count = 1
    for extent in shape:
        count *= extent
    data = {"type": "array", "items": item, "minItems": count, "maxItems": count}
    return _form(
        {"name": {"const": name}, "datatype": {"const": datatype}, "shape": {"const": shape}, "data": data},
        "name", "datatype", "shape", "data",
    )  # fmt: skip


def _model_paths(key: str, card: Card, versions: list[str]) -> dict[str, Any]:
    """The paths of a model: of whatever is production, and of a version or an alias."""
    version = {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "A version, such as v3, or an alias. Versions that nothing names are loaded when they are asked for.",
        "schema": {"enum": versions},
    }
    name, paths = quote(card.model, safe=""), {}
    for suffix, under, parameters in (("", "", []), ("Version", "/versions/{version}", [version])):
        native, tensors = f"/v1/models/{name}{under}/sample", f"/v2/models/{name}{under}"
        paths[native] = {"parameters": [*parameters, _TIMEOUT, _REQUEST_ID], "post": _sample(f"sample{suffix}{key}", key, card)}
        paths |= _tensors(tensors, f"{suffix}{key}", key, parameters)
    return paths


def _sample(operation: str, key: str, card: Card) -> dict[str, Any]:
    contents = {"application/json": {"schema": {"$ref": "#/components/schemas/Samples"}}}
    contents |= {name: {"schema": {"type": "string", "contentMediaType": name}} for name in available(card.sample_shape) if name not in contents}
    return {
        "operationId": operation,
        "summary": f"Draw samples of {card.model}",
        "description": "Row i of a seed is one sample for ever: n = 100 is a prefix of n = 1000; `offset` turns the pages. "
        "Without a seed the server draws one and says which rows of it these are. With `stream` any number of samples comes in "
        "pieces; what was cut off is had by asking for the seed, version and the rows that are missing.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/Draw{key}"}}}},
        "responses": {
            "200": {
                "description": "The samples. The headers say which rows of which seed they are, so that the same can be asked for again.",
                "headers": _SAMPLE_HEADERS,
                "content": contents,
            },
            **_errors("400", "404", "406", "413", "415", "422", "429", "500", "503", "504"),
        },
    }


def _tensors(path: str, suffix: str, key: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    """The paths of the Open Inference Protocol, of a model or of one version of it."""
    text = {"application/json": {"schema": {"$ref": "#/components/schemas/TensorError"}}}
    errors = {status: {"description": _ERROR_WORDS[status], "content": text} for status in ("404", "503")}
    refused = ("400", "413", "415", "422", "429", "500", "504")
    all_errors = errors | {status: {"description": _ERROR_WORDS[status], "content": text} for status in refused}
    return {
        path: {
            "parameters": parameters,
            "get": {
                "operationId": f"metadata{suffix}",
                "summary": "Tensors of a model",
                "responses": {"200": _json("Inputs and outputs.", {"type": "object"}), **errors},
            },
        },
        f"{path}/ready": {
            "parameters": parameters,
            "get": {
                "operationId": f"modelReady{suffix}",
                "summary": "Whether a model answers",
                "responses": {"200": _json("It does.", {"type": "object"}), **errors},
            },
        },
        f"{path}/config": {
            "parameters": parameters,
            "get": {
                "operationId": f"config{suffix}",
                "summary": "A model as Triton's perf_analyzer asks for it",
                "responses": {"200": _json("Inputs and outputs.", {"type": "object"}), **errors},
            },
        },
        f"{path}/infer": {
            "parameters": [*parameters, _TIMEOUT, _REQUEST_ID],
            "post": {
                "operationId": f"infer{suffix}",
                "summary": "Samples of given latents, in the Open Inference Protocol",
                "description": "Input `z` FP32 [n, latent_dim], and `y` INT64 [n] of models with classes, drawn where it is left "
                "out. With Inference-Header-Content-Length the tensors may follow the JSON as bytes.",
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/Infer{key}"}}},
                },
                "responses": {
                    "200": {
                        "description": "One output, `samples`.",
                        "content": {
                            "application/json": {"schema": {"type": "object"}},
                            "application/octet-stream": {"schema": {"type": "string"}},
                        },
                    },
                    **all_errors,
                },
            },
        },
    }


_FIXED_PATHS: dict[str, Any] = {
    "/v1/models": {
        "get": {
            "operationId": "models",
            "summary": "The models and what serves of them",
            "responses": {
                "200": _json(
                    "Every model of the registry.",
                    {
                        "type": "object",
                        "required": ["models"],
                        "properties": {"models": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}},
                    },
                )
            },
        }
    },
    "/v2": {
        "get": {
            "operationId": "server",
            "summary": "What this server is, in the Open Inference Protocol",
            "responses": {"200": _json("Name, version, extensions.", {"type": "object"})},
        }
    },
    "/v2/repository/index": {
        "post": {
            "operationId": "index",
            "summary": "The versions that aliases want, in the words of Triton's model repository",
            "requestBody": {
                "required": False,
                "content": {"application/json": {"schema": _form({"ready": {"type": "boolean"}})}},
            },
            "responses": {
                "200": _json("Name, version, state and reason of each.", {"type": "array", "items": {"type": "object"}}),
                **{
                    status: _json(_ERROR_WORDS[status], {"$ref": "#/components/schemas/TensorError"})
                    for status in ("400", "413", "415", "422")
                },
            },
        }
    },
    "/v2/health/live": {
        "get": {
            "operationId": "live",
            "summary": "Whether this replica still answers",
            "responses": {
                "200": _json("It does.", {"type": "object", "properties": {"live": {"const": True}}}),
                **_errors("503"),
            },
        }
    },
    "/v2/health/ready": {
        "get": {
            "operationId": "ready",
            "summary": "Whether every production version is loaded",
            "responses": {
                "200": _json("They are.", {"type": "object", "properties": {"ready": {"const": True}}}),
                **_errors("503"),
            },
        }
    },
    "/openapi.json": {
        "get": {
            "operationId": "document",
            "summary": "This document",
            "responses": {"200": _json("OpenAPI 3.1.", {"type": "object"})},
        }
    },
}

_FIXED_SCHEMAS: dict[str, Any] = {
    "Samples": {
        "type": "object",
        "required": ["model", "version", "seed", "offset", "samples"],
        "properties": {
            "model": {"type": "string"},
            "version": {"type": "string"},
            "seed": {"type": "integer", "minimum": 0, "maximum": _SEED_MAX},
            "offset": {"type": "integer", "minimum": 0, "maximum": _SEED_MAX},
            "samples": {
                "type": "array",
                "items": {"type": "array"},
                "description": "[n, h, w, c] bytes of images, or [n, d] numbers.",
            },
        },
    },
    "Model": {
        "type": "object",
        "required": [
            "name",
            "state",
            "aliases",
            "serving",
            "errors",
            "sample_shape",
            "dtype",
            "classes",
            "latent_dim",
            "provider",
        ],
        "properties": {
            "name": {"type": "string"},
            "state": {"enum": ["serving", "degraded", "failed", "unpromoted"]},
            "aliases": {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "alias -> version that the registry wants",
            },
            "serving": {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "alias -> version that answers",
            },
            "errors": {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "alias -> why the wanted version does not answer",
            },
            "sample_shape": {"type": ["array", "null"], "items": {"type": "integer"}},
            "dtype": {"enum": ["uint8", "float32", None]},
            "classes": {"type": ["array", "null"], "items": {"type": "string"}},
            "latent_dim": {"type": ["integer", "null"]},
            "provider": {"type": ["string", "null"], "description": "The onnxruntime provider that computes."},
        },
    },
    "TensorError": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "field", "value", "expected", "request_id"],
                "properties": {
                    "code": {"type": "string"},
                    "message": {"type": "string"},
                    "field": {"type": ["string", "null"]},
                    "value": {"description": "What was sent, shortened."},
                    "expected": {"type": "string"},
                    "request_id": {"type": "string", "description": "As in X-Request-Id; the server's logs have it, too."},
                },
            }
        },
    },
}
