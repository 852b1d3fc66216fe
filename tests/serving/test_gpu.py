"""What only a machine with a CUDA device can show: the same pixels as the CPU, from runs of fixed shapes, two at a time."""

import asyncio

import numpy as np
import pytest
from onnx import helper

from serving.batcher import Batcher
from serving.sampler import BUCKETS, Sampler, Window
from serving.session import cuda_devices
from tests.serving.conftest import generator, publish

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda_devices(), reason="the driver offers no CUDA device")]


@pytest.fixture(params=["digits", "ring", "clothes"])
def pair(request, registry):
    bundle = registry.open(request.param)
    return Sampler(bundle, "cuda"), Sampler(bundle, "cpu")


def test_cuda_is_what_computes_and_every_run_has_the_shape_of_a_bucket(pair):
    cuda, _ = pair
    assert cuda.provider == "CUDAExecutionProvider"
    assert cuda.buckets == BUCKETS


def test_a_gpu_gives_the_pixels_of_the_cpu(pair):
    cuda, cpu = pair
    for count in (1, 7, 200, 600):
        drawn, expected = (sampler.sample([Window(3, 0, count)]).astype(np.float64) for sampler in (cuda, cpu))
        np.testing.assert_allclose(drawn, expected, atol=1.0 if cpu.card.is_image else 1e-4)


def test_deterministic_rows_keep_their_bits_on_a_gpu(registry):
    sampler = Sampler(registry.open("clothes"), "cuda", deterministic=True)
    whole = sampler.sample([Window(3, 0, 300)])
    for offset in (0, 77, 299):
        np.testing.assert_array_equal(sampler.sample([Window(3, offset, 1)]), whole[offset : offset + 1])


def test_two_batches_at_once_mix_up_nothing(pair):
    cuda, _ = pair

    async def scene():
        batcher = Batcher(lanes=2)
        try:
            return await asyncio.gather(*(batcher.submit(cuda, Window(seed, 0, 90)) for seed in range(40)))
        finally:
            await batcher.close()

    for seed, rows in enumerate(asyncio.run(scene())):
        expected = cuda.sample([Window(seed, 0, 90)]).astype(np.float64)
        np.testing.assert_allclose(rows.astype(np.float64), expected, atol=1.0 if cuda.card.is_image else 1e-4)


def test_a_graph_that_cuda_computes_in_part_is_counted_and_computed(registry):
    alone = helper.make_node("Unique", ["z"], ["different"])  # onnxruntime has it for the CPU only
    bundle = publish(registry, "odd", model=generator((8, 8, 1), "uint8", extra=(alone,)))
    cuda, cpu = Sampler(bundle, "cuda"), Sampler(bundle, "cpu")
    assert cuda.lost_graphs and not cpu.lost_graphs and not cuda._session.has_graphs
    np.testing.assert_allclose(*(sampler.sample([Window(3, 0, 50)]).astype(np.float64) for sampler in (cuda, cpu)), atol=1.0)


def test_runs_are_launched_as_cuda_graphs(pair):
    cuda, _ = pair
    assert cuda._session.has_graphs and not cuda.lost_graphs
    first = cuda.sample([Window(1, 0, 8)])
    kept = first.copy()
    cuda.sample([Window(2, 0, 8)])
    np.testing.assert_array_equal(first, kept)  # a graph writes to one place; what was answered stays
