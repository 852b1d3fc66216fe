"""`ganwatch`: everything an operator does, one function a command. `python -m deploy.cli` is the same program.

It knows the other parts only through their contracts and their HTTP surfaces.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import httpx
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy import stack
from deploy.grafana import Apply, GrafanaError
from deploy.inject import InjectError
from deploy.stack import Settings, StackError
from monitoring.acting import ACTED
from serving.errors import ServingError
from training.bundle import BundleError
from training.data import DataError
from training.gate import TOLERANCE, QualityRefused
from training.gate import promote as promote_version
from training.gate import publish as publish_bundle
from training.registry import Registry, RegistryError, checked_name, ganwatch_home

progress = Console(stderr=True, highlight=False, soft_wrap=True)
answer = Console(highlight=False, soft_wrap=True)

Fault = Literal["drop-modes", "off-manifold", "collapse", "truncated", "copies", "latent-fault", "int8", "checkpoint", "nothing"]
MODES_SHOWN = 20  # modes that a report lists at most
STATUSES = ("alarmed", "dropped", "unwatched", "uncertain", "covered")  # of a mode, worst first
ACTION_PATIENCE = 120.0  # seconds for which `inject --act` waits for the monitor
SettingsFlags = Annotated[Settings, tyro.conf.arg(name="")]
_LABEL = re.compile(r"\([^)]*\)|[^,\s][^,]*(?<!\s)")  # cells are named by their centres, (0.71, -0.71), whose comma separates nothing
JsonFlag = Annotated[bool, tyro.conf.arg(name="json", help="Print JSON for a program to read.")]


# --- running it -------------------------------------------------------------------------------------------------------


def up(settings: SettingsFlags = Settings(), registry: Path | None = None) -> None:
    """Start Ray, the sampler behind HAProxy, the monitor, and Prometheus and Alertmanager where they are installed.

    Everything listens on 127.0.0.1. Returns when all of it answers; `ganwatch down` stops it.

    Args:
        settings: how things run.
        registry: directory of bundles; default: registry under GANWATCH_HOME (.ganwatch).
    """
    run = stack.begin(settings, _registry(registry).root)
    with _stopped_on_failure(run):
        _start_ray(run)
        _start_monitor(run)
        _start_the_rest(run)
    _say_where(run)


def down() -> None:
    """Stop everything that `up` or `demo` started: no process and no listening port is left."""
    run = stack.running()
    if run is None:
        answer.print(f"nothing is up under {ganwatch_home()}")
        return
    with _stage("stopping"):
        names = stack.down(run)
    answer.print(f"stopped {len(names)} processes")


def scale(replicas: tyro.conf.Positional[int]) -> None:
    """Deploy the sampler again with so many replicas, under traffic: on a CPU the new ones answer before the old ones go.

    Args:
        replicas: processes that run onnxruntime.
    """
    stack.check_replicas(replicas)
    run = stack.require_running()
    with _stage(f"deploying {replicas} replicas in place of {run.settings.replicas}"):
        stack.scale(run, replicas)


def demo(settings: SettingsFlags = Settings(), model: str = "digits", dataset: str = "digits") -> None:
    """From nothing to a monitored generator: train, certify, serve, watch. Ctrl-C stops everything.

    A model that the registry already holds is served as it is.

    Args:
        settings: how things run.
        model: name under which the generator is published.
        dataset: what to train it on, such as ring, grid or digits: whatever training/train.py --dataset takes.
    """
    registry = Registry()
    run = stack.begin(settings, registry.root)
    with stack.interrupted_as_exit():
        try:
            _start_ray(run)
            _start_monitor(run)
            if "production" not in registry.aliases(model):
                _train(run, model, dataset)
                version = registry.versions(model)[-1]
                with _stage(f"promoting {model} {version} to production"):
                    registry.set_alias(model, "production", version, reason="demo")
            _start_the_rest(run)
            _say_where(run, model)
            _send_traffic(run, model)
        except KeyboardInterrupt:
            with suppress(OSError):
                progress.print("\nstopping ...")
        finally:
            with stack.undisturbed():
                if stack.is_up(run):
                    _stop(run)


def status(as_json: JsonFlag = False) -> None:
    """What is up, where it listens, and what the monitor says of each model."""
    run = stack.running()
    report: dict[str, Any] = {"up": run is not None, "home": str(ganwatch_home())}
    if run is not None:
        report |= {"url": run.url, "page": f"{run.monitor_url}/", "registry": run.registry}
        ours = stack.processes(run)
        report["processes"] = [{"pid": p.pid, "name": stack.process_name(p)} for p in ours]
        report["listening"] = [f"{address}:{port} {name}" for address, port, name in stack.listening(run, ours)]
        reg = Registry(run.registry)
        try:
            report["models"] = {name: _summary(model) | {"forced": reg.forced(name)} for name, model in _state(run)["models"].items()}
        except httpx.TransportError as error:  # it starts, or is stuck
            report |= {"models": {}, "monitor": f"the monitor at {run.monitor_url} does not answer ({error}); what started so far wrote logs to {run.logs}"}
    if as_json:
        return _print_json(report)
    if run is None:
        return answer.print(f"nothing is up under {ganwatch_home()}; start it with `ganwatch up` or `make demo`")
    answer.print(f"page {report['page']}   sampling {run.url}   {len(report['processes'])} processes, {len(report['listening'])} listening sockets")
    if "monitor" in report:
        answer.print(f"[yellow]{escape(report['monitor'])}[/]")
    for name, model in report["models"].items():
        answer.print(f"[bold]{name}[/] {model['version']}  {_colour(model['verdict'])}  {escape(model['words'])}")
        if model["forced"]:
            answer.print(f"  promoted by force although: {escape(model['forced'])}")


# --- versions ---------------------------------------------------------------------------------------------------------


def models(registry: Path | None = None, as_json: JsonFlag = False) -> None:
    """The models and versions of the registry, with their aliases."""
    reg = _registry(registry)
    report = {}
    for name in reg.models():
        report[name] = {"aliases": reg.aliases(name), "versions": [_listed(reg, name, version) for version in reg.versions(name)]}
    if as_json:
        return _print_json(report)
    if not report:
        return answer.print(f"the registry at {reg.root} is empty; train a model with `python training/train.py --dataset digits`")
    table = Table("model", "version", "alias", "created", "remarks", box=None)
    for name, entry in report.items():
        for v in entry["versions"]:
            names = ", ".join(a for a, version in entry["aliases"].items() if version == v["version"])
            if "error" in v:
                table.add_row(name, v["version"], names, "", f"[red]{escape(v['error'])}[/]")
                continue
            remarks = f"fault: {v['fault']} (from {v['injected_from']})" if v["injected_from"] else f"forced: {v['forced']}" if v["forced"] else ""
            table.add_row(name, v["version"], names, v["created"], escape(remarks))
    answer.print(table)


def _listed(reg: Registry, name: str, version: str) -> dict[str, str | None]:
    """What its card says of a version, or why it says nothing: one that is broken must not hide the others."""
    try:
        card = reg.card(name, version)
    except BundleError as error:
        return {"version": version, "error": str(error)}
    return {"version": card.version, "created": card.created, "fault": card.fault, "injected_from": card.injected_from, "forced": card.forced}


def publish(
    bundle: tyro.conf.Positional[Path | None] = None,
    onnx: Path | None = None,
    reference: str | None = None,
    latent: str | None = None,
    model: str | None = None,
    skip_bad_files: bool = False,
    force: bool = False,
    registry: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Publish a bundle directory, or any generator in ONNX, as the next version of its model. Promotes nothing.

    Refused where the certified generator is too far from the real data, unless forced. A generator that was trained elsewhere
    is certified first: publish --onnx g.onnx --reference data.npz --latent normal:128

    Args:
        bundle: a bundle directory, such as the one that a refused training run left.
        onnx: a generator that was trained elsewhere: one float input of latents; its first output is samples.
        reference: the real data to certify it against: npz, npy, IDX, parquet, a folder of images, s3://..., or a built-in name.
        latent: the law of its input: normal:128, normal:64x0.5 for a standard deviation of 0.5, signs:16+normal:48, uniform:100
            from -1 to 1, uniform01:100 from 0 to 1.
        model: publish under this name; default: the name in its card, or that of the ONNX file.
        skip_bad_files: leave out files of the real data that cannot be used.
        force: publish although the quality gate objects; the objections stay in the card.
        registry: directory of bundles.
    """
    if onnx is None:
        if bundle is None:
            raise StackError("name a bundle directory, or a generator: publish --onnx g.onnx --reference data.npz --latent normal:128")
        if reference is not None or latent is not None or skip_bad_files:
            raise StackError(f"{bundle} is certified already; --reference, --latent and --skip-bad-files are for --onnx. Against other data: ganwatch certify VERSION --reference DATA")
        published = publish_bundle(bundle, _registry(registry), model=model, force=force)
    else:
        if bundle is not None or reference is None or latent is None:
            raise StackError("--onnx takes --reference DATA and --latent LAW, and no bundle directory")
        from training.adopt import adopt

        target = _registry(registry)
        directory = ganwatch_home() / "adopted" / f"{time.strftime('%Y%m%dT%H%M%S')}-{onnx.stem}"
        with _stage(f"certifying {onnx.name} against {reference}") as show:
            adopt(
                onnx, reference, latent, directory, model=model, skip_bad_files=skip_bad_files,
                say=lambda line: progress.print(escape(line)),
                progress=lambda done, most: show(f"{done:,} of at most {most:,} samples"),
            )  # fmt: skip
        published = publish_bundle(directory, target, force=force)
        shutil.rmtree(directory, ignore_errors=True)  # a copy by now; where it was refused it stays, for --force
    _tell({"model": published.card.model, "version": published.card.version, "path": str(published.path), "forced": published.card.forced}, as_json)


def reference(
    action: tyro.conf.Positional[Literal["build"]],
    data: tyro.conf.Positional[str],
    name: str | None = None,
    skip_bad_files: bool = False,
    as_json: JsonFlag = False,
) -> None:
    """Build what real data look like to the monitor, without any generator, and say what changed since the last build.

    ganwatch reference build faces.npz --name faces

    Trains features.onnx, a classifier where data are labelled, and writes it with reference.npz and reference.json to
    .ganwatch/references/NAME/vN. Building again after new data came says in words which classes, shares and features moved.
    `ganwatch certify v1 --reference NAME` certifies a generator against it.

    Args:
        action: build.
        data: npz, npy, IDX, parquet, a folder of images, or a built-in name; also of s3:// and gs://.
        name: default: the last part of the path.
        skip_bad_files: leave out files that cannot be used, naming each.
    """
    from training.reference import build, words
    from training.sources import label, open_dataset

    directory, name = ganwatch_home() / "references", checked_name(name or label(data)[:64], "reference")
    with tempfile.TemporaryDirectory(prefix="ganwatch-") as cache, _stage(f"building the reference of {data}"):
        dataset = open_dataset(data, cache=Path(cache), skip_bad_files=skip_bad_files, say=lambda line: progress.print(escape(line)), option="data")
        built = build(dataset, name, data, directory)
    if as_json:
        return _print_json({"path": str(built.path)} | built.about)
    for line in words(built.about):
        answer.print(escape(line))
    answer.print(f"-> {built.path}", markup=False)


def certify(
    version: tyro.conf.Positional[str],
    more: int | None = None,
    reference: str | None = None,
    model: str | None = None,
    skip_bad_files: bool = False,
    force: bool = False,
    registry: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Publish a version again with another certificate; model.onnx stays as it is, byte for byte. Promotes nothing.

    With --more it counts that many fresh samples besides: tighter bounds, deeper tails. With --reference the generator is certified anew,
    against other real data: where these have changed, it shows whether the generator that is served is still good enough.

    Args:
        version: a version or an alias, such as v2.
        more: how many samples to draw besides.
        reference: the real data, as publish --reference takes them, or what `ganwatch reference build` has made: its NAME, NAME/v2 or
            directory. Refused where the generator is too far from them, unless forced.
        model: default: the only model of the registry.
        skip_bad_files: leave out files of the real data that cannot be used.
        force: publish although the quality gate objects to --reference; the objections stay in the card.
        registry: directory of bundles.
    """
    if more is None and reference is None:
        raise StackError("give --more N, to count so many samples besides, or --reference DATA, to certify anew against other real data")
    if more is not None and reference is not None:
        raise StackError("--more adds to the certificate that there is, --reference makes a new one that begins at 0; give one of the two")
    if more is not None and more < 1:
        raise StackError(f"--more is {more}; it must be at least 1")
    if reference is None and (force or skip_bad_files):
        raise StackError(f"{'--force' if force else '--skip-bad-files'} is for --reference; --more judges nothing anew and reads no data")
    reg = _registry(registry)
    name = _model(reg, model)
    bundle = reg.open(name, version)
    if reference is None:
        from training.export import certify_more

        with reg.staging(name) as staged, _stage(f"certifying {name} {version}") as show:
            card = certify_more(bundle, staged, more, lambda done, most: show(f"{done:,} of {most:,} samples"))
            published = reg.publish(staged, card)
    else:
        from training.recertify import recertify

        directory = ganwatch_home() / "recertified" / f"{time.strftime('%Y%m%dT%H%M%S')}-{name}-{bundle.card.version}"
        with _stage(f"certifying {name} {version} against {reference}") as show:
            recertify(
                bundle, reference, directory, ganwatch_home() / "references", skip_bad_files=skip_bad_files,
                say=lambda line: progress.print(escape(line)),
                progress=lambda done, most: show(f"{done:,} of at most {most:,} samples"),
            )  # fmt: skip
        published = publish_bundle(directory, reg, force=force)
        shutil.rmtree(directory, ignore_errors=True)  # a copy by now; where it was refused it stays, for --force
    told = {"model": name, "version": published.card.version, "samples": published.certificate.count, "path": str(published.path)}
    _tell(told | {"forced": published.card.forced}, as_json)


def promote(
    version: tyro.conf.Positional[str],
    model: str | None = None,
    alias: Literal["production", "canary", "shadow"] = "production",
    share: float = 0.0,
    act: bool = False,
    tolerance: float = TOLERANCE,
    force: bool = False,
    registry: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Point an alias at a version and, where ganwatch is up with this registry, wait until that version answers.

    A version whose certificate proves it worse than production's does not become production, unless forced.

    Args:
        version: such as v2.
        model: default: the only model of the registry.
        alias: what to point at it.
        share: of a canary: the part of the requests without seed and version that it answers, in [0, 1].
        act: let the monitor take it back by itself when the version is alarmed: a canary goes, production rolls back.
        tolerance: by how much it may be worse: in off-manifold share, in total variation to the real mode shares, in what the
            worst-served mode lacks of its real share. Counted where the certificates' bounds leave no doubt.
        force: promote although the gate objects; the objections stay in the registry's history and in `ganwatch status`.
        registry: directory of bundles.
    """
    if not tolerance >= 0:
        raise StackError(f"--tolerance is {tolerance}; it must be 0 or more")
    reg = _registry(registry)
    name = _model(reg, model)
    change = promote_version(reg, name, version, alias, share=share, act=act, tolerance=tolerance, force=force)
    _await_alias(reg, name, alias, change.version)
    _tell(asdict(change), as_json)


def rollback(
    model: str | None = None,
    alias: Literal["production", "canary", "shadow"] = "production",
    registry: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Point an alias back at the version before and, where ganwatch is up with this registry, wait until that version answers.

    Args:
        model: default: the only model of the registry.
        alias: which alias.
        registry: directory of bundles.
    """
    reg = _registry(registry)
    change = reg.rollback(_model(reg, model), alias)
    _await_alias(reg, _model(reg, model), alias, change.version)
    _tell(asdict(change), as_json)


def inject(
    fault: tyro.conf.Positional[Fault],
    model: str | None = None,
    labels: str = "",
    data: str | None = None,
    alias: Literal["production", "canary"] = "production",
    act: bool = False,
    registry: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Publish and promote a deliberately faulty version, to see the alarm work. `ganwatch rollback` undoes it.

    Only model.onnx changes: certificate, golden pairs, features and reference stay those of the version in production.

    Args:
        fault: drop-modes: never gives the modes of --labels; off-manifold: 1 sample in 20 is noise; collapse: of each mode only
            what is typical; truncated: latents from the middle of their law only; copies: 1 sample in 100 is training data;
            latent-fault: the latent lost its randomness, samples repeat; int8: weights rounded to 8 bits; checkpoint: the
            generator of another version; nothing: the control, which must stay silent.
        model: default: the only model of the registry.
        labels: modes to drop, such as 3,8.
        data: of copies: the training data; default: those that the card names.
        alias: what to point at it: production, or the canary beside it.
        act: let the monitor take it back by itself, and wait until it has: a canary goes, production rolls back.
        registry: directory of bundles.
    """
    from deploy.inject import inject as make

    reg = _registry(registry)
    name = _model(reg, model)
    if act and _serving(reg) is None:
        raise StackError(f"--act waits for the monitor to act, and nothing is up that serves {reg.root}; start it with `ganwatch up` or `make demo`")
    made = make(reg, name, fault, labels=tuple(_LABEL.findall(labels)), data=data)
    reg.set_alias(name, alias, made.card.version, reason=f"inject {made.card.fault}", act=act)
    _await_alias(reg, name, alias, made.card.version)
    told = {"model": name, "version": made.card.version, "fault": made.card.fault, "injected_from": made.card.injected_from}
    _tell(told | (_await_action(reg, name, alias, made.card.version) if act else {}), as_json)


# --- using it ---------------------------------------------------------------------------------------------------------


def sample(
    n: int = 16,
    model: str | None = None,
    seed: int | None = None,
    offset: int = 0,
    label: str | None = None,
    truncation: float = 1.0,
    version: str | None = None,
    out: Path | None = None,
    url: str | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw samples from the running server.

    Args:
        n: how many.
        model: default: the only model served.
        seed: the same seed gives the same samples, for ever; default: the server draws one and says which.
        offset: first row of the seed's samples.
        label: class, for conditional models.
        truncation: central share of the Gaussian latents to keep, in (0, 1].
        version: version or alias; default: production.
        out: file to write, .npy or .png.
        url: of the server; default: the one that `ganwatch up` started.
    """
    from serving.client import Client

    if out is not None and out.suffix not in (".npy", ".png"):
        raise StackError(f"--out is {out}; its name must end in .npy or .png")
    base = url or stack.require_running().url
    with Client(base) as client:
        name = model or _only([m["name"] for m in client.models()], "model")
        drawn = client.sample(name, n, seed=seed, offset=offset, label=label, truncation=truncation, version=version)
        report = {"model": drawn.model, "version": drawn.version, "seed": drawn.seed, "offset": drawn.offset, "n": len(drawn.array)}
        if out is not None and out.suffix == ".npy":
            import numpy as np

            np.save(out, drawn.array)
        elif out is not None:
            out.write_bytes(_png(drawn.array, report))
    if as_json:
        return _print_json(report if out else {**report, "samples": drawn.array.tolist()})
    print(f"{report['n']} samples of {report['model']} {report['version']}, seed {report['seed']}, offset {report['offset']}" + (f" -> {out}" if out else ""))
    if out is None:
        print(drawn.array)


def replay(
    bundle: Path,
    samples: Path,
    arl: float | str = 2.6e9,
    test_rate: float | None = None,
    calibrated: bool = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the service's monitor over a recorded stream, which you state to be independent draws of one law.

    Exit code 0 with or without an alarm: the answer is in what is printed.

    Args:
        bundle: directory of the bundle whose certificate is the null hypothesis.
        samples: .npy or .parquet file of samples in served form, in the order in which they were served.
        arl: to a false alarm, on average, at least: so many samples, or a time, such as month, week, 30d or 12h.
        test_rate: samples a second that such a time is counted at; default: 1,000.
        calibrated: simulate runs of the certified generator first, so that false alarms come about once in arl samples as measured,
            not at most once as guaranteed, and real ones sooner.
    """
    from deploy.replay import replay as run_monitor

    report = run_monitor(bundle, samples, arl, test_rate=test_rate, calibrated=calibrated)
    if as_json:
        return _print_json(report)
    print(f"{report['verdict']}: {report['words']}")
    print(f"what to do: {report['advice']}")
    print(f"first alarm at sample {report['first_alarm']} of {report['samples']}" if report["first_alarm"] is not None else f"no alarm in {report['samples']} samples")
    for table in _tables(report["snapshot"]):
        answer.print()
        answer.print(table)


def ack(model: str | None = None, as_json: JsonFlag = False) -> None:
    """Acknowledge a model's alarm: it unlatches, and its detectors start again.

    Args:
        model: default: the only model watched.
    """
    run = stack.require_running()
    name = model or _only(list(_state(run)["models"]), "model")
    response = httpx.post(f"{run.monitor_url}/api/ack", json={"model": name}, timeout=10)
    if response.is_error:
        raise StackError(f"the monitor refused: {response.json().get('error', response.text)}")
    _tell(response.json(), as_json)


def grafana(
    action: tyro.conf.Positional[Literal["apply"]],
    url: str = "http://127.0.0.1:3000",
    token_env: str = "GRAFANA_TOKEN",
    prometheus_url: str = "http://127.0.0.1:9090",
    dry_run: bool = False,
) -> None:
    """Push datasource, folder, dashboard and alert rules into a Grafana. Running it again changes nothing.

    Args:
        action: apply.
        url: of Grafana.
        token_env: name of the environment variable that holds a service-account token of role Admin.
        prometheus_url: where Grafana finds Prometheus.
        dry_run: say what would change and change nothing.
    """
    for line in Apply(url=url, token_env=token_env, prometheus_url=prometheus_url, dry_run=dry_run)():
        answer.print(line, markup=False)


def doctor(as_json: JsonFlag = False) -> None:
    """Look at this machine, at the registry and at what is up, and say what is wrong and what to do. Exit code 1 if anything is."""
    from deploy.doctor import checks

    results = checks(stack.running(), _registry(None))
    if as_json:
        _print_json([asdict(r) for r in results])
    else:
        for r in results:
            mark = "[green]ok[/]  " if r.ok else "[red]FAIL[/]"
            answer.print(f"{mark} {r.name:<22} {escape(r.words)}")
    if not all(r.ok for r in results):
        raise SystemExit(1)


# --- how the commands do it -------------------------------------------------------------------------------------------


@contextmanager
def _stage(words: str) -> Iterator[Callable[[str], None]]:
    """One progress line: a spinner while it lasts, then what was done and the seconds it took."""
    start = time.monotonic()
    with progress.status(words) as spinner:
        yield lambda more: spinner.update(f"{words}: {escape(more)}")
    progress.print(f"[green]✓[/] {words} [dim]{time.monotonic() - start:6.1f} s[/]")


@contextmanager
def _stopped_on_failure(run: stack.Run) -> Iterator[None]:
    with stack.interrupted_as_exit():
        try:
            yield
        except BaseException:
            with stack.undisturbed():
                stack.down(run)
            raise


def _stop(run: stack.Run) -> None:
    try:
        with _stage("stopping"):
            stack.down(run)
    except OSError:  # the terminal was closed: without a word, then
        stack.down(run)


def _png(samples: Any, about: dict[str, Any]) -> bytes:
    from serving.formats import FORMATS

    if samples.dtype != "uint8":
        raise StackError(f"--out ends in .png, but {about['model']} gives vectors of {samples.dtype}; save them as .npy")
    return FORMATS["image/png"](samples, about)


def _start_ray(run: stack.Run) -> None:
    with _stage("starting Ray"):
        stack.start_ray(run)


def _start_monitor(run: stack.Run) -> None:
    with _stage("starting the monitor"):
        stack.start_monitor(run)


def _start_the_rest(run: stack.Run) -> None:
    with _stage("deploying the sampler on Ray Serve behind HAProxy"):
        stack.deploy_serve(run)
        _await_ready(run)
    ports = run.settings.ports
    for name, port, start, binary in (
        ("Prometheus", ports.prometheus, stack.start_prometheus, stack.find_binary("prometheus")),
        ("Alertmanager", ports.alertmanager, stack.start_alertmanager, stack.find_binary("alertmanager", "prometheus-alertmanager")),
    ):
        if binary is None:
            progress.print(f"[dim]- {name} is not installed; its configuration is in deploy/{name.lower()}/[/]")
        elif holder := stack.port_holder(port):
            progress.print(f"[dim]- {name} is not started: port {port} is in use by {escape(holder)}; --ports.{name.lower()} names another[/]")
        else:
            try:
                with _stage(f"starting {name}"):
                    start(run, binary)
            except StackError as error:  # it is not what `up` is for
                progress.print(f"[yellow]- {name} is not there, everything else is: {escape(str(error))}[/]")


def _train(run: stack.Run, model: str, dataset: str) -> None:
    """Submit the training job exactly as a user would, and show its last line while it runs."""
    script = ["python", "training/train.py", "--dataset", dataset, "--model", model, "--registry", run.registry]
    ray = shutil.which("ray", path=run.environment()["PATH"]) or "ray"
    log = run.logs / "train.log"
    progress.print(f"[dim]{run.monitor_url}/ follows the training, whose log is {escape(str(log))}[/]")
    with _stage(f"training on {dataset} (ray job submit)") as show, open(log, "w") as file:
        command = [ray, "job", "submit", "--working-dir", ".", "--", *script]
        job = subprocess.Popen(
            command, cwd=stack.ROOT, env=run.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        last = []
        for line in job.stdout:
            file.write(line)
            if words := line.strip():
                last = [*last[-11:], words]
                show(words[:120])
        if job.wait() != 0:
            raise StackError("training failed:\n" + "\n".join(last) + f"\nthe whole log is {log}")


def _send_traffic(run: stack.Run, model: str) -> None:
    """Gentle traffic, as applications send it, until Ctrl-C or until somebody else runs `ganwatch down`."""
    sent, failures = 0, 0
    with httpx.Client(base_url=run.url, timeout=10) as client, progress.status("sending samples") as spinner:
        while stack.is_up(run):
            body = {"n": 16} if sent % 8 else {"n": 16, "seed": sent}
            try:
                client.post(f"/v1/models/{model}/sample", json=body, headers={"Accept": "application/x-npy"}).raise_for_status()
                sent += 1
            except httpx.HTTPError as error:
                failures += 1
                spinner.update(f"{failures} requests failed; the last one: {escape(str(error))}")
            else:
                spinner.update(f"{sent} requests answered, {failures} failed; Ctrl-C stops everything")
            time.sleep(0.25)
    answer.print("stopped by `ganwatch down`")


def _say_where(run: stack.Run, model: str | None = None) -> None:
    ports, registry = run.settings.ports, Registry(run.registry)
    served = model or next((m for m in registry.models() if "production" in registry.aliases(m)), None)
    answer.print(f"\n[bold]page[/]      {run.monitor_url}/\n[bold]metrics[/]   {run.monitor_url}/metrics")
    if stack.port_holder(ports.prometheus):
        answer.print(f"[bold]alerts[/]    http://127.0.0.1:{ports.prometheus}/alerts")
    if served is None:
        answer.print(f"no model is in production yet. Train one:\n  source {shlex.quote(run.home)}/env && ray job submit --working-dir . -- python training/train.py --dataset digits")
        return answer.print("  ganwatch promote v1")
    answer.print(f"curl -s -X POST {run.url}/v1/models/{served}/sample -H 'Accept: image/png' -d '{{\"n\": 64, \"seed\": 7}}' -o {served}.png", markup=False)
    if model is not None:
        answer.print(f"[dim]break it:[/]  ganwatch inject drop-modes --model {served} --labels 3,8     [dim]mend it:[/]  ganwatch rollback")
        answer.print(f"[dim]let it mend itself:[/]  ganwatch inject drop-modes --model {served} --labels 3,8 --act")
        answer.print(f"[dim]a bad canary:[/]  ganwatch inject off-manifold --model {served} --alias canary --act")


def _await_ready(run: stack.Run) -> None:
    deadline = time.monotonic() + 60
    while (response := httpx.get(f"{run.url}/v2/health/ready", timeout=5)).status_code != 200:
        if time.monotonic() > deadline:
            raise StackError(f"the sampler is up but not ready after 60 s: {response.text[:500]}")
        time.sleep(0.1)


def _serving(registry: Registry) -> stack.Run | None:
    """The run that serves what is in `registry`, or None."""
    run = stack.running()
    return run if run is not None and Path(run.registry).resolve() == registry.root.resolve() else None


def _await_alias(registry: Registry, model: str, alias: str, version: str | None) -> None:
    """Where ganwatch is up with `registry`: wait until every replica and the monitor follow it."""
    run = _serving(registry)
    if run is None or not stack.processes(run):
        return
    deadline, said = time.monotonic() + 30, []
    while time.monotonic() < deadline:
        said = [_served(url, model) for url in stack.replica_urls(run)]  # one behind HAProxy does not speak for the others
        watched = _state(run)["models"].get(model, {}).get("version") if alias == "production" else version
        if said and watched == version and all(served.get("serving", {}).get(alias) == version for served in said):
            return
        if refused := next((served["errors"][alias] for served in said if alias in served.get("errors", {})), None):
            raise StackError(f"the registry says {alias} of {model} is {version}, but the server refuses it: {refused}")
        time.sleep(0.1)
    raise StackError(f"the registry says {alias} of {model} is {version}, but after 30 s it is not served by each of {len(said)} replicas and watched: {json.dumps(said)[:500]}")


def _served(replica: str, model: str) -> dict[str, Any]:
    """What the replica at that URL says of a model; nothing where it has none or goes away."""
    try:
        return next((m for m in httpx.get(f"{replica}/v1/models", timeout=5).json()["models"] if m["name"] == model), {})
    except httpx.TransportError:
        return {}


def _await_action(registry: Registry, model: str, alias: str, version: str) -> dict[str, Any]:
    """Wait until the monitor has taken `version` away from `alias`; what it found and did, from its record of incidents.

    The record is what is waited for: the alias changes a moment earlier, and not always by the monitor's hand.
    """
    run, start = stack.require_running(), time.monotonic()
    with _stage(f"{version} is {alias} of {model}; waiting for the monitor to find out and act") as show:
        while (incident := _acted_upon(run, model, version)) is None:
            last = next(change for change in reversed(registry.history(model)) if change.alias == alias)
            if last.version != version and not last.reason.startswith(ACTED):
                raise StackError(f"{alias} of {model} was changed to {last.version or 'none'} ({last.reason}) before the monitor acted")
            seen = _state(run)["models"].get(model, {})
            live = next((v for v in [seen, *seen.get("other_versions", [])] if v.get("version") == version), {})
            snapshot = live.get("snapshot", live)
            if snapshot:
                evidence = max((e for e in snapshot["evidence"].values() if e is not None), default=0.0)
                show(f"{snapshot['monitored']:,} samples, evidence 10^{evidence:.1f} of 10^{snapshot['log10_threshold']:.1f}")
            if time.monotonic() - start > ACTION_PATIENCE:
                raise StackError(f"the monitor has not acted on {model} {version} within {ACTION_PATIENCE:g} s; `ganwatch status` says what it sees")
            time.sleep(0.2)
    action = incident["evidence"]["action"]
    progress.print(f"  alarm at its sample {incident['first_alarm'] + 1:,}: [bold red]{escape(incident['verdict'])}[/] {escape(incident['words'])}")
    progress.print(f"  acted: [bold]{escape(action)}[/], {time.monotonic() - start:.1f} s after the fault was in service; the page keeps the evidence")
    _await_alias(registry, model, alias, registry.aliases(model).get(alias))
    return {"verdict": incident["verdict"], "modes": incident["modes"], "first_alarm": incident["first_alarm"], "action": action}


def _acted_upon(run: stack.Run, model: str, version: str) -> dict[str, Any] | None:
    """The newest incident of a version with what was done about it, or None."""
    incidents = httpx.get(f"{run.monitor_url}/api/incidents", timeout=10).json()["incidents"]
    return next((i for i in incidents if (i["model"], i["version"]) == (model, version) and "action" in i["evidence"]), None)


def _state(run: stack.Run) -> dict[str, Any]:
    return httpx.get(f"{run.monitor_url}/api/state", timeout=10).json()


def _summary(model: dict[str, Any]) -> dict[str, Any]:
    snapshot = model["snapshot"]
    verdict = snapshot["verdict"]
    return {
        "version": model["version"], "verdict": verdict["id"], "words": verdict["words"], "modes": verdict["modes"], "classes": verdict["classes"], "risen": verdict["risen"],
        "stale": model["stale"], "monitored": snapshot["monitored"], "detectable": snapshot["detectable"],
    }  # fmt: skip


def _tables(snapshot: dict[str, Any]) -> Iterator[Table]:
    """What the page shows of a version: gauges of its fresh samples, modes, evidence. Of many modes those that are not plainly covered."""

    def figures(row: dict[str, Any], *names: str) -> Iterator[str]:
        return (f"{row[name]:.4g}" if row[name] is not None else "-" for name in names)

    table = Table("gauge", "value", "low", "high", "real data", "n", "interval", box=None)
    for name, gauge in snapshot["gauges"]["fresh"].items():
        table.add_row(name, *figures(gauge, "value", "low", "high", "floor"), str(gauge["n"]), gauge["ci"])
    yield table

    modes, counts = snapshot["modes"], snapshot["coverage"]
    shown = modes if len(modes) <= MODES_SHOWN else sorted((m for m in modes if m["status"] != "covered"), key=lambda m: STATUSES.index(m["status"]))[:MODES_SHOWN]
    words = f"{counts['covered']} of {counts['real']} modes covered: {counts['certainly_covered']} certainly, {counts['certainly_dropped']} certainly dropped; {counts['unwatched']} unwatched"
    left = f"; {len(modes) - len(shown)} rows are left out, --json has them" if len(shown) < len(modes) else ""
    table = Table("mode", "reference", "certified", "served", "low", "high", "status", box=None, title=words + left, title_justify="left", title_style="")
    for mode in shown:
        table.add_row(escape(mode["name"]), *figures(mode, "reference", "certified", "served", "low", "high"), mode["status"])
    yield table

    words = f"evidence, log10; an alarm is raised where the families' sum reaches {snapshot['log10_threshold']:.2f}"
    table = Table("family", "null", "evidence", box=None, title=words, title_justify="left", title_style="")
    for family, budget in snapshot["budget"]["families"].items():
        table.add_row(family, budget["null"], *figures(snapshot["evidence"], family))
    yield table


def _colour(verdict: str) -> str:
    style = {"healthy": "green", "demand_shift": "green", "warming_up": "yellow"}.get(verdict, "bold red")
    return f"[{style}]{verdict}[/]"


def _registry(root: Path | None) -> Registry:
    run = stack.running()
    return Registry(root if root is not None else run.registry if run is not None else None)


def _model(registry: Registry, name: str | None) -> str:
    return name or _only(registry.models(), "model")


def _only(names: list[str], what: str) -> str:
    if not names:
        raise StackError(f"there is no {what} yet; train one with `python training/train.py --dataset digits`, or run `make demo`")
    if len(names) > 1:
        raise StackError(f"which {what}? There are {len(names)}: {', '.join(names)}; name one with --{what}")
    return names[0]


def _tell(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return _print_json(report)
    print("  ".join(f"{k}={v}" for k, v in report.items() if v is not None))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


COMMANDS: dict[str, Callable[..., None]] = {
    "up": up, "down": down, "status": status, "scale": scale, "demo": demo, "publish": publish, "reference": reference, "certify": certify, "promote": promote, "rollback": rollback,
    "models": models, "sample": sample, "inject": inject, "replay": replay, "ack": ack, "grafana": grafana, "doctor": doctor,
}  # fmt: skip


def main() -> None:
    """Run the command line. A user's mistake is one line and exit code 2, never a traceback."""
    os.environ |= stack.without_proxy()
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="ganwatch", description="Train, serve and watch GANs.", config=(tyro.conf.FlagCreatePairsOff,))
    except (StackError, GrafanaError, RegistryError, BundleError, DataError, InjectError, ServingError, ConnectionError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or ''} {error.strerror or error}".strip())
    except QualityRefused as refusal:
        _fail(f"not {refusal.what}, the quality gate objects:\n{refusal}\nto have it {refusal.what} all the same: {refusal.remedy}")
    except httpx.HTTPStatusError as error:
        _fail(f"{error.request.url} answered {error.response.status_code}: {error.response.text[:500]}")
    except httpx.HTTPError as error:
        _fail(f"{getattr(error.request, 'url', 'the server')} does not answer ({error}); `ganwatch status` says what is up")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _fail(words: str) -> NoReturn:
    progress.print(f"[bold red]error:[/] {escape(words)}")
    sys.exit(2)


if __name__ == "__main__":
    main()
