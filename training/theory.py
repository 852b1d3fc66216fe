"""The theory behind the recipes, reproduced: each claim is one function that measures it, with a picture.

    python -m training.theory [--out build/theory] [--quick]        # minutes on a CPU: numbers.json, one PNG a claim, a table

Every function takes `scale`, 1 for the full measurement, less for a quick one, and returns its numbers and what to draw. What
the numbers must come out as is said in CLAIMS, which the program checks and the tests check at small scale.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from training.bundle import SignGaussian
from training.data import DATASETS
from training.diagnostics import hill
from training.evaluation import divergences, mixture_fit
from training.networks import Critic, Generator
from training.objectives import OBJECTIVES, Objective
from training.penalties import PENALTIES, clip_weights, closed_form, unrolled_pull
from training.recipes import RECIPES
from training.train import decayed
from training.views import InstanceNoise

SEEDS = 3  # of what a single run could come out of by luck
STYLES = ("-", "--", "-.", ":")


Curve = tuple[list[float], list[float] | list[list[float]]]


@dataclass(frozen=True)
class Finding:
    """Numbers of one claim, and its figure.

    curves: name -> (x, y), y of one run, or of several: their mean is drawn, and the range that they fill; logarithmic axes where
    `log_x`, `log_y`; levels: name -> what theory says, a horizontal line; clouds: name -> points [n, 2], a panel each.
    """

    numbers: dict[str, float]
    curves: dict[str, Curve]
    axes: tuple[str, str]  # what they show and in which unit
    log_x: bool = False
    log_y: bool = False
    levels: dict[str, float] = field(default_factory=dict)
    clouds: dict[str, ndarray] = field(default_factory=dict)


# 1. Arjovsky and Bottou 2017: a fixed generator against a critic trained to perfection ----------------------------------------


def fixed_generator(objective: Objective, noise: float, *, steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Train a critic on two laws that lie on parallel line pieces in the plane, and follow the gradient that G would get.

    Returns, at looks that grow apart like powers of 1.2, because the critic learns most of it at once: step, and of the gradient by the generator's shift (one row a sample) the norm of its mean, the
    variance around it, and Hill's tail index of its size.
    """
    torch.manual_seed(seed)
    rng, critic = torch.Generator().manual_seed(seed), Critic(2, width=128, classes=0)
    optimiser, blur = torch.optim.Adam(critic.parameters(), lr=1e-3), InstanceNoise(noise)
    none, seen = torch.zeros(0, 2), {"step": [], "gradient": [], "variance": [], "tail": []}

    def draw(n: int) -> tuple[Tensor, Tensor]:
        pieces = torch.rand(2, n, generator=rng)
        real, fake = (torch.stack([torch.full((n,), at), y], dim=1) for at, y in zip((0.0, 0.5), pieces, strict=True))
        return blur(real, rng), blur(fake, rng)

    looks = {0, steps, *np.unique(np.geomspace(1, steps, 1 + round(np.log(steps) / np.log(1.2)), dtype=int)).tolist()}
    for step in range(steps + 1):
        if step in looks:
            pull = 512 * closed_form(critic, objective, PENALTIES["none"], *draw(512), none, None, 0.0).by_fake
            seen["step"].append(float(step))
            seen["gradient"].append(float(pull.mean(dim=0).norm()))
            seen["variance"].append(float(pull.var(dim=0).sum()))
            seen["tail"].append(hill(pull.norm(dim=1).numpy()))
        closed_form(critic, objective, PENALTIES["none"], *draw(256), none, None, 0.0)
        optimiser.step()
    return seen


def vanishing_gradient(scale: float) -> Finding:
    """Theorem 2.4: GAN0's gradient decays by orders of magnitude as D becomes perfect; with instance noise it stays."""
    steps = int(4000 * scale)
    clean, noisy = (fixed_generator(OBJECTIVES["minimax"], s, steps=steps) for s in (0.0, 0.5))
    numbers = {
        "decay_clean": max(clean["gradient"]) / max(clean["gradient"][-1], 1e-30),
        "decay_noisy": max(noisy["gradient"]) / max(noisy["gradient"][-1], 1e-30),
    }
    curves = {"no noise": (clean["step"], clean["gradient"]), "instance noise, sd 0.5": (noisy["step"], noisy["gradient"])}
    return Finding(numbers, curves, ("steps of the critic", "norm of the generator's mean gradient"), log_x=True, log_y=True)


def unstable_gradient(scale: float) -> Finding:
    """Theorem 2.6: the variance of -log D's gradient grows as D becomes perfect; with instance noise it does not."""
    steps = int(4000 * scale)
    clean, noisy = (fixed_generator(OBJECTIVES["non_saturating"], s, steps=steps) for s in (0.0, 0.5))
    numbers = {
        "growth_clean": clean["variance"][-1] / clean["variance"][0],
        "growth_noisy": noisy["variance"][-1] / noisy["variance"][0],
        "variance_clean": clean["variance"][-1],
        "variance_noisy": noisy["variance"][-1],
    }
    curves = {"no noise": (clean["step"], clean["variance"]), "instance noise, sd 0.5": (noisy["step"], noisy["variance"])}
    return Finding(numbers, curves, ("steps of the critic", "variance of the gradient of -log D"), log_x=True, log_y=True)


# 2. Divergences on discrete laws ----------------------------------------------------------------------------------------------


def optimal_critic(scale: float) -> Finding:
    """Goodfellow et al. 2014, theorem 1, by descent: logits trained on two laws reach T, the loss -log 4 + 2 JS."""
    torch.manual_seed(0)
    p, q = torch.softmax(torch.randn(2, 12, dtype=torch.float64), dim=1)
    logit = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    game, optimiser = OBJECTIVES["minimax"], torch.optim.Adam([logit], lr=0.05)
    js, looks = divergences(p.numpy(), q.numpy())["js"], ([], [])
    for step in range(int(2000 * scale) + 1):
        sure = torch.full_like(logit, math.inf)  # of the other side, which then adds nothing
        loss = (p * game.critic_loss(logit, -sure) + q * game.critic_loss(sure, logit)).sum()
        looks[0].append(float(step))
        looks[1].append(game.estimate(float(loss.detach())))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = torch.sigmoid(logit.detach())
    numbers = {"js": js, "js_of_the_critic": looks[1][-1], "largest_error_of_d": float((found - p / (p + q)).abs().max())}
    axes = ("steps of the critic", "log 2 - loss / 2, nats")
    return Finding(numbers, {"the critic's estimate of JS": looks}, axes, log_x=True, levels={"JS(p, q)": js})


def two_ways_to_be_wrong(scale: float) -> Finding:
    """KL(p, q) punishes dropped modes, KL(q, p) punishes fakes; JS takes both mildly.

    Ten modes and a cell for fakes: p has the modes (and a trace of fakes), q loses or invents the same mass.
    """
    rare = 1e-6
    lost = np.arange(10) / 10
    real = np.append(np.full(10, (1 - rare) / 10), rare)
    dropping, faking = [], []
    for mass in lost:
        weights = np.append(np.full(10, 1.0), rare * 10)
        weights[: round(10 * mass)] *= 1e-6
        dropping.append(divergences(real, weights / weights.sum()))
        faking.append(divergences(real, np.append(real[:10] * (1 - mass), mass + rare * (1 - mass))))
    half = 5
    numbers = {
        "drop_forward": dropping[half]["forward_kl"], "drop_reverse": dropping[half]["reverse_kl"],
        "fake_forward": faking[half]["forward_kl"], "fake_reverse": faking[half]["reverse_kl"],
        "largest_js": max(each["js"] for each in dropping + faking),
    }  # fmt: skip
    named = {"drop": dropping, "fake": faking}
    names = {"forward_kl": "KL(p, q)", "reverse_kl": "KL(q, p)", "js": "JS(p, q)"}
    hows = {"drop": "modes dropped", "fake": "fakes made"}
    curves = {f"{hows[how]}: {names[kl]}": (lost.tolist(), [d[kl] for d in named[how]]) for kl in names for how in named}
    return Finding(numbers, curves, ("probability that q drops, or puts on fakes", "divergence, nats"), levels={"log 2": math.log(2)})


# 3. Wasserstein against JS on shifted lines -----------------------------------------------------------------------------------


def shifted_lines(scale: float) -> Finding:
    """Arjovsky et al. 2017, example 1: p on x = 0, q on x = theta. JS is stuck at log 2, a held critic says theta."""
    shifts, steps = (0.25, 0.5, 1.0, 2.0), int(1500 * scale)
    found: dict[str, list[float]] = {"gradient penalty": [], "clipping": [], "JS": []}
    for shift in shifts:
        for name in found:
            kind, bound = "minimax" if name == "JS" else "wasserstein", 0.05 if name == "clipping" else None
            torch.manual_seed(0)
            critic, game = Critic(2, width=64, classes=0), OBJECTIVES[kind]
            optimiser = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.0, 0.9))
            penalty = PENALTIES["gradient" if name == "gradient penalty" else "none"]
            for step in range(steps):
                optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
                real, fake = (torch.stack([torch.full((256,), at), torch.rand(256)], dim=1) for at in (0.0, shift))
                between = penalty.points_between(real, fake)
                closed_form(critic, game, penalty, real, fake, between, None, 20.0)
                optimiser.step()
                if bound:
                    clip_weights(critic, bound)
            x = torch.stack([torch.linspace(0, shift, 200), torch.full((200,), 0.5)], dim=1).requires_grad_()
            slope = float(torch.autograd.grad(critic(x).sum(), x)[0].norm(dim=1).max())
            seen = closed_form(critic, game, PENALTIES["none"], real, fake, between[:0], None, 0.0)
            found[name].append(game.estimate(float(seen.critic_loss)) / (slope if kind == "wasserstein" else 1.0))
    numbers = {}
    for name, values in found.items():
        what = "js at {}" if name == "JS" else f"w1 at {{}} by {name}"
        numbers |= {what.format(shift): value for shift, value in zip(shifts, values, strict=True)}
    names = {"gradient penalty": "W1 by a critic with gradient penalty", "clipping": "W1 by a clipped critic", "JS": "JS by GAN0's critic, nats"}
    curves = {"W1, exactly": (list(shifts), list(shifts))} | {names[name]: (list(shifts), values) for name, values in found.items()}
    return Finding(numbers, curves, ("distance of the two lines", "distance of the two laws"), levels={"log 2": math.log(2)})


# 4. On the ring ---------------------------------------------------------------------------------------------------------------


GAMES = {  # objective, penalty, unrolled critic steps
    "GAN1": ("non_saturating", "none", 0),
    "least squares": ("least_squares", "none", 0),
    "GAN1 unrolled 5": ("non_saturating", "none", 5),
    "GAN1 + R1 + R2": ("non_saturating", "r1r2", 0),
}


def play(game: str, *, steps: int, seed: int) -> tuple[list[float], list[float], ndarray]:
    """One of GAMES on the ring, at the rates of its recipe and in smaller nets: the steps looked at, modes covered then, samples [2000, 2] at the end.

    A mode counts as covered when it has a quarter of its share of the samples near any mode (within 20 sigma).
    """
    ring, recipe, (kind, penalty, unroll) = DATASETS["ring"](), RECIPES["ring"], GAMES[game]
    data, latent = torch.from_numpy(ring.normalised()[:20_000]), SignGaussian(10, 2, 1.0)
    torch.manual_seed(seed)
    objective, at, modes = OBJECTIVES[kind], [], []
    generator = Generator(latent.dim, 2, width=128, classes=0, bounded=False)
    critic = Critic(2, width=128, classes=0, fourier=32)
    optimisers = [torch.optim.Adam(n.parameters(), betas=(0.0, 0.9), fused=True) for n in (generator, critic)]
    for step in range(steps):
        rate, gamma = (decayed(ends, step / steps) for ends in (recipe.learning_rate, recipe.gamma))
        real = data[torch.randint(len(data), (128,))]
        fake = generator(torch.from_numpy(latent.sample(seed=1 + seed, offset=128 * step, count=128)))
        seen = closed_form(critic, objective, PENALTIES[penalty], real, fake.detach(), real[:0], None, gamma)
        pull = unrolled_pull(critic, objective, real, fake, None, steps=unroll) if unroll else seen.by_fake
        generator.zero_grad()
        fake.backward(pull)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
        if step % max(1, steps // 40) == 0 or step + 1 == steps:
            with torch.no_grad():
                x = generator(torch.from_numpy(latent.sample(seed=0, count=2000))).numpy() * ring.scale + ring.shift
            near = np.linalg.norm(x[:, None] - ring.mixture.centres, axis=2)
            near = np.bincount(near.argmin(axis=1)[near.min(axis=1) < 0.2], minlength=8)
            at.append(float(step))
            modes.append(float((near >= 0.25 / 8 * len(x) * (near.sum() / len(x))).sum() if near.sum() else 0))
    return at, modes, x


def games_on_the_ring(scale: float) -> Finding:
    """Each of GAMES from several seeds: how many modes it covers, over the second half of the run, and how many samples lie in one.

    Which game without a penalty loses modes is a matter of the seed, so no claim compares their numbers of modes. That unrolling
    keeps GAN1 on all eight (Metz et al. 2017, figure 2) is not shown: theirs are 25,000 steps of 512 samples at rates a fortieth of
    these, hours here; at their rates and 4,000 steps GAN1 and least squares hop between one and three modes, as they report.
    """
    numbers, curves, clouds, mixture = {}, {}, {}, DATASETS["ring"]().mixture
    for game in GAMES:
        runs = [play(game, steps=int(2000 * scale), seed=seed) for seed in range(math.ceil(SEEDS * scale))]
        quality = [mixture_fit(mixture, x)["high_quality"] for *_, x in runs]
        numbers[f"modes, {game}"] = float(np.mean([modes[20:] for _, modes, _ in runs]))
        numbers |= {f"{word} high quality, {game}": float(of(quality)) for word, of in (("mean", np.mean), ("least", min), ("most", max))}
        curves[game], clouds[game] = (runs[0][0], [m for _, m, _ in runs]), runs[0][2]
    return Finding(numbers, curves, ("steps", "modes covered, of 8"), levels={"all modes": 8.0}, clouds=clouds)


def gaussian_to_ring(scale: float) -> Finding:
    """The map z / 10 + z / |z| bends a bivariate Gaussian into a ring (Doersch 2016): a small network can be that map."""
    torch.manual_seed(0)
    net = Generator(2, 2, width=64, classes=0, bounded=False)
    optimiser, looks = torch.optim.Adam(net.parameters(), lr=3e-3), ([], [])
    for step in range(int(1500 * scale)):
        z = torch.randn(256, 2)
        loss = (net(z) - (z / 10 + z / z.norm(dim=1, keepdim=True))).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        looks[0].append(float(step))
        looks[1].append(float(loss.detach()))
    z = torch.randn(20_000, 2)
    exact, learned = z / 10 + z / z.norm(dim=1, keepdim=True), net(z).detach()
    clouds = {"exact": exact, "learned": learned, "latent": z}
    numbers = {f"inside_the_ring_{name}": float((x.norm(dim=1) < 0.9).float().mean()) for name, x in clouds.items()}
    numbers["mean_radius_exact"] = float(exact.norm(dim=1).mean())
    numbers["mean_radius_learned"] = float(learned.norm(dim=1).mean())
    shown = {"latent, N(0, I)": z, "z / 10 + z / |z|": exact, "learned": learned}
    points = {name: x[:3000].numpy() for name, x in shown.items()}
    return Finding(numbers, {"the network": looks}, ("steps", "mean squared error"), log_y=True, clouds=points)


# The program ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What theory says, how to measure it, and when the measurement agrees."""

    words: str
    measure: Callable[[float], Finding]
    holds: Callable[[dict[str, float]], bool]


CLAIMS: dict[str, Claim] = {
    "vanishing_gradient": Claim(
        "GAN0's gradient vanishes as the critic becomes perfect; instance noise keeps it",
        vanishing_gradient,
        lambda n: n["decay_clean"] > 100 and n["decay_noisy"] < 10,
    ),
    "unstable_gradient": Claim(
        "the variance of -log D's gradient grows as the critic becomes perfect; instance noise keeps it small",
        unstable_gradient,
        lambda n: n["growth_clean"] > 20 * n["growth_noisy"] and n["variance_noisy"] < 0.05 * n["variance_clean"],
    ),
    "optimal_critic": Claim(
        "the optimal critic is p / (p + q) and its loss is log 4 - 2 JS",
        optimal_critic,
        lambda n: abs(n["js"] - n["js_of_the_critic"]) < 1e-6 and n["largest_error_of_d"] < 1e-3,
    ),
    "two_ways_to_be_wrong": Claim(
        "forward KL punishes dropped modes, reverse KL punishes fakes, JS stays below log 2",
        two_ways_to_be_wrong,
        lambda n: n["drop_forward"] > 4 * n["drop_reverse"]
        and n["fake_reverse"] > 4 * n["fake_forward"]
        and n["largest_js"] < math.log(2),
    ),
    "shifted_lines": Claim(
        "a Wasserstein critic says how far apart two lines are, where JS is stuck at log 2",
        shifted_lines,
        lambda n: all(
            abs(n[f"w1 at {s} by {how}"] / s - 1) < 0.25
            for s in (0.25, 0.5, 1.0, 2.0)
            for how in ("gradient penalty", "clipping")
        )
        and all(n[f"js at {s}"] > 0.9 * math.log(2) for s in (0.25, 0.5, 1.0, 2.0)),
    ),
    "games_on_the_ring": Claim(
        "with R1 + R2 GAN1 keeps most of the ring's modes and begins to narrow to them; without a penalty hardly a sample of GAN1, unrolled GAN1 or "
        "least squares lies in a mode",
        games_on_the_ring,
        lambda n: n["modes, GAN1 + R1 + R2"] > 4  # most of eight: how many of the rest is a matter of the machine's rounding
        and all(
            n["mean high quality, GAN1 + R1 + R2"] > 5 * n[f"mean high quality, {other}"]
            and n["least high quality, GAN1 + R1 + R2"] > n[f"most high quality, {other}"]
            for other in ("GAN1", "least squares", "GAN1 unrolled 5")
        ),
    ),
    "gaussian_to_ring": Claim(
        "a small network bends a bivariate Gaussian into a ring",
        gaussian_to_ring,
        lambda n: n["inside_the_ring_learned"] < 0.05 < n["inside_the_ring_latent"]
        and abs(n["mean_radius_learned"] / n["mean_radius_exact"] - 1) < 0.02,
    ),
}
def plot(finding: Finding, title: str) -> Figure:
    """The curves, and below them a panel for each cloud of points, all at one scale."""
    count = len(finding.clouds)
    heights = [5.0, 1 + 9 / count] if count else [5.0]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 90), fontsize=12)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_curves(parts[0].subplots(), finding)
    if count:
        reach = max(np.quantile(np.abs(points), 0.99) for points in finding.clouds.values())
        panels = parts[1].subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
        for i, (panel, (name, points)) in enumerate(zip(panels, finding.clouds.items(), strict=True)):
            panel.scatter(*points.T, s=2, alpha=0.3, color=f"C{i}")
            panel.set(title=name, xlabel="x", aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
        panels[0].set_ylabel("y")
    return figure


def _draw_curves(axes: Axes, finding: Finding) -> None:
    for i, (name, (x, y)) in enumerate(finding.curves.items()):
        runs = np.atleast_2d(y)
        axes.plot(x, runs.mean(axis=0), color=f"C{i}", linestyle=STYLES[i % 4], label=name, marker="." if len(x) < 15 else None)
        if len(runs) > 1:
            axes.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=f"C{i}", alpha=0.15, linewidth=0)
    for name, value in finding.levels.items():
        axes.axhline(value, color="grey", linewidth=1, label=name)
    if finding.log_x:
        axes.set_xscale("symlog", linthresh=1)
    if finding.log_y:
        axes.set_yscale("log")
    axes.set(xlabel=finding.axes[0], ylabel=finding.axes[1])
    axes.margins(x=0.02)
    axes.grid(alpha=0.3)
    axes.legend()


@dataclass(frozen=True)
class Config:
    """Measure every claim. Exit status 1 where one does not hold."""

    out: str = "build/theory"
    """Directory for numbers.json and the pictures."""
    quick: bool = False
    """Half of the steps."""


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    out, failed, numbers = Path(config.out), [], {}
    out.mkdir(parents=True, exist_ok=True)
    table = Table("claim", "figure", "value")
    for name, claim in CLAIMS.items():
        finding = claim.measure(0.5 if config.quick else 1.0)
        plot(finding, claim.words).savefig(out / f"{name}.png", dpi=110)
        holds, numbers[name] = claim.holds(finding.numbers), finding.numbers
        failed += [] if holds else [name]
        for i, (figure, value) in enumerate(finding.numbers.items()):
            table.add_row(f"{claim.words}: {'holds' if holds else 'DOES NOT HOLD'}" if i == 0 else "", figure, f"{value:.4g}")
        table.add_section()
        print(f"{name}: {'holds' if holds else 'does not hold'}", flush=True)
    (out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    Console().print(table)
    if failed:
        sys.exit(f"these claims were not reproduced: {', '.join(failed)}; see {out / 'numbers.json'}")


if __name__ == "__main__":
    main()
