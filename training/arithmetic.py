"""In what numbers the networks compute, and whether they are compiled first. Weights, losses and penalties stay float32.

It knows neither objectives nor data.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor, nn


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


def check_compiler() -> None:
    """Raise Unsupported where torch.compile would find no C++ compiler."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise Unsupported(f"--compile takes a C++ compiler, and there is no {name}; install one or name it in CXX, or leave --compile out")
