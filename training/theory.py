"""The theory behind the recipes, reproduced: each claim is one function that measures it, with a picture.

    python -m training.theory [--out build/theory] [--quick]        # minutes on a CPU: numbers.json, one PNG a claim, a table

Every function takes `scale`, 1 for the full measurement, less for a quick one, and returns its numbers and its curves. What
they must come out as is said in CLAIMS, which the program checks and the tests check at small scale.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
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


@dataclass(frozen=True)
class Finding:
    """Numbers of one claim, and curves to draw: name -> (x, y), y on a logarithmic axis where `log`, x where `log_x`."""

    numbers: dict[str, float]
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")
    log: bool = False
    log_x: bool = False


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
    curves = {"no noise": (clean["step"], clean["gradient"]), "noise 0.5": (noisy["step"], noisy["gradient"])}
    return Finding(numbers, curves, ("critic steps", "size of GAN0's gradient"), log=True, log_x=True)


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
    curves = {"no noise": (clean["step"], clean["variance"]), "noise 0.5": (noisy["step"], noisy["variance"])}
    return Finding(numbers, curves, ("critic steps", "variance of -log D's gradient"), log=True, log_x=True)


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
    return Finding(numbers, {"critic": looks, "JS": ([0.0, looks[0][-1]], [js, js])}, ("critic steps", "log 2 - loss / 2"))


def two_ways_to_be_wrong(scale: float) -> Finding:
    """KL(p, q) punishes dropped modes, KL(q, p) punishes fakes; JS takes both mildly.

    Ten modes and a cell for fakes: p has the modes (and a trace of fakes), q loses or invents the same mass.
    """
    rare = 1e-6
    lost = np.linspace(0, 0.9, max(5, int(40 * scale)))
    real = np.append(np.full(10, (1 - rare) / 10), rare)
    dropping, faking = [], []
    for mass in lost:
        weights = np.append(np.full(10, 1.0), rare * 10)
        weights[: round(10 * mass)] *= 1e-6
        dropping.append(divergences(real, weights / weights.sum()))
        faking.append(divergences(real, np.append(real[:10] * (1 - mass), mass + rare * (1 - mass))))
    half = int(np.argmin(np.abs(lost - 0.5)))
    numbers = {
        "drop_forward": dropping[half]["forward_kl"], "drop_reverse": dropping[half]["reverse_kl"],
        "fake_forward": faking[half]["forward_kl"], "fake_reverse": faking[half]["reverse_kl"],
        "largest_js": max(each["js"] for each in dropping + faking),
    }  # fmt: skip
    named = {"drop": dropping, "fake": faking}
    curves = {f"{how} {kl}": (lost.tolist(), [d[kl] for d in named[how]]) for how in named for kl in ("forward_kl", "reverse_kl")}
    return Finding(numbers, curves, ("mass dropped or faked", "nats"))


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
    curves = {name: (list(shifts), values) for name, values in found.items()}
    return Finding(numbers, curves, ("distance of the lines", "estimate"))


# 4. On the ring ---------------------------------------------------------------------------------------------------------------


def games_on_the_ring(scale: float) -> Finding:
    """GAN1, least squares and unrolled GAN1 in the nets and at the rates of the ring's recipe; and GAN1 with R1 + R2.

    A mode counts as covered when it has a quarter of its share of the samples near any mode (within 20 sigma). The number of
    modes is the mean over the second half of the run. Which game without a penalty loses modes is a matter of the seed, so
    no claim compares their numbers.
    """
    ring, recipe, steps = DATASETS["ring"](), RECIPES["ring"], int(2000 * scale)
    data, latent = torch.from_numpy(ring.normalised()[:20_000]), SignGaussian(10, 2, 1.0)
    rows = {
        "GAN1": ("non_saturating", "none", 0), "least squares": ("least_squares", "none", 0),
        "GAN1 unrolled 5": ("non_saturating", "none", 5), "GAN1 + R1 + R2": ("non_saturating", "r1r2", 0),
    }  # fmt: skip
    numbers, curves = {}, {}
    for name, (game, penalty, unroll) in rows.items():
        torch.manual_seed(0)
        objective, looks = OBJECTIVES[game], ([], [])
        generator = Generator(latent.dim, 2, width=128, classes=0, bounded=False)
        critic = Critic(2, width=128, classes=0, fourier=32)
        optimisers = [torch.optim.Adam(n.parameters(), betas=(0.0, 0.9), fused=True) for n in (generator, critic)]
        for step in range(steps):
            rate, gamma = (decayed(ends, step / steps) for ends in (recipe.learning_rate, recipe.gamma))
            real = data[torch.randint(len(data), (128,))]
            fake = generator(torch.from_numpy(latent.sample(seed=1, offset=128 * step, count=128)))
            seen = closed_form(critic, objective, PENALTIES[penalty], real, fake.detach(), real[:0], None, gamma)
            pull = unrolled_pull(critic, objective, real, fake, None, steps=unroll) if unroll else seen.by_fake
            generator.zero_grad()
            fake.backward(pull)
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = rate
                optimiser.step()
            if step % max(1, steps // 40) == 0 or step + 1 == steps:
                with torch.no_grad():
                    x = generator(torch.from_numpy(latent.sample(seed=2, count=2000))).numpy() * ring.scale + ring.shift
                near = np.linalg.norm(x[:, None] - ring.mixture.centres, axis=2)
                near = np.bincount(near.argmin(axis=1)[near.min(axis=1) < 0.2], minlength=8)
                looks[0].append(float(step))
                looks[1].append(float((near >= 0.25 / 8 * len(x) * (near.sum() / len(x))).sum() if near.sum() else 0))
        numbers[f"modes, {name}"] = float(np.mean(looks[1][20:]))
        numbers[f"high quality, {name}"] = mixture_fit(ring.mixture, x)["high_quality"]
        curves[name] = looks
    return Finding(numbers, curves, ("steps", "modes covered"))


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
    return Finding(numbers, {"squared error": looks}, ("steps", "squared error"), log=True)


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
        lambda n: n["modes, GAN1 + R1 + R2"] > 6
        and all(
            n["high quality, GAN1 + R1 + R2"] > 5 * n[f"high quality, {other}"]
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
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5a9e")


def plot(finding: Finding, title: str) -> Image.Image:
    """The curves with both axes' ends written out."""
    width, height, left, top = 720, 420, 70, 40
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    points = {
        name: (np.log10(1 + np.array(x)) if finding.log_x else np.array(x, float), np.log10(np.maximum(y, 1e-30)) if finding.log else np.array(y, float))
        for name, (x, y) in finding.curves.items()
    }
    xs, ys = (np.concatenate([pair[i] for pair in points.values()]) for i in (0, 1))
    (x0, x1), (y0, y1) = (xs.min(), xs.max()), (ys.min(), max(ys.max(), ys.min() + 1e-9))
    box = (left, top, width - 20, height - 50)
    draw.rectangle(box, outline="#999999")
    for at, value in ((box[3] - 10, y0), (box[1], y1)):
        draw.text((6, at), f"{10**value:.1e}" if finding.log else f"{value:.3g}", fill="black")
    ends = (10**x0 - 1, 10**x1 - 1) if finding.log_x else (x0, x1)
    draw.text((left, height - 45), f"{ends[0]:.3g}", fill="black")
    draw.text((width - 60, height - 45), f"{ends[1]:.4g}", fill="black")
    draw.text((width // 2 - 60, height - 45), finding.axes[0], fill="black")
    draw.text((left, 6), title, fill="black")
    draw.text((left, 22), finding.axes[1], fill="#555555")
    for i, (name, (x, y)) in enumerate(points.items()):
        px = box[0] + (x - x0) / (x1 - x0) * (box[2] - box[0])
        py = box[3] - (y - y0) / (y1 - y0) * (box[3] - box[1])
        draw.line(list(zip(px.tolist(), py.tolist(), strict=True)), fill=COLOURS[i], width=2)
        draw.text((left + i * 160, height - 22), f"- {name}", fill=COLOURS[i])
    return image


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
        plot(finding, claim.words).save(out / f"{name}.png")
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
