"""The monitoring benchmark: `make bench-monitoring`. Ours and its rivals on the same streams at equal measured run length.

    python tests/benchmarks/bench_monitoring.py [--quick] [--out DIR] [--arl 10000] [--bundle DIR] [--only delays,lengths,modes,cost,nulls,intervals]

delays: mean samples from a change to the alarm, detectors warm (300 samples of the old law first), thresholds such that the
    measured mean run length without a change is 1,000 (--arl 10000: the best of them at ten times that). A run without an alarm
    counts with the horizon and is shown as a miss. Every chunk of streams has its own reference, so that results are averaged
    over references too. --bundle adds the features of a certified generator as one more space.
lengths: run lengths of ours at its own threshold, guaranteed (strict) and calibrated, over independent certificates;
    alibi-detect's at the threshold which it calibrates for the same.
modes: delay of ours when one of K equal modes drops, at its own threshold 1e4, against log A / KL; and of the bets on modes alone,
    where the null is known exactly.
cost: microseconds a sample and thread.
nulls: alarms of ours at A = 1e9 in ten million samples without a change, and what memory grew meanwhile.
intervals: how often an `exact` interval misses the truth at any sample of a block, each looked at; the same of `asymptotic` ones.

Ours has one configuration in all rows: strict, whole default mixture, certificate of N_cert samples; rivals have the reference
that they are published with, 1,000 samples. That is what each can use, and it favours ours; those that can use more are shown
with N_cert samples too. Streams with an alarm in samples 101 .. 300 are left out, for every method alike. `oracle` is the CUSUM
that knows both laws. Rows are kept as they are made, under DIR: a run that was broken off goes on where it stood.
The packages river, frouros and alibi-detect run in a venv of their own (foreign.py); the others come from their papers (rivals.py).

What takes time in ours (d = 64, K = 1,000, with two scores): a third of batch 1 is the pass itself, the rest handing it 40 arrays; of the
pass, two thirds are the 7,000 bets on modes, which are bound by memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from numpy import ndarray  # noqa: E402
from scipy.special import rel_entr  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from rivals import CERTIFIED, RIVALS, mewma  # noqa: E402
from gaussians import distances, draw, embedded, kid  # noqa: E402
from scenarios import SPACES, Space, certify, served, streams  # noqa: E402

from monitoring import kernel  # noqa: E402
from monitoring.asymptotic import READINGS, Real, frechet_interval, moments_spread  # noqa: E402
from monitoring.calibration import Calibration  # noqa: E402
from monitoring.coverage import RHO, mode_coverage  # noqa: E402
from monitoring.divergences import DIVERGENCES, INTERVALS, ShareSet  # noqa: E402
from monitoring.edetectors import EDetector, Modes  # noqa: E402
from monitoring.monitor import GAUGE_DELTA, PRIOR_SAMPLES  # noqa: E402
from monitoring.points import Embedding, directions, kernel_distance, sliced_wasserstein  # noqa: E402
from monitoring.sketches import HALF_LIFE, NEWEST  # noqa: E402
from training.bundle import AMBIGUITY, NEARER_TRAIN, NEAREST_TRAIN, Certificate, Reference, clopper_pearson  # noqa: E402
from training.moments import frechet  # noqa: E402

certified = cache(certify)
WARM, QUIET = 300, 100
SCORES = ("manifold_distance", "radius", AMBIGUITY, NEAREST_TRAIN, NEARER_TRAIN)  # as labelled data have them
FOREIGN = ROOT / ".ganwatch" / "bench-venv" / "bin" / "python"
PACKAGES = {  # chunks, and streams of each, at most: hours otherwise
    "adwin": (2, 25),
    "kswin": (2, 25),
    "page_hinkley_all": (2, 50),
    "frouros": (2, 50),
    "alibi": (1, 50),
    "alibi_cvm": (1, 50),
}
LONG = ("ours", "oracle", "mewma", "page_hinkley", "newma", "mmdew", "certified")  # of the run length of 10,000
AIMS = {  # at a run length of 1,000; None: the best rival of the row
    "gauss": {"0.7 N(0, 4I)": 1.6, "0.3 N(0, 4I)": 4.0, "mean + 0.3": 18, "variance x 0.8": 27, "5 % N(0, 9I)": 21},
    "grid": {"one mode of 25 drops": 160},
    "grid-16": {"one mode of 25 drops": 260},
    "grid-40": {"one mode of 25 drops": 260},
    "digits": {"one class of 10 drops": 105},
}


def ours(space: Space, seed: int, count: int, parts: list[ndarray]) -> list[ndarray]:
    """log evidence of the whole default mixture, [time, stream] for each of the parts."""
    eye, certificate, reference = certify(space, seed, count)
    names = tuple(map(str, range(eye.count)))
    found = []
    for x in parts:
        paths = []
        for s in range(x.shape[1]):
            scores, features, cells = eye.look(x[:, s])
            detector = EDetector(certificate, reference, names, threshold=1e300, scores=eye.scores)
            paths.append(detector.update(scores, features, cells, np.arange(len(x)), index=0))
        found.append(np.log(np.stack(paths, axis=1)))
    return found


def foreign(method: str, reference: ndarray, parts: list[ndarray]) -> dict[str, list[ndarray]]:
    """A detector of river, frouros or alibi-detect over the streams of each part, in their own venv and process."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/in.npz", reference=reference, **{f"x{i}": x for i, x in enumerate(parts)})
        subprocess.run([FOREIGN, Path(__file__).with_name("foreign.py"), method, f"{folder}/in.npz", f"{folder}/out.npz"], check=True)
        with np.load(f"{folder}/out.npz") as data:
            labels = dict.fromkeys(key.rpartition("|")[0] for key in data)
            return {label: [data[f"{label}|{i}"] for i in range(len(parts))] for label in labels}


def oracle(space: Space, parts: list[ndarray]) -> dict[str, list[ndarray]]:
    """CUSUM of the true likelihood ratio; one method a change, as each oracle knows one change only."""
    found = {}
    for i, change in enumerate(space.changes):
        if change.oracle is None:
            continue
        paths = []
        for x in parts:
            level, path = np.zeros(x.shape[1]), np.empty(x.shape[:2])
            for t, step in enumerate(change.oracle(x)):
                level = np.maximum(level, 0) + step
                path[t] = level
            paths.append(path)
        found[f"oracle {i}"] = paths
    return found


def measure(name: str, space: Space, chunk: int, size: int, count: int, arl: int, methods: tuple[str, ...], out: Path) -> None:
    """Statistics of each method on the null and on every change, kept in one file a method and chunk."""
    missing = [m for m in methods if chunk < PACKAGES.get(m, (99,))[0] and not (out / f"{name}.{chunk}.{m}.npz").exists()]
    if not missing:
        return
    parts = [streams(space, 1000 + chunk, size, WARM, arl * 3 // 2)]
    parts += [streams(space, 2000 + 100 * i + chunk, size, WARM, c.horizon, c) for i, c in enumerate(space.changes)]
    rng = np.random.default_rng((chunk, 5))
    reference = space.draw(rng, 1000, 0)
    large = space.draw(rng, count, 0) if "certified" in missing else reference
    for method in missing:
        begin = time.perf_counter()
        found: dict[str, list[ndarray]] = {}
        if method == "ours":
            found["ours"] = ours(space, chunk, count, parts)
        elif method == "oracle":
            found = oracle(space, parts)
        elif method in PACKAGES:
            found = foreign(method, reference, [x[:, : PACKAGES[method][1]] for x in parts])
        else:
            for x in parts:
                for label, path in (RIVALS | CERTIFIED)[method](large if method == "certified" else reference, x).items():
                    found.setdefault(label, []).append(path)
        flat = {f"{label}|{i}": path.astype(np.float32) for label, paths in found.items() for i, path in enumerate(paths)}
        staged = out / f"{name}.{chunk}.{method}.partial.npz"
        np.savez_compressed(staged, **flat)
        staged.rename(out / f"{name}.{chunk}.{method}.npz")
        print(f"{name} chunk {chunk} {method}: {time.perf_counter() - begin:.0f} s", flush=True)


def run_length(path: ndarray, threshold: float) -> tuple[float, int]:
    """Samples per alarm, runs cut at their end, and the number of alarms. path [time, stream], after the warm-up."""
    over = path >= threshold
    alarmed = over.any(axis=0)
    return np.where(alarmed, over.argmax(axis=0) + 1, len(over)).sum() / max(1, alarmed.sum()), int(alarmed.sum())


def fitted(path: ndarray, arl: float) -> float:
    """The threshold at which the run length is `arl`, or the next above it."""
    peaks = np.unique(np.maximum.accumulate(path, axis=0))
    low, high = 0, len(peaks) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if run_length(path, peaks[middle])[0] >= arl else (middle + 1, high)
    return float(peaks[low])


def delay(path: ndarray, threshold: float) -> dict[str, float]:
    quiet = ~(path[QUIET:WARM] >= threshold).any(axis=0)
    over = path[WARM:, quiet] >= threshold
    alarmed = over.any(axis=0)
    samples = np.where(alarmed, over.argmax(axis=0) + 1, len(over))
    error = samples.std() / np.sqrt(max(1, len(samples)))
    return {"delay": float(samples.mean()), "error": float(error), "missed": float(1 - alarmed.mean()), "runs": int(quiet.sum())}


def delays(
    spaces: dict[str, Callable[[], Space]], chunks: int, size: int, count: int, arl: int, methods: tuple[str, ...], out: Path
) -> list[dict]:
    rows = []
    for name, make in spaces.items():
        space = make()
        for chunk in range(chunks):
            measure(name, space, chunk, size, count, arl, methods, out)
        joined: dict[str, list[list[ndarray]]] = {}
        for path in sorted(out.glob(f"{name}.*.npz")):
            with np.load(path) as data:
                for key in data:
                    label, part = key.rsplit("|", 1)
                    joined.setdefault(label, [[] for _ in range(1 + len(space.changes))])[int(part)].append(data[key])
        for label, parts in joined.items():
            null, *changed = (np.concatenate(part, axis=1) for part in parts)
            threshold = fitted(null[WARM:], arl)
            length, alarms = run_length(null[WARM:], threshold)
            checked, _ = run_length(np.concatenate([path[QUIET:WARM] for path in changed], axis=1), threshold)  # streams of other seeds, before they change
            row = {"space": name, "method": label.split(" ")[0] if label.startswith("oracle") else label}
            for i, (change, path) in enumerate(zip(space.changes, changed, strict=True)):
                if not label.startswith("oracle") or label == f"oracle {i}":
                    found = {"change": change.name, "threshold": threshold, "arl": length, "alarms": alarms, "arl_checked": checked, **delay(path, threshold)}
                    if label == "ours":
                        found |= {"guaranteed_" + k: v for k, v in delay(path, float(np.log(arl))).items()}
                    rows.append(row | found)
        for change in space.changes:
            missed = float((1 - 1 / arl) ** change.horizon)
            rows.append({"space": name, "method": "dummy", "change": change.name, "arl": arl, "delay": arl * (1 - missed), "missed": missed})
    return rows


def judged(rows: list[dict], arl: int) -> list[dict]:
    """Ours in each row against its aim, which is the best rival where none is stated for this run length, and against the best rival."""
    found = []
    for mine in (r for r in rows if r["method"] == "ours"):
        others = [r for r in rows if (r["space"], r["change"]) == (mine["space"], mine["change"]) and r["method"] not in ("ours", "oracle", "dummy")]
        best = min(others, key=lambda r: r["delay"], default=None)
        aim = (AIMS if arl == 1000 else {}).get(mine["space"], {}).get(mine["change"], best and best["delay"])
        if aim is not None:
            rival = {"rival": best["method"], "its": best["delay"]} if best else {"rival": "-", "its": float("nan")}
            found.append({k: mine[k] for k in ("space", "change", "delay", "error")} | rival | {"aim": aim, "met": mine["delay"] <= aim})
    return found


def lengths(space: Space, certificates: int, runs: int, arl: float, count: int, *, calibrated: bool = False) -> dict:
    """Run lengths of ours at its own threshold, at most 20 A; the lower 99 % bound of their mean by the bootstrap over certificates,
    for runs that share one are alike.

    calibrated: at the threshold that simulated runs give, of each certificate's own.
    """
    found = []
    for seed in range(certificates):
        eye, certificate, reference = certified(space, 500 + seed, count)
        detector = EDetector(certificate, reference, tuple(map(str, range(eye.count))), threshold=arl, scores=eye.scores)
        rng = np.random.default_rng((seed, 9))
        if calibrated:
            calibration = Calibration(detector, arl=arl)
            while calibration.slack is None:
                scores, features, cells = eye.look(space.draw(rng, 4096, 0))
                calibration.feed(scores, features, cells, rng.random(len(cells)))
            detector.threshold = arl / calibration.slack
        for _ in range(runs):
            detector.restart()
            done = 0
            while detector.crossed is None and done < 20 * arl:
                scores, features, cells = eye.look(space.draw(rng, 2048, 0))
                detector.update(scores, features, cells, np.arange(done, done + len(cells)), index=done)
                done += len(cells)
            found.append(done if detector.crossed is None else detector.crossed + 1)
    of_each = np.reshape(found, (certificates, runs)).mean(axis=1)
    means = np.random.default_rng(0).choice(of_each, (2000, certificates)).mean(axis=1)
    mode = "calibrated" if calibrated else "strict"
    return {"method": f"ours, {mode},", "asked": arl, "measured": float(np.mean(found)), "low_99": float(np.quantile(means, 0.01)), "runs": len(found), "N_cert": count}


def foreign_lengths(references: int, size: int) -> dict:
    """Run length of alibi-detect's MMD at the threshold that its bootstrap gives for 1,000, over references. Runs are cut at 2,500."""
    space, exposure, alarms = SPACES["gauss"](), 0, 0
    for seed in range(references):
        reference = space.draw(np.random.default_rng((seed, 5)), 1000, 0)
        for (path,) in foreign("own", reference, [streams(space, 9000 + seed, size, 0, 2500)]).values():
            first = np.where(path.any(axis=0), path.argmax(axis=0) + 1, len(path))
            exposure, alarms = exposure + first.sum(), alarms + path.any(axis=0).sum()
    return {"method": "alibi-detect MMD 25, own threshold", "asked": 1000.0, "measured": float(exposure / max(1, alarms)), "runs": references * size}


def blank(modes: int, width: int, count: int, rng: np.random.Generator) -> tuple[Certificate, Reference, tuple[str, ...]]:
    """Equal modes; uniform scores, as many as of labelled data, and normal features that nothing moves."""
    levels = 2.0 ** -np.arange(1.0, 17.0)
    share = np.append(np.full(modes, 0.999 / modes), 0.001)
    hits, s = rng.binomial(count, np.tile(levels, (2, len(SCORES), 1))), len(SCORES)
    y = rng.standard_normal((20_000, width))
    one = np.zeros(1, np.int64)
    certificate = Certificate(
        count, 0.01, rng.multinomial(count, share), levels, np.tile(1 - levels, (s, 1)), hits[0], np.tile(levels, (s, 1)), hits[1],
        count // 32, 0, np.zeros(width), np.eye(width), one, one, np.zeros((1, width)), np.zeros(width), np.eye(width),
        float(np.quantile(np.linalg.norm(y, axis=1), 0.999)), np.zeros(width), np.eye(width),
    )  # fmt: skip
    empty = np.zeros((0, width), np.float32)
    return certificate, Reference(count, share, np.zeros(width), np.eye(width), empty, empty), tuple(map(str, range(modes)))


def dropped(modes: int, runs: int, arl: float = 1e4, count: int = 1_000_000) -> dict:
    rng, found = np.random.default_rng(modes), []
    for _ in range(runs):
        certificate, reference, names = blank(modes, 4, count, rng)
        detector = EDetector(certificate, reference, names, threshold=arl, scores=SCORES)
        warm = 3 * modes + 300
        done = 0
        while detector.crossed is None and done < warm + 100 * modes:
            n = min(warm - done if done < warm else 2048, 2048)
            cells = rng.integers(modes - (done >= warm), size=n)
            scores = rng.random((n, len(SCORES)))
            detector.update(scores, rng.standard_normal((n, 4)), cells, np.arange(done, done + n), index=done)
            done += n
        if detector.crossed is None or detector.crossed >= warm:
            found.append((done if detector.crossed is None else detector.crossed + 1) - warm)
    floor = np.log(arl) / -np.log1p(-1 / modes)
    return {"modes": modes, "delay": float(np.mean(found)), "floor": float(floor), "ratio": float(np.mean(found) / floor), "runs": len(found)}


def dropped_alone(modes: int, runs: int, arl: float = 1e4) -> dict:
    """The same for the bets on modes alone, the whole budget theirs, where the null is known exactly: so many samples were certified
    that no bound lies off its share."""
    rng, found = np.random.default_rng(modes), []
    certificate, reference, _ = blank(modes, 4, 10**15, rng)
    bets = Modes(replace(certificate, cell_count=np.append(np.full(modes, 999 * 10**12 // modes), 10**12)), reference)
    weights, warm = bets.weights[0] / (bets.weights[0] @ bets.shares.allowed[0].sum(axis=1)), 3 * modes + 300
    for _ in range(runs):
        r, stream = np.zeros(bets.shares.hit[0].shape), np.concatenate([rng.integers(modes, size=warm), rng.integers(modes - 1, size=100 * modes)])
        over = (t for t, cell in enumerate(stream) if kernel.cells(r, cell, bets.shares.hit[0], bets.shares.miss[0], weights) >= arl)
        if (crossed := next(over, len(stream))) >= warm:
            found.append(crossed + 1 - warm)
    floor = np.log(arl) / -np.log1p(-1 / modes)
    return {"modes": modes, "delay": float(np.mean(found)), "floor": float(floor), "ratio": float(np.mean(found) / floor), "runs": len(found), "alone": True}


def cost(modes: int = 1000, width: int = 64) -> list[dict]:
    """Best of five, in CPU time, which other processes disturb less than they do the clock."""
    rng = np.random.default_rng(0)
    certificate, reference, names = blank(modes, width, 1_000_000, rng)
    begin = time.process_time()
    detector = EDetector(certificate, reference, names, threshold=1e12, scores=SCORES)
    rows = [{"method": "ours, set-up", "seconds": time.process_time() - begin}]
    n = 6400
    x, scores, cells = rng.standard_normal((n, width), np.float32), rng.random((n, len(SCORES)), np.float32), rng.integers(modes, size=n)
    for batch, total in ((1, 1600), (64, n)):
        taken = []
        for _ in range(5):
            begin = time.process_time()
            for i in range(0, total, batch):
                part = slice(i, i + batch)
                detector.update(scores[part], x[part], cells[part], x[part], index=i)
            taken.append((time.process_time() - begin) / total)
        rows.append({"method": f"ours, d = {width}, K = {modes}, batch {batch}", "us": 1e6 * min(taken)})
    reference20, stream = rng.standard_normal((1000, 20)).astype(np.float32), rng.standard_normal((600, 1, 20)).astype(np.float32)
    singles = {"MEWMA 0.1, d = 20, batch 1": lambda: mewma(reference20, stream, rate=0.1)}
    singles |= {f"{m}, d = 20, batch 1 (all of its rows)": lambda m=m: RIVALS[m](reference20, stream) for m in RIVALS if m != "mewma"}
    for label, run in singles.items():
        begin = time.process_time()
        run()
        rows.append({"method": label, "us": 1e6 * (time.process_time() - begin) / len(stream)})
    return rows


def nulls(total: int, arl: float = 1e9) -> dict:
    """Samples of the certified law of 25 modes at threshold `arl`: alarms, and the growth of memory once warm."""
    space = SPACES["grid"]()
    eye, certificate, reference = certify(space, 900, 1_000_000)
    detector, rng = EDetector(certificate, reference, tuple(map(str, range(eye.count))), threshold=arl, scores=eye.scores), np.random.default_rng(11)
    alarms, start = 0, 0
    for done in range(0, total, 10_000):
        scores, features, cells = eye.look(space.draw(rng, 10_000, 0))
        detector.update(scores, features, cells, np.arange(done, done + 10_000), index=done)
        if detector.crossed is not None:
            alarms += 1
            detector.restart()
        if done == 200_000:
            start = psutil.Process().memory_info().rss
    return {"asked": arl, "samples": total, "alarms": alarms, "rss_growth": psutil.Process().memory_info().rss / start - 1}


def intervals(runs: int, block: int = 2000, modes: int = 10) -> list[dict]:
    """In how many runs a statement about the shares was false at any time within its block, one mode being at a tenth of its share.

    The set of shares is looked at after every sample, what is derived from it after every fiftieth; low_99 is the lower 99 % bound.
    `pointwise` promises nothing to somebody who looks all the time: its rate is printed for comparison.
    """
    p = np.append(np.full(modes, 0.98 / modes), 0.02)
    truth = p * np.append([0.1], np.ones(modes))
    truth /= truth.sum()
    exact = {name: measure(p, truth) for name, measure in DIVERGENCES.items()}
    covered = (truth[:-1] >= RHO * p[:-1]).mean()
    priors = np.stack([np.full(modes + 1, 0.5), 0.5 + PRIOR_SAMPLES * p])  # the monitor's
    missed = dict.fromkeys(("set of shares", "bounds of cells", *exact, "modes covered", "pointwise bounds of cells"), 0)
    for run in range(runs):
        counts = np.cumsum(np.random.default_rng((run, 13)).multinomial(1, truth, size=block), axis=0)
        wrong: set[str] = set()
        for n in range(block):
            shares = ShareSet.observed(counts[n], priors=priors, delta=GAUGE_DELTA)
            if rel_entr(shares.centre, truth).sum() > shares.radius:
                wrong.add("set of shares")
            if (n + 1) % 50:
                continue
            point = ShareSet.pointwise(counts[n].astype(float), count=float(n + 1), delta=GAUGE_DELTA)
            coverage = mode_coverage(p, shares)
            stated = {name: INTERVALS[name](p, shares) for name in exact} | {"modes covered": (coverage.low, coverage.high)}
            true = exact | {"modes covered": covered}
            wrong |= {name for name, (low, high) in stated.items() if not low <= true[name] <= high}
            for name, found in (("bounds of cells", shares), ("pointwise bounds of cells", point)):
                wrong |= {name} if ((truth < found.low) | (truth > found.high)).any() else set()
        for name in wrong:
            missed[name] += 1
    low = {name: float(clopper_pearson(hits, runs, 0.02)[0]) for name, hits in missed.items()}
    return [{"interval": name, "missed": hits / runs, "low_99": low[name], "delta": GAUGE_DELTA, "runs": runs} for name, hits in missed.items()]


def asymptotic_intervals(runs: int, width: int = 8, block: int = 4096) -> list[dict]:
    """In how many runs an `asymptotic` interval missed the truth at any look within its block, and how wide it was at the end.

    Normal features, of which every distance is known: served as real, and served with another mean and scale; and features with
    Student's tails, 6 degrees of freedom, of which the Frechet distance is. That is looked at after every 64th sample, the real
    moments being given; the others whenever the monitor reads them, from the newest 512 points, against 1,024 real ones that each
    run draws anew. most: a width beyond which an interval would say nothing.
    """
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((width, width)))[0]
    real = (np.zeros(width), (turn * np.geomspace(3, 0.1, width)) @ turn.T)
    rows = []
    moved = (real[0] + 0.4, 1.3 * real[1])
    for name, law, freedom in (("served = real", real, None), ("moved and wider", moved, None), ("moved, heavy tails", moved, 6)):
        true = distances(real, law, directions(width))
        true = true if freedom is None else {"frechet": true["frechet"]}
        missed, widths = dict.fromkeys(true, 0), dict.fromkeys(true, 0.0)
        for run in range(runs):
            rng, wrong = np.random.default_rng((run, 17)), set()
            x, points = draw(rng, block, law, freedom), Real(draw(rng, 1024, real))
            stated: dict[str, tuple[float, float]] = {}
            for n in range(64, block + 1, 64):
                if n & (n - 1) == 0:
                    newest = x[max(0, n - NEWEST) : n]
                    spread = moments_spread(newest)
                    for gauge, estimate, interval in (
                        ("kid", kernel_distance, points.kid_interval), ("sliced_wasserstein", sliced_wasserstein, points.sliced_wasserstein_interval)
                    ):  # fmt: skip
                        if gauge in true:
                            stated[gauge] = interval(estimate(newest, points.points), newest, delta=GAUGE_DELTA / READINGS)
                mean, covariance = x[:n].mean(axis=0, dtype=np.float64), np.cov(x[:n].T.astype(np.float64), bias=True)
                stated["frechet"] = frechet_interval(frechet(*real, mean, covariance)[0], spread.reach(n, delta=GAUGE_DELTA))
                wrong |= {gauge for gauge, (low, high) in stated.items() if not low <= true[gauge] <= high}
            for gauge, (low, high) in stated.items():
                missed[gauge] += gauge in wrong
                widths[gauge] += (high - low) / runs
        scale = {"frechet": float(np.trace(real[1])), "kid": kid(real, (real[0] + 1, real[1])), "sliced_wasserstein": 1.0}
        for gauge, hits in missed.items():
            low = float(clopper_pearson(hits, runs, 0.02)[0])
            row = {"interval": f"{gauge}, {name}", "true": true[gauge], "width": widths[gauge], "most": scale[gauge]}
            rows.append(row | {"missed": hits / runs, "low_99": low, "delta": GAUGE_DELTA, "runs": runs})
    return rows


def embedded_intervals(runs: int, width: int = 8, block: int = 4096) -> list[dict]:
    """The same of the MMD, whose bounds hold for any number of samples: `exact` looked at after every sample from the second on, and
    `pointwise` (of decaying weights) once, at the end. The kernel depends on 512 real points and the
    mean on 1,024 others, drawn anew by each run, and so does the truth.
    """
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((width, width)))[0]
    real = (np.zeros(width), (turn * np.geomspace(3, 0.1, width)) @ turn.T)
    rows, weight = [], 0.5 ** (np.arange(block)[::-1] / HALF_LIFE)
    for name, law in (("served = real", real), ("moved and wider", (real[0] + 0.4, 1.3 * real[1]))):
        missed, widths, truths = {"exact": 0, "pointwise": 0}, {"exact": 0.0, "pointwise": 0.0}, 0.0
        for run in range(runs):
            rng = np.random.default_rng((run, 19))
            embedding = Embedding(draw(rng, 1024, real), width_from=draw(rng, 512, real))
            true = float(np.linalg.norm(embedded(real, embedding.frequencies) - embedded(law, embedding.frequencies)))
            psi = embedding(draw(rng, block, law)).astype(np.float64)
            sums = np.cumsum(psi, axis=0)
            exact = np.array([embedding.mmd(sums[n - 1], n, delta=GAUGE_DELTA)[1:] for n in range(2, block + 1)])
            point = embedding.mmd_now(weight @ psi, float(weight.sum()), float(weight @ weight), delta=GAUGE_DELTA)[1:]
            missed["exact"] += bool(((exact[:, 0] > true) | (exact[:, 1] < true)).any())
            missed["pointwise"] += not point[0] <= true <= point[1]
            for kind, (low, high) in (("exact", exact[-1]), ("pointwise", point)):
                widths[kind] += float(high - low) / runs
            truths += true / runs
        for kind, hits in missed.items():
            row = {"interval": f"{kind} mmd, {name}", "true": truths, "width": widths[kind], "most": 2.0, "missed": hits / runs}
            rows.append(row | {"low_99": float(clopper_pearson(hits, runs, 0.02)[0]), "delta": GAUGE_DELTA, "runs": runs})
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for space in dict.fromkeys(r["space"] for r in rows):
        mine = [r for r in rows if r["space"] == space]
        changes = list(dict.fromkeys(r["change"] for r in mine))
        lines += ["", f"{space}: mean delay (misses) at measured ARL", f"| method | {' | '.join(changes)} | ARL | on other seeds |", "|---" * (len(changes) + 3) + "|"]
        for method in dict.fromkeys(r["method"] for r in mine):
            cells, lengths, checked = [], [], []
            for change in changes:
                row = next((r for r in mine if r["method"] == method and r["change"] == change), None)
                missed = f" ({row['missed']:.0%})" if row and row["missed"] >= 0.005 else ""
                cells.append(f"{row['delay']:.1f}{missed}" if row else "-")
                lengths += [row["arl"]] if row else []
                checked += [row["arl_checked"]] if row and "arl_checked" in row else []
            lines.append(f"| {method} | {' | '.join(cells)} | {np.mean(lengths):.0f} | {f'{np.mean(checked):.0f}' if checked else '-'} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Delay of each method in each change, as a part of the dummy's: one row of dots a change, drawn as plain SVG."""
    changes = list(dict.fromkeys((r["space"], r["change"]) for r in rows))
    marks, colours = [], {"ours": "#c02020", "oracle": "#208040"}
    for i, key in enumerate(changes):
        y = 40 + 26 * i
        mine = [r for r in rows if (r["space"], r["change"]) == key and r["method"] != "dummy"]
        marks.append(f'<text x="8" y="{y + 4}">{key[0]}: {key[1]}</text><line x1="230" x2="900" y1="{y}" y2="{y}" stroke="#ddd"/>')
        for r in mine:
            x, colour = 230 + 670 * np.log(max(1.0, r["delay"])) / np.log(2000), colours.get(r["method"], "#8090a0")
            marks.append(f'<circle cx="{x:.1f}" cy="{y}" r="{6 if r["method"] in colours else 4}" fill="{colour}" fill-opacity=".7"><title>{r["method"]}: {r["delay"]:.1f}</title></circle>')
    ticks = [f'<text x="{230 + 670 * np.log(v) / np.log(2000):.0f}" y="20">{v}</text>' for v in (1, 3, 10, 30, 100, 300, 1000)]
    height = 60 + 26 * len(changes)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{height}" font-family="sans-serif" font-size="12">{"".join(ticks + marks)}</svg>')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two chunks of 25 streams, three spaces, certificates of 200,000 samples")
    parser.add_argument("--out", type=Path, default=ROOT / ".ganwatch" / "bench" / "monitoring")
    parser.add_argument("--only", default="delays,lengths,modes,cost,nulls,intervals")
    parser.add_argument("--arl", type=int, default=1000, help="measured run length at which delays are compared")
    parser.add_argument("--bundle", type=Path, default=None, help="a certified bundle, whose features are one more space")
    parser.add_argument("--spaces", default=None, help="comma separated, of " + ", ".join(SPACES))
    parser.add_argument("--methods", default=None, help="comma separated, of ours, oracle, " + ", ".join((*CERTIFIED, *RIVALS, *PACKAGES)))
    parser.add_argument("--chunks", type=int, default=None, help="references to average over; 8, or 2 with --quick")
    chosen = parser.parse_args()
    length = "" if chosen.arl == 1000 else f"-{chosen.arl}"
    out, count = chosen.out / (("quick" if chosen.quick else "full") + length), 200_000 if chosen.quick else 1_000_000
    out.mkdir(parents=True, exist_ok=True)
    wanted = chosen.only.split(",")
    names = chosen.spaces.split(",") if chosen.spaces else list(SPACES)[: 3 if chosen.quick else None]
    spaces = {name: SPACES[name] for name in names if name}
    if chosen.bundle:
        spaces[f"features of {chosen.bundle.parent.name}"] = lambda: served(chosen.bundle)
    methods = ("ours", "oracle", *CERTIFIED, *RIVALS, *PACKAGES) if chosen.arl <= 1000 else LONG
    methods = tuple(chosen.methods.split(",")) if chosen.methods else methods
    slow = {m for m in methods if m in PACKAGES and (chosen.quick or not FOREIGN.exists())} | ({"mmdew"} if chosen.quick else set())
    if slow and not chosen.methods:
        print("left out" + (", as this is quick: " if chosen.quick else f", as {FOREIGN} is not there: ") + ", ".join(sorted(slow)))
        methods = tuple(m for m in methods if m not in slow)
    print(f"ours: mode strict, whole default mixture, N_cert = {count:,}; rivals: reference of 1,000 samples unless they say otherwise")
    kept = out / "report.json"
    report: dict = (json.loads(kept.read_text()) if kept.exists() else {}) | {"mode": "strict", "N_cert": count, "arl": chosen.arl}

    def keep(name: str, rows: list[dict]) -> list[dict]:
        report[name] = rows
        kept.write_text(json.dumps(report, indent=1))
        return rows

    def each(name: str, parts: dict[str, Callable[[], dict]]) -> list[dict]:
        """A row each, but for those that an earlier run has kept."""
        rows = report.setdefault(name, {})
        for label, make in parts.items():
            if label not in rows:
                rows[label] = make()
                kept.write_text(json.dumps(report, indent=1))
        return [rows[label] for label in parts]

    if "delays" in wanted:
        rows = keep("delays", delays(spaces, chosen.chunks or (2 if chosen.quick else 8), 25 if chosen.quick else 50, count, chosen.arl, methods, out))
        print(table(rows))
        plot(rows, out / "delays.svg")
        print("\n| space: change | ours | best rival | aim | |\n|---|---|---|---|---|")
        for row in keep("judged", judged(rows, chosen.arl)):
            says = f"{row['delay']:.1f} +- {row['error']:.1f} | {row['rival']} {row['its']:.1f} | {row['aim']:.1f} | {'met' if row['met'] else 'MISSED'}"
            print(f"| {row['space']}: {row['change']} | {says} |")
    if "lengths" in wanted:
        certificates, runs = (4, 10) if chosen.quick else (20, 25)
        space, asked = SPACES["gauss"](), [(arl, calibrated) for calibrated in (False, True) for arl in ((1e3,) if chosen.quick else (1e3, 1e4))]
        parts: dict[str, Callable[[], dict]] = {
            f"{arl:g}{' calibrated' * calibrated}": lambda arl=arl, calibrated=calibrated: lengths(space, certificates, runs, arl, count, calibrated=calibrated)
            for arl, calibrated in asked
        }
        for row in each("lengths", parts | ({"alibi": lambda: foreign_lengths(2, 50)} if FOREIGN.exists() and not chosen.quick else {})):
            bound = f", 99 % lower bound {row['low_99']:,.0f}" if "low_99" in row else ""
            print(f"{row['method']} asked for {row['asked']:,.0f}: {row['measured']:,.0f} over {row['runs']} runs{bound}")
    if "modes" in wanted:
        runs = 10 if chosen.quick else 100
        parts = {f"{k}": lambda k=k: dropped(k, runs) for k in (10, 100, 1000)} | {f"{k} alone": lambda k=k: dropped_alone(k, runs) for k in (10, 25, 100)}
        for row in each("modes", parts):
            whose = "modes alone, exact null" if "alone" in row else "whole mixture"
            print(f"one of {row['modes']} modes drops, A = 1e4, {whose}: {row['delay']:,.0f} samples, {row['ratio']:.2f} x log A / KL")
    if "cost" in wanted:
        for row in keep("cost", cost()):
            print(f"{row['method']}: " + (f"{row['us']:.1f} us a sample" if "us" in row else f"{row['seconds']:.2f} s"))
    if "nulls" in wanted:
        for row in each("nulls", {"grid": lambda: nulls(500_000 if chosen.quick else 10_000_000)}):
            print(f"A = {row['asked']:.0e}, {row['samples']:,} samples without a change: {row['alarms']} alarms, memory {row['rss_growth']:+.1%}")
    if "intervals" in wanted:
        for row in report["intervals"] if "intervals" in report else keep("intervals", intervals(20 if chosen.quick else 500)):
            print(f"interval, {row['interval']}: missed in {row['missed']:.1%} of {row['runs']} runs (at least {row['low_99']:.2%}); allowed {row['delta']:.0%}")
        runs = 20 if chosen.quick else 500
        found = report["asymptotic"] if "asymptotic" in report else keep("asymptotic", asymptotic_intervals(runs))
        for row in (report["embedded"] if "embedded" in report else keep("embedded", embedded_intervals(runs))) + found:
            says, kind = f"{row['true']:.3f}, mean width {row['width']:.3f}", "" if "mmd" in row["interval"] else "asymptotic "
            print(f"{kind}interval, {row['interval']} ({says}): missed in {row['missed']:.1%} of {row['runs']} runs (at least {row['low_99']:.2%}); meant {row['delta']:.0%}")
    print(f"written: {kept}" + (", delays.svg" if "delays" in wanted else ""))


if __name__ == "__main__":
    main()
