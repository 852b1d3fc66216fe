from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from training.config import Config
from training.data import DATASETS
from training.export import write_bundle
from training.features import fit_eye
from training.train import adversarial_training, build


def train_bundle(config: Config, directory: Path, *, samples: int) -> Path:
    """Train in this process, without Ray, and write the bundle."""
    torch.set_num_threads(1)
    dataset = DATASETS[config.dataset]()
    generator, _ = adversarial_training(config, dataset)
    write_bundle(
        directory,
        model=config.dataset,
        dataset=dataset,
        generator=generator,
        latent=build(config, dataset)[0],
        sight=fit_eye(dataset, seed=0),
        training={"config": asdict(config)},
        certify_samples=samples,
        certify_seconds=30.0,
        keep_points=True,
        progress=lambda done, most: None,
    )
    return directory


@pytest.fixture(scope="session")
def ring(tmp_path_factory):
    """A bundle of a generator that has half learned the ring: all modes, good enough to publish."""
    return train_bundle(Config(dataset="ring", steps=4000), tmp_path_factory.mktemp("ring"), samples=100_000)


@pytest.fixture(scope="session")
def collapsed(tmp_path_factory):
    """The same nets with the penalty switched off."""
    return train_bundle(Config(dataset="ring", steps=600, penalty="none"), tmp_path_factory.mktemp("collapsed"), samples=20_000)


@pytest.fixture(scope="session")
def conditional(tmp_path_factory):
    return train_bundle(Config(dataset="digits", conditional=True, steps=800), tmp_path_factory.mktemp("digits"), samples=5_000)


@pytest.fixture(scope="session")
def ray():
    """A Ray of this process alone, for what runs in tasks."""
    import ray as started

    started.init("local", num_cpus=2, include_dashboard=False, logging_level="error", _node_ip_address="127.0.0.1",
                 runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}})  # fmt: skip
    yield started
    started.shutdown()
