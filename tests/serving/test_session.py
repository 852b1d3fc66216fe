"""Runs bound to fixed memory give what plain runs give, from several threads at once; on the CPU here, as on a GPU."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serving.session import CPU, DeviceError, Session, cuda_devices


@pytest.fixture(params=["digits", "ring", "clothes"])
def pair(request, registry):
    """(a session with bound buffers for 4 and 16 rows, a plain one, the card)."""
    bundle = registry.open(request.param)
    bound, plain = (Session(bundle.model_path.read_bytes(), "cpu") for _ in range(2))
    bound.bind((4, 16), bundle.card.sample_shape, bundle.card.sample_dtype, "cpu")
    return bound, plain, bundle.card


def feed(card, seed, rows):
    z = card.latents(seed=seed, count=rows)
    return {"z": z} | ({"y": np.arange(rows) % len(card.classes)} if card.classes else {})


def test_bound_runs_give_what_plain_runs_give_and_answers_are_not_overwritten(pair):
    bound, plain, card = pair
    asked = [feed(card, seed, rows) for seed, rows in enumerate([4, 16, 4, 4, 7, 16, 4])]  # 7 has no buffers
    answers = [bound.run(each) for each in asked]
    for each, answer in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(answer, plain.run(each))


def test_more_threads_than_buffers_mix_up_nothing_and_allocate_nothing(pair):
    bound, plain, card = pair
    before = {rows: queue.qsize() for rows, queue in bound._buffers.items()}
    asked = [feed(card, seed, 4) for seed in range(200)]
    with ThreadPoolExecutor(6) as pool:
        for each, answer in zip(asked, pool.map(bound.run, asked), strict=True):
            np.testing.assert_array_equal(answer, plain.run(each))
    assert {rows: queue.qsize() for rows, queue in bound._buffers.items()} == before == {4: 2, 16: 2}


def test_a_run_that_fails_gives_its_buffers_back(pair):
    bound, _, card = pair
    wrong = feed(card, 0, 4) | {"z": np.zeros((4, card.latent.dim + 1), np.float32)}
    for _ in range(5):
        with pytest.raises(Exception, match="(?i)shape|size|dimension"):
            bound.run(wrong)
    assert len(bound.run(feed(card, 0, 4))) == 4


def test_tensorrt_without_a_gpu_is_an_error(registry, tmp_path):
    if cuda_devices():
        pytest.skip("this machine has a CUDA device")
    model = registry.open("digits").model_path.read_bytes()
    with pytest.raises(DeviceError, match=f"TensorRT was asked for, but the session runs on {CPU}"):
        Session(model, "auto", tensorrt=tmp_path)
    with pytest.raises(DeviceError, match="no CUDA device; use --device cpu or auto"):
        Session(model, "cuda")
