"""Pictures of samples, read back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monitoring import picture


@settings(max_examples=25)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4]))
def test_a_grid_shows_every_pixel_as_a_block(n: int, height: int, width: int, channels: int) -> None:
    images = np.random.default_rng(n).integers(0, 256, (n, height, width, channels), np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(picture.png(images))))
    scale = max(1, picture.PIXELS // (picture.GRID * max(height, width)))
    for i in range(min(n, 64)):
        top, left = i // 8 * (height * scale + 4), i % 8 * (width * scale + 4)
        tile = sheet[top : top + height * scale, left : left + width * scale]
        wanted = images[i, ..., :3] if channels >= 3 else images[i, ..., :1].repeat(3, -1)
        assert (tile[::scale, ::scale, :3] == wanted).all() and (tile[scale - 1 :: scale, scale - 1 :: scale, :3] == wanted).all()
        assert (tile[..., 3] == 255).all()
    if n < 64:
        assert not sheet[-1, -1].any()  # the last place is empty


def test_a_scatter_puts_points_where_they_are() -> None:
    points = np.array([[1, 1], [-1, -1], [np.nan, 0]], np.float32)
    sheet = np.asarray(Image.open(io.BytesIO(picture.png(points))))[..., 3]
    at = [int(picture.PIXELS / 2 + sign * (picture.PIXELS / 2 - 12)) for sign in (-1, 1)]
    assert sheet[at[0], at[1]] and sheet[at[1], at[0]]  # y points up
    assert not sheet[at[0], at[0]]


def test_no_points_or_zeros_still_make_a_picture() -> None:
    assert picture.png(np.zeros((0, 2), np.float32)) and picture.png(np.zeros((5, 3), np.float32))


def test_what_has_no_picture_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape \[4, 1\]"):
        picture.png(np.zeros((4, 1), np.float32))
