"""The generator and the critic: plain multilayer perceptrons with leaky ReLU and no normalisation layer.

They work in the networks' units (data.py); what is served, and how it is trained, they do not know.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

SLOPE = 0.2


class Generator(nn.Module):
    """z [n, z] and, where there are classes, y [n] -> x [n, d]. `bounded` ends in tanh, for images."""

    def __init__(self, latent: int, out: int, *, width: int, classes: int, bounded: bool) -> None:
        super().__init__()
        self.classes, self.bounded = classes, bounded
        self.hidden = _hidden(latent + classes, width)
        self.head = _linear(width, out, gain=1.0)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        h = z if y is None else torch.cat([z, one_hot(y, self.classes).to(z.dtype)], dim=1)
        for layer in self.hidden:
            h = nn.functional.leaky_relu(layer(h), SLOPE)
        x = self.head(h)
        return torch.tanh(x) if self.bounded else x


class Critic(nn.Module):
    """x [n, d] and, where there are classes, y [n] -> logit [n].

    The first layer sees lift(x) = [x, sin(xB), cos(xB), one-hot y] with a fixed random B: low frequencies alone cannot tell
    narrow modes apart (Tancik et al., Fourier features, 2020). `push_forward` and `pull_back` apply the Jacobian of lift at x
    and its transpose.
    """

    frequencies: Tensor

    def __init__(self, dim: int, *, width: int, classes: int, fourier: int = 0, fourier_scale: float = 6.0) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes
        self.register_buffer("frequencies", fourier_scale * torch.randn(dim, fourier))
        self.hidden = _hidden(dim + 2 * fourier + classes, width)
        self.head = _linear(width, 1, gain=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.lift(x, y)
        for layer in self.hidden:
            h = nn.functional.leaky_relu(layer(h), SLOPE)
        return self.head(h)[:, 0]

    def lift(self, x: Tensor, y: Tensor | None) -> Tensor:
        phase = x @ self.frequencies
        parts = [x, phase.sin(), phase.cos()]
        if y is not None:
            parts.append(one_hot(y, self.classes).to(x.dtype))
        return torch.cat(parts, dim=1)

    def push_forward(self, x: Tensor, tangent: Tensor) -> Tensor:
        """The change of lift(x), [n, lifted], when x moves by `tangent` [n, d]."""
        phase, turn = x @ self.frequencies, tangent @ self.frequencies
        return torch.cat([tangent, phase.cos() * turn, -phase.sin() * turn, tangent.new_zeros(len(x), self.classes)], dim=1)

    def pull_back(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient by x, [n, d], where the gradient by lift(x) is `cotangent` [n, lifted]."""
        f = self.frequencies.shape[1]
        phase = x @ self.frequencies
        by_x, by_sin, by_cos, _ = cotangent.split([self.dim, f, f, self.classes], dim=1)
        return by_x + (phase.cos() * by_sin - phase.sin() * by_cos) @ self.frequencies.T


def _hidden(inputs: int, width: int) -> nn.ModuleList:
    gain = math.sqrt(2 / (1 + SLOPE**2))
    return nn.ModuleList([_linear(inputs, width, gain), _linear(width, width, gain)])


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """Variance gain^2 / fan-in keeps the scale of activations (He et al. 2015)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    nn.init.zeros_(layer.bias)
    return layer
