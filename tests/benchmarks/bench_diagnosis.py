"""The confusion table: which failure is injected, which one is named. `make bench-monitoring` runs it after the delays.

    python tests/benchmarks/bench_diagnosis.py [--quick] [--registry DIR --model mnist] [--runs 100] [--only "1 % copies,int8 weights"]

A certified generator serves 500 healthy samples; then a fault of `ganwatch inject` takes its place, or clients change their
ways. Each run has seeds of its own and the service's own Watch at A = 1e6, which reads records as replicas send them, 64 samples at a
time: what of it is evidence is told from these alone. Clients ask for eight times as many samples besides, for one class, with seeds of
theirs that they picked for one mode where there are no classes, or for the same eight seeds again and again. Of what is served one sample
in 100 is run again on the certified generator; the golden rows, of which it is the turn once a minute, are asked for again half a
second, 500 samples, after that has raised a suspicion, as the service does it. Where a mode is dropped, it must be named, and nothing that has not lost a fifth of its share or more. A run ends 1,000 samples after the alarm, when its verdict is read, or at the budget: 5,000 samples
after the change, 20,000 for copies and for a tenth of the spread. A run without an alarm counts as wrong, unless none should be.
Where one swells, it and no other must be named as coming too often, by whatever verdict: what is usual of one may be odd of all.
`truncated` has two right answers: it narrows the modes, where the normal latents matter; where signs carry nearly all, as
in the digits recipe, only golden rows can tell, and then it is a wrong model.

Of any certified model that the registry holds, images or vectors; what cannot be injected into it is said and left out.
Rows are kept as they are made, one JSON line a run: what was broken off goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, cycle, islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from numpy import ndarray  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from deploy.inject import InjectError, inject  # noqa: E402
from monitoring.audit import Compared, Comparer, Golden, drawn_classes  # noqa: E402
from monitoring.features import Eye  # noqa: E402
from monitoring.incidents import Incidents  # noqa: E402
from monitoring.reruns import Rerun  # noqa: E402
from monitoring.watch import SHARES, Watch  # noqa: E402
from serving.records import Record  # noqa: E402
from serving.sampler import Sampler, Window  # noqa: E402
from serving.service import RERUN  # noqa: E402
from training.registry import Registry  # noqa: E402

ARL, WARM, SETTLED, BATCH, ROUND = 1e6, 500, 1000, 64, 500
EVERY = round(1 / RERUN)
FED = "records"  # what the monitor was fed, a mark of each row: those that were kept before it was records are made anew


@dataclass(frozen=True)
class Scenario:
    """`right`: verdicts that are right, "healthy" for no alarm at all. `fault`: of `ganwatch inject`, None for none: then what is
    served is what a certified generator of another law would make, see `Stage.altered`."""

    right: tuple[str, ...]
    fault: str | None
    budget: int = 5_000
    squeeze: float = 1.0  # standard deviation within the modes, as a part of what it was
    kept: float = 1.0  # of the samples that are not of one mode, so that this one comes too often
    clients: str = ""  # what they do besides: "one mode" asks for one kind of sample only, "seeds" for the same samples again


SCENARIOS = {
    "one mode drops": Scenario(("mode_dropping",), "drop-modes"),
    "5 % noise": Scenario(("off_manifold",), "off-manifold"),
    "collapse within modes": Scenario(("within_mode_collapse",), "collapse"),
    "truncated latents": Scenario(("within_mode_collapse", "wrong_model"), "truncated"),
    "variance x 0.8": Scenario(("within_mode_collapse",), None, 20_000, squeeze=0.8**0.5),
    "one mode swells": Scenario(("drift", "within_mode_collapse", "off_manifold"), None, kept=0.26),  # from a tenth to three tenths
    "1 % copies": Scenario(("memorisation",), "copies", 20_000),
    "repeating latents": Scenario(("latent_fault",), "latent-fault"),
    "int8 weights": Scenario(("wrong_model",), "int8"),
    "another checkpoint": Scenario(("wrong_model",), "checkpoint"),
    "demand shift": Scenario(("healthy",), None, clients="one mode"),
    "clients repeat seeds": Scenario(("healthy",), None, clients="seeds"),
    "nothing": Scenario(("healthy",), "nothing"),
}


class Stage:
    """A healthy generator and what became of it, in one scenario."""

    def __init__(self, registry: Registry, model: str, version: str, scenario: Scenario) -> None:
        self.scenario, self.healthy = scenario, registry.open(model, version)
        self.names, self.eye = self.healthy.card.modes, Eye(self.healthy)
        self.registry, self.model, self.version = registry, model, version
        self.golden = Golden(self.healthy, self.healthy.model_path.read_bytes())
        self.sampler = Sampler(self.healthy)
        self.broken: dict[str, tuple[Sampler, Compared, set[str]]] = {}  # what was dropped -> who draws then, what becomes of the golden rows, what was lost

    def faulty(self, run: int) -> tuple[Sampler, Compared, set[str]]:
        """The generator after the change, what it makes of the golden rows and which modes it lost; each run drops a mode of its own."""
        mode = self.names[run % len(self.names)] if self.scenario.fault == "drop-modes" else ""
        if mode not in self.broken:
            bundle = self.healthy
            if self.scenario.fault:
                bundle = inject(self.registry, self.model, self.scenario.fault, reference=self.version, labels=(mode,) if mode else ())
            golden, sampler = self.healthy.certificate, Sampler(bundle)
            rows = [sampler.sample([Window(int(s), int(o), 1)]) for s, o in zip(golden.golden_seed, golden.golden_offset, strict=True)]
            self.broken[mode] = (sampler, Comparer(golden).compare(golden.golden_sample, np.concatenate(rows)), self.lost(sampler) if mode else set())
        return self.broken[mode]

    @cached_property
    def means(self) -> ndarray:
        """Of each mode, [K, d], which 5,000 healthy samples tell."""
        healthy = np.concatenate(list(draw(self.sampler, 10**6, 5_000)))
        cells, flat = self.eye.look(healthy).cells, healthy.reshape(len(healthy), -1)
        return np.stack([flat[cells == k].mean(axis=0, dtype=np.float64) if (cells == k).any() else flat.mean(axis=0) for k in range(len(self.names))])

    def shares(self, sampler: Sampler) -> ndarray:
        """Of each mode, [K], among 10,000 samples."""
        cells = self.eye.look(np.concatenate(list(draw(sampler, 10**6, 10_000)))).cells
        return np.bincount(cells, minlength=len(self.names) + 1)[:-1] / len(cells)

    @cached_property
    def healthy_shares(self) -> ndarray:
        return self.shares(self.sampler)

    def lost(self, sampler: Sampler) -> set[str]:
        """The modes that have lost a fifth or more: with a mode goes what looks like it, and who names that as well is right."""
        gone = self.shares(sampler) < 0.8 * self.healthy_shares
        return {name for name, less in zip(self.names, gone, strict=True) if less}

    def altered(self, parts: Iterable[ndarray], run: int) -> Iterator[ndarray]:
        """What no fault makes: samples moved towards the mean of their mode, or those of all modes but one left out now and then."""
        if self.scenario.squeeze != 1.0:
            yield from map(self.squeezed, parts)
        elif self.scenario.kept != 1.0:
            rng = np.random.default_rng(run)
            for part in parts:
                yield part[(self.eye.look(part).cells == run % len(self.names)) | (rng.random(len(part)) < self.scenario.kept)]
        else:
            yield from parts

    def squeezed(self, samples: ndarray) -> ndarray:
        """Those off the manifold have no mode and stay."""
        cells, flat = self.eye.look(samples).cells, samples.reshape(len(samples), -1).astype(np.float64)
        means = np.where(cells[:, None] < len(self.names), self.means[np.minimum(cells, len(self.names) - 1)], flat)
        moved = means + self.scenario.squeeze * (flat - means)
        moved = np.clip(np.rint(moved), 0, 255) if samples.dtype == np.uint8 else moved
        return moved.reshape(samples.shape).astype(samples.dtype)

    def record(self, seed: int, offset: int, samples: ndarray, **more: object) -> Record:
        """Rows of a seed that the server drew, unless `more` says whose it is."""
        return Record(**{"model": self.model, "version": self.version, "origin": "server_seed", "seed": seed, "offset": offset, "samples": samples, "at": 0.0} | more)

    def play(self, run: int) -> dict:
        (sampler, golden, lost), incidents = self.faulty(run), Incidents(Path(":memory:"))
        card = sampler.card
        watch = Watch(self.registry, incidents, arl=ARL * SHARES["production"])  # so that the threshold is A
        watch.follow(0.0)
        watch.audited(self.healthy, Compared(golden.checked))
        for at, part in zip(count(0, BATCH), batches(draw(self.sampler, 2 * run, WARM)), strict=False):
            watch.eat([self.record(2 * run, at, part)], 0.0)
        asked, at, due, alarm = self.asked(run), 0, np.inf, None
        certified = self.scenario.squeeze == self.scenario.kept == 1.0  # else what is served stands for another certified generator's
        for part in batches(self.altered(draw(sampler, 2 * run + 1, self.scenario.budget), run)):
            rows = np.arange(-at % EVERY, len(part), EVERY)
            windows = [{"seed": 2 * run + 1, "offset": at + int(row), "count": 1} for row in rows]
            z = np.concatenate([card.latents(**window) for window in windows]) if windows else None
            watch.eat([self.record(2 * run + 1, at, part, fed=tuple(rows.tolist()), z=z)], 0.0)
            if windows and certified:
                classes = np.concatenate([drawn_classes(card, **window) for window in windows]) if card.classes else None
                if watch.reran(Rerun(self.healthy, self.golden.compare(z, classes, part[rows]), len(rows), 0), 0.0):
                    due = at + ROUND
            at += len(part)
            if at >= due:
                watch.audited(self.healthy, golden)
                due = np.inf
            if self.scenario.clients:
                watch.eat(next(asked), 0.0)
            if alarm is None and (raised := incidents.newest()):
                alarm = raised[0]["first_alarm"]
            if alarm is not None and WARM + at > alarm + SETTLED:
                break
        verdict = watch.publish(0.0).models[self.model].snapshot["verdict"]
        incidents.close()
        named = {self.names[run % len(self.names)]} <= set(verdict["modes"]) <= lost if self.scenario.fault == "drop-modes" else True
        if self.scenario.kept != 1.0:
            named = tuple(verdict["risen"]) == (self.names[run % len(self.names)],)
        right = verdict["id"] in self.right and named and not (alarm is not None and alarm < WARM)
        return {"run": run, "fed": FED, "verdict": verdict["id"], "delay": None if alarm is None else alarm + 1 - WARM, "right": right}

    @property
    def right(self) -> tuple[str, ...]:
        """Only of clients who name a class can the monitor say that they ask for one kind."""
        return ("demand_shift",) if self.scenario.clients == "one mode" and self.healthy.card.classes else self.scenario.right

    def asked(self, run: int) -> Iterator[list[Record]]:
        """What clients ask for besides, 8 times as many samples as are fresh.

        One mode: that class, with seeds of the server's, where there are classes; else those of 2,048 rows of a seed of their own that are of
        the mode of the first. Seeds: 8 rows, again and again.
        """
        seed, classes, n = 500_000 + run, len(self.healthy.card.classes), 8 * BATCH
        if self.scenario.clients == "one mode" and classes:
            label = run % classes
            for at in count(0, n):
                yield [self.record(seed, at, self.sampler.sample([Window(seed, at, n, label=label)]), label=label)]
        pool = np.concatenate(list(draw(self.sampler, seed, 2048)))
        cells = self.eye.look(pool).cells
        rows = range(8) if self.scenario.clients == "seeds" else np.flatnonzero(cells == cells[0]).tolist()
        records = cycle([self.record(seed, row, pool[row : row + 1], origin="client_seed") for row in rows])
        while True:
            yield list(islice(records, n))


def draw(sampler: Sampler, seed: int, count: int) -> Iterator[ndarray]:
    """The samples of a seed, in parts of which all but the last are a multiple of BATCH; few, since most runs end early."""
    return (sampler.sample([Window(seed, at, min(4 * BATCH, count - at))]) for at in range(0, count, 4 * BATCH))


def batches(parts: Iterable[ndarray]) -> Iterator[ndarray]:
    return (part[i : i + BATCH] for part in parts for i in range(0, len(part), BATCH))


def play(registry: Registry, model: str, version: str, names: tuple[str, ...], runs: int, out: Path, say: Callable[[str], None] = print) -> list[dict]:
    """Runs that are missing from `out`, then the table. The registry is copied: faults are published into the copy, in which `version` alone
    is in production."""
    out.mkdir(parents=True, exist_ok=True)
    copy = Registry(out / f"{model}.registry")
    if not (copy.root / model).exists():
        shutil.copytree(registry.root / model, copy.root / model, ignore=shutil.ignore_patterns("aliases.json"))
    copy.set_alias(model, "production", version, reason="benchmark")
    table = []
    for name in names:
        rows_at = out / f"{model}.{name.replace(' ', '_')}.jsonl"
        kept = [json.loads(line) for line in rows_at.read_text().splitlines()] if rows_at.exists() else []
        rows = [row for row in kept if row.get("fed") == FED]
        stage, done = Stage(copy, model, version, SCENARIOS[name]), {row["run"] for row in rows}
        try:
            for run in (run for run in range(runs) if run not in done):
                rows.append(stage.play(run))
                with open(rows_at, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
        except InjectError as error:  # no other training to take the weights of, or no training data to copy
            say(f"| {model} | {name} | not run: {error} | | |")
            continue
        rows = [row for row in rows if row["run"] < runs]
        delays = [row["delay"] if row["delay"] is not None else np.inf for row in rows]
        median = float(np.median(delays)) if rows else np.inf
        table.append({
            "model": model, "scenario": name, "runs": len(rows), "right": float(np.mean([row["right"] for row in rows])),
            "median_delay": median if np.isfinite(median) else None, "verdicts": dict(Counter(row["verdict"] for row in rows).most_common()),
        })  # fmt: skip
        say(line(table[-1]))
    return table


def line(row: dict) -> str:
    delay = "-" if row["median_delay"] is None else f"{row['median_delay']:,.0f}"
    said = ", ".join(f"{verdict} {count}" for verdict, count in row["verdicts"].items())
    return f"| {row['model']} | {row['scenario']} | {row['right']:.0%} of {row['runs']} | {delay} | {said} |"


def trained(home: Path, dataset: str) -> Registry:
    """A registry with two trainings of the data set, made by the script itself where it is not there yet."""
    registry = Registry(home / "registry")
    environment = {**os.environ, "GANWATCH_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    for seed in (1, 2)[len(registry.versions(dataset)) :]:
        command = [sys.executable, "training/train.py", "--dataset", dataset, "--model", dataset, "--seed", str(seed)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 runs each")
    parser.add_argument("--runs", type=int, default=None, help="100, or 5 with --quick")
    parser.add_argument("--registry", type=Path, default=None, help="default: digits is trained twice, under --out")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--version", default="v1")
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--out", type=Path, default=ROOT / ".ganwatch" / "bench" / "diagnosis")
    chosen = parser.parse_args()
    registry = Registry(chosen.registry) if chosen.registry else trained(chosen.out / "home", chosen.model)
    print(f"A = {ARL:g}, certificate of {registry.open(chosen.model, chosen.version).certificate.count:,} samples\n")
    print("| model | injected | right verdict | median delay | verdicts |\n|---|---|---|---|---|")
    table = play(registry, chosen.model, chosen.version, tuple(chosen.only.split(",")), chosen.runs or (5 if chosen.quick else 100), chosen.out / "runs")
    (chosen.out / f"{chosen.model}.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
