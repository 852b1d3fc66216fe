"""The OpenAPI 3.1 document of the HTTP surface: what a client may send, and every answer it may get."""

from __future__ import annotations

from typing import Any

MAX_SAMPLES = 65536  # of one answer
MAX_STREAM = 2**40  # of one stream
_SEED_MAX = 2**63 - 1

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
            **({"headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}} if status == "429" else {}),
            **({"headers": {"Allow": {"schema": {"type": "string"}}}} if status == "405" else {}),
        }
        for status in statuses
    }


def _parameter(name: str, words: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": words, "schema": {"type": "string", "minLength": 1}}


def _json(words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def _header(words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": words, "required": True, "schema": schema}


_SAMPLES = {
    "description": "The samples. The headers say which rows of which seed they are, so that the same can be asked for again.",
    "headers": {
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
    },
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/Samples"}},
        "application/x-npy": {"schema": {"type": "string", "contentMediaType": "application/x-npy"}},
        "image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}},
        "application/octet-stream": {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}},
        "application/vnd.apache.arrow.stream": {
            "schema": {"type": "string", "contentMediaType": "application/vnd.apache.arrow.stream"}
        },
    },
}


def _sample(operation: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "post": {
            "operationId": operation,
            "summary": "Draw samples",
            "description": "Row i of a seed is one sample for ever: n = 100 is a prefix of n = 1000; `offset` turns the pages. "
            "Without a seed the server draws one and says which rows of it these are. With `stream` any number of samples comes in "
            "pieces; what was cut off is had by asking for the seed, version and the rows that are missing. Pictures come as a grid only from models of images.",
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/SampleRequest"}}},
            },
            "responses": {"200": _SAMPLES, **_errors("400", "404", "406", "413", "415", "422", "429", "500", "503", "504")},
        },
    }


_MODEL = _parameter("model", "Name of a model, as listed by /v1/models.")
_TIMEOUT = {
    "name": "X-Ganwatch-Timeout",
    "in": "header",
    "required": False,
    "description": "Seconds after which nobody waits for the answer any more.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_VERSION = _parameter("version", "A version, such as v3, or an alias: production, canary, shadow.")



def _tensors(suffix: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    """The paths of the Open Inference Protocol, of a model or of one version of it."""
    path = "/v2/models/{model}" + ("/versions/{version}" if suffix else "")
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
        f"{path}/infer": {
            "parameters": [*parameters, _TIMEOUT],
            "post": {
                "operationId": f"infer{suffix}",
                "summary": "Samples of given latents, in the Open Inference Protocol",
                "description": "Input `z` FP32 [n, latent_dim], and `y` INT64 [n] of models with classes, drawn where it is left "
                "out. With Inference-Header-Content-Length the tensors may follow the JSON as bytes.",
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}},
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


_LABEL: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]}

DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "ganwatch", "version": "1", "description": "Samples from generators that are watched."},
    "paths": {
        "/v1/models/{model}/sample": _sample("sample", [_MODEL, _TIMEOUT]),
        "/v1/models/{model}/versions/{version}/sample": _sample("sampleVersion", [_MODEL, _VERSION, _TIMEOUT]),
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
        **_tensors("", [_MODEL]),
        **_tensors("Version", [_MODEL, _VERSION]),
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
    },
    "components": {
        "schemas": {
            "SampleRequest": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "n": {
                        "type": "integer",
                        "minimum": 1,
                        "maximum": MAX_STREAM,
                        "default": 1,
                        "description": f"How many samples: up to {MAX_SAMPLES}, more with `stream`. Of a path: how many steps.",
                    },
                    "seed": {
                        "type": "integer",
                        "minimum": 0,
                        "maximum": _SEED_MAX,
                        "description": "Left out: the server draws one.",
                    },
                    "offset": {
                        "type": "integer",
                        "minimum": 0,
                        "maximum": _SEED_MAX,
                        "default": 0,
                        "description": "The first row; offset + n is at most 2^63.",
                    },
                    "label": {
                        "oneOf": [_LABEL, {"type": "array", "items": _LABEL}],
                        "description": "A class, by name or index, or a list with one for each sample. Left out: drawn from the "
                        "class law. Unknown to some models.",
                    },
                    "truncation": {
                        "type": "number",
                        "exclusiveMinimum": 0,
                        "maximum": 1,
                        "default": 1.0,
                        "description": "The central mass of the Gaussian latents that is kept.",
                    },
                    "z": {
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "number"}},
                        "description": "Latents, n x latent_dim, instead of a seed.",
                    },
                    "interpolate": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": _SEED_MAX},
                        "minItems": 2,
                        "maxItems": 2,
                        "description": "Two seeds: n steps from row `offset` of the one to row `offset` of the other, by the "
                        "model's latent law. Each step alone is an ordinary sample.",
                    },
                    "dtype": {
                        "enum": ["uint8", "float32"],
                        "description": "Of images: bytes, or numbers from 0 to 1. Vectors are float32.",
                    },
                    "stream": {
                        "type": "boolean",
                        "default": False,
                        "description": "Send the samples in pieces: application/x-npy, application/octet-stream or Arrow.",
                    },
                },
                "examples": [{"n": 64, "seed": 7}],
            },
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
            "InferRequest": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
                    "outputs": {"type": "array", "items": {"type": "object"}},
                    "parameters": {"type": "object"},
                },
            },
            "Tensor": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"enum": ["z", "y"]},
                    "datatype": {"enum": ["FP32", "INT64"]},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "data": {"type": "array"},
                    "parameters": {"type": "object"},
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
    },
}
