import numpy as np
import onnx
import pytest
import torch
from scipy.stats import binom

from training.bundle import DUPLICATE_BLOCK, open_bundle, sample_classes
from training.data import DATASETS
from training.export import ExportError, certify_more, check_law, describe_reals, detours, export_onnx, figures, open_source, session
from training.features import fit_eye

pytestmark = pytest.mark.slow


@pytest.fixture(params=["ring", "conditional"])
def bundle(request):
    return open_bundle(request.getfixturevalue(request.param))


def test_graphs_keep_the_contract(bundle):
    card = bundle.card
    model, features = (onnx.load(path, load_external_data=False) for path in (bundle.model_path, bundle.features_path))
    assert [i.name for i in model.graph.input] == (["z", "y"] if card.classes else ["z"])
    assert [o.name for o in model.graph.output] == ["samples"]
    assert [i.name for i in features.graph.input] == ["x"]
    assert [o.name for o in features.graph.output] == ["features", "scores", "mode", "probability"]
    for graph in (model.graph, features.graph):
        assert not [node.op_type for node in graph.node if node.op_type.startswith("Random")]
        assert not [w.name for w in graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL]
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output))

    source = open_source(bundle.path, card)
    for n in (1, 3, 200):
        samples = source.samples(seed=1, count=n)
        assert samples.shape == (n, *card.sample_shape) and str(samples.dtype) == card.sample_dtype
        points, scores, mode, probability = source.features.run(None, {"x": samples})
        assert points.shape == (n, len(bundle.reference.feature_mean)) and points.dtype == np.float32
        assert scores.shape == (n, len(card.scores)) and probability.shape == (n, len(card.modes))
        assert mode.dtype == np.int64 and mode.min() >= -1 and mode.max() < len(card.modes)
        np.testing.assert_allclose(probability.sum(axis=1), 1, atol=1e-5)


def test_a_certificate_knows_the_generator_that_it_was_counted_on(bundle):
    assert bundle.certificate.model_sha256 == bundle.card.files["model.onnx"]


def test_golden_samples_come_out_again(bundle):
    source, certificate = open_source(bundle.path, bundle.card), bundle.certificate
    assert certificate.golden_offset.max() >= 2**62
    for seed, offset, golden in zip(certificate.golden_seed, certificate.golden_offset, certificate.golden_sample, strict=True):
        np.testing.assert_array_equal(source.samples(seed=int(seed), offset=int(offset), count=1)[0], golden)


def test_certificate_counts_what_fresh_samples_do(ring):
    bundle = open_bundle(ring)
    certificate = bundle.certificate
    n = certificate.count
    assert certificate.cell_count.sum() == n == 80_000
    assert certificate.duplicate_blocks > 0.98 * n / DUPLICATE_BLOCK and certificate.duplicate_hits == 0
    # Hits were counted on other samples than the thresholds: close to their level, and nested.
    assert (np.diff(certificate.upper_hits, axis=1) <= 0).all() and (np.diff(certificate.lower_hits, axis=1) <= 0).all()
    np.testing.assert_allclose(certificate.upper_hits[:, :4] / n, np.tile(certificate.levels[:4], (len(bundle.card.scores), 1)), rtol=0.15)
    # A third draw agrees with the certified shares.
    source = open_source(ring, bundle.card)
    _, _, mode = source.see(source.samples(seed=99, count=20_000))
    again = np.bincount(np.where(mode < 0, 8, mode), minlength=9)
    p = certificate.cell_count / n
    assert (again >= binom.ppf(1e-8, 20_000, p)).all() and (again <= binom.ppf(1 - 1e-8, 20_000, p)).all()


def test_reference_describes_held_out_reals(ring):
    reference = open_bundle(ring).reference
    assert reference.cell_share.sum() == pytest.approx(1) and reference.cell_share[-1] == pytest.approx(0.01, abs=0.003)
    assert reference.train_points.shape == reference.held_out_points.shape == (10_000, 2)


@pytest.mark.parametrize("chunk", [300, 4096])
def test_a_reference_of_one_pass_is_that_of_all_data_together(bundle, chunk, monkeypatch):
    monkeypatch.setattr("training.export.CERTIFY_CHUNK", chunk)
    dataset, eye = DATASETS[bundle.card.dataset](), session(bundle.features_path)
    found = describe_reals(dataset, eye, keep_points=True)
    n, kept = len(dataset.samples), min(dataset.trained, 10_000)
    seen = [eye.run(["features", "mode", "probability"], {"x": dataset.samples[part]}) for part in dataset.pieces(np.arange(n), fewest=-(-n // chunk))]
    points, mode, probability = (np.concatenate(column) for column in zip(*seen, strict=True))
    off = np.mean(mode[dataset.trained :] < 0)
    share = np.bincount(probability.argmax(axis=1), minlength=dataset.cells) / n
    assert found.count == n
    np.testing.assert_allclose(found.cell_share, [*((1 - off) * share), off], rtol=1e-12)
    np.testing.assert_allclose(found.feature_mean, points.mean(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.feature_cov, np.cov(points.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(found.train_points, rng.permutation(points[: dataset.trained])[:kept])
    np.testing.assert_array_equal(found.held_out_points, rng.permutation(points[dataset.trained :])[:kept])


def test_a_card_warns_where_the_classifier_that_names_modes_is_often_wrong(conditional, monkeypatch):
    bundle, dataset = open_bundle(conditional), DATASETS["digits"]()
    monkeypatch.setattr("training.features.STEPS", 50)
    sight = fit_eye(dataset, seed=0, remember=False)
    assert 0.5 < sight.accuracy < 0.97
    certified = figures(dataset, bundle.reference, bundle.certificate, open_source(bundle.path, bundle.card), sight.modes, sight.accuracy)
    assert f"the classifier that names modes is right on {sight.accuracy:.1%} of held-out data; 97% are wanted" in certified["warning"]
    assert bundle.card.certified["classifier_accuracy"] >= 0.97 and "the classifier" not in bundle.card.certified.get("warning", "")


def test_conditional_card_and_classes(conditional):
    bundle = open_bundle(conditional)
    card = bundle.card
    assert card.classes == tuple("0123456789") and sum(card.class_shares) == pytest.approx(1)
    assert card.certified["class_agreement"] > 0.6
    given, cells = bundle.certificate.class_cell_count, bundle.certificate.cell_count
    assert given.shape == (10, 11) and np.array_equal(given.sum(axis=0), cells)  # the classes' counts are those of all
    assert given[:, :-1].argmax(axis=1).tolist() == list(range(10))
    source = open_source(conditional, card)
    z = card.latents(seed=5, count=1000)
    for digit in (0, 6):
        samples = source.model.run(["samples"], {"z": z, "y": np.full(1000, digit)})[0]
        probability = source.features.run(["probability"], {"x": samples})[0]
        assert np.mean(probability.argmax(axis=1) == digit) > 0.6
    drawn = sample_classes(np.array(card.class_shares), seed=5, count=20_000)
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, card.class_shares, atol=0.01)


def test_card_says_what_it_cannot_see(ring, collapsed):
    good, bad = open_bundle(ring).card.certified, open_bundle(collapsed).card.certified
    assert good["unwatched"] == [] and max(good["expected_delay"].values()) < 1000
    assert good["mixture_modes"] == 8 and bad["unwatched"] != []  # a few samples may still reach each of the eight
    assert good["smallest_tail_level"] * 80_000 >= 10 > good["smallest_tail_level"] * 40_000


def test_export_refuses_a_graph_that_computes_something_else(tmp_path):
    class Unfaithful(torch.nn.Module):
        """Doubles in eager mode only: what a wrongly traced branch would do."""

        def forward(self, z):
            return z if torch.compiler.is_exporting() else 2 * z

    with pytest.raises(ExportError, match="samples differs from torch"):
        export_onnx(Unfaithful(), tmp_path / "x.onnx", {"z": torch.randn(64, 3)}, ("samples",), tolerance=1e-5)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda z: z if z.mean() > 0 else -z, r"x\.onnx cannot be made: Could not guard on data-dependent expression .* \(at .*test_export\.py:\d+\)$"),
        (lambda z: torch.linalg.eigvals(z.T @ z).real.sum() + z, r"x\.onnx cannot be made: No ONNX function found for .*linalg_eig"),
        (lambda z: z + torch.zeros(64, 3), r"x\.onnx does not run with other numbers of rows: .*"),
        (lambda z: z.view(64, 3), r"x\.onnx does not run with other numbers of rows: shape .* is invalid .* \(at .*test_export\.py:\d+\)$"),
    ],
)
def test_what_onnx_cannot_say_is_told_in_one_line_and_where(tmp_path, capfd, forward, words):
    class Theirs(torch.nn.Module):
        def forward(self, z):
            return forward(z)

    with pytest.raises(ExportError, match=words):
        export_onnx(Theirs(), tmp_path / "x.onnx", {"z": torch.randn(64, 3)}, ("samples",), tolerance=1e-5)
    assert capfd.readouterr().err == ""


def test_export_refuses_a_graph_of_another_law(ring):
    source = open_source(ring, open_bundle(ring).card)

    class Shifted(torch.nn.Module):
        def forward(self, z):
            return torch.from_numpy(source.model.run(["samples"], {"z": z.numpy()})[0]) + torch.tensor([0.5, 0.0])

    with pytest.raises(ExportError, match="another law than torch"):
        check_law(Shifted(), source)


def test_a_certificate_grows_by_what_is_drawn_besides(ring, tmp_path):
    bundle = open_bundle(ring)
    card = certify_more(bundle, tmp_path, 40_000)
    before, after = bundle.certificate, open_bundle(tmp_path).certificate
    assert after.count == before.count + 40_000 == after.cell_count.sum() == card.certified["samples"]
    np.testing.assert_array_equal(after.upper_threshold, before.upper_threshold)
    np.testing.assert_array_equal(after.golden_sample, before.golden_sample)
    for name in ("upper_hits", "lower_hits", "cell_count"):
        grown, old = getattr(after, name), getattr(before, name)
        assert (grown >= old).all()
        np.testing.assert_allclose(grown / after.count, old / before.count, atol=0.01)
    np.testing.assert_allclose(after.feature_mean, before.feature_mean, atol=0.03)
    np.testing.assert_allclose(after.feature_cov, before.feature_cov, atol=0.03)
    width = [c.upper(c.cell_count, c.count) - c.lower(c.cell_count, c.count) for c in (before, after)]
    assert (width[1] <= width[0]).all() and card.files["model.onnx"] == bundle.card.files["model.onnx"]


def test_the_card_says_how_many_truncated_and_interpolated_samples_leave_the_manifold(bundle):
    certified = bundle.card.certified
    again = detours(open_source(bundle.path, bundle.card))
    for figure, share in again.items():
        assert abs(certified[figure] - share) < 0.05  # other seeds, 10,000 samples each
    assert abs(again["off_manifold_plain"] - certified["off_manifold"]) < 0.03
    for kind in ("interpolated", "truncated"):
        worse = certified[f"off_manifold_{kind}"] > 2.3 * certified["off_manifold"] + 0.02  # beyond doubt
        assert not worse or f"of {kind} samples are off the manifold" in certified["warning"]
        if certified[f"off_manifold_{kind}"] <= 2 * certified["off_manifold"]:
            assert f"of {kind} samples" not in certified.get("warning", "")
