import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from training.bundle import SignGaussian, open_bundle, write_card
from training.config import Config
from training.data import DATASETS, Dataset
from training.diagnostics import (
    ALARMS,
    PATIENCE,
    ROWS,
    Cells,
    Diagnosis,
    Look,
    Manifold,
    hill,
    pairs_told_apart,
    signal_to_noise,
    two_nn,
)
from training.evaluation import prdc
from training.gate import QualityRefused, publish
from training.networks import FAMILIES
from training.objectives import OBJECTIVES
from training.recipes import RECIPES, latent_law
from training.registry import Registry
from training.train import TrainingStopped, adversarial_training, build

HEALTHY = {
    "divergence": 0.05, "saturation": 0.07, "accuracy": 0.7, "overfitting": 0.02, "weight": 0.5, "gradient_norm": 0.2, "pull": 0.1, "tail_index": 6.0,
    "signal_to_noise": 30.0, "mode_coverage": 1.0, "missing_modes": 0.0, "modes": 8.0, "forward_kl": 0.01, "reverse_kl": 0.01, "precision": 0.9, "real_precision": 0.95, "dimension": 2.0, "data_dimension": 2.1,
    "latent_dimension": 12.0,
}  # fmt: skip
FAILING = {
    "vanishing_gradient": {"accuracy": 1.0, "saturation": 0.99, "weight": 1e-4},
    "perfect_critic": {"accuracy": 0.999, "saturation": 0.98, "weight": 1.0},
    "mode_dropping": {"mode_coverage": 0.625},
    "missing_modes": {"missing_modes": 1.0, "mode_coverage": 0.875},
    "off_manifold": {"precision": 0.3},
    "unstable_gradient": {"tail_index": 0.9},
    "heavy_tailed_gradient": {"tail_index": 1.5},
    "critic_overfits": {"overfitting": 0.3},
    "collapse_within_modes": {"dimension": 0.4},
    "latent_too_small": {"latent_dimension": 1.0},
}


@pytest.mark.parametrize("index", [0.8, 1.5, 3.0])
def test_hill_finds_the_index_of_a_power_law(index):
    sizes = np.random.default_rng(0).pareto(index, 40_000) + 1
    assert hill(sizes) == pytest.approx(index, rel=0.1)


def test_hill_of_what_has_no_tail():
    assert hill(np.ones(100)) == math.inf
    assert hill(np.random.default_rng(0).uniform(size=2000)) > 10


def test_two_nn_counts_the_dimensions_that_data_fill():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 2000)
    circle = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    plane = rng.normal(size=(2000, 2)) @ rng.normal(size=(2, 7))
    assert two_nn(circle) == pytest.approx(1, abs=0.1)
    assert two_nn(plane) == pytest.approx(2, abs=0.2)
    assert two_nn(np.concatenate([plane, plane])) == two_nn(plane)
    assert two_nn(np.zeros((50, 2))) == 0


def test_pairs_told_apart_counts_pairs():
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 5, 30).astype(float), rng.integers(0, 4, 40).astype(float)
    by_hand = np.mean([(r > f) + (r == f) / 2 for r in real for f in fake])
    assert pairs_told_apart(real, fake) == pytest.approx(by_hand)
    assert pairs_told_apart(real + 10, fake) == 1


def test_signal_to_noise_of_a_known_step():
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=(400, 3)) + np.array([1.0, 0, 0])
    assert signal_to_noise(noisy) == pytest.approx(400 / 3, rel=0.3)


def test_precision_is_that_of_prdc_and_sees_what_modes_do_not():
    ring = DATASETS["ring"]()
    real, other = (torch.from_numpy(ring.normalised(slice(i, i + 512))) for i in (0, 512))
    wide = other + torch.randn(other.shape, generator=torch.Generator().manual_seed(0)) / 10  # still nearest to its own mode
    manifold, cells = Manifold(real), Cells(ring)
    for fake, low, high in ((other, 0.9, 1.0), (wide, 0.0, 0.2)):
        assert manifold.precision(fake) == prdc(real.numpy(), fake.numpy())["precision"]
        assert low <= manifold.precision(fake) <= high and cells.figures(fake.numpy())["mode_coverage"] == 1
    assert Manifold(real[:2]).precision(real[:1]) == 1  # two images are all the data there are


def test_cells_know_which_modes_are_there():
    ring = DATASETS["ring"]()
    cells = Cells(ring)
    x = ring.normalised()[:8000]
    kept = x[cells.tree.query(x)[1] < 6]
    figures = cells.figures(kept)
    assert figures["mode_coverage"] == 0.75
    assert figures["forward_kl"] > 1 > figures["reverse_kl"] > 0.25  # dropped modes cost KL(p, q) more
    assert figures["reverse_kl"] == pytest.approx(math.log(8 / 6), abs=0.02)
    assert (figures["missing_modes"], figures["modes"]) == (2, 8)
    assert cells.figures(x)["mode_coverage"] == 1 and cells.figures(x)["missing_modes"] == 0


@pytest.mark.parametrize(("name", "drawn", "lost", "said"), [("ring", 512, 1, 1), ("grid", 512, 4, 4), ("grid", 100, 4, 0), ("grid", 512, 0, 0)])
def test_single_lost_modes_are_said_where_so_few_samples_can_tell(name, drawn, lost, said):
    data = DATASETS[name]()
    cells, x = Cells(data), data.normalised()
    kept = x[cells.tree.query(x)[1] >= lost]
    figures = [cells.figures(kept[i * drawn : (i + 1) * drawn])["missing_modes"] for i in range(20)]
    assert figures == [said] * 20


@pytest.fixture(scope="module")
def stacked():
    return DATASETS["stacked-digits"]()


class Copies(nn.Module):
    """Real samples, the first `different` of them over and over: a generator with as many modes as these have."""

    def __init__(self, dataset, different):
        super().__init__()
        self.x, self.shown, self.at = nn.Parameter(torch.from_numpy(dataset.normalised(slice(0, different)))), 0, 0

    def forward(self, z, y=None):
        rows = (torch.arange(len(z)) + self.at) % len(self.x)
        self.at += len(z)
        return self.x[rows] + 0 * z.sum()


@pytest.mark.parametrize(("different", "low", "high"), [(1, 0.0, 0.002), (200, 0.1, 0.25), (20_000, 0.95, 1.0)])
def test_a_thousand_modes_are_not_covered_by_a_few_images(stacked, different, low, high):
    look = Look(stacked, SignGaussian(0, 3, 1.0), OBJECTIVES["relativistic"], conditional=False, packing=1, seed=0)
    figures = look(Copies(stacked, different), FAMILIES["perceptron"].critic(stacked.shape, width=8, classes=0, packing=1, fourier=0, frequency=(1.0,)))
    assert low <= figures["mode_coverage"] <= high
    assert ALARMS["mode_dropping"].fires(figures) == (different < 1000)


class Shift(nn.Module):
    """G(z) = z + delta."""

    def __init__(self, delta):
        super().__init__()
        self.delta = nn.Parameter(torch.tensor(delta))

    def forward(self, z, y=None):
        return z + self.delta


class Linear(nn.Module):
    """C(x) = -slope x + offset."""

    def __init__(self, slope, offset=0.0):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(slope)), offset

    def forward(self, x, y=None):
        return -self.slope * x[:, 0] + self.offset


@pytest.fixture(scope="module")
def line():
    return Dataset("line", np.random.default_rng(0).normal(size=(20_000, 1)).astype(np.float32), cells=4)


@pytest.mark.parametrize("name", ["non_saturating", "relativistic", "f_js"])
def test_a_look_reads_the_divergence_of_two_gaussians_from_their_optimal_critic(line, name):
    delta = 1.5  # log N(x; 0, 1) / N(x; delta, 1) = -delta x + delta^2 / 2
    grid = torch.linspace(-9, 11, 4001, dtype=torch.float64)
    p, q = (torch.exp(-((grid - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (0.0, delta))
    js = float((torch.xlogy(p, 2 * p / (p + q)) + torch.xlogy(q, 2 * q / (p + q))).sum() * 0.005 / 2)
    gap, noise = delta**2, math.sqrt(2) * delta  # T(x) - T(y) over pairs is N(delta^2, 2 delta^2)
    t = torch.linspace(gap - 9 * noise, gap + 9 * noise, 4001, dtype=torch.float64)
    pairs = torch.exp(-(((t - gap) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
    js_of_pairs = math.log(2) - float((pairs * nn.functional.softplus(-t)).sum() * (t[1] - t[0]))
    look = Look(line, SignGaussian(0, 1, 1.0), OBJECTIVES[name], conditional=False, packing=1, seed=0)
    figures = look(Shift(delta), Linear(delta, delta**2 / 2))
    expected = {"non_saturating": js, "relativistic": js_of_pairs, "f_js": 2 * js}[name]
    assert figures["divergence"] == pytest.approx(expected, abs=0.05)
    assert figures["saturation"] == pytest.approx(figures["divergence"] / OBJECTIVES[name].largest)
    assert figures["accuracy"] == pytest.approx(0.5 + 0.5 * math.erf(gap / noise / math.sqrt(2)), abs=0.03)
    assert figures["dimension"] == pytest.approx(1, abs=0.2) and figures["overfitting"] == pytest.approx(0, abs=0.06)


def test_a_look_reads_the_distance_of_shifted_laws_from_a_wasserstein_critic_of_any_slope(line):
    look = Look(line, SignGaussian(0, 1, 1.0), OBJECTIVES["wasserstein"], conditional=False, packing=1, seed=0)
    assert look(Shift(3.0), Linear(7.0))["divergence"] == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize(("law", "small"), [("signs:3", True), ("signs:11+normal:1", True), ("signs:11+normal:2", False)])
def test_signs_are_no_dimensions_of_the_latent(law, small):
    ring = DATASETS["ring"]()
    latent, *networks = build(Config(dataset="ring", latent=law), ring)
    figures = Look(ring, latent, OBJECTIVES["relativistic"], conditional=False, packing=1, seed=0)(*networks)
    assert figures["latent_dimension"] == latent.normals and ALARMS["latent_too_small"].fires(figures) == small


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ring", "grid", "grid100", "s-curve", "moons", "flower", "digits", "stacked-digits"])  # mixture1200 has 700, of which 16 are learned
def test_the_recipes_have_as_many_normals_as_their_data_have_dimensions(name):
    dataset = DATASETS[name]()
    figures = {"latent_dimension": latent_law(RECIPES[name], dataset.clusters, dataset.dim).normals, "data_dimension": two_nn(dataset.normalised()[-ROWS:])}
    assert not ALARMS["latent_too_small"].fires(figures)


class Optimal(nn.Module):
    """The optimal critic of an objective between N(0, 1) and N(delta, 1)."""

    def __init__(self, objective, delta):
        super().__init__()
        self.optimal, self.delta = objective.optimal, nn.Parameter(torch.tensor(delta))

    def forward(self, x, y=None):
        return self.optimal(-self.delta * x[:, 0] + self.delta**2 / 2)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "wasserstein"])
def test_laws_that_do_not_overlap_saturate_every_objective_and_one_law_none(line, name):
    objective = OBJECTIVES[name]
    look = Look(line, SignGaussian(0, 1, 1.0), objective, conditional=False, packing=1, seed=0)
    apart, one = look(Shift(8.0), Optimal(objective, 8.0)), look(Shift(0.0), Optimal(objective, 0.0))
    assert apart["saturation"] > 0.95 and apart["accuracy"] > 0.99 and abs(one["saturation"]) < 0.1
    assert ALARMS["perfect_critic"].fires(apart | {"gradient_share": 1.0}) and not ALARMS["perfect_critic"].fires(one)


def test_a_logit_that_no_ratio_gives_hides_no_perfect_critic():
    objective, logits = OBJECTIVES["f_pearson"], torch.full((512,), 1e6)
    logits[0] = -2.1
    assert 0.9 < objective.share(0.0, float(objective.doubt(logits, torch.full((512,), -1.9999)))) <= 1


class ByClass(nn.Module):
    """G(z, y) is the mean of class y."""

    def __init__(self, dataset):
        super().__init__()
        x = dataset.normalised()
        self.x = nn.Parameter(torch.from_numpy(np.stack([x[dataset.labels == k].mean(axis=0) for k in range(len(dataset.classes))])))

    def forward(self, z, y):
        return self.x[y] + 0 * z.sum()


def test_classes_of_a_conditional_generator_are_all_asked_for(stacked):
    look = Look(stacked, SignGaussian(0, 3, 1.0), OBJECTIVES["relativistic"], conditional=True, packing=1, seed=0)
    critic = FAMILIES["perceptron"].critic(stacked.shape, width=8, classes=1000, packing=1, fourier=0, frequency=(1.0,))
    assert look(ByClass(stacked), critic)["mode_coverage"] > 0.8  # some means lie nearer to another of those that cells are made of


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].ratio])
def test_a_ratio_is_read_back_from_the_optimal_logit(name):
    t = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(OBJECTIVES[name].ratio(OBJECTIVES[name].optimal(t)), t)


def test_a_look_sees_the_gradient_of_gan0_vanish_and_not_of_gan1(line):
    weights = {}
    for name in ("minimax", "non_saturating"):
        look = Look(line, SignGaussian(0, 1, 1.0), OBJECTIVES[name], conditional=False, packing=1, seed=0)
        weights[name] = look(Shift(9.0), Linear(9.0, 40.5))["weight"]
    assert weights["minimax"] < 1e-6 and weights["non_saturating"] > 0.99


@pytest.mark.parametrize("delta", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", ["minimax", "non_saturating"])
def test_the_gradient_of_a_shift_is_the_slope_times_the_mean_weight(line, name, delta):
    # With the optimal critic T = -delta x + delta^2 / 2 and G(z) = z + theta, d loss / d theta = delta E_q of sigma(T), or of sigma(-T).
    x = torch.linspace(delta - 9, delta + 9, 4001, dtype=torch.float64)
    q, t = torch.exp(-((x - delta) ** 2) / 2) / math.sqrt(2 * math.pi), -delta * x + delta**2 / 2
    weight = float((q * torch.sigmoid(t if name == "minimax" else -t)).sum() * (x[1] - x[0]))
    figures = Look(line, SignGaussian(0, 1, 1.0), OBJECTIVES[name], conditional=False, packing=1, seed=0)(Shift(delta), Linear(delta, delta**2 / 2))
    assert figures["weight"] == pytest.approx(weight, rel=0.15)
    assert figures["gradient_norm"] == pytest.approx(delta * figures["weight"], rel=1e-5)


def test_a_gradient_that_dies_while_logits_weigh_what_they_did_is_seen():
    sure = {"accuracy": 1.0, "saturation": 0.99, "weight": 1.0}
    for norm, dies in ((0.19, False), (1e-3, True)):
        diagnosis = Diagnosis()
        for _ in range(10):
            diagnosis.update(HEALTHY, progress=0.5)
        for _ in range(PATIENCE):
            diagnosis.update(HEALTHY | sure | {"gradient_norm": norm}, progress=0.6)
        assert ("vanishing_gradient" in diagnosis.words) == dies
    assert "by its weights 1.0e-03, 0.5% of what is usual in this run" in diagnosis.words["vanishing_gradient"]


@pytest.mark.parametrize("network", [None, "tests.training.normed:FAMILY"])
def test_looking_changes_nothing(monkeypatch, network):
    config = Config(dataset="ring", steps=100, width=16, noise=0.1, spectral_norm=True, network=network)
    dataset = DATASETS["ring"]()
    heard = []
    seen, _ = adversarial_training(config, dataset, say=lambda **figures: heard.append(figures))
    assert [h["step"] for h in heard] == [50, 100]
    assert heard[-1].keys() >= {*HEALTHY, "alarms", "critic_loss"}
    assert json.dumps([h["alarms"] for h in heard])
    monkeypatch.setattr(Look, "__call__", lambda *_: HEALTHY)
    blind, _ = adversarial_training(config, dataset)
    assert all(torch.equal(a, b) for a, b in zip(seen.state_dict().values(), blind.state_dict().values(), strict=True))


def test_every_alarm_has_a_failing_example():
    assert FAILING.keys() == ALARMS.keys()


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_needs_patience_speaks_in_words_and_falls(name):
    diagnosis = Diagnosis()
    for look in range(PATIENCE):
        assert diagnosis.words == {}
        diagnosis.update(HEALTHY | FAILING[name], progress=0.7)
    assert name in diagnosis.words and diagnosis.words.keys() <= {name, "perfect_critic"}
    assert "{" not in diagnosis.words[name] and ALARMS[name].advice in diagnosis.words[name]
    assert bool(diagnosis.failing) == ALARMS[name].fatal
    diagnosis.update(HEALTHY, progress=0.8)
    assert diagnosis.words == {} and diagnosis.failing == []


def test_the_start_of_a_run_is_allowed_to_be_bad():
    diagnosis = Diagnosis()
    for _ in range(2 * PATIENCE):
        diagnosis.update(HEALTHY | FAILING["mode_dropping"] | FAILING["perfect_critic"], progress=0.04)
    assert diagnosis.words == {}


class Enough(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "how", "reason"),
    [
        ("ring", {"penalty": "none"}, "perfect_critic"),
        ("grid", {"penalty": "none"}, "perfect_critic"),
        ("ring", {"penalty": "none", "objective": "minimax"}, "vanishing_gradient"),
        ("ring", {}, None),
        ("grid", {}, None),
    ],
    ids=lambda v: " ".join(f"{a}={b}" for a, b in v.items()) or "default" if isinstance(v, dict) else str(v),
)
def test_a_collapse_is_foreseen_in_the_first_fifth_of_a_run_and_a_healthy_run_is_left_alone(dataset, how, reason):
    first = {}

    def say(step, steps, alarms, **figures):
        for name in alarms:
            first.setdefault(name, step / steps)
        if step >= 0.2 * steps:
            raise Enough

    torch.set_num_threads(1)
    with pytest.raises(Enough):
        adversarial_training(Config(dataset=dataset, **how), DATASETS[dataset](), say=say)
    if reason:
        assert first[reason] < 0.2
    else:
        assert not [name for name in first if ALARMS[name].fatal]


def test_a_run_that_fails_is_stopped_on_request_with_the_reason():
    config = Config(dataset="ring", steps=1000, penalty="none", stop_on_alarm=True)
    with pytest.raises(TrainingStopped, match=r"stopped at step \d+ of 1000: perfect_critic: the critic tells .*--penalty r1r2"):
        adversarial_training(config, DATASETS["ring"]())


@pytest.mark.slow
def test_a_run_that_ended_in_an_alarm_is_never_published_as_good(ring, tmp_path):
    bundle = open_bundle(ring)
    marked = tmp_path / "marked"
    marked.mkdir()
    for name in bundle.card.files:
        (marked / name).write_bytes((ring / name).read_bytes())
    write_card(marked, replace(bundle.card, training={"failing": ["mode_dropping: the generator covers 50% of the data's modes"]}))
    registry = Registry(str(tmp_path / "registry"))
    with pytest.raises(QualityRefused, match="training ended with an alarm: mode_dropping: the generator covers 50%"):
        publish(marked, registry)
    assert "alarm" in publish(marked, registry, force=True).card.forced
