"""The seed contract at its root, and what a sampler refuses to load."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from serving.sampler import BUCKETS, Sampler, Window
from serving.session import cuda_devices
from tests.serving.conftest import CLASSES, generator, publish
from training.bundle import SEED_LIMIT, BundleError

MODELS = ("digits", "ring", "clothes")
seeds = st.integers(0, SEED_LIMIT - 1)
offsets = st.one_of(st.integers(0, 1000), st.integers(SEED_LIMIT - 200, SEED_LIMIT - 64), st.just(2**62))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(MODELS),
    seeds,
    offsets,
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([1.0, 0.5, 1e-3]),
)
def test_any_split_gives_the_same_rows(samplers, model, seed, offset, counts, truncation):
    sampler = samplers[model]
    whole = sampler.sample([Window(seed, offset, sum(counts), truncation=truncation)])
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    parts = [Window(seed, offset + start, count, truncation=truncation) for start, count in zip(starts, counts, strict=True)]
    np.testing.assert_array_equal(np.concatenate([sampler.sample([part]) for part in parts]), whole)
    np.testing.assert_array_equal(sampler.sample(parts), whole)  # in one batch
    np.testing.assert_array_equal(np.concatenate([sampler.sample([part]) for part in parts[::-1]][::-1]), whole)  # in any order


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(seeds, offsets, st.integers(1, 9), st.sampled_from([1.0, 0.5, 1e-3])), min_size=1, max_size=5))
def test_windows_drawn_together_are_those_drawn_alone(samplers, windows):
    latent = samplers["digits"].card.latent
    alone = [latent.sample(seed=s, offset=o, count=n, truncation=t) for s, o, n, t in windows]
    np.testing.assert_array_equal(latent.sample_windows(windows), np.concatenate(alone))


def test_two_samplers_agree_and_samples_have_the_form_of_the_card(samplers, registry):
    for model in MODELS:
        window = Window(seed=11, offset=3, count=70)
        first, second = samplers[model].sample([window]), Sampler(registry.open(model), "cpu", threads=2).sample([window])
        np.testing.assert_array_equal(first, second)
        assert first.shape == (70, *samplers[model].card.sample_shape)
        assert first.dtype == samplers[model].card.sample_dtype


def test_a_label_changes_the_class_and_nothing_else(samplers):
    sampler = samplers["clothes"]
    z = sampler.card.latents(seed=5, offset=0, count=20)
    for label in range(len(CLASSES)):
        expected = sampler.run(z, np.full(20, label, np.int64))
        np.testing.assert_array_equal(sampler.sample([Window(5, 0, 20, label=label)]), expected)


def test_random_ops_are_refused(registry):
    nodes = [
        helper.make_node("RandomNormalLike", ["z"], ["r"]),
        helper.make_node("RandomNormal", [], ["r"], shape=[1]),
        helper.make_node("RandomUniformLike", ["z"], ["r"]),
        helper.make_node("RandomUniform", [], ["r"], shape=[1]),
        helper.make_node("Bernoulli", ["z"], ["r"]),
        helper.make_node("Multinomial", ["z"], ["r"], dtype=TensorProto.INT32),
    ]
    branch = helper.make_graph([nodes[0]], "branch", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)])
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    nested = helper.make_node("If", ["yes"], ["s"], then_branch=branch, else_branch=branch)
    for extra in [*((node,) for node in nodes), (condition, nested)]:
        op = extra[0].op_type if len(extra) == 1 else "RandomNormalLike"
        bundle = publish(registry, "random", model=generator((8, 8, 1), "uint8", extra=extra))
        with pytest.raises(BundleError, match=f"random op {op};"):
            Sampler(bundle, "cpu")


def test_a_node_may_be_called_after_a_random_op(registry):
    named = helper.make_node("Identity", ["z"], ["RandomNormal"], name="RandomNormal")
    Sampler(publish(registry, "named", model=generator((8, 8, 1), "uint8", extra=(named,))), "cpu")


def test_a_model_that_is_not_what_its_card_says_is_refused(registry):
    cases = {
        "inputs are": generator((8, 8, 1), "uint8", classes=3),  # asks for y, the card has no classes
        "outputs are": generator((8, 8, 1), "float32"),
        "gave shape": generator((4, 16, 1), "uint8"),
        "onnxruntime refuses": helper.make_model(
            helper.make_graph([], "empty", [], [helper.make_tensor_value_info("samples", 2, [1])])
        ),
    }
    for words, model in cases.items():
        with pytest.raises(BundleError, match=words):
            Sampler(publish(registry, "wrong", model=model), "cpu")


def test_weights_in_a_second_file_are_refused(registry, tmp_path):
    model = generator((8, 8, 1), "uint8")
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    with registry.staging("digits") as staged:
        onnx.save(model, staged / "model.onnx")
        outside = onnx.load(staged / "model.onnx", load_external_data=False)
    with pytest.raises(BundleError, match="onnxruntime refuses"):
        Sampler(publish(registry, "outside", model=outside), "cpu")


def test_cuda_asked_for_and_absent_is_an_error(registry):
    if cuda_devices():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(RuntimeError, match="no CUDA device; use --device cpu or auto"):
        Sampler(registry.open("digits"), "cuda")
    assert Sampler(registry.open("digits"), "auto").provider == "CPUExecutionProvider"


def test_deterministic_runs_have_one_shape_and_rows_keep_their_bits(registry, samplers):
    shapes = []

    class Watched(Sampler):
        def _run(self, z, y):
            shapes.append(len(z))
            return super()._run(z, y)

    for model in MODELS:
        sampler = Watched(registry.open(model), "cpu", deterministic=True)
        whole = sampler.sample([Window(3, 0, 600)])
        assert whole.shape == (600, *sampler.card.sample_shape)
        np.testing.assert_array_equal(whole[599:], sampler.sample([Window(3, 599, 1)]))
        np.testing.assert_array_equal(whole, samplers[model].sample([Window(3, 0, 600)]))
    assert set(shapes) == {BUCKETS[-1]}


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 600))
def test_buckets_pad_and_give_back_what_was_asked_for(samplers, n):
    shapes = []

    class Watched(Sampler):
        def __init__(self, sampler):
            self.__dict__.update(sampler.__dict__)
            self.buckets = BUCKETS

        def _run(self, z, y):
            shapes.append(len(z))
            return super()._run(z, y)

    np.testing.assert_array_equal(Watched(samplers["clothes"]).sample([Window(3, 0, n)]), samplers["clothes"].sample([Window(3, 0, n)]))
    assert set(shapes) <= set(BUCKETS)
    assert sum(shapes) - n < 128


def test_every_bucket_is_warm_before_a_sampler_is_ready(registry):
    shapes = []

    class Watched(Sampler):
        def _run(self, z, y):
            shapes.append(len(z))
            return super()._run(z, y)

    Watched(registry.open("digits"), "cpu")
    assert tuple(shapes) == BUCKETS


def test_given_latents_and_a_class_for_each_row(samplers):
    sampler = samplers["clothes"]
    z = sampler.card.latents(seed=5, count=6)
    labels = (0, 2, 1, 0, 1, 2)
    expected = sampler.run(z, np.array(labels))
    window = Window(9, 0, 6, label=labels, z=z)
    np.testing.assert_array_equal(sampler.sample([window]), expected)
    np.testing.assert_array_equal(sampler.sample([window.part(0, 2), window.part(2, 4)]), expected)
    drawn = Window(5, 0, 6, z=z)  # the classes that the seed draws
    np.testing.assert_array_equal(sampler.sample([drawn]), sampler.sample([Window(5, 0, 6)]))
