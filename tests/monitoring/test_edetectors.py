"""The promise of the alarm: every bet is fair under all that its bound allows, and false alarms are as rare as asked."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import ndtri

from monitoring.edetectors import CHUNK, FAMILIES, KINDS, TILTS, Cells, Duplicates, EDetector, Modes, Scores, Shares, mode_bounds, tail_levels, tilted
from monitoring.features import Eye, Seen
from training.bundle import DUPLICATE_BLOCK, NEAREST_TRAIN, Certificate


@pytest.fixture
def healthy(make_bundle):
    return make_bundle()


def detector(bundle, threshold=2.6e9) -> EDetector:
    return EDetector(bundle.certificate, bundle.reference, bundle.card.modes, threshold=threshold)


def feed(found: EDetector, seen: Seen, start=0, stop=None) -> None:
    part = slice(start, stop)
    found.update(seen.scores[part], seen.features[part], seen.cells[part], seen.samples[part], index=start)


@given(st.floats(1e-6, 0.999), st.floats(0, 0.999), st.floats(0, 1))
def test_a_bet_on_a_cell_is_fair_at_its_bound_and_unfair_beyond(bound, theta, q):
    bet = Cells(np.array([[bound]]), np.array([[theta]]))
    hit, miss = bet.hit.item(), bet.miss.item()
    assert bound * hit + (1 - bound) * miss == pytest.approx(1)
    if (q - bound) * (theta - bound) <= 0:  # the law lies on the side that the bound allows
        assert q * hit + (1 - q) * miss <= 1 + 1e-9


@given(arrays(float, 6, elements=st.floats(0, 100)), arrays(float, (3, 5), elements=st.floats(0, 1)))
def test_any_payoff_over_the_bins_of_a_score_is_fair_for_every_law_between_the_bounds(payoff, chances):
    low, beyond, high = np.sort(-np.sort(-chances, axis=1), axis=0)  # falling along the edges, and low <= beyond <= high
    payoff = payoff + 0.01
    fair = tilted(payoff, low, high)
    law = -np.diff(beyond, prepend=1.0, append=0.0)
    assert (law >= 0).all() and law @ fair <= 1 + 1e-9
    assert law @ tilted(payoff, beyond, beyond) == pytest.approx(1)


def test_bets_on_scores_are_fair_under_the_certificate_and_hardly_less(healthy):
    certificate = healthy.certificate
    bets = Scores(certificate)
    usable, n = tail_levels(certificate), certificate.count
    assert usable.sum() == 14  # 2^-14 * 2^18 = 16 hits, 2^-15 would be 8
    middles = np.sort(np.concatenate([certificate.lower_threshold[:, usable], certificate.upper_threshold[:, usable]], axis=1))
    scores = np.concatenate([middles[:, :1] - 1, (middles[:, 1:] + middles[:, :-1]) / 2, middles[:, -1:] + 1], axis=1)
    beyond = np.concatenate([n - certificate.lower_hits[:, usable][:, ::-1], certificate.upper_hits[:, usable]], axis=1) / n
    payoffs = bets.payoffs(scores.T).reshape(len(scores.T), len(scores), -1)
    means = [-np.diff(row, prepend=1.0, append=0.0) @ payoffs[:, s] for s, row in enumerate(beyond)]
    allowed = bets.allowed.reshape(len(means), -1)
    for mean, real in zip(means, allowed, strict=True):
        assert (mean[real] < 1).all() and (mean[-2 * len(TILTS) :] > 0.9).all()
    wider, narrower = np.split(payoffs[[0, -1], 0, -2 * len(TILTS) :], 2, axis=1)  # by the smallest and the largest score
    assert (wider[0] < 1).all() and (wider[1] > 1).all() and (narrower[0] > 1).all() and (narrower[1] < 1).all()


def test_a_tilt_is_the_likelihood_ratio_of_a_shift():
    """With fine bins and exact bounds, exp(lambda h) over its mean is exp(lambda h - lambda^2 / 2)."""
    beyond = np.linspace(1, 0, 2001)
    h = ndtri(1 - (beyond[1:] + beyond[:-1]) / 2)
    fair = tilted(np.exp(0.5 * h), beyond[1:-1], beyond[1:-1])
    np.testing.assert_allclose(fair, np.exp(0.5 * h - 0.125), rtol=2e-3)


@pytest.fixture(scope="module")
def small() -> Certificate:
    count, levels, tails = np.array([5, 10, 15, 2, 8, 20, 12, 18, 6, 4, 1]) * 400, 2.0 ** -np.arange(1, 4), np.ones((1, 3))
    hits, blank = np.rint(tails * levels * count.sum()).astype(np.int64), np.zeros(1, np.int64)
    return Certificate(
        int(count.sum()), 0.01, count, levels, tails, hits, tails, hits, 31, 0, np.zeros(2), np.eye(2), blank, blank, np.zeros((1, 2))
    )  # fmt: skip


@given(st.lists(st.integers(0, 10), min_size=1, max_size=CHUNK))
@settings(max_examples=50, deadline=None)
def test_bets_on_shares_are_fair_whatever_the_past(small, past):
    bets = Shares(small)
    bets.payoffs(np.array(past))
    state = copy.deepcopy(bets.state())
    payoffs = np.empty((11, 2))
    for cell in range(11):
        bets.restore(state)
        payoffs[cell] = bets.payoffs(np.array([cell]))
    assert (small.upper(small.cell_count, small.count) @ payoffs).tolist() == pytest.approx([1, 1])  # so E[L] <= 1 for all q below
    assert (small.cell_count / small.count @ payoffs > 0.9).all()


def test_the_budget_is_spent_once(healthy):
    found = detector(healthy)
    spent = dict(zip(found.groups, found._weights.sum(axis=0), strict=False))
    modes = found._modes._weights
    spent |= {"drop": modes[0][:, :2].sum(), "inflate": modes[0][:, 2:].sum(), "quality": modes[1].sum()}
    spent["duplicates"] = Duplicates(healthy.certificate)._weights.sum()
    assert spent == pytest.approx({kind: weight for kind, (_, weight) in KINDS.items() if kind != "copies"})  # has no score here
    assert FAMILIES == pytest.approx({f: sum(w for family, w in KINDS.values() if family == f) for f in FAMILIES})
    assert sum(FAMILIES.values()) == pytest.approx(1)


def test_bets_on_modes_are_on_the_right_side_of_their_bounds(healthy):
    certificate = healthy.certificate
    on_manifold = certificate.cell_count[:-1] / certificate.cell_count[:-1].sum()
    low, high = mode_bounds(certificate)
    assert (low < on_manifold).all() and (on_manifold < high).all()
    bets = Modes(certificate, healthy.reference, healthy.card.modes)
    assert (bets._shares.hit < 1).sum(axis=1).tolist() == [2] * 10  # drop; the others are inflate
    assert (bets._quality.hit[:-1] < 1).all() and (bets._quality.hit[-1] > 1).all()


def test_a_mode_that_the_certificate_never_saw_has_no_drop_bet(make_bundle):
    bundle = make_bundle(lost=(3, 8), honest=True)
    found = detector(bundle)
    seen = np.zeros(500, np.int64)
    path = found.trace(np.zeros((500, 2)), np.zeros((500, 2)), seen, np.arange(500))
    watched = {g for g, e in zip(found.groups, path[-1], strict=True) if g.startswith("drop") and e > 0}
    assert watched == {f"drop:{k}" for k in range(10) if k not in (3, 8)}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=CHUNK), st.integers(1, 4))
def test_a_chunk_of_cells_comes_to_what_its_samples_come_to(cells, start):
    bound = np.repeat(np.array([[0.1], [0.3], [0.01], [0.2], [0.05]]), 2, axis=1)
    chunk, single, followed = (Cells(bound, bound * [0.35, 2.0]) for _ in range(3))
    for bets in (chunk, single, followed):
        bets.step(np.full(start, 2))
    path = [single.r]
    for cell in cells:
        single.step(np.array([cell]))
        path.append(single.r)
    most = chunk.step(np.array(cells))
    np.testing.assert_allclose(followed.path(np.array(cells)), path[1:], rtol=1e-12)
    np.testing.assert_allclose([chunk.r, followed.r], [single.r] * 2, rtol=1e-12)
    np.testing.assert_allclose(most, np.max(path if len(cells) > 1 else path[1:], axis=0), rtol=1e-12)


def test_agrees_with_an_oracle_in_logarithms(healthy, make_bundle, draw):
    for samples in (draw(healthy, 700), draw(make_bundle(lost=(0,)), 700)):
        seen = Eye(healthy).look(samples)
        found, oracle = detector(healthy), detector(healthy)
        feed(found, seen)
        modes, logs = found._modes, {}
        with np.errstate(divide="ignore"):
            log_r = np.full(len(found._r), -np.inf)
            log_modes = [np.full(part.r.shape, -np.inf) for part in (modes._shares, modes._quality)]
            for i in range(len(samples)):
                one = slice(i, i + 1)
                parts = oracle._scores.payoffs(seen.scores[one]), oracle._moments.payoffs(seen.features[one]), oracle._shares.payoffs(seen.cells[one])
                log_r = np.logaddexp(0, log_r) + np.log(np.concatenate(parts, axis=1)[0])
                cell = seen.cells[i]
                for j, part in enumerate((modes._shares, modes._quality)):
                    if j == 0 and cell == 10:
                        continue  # off the manifold, which is no business of these
                    log_l = np.log(part.miss)
                    if cell < len(part.r):
                        log_l[cell] = np.log(part.hit[cell])
                    log_modes[j] = np.logaddexp(0, log_modes[j]) + log_l
            for g, weights in zip(found.groups, found._weights.T, strict=False):
                logs[g] = np.logaddexp.reduce(np.log(weights) + log_r)
            weighted = [np.log(w) + r for w, r in zip(modes._weights, log_modes, strict=True)]
            logs |= {f"drop:{k}": np.logaddexp.reduce(weighted[0][k, :2]) for k in range(10)}
            logs |= {"inflate": np.logaddexp.reduce(weighted[0][:, 2:], axis=None), "quality": np.logaddexp.reduce(weighted[1], axis=None)}
        assert set(found.groups) - set(logs) == {"duplicates"}
        evidence = dict(zip(found.groups, found.evidence, strict=True))
        np.testing.assert_allclose([np.log(evidence[g]) for g in logs], list(logs.values()), rtol=1e-9)


def test_any_split_of_a_stream_comes_to_the_same(healthy, make_bundle, draw):
    seen = Eye(healthy).look(np.concatenate([draw(healthy, 500), draw(make_bundle(lost=(4,), grain=0.5), 1500)]))
    whole = detector(healthy, 1e4)
    feed(whole, seen)
    assert whole.crossed is not None and whole.named.sum() > 1

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(1, 700), max_size=8))
    def any_split(sizes):
        parts, done = detector(healthy, 1e4), 0
        for size in (*sizes, len(seen.cells)):
            feed(parts, seen, done, done + size)
            done = min(done + size, len(seen.cells))
        assert parts.crossed == whole.crossed and np.array_equal(parts.named, whole.named)
        np.testing.assert_allclose(parts.evidence, whole.evidence, rtol=1e-9)

    any_split()


def run_length(found: EDetector, seen: Seen) -> tuple[float, int]:
    """Samples per alarm, restarting after each, and the number of alarms."""
    step, alarms, start, position = int(found.threshold), 0, 0, 0
    while position < len(seen.cells):
        feed(found, seen, position, position + step)
        position += step
        if found.crossed is not None:
            alarms, start = alarms + 1, found.crossed + 1
            position = start
            found.restart()
    return start / alarms, alarms


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "samples"), [(20.0, 12_000), (200.0, 60_000)])
def test_healthy_run_lengths_are_at_least_what_was_asked(healthy, draw, threshold, samples):
    length, alarms = run_length(detector(healthy, threshold), Eye(healthy).look(draw(healthy, samples, seed=17)))
    assert alarms > 100
    assert length >= threshold * (1 + 3 / np.sqrt(alarms))  # with three standard errors to spare


@pytest.mark.slow
def test_run_lengths_hold_for_the_worst_law_that_the_bounds_allow(healthy):
    """Scores exactly as large as the certificate's bounds allow, so that bets on upper tails and on larger scores are martingales."""
    certificate = healthy.certificate
    above, below = certificate.upper(certificate.upper_hits, certificate.count), certificate.lower(certificate.lower_hits, certificate.count)
    worst = replace(certificate, upper_threshold=1 - above, lower_threshold=below)
    rng, n = np.random.default_rng(2), 20_000
    seen = Seen(
        samples=np.arange(n),
        features=np.zeros((n, 2), np.float32),
        scores=np.repeat(rng.random((n, 1), np.float32), 2, axis=1),
        cells=rng.choice(11, size=n, p=certificate.cell_count / certificate.count),
        rejected={},
    )
    length, alarms = run_length(EDetector(worst, healthy.reference, healthy.card.modes, threshold=50.0), seen)
    assert alarms > 100 and length >= 50


def test_duplicates_are_found_at_the_sample_that_repeats(healthy):
    certificate = healthy.certificate
    samples = np.arange(3 * DUPLICATE_BLOCK)
    samples[DUPLICATE_BLOCK + 7] = samples[DUPLICATE_BLOCK + 2]
    path = Duplicates(certificate).update(samples)
    jump = np.flatnonzero(path[1:] > 10 * path[:-1]) + 1
    assert jump.tolist() == [DUPLICATE_BLOCK + 7]
    apart = np.arange(3 * DUPLICATE_BLOCK)
    apart[DUPLICATE_BLOCK] = apart[DUPLICATE_BLOCK - 1]  # in two blocks: not what the certificate counted
    assert np.array_equal(Duplicates(certificate).update(apart), Duplicates(certificate).update(np.arange(3 * DUPLICATE_BLOCK)))


@pytest.mark.slow
def test_duplicates_stay_fair_to_somebody_who_stops_inside_a_block(healthy):
    """Stop at the first repeat after two blocks, which the past foretells within the block: still E[evidence] <= w E[time]."""
    values, runs, length = 2500, 600, 8 * DUPLICATE_BLOCK
    chance = 1 - np.prod(1 - np.arange(DUPLICATE_BLOCK) / values)
    blocks = 20_000
    certificate = replace(healthy.certificate, duplicate_blocks=blocks, duplicate_hits=round(chance * blocks))
    assert certificate.upper(certificate.duplicate_hits, blocks) > chance
    rng, evidence, time = np.random.default_rng(5), [], []
    for _ in range(runs):
        path = Duplicates(certificate).update(rng.integers(values, size=length))
        jumps = np.flatnonzero((path[1:] > 1.1 * path[:-1] + 1) & (np.arange(1, length) >= 2 * DUPLICATE_BLOCK))
        at = int(jumps[0]) + 1 if len(jumps) else length - 1
        evidence.append(path[at] / KINDS["duplicates"][1])
        time.append(at + 1)
    assert min(time) < length  # it does stop early
    assert np.mean(evidence) <= np.mean(time) + 3 * np.std(evidence) / np.sqrt(runs)


def test_nothing_overflows(healthy):
    found = detector(healthy)
    n = 3000
    found.update(np.full((n, 2), 1e9, np.float32), np.full((n, 2), 1e9, np.float32), np.full(n, 10), np.zeros((n, 2), np.float32), index=0)
    assert np.isfinite(found.evidence).all() and found.evidence.sum() > 1e100
    assert found.crossed == 3 and found.named.any()


def test_restart_forgets_everything(healthy, draw):
    fresh, used = detector(healthy), detector(healthy)
    junk = np.zeros((37, 2), np.float32)
    used.update(np.full((37, 2), 9.0, np.float32), junk, np.full(37, 10), junk, index=0)
    assert used.crossed is not None
    used.restart()
    seen = Eye(healthy).look(draw(healthy, 300))
    feed(fresh, seen)
    feed(used, seen)
    assert used.crossed is None and not used.named.any() and np.array_equal(used.evidence, fresh.evidence)


def test_copies_are_the_lower_tail_of_the_nearest_training_sample(healthy, make_bundle):
    """1 % exact copies are found and named; samples that are merely near the training data are no copies."""
    certificate, rng = healthy.certificate, np.random.default_rng(4)
    found = EDetector(certificate, healthy.reference, healthy.card.modes, threshold=1e6, scores=("distance", NEAREST_TRAIN))
    spent = dict(zip(found.groups, found._weights.sum(axis=0), strict=False))
    assert spent["copies"] == pytest.approx(KINDS["copies"][1]) and spent["lower"] == pytest.approx(KINDS["lower"][1])
    usual = certificate.upper_threshold[:, 0]  # the medians
    for nearest, named in ((0.0, True), (float(certificate.lower_threshold[1, 5]) - 1e-6, False)):
        found.restart()
        scores = np.tile(usual, (3000, 1)) * rng.uniform(0.9, 1.1, (3000, 2))
        scores[rng.random(3000) < 0.01, 1] = nearest
        assert ("copies" in evidence_named(found, scores)) == named
    small = make_bundle(count=4096).certificate  # knows no tail so deep
    assert np.isfinite(EDetector(small, healthy.reference, healthy.card.modes, threshold=1e6, scores=("distance", NEAREST_TRAIN)).evidence).all()


def evidence_named(found: EDetector, scores: np.ndarray) -> set[str]:
    """The groups whose own evidence reaches the threshold on scores beside which all else is ordinary."""
    n, rng = len(scores), np.random.default_rng(5)
    features = rng.standard_normal((n, 2)) * 0.1 + found._moments._certificate.white_centre
    path = found.trace(scores, features, rng.integers(10, size=n), np.arange(n))
    return {group for group, most in zip(found.groups, path.max(axis=0), strict=True) if most >= found.threshold}


@pytest.mark.parametrize("off_manifold", [0.043, 0.049, 0.15])  # as the recipes of grid and digits are certified, and far worse
def test_quality_is_silent_while_fakes_are_few(healthy, off_manifold):
    """Null B is about the real data alone; its bets lose on every law within the bound, so their evidence stays near what one sample brings."""
    rng, peaks = np.random.default_rng(6), []
    for _ in range(20):
        bets = Modes(healthy.certificate, healthy.reference, healthy.card.modes)
        share = np.append(np.full(10, (1 - off_manifold) / 10), off_manifold)
        peaks.append(bets.path(rng.choice(11, 5000, p=share))[:, -1].max())
    assert max(peaks) < 10


def test_quality_finds_half_of_all_samples_to_be_fakes_whatever_was_certified(make_bundle):
    bundle, rng = make_bundle(fakes=0.5, honest=True), np.random.default_rng(7)
    bets = Modes(bundle.certificate, bundle.reference, bundle.card.modes)
    share = bundle.certificate.cell_count / bundle.certificate.count
    evidence = bets.path(rng.choice(11, 3000, p=share))[:, -1]
    assert 0.45 < share[-1] < 0.55 and (evidence >= 2.6e9).argmax() in range(100, 2500)
