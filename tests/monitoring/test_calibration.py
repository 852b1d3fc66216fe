"""Simulated runs find how careful the guarantee is, whatever pieces they come in; and with it, run lengths are what was asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.calibration import SAMPLES, Calibration, Healthy
from monitoring.edetectors import EDetector
from monitoring.features import Eye, Seen
from monitoring.incidents import Incidents
from monitoring.monitor import Monitor
from monitoring.states import States
from monitoring.watch import Watch
from training.registry import Registry


@pytest.fixture
def healthy(make_bundle):
    return make_bundle()


def calibrate(bundle, seen: Seen, pieces: list[int], **options) -> Calibration:
    found = Calibration(EDetector(bundle.certificate, bundle.reference, bundle.card.modes, threshold=1.0), **options)
    done = 0
    for size in (*pieces, len(seen.cells)):
        part = slice(done, done + size)
        found.feed(seen.scores[part], seen.features[part], seen.cells[part], seen.samples[part])
        done += size
    return found


def run_lengths(detector: EDetector, seen: Seen) -> np.ndarray:
    found, start = [], 0
    while start < len(seen.cells):
        detector.restart()
        part = slice(start, start + 5000)
        detector.update(seen.scores[part], seen.features[part], seen.cells[part], seen.samples[part], index=0)
        if detector.crossed is None:  # the stream ends in this run
            break
        found.append(detector.crossed + 1)
        start += found[-1]
    return np.array(found)


def test_pieces_do_not_matter_and_the_certified_generator_is_what_is_drawn(healthy, draw):
    source = Healthy(healthy)
    seen = Eye(healthy).look(draw(healthy, 4000, seed=source._seed))
    again = [source.draw(1000) for _ in range(4)]
    assert np.array_equal(np.concatenate([part.samples for part in again]), seen.samples)
    whole = calibrate(healthy, seen, [], arl=50.0, samples=3000)
    assert whole.slack is not None and whole.slack >= 1 and 3000 <= whole.fed < 3000 + 150

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.integers(1, 900), max_size=6))
    def any_split(pieces):
        assert calibrate(healthy, seen, pieces, arl=50.0, samples=3000).slack == whole.slack

    any_split()


def test_what_it_reads_is_the_run_length_of_restarted_runs(healthy, draw):
    """Read off at one threshold by hand: the same samples, cut into the same runs."""
    seen, arl, length, total = Eye(healthy).look(draw(healthy, 13_000, seed=3)), 40.0, 120, 12_000
    found = calibrate(healthy, seen, [], arl=arl, samples=total)
    detector = EDetector(healthy.certificate, healthy.reference, healthy.card.modes, threshold=np.inf)
    lengths = {}
    for threshold in (arl / found.slack * (1 - 1e-9), arl / found.slack / 1.02 * (1 - 1e-9)):  # as it found, and one step below
        exposure, alarms, start = 0, 0, 0
        while start < total:
            detector.restart()
            part = slice(start, start + length)
            path = detector.update(seen.scores[part], seen.features[part], seen.cells[part], seen.samples[part], index=0)
            exposure += (path >= threshold).argmax() + 1 if path.max() >= threshold else length
            alarms += path.max() >= threshold
            start += (path >= arl * (1 - 1e-9)).argmax() + 1 if path.max() >= arl * (1 - 1e-9) else length
        lengths[threshold] = exposure / alarms
    above, below = lengths.values()
    assert above >= arl > below and found.slack > 1.1


@pytest.mark.slow
def test_calibrated_run_lengths_are_what_was_asked(healthy):
    source, arl = Healthy(healthy), 100.0
    monitor = Monitor(healthy, arl=arl)
    calibration = monitor.calibration(samples=60_000)
    while calibration.slack is None:
        seen = source.draw(5000)
        calibration.feed(seen.scores, seen.features, seen.cells, seen.samples)
    monitor.calibrate(calibration.slack)
    assert monitor.log10_threshold == pytest.approx(np.log10(arl / calibration.slack)) and calibration.slack > 1.2
    lengths = run_lengths(monitor._detector, source.draw(80_000))
    assert len(lengths) > 500 and lengths.mean() == pytest.approx(arl, rel=0.15)


def test_a_slow_generator_holds_up_no_view(make_bundle, tmp_path, monkeypatch):
    make_bundle(root=tmp_path / "registry")
    registry, now = Registry(tmp_path / "registry"), 1_800_000_000.0
    registry.set_alias("grid", "production", "v1", reason="test")
    watch = Watch(registry, Incidents(tmp_path / "incidents.db"), arl=1e3, calibrated=True)
    watch.follow(now)
    drawn = []
    for seconds in (0.0, np.inf):
        monkeypatch.setattr("monitoring.watch.SIMULATING", seconds)
        watch.publish(now)
        drawn.append(watch._watched["grid", "v1"].calibration[0]._offset)
    assert drawn == [64, 64 + 1024]


@pytest.mark.slow
def test_a_calibrated_watch_is_strict_until_its_runs_are_through_and_remembers(make_bundle, tmp_path, monkeypatch):
    for name in ("SIMULATED", "SIMULATED_AT_ONCE"):
        monkeypatch.setattr(f"monitoring.watch.{name}", SAMPLES // 2)
    root = tmp_path / "registry"
    make_bundle(root=root), make_bundle(root=root, version="v2", lost=(3, 8))
    registry, now = Registry(root), 1_800_000_000.0
    registry.set_alias("grid", "production", "v1", reason="test")
    registry.set_alias("grid", "canary", "v2", reason="test")

    def watch(calibrated: bool) -> Watch:
        found = Watch(registry, Incidents(tmp_path / "incidents.db"), arl=1e3, states=States(tmp_path / "states"), calibrated=calibrated)
        found.follow(now)
        return found

    def slacks(watch: Watch) -> list[float | None]:
        return [live.snapshot["slack"] for live in watch.publish(now).models["grid"].live]

    first = watch(True)
    assert slacks(first) == [None, None]
    slacks(first)
    sound, broken = slacks(first)
    assert 1.2 < sound < 4 and broken == 1  # a generator that is not what was certified alarms in its own runs
    first.save()
    assert slacks(watch(True)) == [sound, broken] and slacks(watch(False)) == [None, None]
