"""Bets on the law of latents in use: what each pays, that it is fair, and how soon it tells."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray
from scipy.integrate import quad
from scipy.stats import norm

from monitoring.edetectors import KINDS
from monitoring.latents import COINS, GROUPS, HELD, IMPOSSIBLE, MARGIN, PAIRS, PAST, RATES, REPEATS, SHIFTS, SPREADS, LatentDetector, pay
from training.bundle import SignGaussian

LAW = SignGaussian(signs=3, normals=2, scale=1.5)
DIGITS = SignGaussian(signs=48, normals=16)
LAWS = (LAW, DIGITS, SignGaussian(signs=0, normals=4), SignGaussian(signs=20, normals=0))


def feed(law: SignGaussian, z: ndarray, threshold: float = 1e6) -> LatentDetector:
    detector = LatentDetector(law, threshold=threshold)
    detector.update(z.astype(np.float32), np.arange(len(z)))
    return detector


def named(detector: LatentDetector) -> list[str]:
    return [group.removeprefix("latents:") for group, is_named in zip(detector.groups, detector.named, strict=True) if is_named]


class Oracle:
    """The same payoffs as ratios of densities, from scipy, one row at a time."""

    def __init__(self, law: SignGaussian) -> None:
        self.law, self.means, self.odds, self.past = law, np.zeros((len(RATES), law.normals)), np.zeros((len(RATES), law.signs)), []

    def payoffs(self, z: ndarray) -> ndarray:
        law, found = self.law, []
        e, y = z[: law.signs].astype(np.float64), z[law.signs :].astype(np.float64) / law.scale

        def ratio(mean: ndarray | float, sd: float, of: ndarray) -> float:
            return float(np.exp((norm.logpdf(of, mean, sd) - norm.logpdf(of)).sum()))

        if law.normals:
            for t in (*SPREADS[0], *SPREADS[1]):
                found += [ratio(0.0, t, y), *(ratio(0.0, t, y[j : j + 1]) for j in range(len(y)))]
            for k in SHIFTS:
                found += [ratio(k / np.sqrt(len(y)), 1.0, y), *(ratio(k, 1.0, y[j : j + 1]) for j in range(len(y)))]
            for rate, mean in zip(RATES, self.means, strict=True):
                found.append(ratio(mean, np.sqrt(1 + rate / (2 - rate)), y))
                mean += rate * (y - mean)
        if law.signs:
            found += [float(np.prod(1 + np.tanh(k / np.sqrt(law.signs)) * e)) for k in SHIFTS]  # coins of that mean
            found += [1 + b * e[j] for b in COINS for j in range(law.signs)]
            for rate, odds in zip(RATES, self.odds, strict=True):
                found.append(float(np.prod(1 + np.clip(odds, -HELD, HELD) * e)))
                odds += rate * (e - odds)
        s = np.sign(z[:32]).astype(np.float64)
        found += [1 + b * s[i] * s[j] for b in PAIRS for i in range(len(s)) for j in range(i)]
        chance = max(1e-12, PAST * 0.5**law.signs * 0.5 ** (24 * law.normals))
        hit = z.tobytes() in self.past
        self.past = [*self.past[-PAST + 1 :], z.tobytes()]
        found += [theta / chance if hit else (1 - theta) / (1 - chance) for theta in REPEATS if theta > chance]
        return np.array([*found, 1 - IMPOSSIBLE]) * (1 - MARGIN)


@pytest.mark.parametrize("law", LAWS)
def test_the_compiled_bets_pay_what_the_densities_say(law: SignGaussian) -> None:
    detector, oracle = LatentDetector(law, threshold=1e300), Oracle(law)
    z = law.sample(seed=3, count=300)
    z[250:] = z[np.random.default_rng(0).integers(200, size=50)]  # some come again
    log_r = np.full(len(detector._state["r"]), -np.inf)
    for index, row in enumerate(z):
        log_r = np.logaddexp(0, log_r) + np.log(oracle.payoffs(row))
        detector.update(row[None], np.array([index]))
    below = log_r < np.log(1e150)
    np.testing.assert_allclose(np.log(detector._state["r"][below]), log_r[below], atol=1e-9)
    assert (detector._state["r"][~below] == 1e150).all()


def paid(law: SignGaussian, z: ndarray, means: ndarray, odds: ndarray) -> ndarray:
    """What every bet but those on repeats pays for one row, after a past of which these are the means."""
    detector = LatentDetector(law, threshold=1.0)
    payoffs, state = detector._payoffs, detector._state
    assert pay(payoffs, z.astype(np.float64), *detector._law, means.copy(), odds.copy(), detector._repeats, state["past"], 0)
    return np.delete(payoffs, np.s_[len(payoffs) - 1 - len(detector._repeats) :])


def test_every_bet_on_signs_is_fair_over_all_rows_there_are() -> None:
    law, odds = SignGaussian(signs=4, normals=0), np.array([[0.3, -0.9, 0.97, 0.0], [0.1, 0.2, -0.3, 0.4]])
    rows = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
    mean = np.mean([paid(law, row, np.zeros((2, 0)), odds) for row in rows], axis=0)
    np.testing.assert_allclose(mean, 1 - MARGIN, rtol=1e-12)


def test_every_bet_on_normals_is_fair() -> None:
    law, means = SignGaussian(signs=0, normals=1, scale=0.7), np.array([[0.4], [-1.3]])
    bets = len(paid(law, np.zeros(1), means, np.zeros((2, 0))))
    for b in range(bets):
        mean, _ = quad(lambda y, b=b: norm.pdf(y) * paid(law, np.array([0.7 * y]), means, np.zeros((2, 0)))[b], -40, 40, points=(-3, 0, 3), limit=200)
        assert mean == pytest.approx(1 - MARGIN, abs=1e-8)


def test_the_chance_of_a_repeat_is_bounded_by_the_heaviest_float() -> None:
    """No float32 has more than 2^-24 of a normal law: the largest is where |y| density / relative spacing is, at |y| = 1."""
    x = np.exp(np.linspace(-20, 3, 4000)).astype(np.float32)
    low, high = (x.astype(np.float64) + np.nextafter(x, np.float32(side)).astype(np.float64) for side in (-np.inf, np.inf))
    assert ((high - low) / 2 * norm.pdf(x.astype(np.float64))).max() < 2.0**-24


@pytest.mark.parametrize("law", [LAW, DIGITS])
def test_the_run_length_of_healthy_latents_is_no_shorter_than_promised(law: SignGaussian) -> None:
    """The family's own evidence, its weight taken out, reaches A after A rows of the law or more, on average."""
    a, runs, lengths = 200.0, 60, []
    for seed in range(runs):
        detector = LatentDetector(law, threshold=a * KINDS["latents"][1])
        for start in range(0, 20_000, 1000):
            detector.update(law.sample(seed=seed, offset=start, count=1000), np.arange(start, start + 1000))
            if detector.crossed is not None:
                break
        lengths.append(20_000 if detector.crossed is None else detector.crossed + 1)
    assert np.mean(lengths) - 2.6 * np.std(lengths) / np.sqrt(runs) >= a


def truncated(law: SignGaussian, z: ndarray) -> ndarray:
    z[:, law.signs :] = law.sample(seed=9, count=len(z), truncation=0.5)[:, law.signs :]
    return z


def biased(law: SignGaussian, z: ndarray) -> ndarray:
    z[np.random.default_rng(0).random(len(z)) < 0.8, 0] = 1.0
    return z


def tied(law: SignGaussian, z: ndarray) -> ndarray:
    z[:, 1] = np.copysign(z[:, 1], z[:, 0])
    return z


def one_moved(law: SignGaussian, z: ndarray) -> ndarray:
    z[:, -1] += 0.8
    return z


def all_wider(law: SignGaussian, z: ndarray) -> ndarray:
    z[:, law.signs :] *= 1.3
    return z


def again(law: SignGaussian, z: ndarray) -> ndarray:
    return z[np.random.default_rng(0).integers(500, size=len(z))]


FAULTS = [
    (truncated, "narrower", 2), (biased, "signs", 75), (tied, "dependent", 47), (one_moved, "shifted", 105),
    (all_wider, "wider", 26), (again, "repeats", 29),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "name", "rows"), FAULTS)
def test_each_fault_of_the_law_is_named(fault: Callable[[SignGaussian, ndarray], ndarray], name: str, rows: int) -> None:
    detector = feed(DIGITS, fault(DIGITS, DIGITS.sample(seed=1, count=2000)))
    assert name in named(detector) and detector.crossed == rows


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 0.5])
def test_what_the_law_cannot_give_is_said_at_once(value: float) -> None:
    z = DIGITS.sample(seed=1, count=10)
    z[7, 0] = value
    detector = feed(DIGITS, z, threshold=2.6e9)
    assert (detector.crossed, named(detector)) == (7, ["impossible"])


@given(st.lists(st.integers(0, 40), max_size=8))
def test_any_split_comes_to_the_same(cuts: list[int]) -> None:
    z = truncated(LAW, LAW.sample(seed=4, count=40))
    whole, split = feed(LAW, z, threshold=1e4), LatentDetector(LAW, threshold=1e4)
    for start, end in itertools.pairwise([0, *sorted(cuts), 40]):
        split.update(z[start:end], np.arange(start, end))
    assert split.crossed == whole.crossed and split.named.tolist() == whole.named.tolist()
    np.testing.assert_array_equal(split._state["r"], whole._state["r"])


def test_state_goes_on_where_it_stood_and_shards_add_up() -> None:
    z = LAW.sample(seed=4, count=400)
    whole, first = feed(LAW, z, threshold=1e12), feed(LAW, z[:300], threshold=1e12)
    resumed = LatentDetector(LAW, threshold=1e12)
    resumed.restore(first.state())
    resumed.update(z[300:], np.arange(300, 400))
    np.testing.assert_array_equal(resumed._state["r"], whole._state["r"])
    one, other = (feed(LAW, truncated(LAW, LAW.sample(seed=s, count=8)), threshold=1e12) for s in (1, 2))
    summed = one.evidence + other.evidence
    one.threshold = summed.sum()
    one.merge(other, index=15)
    np.testing.assert_allclose(one.evidence, summed)
    assert one.crossed == 15
    one.restart()
    assert one.crossed is None and not one.evidence.any() and not one.named.any()


@pytest.mark.parametrize("law", LAWS)
def test_the_family_spends_its_weight_and_no_more(law: SignGaussian) -> None:
    detector = LatentDetector(law, threshold=1e6)
    detector._state["r"][:] = 1.0
    spent = dict(zip(GROUPS, detector.evidence / KINDS["latents"][1], strict=True))
    absent = {"signs"} if not law.signs else {"narrower", "wider", "shifted"} if not law.normals else set()
    assert spent == pytest.approx({group: 0.0 if group in absent else weight for group, weight in GROUPS.items()})
    assert sum(GROUPS.values()) == pytest.approx(1)
