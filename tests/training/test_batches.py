"""A batch is one batch, in however many parts and by however many workers its gradient is computed."""

import pytest
import torch
import torch.multiprocessing

from training.config import Config
from training.data import DATASETS
from training.train import adversarial_training


def first_step(config, dataset, **where):
    """The gradient of each player at the first step, and the losses: Adam, without momentum, remembers the last gradient."""
    seen = {}

    def save(state, step, metrics):
        for name, optimiser in zip(("generator", "critic"), state.optimisers, strict=True):
            seen[name] = torch.cat([optimiser.state[p]["exp_avg"].flatten() for p in optimiser.param_groups[0]["params"]]).double()
        seen["losses"] = torch.tensor([metrics[name] for name in ("critic_loss", "generator_loss", "penalty")]).double()

    adversarial_training(config, dataset, save=save, **where)
    return seen


def assert_same(found, whole, bound=1e-6):
    for name, expected in whole.items():
        assert float((found[name] - expected).norm() / expected.norm()) < bound, name


@pytest.mark.parametrize(
    "how",
    [
        {"dataset": "ring"},
        {"dataset": "ring", "packing": 4, "objective": "hinge"},
        {"dataset": "digits", "conditional": True},
        {"dataset": "digits", "network": "dcgan", "width": 16, "noise": 0.0},
        {"dataset": "digits", "network": "resnet", "width": 16, "noise": 0.0},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_accumulated_gradients_are_those_of_the_whole_batch(how):
    dataset = DATASETS[how["dataset"]]()
    config = Config(steps=1, **{"noise": 0.0} | how)
    whole = first_step(Config(**vars(config) | {"batch": 128}), dataset)
    for batch, accumulate in ((64, 2), (16, 8)):
        found = first_step(Config(**vars(config) | {"batch": batch, "accumulate": accumulate}), dataset)
        assert_same(found, whole, bound=5e-5 if how.get("network") == "resnet" else 1e-6)  # float32 rounds in each layer, by CPU


def test_accumulation_goes_on_from_a_checkpoint_bit_by_bit(tmp_path):
    digits = DATASETS["digits"]()
    config = Config(steps=60, batch=16, accumulate=2, augment=True, network="dcgan", width=16)
    keep = lambda state, step, so_far: step == 50 and state.save(tmp_path, step, so_far, rank=0, world=1)  # noqa: E731
    whole, figures = adversarial_training(config, digits, save=keep)
    resumed, again = adversarial_training(config, digits, resume=tmp_path)
    assert figures == again
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def one_of_two(rank, meeting, directory):
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    config = Config(dataset="ring", steps=1, batch=32, accumulate=4, noise=0.3, noise_schedule="controlled")
    torch.save(first_step(config, DATASETS["ring"](), rank=rank, world=2), f"{directory}/{rank}.pt")
    plain = Config(dataset="ring", steps=1, batch=32, accumulate=4)
    torch.save(first_step(plain, DATASETS["ring"](), rank=rank, world=2), f"{directory}/plain-{rank}.pt")
    normed = Config(dataset="ring", steps=2, batch=32, network="tests.training.normed:FAMILY")
    generator, figures = adversarial_training(normed, DATASETS["ring"](), rank=rank, world=2)
    torch.save((generator.state_dict(), figures), f"{directory}/normed-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_accumulate_what_one_computes_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(one_of_two, ((tmp_path / "meeting").as_uri(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"plain-{rank}.pt") for rank in range(2))
    assert_same(first, first_step(Config(dataset="ring", steps=1, batch=128), DATASETS["ring"]()))
    for name in ("", "plain-"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        assert all(torch.equal(first[part], second[part]) for part in first)  # so schedules that follow the losses agree, too
    (weights, figures), (others, same) = (torch.load(tmp_path / f"normed-{rank}.pt") for rank in range(2))
    assert figures == same and all(torch.equal(value, others[name]) for name, value in weights.items())  # statistics of batches, too
