"""The service as replicas, Prometheus and people meet it: a real server on a free port, real heartbeats, real event streams."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from numpy import ndarray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from monitoring.service import BODY_LIMIT, Options, Service, listen, make_server
from monitoring.watch import NO_SEED
from serving.records import Heartbeat, Record
from training.bundle import Bundle
from training.registry import Registry

pytestmark = pytest.mark.slow


class Running:
    """A monitor service in this process, and a client of it."""

    def __init__(self, options: Options) -> None:
        self.listener = listen(options.host, options.port)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = make_server(options)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.listener.close()
        assert not self.thread.is_alive(), "the service does not stop"

    def post(self, heartbeat: Heartbeat) -> None:
        assert self.http.post("/api/records", content=heartbeat.encode()).status_code == 204

    def events(self, **headers: str) -> Iterator[dict]:
        """The data of the `state` events, as they come."""
        with self.http.stream("GET", "/api/events", headers=headers) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    def until(self, true: Callable[[dict], object]) -> dict:
        """The first state of which this is true; a test that waits in vain is ended by the client's timeout or by 60 events."""
        for _, state in zip(range(60), self.events(), strict=False):
            if true(state):
                return state
        raise AssertionError(f"not reached: {state}")

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        (value,) = [s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
        return value


class World:
    """A registry with a healthy v1 and a v2 that lost modes 3 and 8; production is v1."""

    def __init__(self, root: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
        self.bundles = {
            "v1": make_bundle(root=root / "registry"),
            "v2": make_bundle(root=root / "registry", version="v2", lost=(3, 8)),
        }
        self.registry, self.draw, self.seed = Registry(root / "registry"), draw, 0
        self.registry.set_alias("grid", "production", "v1", reason="promote")

    def heartbeat(self, version: str = "v1", count: int = 100, requests: float = 1.0, replica: str = "a") -> Heartbeat:
        self.seed += 1
        record = Record(
            "grid", version, "server_seed", self.seed, 0, self.draw(self.bundles[version], count, seed=self.seed), 0.0
        )
        return Heartbeat(replica, 0.0, (record,), {'requests_total{model="grid",status="200"}': requests})


@pytest.fixture
def world(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> World:
    return World(tmp_path, make_bundle, draw)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(**options: object) -> Running:
        running.append(
            Running(Options(**{"registry": tmp_path / "registry", "home": tmp_path, "port": 0, "probe_rate": 0} | options))
        )
        return running[-1]

    yield start
    for service in running:
        service.stop()


def monitored(state: dict) -> int:
    return state["models"].get("grid", {"snapshot": {"monitored": -1}})["snapshot"]["monitored"]


def verdict(state: dict) -> str:
    return state["models"]["grid"]["snapshot"]["verdict"]["id"]


def test_from_heartbeats_to_an_alarm_and_back(world: World, run: Callable[..., Running]) -> None:
    service = run()
    service.post(world.heartbeat("v1", 3000, requests=5.0))
    state = service.until(lambda s: monitored(s) == 3000)
    assert verdict(state) == "healthy" and state["tap"]["replicas"] == 1 and state["tap"]["received"] == 3000
    assert service.metric("ganwatch_serving_requests_total", model="grid", status="200") == 5

    world.registry.set_alias("grid", "production", "v2", reason="inject")
    service.until(lambda s: s["models"]["grid"]["version"] == "v2")
    service.post(world.heartbeat("v2", 3000))
    state = service.until(lambda s: verdict(s) == "mode_dropping")
    assert state["models"]["grid"]["snapshot"]["verdict"]["modes"] == ["3", "8"]
    assert service.metric("ganwatch_alarm_active", verdict="mode_dropping") == 1
    (incident,) = service.http.get("/api/incidents").json()["incidents"]
    assert (incident["version"], incident["verdict"], incident["closed_at"]) == ("v2", "mode_dropping", None)

    world.registry.rollback("grid")
    state = service.until(lambda s: s["models"]["grid"]["version"] == "v1")
    assert verdict(state) == "healthy" and monitored(state) == 3000
    assert service.metric("ganwatch_alarm_active", verdict="mode_dropping") == 0
    assert service.http.get("/api/incidents").json()["incidents"][0]["closed_by"] == "version change"
    assert [mark["text"] for mark in state["models"]["grid"]["marks"]][-1] == "production: v1 (rollback)"


def test_an_alarm_can_be_acknowledged(world: World, run: Callable[..., Running]) -> None:
    world.registry.set_alias("grid", "production", "v2", reason="inject")
    service = run()
    service.post(world.heartbeat("v2", 3000))
    service.until(lambda s: monitored(s) == 3000)
    assert service.http.post("/api/ack", json={"model": "grid"}).json()["acknowledged"][0]["version"] == "v2"
    assert verdict(service.http.get("/api/state").json()) == "warming_up"  # at once, not a second later
    assert service.http.post("/api/ack", json={"model": "grid"}).json() == {"acknowledged": []}
    for body, status, field in (
        (b'{"model": "nobody"}', 404, "model"),
        (b'{"model": []}', 404, "model"),
        (b"[", 400, "model"),
        (b"{}", 400, "model"),
    ):
        answer = service.http.post("/api/ack", content=body)
        assert (answer.status_code, answer.json()["error"]["field"]) == (status, field)


def test_events_resume_where_they_broke_off(world: World, run: Callable[..., Running]) -> None:
    service = run()
    states = [state for _, state in zip(range(4), service.events(), strict=False)]
    times = [t for state in states for t in state["models"]["grid"]["history"]["t"]]
    assert times == sorted(set(times)) and len(times) >= 3  # every point once
    resumed = next(service.events(**{"Last-Event-ID": str(states[1]["now"])}))
    assert min(resumed["models"]["grid"]["history"]["t"]) > states[1]["now"]
    whole = next(service.events(**{"Last-Event-ID": "nonsense"}))
    assert whole["models"]["grid"]["history"]["t"][: len(times)] == times


def test_samples_are_pictured(world: World, run: Callable[..., Running]) -> None:
    service = run()
    assert service.http.get("/api/samples/grid.png").status_code == 204
    service.post(world.heartbeat(count=100))
    service.until(lambda s: monitored(s) == 100)
    answer = service.http.get("/api/samples/grid.png")
    assert answer.headers["content-type"] == "image/png" and np.asarray(Image.open(io.BytesIO(answer.content))).any()
    assert service.http.get("/api/samples/nobody.png").status_code == 404


def test_bad_bodies_are_refused_in_words_and_disturb_nothing(world: World, run: Callable[..., Running]) -> None:
    service = run()
    good = world.heartbeat()
    samples = np.zeros((1, 2), np.float32)
    bad = {
        b"": "not a heartbeat",
        b"{}": "",
        good.encode()[:-40]: "",
        Heartbeat("", 0.0, (), {}).encode(): "replica",
        Heartbeat("a", 0.0, (), {"samples total": 1.0}).encode(): "samples total",
        Heartbeat("a", 0.0, (), {"samples_total": float("nan")}).encode(): "nan",
        Heartbeat("a", 0.0, (Record("grid", "v1", "server_seed", 1, 0, samples[0, 0:1], 0.0),), {}).encode(): "shape [1]",
    }
    wrong = [
        *(("label", (0, 1), "label of record 0"), ("label", 10**30, "label of record 0"), ("truncation", 0.0, "truncation 0.0"), ("at", float("inf"), "time of record 0")),
        *((name, value, "") for name, value in (("label", "a"), ("label", 0.5), ("truncation", "much"), ("seed", [1]), ("at", "now"))),  # tests know their types besides
    ]
    for name, value, words in wrong:
        record = Record("grid", "v1", "server_seed", 1, 0, samples, 0.0)
        record.__dict__[name] = value  # which the types of our own code would not let pass
        bad[Heartbeat("a", 0.0, (record,), {}).encode()] = words
    for body, words in bad.items():
        answer = service.http.post("/api/records", content=body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    too_long = service.http.post("/api/records", content=(bytes(2**20) for _ in range(BODY_LIMIT // 2**20 + 1)))
    assert too_long.status_code == 413 and "longer" in too_long.json()["error"]["message"]
    assert service.http.get("/nowhere").json()["error"]["code"] == "not_found"
    assert service.http.get("/api/records").status_code == 405
    service.post(good)
    service.until(lambda s: monitored(s) == 100)


def test_another_sites_page_may_not_post(world: World, run: Callable[..., Running]) -> None:
    service = run()
    assert service.http.post("/api/ack", json={"model": "grid"}, headers={"Origin": "http://evil.example"}).status_code == 403
    assert service.http.post("/api/ack", json={"model": "grid"}, headers={"Origin": service.url}).status_code == 200


def test_what_fails_in_one_version_is_told_and_leaves_the_rest_of_the_heartbeat(world: World, run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    world.registry.set_alias("grid", "canary", "v2", reason="test")
    service = run()
    monitors = service.server.config.app.state.service.watch._watched
    monkeypatch.setattr(monitors["grid", "v2"].monitor, "update", lambda *_, **__: 1 / 0)
    bad, good = world.heartbeat("v2"), world.heartbeat("v1")
    service.post(Heartbeat("a", 0.0, bad.records + good.records, {}))
    state = service.until(lambda s: monitored(s) == 100)
    assert any("grid v2, 1 records: ZeroDivisionError" in words for words in state["errors"])
    assert service.metric("ganwatch_records_dropped_total", reason="failed") == 1
    assert service.metric("ganwatch_records_dropped_total", reason="queue_full") == 0


def test_a_full_inbox_drops_and_counts(world: World, run: Callable[..., Running]) -> None:
    service = run(inbox=50)
    service.post(world.heartbeat(count=51))
    service.post(world.heartbeat(count=50))
    service.until(lambda s: monitored(s) == 50)
    assert service.metric("ganwatch_records_dropped_total", reason="queue_full") == 1


def test_what_was_judged_is_saved_every_second_while_much_waits(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record fills the inbox, and each 1,024 samples of it take the eye .3 s: what is not saved by then is what waits, and that can be read."""
    clock = [100.0]
    monkeypatch.setattr("monitoring.service.time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    service = Service(Options(registry=tmp_path / "registry", home=tmp_path, probe_rate=0))
    samples = np.tile(world.draw(world.bundles["v1"], 4096), (16, 1))
    assert service.inbox.put(Record("grid", "v1", "observed", NO_SEED, 0, samples, 0.0)) and service.inbox.samples == 65_536
    watched, seen = service.watch._watched["grid", "v1"], []
    update, save = watched.monitor.update, service.watch.save

    def slowly(part: ndarray, **options: object) -> None:
        assert watched.eaten - max(0, watched.saved) <= 4 * 1024 and service.inbox.samples == 65_536
        update(part, **options)
        clock[0] += 0.3
        if watched.eaten == len(samples):
            service.stopping.set()

    def counted() -> None:
        seen.append(clock[0])
        save()

    monkeypatch.setattr(watched.monitor, "update", slowly)
    monkeypatch.setattr(service.watch, "save", counted)
    exposed = service.exporter.render("")[0].decode()
    service._work()
    assert "ganwatch_samples_waiting 65536.0" in exposed and service.trouble == {}
    assert len(seen) > 15 and np.diff(seen).max() < 1.0 + 0.3 + 1e-6 and watched.saved == len(samples)
    assert service.inbox.take(0.0) == [] and service.inbox.samples == 0
    service.close()


def test_every_sample_posted_at_once_by_many_replicas_arrives(world: World, run: Callable[..., Running]) -> None:
    service = run()
    heartbeats = [world.heartbeat(count=64, replica=str(i)) for i in range(40)]
    threads = [threading.Thread(target=service.post, args=(heartbeat,)) for heartbeat in heartbeats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = service.until(lambda s: monitored(s) == 40 * 64)
    assert state["tap"]["replicas"] == 40 and state["errors"] == []
    assert service.http.get("/healthz").json()["ok"]


class Serving(ThreadingHTTPServer):
    """Answers sample requests with `status` and no body, and remembers the probes among them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status, self.requests, self.asked = 200, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Serving)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "seed" not in body:  # else it is the replay audit, which has tests of its own
            self.server.requests.append((self.path, self.headers["X-Ganwatch-Probe"], body))
            self.server.asked.set()
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serving() -> Iterator[Serving]:
    server = Serving()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_probes_make_up_for_missing_fresh_samples(world: World, run: Callable[..., Running], serving: Serving) -> None:
    service = run(probe_rate=50, serving_url=serving.url)
    assert serving.asked.wait(10)
    assert serving.requests[0] == ("/v1/models/grid/versions/v1/sample", "1", {"n": 50})
    serving.status = 503
    state = service.until(lambda s: s["errors"])
    assert "answered 503" in state["errors"][0]
    assert (
        service.metric("ganwatch_probe_requests_total", outcome="ok") >= 1
        and service.metric("ganwatch_probe_requests_total", outcome="refused") >= 1
    )
    serving.status = 200
    service.until(lambda s: not s["errors"])


def test_no_probe_is_sent_while_clients_draw_enough(world: World, run: Callable[..., Running], serving: Serving) -> None:
    service = run(probe_rate=50, serving_url=serving.url)
    for _, _ in zip(range(4), service.events(), strict=False):  # about three seconds of a client that draws 200 a second
        service.post(world.heartbeat(count=200))
    assert len(serving.requests) <= 1  # none but perhaps before the first heartbeat


def test_unreachable_serving_is_counted_and_said(world: World, run: Callable[..., Running]) -> None:
    with listen("127.0.0.1", 0) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    service = run(probe_rate=50, serving_url=url)
    assert url in service.until(lambda s: s["errors"])["errors"][0]
    assert service.metric("ganwatch_probe_requests_total", outcome="unreachable") >= 1


COMMAND = (sys.executable, "-m", "monitoring.service")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_answers_and_stops_at_a_signal_with_a_reader_connected(
    tmp_path: Path, world: World, stop: signal.Signals
) -> None:
    command = [*COMMAND, "--registry", str(tmp_path / "registry"), "--home", str(tmp_path), "--port", "0", "--probe-rate", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[-1]
        with httpx.stream("GET", f"{url}api/events", trust_env=False, timeout=20) as stream:
            assert next(stream.iter_lines()).startswith("id: ")
            process.send_signal(stop)
            assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""


def test_the_readme_posts_what_another_server_serves(tmp_path: Path, world: World, run: Callable[..., Running]) -> None:
    """Both of its examples, word for word but for the model and the port."""
    service, samples = run(), world.draw(world.bundles["v1"], 1000, seed=1)
    words = (Path(__file__).parents[2] / "README.md").read_text().partition("## Watching what another server serves")[2]
    words = words.replace("observe/digits", "observe/grid").replace("http://127.0.0.1:9464", service.url)
    curl, python = (words.split(f"```{language}\n")[1].split("```")[0] for language in ("bash", "python"))
    np.save(tmp_path / "stream.npy", samples)
    done = subprocess.run(curl, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"model": "grid", "version": "v1", "received": 1000, "judged": True}, done.stderr
    exec(python, {"samples": world.draw(world.bundles["v1"], 500, seed=2)})
    assert verdict(service.until(lambda state: monitored(state) == 1500)) == "healthy"


def test_a_port_in_use_names_the_process(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [*COMMAND, "--home", str(tmp_path), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "held by process" in done.stderr and "Traceback" not in done.stderr


def test_a_home_in_use_is_named_and_free_again_when_its_monitor_stops(tmp_path: Path, run: Callable[..., Running]) -> None:
    service = run()
    done = subprocess.run([*COMMAND, "--home", str(tmp_path), "--port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"{tmp_path}/monitor/.lock" in done.stderr and "choose another --home" in done.stderr and len(done.stderr.splitlines()) == 1
    service.stop()
    assert run().http.get("/healthz").json()["ok"]


def test_a_senseless_flag_is_named(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--home", str(tmp_path), "--arl", "0.5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "arl is 0.5" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("arl", 1.0), ("arl", float("inf")), ("arl", "moth"), ("test_rate", 0.0), ("port", 65536), ("inbox", 0), ("probe_rate", -1), ("serving_url", "nonsense"), ("serving_url", "http://localhost:abc"), ("merge_into", "http://localhost:abc")],
)
def test_senseless_options_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is '?{value}"):
        Options(**{name: value})


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="probe_rate is 50, and no more than 20 samples a second are tested"):
        Options(arl="month", test_rate=20.0)
    with pytest.raises(ValueError, match="state arl in samples"):
        Options(arl="month", merge_into="http://127.0.0.1:9464")
    assert Options(arl="month").budget.samples == 2.592e9


def test_a_budget_in_time_is_kept_and_said_both_ways(world: World, run: Callable[..., Running]) -> None:
    service = run(arl="week", test_rate=1e-3)
    service.post(world.heartbeat(count=500))
    state = service.until(lambda s: "grid" in s["models"] and s["models"]["grid"]["untested"] == 500)
    assert state["budget"] == {"samples": pytest.approx(604.8), "seconds": 604_800.0, "test_rate": 1e-3}
    assert monitored(state) == 0 and state["models"]["grid"]["snapshot"]["served"] == 500


def test_a_page_of_another_site_is_refused_by_its_name(world: World, run: Callable[..., Running]) -> None:
    """A name that somebody else makes point at this machine, which passes for the same origin."""
    service = run()
    foreign = {"Host": "evil.example:9464", "Origin": "http://evil.example:9464"}
    assert service.http.get("/api/state", headers=foreign).status_code == 400
    assert service.http.post("/api/ack", headers=foreign, json={"model": "grid"}).status_code == 400
    assert service.http.get("/api/state", headers={"Host": "localhost:9464"}).status_code == 200


def test_two_monitors_that_see_half_each_give_the_verdict_of_one(tmp_path: Path, world: World, run: Callable[..., Running]) -> None:
    """Two real services over one registry: the sum says what one monitor of all samples says; one acknowledgement settles both."""
    world.registry.set_alias("grid", "production", "v2", reason="inject")
    head = run()
    shard = run(home=tmp_path / "shard", registry=tmp_path / "registry", merge_into=head.url)
    one = run(home=tmp_path / "one", registry=tmp_path / "registry")
    for i in range(6):
        heartbeat = world.heartbeat("v2", 200)
        one.post(heartbeat)
        (head, shard)[i % 2].post(heartbeat)
    single = one.until(lambda s: monitored(s) == 1200)
    joined = head.until(lambda s: monitored(s) == 1200)
    assert verdict(joined) == verdict(single) == "mode_dropping"
    ours, alone = (s["models"]["grid"]["snapshot"] for s in (joined, single))
    assert ours["verdict"]["modes"] == alone["verdict"]["modes"] == ["3", "8"] and joined["models"]["grid"]["shards"] == 1
    assert ours["gauges"]["fresh"]["js"]["value"] == pytest.approx(alone["gauges"]["fresh"]["js"]["value"])
    assert head.metric("ganwatch_alarm_active", verdict="mode_dropping", role="production") == 1 and head.metric("ganwatch_shards") == 1
    assert monitored(shard.http.get("/api/state").json()) == 600
    joined = [s for _, s in zip(range(4), head.events(), strict=False)][-1]
    assert monitored(joined) == 1200  # states come again and again and count once

    head.http.post("/api/ack", json={"model": "grid"}).raise_for_status()
    assert verdict(head.http.get("/api/state").json()) == "warming_up"
    head.until(lambda s: s["models"]["grid"]["shards"] == 1)  # the shard has heard of it and began anew
    state = head.http.get("/api/state").json()
    assert verdict(state) == "warming_up" and monitored(state) == 1200 and shard.http.get("/api/state").json()["errors"] == []
    shard.post(world.heartbeat("v2", 800))
    head.until(lambda s: verdict(s) == "mode_dropping")


def test_states_that_do_not_fit_are_refused_in_words(tmp_path: Path, world: World, run: Callable[..., Running]) -> None:
    head = run()
    assert head.http.post("/v1/merge/grid/v1", content=b"x").json()["error"]["field"] == "shard"
    assert head.http.post("/v1/merge/grid/v1?shard=a", content=b"x").status_code == 400
    shard = run(home=tmp_path / "shard", registry=tmp_path / "registry", merge_into=head.url, arl=1e6)
    words = shard.until(lambda s: any("states are refused" in e for e in s["errors"]))["errors"][0]
    assert ": 409 " in words and "arl is 1000000.0, here it is 2600000000.0" in words
    answer = shard.http.post("/v1/merge/grid/v1?shard=a", content=b"x")
    assert answer.status_code == 409 and f"sends its own states to {head.url}" in answer.json()["error"]["message"]
    head.server.should_exit = True
    head.thread.join(20)
    shard.until(lambda s: any("states do not reach" in e for e in s["errors"]))
