"""What `up` and `demo` start is stopped whole, however one asks; no Ray here, but a process of the run that does not want to go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deploy import cli, stack
from tests.deploy.conftest import ROOT, wait_for

STUBBORN = """
import signal
signal.signal(signal.SIGTERM, lambda *_: print("asked"))
print("ready")
while True:
    signal.pause()
"""
COMMAND = f"""
import fcntl, signal, sys, termios
from deploy import cli, stack
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
for number in (signal.SIGHUP, signal.SIGTERM):  # which whoever runs the tests may have had ignored
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
cli._start_ray = lambda run: stack._spawn(run, "stubborn", [sys.executable, "-c", {STUBBORN!r}])
cli._start_monitor = lambda run: signal.pause()
getattr(cli, sys.argv[1])(stack.Settings(stack.Ports(0, 0, 0, 0, 0, 0)))
"""


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_closed_terminal_and_further_signals_leave_nothing_running(tmp_path: Path, command: str) -> None:
    ours, theirs = os.openpty()
    environment = {**os.environ, "GANWATCH_HOME": str(tmp_path)}
    started = subprocess.Popen(
        [sys.executable, "-c", COMMAND, command], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    log = tmp_path / "logs" / "stubborn.log"
    try:
        wait_for(lambda: log.exists() and "ready" in log.read_text(), "process of the run")
        run = stack.running(tmp_path)
        os.close(ours)  # SIGHUP
        wait_for(lambda: "asked" in log.read_text(), "beginning of the end")
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            started.send_signal(number)
        started.wait(60)
    finally:
        started.kill()
        started.wait()
    assert not (tmp_path / "run.json").exists()
    assert stack.processes(run) == []


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stack.interrupted_as_exit():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # one too many
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_of_another_version_is_read_for_what_is_known_of_it(tmp_path: Path) -> None:
    run = stack.Run("of a test", str(tmp_path), "registry", "temp", 0.0, stack.Settings(stack.Ports(http=1234), replicas=3))
    told = asdict(run)
    told["settings"]["workers"] = told["settings"].pop("replicas")
    (tmp_path / "run.json").write_text(json.dumps(told | {"host": "localhost"}))
    assert stack.running(tmp_path) == replace(run, settings=replace(run.settings, replicas=1))
    del told["temp"]
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(stack.StackError, match="temp.*look for processes with GANWATCH_RUN in their environment, then delete it"):
        stack.running(tmp_path)


PLACEMENT = """
import sys
import ray
from deploy.stack import gpu_share
replicas = int(sys.argv[1])
ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=0.1)
class Actor:
    def ready(self): pass
actors = [Actor.options(num_gpus=share).remote() for share in [gpu_share(replicas)] * replicas + [0.9] * 2]
ready, waiting = ray.wait([actor.ready.remote() for actor in actors], num_returns=len(actors), timeout=60)
sys.exit(f"{len(waiting)} of {len(actors)} find no room" if waiting else 0)
"""


@pytest.mark.slow
def test_replicas_leave_room_for_a_training_worker_on_each_gpu() -> None:
    """As Ray itself places three of them on two GPUs, which it need not have to do so."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", PLACEMENT, "3"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_a_prometheus_that_fails_takes_nothing_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stack, "deploy_serve", lambda run: None)  # Ray is not what this is about
    monkeypatch.setattr(cli, "_await_ready", lambda run: None)
    monkeypatch.setenv("GANWATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("prometheus", "alertmanager"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} cannot read its data; exit 1\n")
        (tmp_path / name).chmod(0o700)
    run = stack.begin(stack.Settings(stack.Ports(0, 0, 0, 0, 0, 0)), tmp_path / "registry")
    try:
        cli._start_the_rest(run)
        told = " ".join(capfd.readouterr().err.split())
        assert all(words in told for words in ("Prometheus is not there", "prometheus cannot read its data", "alertmanager cannot read its data"))
        assert stack.is_up(run)
    finally:
        stack.down(run)
