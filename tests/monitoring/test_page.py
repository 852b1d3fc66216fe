"""The live page in a real browser, before the real service."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy import ndarray
from PIL import Image

from monitoring.metrics import TRAINING
from serving.records import Heartbeat, Record
from training.bundle import Bundle
from training.journal import Journal
from training.registry import Registry

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
PAGE = Path(__file__).parents[2] / "monitoring" / "page"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Monitored:
    """`python -m monitoring.service` over a registry that the test fills."""

    def __init__(self, root: Path, draw: Callable[..., ndarray]) -> None:
        self.root, self.registry, self.draw = root, Registry(root / "registry"), draw
        command = [sys.executable, "-m", "monitoring.service", "--registry", str(root / "registry"), "--home", str(root)]
        self.process = subprocess.Popen([*command, "--port", "0", "--probe-rate", "0"], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def serve(self, bundle: Bundle, count: int, seed: int = 1) -> None:
        card = bundle.card
        record = Record(card.model, card.version, "server_seed", seed, 0, self.draw(bundle, count, seed=seed), 0.0)
        httpx.post(
            f"{self.url}api/records", content=Heartbeat("a", 0.0, (record,), {}).encode(), trust_env=False
        ).raise_for_status()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self.process.stdout.close()


@pytest.fixture
def monitored(tmp_path: Path, draw: Callable[..., ndarray]) -> Iterator[Monitored]:
    monitored = Monitored(tmp_path, draw)
    yield monitored
    monitored.stop()


@pytest.fixture
def page(browser: playwright.Browser, monitored: Monitored) -> Iterator[playwright.Page]:
    """A page of a fresh context, closed before the service stops. An error that it logs fails the test, if not cleared."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.troubles = []
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("http://127.0.0.1", "data:")) else page.troubles.append(request.url),
    )
    yield page
    context.close()
    assert page.troubles == []


def see(page: playwright.Page, verdict: str) -> playwright.Locator:
    banner = page.locator(f"#verdict[data-verdict={verdict}]")
    banner.wait_for()
    return banner


def colours(page: playwright.Page) -> int:
    """How many colours a screenshot has: a blank page has few."""
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")).astype(np.int32)
    return len(np.unique(pixels @ [65536, 256, 1]))


@pytest.mark.slow
@needs_chromium
def test_what_a_person_sees_from_no_model_to_an_alarm_and_back(
    page: playwright.Page, monitored: Monitored, make_bundle: Callable[..., Bundle]
) -> None:
    page.goto(monitored.url)
    page.get_by_text("No model to watch yet").wait_for()

    healthy, lossy = (make_bundle(root=monitored.registry.root, version=v, lost=lost) for v, lost in (("v1", ()), ("v2", (3, 8))))
    monitored.registry.set_alias("grid", "production", "v1", reason="promote")
    assert "Warming up" in see(page, "warming_up").inner_text()
    monitored.serve(healthy, 4000)
    words = see(page, "healthy").inner_text()
    assert "Healthy" in words and "4,000 fresh samples" in words and "v1" in words
    page.locator("#verdict .facts dd", has_text=re.compile(r"at most one in 2.6 billion fresh samples, on average; at the last hour's [\d,.]+ a second, in \d+")).wait_for()
    assert page.evaluate("[90, 7200, 2592000, 6e7, 2.6e12].map(howLong)") == ["90 seconds", "2 hours", "30 days", "23 months", "82.4 thousand years"]
    page.wait_for_function("document.querySelector('#samples img').naturalWidth > 0")
    assert page.locator("#modes .bars g").count() == 11
    assert page.locator("#divergence canvas").count() == page.locator("#evidence canvas").count() == 1

    monitored.registry.set_alias("grid", "production", "v2", reason="inject")
    page.locator("#verdict", has_text="v2").wait_for()
    monitored.serve(lossy, 3000)
    words = see(page, "mode_dropping").inner_text()
    assert "Modes 3 and 8 are being dropped" in words and "What to do" in words and "injected" in words
    assert page.locator("#modes .bars g.alarmed text").all_text_contents() == ["3", "8"]
    assert page.title().startswith("▲ Modes 3 and 8")
    bars = page.locator("#modes .bars")
    bars.scroll_into_view_if_needed()
    bars.hover(position={"x": bars.bounding_box()["width"] * 0.36, "y": 100})  # the fourth of eleven
    page.locator("#modes .hint", has_text=re.compile(r"3: served 0.0 %.*alarmed")).wait_for()
    page.locator("#incidents li.open").wait_for()
    assert colours(page) > 300

    page.locator("#incidents li.open button").click()
    see(page, "warming_up")
    page.locator("#incidents li.closed", has_text="acknowledged").wait_for()
    monitored.registry.rollback("grid")
    page.locator("#verdict", has_text="v1").wait_for()
    assert "Promoted by force" not in page.locator("#verdict").inner_text()
    monitored.registry.set_alias("grid", "production", "v2", reason="promote", forced="the mode 3 is served below its share")
    page.locator("#verdict .facts", has_text="Promoted by force").wait_for()
    assert "the mode 3 is served below its share" in page.locator("#verdict").inner_text()


@pytest.mark.slow
@needs_chromium
def test_a_person_sees_where_training_stands_and_why_it_failed(page: playwright.Page, monitored: Monitored) -> None:
    page.goto(monitored.url)
    page.get_by_text("No model to watch yet").wait_for()
    assert page.locator("#training").is_hidden()

    journal = Journal(monitored.root / "runs" / "20261125T000000-digits-0a1b2c")
    journal.write("begin", model="digits", dataset="digits", steps=8000)
    figures = {"steps": 8000, "seconds_left": 40.0, "divergence": 0.21, "accuracy": 0.81, "mode_coverage": 0.9, "forward_kl": 0.1234}
    figures |= {"tail_index": 3.21, "signal_to_noise": 12.5, "overfitting": -0.02, "data_dimension": 7.88, "latent_dimension": 16.0}
    for step in (800, 1600, 2400):
        journal.write("train", step=step, alarms={}, failing=[], **figures)
    run = page.locator("#training li.running")
    run.wait_for()
    words = run.inner_text()
    assert "digits" in words and "step 2,400 of 8,000" in words and "s left" in words and "20261125T000000-digits-0a1b2c" in words
    assert [caption.split() for caption in run.locator("figcaption").all_inner_texts()] == [
        ["Divergence", "0.21"], ["Held-out", "accuracy", "81", "%"], ["Modes", "covered", "90", "%"]
    ]  # fmt: skip
    assert run.locator("polyline").first.get_attribute("points").count(",") == 3
    assert page.evaluate("Object.keys(FIGURES)") == list(TRAINING)
    assert run.locator("dl").is_hidden()
    run.locator("summary").click()
    assert [row.split("\n") for row in run.locator("dl div").all_inner_texts()] == [
        ["Divergence", "0.21"], ["Held-out accuracy", "81 %"], ["Critic's overfitting", "-2.0 %"], ["Modes covered", "90 %"], ["Forward KL", "0.123 nats"],
        ["Tail index", "3.21"], ["Signal to noise", "12.5"], ["Data fill", "7.88 dimensions"], ["Latent's normals", "16"],
    ]  # fmt: skip

    alarm = {"mode_dropping": "the generator covers 50% of the data's modes; --packing 4 or --unroll 5"}
    journal.write("train", step=3200, alarms=alarm, failing=[*alarm], **figures)
    page.locator("#training li.running .found", has_text="the generator covers 50% of the data's modes; --packing 4").wait_for()
    assert run.locator("dl").is_visible() and page.evaluate("document.activeElement.localName") == "summary"  # though the list was drawn anew
    journal.write("failed", reason="mode 3 is dropped: <b>0.00%</b>\nmode 8 is dropped")
    failed = page.locator("#training li.failed")
    failed.wait_for()
    assert failed.locator(".found li").all_inner_texts() == ["mode 3 is dropped: <b>0.00%</b>", "mode 8 is dropped"]
    assert "not published" in failed.inner_text() and "at step 3,200 of 8,000" in failed.inner_text()
    for width in (1280, 420):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.slow
@needs_chromium
def test_a_lost_connection_is_said_and_comes_back_with_the_charts(
    page: playwright.Page, monitored: Monitored, make_bundle: Callable[..., Bundle]
) -> None:
    bundle = make_bundle(root=monitored.registry.root)
    monitored.registry.set_alias("grid", "production", "v1", reason="promote")
    page.goto(monitored.url)
    see(page, "warming_up")
    monitored.serve(bundle, 100)
    drawn = "charts.divergence.plot.data[1].filter(value => value != null).length"
    page.wait_for_function(f"{drawn} >= 3")
    assert page.locator("#lost").is_hidden()
    port = monitored.url.rstrip("/").rpartition(":")[2]
    monitored.stop()
    page.locator("#lost", has_text="Connection to the monitor lost").wait_for()
    command = [*monitored.process.args[:-4], "--port", port, "--probe-rate", "0"]
    monitored.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    page.locator("#lost").wait_for(state="hidden")
    see(page, "warming_up")
    page.reload()  # a page that remembers nothing
    see(page, "warming_up")
    assert page.evaluate(drawn) >= 3
    assert all("ERR_" in trouble for trouble in page.troubles)  # the browser's own notes of the failed requests
    page.troubles.clear()


@pytest.mark.slow
@needs_chromium
def test_it_fits_wide_and_narrow_light_and_dark(
    page: playwright.Page, monitored: Monitored, make_bundle: Callable[..., Bundle]
) -> None:
    long = "a-model-with-a-rather-long-name-that-somebody-gave-it"
    bundles = [
        make_bundle(root=monitored.registry.root, model=name, lost=lost) for name, lost in ((long, (1, 3, 8)), ("grid", ()))
    ]
    for bundle in bundles:
        monitored.registry.set_alias(bundle.card.model, "production", "v1", reason="promote")
    page.goto(monitored.url)
    page.get_by_role("tab", name=long).click()
    for bundle in bundles:
        monitored.serve(bundle, 3000)
    see(page, "mode_dropping")
    page.locator("#incidents li.open").wait_for()
    for width in (1280, 420):
        for scheme, background in (("light", "rgb(245, 246, 248)"), ("dark", "rgb(14, 17, 22)")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"document.querySelector('#divergence canvas').clientWidth < {width}")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
            assert colours(page) > 300
    page.set_viewport_size({"width": 60, "height": 900})  # what a window being dragged or opened passes through
    page.wait_for_function("document.querySelector('#modes .bars').clientWidth < 58")
    page.locator("#modes .bars svg").hover(force=True)
    page.wait_for_function("document.querySelector('#modes svg').viewBox.baseVal.width < 58")


def test_the_page_needs_nothing_from_elsewhere() -> None:
    ours = [file for file in PAGE.iterdir() if file.name in ("index.html", "app.js", "training.js", "style.css")]
    assert len(ours) == 4
    for file in ours:
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", file.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, f"{file.name} names {addresses}"
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 120_000
