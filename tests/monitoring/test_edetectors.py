"""The promise of the alarm: every bet is fair under all that its bound allows, and false alarms are as rare as asked."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import ndtri

from monitoring import kernel
from monitoring.edetectors import FAMILIES, KINDS, SCORE_PARTS, TILTS, Cells, Duplicates, EDetector, Fakes, Modes, NoNumbers, Scores, tail_levels, tilted
from monitoring.features import Eye, Seen
from training.bundle import AMBIGUITY, DUPLICATE_BLOCK, NEARER_TRAIN, NEAREST_TRAIN, Certificate, Reference
from training.drops import mode_bounds

sys.path.insert(0, str(Path(__file__).parent))

from oracle import Oracle  # noqa: E402


@pytest.fixture
def healthy(make_bundle):
    return make_bundle()


def detector(bundle, threshold=2.6e9) -> EDetector:
    return EDetector(bundle.certificate, bundle.reference, bundle.card.modes, threshold=threshold)


def feed(found: EDetector, seen: Seen, start=0, stop=None, classes=None) -> np.ndarray:
    part = slice(start, stop)
    return found.update(seen.scores[part], seen.features[part], seen.cells[part], seen.samples[part], index=start, classes=None if classes is None else classes[part])


def trace(found: EDetector, *arrays: np.ndarray) -> np.ndarray:
    """The evidence of each group after each sample."""
    path = []
    for i in range(len(arrays[0])):
        found.update(*(a[i : i + 1] for a in arrays), index=i)
        path.append(found.evidence)
    return np.array(path)


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
    payoffs = bets.table.transpose(1, 0, 2)  # [bin, score, bet]
    assert all((e.searchsorted(x) == np.arange(len(x))).all() for e, x in zip(bets.edges, scores, strict=True))
    means = [-np.diff(row, prepend=1.0, append=0.0) @ payoffs[:, s] for s, row in enumerate(beyond)]
    allowed = bets.parts.reshape(len(means), -1) > 0
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


@given(st.lists(st.integers(0, 10), min_size=1, max_size=64))
@settings(max_examples=50, deadline=None)
def test_bets_on_shares_are_fair_whatever_the_past(small, past):
    names = tuple(map(str, range(10)))
    found = EDetector(small, Reference(1, np.full(11, 1 / 11), np.zeros(0), np.zeros((0, 0)), *np.zeros((2, 0, 0), np.float32)), names, threshold=1e9)
    blank = lambda n: np.zeros((n, 1))  # noqa: E731
    found.update(blank(len(past)), np.zeros((len(past), 0)), np.array(past), blank(len(past)), index=0)
    state, payoffs = found.state(), np.empty((11, 2))
    state["r"][:] = 0  # so that R is L after the next sample
    for cell in range(11):
        found.restore(state)
        found.update(blank(1), np.zeros((1, 0)), np.array([cell]), blank(1), index=0)
        payoffs[cell] = found.state()["r"][-2:]
    assert (small.upper(small.cell_count, small.count) @ payoffs).tolist() == pytest.approx([1, 1])  # so E[L] <= 1 for all q below
    assert (small.cell_count / small.count @ payoffs > 0.9).all()


def test_the_budget_is_spent_once(healthy):
    found = detector(healthy)
    bets, duplicates, state = Modes(healthy.certificate, healthy.reference), Duplicates(healthy.certificate), found.state()
    state["r"][:], state["r_modes"][:] = 1.0, bets.shares.allowed
    state["sums"][1:3] = duplicates.weights.sum(), bets.quality_weights @ bets.quality.allowed.sum(axis=1)
    found.restore(state)
    spent, unseen = dict.fromkeys(KINDS, 0.0), {"copies": 0.0, "nearer": 0.0, "latents": 0.0, "nan": 0.0}  # no score here looks for training data; latents and what is no number have detectors of their own
    for group, weight in zip(found.groups, found.evidence, strict=True):
        spent[group.partition(":")[0]] += weight
    assert spent == pytest.approx({kind: weight for kind, (_, weight) in KINDS.items() if kind not in unseen} | unseen)
    assert FAMILIES == pytest.approx({f: sum(w for family, w in KINDS.values() if family == f) for f in FAMILIES})
    assert sum(FAMILIES.values()) == pytest.approx(1)


def test_bets_on_modes_are_on_the_right_side_of_their_bounds(healthy):
    certificate = healthy.certificate
    on_manifold = certificate.cell_count[:-1] / certificate.cell_count[:-1].sum()
    low, high = mode_bounds(certificate)
    assert (low < on_manifold).all() and (on_manifold < high).all()
    bets = Modes(certificate, healthy.reference)
    assert (bets.shares.hit[0] < 1).all(axis=1).tolist() == [True, True, False, False]  # drop, inflate
    assert (bets.quality.hit[:, :-1] < 1).all() and (bets.quality.hit[:, -1] > 1).all()


def test_what_a_class_makes_too_often_is_bet_on_within_its_half_of_the_weight_of_drop(healthy):
    """Fair at the bound, unfair to nobody below it; what unlabelled samples are bet on with stays as it was."""
    counts = np.stack([healthy.certificate.cell_count * part for part in (1, 0, 2)])  # no sample of the second was certified
    counts[0, -1] = 2 * counts[0].sum()  # the first is two thirds fakes: 0.6 would be no stake
    certificate = replace(healthy.certificate, class_cell_count=counts)
    (hit, miss, weights), modes = Fakes(certificate, threshold=1e9)._bets, Modes(certificate, healthy.reference)
    assert (weights > 0).tolist() == [[False] * 3, [False] * 3, [True] * 3]
    bound, real = certificate.upper(int(counts[2, -1]), int(counts[2].sum())), counts[2, -1] / counts[2].sum()
    assert bound * hit[2] + (1 - bound) * miss[2] == pytest.approx(np.ones(3))
    mean = real * hit[2] + (1 - real) * miss[2]
    assert (mean < 1).all() and mean[0] > 0.999
    _, high = mode_bounds(certificate)
    on_manifold, bets = counts[2, :-1] / counts[2, :-1].sum(), modes.shares
    assert (on_manifold < high[3]).all() and (on_manifold * bets.hit[3] + (1 - on_manifold) * bets.miss[3] < 1).all() and bets.allowed[3].all()
    spent = (modes.weights * modes.shares.allowed.sum(axis=2)).sum(axis=1)
    assert spent[0] == pytest.approx(KINDS["drop"][1] / 2 + KINDS["inflate"][1]) and spent[1:].sum() + weights.sum() == pytest.approx(KINDS["drop"][1] / 2)


def test_a_mode_that_the_certificate_never_saw_has_no_drop_bet(make_bundle):
    bundle = make_bundle(lost=(3, 8), honest=True)
    found = detector(bundle)
    seen = np.zeros(500, np.int64)
    found.update(np.zeros((500, 2)), np.zeros((500, 2)), seen, np.arange(500), index=0)
    watched = {g for g, e in zip(found.groups, found.evidence, strict=True) if g.startswith("drop") and e > 0}
    assert watched == {f"drop:{k}" for k in range(10) if k not in (3, 8)}


@pytest.mark.parametrize("fault", [{}, {"lost": (0,)}, {"grain": 1.0}, {"fakes": 0.3}])
def test_agrees_with_the_plain_formulas_in_logarithms(healthy, make_bundle, draw, fault):
    samples = draw(make_bundle(**fault), 700)
    seen = Eye(healthy).look(samples)
    found, oracle = detector(healthy, 1e300), Oracle(healthy.certificate, healthy.reference, healthy.card.modes)
    totals, uncapped = [], np.ones(len(found.groups), bool)
    for i in range(700):
        totals.append(feed(found, seen, i, i + 1).item())
        expected = oracle.feed(seen.scores[i], seen.features[i], seen.cells[i], seen.samples[i].tobytes())
        logs = np.array([expected[g] for g in found.groups])
        uncapped &= logs < 300
        np.testing.assert_allclose(np.log(found.evidence)[uncapped], logs[uncapped], rtol=1e-9, atol=1e-9)
        if uncapped.all():
            assert np.log(totals[-1]) == pytest.approx(np.logaddexp.reduce(logs), abs=1e-9)
    assert uncapped.sum() > 10
    whole = detector(healthy, 1e300)
    assert np.array_equal(feed(whole, seen), totals) and np.array_equal(whole.evidence, found.evidence)


@pytest.mark.parametrize("fault", [{}, {"lost": (0, 1)}, {"fakes": 0.3}])
def test_given_a_class_agrees_with_the_plain_formulas_in_logarithms(healthy, make_bundle, draw, fault):
    """Three classes: even modes, odd ones, and one that hardly any sample is of; draws of the whole law between them."""
    count = healthy.certificate.cell_count
    odd = np.arange(11) % 2 * count + np.eye(11, dtype=np.int64)[10] * count[10] // 2
    certificate = replace(healthy.certificate, class_cell_count=np.stack([count - odd, odd, odd // 1000 + 1]))
    seen, rng = Eye(healthy).look(draw(make_bundle(**fault), 600)), np.random.default_rng(8)
    found, fakes = (kind(certificate, *more, threshold=1e300) for kind, more in ((EDetector, (healthy.reference, healthy.card.modes)), (Fakes, ())))
    whole, oracle = Fakes(certificate, threshold=1e300), Oracle(certificate, healthy.reference, healthy.card.modes)
    given = np.where(seen.cells == 10, rng.integers(0, 4, 600), np.array([1, 2])[seen.cells % 2] * (rng.random(600) < 0.8))
    for i, c in enumerate(given):
        if c:
            feed(found, seen, i, i + 1, classes=given - 1)
            fakes.update(given[i : i + 1] - 1, seen.cells[i : i + 1] == 10, index=i)
        else:
            feed(found, seen, i, i + 1)
        expected = oracle.feed(seen.scores[i], seen.features[i], seen.cells[i], seen.samples[i].tobytes(), c)
        with np.errstate(divide="ignore"):
            logs = np.log(np.concatenate([found.evidence, fakes.evidence]))
        np.testing.assert_allclose(logs, [expected[g] for g in (*found.groups, *fakes.groups)], rtol=1e-9, atol=1e-9)
    whole.update(given[given > 0] - 1, seen.cells[given > 0] == 10, index=0)
    assert np.array_equal(whole.evidence, fakes.evidence) and (fault.get("fakes") is None) == (fakes.evidence.max() < 1e6)


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
        assert np.array_equal(parts.evidence, whole.evidence)

    any_split()


@pytest.mark.parametrize(
    ("risen", "to", "lost", "left"),
    [(1, 0.2, 0, 1.0), (1, 0.3, 0, 1.0), (1, 0.5, 0, 1.0), (1, None, 1, 0.0), (1, None, 3, 0.0), (1, None, 1, 0.3), (0, None, 1, 0.0), (0, None, 2, 0.0)],
)
def test_a_mode_is_accused_of_being_lost_unless_it_only_looks_so_beside_one_that_comes_too_often(healthy, draw, risen, to, lost, left):
    """Six runs each. to: the risen mode's share, the others keep their proportions; None: it has what the lost ones had."""
    seen, rng = Eye(healthy).look(draw(healthy, 2**16, seed=41)), np.random.default_rng(11)
    pools = [np.flatnonzero(seen.cells == k) for k in range(11)]
    certified = healthy.certificate.cell_count / healthy.certificate.count
    for run in range(6):
        share, gone = certified.copy(), [(run + 1 + 3 * i) % 10 for i in range(lost)]
        share[gone] *= left
        share[run] = (to * (1 - share[run]) / (1 - to) if to else 1 - np.delete(share, run).sum()) if risen else share[run]
        cells = np.concatenate([rng.choice(11, 500, p=certified), rng.choice(11, 4000, p=share / share.sum())])
        rows = np.array([rng.choice(pools[c]) for c in cells])
        found = detector(healthy, 1e6)
        for start in range(0, len(rows), 100):
            part = rows[start : start + 100]
            found.update(seen.scores[part], seen.features[part], cells[start : start + 100], seen.samples[part], index=start)
            if found.crossed is not None and start > found.crossed + 1000:
                break
        named = {group for group, is_named in zip(found.groups, found.named, strict=True) if is_named}
        assert {f"drop:{k}" for k in gone} == {group for group in named if group.startswith("drop")}, run
        assert (f"inflate:{run}" in named) or not to


@pytest.mark.parametrize("gone", [None, 5])
def test_beside_a_mode_that_rose_only_what_is_lost_besides_is_accused(small, gone):
    """... of a hundred modes, at any later time: as rarely wrong as an alarm."""
    certificate = replace(small, cell_count=np.append(np.full(100, 10_000), 100), count=1_000_100, duplicate_blocks=31_000)
    reference = Reference(1, np.full(101, 1 / 101), np.zeros(0), np.zeros((0, 0)), *np.zeros((2, 0, 0), np.float32))
    found = EDetector(certificate, reference, tuple(map(str, range(100))), threshold=1e6)
    rng, n = np.random.default_rng(3), 20_000
    cells = np.where(rng.random(n) < 0.6 if gone is None else rng.random(n) < 0.3, 0, rng.integers(100, size=n))
    cells[cells == gone] = 6
    found.update(np.full((n, 1), 0.5), np.zeros((n, 2)), cells, np.arange(n)[:, None], index=0)
    named = {group for group, is_named in zip(found.groups, found.named, strict=True) if is_named}
    assert "inflate:0" in named and {group for group in named if group.startswith("drop")} == ({f"drop:{gone}"} if gone else set())


def test_where_there_are_two_modes_the_loss_of_one_is_no_rise_of_the_other():
    rho = np.array([0.0, 0.5])
    for bound in ([0.5, 0.5], [0.96, 0.02]):
        assert kernel.riser(0, 16.0, np.array(bound), rho, np.ones(64, np.int64), 40) == -1
    assert kernel.riser(0, 16.0, np.array([0.3, 0.3, 0.3]), rho, np.ones(64, np.int64), 40) == -1  # nothing but mode 1: of the others nobody knows


@pytest.mark.parametrize("held", [60, 90, 110, 600, 8000])
def test_a_large_mode_that_is_lost_is_no_rise_of_one_that_is_larger(held):
    """Where nearly all samples are of either, the few others say little for its loss, but say it."""
    shares, rng = np.array([0.65, 0.3, *[0.00625] * 8]), np.random.default_rng(2)
    gone = shares * (np.arange(10) != 1)
    newest = rng.choice(10, 8192, p=gone / gone.sum())
    assert kernel.riser(1, np.log(1000), shares, np.array([0.0, 0.5]), newest, held) == -1
    risen = np.where(np.arange(10) == 0, 0.93, 0.07 * shares / 0.35)
    assert kernel.riser(1, np.log(1000), shares, np.array([0.0, 0.5]), rng.choice(10, 8192, p=risen), held) in ((-1, 0) if held < 200 else (0,))


def test_a_sum_remembers_modes_of_each_part_as_many_as_its_part(healthy):
    """... in whatever order, the newest last."""
    names, sizes = healthy.card.modes, [9000, 100, 9000, 18_000, 9000, 3]
    parts = []
    for mode, size in enumerate(sizes):
        part = detector(healthy, 1e300)
        part.update(np.zeros((size, 2)), np.zeros((size, 2)), np.full(size, mode), np.arange(size)[:, None], index=0)
        parts.append(part)
    for order in (range(6), [5, 3, 1, 0, 2, 4]):
        found = detector(healthy, 1e300)
        for i in order:
            found.merge(parts[i], index=0)
        assert np.abs(np.bincount(found._newest, minlength=len(names))[:6] - 8192 * np.array(sizes) / sum(sizes)).max() < 6
        found.update(np.zeros((1, 2)), np.zeros((1, 2)), np.array([7]), np.zeros((1, 1)), index=0)
        assert found._newest[0] == 7 and len(found._newest) == 8192


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


@pytest.mark.parametrize("row", [0, 1])
def test_bets_on_what_is_no_number_hold_at_the_bound_and_see_what_is_beyond(small, row):
    """Run lengths, numbers or not, at the largest chance that the certificate allows; a stream of the like takes a few."""
    certificate = replace(small, class_cell_count=small.cell_count[None] // 40)
    bound, rng, lengths = certificate.upper(0, [certificate.count, int(certificate.class_cell_count.sum())][row]), np.random.default_rng(9), []
    found = NoNumbers(certificate, threshold=1e9)
    hit, miss, weights = found._bets
    found.threshold = 50 * weights[row].sum()  # as if these bets were all there is
    assert bound * hit[row] + (1 - bound) * miss[row] == pytest.approx(np.ones(3)) and weights.sum() * len(hit) / 2 == pytest.approx(KINDS["nan"][1])
    for _ in range(300):
        found.restart()
        bad = rng.random(20_000) < bound
        found.update(np.full(20_000, row), bad, index=0)
        lengths.append(20_000 if found.crossed is None else found.crossed + 1)
    assert np.mean(lengths) > 50 + 3 * np.std(lengths) / np.sqrt(300)
    surely = NoNumbers(certificate, threshold=2.6e9)
    surely.update(np.full(20, row), np.ones(20, bool), index=7)
    assert surely.crossed < 16 and surely.groups[surely.named.argmax()] == ("nan", "nan:0")[row]


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
        rows=np.arange(n),
    )
    length, alarms = run_length(EDetector(worst, healthy.reference, healthy.card.modes, threshold=50.0), seen)
    assert alarms > 100 and length >= 50


def repeats(certificate: Certificate, samples: np.ndarray) -> np.ndarray:
    """Evidence of the bets on duplicates after each sample; the compiled bets themselves."""
    bets, block, marks, path = Duplicates(certificate), np.zeros((DUPLICATE_BLOCK, 8), np.uint8), np.zeros(2, np.int64), []
    start, joined = np.zeros((2, len(bets.win)))
    for row in samples[:, None].view(np.uint8):
        path.append(kernel.repeats(row, block, marks, start, joined, bets.win, bets.lose, bets.weights))
    return np.array(path)


def test_duplicates_are_found_at_the_sample_that_repeats(healthy):
    certificate = healthy.certificate
    samples = np.arange(3 * DUPLICATE_BLOCK)
    samples[DUPLICATE_BLOCK + 7] = samples[DUPLICATE_BLOCK + 2]
    path = repeats(certificate, samples)
    jump = np.flatnonzero(path[1:] > 10 * path[:-1]) + 1
    assert jump.tolist() == [DUPLICATE_BLOCK + 7]
    apart = np.arange(3 * DUPLICATE_BLOCK)
    apart[DUPLICATE_BLOCK] = apart[DUPLICATE_BLOCK - 1]  # in two blocks: not what the certificate counted
    assert np.array_equal(repeats(certificate, apart), repeats(certificate, np.arange(3 * DUPLICATE_BLOCK)))


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
        path = repeats(certificate, rng.integers(values, size=length))
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


def test_scores_that_look_for_training_data_take_no_weight_from_others(healthy):
    """A pair of scores is bet on with the same weight beside them, and ambiguity with a quarter of one score's."""

    def weights(*names):
        rows = np.resize([0, 1], len(names))
        certificate = replace(healthy.certificate, **{f"{side}_{what}": getattr(healthy.certificate, f"{side}_{what}")[rows] for side in ("upper", "lower") for what in ("threshold", "hits")})
        found = EDetector(certificate, healthy.reference, healthy.card.modes, threshold=1e6, scores=names)
        few, group = found._bets[11:13]
        few = few[: found._bets[1].shape[0] * found._bets[1].shape[2]]
        return {kind: few[group[: len(few)] == i].reshape(-1) for i, kind in enumerate(found.groups) if kind in KINDS and KINDS[kind][0] in ("tails", "bulk", "copies")}, few.reshape(len(names), -1)

    plain, each = weights("manifold_distance", "radius")
    beside, more = weights("manifold_distance", "radius", NEAREST_TRAIN, NEARER_TRAIN)
    np.testing.assert_allclose(more[:2], each)
    assert all(plain[kind].sum() == pytest.approx(KINDS[kind][1]) == pytest.approx(beside[kind].sum()) for kind in ("upper", "lower", "wider", "narrower"))
    assert beside["copies"].sum() == pytest.approx(KINDS["copies"][1])
    _, labelled = weights("manifold_distance", "radius", AMBIGUITY)
    np.testing.assert_allclose(labelled[2], labelled[0] * SCORE_PARTS[AMBIGUITY])


def test_copies_are_the_lower_tail_of_the_nearest_training_sample(healthy, make_bundle):
    """1 % exact copies are found and named; samples that are merely near the training data are no copies."""
    certificate, rng = healthy.certificate, np.random.default_rng(4)
    found = EDetector(certificate, healthy.reference, healthy.card.modes, threshold=1e6, scores=("distance", NEAREST_TRAIN))
    state = found.state()
    state["r"][:] = 1.0
    found.restore(state)
    spent = dict(zip(found.groups, found.evidence, strict=True))
    assert spent["copies"] == pytest.approx(KINDS["copies"][1]) and spent["lower"] == pytest.approx(KINDS["lower"][1])
    usual = certificate.upper_threshold[:, 0]  # the medians
    for nearest, named in ((0.0, True), (float(certificate.lower_threshold[1, 5]) - 1e-6, False)):
        found.restart()
        scores = np.tile(usual, (3000, 1)) * rng.uniform(0.9, 1.1, (3000, 2))
        scores[rng.random(3000) < 0.01, 1] = nearest
        assert ("copies" in evidence_named(found, scores, certificate.white_centre)) == named
    small = make_bundle(count=4096).certificate  # knows no tail so deep
    assert np.isfinite(EDetector(small, healthy.reference, healthy.card.modes, threshold=1e6, scores=("distance", NEAREST_TRAIN)).evidence).all()


@pytest.mark.parametrize(("share", "named"), [(0.5, set()), (0.9, {"nearer"}), (0.1, set())])
def test_samples_nearer_to_training_than_to_held_out_data_are_a_kind_of_their_own(healthy, share, named):
    """... at any distance, so that no copy need be exact; to be nearer to held-out data is no fault, nor is it off the manifold."""
    certificate, rng = healthy.certificate, np.random.default_rng(4)
    found = EDetector(certificate, healthy.reference, healthy.card.modes, threshold=1e6, scores=("distance", NEARER_TRAIN))
    median = certificate.upper_threshold[:, 0]
    scores = np.tile(median, (3000, 1)) * rng.uniform(0.9, 1.1, (3000, 2))
    scores[:, 1] = median[1] * np.where(rng.random(3000) < share, 0.95, 1.05)
    assert evidence_named(found, scores, certificate.white_centre) == named
    found.restart()
    scores[:, 1] = certificate.upper_threshold[1, -1] * 2
    assert evidence_named(found, scores, certificate.white_centre) == set()


def test_samples_that_come_nearer_to_the_data_have_not_collapsed(healthy):
    certificate, rng = healthy.certificate, np.random.default_rng(4)
    scores = np.tile(certificate.upper_threshold[:, 0], (2000, 1)) * rng.uniform(0.9, 1.1, (2000, 2))
    scores[:, 1] *= 0.6
    for name, named in (("taxi", {"narrower"}), (NEAREST_TRAIN, set())):
        found = EDetector(certificate, healthy.reference, healthy.card.modes, threshold=1e6, scores=("distance", name))
        assert evidence_named(found, scores, certificate.white_centre) == named


def evidence_named(found: EDetector, scores: np.ndarray, centre: np.ndarray) -> set[str]:
    """The groups whose own evidence reaches the threshold on scores beside which all else is ordinary."""
    n, rng = len(scores), np.random.default_rng(5)
    features = rng.standard_normal((n, 2)) * 0.1 + centre
    path = trace(found, scores, features, rng.integers(10, size=n), np.arange(n))
    return {group for group, most in zip(found.groups, path.max(axis=0), strict=True) if most >= found.threshold}


def quality(bets: Modes, cells: np.ndarray) -> np.ndarray:
    """Evidence of the bets on quality after each sample."""
    r, part = np.zeros(bets.quality.hit.shape), (bets.quality.hit, bets.quality.miss, bets.quality_weights)
    return np.array([kernel.cells(r, cell, *part) for cell in cells])


@pytest.mark.parametrize("off_manifold", [0.043, 0.049, 0.15])  # as the recipes of grid and digits are certified, and far worse
def test_quality_is_silent_while_fakes_are_few(healthy, off_manifold):
    """Null B is about the real data alone; its bets lose on every law within the bound, so their evidence stays near what one sample brings."""
    rng, peaks = np.random.default_rng(6), []
    for _ in range(20):
        bets = Modes(healthy.certificate, healthy.reference)
        share = np.append(np.full(10, (1 - off_manifold) / 10), off_manifold)
        peaks.append(quality(bets, rng.choice(11, 5000, p=share)).max())
    assert max(peaks) < 10


def test_quality_finds_half_of_all_samples_to_be_fakes_whatever_was_certified(make_bundle):
    bundle, rng = make_bundle(fakes=0.5, honest=True), np.random.default_rng(7)
    bets = Modes(bundle.certificate, bundle.reference)
    share = bundle.certificate.cell_count / bundle.certificate.count
    evidence = quality(bets, rng.choice(11, 3000, p=share))
    assert 0.45 < share[-1] < 0.55 and (evidence >= 2.6e9).argmax() in range(100, 2500)
