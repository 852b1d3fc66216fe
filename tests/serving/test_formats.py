"""Samples survive their encoding, and Accept headers get what they ask for."""

import io
import json

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from serving.errors import NotAcceptable, SamplingFailed
from serving.formats import FORMATS, STREAMS, as_dtype, json_text, negotiate, png

IMAGE, VECTOR = (8, 8, 1), (2,)
any_samples = st.one_of(
    arrays.arrays(np.uint8, arrays.array_shapes(min_dims=4, max_dims=4, max_side=5)),
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
)


@given(any_samples)
def test_json_and_npy_give_the_samples_back(samples):
    about = {"model": "m", "seed": 2**63 - 1}
    answer = json.loads(json_text(samples, about))
    np.testing.assert_array_equal(np.array(answer.pop("samples"), samples.dtype), samples)
    assert answer == about
    np.testing.assert_array_equal(np.load(io.BytesIO(FORMATS["application/x-npy"](samples, about)), allow_pickle=False), samples)


@settings(deadline=None)  # pyarrow loads
@given(any_samples)
def test_raw_and_arrow_give_the_samples_back(samples):
    raw = FORMATS["application/octet-stream"](samples, {})
    np.testing.assert_array_equal(np.frombuffer(raw, samples.dtype).reshape(samples.shape), samples)
    with pyarrow.ipc.open_stream(FORMATS["application/vnd.apache.arrow.stream"](samples, {"seed": 2**63 - 1})) as reader:
        table = reader.read_all()
    assert table.schema.metadata == {b"seed": str(2**63 - 1).encode()}
    np.testing.assert_array_equal(table["samples"].combine_chunks().to_numpy_ndarray(), samples)


@pytest.mark.parametrize("media_type", STREAMS)
@settings(deadline=None, max_examples=30)
@given(samples=any_samples, cut=st.integers(0, 5))
def test_pieces_make_up_the_whole(media_type, samples, cut):
    stream = STREAMS[media_type](samples.shape, samples.dtype.name, {})
    body = b"".join((stream.head(), stream.rows(samples[:cut]), stream.rows(samples[cut:]), stream.tail()))
    assert stream.length in (None, len(body))
    if media_type == "application/vnd.apache.arrow.stream":
        with pyarrow.ipc.open_stream(body) as reader:
            np.testing.assert_array_equal(reader.read_all()["samples"].combine_chunks().to_numpy_ndarray(), samples)
    else:
        assert body == FORMATS[media_type](samples, {})


def test_bytes_become_numbers_from_0_to_1():
    samples = np.array([[0, 51, 255]], np.uint8)
    np.testing.assert_allclose(as_dtype(samples, "float32"), [[0, 0.2, 1]], rtol=1e-6)
    assert as_dtype(samples, "float32").dtype == np.float32
    assert as_dtype(samples, "uint8") is samples


def test_json_is_the_same_in_pieces():
    samples = np.arange(1000 * 3, dtype=np.uint8).reshape(1000, 3, 1, 1)
    assert json.loads(json_text(samples, {"n": 1}))["samples"] == samples.tolist()


def test_json_cannot_hold_nan():
    with pytest.raises(SamplingFailed, match="ask for application/x-npy"):
        json_text(np.array([[np.nan]], np.float32), {"model": "m"})


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 10), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 4]))))
def test_png_is_a_grid_row_by_row(samples):
    n, h, w, c = samples.shape
    with Image.open(io.BytesIO(png(samples, {}))) as image:
        grid = np.asarray(image).reshape(image.height, image.width, c)
    columns = grid.shape[1] // w
    assert columns**2 >= n > (columns - 1) ** 2
    for i in range(n):
        row, column = divmod(i, columns)
        np.testing.assert_array_equal(grid[row * h : (row + 1) * h, column * w : (column + 1) * w], samples[i])


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("image/png;q=0.9, application/x-npy", "application/x-npy"),
        ("application/x-npy;q=0.5, application/json;q=0.4", "application/x-npy"),
        ("*/*;q=0.1, image/png;q=0.2", "image/png"),
        ("application/*, application/json;q=0", "application/x-npy"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "application/json"),
        ("IMAGE/PNG; Q=1", "image/png"),
        ("image/png;q=often, application/json;q=0.1", "application/json"),
    ],
)
def test_negotiation(accept, expected):
    assert negotiate(accept, IMAGE) == expected


def test_what_cannot_be_given_is_refused_with_what_can():
    with pytest.raises(NotAcceptable) as refused:
        negotiate("text/html", IMAGE)
    assert refused.value.expected == f"one of {', '.join(FORMATS)}"
    with pytest.raises(NotAcceptable, match="are no pictures") as refused:
        negotiate("image/png", VECTOR)
    assert refused.value.expected == f"one of {', '.join(name for name in FORMATS if name != 'image/png')}"
    assert negotiate("image/png, application/x-npy;q=0.1", VECTOR) == "application/x-npy"


@given(st.text())
def test_any_header_is_answered(accept):
    try:
        assert negotiate(accept, IMAGE) in FORMATS
    except NotAcceptable as error:
        json.loads(error.body())
