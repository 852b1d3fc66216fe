"""Served samples as one PNG: a grid of images, or a scatter of vectors. It does not know which model they came from."""

from __future__ import annotations

import io
import math

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

GRID = 8  # tiles a side
POINTS = 1024  # points of a scatter
PIXELS = 512  # side of the picture, about
_INK, _AXIS = (61, 110, 209, 110), (128, 134, 145, 150)  # readable on a light and on a dark page


def wanted(sample_shape: tuple[int, ...]) -> int:
    """How many of the newest samples of this shape a picture takes."""
    return GRID * GRID if len(sample_shape) == 3 else POINTS


def png(samples: ndarray) -> bytes:
    """The picture of `samples`: of uint8 [n, h, w, c] the first 64 as a grid, of float [n, d] two coordinates as a scatter.

    Raises ValueError for samples that have no picture.
    """
    if samples.ndim == 4:
        picture = grid(samples[: GRID * GRID])
    elif samples.ndim == 2 and samples.shape[1] >= 2:
        picture = scatter(samples[:, :2].astype(np.float64))
    else:
        raise ValueError(
            f"samples have shape {list(samples.shape)}; a picture needs images [n, h, w, c] or vectors [n, d] with d >= 2"
        )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def grid(images: UInt8[ndarray, "n h w c"]) -> Image.Image:
    """8 x 8 tiles, each pixel scaled to a square block; what is missing of 64 stays transparent."""
    n, height, width, channels = images.shape
    rgb = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, axis=-1)
    scale = max(1, PIXELS // (GRID * max(height, width)))
    rgb = rgb.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = 4
    sheet = np.zeros((GRID * (height * scale + gap) - gap, GRID * (width * scale + gap) - gap, 4), np.uint8)
    for i in range(n):
        top, left = i // GRID * (height * scale + gap), i % GRID * (width * scale + gap)
        sheet[top : top + height * scale, left : left + width * scale] = np.dstack(
            [rgb[i], np.full(rgb[i].shape[:2], 255, np.uint8)]
        )
    return Image.fromarray(sheet)


def scatter(points: Float[ndarray, "n 2"]) -> Image.Image:
    """A square that is symmetric about the origin and wide enough for every point, rounded up to a round number."""
    points = points[np.isfinite(points).all(axis=1)]
    reach = float(np.abs(points).max(initial=1e-9))
    decade = 10.0 ** math.floor(math.log10(reach))
    reach = next(step * decade for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * decade >= reach)
    sheet = Image.new("RGBA", (PIXELS, PIXELS))
    draw = ImageDraw.Draw(sheet, "RGBA")
    middle, margin = PIXELS / 2, 12
    draw.line([(middle, 0), (middle, PIXELS)], _AXIS)
    draw.line([(0, middle), (PIXELS, middle)], _AXIS)
    font = ImageFont.load_default(16)
    draw.text((PIXELS - margin, middle + 4), f"{reach:g}", _AXIS[:3], font, anchor="ra")
    draw.text((middle + 6, margin), f"{reach:g}", _AXIS[:3], font, anchor="lm")
    layer = Image.new("RGBA", sheet.size)  # points are blended one over the other, so that density shows
    for x, y in middle + points * [1, -1] * (middle - margin) / reach:
        dot = Image.new("RGBA", (7, 7))
        ImageDraw.Draw(dot).ellipse([0, 0, 6, 6], _INK)
        layer.alpha_composite(dot, (max(0, int(x) - 3), max(0, int(y) - 3)))
    return Image.alpha_composite(sheet, layer)
