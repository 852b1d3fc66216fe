"""Parts of the game that combine: each with the training loop, and the combinations that are refused."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from training.config import Config, InputError, check, check_shape, conflicts
from training.data import DATASETS, Dataset
from training.objectives import OBJECTIVES
from training.penalties import PENALTIES
from training.train import adversarial_training, build


opened = cache(lambda name: DATASETS[name]())


def train(dataset, **how):
    """A few steps on a tenth of the width, far enough to run each line: the generator's weights, and the last figures."""
    generator, figures = adversarial_training(Config(dataset=dataset, width=16, **how), opened(dataset))
    assert np.isfinite([figures[name] for name in ("critic_loss", "generator_loss", "penalty")]).all()
    weights = torch.cat([p.detach().flatten() for p in generator.parameters()])
    assert weights.isfinite().all()
    return weights, figures


PARTS = {
    "nothing": {},
    "r1": {"penalty": "r1"},
    "r2 and packing": {"penalty": "r2", "packing": 4},
    "gradient penalty": {"penalty": "gradient"},
    "clipping": {"penalty": "none", "clip": 0.05},
    "spectral norm": {"penalty": "none", "spectral_norm": True},
    "unrolling": {"penalty": "none", "unroll": 3},
    "unrolling and r1r2": {"unroll": 3},
    "noise": {"noise": 0.3},
    "falling noise": {"noise": 0.3, "noise_schedule": "linear"},
    "controlled noise": {"noise": 0.3, "noise_schedule": "controlled"},
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_with_every_part_and_each_changes_what_is_learned(objective):
    """Five steps, of which the generator makes one even with the critic of Wasserstein."""
    wishes = {part: Config(dataset="ring", objective=objective, **how) for part, how in PARTS.items()}
    refused = {part for part, config in wishes.items() if conflicts(config)}
    assert refused == ({"controlled noise", "unrolling", "unrolling and r1r2"} if objective == "wasserstein" else set())
    learned = {part: train("ring", steps=5, objective=objective, **how) for part, how in PARTS.items() if part not in refused}
    assert len({weights.numpy().tobytes() for weights, _ in learned.values()}) == len(learned)
    assert {part for part, (_, figures) in learned.items() if figures["penalty"] == 0} == {part for part in learned if PARTS[part].get("penalty") == "none"}


@pytest.fixture(scope="module")
def plain():
    return train("digits", steps=10)[0]


@pytest.mark.parametrize(
    "part",
    [
        {"network": "resnet", "spectral_norm": True, "objective": "hinge", "penalty": "none"},
        {"augment": True},
        {"network": "dcgan"},
        {"network": "resnet", "conditional": True, "packing": 1},
        {"augment": True, "packing": 2, "noise": 0.1, "spectral_norm": True, "objective": "f_js", "network": "dcgan"},
    ],
    ids="+".join,
)
def test_parts_for_images_train_and_change_what_is_learned(plain, part):
    weights, figures = train("digits", steps=10, **part)
    assert weights.shape != plain.shape or not torch.equal(weights, plain)
    assert (figures["penalty"] == 0) == (part.get("penalty") == "none")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"unroll": 5, "clip": 0.01}, "--unroll with --clip: a clipped weight has no derivative.* use --penalty r1r2"),
        ({"unroll": 5, "objective": "wasserstein", "penalty": "gradient"}, "--unroll with --objective wasserstein: .* leave the penalty out"),
        ({"unroll": 5, "spectral_norm": True}, "--unroll with --spectral-norm: the singular vectors"),
        ({"clip": 0.01, "spectral_norm": True}, "--clip with --spectral-norm: the layers are divided"),
        ({"unroll": 5, "accumulate": 2}, "--unroll with --accumulate or several --workers: .* a critic that has seen one part"),
        ({"unroll": 5, "workers": 2}, "--unroll with --accumulate or several --workers: .* a critic that has seen one part"),
        ({"noise": float("nan")}, "--noise is nan; it must be at least 0, and finite"),
        ({"noise": float("inf")}, "--noise is inf; it must be at least 0, and finite"),
        ({"compile": True, "spectral_norm": True}, "--compile with --spectral-norm: the singular vectors"),
        ({"gamma": 3.0, "penalty": "none"}, "--gamma with --penalty none: there is no penalty to weigh; leave --gamma out"),
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
    largest = Config(dataset="few.npy", like="grid", packing=60, batch=120, steps=2, width=16)
    check_shape(largest, few)
    looks: list[dict[str, float]] = []
    adversarial_training(largest, few, say=lambda **figures: looks.append(figures))
    assert len(looks) == 1 and looks[0]["tail_index"] > 0 and np.isfinite(looks[0]["signal_to_noise"])
    with pytest.raises(InputError, match="--packing is 64, and a critic of few is judged by 120 held-out samples, two packs of them at least; use at most 60$"):
        check_shape(replace(largest, packing=64), few)
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
