"""How long training steps take: beside a plain PyTorch loop, with diagnostics, with a second worker. Part of `make bench-training`.

    python tests/benchmarks/bench_steps.py --rounds 5

Rounds are interleaved and medians are taken, so that what else the machine does falls on all alike; ratios are what holds.
Images are noise of MNIST's size: what they show costs no time. A second worker gains what a second free core gives: the load
average is printed beside it.

The plain loop of the plane took 5.8 ms a step on the machine on which bench_training's aims of CPU time were set: that loop by 5.8 is
how much slower this one is.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from torch.nn.functional import softplus

from training.arithmetic import wide_products
from training.config import Config
from training.data import DATASETS, Dataset
from training.diagnostics import Look
from training.objectives import OBJECTIVES
from training.registry import ganwatch_home
from training.train import adversarial_training, build

EVERY = 50  # steps from one look of diagnostics to the next, in a run as short as these
GAMES = {
    "plane": Config(dataset="ring"),
    "images, perceptron": Config(dataset="mnist"),
    "images, dcgan": Config(dataset="mnist", network="dcgan", width=64),
}
AIMS = {"by plain loop": 1.05, "diagnostics": 0.05, "two workers": 1.6}  # the last from below
CLOSED_FORM = 3.0 / 5.8  # of the plain loop, in the plane


@dataclass(frozen=True)
class Bench:
    """Time steps; print the ratios."""

    rounds: int = 5
    """Medians are taken over so many."""
    out: Path | None = None
    """Directory of steps.json."""


def played_on(config: Config) -> Dataset:
    if config.dataset != "mnist":
        return DATASETS[config.dataset]()
    rng = np.random.default_rng(0)
    return Dataset("mnist", rng.integers(256, size=(4000, 28, 28, 1), dtype=np.uint8), 10, rng.integers(10, size=4000), tuple("0123456789"))


def plain(config: Config, dataset: Dataset, *, save: Callable[..., None]) -> None:
    """The same networks and game as they stand in any tutorial: the critic's step by double backward, then the generator's."""
    recipe = config.recipe
    latent, generator, critic = build(config, dataset)
    average = [p.detach().clone() for p in generator.parameters()]
    optimisers = [torch.optim.Adam(n.parameters(), lr=1e-4, betas=(0.0, 0.99), fused=True) for n in (generator, critic)]
    images = torch.from_numpy(dataset.normalised())
    for step in range(recipe.steps):
        real, z = images[torch.randint(len(images), (recipe.batch,))], torch.randn(recipe.batch, latent.dim)
        fake = generator(z)
        x = torch.cat([real, fake.detach()]).requires_grad_()
        logit = critic(x)
        (slope,) = torch.autograd.grad(logit.sum(), x, create_graph=True)
        on_real, on_fake = logit.chunk(2)
        optimisers[1].zero_grad()
        (softplus(on_fake - on_real).mean() + recipe.gamma[0] / 2 * slope.square().sum() / recipe.batch).backward()
        optimisers[1].step()
        optimisers[0].zero_grad()
        softplus(on_real.detach() - critic(fake)).mean().backward()
        optimisers[0].step()
        with torch.no_grad():
            for mean, now in zip(average, generator.parameters(), strict=True):
                mean.lerp_(now, 0.01)
        if (step + 1) % EVERY == 0:
            save()


def per_step(run: Callable[..., object], config: Config, dataset: Dataset, clock: Callable[[], float]) -> float:
    """Seconds of a step, from the first look of a run to the second; ours includes that look."""
    stamps: list[float] = []
    run(replace(config, steps=2 * EVERY), dataset, save=lambda *_: stamps.append(clock()))
    return (stamps[1] - stamps[0]) / EVERY


def look_seconds(config: Config, dataset: Dataset) -> Callable[[], float]:
    latent, generator, critic = build(config, dataset)
    look = Look(dataset, latent, OBJECTIVES[config.objective], conditional=False, packing=1, seed=0)

    def measure() -> float:
        begin = time.process_time()
        look(generator, critic)
        return time.process_time() - begin

    return measure


def worker(rank: int, world: int, meeting: str, config: Config, answer: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    with wide_products(config.recipe.width):
        seconds = per_step(partial(adversarial_training, rank=rank, world=world), config, played_on(config), time.monotonic)
    if rank == 0:
        Path(answer).write_text(str(config.recipe.batch / seconds))
    if world > 1:
        torch.distributed.destroy_process_group()


def samples_per_second(world: int, config: Config) -> float:
    with tempfile.TemporaryDirectory() as directory:
        meeting, answer = Path(directory, "meeting").as_uri(), Path(directory, "answer")
        torch.multiprocessing.spawn(worker, (world, meeting, config, str(answer)), nprocs=world)
        return float(answer.read_text())


def main(bench: Bench) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    found = {}
    for game, config in GAMES.items():
        dataset, width = played_on(config), config.recipe.width
        with wide_products(width):
            look, seconds = look_seconds(config, dataset), {"ours": [], "plain": [], "look": []}
            for _ in range(bench.rounds):
                for name, run in (("ours", adversarial_training), ("plain", plain)):
                    seconds[name].append(per_step(run, config, dataset, time.process_time))
                seconds["look"].append(look())
        # A run of its usual length looks at itself every hundredth part, here it does every 50 steps.
        step, other, looking = (median(seconds[name]) for name in ("ours", "plain", "look"))
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(bench.rounds):
            for world, measured in rates.items():
                measured.append(samples_per_second(world, config))
        step -= looking / EVERY
        every = max(EVERY, config.recipe.steps // 100)
        found[game] = {
            "width": width, "batch": config.recipe.batch, "ms a step": 1e3 * step, "ms of the plain loop": 1e3 * other,
            "by plain loop": step / other, "diagnostics": looking / (every * step),
            "two workers": median(rates[2]) / median(rates[1]), "samples/s of one": median(rates[1]), "load": os.getloadavg()[0],
        }  # fmt: skip
        aims = AIMS | ({"by plain loop": CLOSED_FORM} if game == "plane" else {})
        missed = [n for n, aim in aims.items() if (found[game][n] < aim if n == "two workers" else found[game][n] > aim)]
        words = "  ".join(f"{name} {value:.3g}" for name, value in found[game].items())
        print(f"{game}: {words}  {'miss: ' + ', '.join(missed) if missed else 'all hit'}", flush=True)
    out = bench.out or ganwatch_home() / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "steps.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
