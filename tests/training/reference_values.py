"""What torch-fidelity says of seeded arrays and of a generator that we exported: `make reference-values`.

    .venv/reference/bin/python tests/training/reference_values.py BUNDLE      writes reference_values.json beside this file

torch-fidelity needs torchvision, which needs another torch than ours: hence a venv of its own and a file of numbers, with which
the tests compare training/evaluation.py and the monitor's gauges on arrays. The generator goes in as torch-fidelity takes any, as
the path of an ONNX file; it draws the latents, and the bundle's features.onnx is registered as its feature extractor, since the
weights of Inception are not to be had everywhere.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

FILE = Path(__file__).with_suffix(".json")
PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy", "onnxruntime")
NEIGHBOURS = (3, 5)  # torch-fidelity's own choice, and ours
SUBSETS, SHARE, SEED = 20, 0.5, 2020  # of KID: how many, of the smaller sample, and torch-fidelity's own seed


def cases() -> dict[str, tuple[ndarray, ndarray]]:
    """Real and generated features [n, p], [m, p] in float64. RandomState's streams are frozen, so they are the same everywhere."""
    draw = np.random.RandomState(7).standard_normal
    return {
        "shifted": (draw((700, 16)), 1.2 * draw((500, 16)) + 0.3),
        "one law": (draw((600, 8)), draw((600, 8))),
        "many scales": (draw((600, 12)) * np.logspace(-2, 2, 12), draw((600, 12)) * np.logspace(-2, 2, 12) * 1.1),
        "fewer samples than features": (draw((80, 200)), draw((60, 200)) + 0.1),
        "collapsed to a line": (draw((500, 6)), draw((500, 1)) * np.ones(6)),
        "far from zero": (draw((500, 6)) + 1000, 1.5 * draw((500, 6)) + 1000),
    }


def of_arrays(real: ndarray, fake: ndarray) -> dict[str, Any]:
    """torch-fidelity's figures of two arrays; its first input is the generated one."""
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = torch.from_numpy(real), torch.from_numpy(fake)
    size = min(len(real), len(fake))
    quiet: dict[str, Any] = {"verbose": False, "rng_seed": SEED}
    subsets = kid_features_to_metric(x, y, kid_subsets=SUBSETS, kid_subset_size=int(size * SHARE), **quiet)
    whole = kid_features_to_metric(x[:size], y[:size], kid_subsets=1, kid_subset_size=size, **quiet)
    statistics = (fid_features_to_statistics(features) for features in (x, y))
    return {
        "checksum": float(real.sum() + fake.sum()),
        "fid": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        "kid": subsets["kernel_inception_distance_mean"],
        "kid_deviation": subsets["kernel_inception_distance_std"],
        "kid_of_all": whole["kernel_inception_distance_mean"],
        "prc": {str(k): _pair(prc_features_to_metric(y, x, prc_neighborhood=k, verbose=False)) for k in NEIGHBOURS},
    }


def of_generator(bundle: Path, count: int = 4000) -> dict[str, Any]:
    """torch-fidelity's figures of a bundle's generator against real digits, and ours of the very same samples.

    Raises AssertionError where they differ by more than 1e-6 of their size, or where the eye hardly tells digits apart. This is the
    comparison: the file keeps its figures for people, and a test on them would compare the file with itself.
    """
    import onnx
    import onnxruntime
    import torch_fidelity
    from sklearn.datasets import load_digits
    from torch import Tensor, from_numpy
    from torch.utils.data import Dataset
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    from training.bundle import open_bundle
    from training.evaluation import fid, kid, prdc

    opened = open_bundle(bundle)
    eye = onnxruntime.InferenceSession(opened.features_path)
    real = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]

    def see(samples: ndarray) -> tuple[ndarray, ndarray]:
        features, probability = eye.run(["features", "probability"], {"x": samples})
        return features.astype(np.float64), probability.astype(np.float64)

    class Eye(FeatureExtractorBase):
        """Our features.onnx; the classifier's log-probabilities take the place of Inception's logits."""

        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        def forward(self, samples: Tensor) -> tuple[Tensor, ...]:
            features, probability = see(samples.numpy())
            found = {"features": from_numpy(features), "logits": from_numpy(np.log(probability))}
            return tuple(found[name] for name in self.features_list)

    class Digits(Dataset):
        def __len__(self) -> int:
            return len(real)

        def __getitem__(self, i: int) -> Tensor:
            return from_numpy(real[i])

    torch_fidelity.register_feature_extractor("ganwatch", Eye)
    latent, as_input = opened.card.latent, bundle / "of_normals.onnx"
    onnx.save(_of_normals(onnx.load(opened.model_path), latent.signs, latent.normals, latent.scale), as_input)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(as_input), input1_model_z_type="normal", input1_model_z_size=latent.dim, input1_model_num_samples=count,
        input2=Digits(), feature_extractor="ganwatch", isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=1000, kid_subsets=SUBSETS, cuda=False, save_cpu_ram=True, batch_size=64, rng_seed=SEED, cache=False, verbose=False,
    )  # fmt: skip

    z = np.random.RandomState(SEED).randn(count, latent.dim).astype(np.float32)
    z = np.concatenate([np.sign(z[:, : latent.signs]), latent.scale * z[:, latent.signs :]], axis=1).astype(np.float32)
    model = onnxruntime.InferenceSession(opened.model_path)
    fake = np.concatenate([see(model.run(["samples"], {"z": z[i : i + 64]})[0])[0] for i in range(0, count, 64)])
    true = np.concatenate([see(real[i : i + 64])[0] for i in range(0, len(real), 64)])
    mean, deviation = kid(fake, true, subsets=SUBSETS, size=1000, seed=SEED)
    precision, recall = _pair(prdc(true, fake, k=3))
    ours = {
        "frechet_inception_distance": fid(true, fake),
        "kernel_inception_distance_mean": mean,
        "kernel_inception_distance_std": deviation,
        "precision": precision,
        "recall": recall,
    }
    for name, value in ours.items():
        assert abs(value - theirs[name]) <= 1e-6 * max(1.0, abs(value)), f"{name}: ours {value}, torch-fidelity's {theirs[name]}"
    score = theirs["inception_score_mean"]
    assert score > 5, f"the inception score is {score}; it is at most 10, and five classes that are told apart would give 5"
    return {"samples": count, "version": opened.card.version, "torch-fidelity": theirs, "ours": ours}


def _of_normals(model: Any, signs: int, normals: int, scale: float) -> Any:
    """The graph with the latent law in front: z ~ N(0, 1), the only law that torch-fidelity gives, becomes signs and normals."""
    from onnx import helper, numpy_helper

    graph = model.graph
    for node in graph.node:
        node.input[:] = ["law" if name == "z" else name for name in node.input]
    is_sign = np.arange(signs + normals) < signs
    graph.initializer.extend([numpy_helper.from_array(is_sign, "is_sign"), numpy_helper.from_array(np.float32(scale), "law_scale")])
    for node in (
        helper.make_node("Where", ["is_sign", "sign", "normal"], ["law"]),
        helper.make_node("Mul", ["z", "law_scale"], ["normal"]),
        helper.make_node("Sign", ["z"], ["sign"]),
    ):
        graph.node.insert(0, node)
    return model


def _pair(figures: dict[str, float]) -> list[float]:
    return [figures["precision"], figures["recall"]]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    found = {
        "versions": {name: version(name) for name in PACKAGES},
        "arrays": {name: of_arrays(*pair) for name, pair in cases().items()},
        "generator": of_generator(Path(sys.argv[1])),
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["generator"], indent=1))
    print(f"torch-fidelity takes the generator, and agrees with training/evaluation.py on it to 1e-6; wrote {FILE}")


if __name__ == "__main__":
    main()
