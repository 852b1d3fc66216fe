"""The record contract between a replica and the monitor."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.records import ORIGINS, Heartbeat, Record

latents = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(3)), elements=st.floats(width=32))
samples = st.one_of(
    hnp.arrays(np.uint8, st.tuples(st.integers(0, 5), st.just(3), st.just(2), st.just(1))),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(2)), elements=st.floats(width=32)),
)
records = st.builds(
    Record, model=st.text(min_size=1), version=st.just("v1"), origin=st.sampled_from(ORIGINS), seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**63 - 1), samples=samples, at=st.floats(0, 4e9), label=st.none() | st.integers(0, 9) | st.just((3, 1)), truncation=st.sampled_from([1.0, 0.5]),
)  # fmt: skip


noted = st.builds(lambda record, z: replace(record, z=z, fed=tuple(range(len(z)))), records, latents)


@given(st.lists(records | noted, max_size=4), st.dictionaries(st.text(), st.floats(0, 1e12), max_size=3))
def test_a_heartbeat_survives_the_wire(sent: list[Record], counters: dict[str, float]) -> None:
    got = Heartbeat.decode(Heartbeat("replica", 1.5, tuple(sent), counters).encode())
    assert (got.replica, got.at, got.counters, len(got.records)) == ("replica", 1.5, counters, len(sent))
    for a, b in zip(got.records, sent, strict=True):
        assert a.samples.dtype == b.samples.dtype and a.samples.tobytes() == b.samples.tobytes() and a.samples.shape == b.samples.shape
        assert {k: v for k, v in a.__dict__.items() if k not in ("samples", "z")} == {k: v for k, v in b.__dict__.items() if k not in ("samples", "z")}
        assert (a.z is None) == (b.z is None) and (b.z is None or (a.z.dtype == np.float32 and a.z.tobytes() == b.z.tobytes() and a.z.shape == b.z.shape))


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("truncation", [1.0, 0.5])
@pytest.mark.parametrize("label", [None, 3])
def test_only_independent_draws_of_the_whole_law_are_fresh(origin: str, truncation: float, label: int | None) -> None:
    record = Record("m", "v1", origin, 1, 0, np.zeros((1, 2), np.float32), 0.0, label, truncation)
    assert record.is_independent == (origin in ("server_seed", "probe", "observed_iid") and truncation == 1.0)
    assert record.is_fresh == (record.is_independent and label is None)


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04", b"x" * 1000, Heartbeat("r", 0.0, (), {}).encode()[:-30]])
def test_what_is_no_heartbeat_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="heartbeat"):
        Heartbeat.decode(body)


def test_what_is_asked_of_a_heartbeat_beyond_its_rows_is_refused() -> None:
    record = Record("m", "v1", "client_seed", 1, 5, np.zeros((3, 2), np.float32), 0.0)
    with np.load(io.BytesIO(Heartbeat("r", 0.0, (record, record), {}).encode())) as data:
        arrays = dict(data)
    assert len(arrays) == 2  # the header, and the rows of both
    for count in (-1, 4, 2.5, "3", None):
        header = json.loads(arrays["header"].tobytes())
        header["records"][1]["samples"][1] = count
        body = io.BytesIO()
        np.savez(body, **arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
        with pytest.raises(ValueError, match="heartbeat"):
            Heartbeat.decode(body.getvalue())


def test_what_is_kept_of_a_heartbeat_keeps_nothing_else() -> None:
    records = tuple(Record("m", "v1", "client_seed", 1, 0, np.zeros((n, 2), np.float32), 0.0) for n in (1, 1000))
    one, _ = Heartbeat.decode(Heartbeat("r", 0.0, records, {}).encode()).records
    assert one.samples.base is None
