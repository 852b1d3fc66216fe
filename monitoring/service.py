"""The monitor's process: takes in what replicas report, runs the Monitors, answers with metrics, state, events and the live page.

    python -m monitoring.service --registry .ganwatch/registry --serving-url http://127.0.0.1:8000

Four threads: the event loop, which only moves bytes; one that owns every Monitor and is fed through a bounded inbox; one that
probes; one that runs samples again. It knows no statistics.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import math
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import tyro
import uvicorn
from numpy import ndarray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from threadpoolctl import threadpool_limits

from monitoring import picture
from monitoring.audit import Compared, certified
from monitoring.acting import Policy
from monitoring.budget import Budget
from monitoring.incidents import Incidents
from monitoring.metrics import Exporter
from monitoring.probes import Prober, Target
from monitoring.replicas import parse_counter
from monitoring.reruns import Rerun, Reruns
from monitoring.runs import Runs
from monitoring.shipping import Shipper, shard_name
from monitoring.states import StateError, States, decode
from monitoring.view import View
from monitoring.watch import NO_SEED, Watch
from serving.records import ORIGINS, Heartbeat, Origin, Record
from training.bundle import Bundle, check_window
from training.registry import Registry, ganwatch_home

PAGE = Path(__file__).parent / "page"
BODY_LIMIT = 64 * 2**20  # bytes of one heartbeat
FOLLOW_PERIOD = 0.25  # seconds between looks at the registry
TAKE = 8192  # samples judged between two looks at clock and registry
PUBLISH_PERIOD = 1.0  # seconds between views
SAVE_PERIOD = 1.0  # seconds after a save until the next, also while there is much to judge
HEARTBEAT_PERIOD = 15.0  # seconds of silence after which an event stream says that it is alive

log = logging.getLogger("ganwatch.monitor")


@dataclass(frozen=True)
class Options:
    """Watch what is served and say when it is no longer what was certified."""

    registry: Path | None = None
    """Directory of bundles; None: `registry` under the home."""
    host: str = "127.0.0.1"
    """Address to listen on. There is no login: whoever reaches it may read everything and acknowledge alarms."""
    port: int = 9464
    """TCP port to listen on; 0 takes a free one."""
    arl: float | str = 2.6e9
    """To a false alarm, on average, at least, per model: so many monitored samples, such as 2.6e9, or a time, such as month, week, 30d or
    12h, which is counted at --test-rate samples a second. That is for what samples say; alarms of the replay audit come besides."""
    test_rate: float | None = None
    """Fresh samples a second of each version that are tested at most, so that what `arl` says in samples holds in time, too; more are
    shown in the gauges and counted. Default: all are tested; 1,000 where `arl` is a time."""
    calibrated: bool = False
    """Lower each version's threshold to where simulated runs of its generator put it (some minutes after it came under watch): earlier
    alarms, and about one false one in `arl` samples, measured in place of guaranteed."""
    serving_url: str = "http://127.0.0.1:8000"
    """Where probes ask for samples."""
    probe_rate: int = 50
    """Fresh samples a second and model below which probes make up for the rest; 0 sends none, and no replay audit either."""
    home: Path | None = None
    """Where the record of alarms and the states of this one monitor lie; None: GANWATCH_HOME, or .ganwatch under the working directory."""
    act: bool = False
    """Change any alias for an alarm: one of the canary removes it, one of production rolls back to the last sound version. Without
    it only what was promoted with --act is changed."""
    cool_down: float = 600.0
    """Seconds after such a change in which no other is made to the same alias."""
    merge_into: str | None = None
    """URL of another monitor that sums up what this one and others like it see, once a second; none: nobody does. It takes states of no
    others itself, as its own are all that it sends."""
    inbox: int = 65_536
    """Samples that may wait for the Monitors; what comes beyond is dropped and counted. A kill loses what waits."""

    def __post_init__(self) -> None:
        rate = self.budget.rate
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must lie in 0 to 65535")
        if self.inbox < 1:
            raise ValueError(f"inbox is {self.inbox}; it must hold 1 sample or more")
        if not 0 <= self.cool_down < math.inf:
            raise ValueError(f"cool_down is {self.cool_down}; it must be a finite number of seconds, 0 or more")
        if self.probe_rate < 0:
            raise ValueError(f"probe_rate is {self.probe_rate}; it must be 0 or more samples a second")
        if rate is not None and self.probe_rate > rate:
            raise ValueError(f"probe_rate is {self.probe_rate}, and no more than {rate:g} samples a second are tested; lower it or raise test_rate")
        if rate is not None and self.merge_into is not None:
            raise ValueError(f"arl is {self.arl} at {rate:g} samples a second, and with merge_into those of several monitors add up; state arl in samples, and no test_rate")
        for name, url in (("merge_into", self.merge_into), ("serving_url", self.serving_url)):
            if url is not None and not _is_http(url):
                raise ValueError(f"{name} is {url!r}; it must be an http:// or https:// URL")

    @property
    def budget(self) -> Budget:
        return Budget.stated(self.arl, self.test_rate)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # a port that is no number raises here
    except ValueError:
        return False


@dataclass(frozen=True)
class Audited:
    """A replay audit of `bundle`: what came of its golden samples."""

    bundle: Bundle
    found: Compared


Ask = tuple[Callable[[float], Any], Future[Any]]  # what to do at a time in the Monitors' thread, and who waits for it
Item = Heartbeat | Record | Audited | Rerun | Ask


class Inbox:
    """What waits for the Monitors' thread: heartbeats and observed records, bounded in samples; audits and requests."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dropped = 0  # records
        self._waiting: deque[Item] = deque()
        self._samples = self._taken = 0  # that wait, and that were taken last
        self._news = threading.Condition()

    def put(self, item: Item) -> bool:
        """Never waits. A heartbeat that does not fit is dropped whole: its counters are totals and come again with the next.

        Returns whether the item was taken.
        """
        weight = _weight(item)
        with self._news:
            if self._samples + weight > self.limit:
                self.dropped += len(_records(item))
                return False
            self._samples += weight
            self._waiting.append(item)
            self._news.notify()
        return True

    @property
    def samples(self) -> int:
        """Samples that were acknowledged and are not judged yet, as a kill would lose them; those being judged are among them, and a
        heartbeat without any counts as one."""
        with self._news:
            return self._samples + self._taken

    def take(self, timeout: float) -> list[Item]:
        """What waits, oldest first, up to about TAKE samples; nothing after `timeout` seconds. What was taken before has been judged."""
        items, taken = [], 0
        with self._news:
            self._taken = 0
            if not self._waiting:
                self._news.wait(timeout)
            while self._waiting and taken < TAKE:
                items.append(self._waiting.popleft())
                taken += _weight(items[-1])
            self._samples, self._taken = self._samples - taken, taken
        return items


def _records(item: Item) -> tuple[Record, ...]:
    return item.records if isinstance(item, Heartbeat) else (item,) if isinstance(item, Record) else ()


def _weight(item: Item) -> int:
    """Samples, or 1 for a heartbeat without any: that takes room, too."""
    return sum(len(record.samples) for record in _records(item)) or int(isinstance(item, Heartbeat))


class Service:
    """The monitor between its inbox and its views."""

    def __init__(self, options: Options) -> None:
        home = options.home or ganwatch_home()
        self.options = options
        budget, states = options.budget, States(home / "monitor")
        self._lock = states.hold()
        self.incidents = Incidents(home / "incidents.db")
        registry = Registry(options.registry or home / "registry")
        policy = Policy(registry, options.cool_down, always=options.act)
        self.watch = Watch(registry, self.incidents, arl=budget.samples, test_rate=budget.rate, states=states, policy=policy, calibrated=options.calibrated)
        self.inbox = Inbox(options.inbox)
        self.prober = Prober(options.serving_url, options.probe_rate, self._targets, self._bundles, self._audited)
        self.reruns = Reruns(lambda bundle: certified(bundle, registry), self.inbox.put)
        self.runs = Runs(home / "runs")
        self.exporter = Exporter(
            lambda: (self.view, {"queue_full": self.inbox.dropped}, dict(self.prober.outcomes)),
            lambda: self.runs.shown,
            lambda: (dict(self.reruns.outcomes), dict(self.reruns.latents)),
            lambda: self.inbox.samples,
        )
        self.shipper: Shipper | None = None
        if options.merge_into is not None:
            settle = lambda model, version, at: self.ask(lambda _: self.watch.acknowledged(model, version, at))  # noqa: E731
            self.shipper = Shipper(options.merge_into, shard_name(home), settle)
        self.trouble: dict[str, str] = {}  # step of the Monitors' thread -> why it failed when it was last taken
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="monitors", daemon=True)
        now = time.time()
        self._step(self.watch.follow, now)
        self._step(self.runs.look, now)
        self.view: View = self.watch.publish(now)
        self.viewed = time.monotonic()
        self._saved = self.viewed  # when the last save ended

    def start(self) -> None:
        self._thread.start()
        self.reruns.start()
        if self.options.probe_rate:
            self.prober.start()
        if self.shipper is not None:
            self.shipper.start()

    def stop(self) -> None:
        self.stopping.set()
        self._thread.join()
        self.reruns.stop()
        if self.options.probe_rate:
            self.prober.stop()
        if self.shipper is not None:
            self.shipper.stop()
        self.close()

    def close(self) -> None:
        """Leave the home to the next monitor."""
        self.incidents.close()
        self._lock.close()

    def state(self, view: View, since: float = -math.inf) -> dict[str, Any]:
        """The JSON of /api/state: the view, with what troubles the process itself."""
        state, watched = view.state(since), {(name, live.version) for name, shown in view.models.items() for live in shown.live}
        reruns = [words for version, words in dict(self.reruns.trouble).items() if version in watched]
        state["errors"] += [*self.prober.trouble.values(), *self.prober.audit_trouble.values(), *reruns, *self.runs.trouble.values(), *self.trouble.values(), *filter(None, [self.shipper and self.shipper.trouble])]
        return state

    def ask(self, what: Callable[[float], Any]) -> Future[Any]:
        """What `what`, called with the time in the Monitors' thread, returns or raises, once readers see its effect."""
        answer: Future[Any] = Future()
        self.inbox.put((what, answer))
        return answer

    def acknowledge(self, model: str) -> Future[list[dict[str, Any]]]:
        """The incidents that acknowledging the alarms of `model` settles, when that is done; KeyError where it is not watched."""
        return self.ask(lambda at: self.watch.acknowledge(model, at))

    def _targets(self) -> list[Target]:
        return [
            Target(name, live.version, live.fresh_rate, live.comparison["against"] if live.comparison else None)
            for name, shown in self.view.models.items()
            for live in shown.live
        ]

    def _bundles(self) -> list[Bundle]:
        return [bundle for shown in self.view.models.values() for bundle in shown.bundles.values()]

    def _audited(self, bundle: Bundle, found: Compared) -> None:
        self.inbox.put(Audited(bundle, found))

    def _run_again(self, records: list[Record]) -> None:
        """Pass on what came with latents, of versions that are watched; others are counted where they are eaten."""
        noted: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            if record.z is not None:
                noted.setdefault((record.model, record.version), []).append(record)
        for key, group in noted.items():
            if (bundle := self.watch.bundle(*key)) is not None:
                self._step(self.reruns.offer, bundle, group)

    def _reran(self, rerun: Rerun, now: float) -> None:
        if self.watch.reran(rerun, now):
            self.prober.hurry(rerun.bundle)  # golden samples tell how much of the model is another one

    def _work(self) -> None:
        followed = published = time.monotonic()  # periods must not depend on a clock that people set
        while not self.stopping.is_set():
            items = self.inbox.take(timeout=0.1)
            now, elapsed = time.time(), time.monotonic()
            if elapsed - followed >= FOLLOW_PERIOD:
                followed = elapsed
                self._step(self.watch.follow, now)
            for heartbeat in (item for item in items if isinstance(item, Heartbeat)):
                self._step(self.watch.hear, heartbeat, now)
            if records := [record for item in items for record in _records(item)]:
                self._step(self.watch.eat, records, now, self._save_when_due)
                self._step(self._run_again, records)
            self._step(self.watch.act, now)
            for audited in (item for item in items if isinstance(item, Audited)):
                self._step(self.watch.audited, audited.bundle, audited.found)
            for rerun in (item for item in items if isinstance(item, Rerun)):
                self._step(self._reran, rerun, now)
            answers = [item for item in items if isinstance(item, tuple)]
            closed: list[tuple[Future[Any], Any]] = []
            for what, answer in answers:
                try:
                    closed.append((answer, what(now)))
                except Exception as error:  # the caller's answer, not the end of the watch
                    answer.set_exception(error)
            if self.watch.changed or elapsed - published >= PUBLISH_PERIOD:
                point = elapsed - published >= PUBLISH_PERIOD
                published = elapsed if point else published
                self._step(self._publish, now, point)
                if point:
                    self._save()
                    self._step(self.runs.look, now)
                    if self.shipper is not None:
                        self._step(self._ship)
            for answer, incidents in closed:  # the view says so already when the caller hears of it
                answer.set_result(incidents)
        self._save()

    def _save(self) -> None:
        self._step(self.watch.save)
        self._saved = time.monotonic()  # a slow disk does not keep everything from being judged

    def _save_when_due(self) -> None:
        """However much there is to judge and however slow the eye: what was judged is not lost with what waits."""
        if time.monotonic() - self._saved >= SAVE_PERIOD:
            self._save()

    def _ship(self) -> None:
        assert self.shipper is not None
        self.shipper.offer({key: self.watch.state(*key) for key in self.watch.live()})

    def _publish(self, now: float, point: bool) -> None:
        self.view = self.watch.publish(now, point=point)
        self.viewed = time.monotonic()

    def _step(self, step: Any, *arguments: Any) -> None:
        """One step of the Monitors' thread. An error of ours is shown and logged, and does not end the watch."""
        try:
            step(*arguments)
            self.trouble.pop(step.__name__, None)
        except Exception as error:
            log.exception("%s failed", step.__name__)
            self.trouble[step.__name__] = (
                f"internal error in {step.__name__}: {type(error).__name__}: {error}; the log has the traceback, please report it"
            )


def build(options: Options) -> Starlette:
    """The ASGI application; its lifespan starts and stops the threads. `app.state.service` is the Service."""
    service = Service(options)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    async def metrics(request: Request) -> Response:
        body, content_type = await asyncio.to_thread(service.exporter.render, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def healthz(request: Request) -> Response:
        late = time.monotonic() - service.viewed
        alive = late < 10 * PUBLISH_PERIOD
        return JSONResponse({"ok": alive, "seconds_since_last_view": round(late, 3)}, 200 if alive else 503)

    async def state(request: Request) -> Response:
        return JSONResponse(service.state(service.view))

    async def events(request: Request) -> Response:
        try:
            since = float(request.headers.get("last-event-id", "-inf"))
        except ValueError:
            since = -math.inf
        return StreamingResponse(
            _events(request, service, since), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def samples(request: Request) -> Response:
        model = request.path_params["model"]
        shown = service.view.models.get(model)
        if shown is None:
            return _error(
                404, "unknown_model", f"no watched model {model!r}", "model", model, f"one of {sorted(service.view.models)}"
            )
        if (newest := shown.samples()) is None:
            return Response(status_code=204)  # none was served yet
        try:
            body = await asyncio.to_thread(picture.png, newest)
        except ValueError as error:
            return _error(404, "no_picture", str(error), "model", model, "a model of images or of vectors in the plane")
        return Response(body, media_type="image/png", headers={"Cache-Control": "no-store"})

    async def training(request: Request) -> Response:
        return JSONResponse({"now": time.time(), "runs": service.runs.shown})

    async def incidents(request: Request) -> Response:
        return JSONResponse({"incidents": await asyncio.to_thread(service.incidents.newest)})

    async def records(request: Request) -> Response:
        body = await _body(request, BODY_LIMIT)
        try:
            heartbeat = await asyncio.to_thread(_decode, body)
        except ValueError as error:
            return _error(400, "bad_heartbeat", str(error), None, None, "the bytes of serving.records.Heartbeat.encode")
        service.inbox.put(heartbeat)
        return Response(status_code=204)

    async def observe(request: Request) -> Response:
        model = request.path_params["model"]
        if (shown := service.view.models.get(model)) is None:
            return _error(404, "unknown_model", f"no watched model {model!r}", "model", model, f"one of {sorted(service.view.models)}")
        reference = request.query_params.get("version", shown.alias)
        card = next((card for alias, card in shown.cards.items() if reference in (alias, card.version)), None)
        if card is None:
            return _error(404, "unknown_version", f"{reference!r} of {model} is not watched", "version", reference, f"one of {sorted(shown.cards)}, or a version")
        iid = request.query_params.get("iid", request.headers.get("X-Ganwatch-Iid", "false"))
        if iid not in ("true", "false"):
            return _error(422, "bad_field", f"iid is {iid!r}", "iid", iid, "true where the samples are independent draws of the model's law, else false")
        body = await _body(request, BODY_LIMIT)
        try:
            samples = _observed(body, request.headers)
        except ValueError as error:
            return _error(422, "bad_samples", str(error), "body", None, f"npy, or raw with X-Ganwatch-Shape; {card.sample_dtype} [n, {', '.join(map(str, card.sample_shape))}]")
        if samples.dtype != card.sample_dtype or samples.shape[1:] != card.sample_shape:
            found, wanted = (f"{dtype} [{', '.join(map(str, shape))}]" for dtype, shape in ((samples.dtype, samples.shape), (card.sample_dtype, ("n", *card.sample_shape))))
            return _error(422, "bad_samples", f"the body holds {found}", "body", found, wanted)
        origin: Origin = "observed_iid" if iid == "true" else "observed"  # only the former may be evidence for an alarm
        if not service.inbox.put(Record(model, card.version, origin, NO_SEED, 0, samples, time.time())):
            return _error(503, "busy", f"{len(samples)} samples found no room beside those that wait", None, len(samples), "fewer at a time, or later")
        return JSONResponse({"model": model, "version": card.version, "received": len(samples), "judged": iid == "true"}, 202)

    async def merge(request: Request) -> Response:
        model, version, shard = request.path_params["model"], request.path_params["version"], request.query_params.get("shard", "")
        if not 0 < len(shard) <= 256:
            return _error(422, "bad_field", "the shard has no name, or one too long", "shard", shard, "?shard=NAME, the same one whenever the same monitor sends")
        body = await _body(request, BODY_LIMIT)
        if (onward := options.merge_into) is not None:
            words = f"this monitor sends its own states to {onward}, and would leave out what it is sent; send it there"
            return _error(409, "other_monitor", words, None, None, "a monitor without --merge-into")
        try:
            state = await asyncio.to_thread(decode, body)
            at = await asyncio.wrap_future(service.ask(lambda now: service.watch.merge(model, version, shard, state, now)))
        except StateError as error:
            return _error(400, "bad_state", f"the body is no state: {error}", "body", None, "what a monitor with --merge-into sends")
        except KeyError:
            live = {name: [live.version for live in shown.live] for name, shown in service.view.models.items()}
            return _error(404, "unknown_version", f"{version!r} of {model!r} is not watched", "version", version, f"one of {live}")
        except ValueError as error:
            return _error(409, "other_monitor", str(error), "body", None, "a state of the same bundle, --arl and alias, --calibrated only where this monitor is")
        return JSONResponse({"acknowledged_at": at})

    async def acknowledge(request: Request) -> Response:
        body = await _body(request, 4096)
        try:
            model = str(json.loads(body)["model"])
        except (ValueError, KeyError, TypeError):
            return _error(400, "bad_body", "the body names no model", "model", None, 'JSON like {"model": "digits"}')
        try:
            closed = await asyncio.wrap_future(service.acknowledge(model))
        except KeyError:
            return _error(
                404, "unknown_model", f"no watched model {model!r}", "model", model, f"one of {sorted(service.view.models)}"
            )
        return JSONResponse({"acknowledged": closed})

    routes = [
        Route("/", page),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/api/state", state),
        Route("/api/events", events),
        Route("/api/samples/{model}.png", samples),
        Route("/api/incidents", incidents),
        Route("/api/training", training),
        Route("/api/records", records, methods=["POST"]),
        Route("/api/ack", acknowledge, methods=["POST"]),
        Route("/v1/merge/{model}/{version}", merge, methods=["POST"]),
        Route("/v1/observe/{model}", observe, methods=["POST"]),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    # A page of another site, whose name was made to point here, is told apart by that name alone.
    local = options.host in ("127.0.0.1", "localhost", "::1")
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"] if local else ["*"])
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[guard], exception_handlers={HTTPException: _http_error})
    app.state.service = service
    return app


async def _events(request: Request, service: Service, since: float) -> AsyncIterator[str]:
    """A `state` event for every view: first the whole, then only the points of the histories that are new since the last."""
    seen, spoke = None, time.monotonic()
    while not request.app.state.stopping():
        if (view := service.view) is not seen:
            seen, spoke = view, time.monotonic()
            data = json.dumps(service.state(view, since), allow_nan=False, separators=(",", ":"))
            yield f"id: {view.at}\nevent: state\ndata: {data}\n\n"
            since = view.at
        elif time.monotonic() - spoke > HEARTBEAT_PERIOD:
            spoke = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(0.1)


async def _body(request: Request, limit: int) -> bytes:
    """The body; refused once it is known to be too long, and from another site's page, which a browser would let post."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, f"origin is {origin!r}; only this monitor's own page may post from a browser")
    too_long = HTTPException(413, f"body is longer than {limit} bytes; send fewer records at a time")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:  # what is no number, the server has refused or the bytes will tell
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_long
    return bytes(body)


def _observed(body: bytes, headers: Mapping[str, str]) -> ndarray:
    """The samples in the body of an observation: npy, or raw little-endian values with X-Ganwatch-Shape and X-Ganwatch-Dtype."""
    if (shape := headers.get("X-Ganwatch-Shape")) is None:
        try:
            samples = np.load(io.BytesIO(body), allow_pickle=False)
        except Exception as error:  # a broken header raises whatever tokenizer, zip reader or allocator make of it
            raise ValueError(f"the body is no npy: {error}") from error
        if not isinstance(samples, ndarray) or samples.ndim < 2:
            raise ValueError("the body is no single array [n, ...]")
        return samples
    dtype = headers.get("X-Ganwatch-Dtype", "uint8")
    if dtype not in ("uint8", "float32"):
        raise ValueError(f"X-Ganwatch-Dtype is {dtype!r}; it must be uint8 or float32")
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})+", shape):
        raise ValueError(f"X-Ganwatch-Shape is {shape!r}; it must be like 64,28,28,1")
    sides = [int(side) for side in shape.split(",")]
    if math.prod(sides) * np.dtype(dtype).itemsize != len(body):
        raise ValueError(f"the body has {len(body)} bytes; X-Ganwatch-Shape {shape} of {dtype} takes {math.prod(sides) * np.dtype(dtype).itemsize}")
    return np.frombuffer(body, np.dtype(dtype).newbyteorder("<")).reshape(sides)


def _decode(body: bytes) -> Heartbeat:
    """The heartbeat in `body`, with the types that its annotations promise. Raises ValueError naming field and value."""
    heartbeat = Heartbeat.decode(body)
    if not isinstance(heartbeat.replica, str) or not 0 < len(heartbeat.replica) <= 256:
        raise ValueError(f"replica is {heartbeat.replica!r}; expected a text of 1 to 256 characters")
    if not isinstance(heartbeat.counters, dict):
        raise ValueError(f"counters are {heartbeat.counters!r}; expected an object of numbers")
    for name, value in heartbeat.counters.items():
        parse_counter(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"counter {name} is {value!r}; expected a finite number")
    for i, record in enumerate(heartbeat.records):
        if record.origin not in ORIGINS:
            raise ValueError(f"origin of record {i} is {record.origin!r}; expected one of {', '.join(ORIGINS)}")
        if not isinstance(record.model, str) or not isinstance(record.version, str):
            raise ValueError(f"record {i} is of model {record.model!r}, version {record.version!r}; expected two texts")
        if record.samples.ndim < 2:
            raise ValueError(f"samples of record {i} have shape {list(record.samples.shape)}; expected [k, *sample_shape]")
        if type(record.seed) is not int or type(record.offset) is not int or not isinstance(record.truncation, int | float) or not 0 < record.truncation <= 1:
            raise ValueError(f"record {i} has seed {record.seed!r}, offset {record.offset!r}, truncation {record.truncation!r}; expected two integers and a share")
        label = record.label
        labels = label if isinstance(label, tuple) else () if label is None else (label,)
        if not all(type(each) is int and 0 <= each < 2**31 for each in labels) or (isinstance(label, tuple) and len(label) != len(record.samples)):
            raise ValueError(f"label of record {i} is {str(label)[:100]}; expected the index of a class, or one for each of its {len(record.samples)} rows")
        if not isinstance(record.at, int | float) or not math.isfinite(record.at):
            raise ValueError(f"time of record {i} is {record.at!r}; expected Unix seconds")
        _check_latents(i, record)
    return heartbeat


def _check_latents(i: int, record: Record) -> None:
    """Raise ValueError where the latents of record `i` are not those of rows that it has."""
    if not all(type(row) is int and 0 <= row < len(record.samples) for row in record.fed) or list(record.fed) != sorted(set(record.fed)):
        raise ValueError(f"rows {record.fed[:8]} of record {i} come with latents; expected rows below {len(record.samples)}, each once, ascending")
    if record.z is None:
        return
    if record.z.dtype != np.float32 or record.z.ndim != 2 or len(record.z) != len(record.fed):
        raise ValueError(f"latents of record {i} are {record.z.dtype} {list(record.z.shape)}; expected float32 [{len(record.fed)}, d]")
    check_window(record.seed, record.offset, len(record.samples))


def _error(status: int, code: str, message: str, field: str | None, value: Any, expected: str) -> JSONResponse:
    return JSONResponse(
        {"error": {"code": code, "message": message, "field": field, "value": value, "expected": expected}}, status
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    return _error(error.status_code, code, error.detail, None, None, "see the message")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises OSError that names the process in the way."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        why = f"it is held by {_holder_of(port)}" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"cannot listen on {host}:{port}: {why}; stop it or choose another --port") from None
    return listener


def _holder_of(port: int) -> str:
    """Words for the process that listens on a TCP port."""
    try:
        pid = next(
            (c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port),
            None,
        )
        return f"process {pid} ({' '.join(psutil.Process(pid).cmdline())[:120]})" if pid else "a process of another user"
    except psutil.Error:
        return "a process that may not be looked at"


def make_server(options: Options) -> uvicorn.Server:
    """The server of the application; event streams end when it is told to exit, which is what it waits for."""
    app = build(options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    app.state.stopping = lambda: server.should_exit
    return server


def serve(options: Options) -> None:
    """Answer until SIGINT or SIGTERM. Raises OSError where the port or the home cannot be had."""
    with listen(options.host, options.port) as listener:
        server = make_server(options)
        # uvicorn stops in good order at a signal, then raises it again for whoever handled it before.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(0))
        print(f"monitor: http://{options.host}:{listener.getsockname()[1]}/", flush=True)
        server.run(sockets=[listener])


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        options = tyro.cli(Options, description=Options.__doc__)
        with threadpool_limits(1):  # a matrix at a time gains little from cores, and replicas want them
            serve(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
