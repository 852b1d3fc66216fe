import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from training.adopt import adopt, as_served, read_law
from training.bundle import SignGaussian, open_bundle
from training.data import DataError, Dataset
from training.export import open_source, session

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


def images(count=200, channels=3):
    return Dataset("pictures", rng.integers(256, size=(count, 5, 4, channels), dtype=np.uint8), cells=3)


@pytest.mark.parametrize(
    ("words", "law"),
    [("normal:128", SignGaussian(0, 128)), ("normal:64x0.5", SignGaussian(0, 64, 0.5)), ("signs:3+normal:4", SignGaussian(3, 4)), ("signs:5", SignGaussian(5, 0))],
)
def test_laws_are_read(words, law):
    assert read_law(words) == law


@pytest.mark.parametrize("words", ["", "uniform:3", "normal", "normal:2+signs:3", "signs:3x2", "normal:2+normal:2"])
def test_other_laws_are_refused(words):
    with pytest.raises(DataError, match="--latent is"):
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
    served = as_served(onnx.load(path), path, images(), LAW)
    onnx.checker.check_model(served)
    z = LAW.sample(seed=0, count=9)
    found = session(served.SerializeToString()).run(["samples"], {"z": z})[0]
    expected = Pictures()(torch.from_numpy(z)).numpy().transpose(0, 2, 3, 1) * 127.5 + 127.5
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 0.51
    with pytest.raises(DataError, match=r"gives samples of \[3, 5, 4\], and the reference holds \[5, 4, 2\]"):
        as_served(onnx.load(path), path, images(channels=2), LAW)


def graph(node, *, inputs=("z",), shape=("n", 6)):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in inputs]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph([node], "g", values, [output]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (graph(helper.make_node("RandomNormalLike", ["z"], ["out"])), r"draws random numbers itself \(RandomNormalLike\)"),
        (graph(helper.make_node("Add", ["z", "w"], ["out"]), inputs=("z", "w")), "has inputs z, w; one float32 input"),
        (graph(helper.make_node("Neg", ["z"], ["out"]), shape=("n", 5)), "takes latents of 5 numbers, and --latent gives 6"),
        (graph(helper.make_node("Neg", ["z"], ["out"]), shape=(1, 6)), "has a batch of 1 fixed in its graph"),
        (graph(helper.make_node("Neg", ["z"], ["out"])), r"gives samples of \[6\], and the reference holds \[5, 4, 3\]"),
    ],
)
def test_what_cannot_be_certified_is_refused(tmp_path, model, words):
    with pytest.raises(DataError, match=words):
        as_served(model, tmp_path / "g.onnx", images(), LAW)


def test_constant_generators_and_damaged_files_are_refused(tmp_path):
    np.save(tmp_path / "real.npy", rng.standard_normal((200, 6)))
    (tmp_path / "g.onnx").write_bytes(b"not onnx")
    with pytest.raises(DataError, match="cannot be read as ONNX"):
        adopt(tmp_path / "g.onnx", str(tmp_path / "real.npy"), "normal:6", tmp_path / "a")
    onnx.save(graph(helper.make_node("Sub", ["z", "z"], ["out"])), tmp_path / "g.onnx")
    with pytest.raises(DataError, match="one and the same sample for every latent"):
        adopt(tmp_path / "g.onnx", str(tmp_path / "real.npy"), "normal:6", tmp_path / "b")
