import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from scipy.special import ndtr

from training.adopt import INNER, _load, adopt, as_served, read_law
from training.bundle import SignGaussian, open_bundle
from training.data import DataError, Dataset
from training.export import open_source, session
from training.registry import RegistryError

rng = np.random.default_rng(0)
LAW = SignGaussian(0, 6)


def exported(tmp_path, module, *, batch=None):
    path = tmp_path / "g.onnx"
    shapes = ({0: torch.export.Dim("n", min=1)},) if batch is None else None
    torch.onnx.export(module.eval(), (torch.randn(batch or 8, 6),), path, dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False)
    return path


class Plane(torch.nn.Module):
    """A Gaussian, as a generator of somebody else's."""

    def forward(self, code):
        return code[:, :2] * 2 + 1


class Pictures(torch.nn.Module):
    """[n, 3, 5, 4] in [-1, 1], channels first, as most image generators answer."""

    def forward(self, code):
        return torch.tanh(code[:, :1, None, None] + torch.arange(60).reshape(3, 5, 4) / 60)


def vectors():
    return Dataset("vectors", rng.standard_normal((200, 6)).astype(np.float32), cells=3)


def images(count=200, channels=3):
    return Dataset("pictures", rng.integers(256, size=(count, 5, 4, channels), dtype=np.uint8), cells=3)


@pytest.mark.parametrize(
    ("words", "law"),
    [
        ("normal:128", SignGaussian(0, 128)), ("normal:64x0.5", SignGaussian(0, 64, 0.5)), ("normal:6x.5", SignGaussian(0, 6, 0.5)),
        ("signs:3+normal:4", SignGaussian(3, 4)), ("signs:3+normal:4x0.5", SignGaussian(3, 4, 0.5)), ("signs:5", SignGaussian(5, 0)), ("uniform:7", SignGaussian(0, 7)), ("uniform01:7", SignGaussian(0, 7)),
    ],
)  # fmt: skip
def test_laws_are_read(words, law):
    assert read_law(words)[0] == law


@pytest.mark.parametrize(
    "words",
    [
        "", "normal", "normal:0", "normal:6x0", "normal:6x0.0", "normal:6x1.2.3", "normal:6x.", "normal:6x-1", "normal:99999999", "normal:2+signs:3",
        "normal:2+normal:2", "signs:3x2", "uniform", "uniform:3x2", "signs:2+uniform:3", "gamma:3", "+normal:3", "signs:3normal:4", "signs:3+", "signs:3+normal:4+", " normal:3",
    ],
)  # fmt: skip
def test_other_laws_are_refused(words):
    with pytest.raises(DataError, match=r"--latent is .*; normal:128, .* is expected, or uniform:100 .*; for any other law, let the graph begin with what makes it of normals"):
        read_law(words)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of torch's exporter
@pytest.mark.slow
def test_a_generator_from_elsewhere_becomes_a_bundle(tmp_path):
    path = exported(tmp_path, Plane())
    np.save(tmp_path / "real.npy", (rng.standard_normal((4000, 2)) * 2 + 1).astype(np.float32))
    card = adopt(path, str(tmp_path / "real.npy"), "normal:6", tmp_path / "bundle", certify_samples=5000)
    bundle = open_bundle(tmp_path / "bundle")
    assert card.model == "g" and card.latent == LAW and bundle.certificate.count == 4000
    assert card.certified["js"] < 0.02 and card.certified["off_manifold"] < 0.05
    found = open_source(bundle.path, card).samples(seed=3, count=5)
    np.testing.assert_allclose(found, LAW.sample(seed=3, count=5)[:, :2] * 2 + 1, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.slow
def test_pictures_are_brought_into_served_form(tmp_path):
    path = exported(tmp_path, Pictures())
    found, z = served(path)
    expected = Pictures()(torch.from_numpy(z)).numpy().transpose(0, 2, 3, 1) * 127.5 + 127.5
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 0.51
    with pytest.raises(DataError, match=r"gives samples of \[3, 5, 4\], and the reference holds \[5, 4, 2\]"):
        as_served(onnx.load(path), path, images(channels=2), LAW)


def graph(*nodes, inputs=("z",), shape=("n", 6), weights=(), opset=18, ir_version=9, kind=TensorProto.FLOAT, gives=TensorProto.FLOAT, functions=()):
    """From the first inputs to `out`."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name in inputs]
    output = helper.make_tensor_value_info("out", gives, None)
    opsets = [helper.make_opsetid("", opset)] + [helper.make_opsetid("elsewhere", 1)] * bool(functions)
    inner = helper.make_graph(nodes, "g", values, [output], [numpy_helper.from_array(np.asarray(value), name) for name, value in weights])
    return helper.make_model(inner, opset_imports=opsets, ir_version=ir_version, functions=functions)


def branches(*nodes):
    """`If` with these nodes on either side, the last of which gives `inner`."""
    sides = {side: helper.make_graph(nodes, side, [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]) for side in ("then_branch", "else_branch")}
    return helper.make_node("If", ["yes"], ["out"], **sides)


def function(*nodes):
    return helper.make_function("elsewhere", "Layer", ["z"], ["samples"], nodes, [helper.make_opsetid("", 18)])


def pictures(*last, code="code", pixels="pixels", **options):
    """tanh(code @ W) as pictures of 5 x 4 x 3 in [-1, 1], unless the nodes `last` give `out` from `pixels`. Inner names are free."""
    nodes = [
        helper.make_node("MatMul", ["z", "W"], [code]),
        helper.make_node("Tanh", [code], ["tanh"]),
        helper.make_node("Reshape", ["tanh", "form"], [pixels if last else "out"]),
        *last,
    ]
    return graph(*nodes, weights=[("W", WEIGHT), ("form", FORM), *options.pop("weights", ())], **options)


WEIGHT, FORM = (rng.standard_normal((6, 60)) * 0.3).astype(np.float32), np.array([-1, 3, 5, 4])


def served(path, words="normal:6", dataset=None):
    """What the file at `path` gives for 500 draws once it is served, and the draws."""
    law, steps = read_law(words)
    model = as_served(_load(path), path, dataset or images(), law, steps)
    onnx.checker.check_model(model, full_check=True)
    z = law.sample(seed=7, count=500)
    return session(model.SerializeToString()).run(["samples"], {"z": z})[0], z


def bytes_of(z):
    """What `pictures` should be."""
    return np.tanh(z @ WEIGHT).reshape(-1, 3, 5, 4).transpose(0, 2, 3, 1) * 127.5 + 127.5


@pytest.mark.parametrize(
    "model",
    [
        pictures(inputs=["z"], opset=9, ir_version=3),
        pictures(opset=9, ir_version=4),
        pictures(opset=7, ir_version=3),
        pictures(opset=11, ir_version=6),
        pictures(code="samples", pixels="generated"),
        pictures(code="served_0", pixels="given_0"),
        pictures(code=f"{INNER}z"),
        pictures(helper.make_node("Cast", ["pixels"], ["out"], to=TensorProto.FLOAT16), gives=TensorProto.FLOAT16),
        pictures(helper.make_node("Clip", ["pixels", "", ""], ["out"])),
        pictures(branches(helper.make_node("Add", ["pixels", "zero"], ["inner"])), weights=[("yes", True), ("zero", np.float32(0))]),
        pictures(branches(helper.make_node("Mul", ["pixels", "one"], ["z_"]), helper.make_node("Identity", ["z_"], ["inner"])), weights=[("yes", True), ("one", np.float32(1))]),
        pictures(helper.make_node("Layer", ["pixels"], ["out"], domain="elsewhere"), functions=[function(helper.make_node("Identity", ["z"], ["samples"]))]),
    ],
    ids=["opset 9, weights as inputs", "opset 9", "opset 7", "opset 11", "our names", "names of our steps", "our prefix", "half", "operands left out", "a branch takes a weight", "a branch of two", "function"],
)  # fmt: skip
def test_ordinary_graphs_are_taken(tmp_path, model):
    if model.ir_version == 3:  # what is stored had to be an input, too
        model.graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in model.graph.initializer)
    onnx.save(model, tmp_path / "g.onnx")
    found, z = served(tmp_path / "g.onnx")
    assert found.dtype == np.uint8 and np.abs(found - bytes_of(z)).max() <= 0.6


def test_an_inner_tensor_of_the_name_of_our_input_as_every_vae_has_it(tmp_path):
    nodes = helper.make_node("Mul", ["noise", "two"], ["z"]), helper.make_node("Neg", ["z"], ["out"])
    onnx.save(graph(*nodes, inputs=["noise"], weights=[("two", np.float32(2))]), tmp_path / "g.onnx")
    found, z = served(tmp_path / "g.onnx", dataset=vectors())
    np.testing.assert_array_equal(found, -2 * z)


def test_a_branch_may_take_the_input_itself(tmp_path):
    model = graph(branches(helper.make_node("Mul", ["z", "two"], ["inner"])), weights=[("yes", True), ("two", np.float32(2))])
    onnx.save(model, tmp_path / "g.onnx")
    found, z = served(tmp_path / "g.onnx", dataset=vectors())
    np.testing.assert_array_equal(found, 2 * z)


@pytest.mark.parametrize("shape", [("n", 6), ("n", "k"), ("n", 6, 1, 1), ("n", "k", 1, 1), ("n", 2, 3), None])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_latents_come_in_the_form_that_the_graph_takes(tmp_path, shape, kind):
    nodes = helper.make_node("Flatten", ["z"], ["flat"]), helper.make_node("Cast", ["flat"], ["out"], to=TensorProto.FLOAT)
    onnx.save(graph(*nodes, shape=shape, kind=kind), tmp_path / "g.onnx")
    found, z = served(tmp_path / "g.onnx", dataset=vectors())
    np.testing.assert_allclose(found, z, rtol=1e-3)


@pytest.mark.parametrize(("words", "low"), [("uniform:6", -1), ("uniform01:6", 0)])
def test_uniform_latents_are_made_of_normals_in_the_graph(tmp_path, words, low):
    onnx.save(graph(helper.make_node("Identity", ["z"], ["out"]), opset=9, ir_version=4), tmp_path / "g.onnx")
    found, z = served(tmp_path / "g.onnx", words, vectors())
    np.testing.assert_allclose(found, low + (1 - low) * ndtr(z.astype(np.float64)), atol=2e-7)


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (1.0, 0.0, None), (1.2, 0.0, None), (0.5, 0.5, None), (127.5, 127.5, None), (140.0, 127.5, None),  # some overshoot
        (1.6, 1.18, r"gives pixels from -0\.4\d* to 2\.7\d*; -1 to 1, 0 to 1 or 0 to 255 is expected: .* undoes a normalisation"),  # MNIST's mean and deviation
        (2.2, 0.2, "gives pixels from -"), (8.0, 0.0, "gives pixels from -"), (60.0, 0.0, "gives pixels from -"), (15.0, 15.0, "gives pixels from 0"),
    ],
)  # fmt: skip
def test_what_pixels_mean_is_told_by_their_range(tmp_path, scale, shift, words):
    ends = helper.make_node("Mul", ["pixels", "scale"], ["scaled"]), helper.make_node("Add", ["scaled", "shift"], ["out"])
    onnx.save(pictures(*ends, weights=[("scale", np.float32(scale)), ("shift", np.float32(shift))]), tmp_path / "g.onnx")
    if words:
        with pytest.raises(DataError, match=words):
            served(tmp_path / "g.onnx")
        return
    found, z = served(tmp_path / "g.onnx")
    tanh = bytes_of(z) / 127.5 - 1
    full = {0.0: 127.5, 0.5: 255.0}.get(shift, 1.0) * (tanh * scale + shift) + 127.5 * (shift == 0)
    assert np.abs(found - full.clip(0, 255)).max() <= 0.51


def test_rare_bright_dots_are_no_overshoot_and_rare_overshoot_is_no_other_range(tmp_path):
    """One pixel in a thousand differs: the black of 0..255 is not 0..1, and a pixel below 0 does not make 0..1 of -1..1."""
    rare = helper.make_node("Greater", ["tanh", "most"], ["rare"])
    for bright, dim, wanted in ((200.0, 0.0, 200), (-0.3, 0.5, 0)):
        ends = rare, helper.make_node("Where", ["rare", "bright", "dim"], ["dots"]), helper.make_node("Reshape", ["dots", "form"], ["out"])
        weights = [("most", np.float32(0.998)), ("bright", np.float32(bright)), ("dim", np.float32(dim))]
        onnx.save(pictures(*ends, weights=weights), tmp_path / "g.onnx")
        found, z = served(tmp_path / "g.onnx")
        dots = bytes_of(z) > 0.998 * 127.5 + 127.5
        assert 0 < dots.mean() < 1e-3 and set(np.unique(found[dots])) == {wanted}
        assert set(np.unique(found[~dots])) == {round(255 * dim + 0.01)}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (graph(helper.make_node("RandomNormalLike", ["z"], ["out"])), r"draws random numbers itself \(RandomNormalLike\)"),
        (graph(branches(helper.make_node("RandomUniformLike", ["z"], ["inner"])), weights=[("yes", True)]), r"draws random numbers itself \(RandomUniformLike\)"),
        (
            graph(helper.make_node("Layer", ["z"], ["out"], domain="elsewhere"), functions=[function(helper.make_node("Bernoulli", ["z"], ["samples"]))]),
            r"draws random numbers itself \(Bernoulli\)",
        ),
        (graph(helper.make_node("Add", ["z", "w"], ["out"]), inputs=("z", "w")), r"has inputs z \(float\), w \(float\); one of floats, the latents, is expected"),
        (graph(helper.make_node("Neg", ["z"], ["out"]), kind=TensorProto.INT64), r"has inputs z \(int64\); one of floats"),
        (graph(helper.make_node("Constant", [], ["out"], value_float=1.0), inputs=()), r"has inputs \(none\); one of floats"),
        (graph(helper.make_node("Neg", ["z"], ["out"]), shape=("n", "c", "h")), "takes latents of any x any numbers, and --latent gives 6"),
        (graph(helper.make_node("SequenceConstruct", ["z"], ["out"])), "gives list of several; one tensor of numbers is expected|does not run"),
        (graph(helper.make_node("Log", ["z"], ["out"])), "gives samples that are not finite"),
        (graph(helper.make_node("Neg", ["z"], ["out"]), shape=("n", 5)), "takes latents of 5 numbers, and --latent gives 6"),
        (graph(helper.make_node("Neg", ["z"], ["out"]), shape=(1, 6)), "has a batch of 1 fixed in its graph"),
        (graph(helper.make_node("Neg", ["z"], ["out"])), r"gives samples of \[6\], and the reference holds \[5, 4, 3\]"),
    ],
)
def test_what_cannot_be_certified_is_refused(tmp_path, model, words):
    with pytest.raises(DataError, match=words):
        as_served(model, tmp_path / "g.onnx", images(), LAW)


def test_opsets_that_cannot_be_brought_up_are_refused(tmp_path):
    onnx.save(graph(helper.make_node("Elsewhere", ["z"], ["out"]), opset=7, ir_version=3), tmp_path / "g.onnx")
    with pytest.raises(DataError, match=r"is of opset 7 and cannot be brought to 9 \((.|\n)*; export it for opset 9 or later"):
        _load(tmp_path / "g.onnx")


def test_a_refused_generator_leaves_nothing_behind(tmp_path):
    np.save(tmp_path / "real.npy", rng.standard_normal((200, 6)))
    path, real, home = tmp_path / "g.onnx", str(tmp_path / "real.npy"), tmp_path / "home"
    path.write_bytes(b"not onnx")
    for model, reference, words in (
        (None, real, "cannot be read as ONNX"),
        (graph(helper.make_node("Sub", ["z", "z"], ["out"])), real, "one and the same sample for every latent"),
        (graph(helper.make_node("Neg", ["z"], ["out"])), str(tmp_path / "nope.npz"), "--reference is .*nope.npz, neither a path that exists nor built in"),
    ):
        if model:
            onnx.save(model, path)
        with pytest.raises(DataError, match=words):
            adopt(path, reference, "normal:6", home / "adopted" / "now")
        assert not home.exists()
    with pytest.raises(RegistryError, match="model name is 'of mine'; use letters"):
        adopt(path, real, "normal:6", home / "adopted" / "now", model="of mine")
    assert not home.exists()
    (home / "adopted" / "before").mkdir(parents=True)
    with pytest.raises(DataError, match="--reference is"):
        adopt(path, "nope.npz", "normal:6", home / "adopted" / "now")
    assert [entry.name for entry in (home / "adopted").iterdir()] == ["before"]
