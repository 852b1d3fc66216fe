"""The budget as it is stated, and that a time is kept, whatever the traffic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from monitoring.budget import CREDIT, RATE, UNITS, Allowance, Budget
from monitoring.incidents import Incidents
from monitoring.watch import PACE_STEP, PACE_STEPS, Watch
from serving.records import Record
from training.bundle import Bundle
from training.registry import Registry

START = 1_800_000_000.0


@pytest.mark.parametrize(
    ("arl", "rate", "samples", "seconds"),
    [
        (2.6e9, None, 2.6e9, None),
        ("1e4", None, 1e4, None),
        ("2.6e9", 500.0, 2.6e9, 5.2e6),
        ("month", None, 2.592e9, 2_592_000.0),
        ("Month", 50.0, 1.296e8, 2_592_000.0),
        ("30d", None, 2.592e9, 2_592_000.0),
        ("week", 10.0, 6_048_000.0, 604_800.0),
        ("2 weeks", 10.0, 12_096_000.0, 1_209_600.0),
        ("1.5h", 100.0, 540_000.0, 5_400.0),
        (".5y", 1.0, 15_768_000.0, 15_768_000.0),
        (" 12 hours ", 1.0, 43_200.0, 43_200.0),
    ],
)
def test_samples_and_times_are_read(arl: float | str, rate: float | None, samples: float, seconds: float | None) -> None:
    budget = Budget.stated(arl, rate)
    assert budget.samples == pytest.approx(samples) and budget.seconds == (None if seconds is None else pytest.approx(seconds))
    assert budget.rate == (rate if rate is not None else None if seconds is None else RATE)


@given(number=st.floats(1.0, 1e6), unit=st.sampled_from(list(UNITS)), rate=st.floats(1e-2, 1e6), short=st.booleans())
def test_a_time_is_its_samples_at_the_rate(number: float, unit: str, rate: float, short: bool) -> None:
    word = unit[0] if short and unit != "month" else f" {unit}s"
    budget = Budget.stated(f"{number:f}{word}", rate)
    assert budget.seconds == pytest.approx(float(f"{number:f}") * UNITS[unit]) and budget.samples == pytest.approx(budget.seconds * rate)


@pytest.mark.parametrize(
    ("arl", "rate", "words"),
    [
        ("moth", None, r"arl is 'moth'; expected a number of samples, such as 2.6e9, or a time"),
        ("30m", None, "arl is '30m'; expected"),  # minutes or months?
        ("", None, "arl is ''; expected"),
        ("3 d 2 h", None, "expected"),
        ("-1 month", None, "expected"),
        ("0d", None, r"arl is 0.0 samples; it must be more than 1"),
        ("nan", None, "arl is nan samples"),
        (float("inf"), None, "arl is inf samples"),
        (1.0, None, "arl is 1.0 samples"),
        ("2e100", None, "at most 1e100"),
        ("month", 0.0, "test_rate is 0.0; it must be a positive number"),
        (1e6, -3.0, "test_rate is -3.0"),
        (1e6, float("nan"), "test_rate is nan"),
        (1e6, float("inf"), "test_rate is inf"),
    ],
)
def test_what_is_no_budget_is_refused_in_words(arl: float | str, rate: float | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Budget.stated(arl, rate)


@given(rate=st.floats(0.1, 1e4), arrivals=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10_000)), max_size=40))
def test_never_more_than_the_rate_are_tested_from_any_moment_on(rate: float, arrivals: list[tuple[float, int]]) -> None:
    allowance, at, tested = Allowance(), START, []
    for wait, count in arrivals:
        at += wait
        allowed = allowance.take(count, rate, at)
        assert 0 <= allowed <= count
        tested.append((at, allowed))
    for i, (begin, _) in enumerate(tested):
        for j in range(i, len(tested)):
            assert sum(n for _, n in tested[i : j + 1]) <= rate * (tested[j][0] - begin + CREDIT) + 1e-6
    assert sum(n for _, n in tested) <= rate * (at - (tested[0][0] if tested else at)) + 1e-6, "nothing is owed at the beginning"
    assert allowance.take(7, None, at) == 7


class Scene:
    """A Watch over one healthy version, at a budget; every call of `serve` brings `count` fresh samples at `at`."""

    def __init__(self, root: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray], budget: Budget) -> None:
        self.bundle, self.draw, self.seed = make_bundle(root=root / "registry"), draw, 0
        registry = Registry(root / "registry")
        registry.set_alias("grid", "production", "v1", reason="test")
        self.watch = Watch(registry, Incidents(root / "incidents.db"), arl=budget.samples, test_rate=budget.rate)
        self.watch.follow(START)

    def serve(self, count: int, at: float) -> None:
        self.seed += 1
        self.watch.eat([Record("grid", "v1", "server_seed", self.seed, 0, self.draw(self.bundle, count, seed=self.seed), at)], at)


def test_what_comes_beyond_the_rate_is_shown_and_is_no_evidence(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    scene = Scene(tmp_path, make_bundle, draw, Budget.stated("month", 100.0))
    for second in range(1, 31):
        scene.serve(250, START + second)
    view = scene.watch.publish(START + 30)
    snapshot, model = view.models["grid"].snapshot, view.state()["models"]["grid"]
    assert snapshot["monitored"] == 29 * 100 and snapshot["served"] == 30 * 250  # the first second's credit begins with its first sample
    assert view.untested == {"grid": 30 * 250 - 2900} and model["untested"] == 4600
    assert view.state()["budget"] == {"samples": 2.592e8, "seconds": 2_592_000.0, "test_rate": 100.0}
    assert model["tested_rate"] == pytest.approx(2900 / 30)
    assert model["false_alarm_seconds"] == pytest.approx(2.592e8 * 30 / 2900) and model["false_alarm_seconds"] > 2_592_000
    with pytest.raises(ValueError, match="state its --arl in samples"):
        scene.watch.merge("grid", "v1", "other", scene.watch.state("grid", "v1"), START + 31)


def test_the_rate_is_that_of_the_last_hour(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
    scene = Scene(tmp_path, make_bundle, draw, Budget.stated("1e6"))
    shown = scene.watch.publish(START).models["grid"]
    assert shown.tested_rate is None and scene.watch.publish(START).seconds(shown) is None
    scene.serve(600, START + 1)
    view = scene.watch.publish(START + 10)
    assert view.models["grid"].tested_rate == pytest.approx(60.0) and view.seconds(view.models["grid"]) == pytest.approx(1e6 / 60)
    assert view.state()["budget"] == {"samples": 1e6, "seconds": None, "test_rate": None} and view.untested == {"grid": 0}
    minutes = PACE_STEPS + 5
    for minute in range(1, minutes + 1):
        scene.serve(120, START + PACE_STEP * minute - 1)
        view = scene.watch.publish(START + PACE_STEP * minute)
    assert view.models["grid"].tested_rate == pytest.approx(2.0), "the 600 of the first minute are more than an hour ago"
    scene.watch.follow(START + 100)  # the clock was set back by an hour: it is counted anew
    scene.serve(120, START + 160)
    assert scene.watch.publish(START + 160).models["grid"].tested_rate is None
    scene.serve(120, START + 190)
    assert scene.watch.publish(START + 190).models["grid"].tested_rate == pytest.approx(4.0)
