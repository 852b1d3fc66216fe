"""The latents of a batch, compiled: bit for bit what `training.bundle.SignGaussian.sample_windows` gives, in a fraction of its time.

The law asks for the inverse normal CDF of each word as scipy computes it, rounded to float32. Here it comes from a table of
polynomials, which err by less than 1e-14. Where everything within 1e-13 of theirs rounds to one float32, that is the law's; a
number that could be either, one in tens of thousands, comes from scipy itself (Ziv's strategy, ACM TOMS 17(3), 1991).

Knows nothing of models. The first call of a process compiles, or finds what an earlier process compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy import ndarray
from scipy.special import ndtri

from training.bundle import SignGaussian

_DEGREE = 6
_CUTS = 5  # bits: an octave has 2^5 polynomials
_OCTAVES = 20  # below 2^-21 there is none, and scipy itself is asked
_HIGHEST = (0x3FD << _CUTS) | (1 << _CUTS) - 1  # exponent and first bits of the largest float64 below 1/2
_ERROR = 1e-13  # of a polynomial, at most, with room: tested to be below a tenth of it


@cache
def inverse_normal() -> Float64[ndarray, "pieces 8"]:
    """Row i: middle of an interval of (0, 1/2), coefficients of the inverse normal CDF around it, lowest first.

    The intervals descend from 1/2; x lies in the one whose exponent and first bits are _HIGHEST - i. Interpolation at Chebyshev's nodes.
    """
    first = _HIGHEST - np.arange(_OCTAVES << _CUTS)
    low, high = ((first + step << 52 - _CUTS).view(np.float64) for step in (0, 1))
    middle, half = (low + high) / 2, (high - low) / 2
    nodes = np.cos(np.pi * (np.arange(_DEGREE + 1) + 0.5) / (_DEGREE + 1))
    values = ndtri(middle[:, None] + half[:, None] * nodes)
    powers = np.arange(_DEGREE + 1)
    coefficients = np.linalg.solve(nodes[:, None] ** powers, values.T).T / half[:, None] ** powers
    return np.column_stack([middle, coefficients])


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    function = inspect.unwrap(function)  # from what checks types while tests run
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is nowhere to keep it: neither beside this file nor in the user's cache
        return njit(**options)(function)


def _upper(typing: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of the product of two 64-bit words, which LLVM has in one instruction and numba has no name for."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), emit


upper = intrinsic(inspect.unwrap(_upper))


def _fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once. Named where it is wanted: a compiler that may fuse what it likes rounds `u` unlike the law."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), emit


fused = intrinsic(inspect.unwrap(_fused))


@_compiled
def draw(windows, kept, signs, normals, scale, table, z, places, doubts):  # noqa: ANN001, ANN201
    """Fills z [n, signs + normals] for windows [w, 3] of seed, offset and count, of which the central kept [w] remain.

    Returns how many numbers are to be had by other means: as far as there is room, `places` [k, 2] lists their rows and columns,
    `doubts` [k, 2] their uniform numbers before truncation and what is kept. -1: some window is none.
    """
    blocks = np.uint64((normals + (signs + 63) // 64 + 3) // 4)  # of a row, four words each
    words = np.empty(int(blocks) * 4, np.uint64)
    tail, upper_half = np.empty(normals), np.empty(normals, np.bool_)
    tail_bits = tail.view(np.int64)
    row = found = 0
    for w in range(len(windows)):
        seed, offset, count = windows[w]
        t = kept[w]
        if seed < 0 or offset < 0 or count < 0 or np.uint64(offset) + np.uint64(count) > np.uint64(1 << 63) or not 0.0 < t <= 1.0:
            return -1
        below = (1.0 - t) / 2
        low, high = np.uint64(offset) * blocks, upper(np.uint64(offset), blocks)
        for _ in range(count):
            for block in range(blocks):  # Philox4x64-10, whose counter numpy increments first
                low += np.uint64(1)
                if low == 0:
                    high += np.uint64(1)
                a, b, c, d = low, high, np.uint64(0), np.uint64(0)
                key, key_b = np.uint64(seed), np.uint64(0)
                for _ in range(10):
                    e, f = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
                    a, b, c, d = upper(f, c) ^ b ^ key, f * c, upper(e, a) ^ d ^ key_b, e * a
                    key += np.uint64(0x9E3779B97F4A7C15)
                    key_b += np.uint64(0xBB67AE8584CAA73B)
                at = 4 * block
                words[at], words[at + 1], words[at + 2], words[at + 3] = a, b, c, d
            for j in range(signs):
                bit = (words[normals + (j >> 6)] >> np.uint64(j & 63)) & np.uint64(1)
                z[row, j] = np.float32(1.0) if bit else np.float32(-1.0)
            for j in range(normals):
                u = (np.float64(np.int64(words[j] >> np.uint64(12))) + 0.5) * 2.0**-52
                if t < 1.0:
                    u = below + t * u
                upper_half[j] = u > 0.5
                tail[j] = min(u, 1.0 - u)
            for j in range(normals):
                at = max(_HIGHEST - (tail_bits[j] >> (52 - _CUTS)), 0)  # 1/2 itself is the end of the first interval
                sure = at < len(table)
                if sure:
                    q = table[at]
                    x = tail[j] - q[0]
                    y = fused(x, fused(x, fused(x, fused(x, fused(x, fused(x, q[7], q[6]), q[5]), q[4]), q[3]), q[2]), q[1])
                    if upper_half[j]:
                        y = -y
                    lowest, highest = np.float32((y - _ERROR) * scale), np.float32((y + _ERROR) * scale)
                    z[row, signs + j] = lowest
                    sure = lowest == highest and lowest != 0.0
                if not sure:
                    if found < len(places):
                        places[found, 0], places[found, 1] = row, signs + j
                        doubts[found, 0], doubts[found, 1] = (np.float64(np.int64(words[j] >> np.uint64(12))) + 0.5) * 2.0**-52, t
                    found += 1
            row += 1
    return found


class Latents:
    """Draws from `law`, fast."""

    def __init__(self, law: SignGaussian) -> None:
        self.law = law

    def sample_windows(self, windows: Sequence[tuple[int, int, int, float]]) -> Float32[ndarray, "n d"]:
        """As `SignGaussian.sample_windows`, the errors too."""
        law, n = self.law, sum(count for _, _, count, _ in windows)
        try:
            whole = np.array([window[:3] for window in windows], np.int64)
        except OverflowError:
            return law.sample_windows(windows)
        kept = np.array([truncation for *_, truncation in windows], np.float64)
        z = np.empty((max(n, 0), law.dim), np.float32)
        room = 32 + len(z) // 8
        places, doubts = np.empty((room, 2), np.int64), np.empty((room, 2))
        found = draw(whole, kept, law.signs, law.normals, law.scale, inverse_normal(), z, places, doubts)
        if not 0 <= found <= room:  # no window, or one so narrow that its numbers cannot be told apart here
            return law.sample_windows(windows)
        if found:
            (rows, columns), (u, t) = places[:found].T, doubts[:found].T
            z[rows, columns] = ndtri((1.0 - t) / 2 + t * u) * law.scale
        return z
