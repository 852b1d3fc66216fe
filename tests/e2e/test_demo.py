"""The whole way, as a user walks it: `ganwatch demo` from an empty home, then a fault, an alert, a rollback.

One stack is started for all of these tests; each puts back what it changed. Real Ray, HAProxy, Prometheus, Chromium.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from deploy import stack
from deploy.doctor import is_loopback, is_ray_grpc
from deploy.inject import inject
from serving.client import Client
from serving.sampler import Sampler, Window
from training.bundle import Bundle
from training.registry import Registry
from tests.e2e.driver import PORTS, ROOT, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (.ci/debian-packages installs it)")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (.ci/debian-packages installs it)")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[Stack]:
    """`ganwatch demo` in an empty home, stopped by Ctrl-C, after which nothing of it may be left."""
    ours = Stack(tmp_path_factory.mktemp("home"), dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))
    process = subprocess.Popen(
        ours.command("demo", *ours.flags), cwd=ROOT, env=ours.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    drain = threading.Thread(target=lambda: ours.lines.extend(process.stdout), daemon=True)
    try:
        for line in process.stdout:
            ours.lines.append(line.rstrip())
            if line.startswith("curl "):
                break
        else:
            raise AssertionError("\n".join(ours.lines[-40:]))
        drain.start()
        run = json.loads((ours.home / "run.json").read_text())
        yield ours
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(300)
        if drain.is_alive():
            drain.join(10)
        process.stdout.close()
        assert code == 0, "\n".join(ours.lines[-40:])
    ours.assert_gone(run)


def npy(response: httpx.Response) -> np.ndarray:
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def test_every_stage_says_how_long_it_took(demo: Stack) -> None:
    text = "\n".join(demo.lines)
    for stage in ("starting Ray", "training on digits", "promoting digits v1", "starting the monitor", "deploying the sampler"):
        assert stage in text
    assert sum(line.rstrip().endswith(" s") for line in demo.lines) >= 5


def test_the_printed_curl_line_works(demo: Stack, tmp_path: Path) -> None:
    line = next(line for line in demo.lines if line.startswith("curl "))
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True, timeout=60)
    with Image.open(tmp_path / "digits.png") as image:
        assert image.format == "PNG" and np.asarray(image).std() > 10


def test_the_readme_samples_from_python(demo: Stack, capfd: pytest.CaptureFixture[str]) -> None:
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "http://127.0.0.1:8000" in block
    exec(block.replace("http://127.0.0.1:8000", demo.url("http")), {})
    assert capfd.readouterr().out == block.split("# ")[-1].strip() + "\n"


def test_the_command_line_draws_samples(demo: Stack, tmp_path: Path) -> None:
    drawn = demo.json("sample", "--n", "3", "--seed", "7")
    assert (drawn["model"], drawn["version"], drawn["seed"], np.shape(drawn["samples"])) == ("digits", "v1", 7, (3, 8, 8, 1))
    demo.run("sample", "--n", "3", "--seed", "7", "--out", str(tmp_path / "three.npy"))
    assert np.load(tmp_path / "three.npy").tolist() == drawn["samples"]
    demo.run("sample", "--n", "3", "--out", str(tmp_path / "three.png"))
    with Image.open(tmp_path / "three.png") as image:
        assert image.format == "PNG"
    for words, wanted in ((("--n", "0"), "n is 0"), (("--label", "3"), "has no classes"), (("--model", "other"), "unknown model"), (("--out", "x.gif"), "x.gif")):
        refused = demo.run("sample", *words, check=False)
        assert refused.returncode == 2 and wanted in refused.stderr and "Traceback" not in refused.stderr


def test_a_sample_is_the_same_for_ever(demo: Stack) -> None:
    with Client(demo.url("http")) as client:
        whole = client.sample("digits", 300, seed=7).array
        parts = [client.sample("digits", n, seed=7, offset=o).array for o, n in ((0, 1), (1, 99), (100, 200))]
        drawn = client.sample("digits", 5)
        again = client.sample("digits", 5, seed=drawn.seed, offset=drawn.offset).array
    assert whole.dtype == np.uint8 and whole.shape == (300, 8, 8, 1)
    assert np.abs(whole.astype(int) - np.concatenate(parts).astype(int)).max() <= 1
    assert np.abs(drawn.array.astype(int) - again.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"n": 0}, 422, "n"), ({"n": -1}, 422, "n"), ({"n": 1.5}, 422, "n"), ({"n": "x"}, 422, "n"), ({"n": 10**9}, 422, "n"),
        ({"seed": -1}, 422, "seed"), ({"seed": 2**63}, 422, "seed"), ({"offset": 2**63 - 1, "n": 5}, 422, "offset"), ({"label": 3}, 422, "label"),
        ({"truncation": 0}, 422, "truncation"), ({"truncation": 1.1}, 422, "truncation"), ({"surprise": 1}, 422, "surprise"),
    ],
)  # fmt: skip
def test_bad_requests_are_answered_in_words(demo: Stack, body: dict[str, Any], status: int, field: str) -> None:
    answer = httpx.post(demo.url("http", "/v1/models/digits/sample"), json=body, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == status and error["field"] == field and error["message"] and error["expected"]
    if field == "label":
        assert error["message"] == "model digits has no classes"


def test_a_client_that_leaves_disturbs_nobody(demo: Stack) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(demo.url("http", "/v1/models/digits/sample"), json={"n": 65536}, timeout=httpx.Timeout(5, read=0.01))
    assert len(npy(demo.sample(n=3))) == 3


def test_everything_listens_on_loopback(demo: Stack) -> None:
    """But for the gRPC port of each replica, which Ray binds to every interface: that one asks for the token."""
    run = stack.running(demo.home)
    found = stack.listening(run)
    ports = run.settings.ports
    assert {ports.http, ports.monitor, ports.dashboard, ports.gcs, ports.haproxy_stats, ports.haproxy_metrics} <= {port for _, port, _ in found}
    exposed = [(address, port, name) for address, port, name in found if not is_loopback(address)]
    assert len(exposed) <= 1 and all(is_ray_grpc(address, name) for address, _, name in exposed)
    for _, port, _ in exposed:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_ray_refuses_a_client_without_the_token(demo: Stack) -> None:
    jobs = demo.url("dashboard", "/api/jobs/")
    assert httpx.get(jobs).status_code == 401
    token = (demo.home / "ray-token").read_text()
    assert (demo.home / "ray-token").stat().st_mode & 0o077 == 0
    assert httpx.get(jobs, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    with grpc.insecure_channel(f"127.0.0.1:{stack.running(demo.home).settings.ports.gcs}") as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_doctor_and_status_find_nothing_wrong(demo: Stack) -> None:
    demo.verdict("healthy")
    results = demo.json("doctor")
    assert [r for r in results if not r["ok"]] == []
    status = demo.json("status")
    assert status["up"] and status["models"]["digits"]["verdict"] == "healthy"


def test_a_second_up_is_refused_by_name(demo: Stack, tmp_path: Path) -> None:
    again = demo.run("up", check=False)
    assert again.returncode == 2 and "already up" in again.stderr
    other = Stack(tmp_path / "other", demo.ports)
    refused = other.run("up", *other.flags, check=False)
    assert refused.returncode == 2 and "in use by haproxy" in refused.stderr and "--ports.http" in refused.stderr


def test_what_clients_choose_is_never_drift(demo: Stack) -> None:
    """One seed asked for 10,000 times, truncated samples, a client that only sends seeds: gauges may move, the alarm may not."""
    demo.verdict("healthy")
    with httpx.Client(base_url=demo.url("http"), timeout=60) as client:
        for body in [{"seed": 1}] * 10_000 + [{"n": 20, "truncation": 0.5}] * 200 + [{"n": 20, "seed": seed} for seed in range(200)]:
            client.post("/v1/models/digits/sample", json=body).raise_for_status()
    seen = demo.verdict("healthy")["snapshot"]
    assert seen["served"] > seen["monitored"]
    assert max(seen["evidence"].values()) < seen["log10_threshold"]


@pytest.mark.parametrize(("fault", "verdict"), [("off-manifold", "off_manifold"), ("latent-fault", "latent_fault"), ("nothing", "healthy")])
def test_other_faults_are_named_by_replay(demo: Stack, tmp_path: Path, fault: str, verdict: str) -> None:
    shutil.copytree(demo.home / "registry", tmp_path / "registry")
    broken = inject(Registry(tmp_path / "registry"), "digits", fault, reference="v1")
    report = replay(demo, broken, 20_000, tmp_path)
    assert report["verdict"] == verdict and (report["first_alarm"] is None) == (fault == "nothing")


def test_the_healthy_version_is_silent_for_200_000_samples(demo: Stack, tmp_path: Path) -> None:
    report = replay(demo, Registry(demo.home / "registry").open("digits", "v1"), 200_000, tmp_path)
    assert (report["verdict"], report["first_alarm"], report["modes"]) == ("healthy", None, [])
    assert report["gauges"]["mode_coverage"]["value"] == 1.0 and "independent" in report["assumes"]


def replay(demo: Stack, bundle: Bundle, n: int, tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "stream.npy", Sampler(bundle).sample([Window(2024, 0, n)]))
    return demo.json("replay", "--bundle", str(bundle.path), "--samples", str(tmp_path / "stream.npy"), "--arl", "2.6e9")


def test_an_altered_version_is_refused_and_the_serving_one_stays(demo: Stack) -> None:
    made = demo.json("inject", "nothing", "--model", "digits")
    demo.run("rollback", "--model", "digits")
    path = demo.home / "registry" / "digits" / made["version"] / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    refused = demo.run("promote", made["version"], "--model", "digits", check=False)
    assert refused.returncode == 2 and "model.onnx" in refused.stderr and "Traceback" not in refused.stderr
    assert demo.sample(n=1).headers["X-Ganwatch-Version"] == "v1"


@needs_prometheus
def test_a_dropped_mode_reaches_prometheus_and_the_page(demo: Stack, tmp_path: Path) -> None:
    demo.verdict("healthy")
    demo.query('ganwatch_alarm_active{model="digits",verdict="mode_dropping"}', lambda r: bool(r) and r[0]["value"][1] == "0")
    made = demo.json("inject", "drop-modes", "--model", "digits", "--labels", "3,8")
    try:
        assert made["injected_from"] == "v1"
        first = demo.verdict("mode_dropping", traffic=lambda: demo.sample(n=64))
        assert first["version"] == made["version"] and first["snapshot"]["verdict"]["since_sample"] < 3000
        while (seen := demo.state()["snapshot"])["monitored"] < 3000:
            demo.sample(n=256)
        assert seen["verdict"]["id"] == "mode_dropping" and seen["verdict"]["modes"] == ["3", "8"]
        firing = demo.query('ALERTS{alertname="GanModeDropped",alertstate="firing"}', lambda r: len(r) == 1)
        assert firing[0]["metric"]["model"] == "digits"
        demo.page_says(tmp_path / "alarm.png", "mode_dropping", ["3", "8"])
        assert share_of(npy(demo.sample(n=10_000, seed=99)), {3, 8}) <= 0.005
        early = replay(demo, Registry(demo.home / "registry").open("digits", made["version"]), 3000, tmp_path)
        assert early["modes"] == ["3", "8"] and early["first_alarm"] < 3000  # live, a few more may come before we look
    finally:
        rolled = demo.json("rollback", "--model", "digits")
    assert rolled["version"] == "v1"
    demo.verdict("healthy")
    demo.query('ALERTS{alertname="GanModeDropped",alertstate="firing"}', lambda r: r == [])


def share_of(images: np.ndarray, digits: set[int]) -> float:
    """The share of `digits` among images, in the eyes of a classifier that the product does not contain."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    real = load_digits()
    judge = SVC(gamma=0.001).fit(real.data, real.target)
    return float(np.isin(judge.predict(images.reshape(len(images), 64) / 255 * 16), list(digits)).mean())


def test_the_demo_teaches_how_the_monitor_acts_by_itself(demo: Stack) -> None:
    """What `inject --act` prints: the alarm, what it was, what was done; canary gone, production back, never more than asked for."""
    demo.verdict("healthy")
    canary = demo.run("inject", "off-manifold", "--model", "digits", "--alias", "canary", "--act")
    assert "off_manifold" in canary.stderr and "canary -> none" in canary.stderr
    done = demo.run("inject", "drop-modes", "--model", "digits", "--labels", "3,8", "--act", "--json")
    report = json.loads(done.stdout)
    assert report["action"] == "production -> v1"
    assert report["verdict"] in ("mode_dropping", "within_mode_collapse", "drift")  # what was first in evidence: it does not wait for the sharper word
    assert "alarm at its sample" in done.stderr and "acted: production -> v1" in done.stderr
    registry = Registry(demo.home / "registry")
    assert registry.aliases("digits") == {"production": "v1"} and registry.history("digits")[-1].reason.startswith("acted on an alarm")
    assert demo.sample(n=1).headers["X-Ganwatch-Version"] == "v1"
    demo.verdict("healthy")
    incidents = httpx.get(demo.url("monitor", "/api/incidents"), timeout=60).json()["incidents"]
    assert [i["evidence"].get("action") for i in incidents[:2]] == ["production -> v1", "canary -> none"]
    assert any("--labels 3,8 --act" in line for line in demo.lines) and any("--alias canary --act" in line for line in demo.lines)


@needs_chromium
def test_the_page_of_a_healthy_model(demo: Stack, tmp_path: Path) -> None:
    demo.verdict("healthy")
    demo.page_says(tmp_path / "healthy.png", "healthy", [])
