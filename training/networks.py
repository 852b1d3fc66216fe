"""Generators and critics: multilayer perceptrons, DCGAN and a small residual network. Leaky ReLU, no normalisation layers.

Batch statistics would tie a sample to its neighbours: the penalties could not be taken sample by sample, and the averaged
generator would have none of its own (of a user's network it takes the last ones). The networks map rows to rows in the networks' units (data.py); an image is a row
of h * w * c numbers, channels last. What is served, and how it is trained, they do not know.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu, one_hot, pixel_shuffle
from torch.quasirandom import SobolEngine

SLOPE = 0.2
COARSEST = 4  # images are halved until a side is odd or no larger than this
PATCH = 2  # of these halvings are done at once, by taking 4 x 4 pixels as channels
FINE = 16  # pixels a side from which neighbours are alike: digits of 8 x 8 are coarser
MIXED = 2  # convolutions at the coarsest size besides those that change it


class Generator(nn.Module):
    """z [n, z] and, where there are classes, y [n] -> x [n, d]. `bounded` ends in tanh, for images; `smooth` comes before it."""

    def __init__(self, latent: int, out: int, *, width: int, classes: int, bounded: bool, smooth: nn.Module | None = None) -> None:
        super().__init__()
        self.classes, self.bounded = classes, bounded
        self.hidden = _hidden(latent + classes, width)
        self.head = _linear(width, out, gain=1.0)
        self.smooth = nn.Identity() if smooth is None else smooth

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        h = _with_class(z, y, self.classes)
        for layer in self.hidden:
            h = leaky_relu(layer(h), SLOPE)
        x = self.smooth(self.head(h))
        return torch.tanh(x) if self.bounded else x


class Smooth(nn.Module):
    """Image rows [n, h * w * c] -> the same, each pixel averaged with its neighbours, by 1/4, 1/2, 1/4 along either side.

    A perceptron draws each pixel by weights of its own and leaves holes and dots. Averaged before tanh, edges stay sharp.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        for name, side in (("rows", shape[0]), ("columns", shape[1])):
            near = 2 * torch.eye(side) + torch.diag(torch.ones(side - 1), 1) + torch.diag(torch.ones(side - 1), -1)
            self.register_buffer(name, near / near.sum(dim=1, keepdim=True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.shape).permute(0, 3, 1, 2)
        return (self.rows @ x @ self.columns.T).permute(0, 2, 3, 1).flatten(1)


class Critic(nn.Module):
    """x [n, d] and, where there are classes, y [n] -> logit [n].

    The first layer sees lift(x) = [x, sin(xB), cos(xB), one-hot y] with a fixed B of `fourier` columns, which are N(0, f^2)
    with each f of `frequency` in turn: low ones alone cannot tell narrow modes apart (Tancik et al., Fourier features, 2020).
    `push_forward` and `pull_back` apply the Jacobian of lift and its transpose at the x of which lift(x) is given: its sines and
    cosines are what they need.
    """

    frequencies: Tensor

    def __init__(self, dim: int, *, width: int, classes: int, fourier: int = 0, frequency: Sequence[float] = (6.0,)) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes
        band = torch.tensor(frequency)[torch.arange(fourier) % len(frequency)]
        self.register_buffer("frequencies", (band[:, None] * even_normals(fourier, dim)).T.contiguous())
        self.hidden = _hidden(dim + 2 * fourier + classes, width)
        self.head = Judge(width)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.lift(x, y)
        for layer in self.hidden:
            h = leaky_relu(layer(h), SLOPE)
        return self.head(h)

    def lift(self, x: Tensor, y: Tensor | None) -> Tensor:
        phase = x @ self.frequencies
        parts = [x, phase.sin(), phase.cos()]
        if y is not None:
            parts.append(one_hot(y, self.classes).to(x.dtype))
        return torch.cat(parts, dim=1)

    def push_forward(self, lifted: Tensor, tangent: Tensor) -> Tensor:
        """The change of lift(x), [n, lifted], when x moves by `tangent` [n, d]."""
        (_, sin, cos, _), turn = self._parts(lifted), tangent @ self.frequencies
        return torch.cat([tangent, cos * turn, -sin * turn, tangent.new_zeros(len(lifted), self.classes)], dim=1)

    def pull_back(self, lifted: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient by x, [n, d], where the gradient by lift(x) is `cotangent` [n, lifted]."""
        (_, sin, cos, _), (by_x, by_sin, by_cos, _) = self._parts(lifted), self._parts(cotangent)
        return by_x + (cos * by_sin - sin * by_cos) @ self.frequencies.T

    def _parts(self, lifted: Tensor) -> tuple[Tensor, ...]:
        f = self.frequencies.shape[1]
        return lifted.split([self.dim, f, f, self.classes], dim=1)


def even_normals(count: int, dim: int) -> Float32[Tensor, "count dim"]:
    """Points of N(0, I) that leave no gaps and make no heaps, always the same: scrambled Sobol points through its inverse CDF.

    With 32 drawn at random some seeds see some directions hardly at all, and runs of one recipe end differently. In more
    dimensions than Sobol's sequence is known for they are drawn.
    """
    if not count or dim > SobolEngine.MAXDIM:
        return torch.randn(count, dim)
    return torch.special.ndtri(SobolEngine(dim, scramble=True, seed=0).draw(count).clamp(1e-6, 1 - 1e-6))


class ConvGenerator(nn.Module):
    """z [n, z] and, where there are classes, y [n] -> image rows [n, h * w * c].

    DCGAN (Radford et al. 2016) in the form in which processors are fastest: `width` channels and three 3 x 3 convolutions at the
    coarsest size, each doubling to a finer one by a pixel shuffle (Shi et al. 2016), which makes a convolution a transposed one
    of stride 2. The last two doublings are one shuffle of 4 x 4 pixels.
    """

    def __init__(self, latent: int, shape: tuple[int, ...], *, width: int, classes: int, bounded: bool) -> None:
        super().__init__()
        self.classes, self.bounded, halvings = classes, bounded, _halvings(shape)
        self.block, widths = 2 ** min(PATCH, halvings), [max(8, width >> k) for k in range(max(0, halvings - PATCH) + 1)]
        self.start = (shape[0] >> halvings, shape[1] >> halvings, widths[0])
        self.project = _linear(latent + classes, math.prod(self.start), gain=1.0)
        self.mix = nn.ModuleList(_initialised(nn.Conv2d(widths[0], widths[0], 3, padding=1)) for _ in range(MIXED))
        self.grow = nn.ModuleList(_initialised(nn.Conv2d(a, 4 * b, 3, padding=1)) for a, b in zip(widths, widths[1:], strict=False))
        self.head = _initialised(nn.Conv2d(widths[-1], self.block**2 * shape[2], 3, padding=1), gain=1.0)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.project(_with_class(z, y, self.classes)).unflatten(1, self.start).permute(0, 3, 1, 2)
        for layer in self.mix:
            h = layer(leaky_relu(h, SLOPE))
        for layer in self.grow:
            h = pixel_shuffle(layer(leaky_relu(h, SLOPE)), 2)
        x = pixel_shuffle(self.head(leaky_relu(h, SLOPE)), self.block).permute(0, 2, 3, 1).flatten(1)
        return torch.tanh(x) if self.bounded else x


class ConvCritic(nn.Module):
    """Image rows [n, m * h * w * c] and, where there are classes, y [n] -> logit [n]: the mirror image of ConvGenerator.

    It first sees blocks of pixels, those of m packed images, as channels; further halvings are strided convolutions. Classes
    enter by projection (Miyato and Koyama 2018). As in Critic, `lift` is what the first layer sees.
    """

    def __init__(self, shape: tuple[int, ...], *, width: int, classes: int, packing: int) -> None:
        super().__init__()
        halvings = _halvings(shape)
        self.look = Look(shape, packing, block=2 ** min(PATCH, halvings))
        widths = [max(8, width >> k) for k in reversed(range(max(0, halvings - PATCH) + 1))]
        first = _initialised(nn.Conv2d(self.look.channels, widths[0], 3, padding=1))
        shrink = (_initialised(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in zip(widths, widths[1:], strict=False))
        mix = (_initialised(nn.Conv2d(widths[-1], widths[-1], 3, padding=1)) for _ in range(MIXED))
        self.hidden = nn.ModuleList([first, *shrink, *mix])
        self.head = Judge(widths[-1] * (shape[0] >> halvings) * (shape[1] >> halvings), classes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.lift(x, y)
        for layer in self.hidden:
            h = leaky_relu(layer(h), SLOPE)
        return self.head(h, y)

    def lift(self, x: Tensor, y: Tensor | None) -> Tensor:
        return self.look(x)

    def push_forward(self, lifted: Tensor, tangent: Tensor) -> Tensor:
        return self.look(tangent)

    def pull_back(self, lifted: Tensor, cotangent: Tensor) -> Tensor:
        return self.look.back(cotangent)


class ResidualGenerator(nn.Module):
    """z [n, z] and, where there are classes, y [n] -> image rows: the norm-free residual generator of R3GAN, made small.

    Huang et al., The GAN is dead (2024), section 4: a learned coarse image scaled by z, then per size two residual blocks, with
    bilinear resampling between sizes.
    """

    def __init__(self, latent: int, shape: tuple[int, ...], *, width: int, classes: int, bounded: bool) -> None:
        super().__init__()
        self.classes, self.bounded, halvings = classes, bounded, _halvings(shape)
        widths = [max(8, width >> k) for k in range(halvings + 1)]
        self.basis = nn.Parameter(torch.randn(widths[0], shape[0] >> halvings, shape[1] >> halvings))
        self.project = _linear(latent + classes, widths[0], gain=1.0)
        self.stages = nn.ModuleList(_stage(w, blocks=2 * len(widths)) for w in widths)
        self.change = nn.ModuleList(_channels(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.head = _channels(widths[-1], shape[2])

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.basis * self.project(_with_class(z, y, self.classes))[:, :, None, None]
        h = self.stages[0](h)
        for change, stage in zip(self.change, self.stages[1:], strict=True):
            h = stage(interpolate(change(h), scale_factor=2.0, mode="bilinear", align_corners=False))
        x = self.head(h).permute(0, 2, 3, 1).flatten(1)
        return torch.tanh(x) if self.bounded else x


class ResidualCritic(nn.Module):
    """Image rows and, where there are classes, y [n] -> logit [n]: the mirror image of ResidualGenerator."""

    def __init__(self, shape: tuple[int, ...], *, width: int, classes: int, packing: int) -> None:
        super().__init__()
        halvings = _halvings(shape)
        self.look = Look(shape, packing)
        widths = [max(8, width >> k) for k in reversed(range(halvings + 1))]
        self.first = _channels(self.look.channels, widths[0])
        self.stages = nn.ModuleList(_stage(w, blocks=2 * len(widths)) for w in widths)
        self.change = nn.ModuleList(_channels(a, b) for a, b in zip(widths, widths[1:], strict=False))
        size = (shape[0] >> halvings, shape[1] >> halvings)
        self.basis = _initialised(nn.Conv2d(widths[-1], widths[-1], size, groups=widths[-1]), gain=1.0)
        self.head = Judge(widths[-1], classes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.stages[0](self.first(self.look(x)))
        for change, stage in zip(self.change, self.stages[1:], strict=True):
            h = stage(change(interpolate(h, scale_factor=0.5, mode="bilinear", align_corners=False)))
        return self.head(self.basis(h), y)


class ResidualBlock(nn.Module):
    """h + W3 s(W2 s(W1 h)), s the leaky ReLU: a grouped 3 x 3 convolution between two 1 x 1. It begins as the identity.

    Without normalisation the branches are kept small by their initial weights alone, by blocks^(-1/4) each but the last, which
    is zero (Zhang et al., Fixup, 2019).
    """

    def __init__(self, channels: int, *, blocks: int) -> None:
        super().__init__()
        inner, gain = 2 * channels, math.sqrt(2 / (1 + SLOPE**2)) * blocks**-0.25
        self.enter = _initialised(nn.Conv2d(channels, inner, 1), gain=gain)
        self.mix = _initialised(nn.Conv2d(inner, inner, 3, padding=1, groups=math.gcd(inner, inner // 16 or 1)), gain=gain)
        self.leave = _initialised(nn.Conv2d(inner, channels, 1, bias=False), gain=0.0)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.leave(leaky_relu(self.mix(leaky_relu(self.enter(h), SLOPE)), SLOPE))


class Look(nn.Module):
    """Rows of m packed images, channels last -> [n, m * b * b * c, h / b, w / b]: blocks of b x b pixels become channels."""

    def __init__(self, shape: tuple[int, ...], packing: int, block: int = 1) -> None:
        super().__init__()
        height, width, channels = shape
        self.rows = (packing, height // block, block, width // block, block, channels)
        self.seen = (height // block, width // block, packing, block, block, channels)
        self.channels = packing * block**2 * channels

    def forward(self, x: Tensor) -> Tensor:
        # laid out with channels last, which convolutions on processors are faster with
        return x.unflatten(1, self.rows).permute(0, 2, 4, 1, 3, 5, 6).flatten(3).permute(0, 3, 1, 2)

    def back(self, h: Tensor) -> Tensor:
        """The inverse, which is the transpose too: pixels only change their places."""
        return h.permute(0, 2, 3, 1).unflatten(3, self.seen[2:]).permute(0, 3, 1, 4, 2, 5, 6).flatten(1)


class Judge(nn.Module):
    """Features [n, f] or [n, c, h, w] -> logit [n], plus their product with a vector of the class where there are classes."""

    def __init__(self, features: int, classes: int = 0) -> None:
        super().__init__()
        self.score = _linear(features, 1, gain=1.0)
        self.of_class = nn.Embedding(classes, features) if classes else None
        if self.of_class is not None:
            nn.init.normal_(self.of_class.weight, std=1 / math.sqrt(features))

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.flat(h)
        logit = self.score(h)[:, 0]
        return logit if self.of_class is None else logit + (self.of_class(y) * h).sum(dim=1)

    def flat(self, h: Tensor) -> Tensor:
        return h.movedim(1, -1).flatten(1)

    def slope(self, h: Tensor, y: Tensor | None) -> Tensor:
        """The gradient of the logits by h, in its shape."""
        row = self.score.weight if self.of_class is None else self.score.weight + self.of_class(y)
        return row.expand(len(h), -1).view(h.movedim(1, -1).shape).movedim(-1, 1)


@dataclass(frozen=True)
class Family:
    """How to make a generator and a critic for samples of `shape`.

    generator(latent, shape, *, width, classes, bounded) maps z [n, latent] and y [n] or None to rows [n, prod(shape)], and has
    the attribute `classes`. critic(shape, *, width, classes, packing, fourier, frequency) maps rows [n, packing * prod(shape)]
    and y to logits [n], each of its own row alone; the last two are the perceptron's (Critic).
    """

    generator: Callable[..., nn.Module]
    critic: Callable[..., nn.Module]
    images_only: bool = False


def _perceptron(latent: int, shape: tuple[int, ...], **how: int) -> Generator:
    fine = len(shape) == 3 and min(shape[:2]) >= FINE
    return Generator(latent, math.prod(shape), smooth=Smooth(shape) if fine else None, **how)


def _perceptron_critic(shape: tuple[int, ...], *, packing: int, frequency: Sequence[float], **how: int) -> Critic:
    return Critic(packing * math.prod(shape), frequency=frequency, **how)


def _image_critic(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda shape, *, fourier, frequency, **how: kind(shape, **how)


FAMILIES: dict[str, Family] = {
    "perceptron": Family(_perceptron, _perceptron_critic),
    "dcgan": Family(ConvGenerator, _image_critic(ConvCritic), images_only=True),
    "resnet": Family(ResidualGenerator, _image_critic(ResidualCritic), images_only=True),
}


def family(name: str) -> Family:
    """One of FAMILIES, or a Family of the user's, named `package.module:NAME`. Raises ValueError saying what is wrong."""
    if name in FAMILIES:
        return FAMILIES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, FAMILIES, 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(f"there are no networks {name}{hint} Known: {', '.join(FAMILIES)}, or package.module:NAME of your own")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever their own code raises
        hint = "; where it lies elsewhere, name its directory in PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"networks {name} cannot be imported: {type(error).__name__}: {error}{hint}") from None
    if not isinstance(found, Family):
        raise ValueError(f"networks {name} are a {type(found).__name__}; a training.networks.Family is expected")
    return found


def _with_class(z: Tensor, y: Tensor | None, classes: int) -> Tensor:
    return z if y is None else torch.cat([z, one_hot(y, classes).to(z.dtype)], dim=1)


def _halvings(shape: tuple[int, ...]) -> int:
    """How often an image can be halved: 28 x 28 twice, 32 x 32 three times."""
    height, width, count = shape[0], shape[1], 0
    while min(height, width) > COARSEST and height % 2 == width % 2 == 0:
        height, width, count = height // 2, width // 2, count + 1
    return count


def _stage(channels: int, *, blocks: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, blocks=blocks), ResidualBlock(channels, blocks=blocks))


def _channels(inputs: int, outputs: int) -> nn.Module:
    return _initialised(nn.Conv2d(inputs, outputs, 1, bias=False), gain=1.0)


def _hidden(inputs: int, width: int) -> nn.ModuleList:
    gain = math.sqrt(2 / (1 + SLOPE**2))
    return nn.ModuleList([_linear(inputs, width, gain), _linear(width, width, gain)])


def _linear(inputs: int, outputs: int, gain: float) -> nn.Module:
    return _initialised(nn.Linear(inputs, outputs), gain)


def _initialised(layer: nn.Module, gain: float = math.sqrt(2 / (1 + SLOPE**2))) -> nn.Module:
    """Variance gain^2 / fan-in keeps the scale of activations (He et al. 2015); biases zero."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(math.prod(layer.weight.shape[1:])))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
