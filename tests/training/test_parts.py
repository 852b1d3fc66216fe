"""Parts of the game that combine: each with the training loop, and the combinations that are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.config import Config, InputError, check, check_shape, conflicts
from training.data import DATASETS, Dataset
from training.penalties import PENALTIES
from training.train import adversarial_training, build


def train(dataset, **how):
    """Ten steps on a tenth of the width, far enough to run each line."""
    generator, losses = adversarial_training(Config(dataset=dataset, steps=10, width=16, **how), DATASETS[dataset]())
    assert np.isfinite([losses[name] for name in ("critic_loss", "generator_loss", "penalty")]).all() and losses["failing"] == []
    return torch.cat([p.flatten() for p in generator.parameters()]), losses


@pytest.fixture(scope="module")
def plain():
    return {dataset: train(dataset)[0] for dataset in ("ring", "digits")}


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ("ring", {"penalty": "gradient", "gamma": 20.0, "objective": "wasserstein"}),
        ("ring", {"penalty": "r1"}),
        ("ring", {"penalty": "r2"}),
        ("ring", {"clip": 0.05, "penalty": "none", "objective": "wasserstein"}),
        ("ring", {"spectral_norm": True, "penalty": "none", "objective": "hinge"}),
        ("ring", {"noise": 0.3}),
        ("ring", {"noise": 0.3, "noise_schedule": "linear"}),
        ("ring", {"noise": 0.3, "noise_schedule": "controlled", "objective": "minimax"}),
        ("ring", {"packing": 4}),
        ("ring", {"unroll": 3, "penalty": "none", "objective": "non_saturating"}),
        ("ring", {"unroll": 3}),
        ("digits", {"network": "resnet", "spectral_norm": True, "objective": "hinge", "penalty": "none"}),
        ("digits", {"augment": True}),
        ("digits", {"network": "dcgan"}),
        ("digits", {"network": "resnet", "conditional": True, "packing": 1}),
        ("digits", {"augment": True, "packing": 2, "noise": 0.1, "spectral_norm": True, "objective": "f_js", "network": "dcgan"}),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else v,
)
def test_a_part_trains_and_changes_what_is_learned(plain, dataset, part):
    weights, losses = train(dataset, **part)
    assert weights.shape != plain[dataset].shape or not torch.equal(weights, plain[dataset])
    assert (losses["penalty"] == 0) == (part.get("penalty") == "none")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"unroll": 5, "clip": 0.01}, "--unroll with --clip: a clipped weight has no derivative"),
        ({"unroll": 5, "spectral_norm": True}, "--unroll with --spectral-norm: the singular vectors"),
        ({"clip": 0.01, "spectral_norm": True}, "--clip with --spectral-norm: the layers are divided"),
        ({"unroll": 5, "accumulate": 2}, "--unroll with --accumulate or several --workers: .* a critic that has seen one part"),
        ({"unroll": 5, "workers": 2}, "--unroll with --accumulate or several --workers: .* a critic that has seen one part"),
        ({"noise": float("nan")}, "--noise is nan; it must be at least 0, and finite"),
        ({"noise": float("inf")}, "--noise is inf; it must be at least 0, and finite"),
        ({"compile": True, "spectral_norm": True}, "--compile with --spectral-norm: the singular vectors"),
        ({"packing": 2, "conditional": True}, "--packing with --conditional: one critic input would mix"),
        ({"objective": "wasserstein", "penalty": "none"}, "wasserstein with nothing that holds the critic back: .* add --clip 0.01"),
        ({"objective": "wasserstein", "noise": 0.1, "noise_schedule": "controlled"}, "controlled with --objective wasserstein: .* no upper end"),
        ({"dataset": "ring", "noise_schedule": "linear"}, "linear without noise: give the first standard deviation by --noise"),
        ({"packing": 3}, "--batch is 128, which --workers 1 and --packing 3 do not divide; .* 126 and 129"),
        ({"packing": 0}, "--packing is 0; it must be at least 1"),
        ({"clip": -1.0}, "--clip is -1.0; it must be positive"),
        ({"network": "dcgen"}, "there are no networks dcgen; did you mean dcgan"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path, wish, words):
    with pytest.raises(InputError, match=words):
        check(Config(registry=str(tmp_path), **wish))


@pytest.mark.parametrize("wish", [{"augment": True}, {"network": "resnet"}])
def test_what_needs_images_is_refused_for_vectors(wish):
    check_shape(Config(dataset="digits", **wish), DATASETS["digits"]())
    with pytest.raises(InputError, match="needs images, and ring has vectors of 2 numbers"):
        check_shape(Config(dataset="ring", **wish), DATASETS["ring"]())


def test_what_data_of_a_users_own_cannot_grant_is_refused_once_they_are_read():
    few = Dataset("few", np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32), cells=4)
    check_shape(Config(dataset="few.npy", like="grid", packing=64), few)
    with pytest.raises(InputError, match="--packing is 128, and a critic of few is judged by 120 held-out samples; use at most 120"):
        check_shape(Config(dataset="few.npy", like="grid", packing=128), few)
    with pytest.raises(InputError, match="linear without noise"):  # the recipe is known only now, and has none
        check_shape(Config(dataset="few.npy", like="grid", noise_schedule="linear"), few)
    labels = (np.arange(600) == 599).astype(np.int64)
    with pytest.raises(InputError, match="all of class rare are held out"):
        check_shape(Config(dataset="few.npy", like="grid", conditional=True), replace(few, labels=labels, classes=("usual", "rare")))


def test_the_constraint_of_wgan_gp_is_kept_to_the_end():
    """Between reals and fakes the critic's slope is to be 1 (Gulrajani et al. 2017, proposition 1)."""
    assert Config(penalty="gradient").recipe.gamma == (20, 20) and Config(penalty="gradient", gamma=3.0).recipe.gamma == (3, 3)
    torch.set_num_threads(1)
    config, dataset, critics = Config(dataset="ring", steps=1000, width=32, objective="wasserstein", penalty="gradient"), DATASETS["ring"](), []
    generator, _ = adversarial_training(config, dataset, save=lambda state, *_: critics.append(state.critic))
    real = torch.from_numpy(dataset.normalised(slice(0, 1000)))
    fake = generator(torch.from_numpy(build(config, dataset)[0].sample(seed=7, count=1000))).detach()
    x = PENALTIES["gradient"].points_between(real, fake, torch.Generator().manual_seed(0)).requires_grad_()
    slope = torch.autograd.grad(critics[-1](x).sum(), x)[0].norm(dim=1)
    assert 0.7 < float(slope.median()) < 1.3


def test_other_games_get_the_recipes_damping():
    gammas = {
        how: Config(dataset="ring", **dict(how)).recipe.gamma[0]
        for how in ((), (("objective", "hinge"),), (("penalty", "r1"),), (("gamma", 3.0), ("objective", "hinge")), (("penalty", "gradient"),))
    }
    assert list(gammas.values()) == pytest.approx([1.0, 2.0, 2.0, 3.0, 20.0])
    assert conflicts(Config()) == []
