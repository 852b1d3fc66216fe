"""What a request for samples asks for: a JSON body, checked field by field against the model's card.

Every refusal names field, value and expectation. Knows nothing of HTTP and draws nothing but the seeds that clients left out.
"""

from __future__ import annotations

import json
import secrets
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from serving.errors import BadRequest, InvalidValue
from serving.openapi import MAX_LATENT, MAX_OFFSET, MAX_STREAM, most_samples
from serving.records import Origin
from serving.sampler import Window
from training.bundle import SEED_LIMIT, Card

_SEEDS = 256
_seeds: list[int] = []
_SERVER_SEED_BITS = 53  # so that every language reads a seed back from JSON exactly
_FIELDS = ("n", "seed", "offset", "label", "truncation", "z", "interpolate", "dtype", "stream")
# What a field rules out: latents that are given are not drawn, and no path stays within the bounds of its truncated ends.
_EXCLUDES = {"z": ("seed", "offset", "truncation", "interpolate", "stream"), "interpolate": ("seed", "truncation", "stream")}


@dataclass(frozen=True)
class SampleRequest:
    """Which rows, and in which form."""

    window: Window
    origin: Origin
    anywhere: bool = False  # whether rows of any seed, at any offset, will do
    dtype: str = "uint8"  # of the answer
    stream: bool = False

    @staticmethod
    def parse(body: bytes, card: Card) -> SampleRequest:
        """Raises BadRequest where `body` is no JSON object, InvalidValue where a field is wrong."""
        fields = read_object(body)
        if unknown := [name for name in fields if name not in _FIELDS]:
            raise InvalidValue(
                f"unknown field {unknown[0]!r}", field=unknown[0], value=fields[unknown[0]], expected=f"only {', '.join(_FIELDS)}"
            )
        for name, excluded in _EXCLUDES.items():
            if name in fields and (clash := [other for other in excluded if other in fields]):
                raise InvalidValue(
                    f"{clash[0]} means nothing beside {name}", field=clash[0], value=fields[clash[0]], expected=f"{name} without it"
                )
        stream = _boolean(fields, "stream")
        z = _given(fields, card)
        path = _path(fields)
        default = len(fields["label"]) if isinstance(fields.get("label"), list) else 1
        n = len(z) if z is not None else _integer(fields, "n", 1, MAX_STREAM if stream else most_samples(card), default=default)
        seed = path[0] if path else _integer(fields, "seed", 0, SEED_LIMIT - 1, default=None)
        offset = _integer(fields, "offset", 0, MAX_OFFSET, default=0)
        label = _labels(fields, card, n)
        truncation = _truncation(fields)
        if path:
            z = card.latent.interpolate(seeds=path, offset=offset, count=n)
            if label is None and card.classes:  # one class along the path: that of its first row
                label = int(Window(path[0], offset, 1).classes(card)[0])
        window = Window(server_seed() if seed is None else seed, offset, n, label, truncation, z)
        origin: Origin = "client_z" if z is not None else "server_seed" if seed is None else "client_seed"
        anywhere = origin == "server_seed" and "offset" not in fields and label is None and truncation == 1.0
        return SampleRequest(window, origin, anywhere, _dtype(fields, card), stream)


def server_seed() -> int:
    """A seed that nobody can foretell. The system's randomness is read for many at a time: each reading gives up the GIL."""
    while True:
        try:
            return _seeds.pop() >> (64 - _SERVER_SEED_BITS)
        except IndexError:  # none left, or another thread took the last one
            _seeds.extend(struct.unpack(f"<{_SEEDS}Q", secrets.token_bytes(8 * _SEEDS)))


def one_of(names: Any) -> str:
    return f"one of {', '.join(names)}" if names else "none: the registry is empty"


def check_latents(z: ndarray, card: Card) -> Float32[ndarray, "n d"]:
    """`z` as the model takes it. Raises InvalidValue where it is not [n, latent_dim] of numbers up to MAX_LATENT, n from 1 to most_samples."""
    most = most_samples(card)
    expected = f"n x {card.latent.dim} numbers from -{MAX_LATENT:g} to {MAX_LATENT:g}, n from 1 to {most}"
    if z.ndim != 2 or z.shape[1] != card.latent.dim or not 1 <= len(z) <= most:
        raise InvalidValue(f"z has shape {list(z.shape)}", field="z", value=list(z.shape), expected=expected)
    with np.errstate(over="ignore"):
        z = np.ascontiguousarray(z, np.float32)
    if not np.isfinite(z).all():
        row = int(np.argmin(np.isfinite(z).all(1)))
        raise InvalidValue(f"z holds NaN or infinity in row {row}", field="z", value=str(z[row].tolist()), expected=expected)
    if (beyond := np.abs(z).max(1) > MAX_LATENT).any():
        row = int(np.argmax(beyond))
        raise InvalidValue(f"z reaches {np.abs(z[row]).max():g} in row {row}", field="z", value=str(z[row].tolist()), expected=expected)
    return z


def read_object(body: bytes) -> dict[str, Any]:
    """The one JSON object of a body: no duplicate keys, no NaN, nothing but UTF-8."""
    if not body.strip():
        raise BadRequest("the body is empty", field="body", value="", expected="a JSON object; {} asks for one sample")
    try:
        fields = _DECODER.decode(body.decode())
    except RecursionError:
        raise BadRequest("the body is nested too deeply", field="body", expected="a JSON object") from None
    except ValueError as error:
        raise BadRequest(
            f"the body is not JSON: {error}",
            field="body",
            value=body[:100].decode(errors="replace"),
            expected="a JSON object in UTF-8",
        ) from None
    if not isinstance(fields, dict):
        raise BadRequest("the body is not a JSON object", field="body", value=fields, expected='a JSON object such as {"n": 16}')
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def whole(value: Any) -> Any:
    """2.0 is the integer 2 in JSON; beyond 2^53 it could hide that a seed was rounded on its way, and stays what it is."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) <= 2**53 else value


def _integer(fields: dict[str, Any], name: str, low: int, high: int, *, default: Any) -> Any:
    """Strict: true is no integer."""
    value = whole(fields.get(name, default))
    if name in fields and (type(value) is not int or not low <= value <= high):
        raise InvalidValue(
            f"{name} is {json.dumps(value)[:100]}", field=name, value=value, expected=f"an integer from {low} to {high}"
        )
    return value


def _truncation(fields: dict[str, Any]) -> float:
    value = fields.get("truncation", 1.0)
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise InvalidValue(
            f"truncation is {json.dumps(value)[:100]}", field="truncation", value=value, expected="a number above 0 and up to 1"
        )
    return float(value)


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if type(value) is not bool:
        raise InvalidValue(f"{name} is {json.dumps(value)[:100]}", field=name, value=value, expected="true or false")
    return value


def _dtype(fields: dict[str, Any], card: Card) -> str:
    value = fields.get("dtype", card.sample_dtype)
    offered = ("uint8", "float32") if card.is_image else ("float32",)
    if value not in offered:
        raise InvalidValue(f"dtype is {json.dumps(value)[:100]}", field="dtype", value=value, expected=one_of(offered))
    return value


def _path(fields: dict[str, Any]) -> tuple[int, int] | None:
    if "interpolate" not in fields:
        return None
    value = fields["interpolate"]
    value = [whole(seed) for seed in value] if type(value) is list else value
    if type(value) is list and len(value) == 2 and all(type(seed) is int and 0 <= seed < SEED_LIMIT for seed in value):
        return value[0], value[1]
    raise InvalidValue(
        f"interpolate is {json.dumps(value)[:100]}",
        field="interpolate",
        value=value,
        expected=f"two seeds, integers from 0 to {SEED_LIMIT - 1}",
    )


def holds_bool(value: Any) -> bool:
    """Whether true or false stands among nested lists of numbers: numpy would make 1 and 0 of them."""
    return type(value) is bool or (type(value) is list and any(map(holds_bool, value)))


def _given(fields: dict[str, Any], card: Card) -> Float32[ndarray, "n d"] | None:
    if "z" not in fields:
        return None
    try:
        z = np.array(fields["z"])
    except (ValueError, OverflowError):  # rows of different lengths, an integer beyond all floats
        z = np.array("")
    if z.dtype.kind not in "iuf" or holds_bool(fields["z"]):
        raise InvalidValue("z is no array of numbers", field="z", value=fields["z"], expected=f"n x {card.latent.dim} finite numbers")
    z = check_latents(z, card)
    if "n" in fields and (type(whole(fields["n"])) is not int or fields["n"] != len(z)):
        raise InvalidValue(f"n is {json.dumps(fields['n'])[:100]}", field="n", value=fields["n"], expected=f"{len(z)}, the rows of z, or no n")
    return z


def _labels(fields: dict[str, Any], card: Card, n: int) -> int | tuple[int, ...] | None:
    """The class that `label` names, or those that it lists, one for each of the n samples."""
    if "label" not in fields:
        return None
    value = fields["label"]
    if not isinstance(value, list):
        return _label(value, card)
    most = most_samples(card)
    if len(value) != n or not 1 <= n <= most:
        expected = f"a class, or a list of 1 to {most}, as long as n where n is given"
        raise InvalidValue(f"label lists {len(value)} classes", field="label", value=value, expected=expected)
    return tuple(_label(item, card) for item in value)


def _label(value: Any, card: Card) -> int:
    """The index of a class: its name, or its index."""
    value = whole(value)
    if not card.classes:
        raise InvalidValue(f"model {card.model} has no classes", field="label", value=value, expected="no label")
    if type(value) is int and 0 <= value < len(card.classes):
        return value
    if isinstance(value, str) and value in card.classes:
        return card.classes.index(value)
    raise InvalidValue(
        f"label is {json.dumps(value)[:100]}",
        field="label",
        value=value,
        expected=f"{one_of(card.classes)}, or an index from 0 to {len(card.classes) - 1}",
    )
