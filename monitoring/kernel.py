"""One pass of samples through every bet of the mixture, compiled: the maths of `edetectors.py` and `bulk.py`, sample by sample.

Numpy spends its time on calls at one sample and on closed forms at many; a loop that reads R <- (1 + R) L needs neither. All
state is altered in place, and each sample is done with before the next is looked at, so any split of a stream comes to the
same. `reassoc` lets sums be taken in any order, which costs nothing but last digits; NaN and infinity keep their meaning.

It knows no certificate and no names. The first call of a process compiles, or finds what an earlier process compiled.
"""

from __future__ import annotations

import inspect

import numpy as np
from numba import njit

from training.bundle import DUPLICATE_BLOCK

CAP = 1e150  # of every R: far above every threshold, far below overflow
LEFT = 0.5  # of the evidence that a mode is gone: what must be left of it among the samples of all other modes but one, for that one not to explain it
EXPECTED = 5  # samples of a mode that there should be, at least, among those that tell whether it is gone
CONVINCING = 100.0  # evidence in the other samples, for each mode, that a mode is gone: none explains that
EVERY = 64  # samples, and as many for each 16 modes more, after which it is looked at again


def compiled(function):  # noqa: ANN001, ANN201
    function = inspect.unwrap(function)  # from what checks types while tests run
    options = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is nowhere to keep it: neither beside this file nor in the user's cache
        return njit(**options)(function)


@compiled
def whitened(y, x, centre, scale, radius, mean):
    """y = x whitened, clipped to `radius`, less its certified mean."""
    y[:] = 0.0
    for i in range(len(centre)):
        moved = x[i] - centre[i]
        for j in range(len(y)):
            y[j] += moved * scale[i, j]
    square = 0.0
    for j in range(len(y)):
        square += y[j] * y[j]
    length = np.sqrt(square)
    shrink = radius / length if radius > 0 and length > radius else 1.0
    for j in range(len(y)):
        y[j] = y[j] * shrink - mean[j]


@compiled
def moved(payoffs, y, m, rates, bounds):
    """((1 + m y / 2)^2 + v |y|^2 / 4) / (1 + e |m| + (s |m|^2 + v T) / 4); then m <- m + rate (y - m)."""
    e, s, size = bounds[0], bounds[1], bounds[2]
    length = 0.0
    for j in range(len(y)):
        length += y[j] * y[j]
    for k in range(len(rates)):
        rate = rates[k]
        v = rate / (2 - rate)
        along = square = 0.0
        for j in range(len(y)):
            along += m[k, j] * y[j]
            square += m[k, j] * m[k, j]
            m[k, j] += rate * (y[j] - m[k, j])
        payoffs[k] = ((1 + along / 2) ** 2 + v * length / 4) / (1 + e * np.sqrt(square) + (s * square + v * size) / 4)


@compiled
def shares(payoffs, cell, prior, bound, rates, counts, totals):
    """pi(c) / m(c), pi half the certified shares and half the counts; then these forget and count the sample."""
    for k in range(len(rates)):
        full = 1 / rates[k]
        payoffs[k] = (prior[cell] * full + counts[k, cell]) / ((full + totals[k]) * bound[cell])
        for c in range(counts.shape[1]):
            counts[k, c] *= 1 - rates[k]
        counts[k, cell] += 1.0
        totals[k] = totals[k] * (1 - rates[k]) + 1.0


@compiled
def grow(r, payoffs):
    """R <- (1 + R) L, capped; returns their sum."""
    total = 0.0
    for b in range(len(r)):
        value = (1 + r[b]) * payoffs[b]
        r[b] = value if value < CAP else CAP
        total += r[b]
    return total


@compiled
def cells(r, cell, hit, miss, weights):
    """The same for bets [b, k] on single cells: the sample's own, where it is one of these, pays `hit`, all others `miss`."""
    total = 0.0
    for b in range(len(r)):
        if cell < r.shape[1]:
            r[b, cell] = min((1 + r[b, cell]) * hit[b, cell], CAP)
            others = grow(r[b, :cell], miss[b, :cell]) + grow(r[b, cell + 1 :], miss[b, cell + 1 :])
            total += weights[b] * (r[b, cell] + others)
        else:
            total += weights[b] * grow(r[b], miss[b])
    return total


@compiled
def repeats(row, block, marks, start, joined, win, lose, weights):
    """R = R_0 lambda + u after the u-th sample of a block. marks: samples of the block so far, whether one repeats another."""
    length, half = marks[0], len(row) // 2  # images agree at their borders, so comparison begins in the middle
    for i in range(length if not marks[1] else 0):
        if np.array_equal(row[half:], block[i, half:]) and np.array_equal(row[:half], block[i, :half]):
            marks[1] = 1
    block[length] = row
    marks[0] = length = length + 1
    total = 0.0
    for b in range(len(start)):
        value = min(start[b] * (win[b] if marks[1] else lose[b]) + length + joined[b], CAP)
        total += weights[b] * value
        if length == DUPLICATE_BLOCK:
            start[b], joined[b] = value, 0.0
    if length == DUPLICATE_BLOCK:
        marks[0] = marks[1] = 0
    return total


@compiled
def events(row, happened, number, threshold, hit, miss, weights, r, named, crossed):
    """Bets [row, b] on one event, each row fed with samples of its own, which have the numbers `number`: the evidence of each row, and where
    its sum crossed the threshold, or `crossed` if it had before."""
    evidence = (weights * r).sum(axis=1)
    for i in range(len(row)):
        c = row[i]
        evidence[c] = 0.0
        for b in range(r.shape[1]):
            r[c, b] = min((1 + r[c, b]) * (hit[c, b] if happened[i] else miss[c, b]), CAP)
            evidence[c] += weights[c, b] * r[c, b]
        if crossed < 0 and evidence.sum() >= threshold:
            crossed = number[i]
            named[evidence.argmax()] = True
        if crossed >= 0:
            named |= evidence >= threshold
    return crossed


@compiled
def lost(k, risen, bound, rho, newest, seen):
    """The most that the newest samples say for the loss of mode k, those of the modes `risen` [K] left out, over how many samples, and by which bet:
    given that a sample is of none of these, k has m_k / (1 - sum m_j) at least. The largest log L over bets and starts, a CUSUM, which rises to x as
    rarely as every e^x samples. bound, rho, newest, seen: as of `riser`."""
    left, most, best, bet = 1.0, 0.0, 0, 0
    for j in range(len(bound)):
        left -= bound[j] if risen[j] else 0.0
    if risen[k] or bound[k] >= left:
        return most, best, bet
    m = bound[k] / left
    for b in range(len(rho)):
        gain, miss = 0.0, np.log((1 - rho[b] * m) / (1 - m))
        for i in range(min(max(seen, 0), len(newest))):
            c = newest[(seen - 1 - i) % len(newest)]
            if c == k:
                if rho[b] == 0.0:
                    break
                gain += np.log(rho[b])
            elif not (0 <= c < len(bound) and risen[c]):
                gain += miss
            if gain > most:
                most, best, bet = gain, i + 1, b
    return most, best, bet


@compiled
def riser(k, enough, bound, rho, newest, seen):
    """The mode whose coming too often explains that mode k looks lost, -1 where none does; newest: a ring of the last on-manifold samples'
    modes, of which `seen` ever came; bound [K]: lower ones of the certified shares; rho: what each bet says is left of k.

    The bet and the start are those with most to say: log L = n_k log rho + (n - n_k) log((1 - rho m) / (1 - m)) over the samples since. Of
    the same samples, those that are not of mode j say what is left of it: given that, k has m / (1 - m_j). If j has risen and the others share
    the rest as ever, that is as certified, and next to nothing is left, while of what was lost to j most is: -log(1 - .11) of 80 %
    of all samples against -log(1 - .1), where one of ten modes has taken the mass of another. What is `enough` by itself is never next to
    nothing, and where less than EXPECTED of k would be among the other samples, they cannot tell, and j explains nothing; nor does the
    other one of two modes.
    """
    modes = len(bound)
    if modes < 3:
        return -1
    counts, (most, best, bet) = np.zeros(modes), lost(k, np.zeros(modes, np.bool_), bound, rho, newest, seen)
    for i in range(best):
        c = newest[(seen - 1 - i) % len(newest)]
        if 0 <= c < modes:
            counts[c] += 1
    found, least = -1, min(LEFT * most, enough)
    for j in range(modes):
        given = bound[k] / (1 - bound[j]) if j != k and bound[j] < 1 else 1.0
        if given < 0.9:
            left = (best - counts[j] - counts[k]) * np.log((1 - rho[bet] * given) / (1 - given))
            left += counts[k] * np.log(rho[bet]) if counts[k] > 0 else 0.0
            if left < least and (best - counts[j]) * given >= EXPECTED:
                found, least = j, left
    return found


@compiled
def name(group, now, threshold, named, r_modes, mode_weights, drops, bound, rho, newest, seen):
    """Name a group; but in place of a mode that is accused of being lost by draws of the whole law, and only looks so beside another one that
    comes too often, that other one; unless it is not looked at `now`. Once modes are known to have risen, it takes as much as the alarm itself, for
    each of the modes, from the samples of all others to accuse one. Given a class, what it makes is asked for by name: that another mode takes its place
    is its loss."""
    modes = r_modes.shape[2]
    k = group - (len(named) - 2 * modes - 1)
    if 0 <= k < modes:
        whole = given = 0.0
        for b in range(drops):
            whole += mode_weights[0, b] * r_modes[0, b, k]
            for c in range(1, len(r_modes)):
                given += mode_weights[c, b] * r_modes[c, b, k]
        if whole >= given:
            if not now:
                return
            rises = named[len(named) - modes - 1 : len(named) - 1]
            if rises.any():
                if lost(k, rises, bound, rho, newest, seen)[0] >= np.log(threshold * modes * len(rho)):
                    named[group] = True
                return
            risen = riser(k, np.log(CONVINCING * modes), bound, rho, newest, seen)
            if risen >= 0:
                named[group + modes + risen - k] = True
                return
    named[group] = True


@compiled
def grouped(evidence, r, weights, group, sums, r_modes, mode_weights, drops):
    """evidence [g]: sum of w R for each of the few kinds, duplicates, the loss of each mode, the rise of each, quality."""
    evidence[:] = 0.0
    for b in range(len(r)):
        evidence[group[b]] += weights[b] * r[b]
    modes = r_modes.shape[2]
    first = len(evidence) - 2 * modes - 1
    evidence[first - 1], evidence[-1] = sums[1], sums[2]
    for given in range(len(r_modes)):
        for b in range(r_modes.shape[1]):
            for k in range(modes):
                evidence[first + k if b < drops else first + modes + k] += mode_weights[given, b] * r_modes[given, b, k]


@compiled
def eat(
    scores, features, cell, given, rows, number, threshold,
    edges, table, centre, scale, radius, mean, rates, moments, prior, share_bound, share_rates, weights, group,
    hit, miss, mode_weights, drops, bound, rho, quality_hit, quality_miss, quality_weights, win, lose, repeat_weights,
    r, m, counts, totals, r_modes, r_quality, sums, start, joined, block, marks, newest, seen, named, crossed,
):  # fmt: skip
    """Feed n samples; returns the total evidence after each, and where it crossed the threshold, or `crossed` if it had before.

    given: 0 for a draw of the whole law, c + 1 for one of class c, which the bets given that class alone look at; number [n]: of each sample.
    """
    found = np.empty(len(cell))
    payoffs, y, evidence = np.empty(len(r)), np.empty(len(mean)), np.empty(len(named))
    tilts, bets = edges.shape[0] * table.shape[2], table.shape[2]
    modes = r_modes.shape[2]
    for i in range(len(cell)):
        if given[i] == 0:
            for s in range(edges.shape[0]):
                beyond = 0
                for e in range(edges.shape[1]):
                    beyond += edges[s, e] < scores[i, s]
                payoffs[s * bets : (s + 1) * bets] = table[s, beyond]
            whitened(y, features[i], centre, scale, radius, mean)
            moved(payoffs[tilts : tilts + len(rates)], y, m, rates, moments)
            shares(payoffs[tilts + len(rates) :], cell[i], prior, share_bound, share_rates, counts, totals)
            grow(r, payoffs)
            sums[0] = 0.0
            for b in range(len(r)):
                sums[0] += weights[b] * r[b]
            sums[1] = repeats(rows[i], block, marks, start, joined, win, lose, repeat_weights)
            sums[2] = cells(r_quality, cell[i], quality_hit, quality_miss, quality_weights)
        if cell[i] < modes:  # elsewhere R stays
            sums[3 + given[i]] = cells(r_modes[given[i]], cell[i], hit[given[i]], miss[given[i]], mode_weights[given[i]])
            if given[i] == 0:
                newest[seen[0] % len(newest)] = cell[i]
                seen[0] += 1
        found[i] = sums.sum()
        if crossed >= 0 or found[i] >= threshold:
            grouped(evidence, r, weights, group, sums, r_modes, mode_weights, drops)
            if crossed < 0:
                crossed = number[i]
                name(evidence.argmax(), True, threshold, named, r_modes, mode_weights, drops, bound, rho, newest, seen[0])
            looks = number[i] % (EVERY * max(1, modes // 16)) == 0
            for g in range(len(named)):
                if evidence[g] >= threshold and not named[g]:
                    name(g, looks, threshold, named, r_modes, mode_weights, drops, bound, rho, newest, seen[0])
    return found, crossed
