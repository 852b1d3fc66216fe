"""In what numbers the networks compute, by which library, and whether they are compiled first. Weights, losses and penalties stay float32.

It knows neither objectives nor data.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


WIDE = 256  # units of a hidden layer from which oneDNN's products of matrices are the faster ones


class Unsupported(ValueError):
    """What this device or machine cannot do. The text says what is missing and what to do."""


class Bf16(nn.Module):
    """A network whose products are bf16 and whose weights, inputs and outputs are float32; so are derivatives by its inputs.

    bf16 keeps float32's range, so nothing need be scaled; float16 would lose the penalties' small numbers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out = self.network(x, y)
        return out.float()


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself; what it only imitates is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def takes_bf16(precision: str, device: torch.device, *, images: bool) -> bool:
    """What `--precision` comes to on a device. Raises Unsupported where bf16 is asked for and not there.

    auto is bf16 for images on a GPU. Vectors keep float32: bf16 has three digits, and modes may be narrower than that.
    """
    if precision == "bf16" and not has_bf16(device):
        lacks = "a GPU of compute capability 8.0 or newer" if device.type == "cuda" else "a CPU with AVX512-BF16 or AMX"
        raise Unsupported(f"--precision is bf16, which takes {lacks}, and this {device.type} is none; use --precision float32")
    return precision == "bf16" or precision == "auto" and images and device.type == "cuda" and has_bf16(device)


@contextmanager
def wide_products(width: int) -> Iterator[None]:
    """Within, products of float32 matrices on a CPU are oneDNN's, where hidden layers are wide and it keeps float32.

    On processors that are not Intel's, MKL leaves AVX-512 unused, and oneDNN takes half its time for layers of 512 units. torch
    leads there only by its permission to round to bf16, of which oneDNN makes use where the CPU has AMX: one product tells, and
    then nothing is changed.
    """
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        if width >= WIDE:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            a, b = torch.randn(2, WIDE, WIDE, generator=torch.Generator().manual_seed(0))
            if (a @ b - (a.double() @ b.double())).abs().max() > 1e-3:  # float32 leaves 1e-4 of entries of size 16, bf16 1e-1
                torch.backends.mkldnn.matmul.fp32_precision = before
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def check_compiler() -> None:
    """Raise Unsupported where torch.compile would find no C++ compiler."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise Unsupported(f"--compile takes a C++ compiler, and there is no {name}; install one or name it in CXX, or leave --compile out")
