"""Data from object storage: real servers on loopback, found by the variables by which any other tool finds them."""

import gzip
import io
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.fs import FileSystem, S3FileSystem

from training.data import DataError
from training.sources import find, label, open_dataset

ROOT = Path(__file__).resolve().parents[2]
SERVERS = Path(os.environ.get("GANWATCH_OBJECT_STORAGE", ROOT / ".venv/object-storage/bin"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVERS.exists(), reason=f"no {SERVERS}; `make object-storage` installs it"),
    pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning"),  # Ray Data warns of its own doing
]
rng = np.random.default_rng(0)
PIXELS = rng.integers(256, size=(120, 6, 5), dtype=np.uint8)
VECTORS = rng.standard_normal((400, 3)).astype(np.float32)


def serve(command, answers, env=None):
    """Start a server and wait until it answers."""
    server = subprocess.Popen([str(part) for part in command], env=os.environ | (env or {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            answers()
            return server
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                server.wait(10)
                raise AssertionError(f"{command} does not answer") from error
            time.sleep(0.1)


@pytest.fixture(scope="module")
def s3(free_ports):
    """A server with the bucket `data`, and the variables that lead there; Ray, started later, inherits them."""
    port = free_ports(1)[0]
    variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                 "AWS_REGION": "eu-west-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        bucket = S3FileSystem(endpoint_override=variables["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
        server = serve([SERVERS / "moto_server", "-H", "127.0.0.1", "-p", port], lambda: bucket.create_dir("data"))
        try:
            put(bucket, "data/v.npy", saved(np.save, VECTORS))
            put(bucket, "data/v.npz", saved(np.savez, x=PIXELS, y=np.arange(120) % 4))
            table = pa.table({"a": VECTORS[:, 0], "rest": VECTORS[:, 1:].tolist(), "label": np.arange(400) % 2})
            put(bucket, "data/v.parquet", saved(lambda file: pq.write_table(table, file)))
            for k, image in enumerate(PIXELS):
                put(bucket, f"data/faces/{'cat' if k % 3 else 'dog'}/{k:03}.png", saved(lambda file, i=image: Image.fromarray(i).save(file, "png")))
            put(bucket, "data/idx/train-images-idx3-ubyte.gz", gzip.compress(as_idx(PIXELS)))
            put(bucket, "data/idx/train-labels-idx1-ubyte", as_idx(np.arange(120) % 7))
            put(bucket, "data/odd/t10k-images-idx3-ubyte", as_idx(PIXELS))
            put(bucket, "data/odd/t10k-labels-idx1-ubyte", as_idx(np.arange(9)))
            yield bucket
        finally:
            server.terminate()
            server.wait(10)


def put(system, path, raw):
    with system.open_output_stream(path, compression=None) as file:  # it would zip what ends in .gz
        file.write(raw)


def saved(write, *values, **named):
    file = io.BytesIO()
    write(file, *values, **named)
    return file.getvalue()


def as_idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def test_every_format_comes_out_of_a_bucket_through_ray(s3, ray, tmp_path):
    def opened(name):
        return open_dataset(f"s3://data/{name}", cache=tmp_path / name, say=lambda words: None)

    def contents(samples):
        return sorted(row.tobytes() for row in samples)

    for name in ("v.npy", "v.parquet"):
        assert contents(opened(name).samples) == contents(VECTORS), name
    assert opened("v.parquet").classes == ("0", "1") and opened("v.npy").labels is None
    for name, classes, labels in (
        ("v.npz", "0123", np.arange(120) % 4),
        ("faces", ("cat", "dog"), np.arange(120) % 3 == 0),
        ("idx", "0123456", np.arange(120) % 7),
    ):
        dataset, by_content = opened(name), {image.tobytes(): int(y) for image, y in zip(PIXELS, labels, strict=True)}
        assert dataset.classes == tuple(classes) and contents(dataset.samples) == contents(PIXELS), name
        assert [by_content[image.tobytes()] for image in dataset.samples] == dataset.labels.tolist(), name
    with pytest.raises(DataError, match="it holds 120 images, and data/odd/t10k-labels-idx1-ubyte labels of shape"):
        opened("odd")


@pytest.mark.parametrize("name", ["s3://data/none.npy", "s3://nobody/v.npy", "s3://data/faces/none"])
def test_what_is_not_there_is_said(s3, name):
    with pytest.raises(DataError, match=f"{name}, and no bucket, folder or object of that name is there; .*AWS_ENDPOINT_URL"):
        find(name)


def test_wrong_credentials_and_dead_servers_are_said(s3, free_ports, monkeypatch):
    strict, dead = free_ports(2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{strict}")

    def refuses():
        try:
            S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"]).get_file_info("data")
        except OSError as error:  # until it listens, the connection is refused instead
            if "ACCESS_DENIED" not in str(error):
                raise

    server = serve([SERVERS / "moto_server", "-H", "127.0.0.1", "-p", strict], refuses, {"INITIAL_NO_AUTH_ACTION_COUNT": "0"})
    try:
        with pytest.raises(DataError, match="ACCESS_DENIED.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
            find("s3://data/v.npy")
    finally:
        server.terminate()
        server.wait(10)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{dead}")
    with pytest.raises(DataError, match="Could not connect.*AWS_ENDPOINT_URL says where the storage is"):
        find("s3://data/v.npy")


def test_googles_storage_is_read_too(ray, free_ports, tmp_path):
    port = free_ports(1)[0]
    where = f"scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=2"
    system, _ = FileSystem.from_uri(f"gs://anonymous@data?{where}")
    command = [SERVERS / "gcp-storage-emulator", "start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=data"]
    server = serve(command, lambda: put(system, "data/v.npy", saved(np.save, VECTORS)))
    try:
        name = f"gs://anonymous@data/v.npy?{where}"
        dataset = open_dataset(name, cache=tmp_path / "v", say=lambda words: None)
        assert np.isclose(dataset.samples.sum(), VECTORS.sum(), atol=1e-3) and label(name) == dataset.name == "v"
        with pytest.raises(DataError, match="no bucket, folder or object of that name"):
            find(f"gs://anonymous@data/none.npy?{where}")
    finally:
        server.terminate()
        server.wait(10)
