"""The promise of the alarm: every bet is fair under all that its bound allows, and false alarms are as rare as asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.edetectors import FAMILIES, KINDS, Bet, Duplicates, EDetector, bets, mode_bounds, tail_levels
from monitoring.features import Eye, Seen
from training.bundle import DUPLICATE_BLOCK


@pytest.fixture
def healthy(make_bundle):
    return make_bundle()


def detector(bundle, threshold=2.6e9) -> EDetector:
    return EDetector(bundle.certificate, bundle.reference, bundle.card.modes, threshold=threshold)


def feed(found: EDetector, seen: Seen, start=0, stop=None) -> None:
    part = slice(start, stop)
    found.update(seen.scores[part], seen.cells[part], seen.samples[part], index=start)


@given(st.floats(1e-6, 0.999), st.floats(0, 1), st.floats(0, 1))
def test_a_bet_is_fair_at_its_bound_and_unfair_beyond(bound, theta, q):
    bet = Bet("drop:0", 0, bound, theta, 1.0)
    assert bound * bet.win + (1 - bound) * bet.lose == pytest.approx(1)
    if (q - bound) * (theta - bound) <= 0:  # the law lies on the side that the bound allows
        assert q * bet.win + (1 - q) * bet.lose <= 1 + 1e-9


def test_the_budget_is_spent_once(healthy):
    found = bets(healthy.certificate, healthy.reference, healthy.card.modes)
    spent = {kind: sum(b.weight for b in found if b.kind == kind) for kind in KINDS}
    spent["duplicates"] = Duplicates(healthy.certificate)._weights.sum()
    assert spent == pytest.approx({kind: weight for kind, (_, weight) in KINDS.items()})
    assert FAMILIES == pytest.approx({f: sum(w for family, w in KINDS.values() if family == f) for f in FAMILIES})
    assert sum(FAMILIES.values()) == pytest.approx(1)


def test_bets_are_on_the_right_side_of_their_bounds(healthy):
    certificate, modes = healthy.certificate, healthy.card.modes
    on_manifold = certificate.cell_count[:-1] / certificate.cell_count[:-1].sum()
    low, high = mode_bounds(certificate)
    assert (low < on_manifold).all() and (on_manifold < high).all()
    assert tail_levels(certificate).sum() == 14  # 2^-14 * 2^18 = 16 hits, 2^-15 would be 8
    for bet in bets(certificate, healthy.reference, modes):
        assert 0 < bet.bound < 1 and 0 <= bet.theta < 1 and bet.theta != bet.bound
        assert (bet.theta < bet.bound) == (bet.kind == "drop" or (bet.kind == "quality" and bet.event < 2 * 2 * 14 + len(modes)))


def test_a_mode_that_the_certificate_never_saw_has_no_drop_bet(make_bundle):
    bundle = make_bundle(lost=(3, 8), honest=True)
    groups = {b.group for b in bets(bundle.certificate, bundle.reference, bundle.card.modes)}
    assert {g for g in groups if g.startswith("drop")} == {f"drop:{k}" for k in range(10) if k not in (3, 8)}


def test_agrees_with_an_oracle_in_logarithms(healthy, make_bundle, draw):
    for samples in (draw(healthy, 700), draw(make_bundle(lost=(0,)), 700)):
        seen = Eye(healthy).look(samples)
        found = detector(healthy)
        feed(found, seen)
        certificate, usable = healthy.certificate, tail_levels(healthy.certificate)
        above = (seen.scores[:, :, None] > certificate.upper_threshold[:, usable]).reshape(len(samples), -1)
        below = (seen.scores[:, :, None] < certificate.lower_threshold[:, usable]).reshape(len(samples), -1)
        events = np.hstack([above, below, np.eye(11, dtype=bool)[seen.cells]])
        table = bets(certificate, healthy.reference, healthy.card.modes)
        win, lose = (np.array([getattr(b, name) for b in table]) for name in ("win", "lose"))
        about_modes = np.array([b.kind in ("drop", "inflate") for b in table])
        log_r = np.full(len(table), -np.inf)
        for hits, cell in zip(events[:, [b.event for b in table]], seen.cells, strict=True):
            with np.errstate(divide="ignore"):
                log_l = np.where(about_modes & (cell == 10), 0.0, np.log(np.where(hits, win, lose)))
            log_r = np.logaddexp(0, log_r) + log_l
        total: dict[str, float] = {}
        for bet, log_e in zip(table, log_r, strict=True):
            total[bet.group] = np.logaddexp(total.get(bet.group, -np.inf), np.log(bet.weight) + log_e)
        assert found.groups[:-1] == tuple(total)
        np.testing.assert_allclose(np.log(found.evidence[:-1]), list(total.values()), rtol=1e-9)


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
@pytest.mark.parametrize(("threshold", "samples"), [(20.0, 12_000), (200.0, 120_000)])
def test_healthy_run_lengths_are_at_least_what_was_asked(healthy, draw, threshold, samples):
    length, alarms = run_length(detector(healthy, threshold), Eye(healthy).look(draw(healthy, samples, seed=17)))
    assert alarms > 100
    assert length >= threshold * (1 + 3 / np.sqrt(alarms))  # with three standard errors to spare


@pytest.mark.slow
def test_run_lengths_hold_for_the_worst_law_that_the_bounds_allow(healthy):
    """Scores whose upper tails are exactly as heavy as the certificate's upper bounds, so that these bets are martingales."""
    certificate = healthy.certificate
    bound = certificate.upper(certificate.upper_hits, certificate.count)
    worst = replace(certificate, upper_threshold=1 - bound, lower_threshold=np.full_like(bound, -1.0))
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
    found.update(np.full((n, 2), 1e9, np.float32), np.full(n, 10), np.zeros((n, 2), np.float32), index=0)
    assert np.isfinite(found.evidence).all() and found.evidence.sum() > 1e100
    assert found.crossed == 3 and found.named.any()


def test_restart_forgets_everything(healthy, draw):
    fresh, used = detector(healthy), detector(healthy)
    junk = np.zeros((37, 2), np.float32)
    used.update(np.full((37, 2), 9.0, np.float32), np.full(37, 10), junk, index=0)
    assert used.crossed is not None
    used.restart()
    seen = Eye(healthy).look(draw(healthy, 300))
    feed(fresh, seen)
    feed(used, seen)
    assert used.crossed is None and not used.named.any() and np.array_equal(used.evidence, fresh.evidence)
