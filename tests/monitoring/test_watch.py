"""What is watched, over a real registry with real bundles, and time that the test gives."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from monitoring.incidents import Incidents
from monitoring.replicas import REPLICAS, STALE_AFTER, Replicas, parse_counter
from monitoring.watch import LEAP, NO_SEED, UNPAIRED, UNPAIRED_BYTES, Watch, total_log10
from serving.records import SHADOW_ROWS, Heartbeat, Record
from tests.monitoring.conftest import CENTRES, SD
from training.bundle import Bundle, BundleError
from training.gate import QualityRefused, promote, publish
from training.recertify import recertify
from training.registry import Registry

START = 1_800_000_000.0


class Scene:
    """A registry with a healthy v1 and a v2 that lost modes 3 and 8, and a Watch over it."""

    def __init__(self, root: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> None:
        self.bundles = {
            "v1": make_bundle(root=root / "registry"),
            "v2": make_bundle(root=root / "registry", version="v2", lost=(3, 8)),
        }
        self.registry, self.incidents, self.draw = Registry(root / "registry"), Incidents(root / "incidents.db"), draw
        self.watch = Watch(self.registry, self.incidents, arl=2.6e9)
        self.now, self.seed = START, 0

    def alias(self, alias: str, version: str | None) -> None:
        self.registry.set_alias("grid", alias, version, reason="test")
        self.watch.follow(self.now)

    def serve(self, version: str, count: int, **fields: object) -> None:
        self.seed += 1
        record = {
            "model": "grid",
            "version": version,
            "origin": "server_seed",
            "seed": self.seed,
            "offset": 0,
            "at": self.now,
        } | fields
        self.watch.eat([Record(**record, samples=self.draw(self.bundles[version], count, seed=self.seed))], self.now)

    def state(self) -> dict:
        self.now += 1.0
        return json.loads(json.dumps(self.watch.publish(self.now).state(), allow_nan=False))


@pytest.fixture
def scene(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> Scene:
    return Scene(tmp_path, make_bundle, draw)


def verdict(state: dict) -> str:
    return state["models"]["grid"]["snapshot"]["verdict"]["id"]


def test_nothing_is_watched_before_an_alias_names_it(scene: Scene) -> None:
    scene.watch.follow(START)
    assert scene.state()["models"] == {}
    scene.alias("production", "v1")
    model = scene.state()["models"]["grid"]
    assert (model["alias"], model["version"], model["snapshot"]["verdict"]["id"], model["budget_share"]) == (
        "production",
        "v1",
        "warming_up",
        0.5,
    )
    assert model["snapshot"]["log10_threshold"] == pytest.approx(math.log10(2.6e9 / 0.5))


def test_a_fault_is_recorded_before_it_is_shown_and_a_rollback_clears_it(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v1", 4000)
    assert verdict(scene.state()) == "healthy" and scene.incidents.newest() == []
    scene.alias("production", "v2")
    scene.serve("v2", 3000)
    (incident,) = scene.incidents.newest()
    assert (incident["version"], incident["verdict"], incident["modes"], incident["closed_at"]) == (
        "v2",
        "mode_dropping",
        ["3", "8"],
        None,
    )
    assert 0 < incident["first_alarm"] < 3000 and incident["evidence"]["evidence"]["modes"] > 9
    state = scene.state()
    assert verdict(state) == "mode_dropping" and [mark["kind"] for mark in state["models"]["grid"]["marks"]].count("alarm") == 1
    scene.now += 10 * STALE_AFTER
    scene.registry.rollback("grid")
    scene.watch.follow(scene.now)
    state = scene.state()
    assert not state["models"]["grid"]["stale"]  # silent while another version was served
    assert verdict(state) == "healthy" and state["models"]["grid"]["snapshot"]["monitored"] == 4000  # v1 goes on where it was
    assert scene.incidents.newest()[0]["closed_by"] == "version change"


def test_a_version_that_comes_back_is_judged_again(scene: Scene) -> None:
    scene.alias("production", "v2")
    scene.serve("v2", 3000)
    scene.alias("production", "v1")
    scene.alias("production", "v2")
    assert verdict(scene.state()) == "warming_up" and len(scene.incidents.newest()) == 1
    scene.serve("v2", 3000)
    assert verdict(scene.state()) == "mode_dropping" and len(scene.incidents.newest()) == 2


def test_acknowledging_unlatches_and_a_fault_that_stays_is_found_again(scene: Scene) -> None:
    scene.alias("production", "v2")
    scene.serve("v2", 3000)
    (closed,) = scene.watch.acknowledge("grid", scene.now)
    assert closed["closed_by"] == "acknowledged" and verdict(scene.state()) == "warming_up"  # nothing is known yet
    scene.serve("v2", 3000)
    assert verdict(scene.state()) == "mode_dropping" and len(scene.incidents.newest()) == 2
    with pytest.raises(KeyError):
        scene.watch.acknowledge("nobody", scene.now)


def test_only_fresh_samples_of_aliased_versions_are_judged(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v2", 3000)  # asked for by its number
    scene.serve("v1", 1000, origin="client_seed")
    scene.serve("v1", 1000, truncation=0.5)
    view = scene.watch.publish(scene.now)
    assert view.models["grid"].snapshot["monitored"] == 0 and view.models["grid"].snapshot["served"] == 2000
    assert view.models["grid"].gauges["served"]["js"].n == 2000
    assert view.observed == {("grid", "server_seed"): 4000, ("grid", "client_seed"): 1000}
    assert view.unaliased == {"grid": 3000} and view.state()["models"]["grid"]["unaliased"] == 3000
    assert view.models["grid"].live[0].fresh_rate == 0
    scene.serve("v1", 100)
    scene.serve("v1", 1000, origin="probe")
    assert scene.watch.publish(scene.now).models["grid"].live[0].fresh_rate == 50  # 100 in two seconds; probes make up, they do not count
    scene.watch.eat([Record("nobody", "v1", "probe", 0, 0, np.zeros((1, 2), np.float32), scene.now)], scene.now)
    assert scene.watch.publish(scene.now).unknown_model == 1


@pytest.mark.parametrize(("alias", "got"), [("production", 4), ("canary", 4), ("shadow", 0)])
def test_what_nobody_received_is_not_as_served(scene: Scene, alias: str, got: int) -> None:
    """Probes, joined with requests in one group, and all that a shadow makes; they are evidence all the same."""
    scene.alias(alias, "v1")
    rows = scene.draw(scene.bundles["v1"], 10, seed=3)
    rows[2] = np.nan  # of the request: what cannot be looked at shifts nothing
    records = [Record("grid", "v1", origin, 1, 0, part, scene.now) for origin, part in (("server_seed", rows[:5]), ("probe", rows[5:]))]
    scene.watch.eat(records, scene.now)
    (live,) = scene.watch.publish(scene.now).models["grid"].live
    assert (live.gauges["served"]["js"].n, live.gauges["fresh"]["js"].n, live.snapshot["monitored"]) == (got, 9, 9)
    assert np.isnan(live.gauges["served"]["js"].value) == (got == 0) and live.gauges["served"]["js"].ci == "none"


def test_a_record_that_fails_costs_no_other_version_anything(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error is: it is counted, told once the others have been taken, and what failed is not tried again."""
    scene.alias("production", "v1")
    scene.alias("shadow", "v2")
    rows = {version: scene.draw(bundle, 100, seed=9) for version, bundle in scene.bundles.items()}
    records = [Record("grid", version, "server_seed", seed, 0, rows[version], scene.now) for seed in (1, 2) for version in ("v1", "v2")]
    failing, fed = scene.watch._watched["grid", "v1"].monitor, []
    monkeypatch.setattr(failing, "update", lambda samples, **_: fed.append(len(samples)) or np.zeros(2)[5])
    monkeypatch.setattr("monitoring.comparison.Comparison.update", lambda *_: 1 / 0)
    with pytest.raises(ExceptionGroup, match="grid v1, 2 records: IndexError.*") as raised:
        scene.watch.eat(records, scene.now)
    assert [type(error) for error in raised.value.exceptions] == [ZeroDivisionError, ZeroDivisionError, IndexError] and fed == [200]
    view = scene.watch.publish(scene.now)
    monitored = {live.version: live.snapshot["monitored"] for live in view.models["grid"].live}
    assert monitored == {"v1": 0, "v2": 200} and view.failed == 2 and view.observed == {("grid", "server_seed"): 400}
    monkeypatch.undo()
    scene.watch.eat([Record("grid", "v1", "server_seed", 3, 0, rows["v1"], scene.now)], scene.now)
    view = scene.watch.publish(scene.now)
    assert view.models["grid"].snapshot["monitored"] == 100 and view.failed == 2


def test_records_of_different_shapes_are_not_joined_and_misfits_are_counted(scene: Scene) -> None:
    scene.alias("production", "v1")
    samples = [
        np.zeros((5, 3), np.float32),
        np.zeros((7, 2), np.float64),
        np.full((2, 2), np.nan, np.float32),
        np.zeros((4, 2), np.float32),
    ]
    scene.watch.eat([Record("grid", "v1", "server_seed", 1, 0, s, scene.now) for s in samples], scene.now)
    view = scene.watch.publish(scene.now)
    assert view.models["grid"].snapshot["monitored"] == 4
    assert {reason: n for (_, reason), n in view.rejected.items() if n} == {"shape": 5, "dtype": 7, "nan": 2}


def test_silence_is_shown_as_stale(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v1", 600)
    assert not scene.state()["models"]["grid"]["stale"]
    scene.now += STALE_AFTER
    model = scene.state()["models"]["grid"]
    assert model["stale"] and model["snapshot"]["verdict"]["id"] == "healthy"
    assert model["history"]["js"][-1] is None and model["history"]["js"][0] is not None  # the line breaks, it is not drawn on


def test_the_history_is_one_point_a_publication_and_can_be_read_on(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v1", 600)
    first = scene.state()
    scene.watch.publish(scene.now + 0.5, point=False)
    second = scene.watch.publish(scene.now + 1).state(since=first["now"])["models"]["grid"]["history"]
    assert first["models"]["grid"]["history"]["t"] == [first["now"]] and second["t"] == [first["now"] + 1]
    assert first["models"]["grid"]["history"]["threshold"] == second["threshold"] > second["js"][0] > 0


def test_an_altered_bundle_is_refused_and_the_version_before_stays_watched(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v1", 600)
    scene.registry.set_alias("grid", "production", "v2", reason="test")
    features = scene.bundles["v2"].features_path
    whole = features.read_bytes()
    features.write_bytes(whole[:-1])
    for _ in range(3):
        scene.watch.follow(scene.now)
    state = scene.state()
    assert state["models"]["grid"]["version"] == "v1" and "features.onnx" in state["errors"][0]
    assert scene.watch.publish(scene.now).load_failures == {"grid": 1}  # one change, one failure
    features.write_bytes(whole)
    scene.watch.follow(scene.now)
    state = scene.state()
    assert state["models"]["grid"]["version"] == "v2" and state["errors"] == []


def test_a_damaged_card_costs_no_other_version_its_watch(scene: Scene, make_bundle: Callable[..., Bundle]) -> None:
    v3 = make_bundle(root=scene.registry.root, version="v3")
    (v3.path / "card.json").write_text("{")
    scene.alias("production", "v1")
    state = scene.state()
    assert state["models"]["grid"]["version"] == "v1" and state["errors"] == []


def test_an_unreadable_alias_file_changes_nothing_and_is_said(scene: Scene) -> None:
    scene.alias("production", "v1")
    aliases = scene.registry.root / "grid" / "aliases.json"
    whole = aliases.read_text()
    aliases.write_text("{")
    scene.watch.follow(scene.now)
    state = scene.state()
    assert state["models"]["grid"]["version"] == "v1" and "aliases.json" in state["errors"][0]
    aliases.write_text(whole)
    scene.watch.follow(scene.now)
    assert scene.state()["errors"] == []


def test_the_budget_is_split_over_the_aliases(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.alias("canary", "v2")
    scene.serve("v2", 3000)
    state = scene.state()
    (other,) = state["models"]["grid"]["other_versions"]
    assert (other["alias"], other["version"], other["verdict"]["id"], other["budget_share"]) == (
        "canary",
        "v2",
        "mode_dropping",
        0.25,
    )
    assert verdict(state) == "warming_up" and scene.incidents.newest()[0]["version"] == "v2"
    scene.alias("canary", None)
    assert (
        scene.state()["models"]["grid"]["other_versions"] == [] and scene.incidents.newest()[0]["closed_by"] == "version change"
    )


def test_a_model_that_goes_leaves_nothing_behind(scene: Scene) -> None:
    scene.alias("production", "v1")
    (scene.registry.root / "grid").rename(scene.registry.root.parent / "elsewhere")
    scene.watch.follow(scene.now)
    assert scene.state()["models"] == {}


def test_totals_never_go_backwards_when_replicas_come_and_go() -> None:
    replicas = Replicas()
    replicas.hear("a", {"batches_total": 5.0, "queued_samples": 2.0}, 0.0)
    replicas.hear("b", {"batches_total": 1.0, "queued_samples": 3.0}, 1.0)
    assert replicas.totals(1.0) == {"batches_total": 6.0, "queued_samples": 5.0} and replicas.speaking(1.0) == 2
    assert replicas.totals(10.5) == {"batches_total": 6.0, "queued_samples": 3.0} and replicas.speaking(10.5) == 1
    replicas.hear("a", {"batches_total": 7.0}, 20.0)  # it had only been silent: its totals are not counted twice
    assert replicas.totals(20.0) == {"batches_total": 8.0}
    for i in range(REPLICAS):
        replicas.hear(f"new-{i}", {"batches_total": 1.0}, 21.0)
    assert replicas.totals(21.0) == {"batches_total": 8.0 + REPLICAS} and len(replicas.last) == REPLICAS


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.text().filter(lambda t: "\r" not in t), max_size=3))
def test_counters_in_prometheus_form_are_read(labels: dict[str, str]) -> None:
    def escape(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    text = "samples_total" + ("{" + ",".join(f'{k}="{escape(v)}"' for k, v in labels.items()) + "}" if labels else "")
    assert parse_counter(text) == ("samples_total", tuple(sorted(labels.items())))


@pytest.mark.parametrize("text", ["", "9", "a b", "x{model=digits}", 'x{model="a"', "replicas", 'x{model="a"}} 1\nfake 2'])
def test_other_counters_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Prometheus form"):
        parse_counter(text)


def test_total_evidence_is_that_of_the_sum() -> None:
    assert total_log10({"a": 2.0, "b": 2.0}) == pytest.approx(2 + math.log10(2))
    assert total_log10({"a": 400.0, "b": -math.inf}) == 400.0
    assert total_log10({"a": -math.inf}) == total_log10({}) == -math.inf


def test_heartbeats_tell_what_the_tap_left_out(scene: Scene) -> None:
    counters = {'tap_dropped_samples_total{model="grid"}': 4.0, 'tap_skipped_samples_total{model="grid"}': 900.0}
    scene.watch.hear(Heartbeat("a", START, (), counters), START)
    assert scene.state()["tap"] == {"replicas": 1, "last_heartbeat_at": START, "dropped": 4.0, "skipped": 900.0, "received": 0}


def test_a_clock_that_goes_ahead_is_counted(scene: Scene) -> None:
    """By more than a busy monitor may take to look at it again, and not the first time that it looks."""
    for ahead, jumps in ((0.0, 0), (LEAP, 0), (LEAP + 1, 1), (1.0, 1), (86_400.0, 2)):
        scene.now += ahead
        scene.watch.follow(scene.now)
        assert scene.watch.publish(scene.now).clock_jumps == {"back": 0, "forward": jumps}


def test_a_clock_that_is_set_back_hides_no_silence(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v1", 600)
    scene.watch.hear(Heartbeat("a", scene.now, (), {}), scene.now)
    before = scene.state()["models"]["grid"]
    scene.now -= 3600.0
    scene.watch.follow(scene.now)
    after = scene.watch.publish(scene.now)
    assert after.clock_jumps == {"back": 1, "forward": 0} and after.models["grid"].last_sample_at == after.heard_at == scene.now
    assert [row[0] for row in after.models["grid"].rows] == [scene.now] and before["history"]["t"] > [scene.now]
    assert after.models["grid"].live[0].fresh_rate == 0  # or no probe would be sent for an hour
    scene.now += STALE_AFTER + 1
    silent = scene.watch.publish(scene.now)
    assert silent.models["grid"].stale and silent.replicas == 0 and silent.clock_jumps == {"back": 1, "forward": 0}
    scene.serve("v1", 100)
    state = scene.state()
    assert verdict(state) == "healthy" and state["models"]["grid"]["snapshot"]["monitored"] == 700


def test_a_silent_hour_leaves_verdict_and_evidence_as_they_were(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v1", 2000)
    before = scene.state()["models"]["grid"]
    for _ in range(60):
        scene.now += 60.0
        scene.watch.follow(scene.now)
        state = scene.state()["models"]["grid"]
    assert state["stale"] and state["snapshot"] == before["snapshot"] and state["history"]["js"][-60:] == [None] * 60
    scene.serve("v1", 2000)
    state = scene.state()["models"]["grid"]
    assert not state["stale"] and state["snapshot"]["monitored"] == 4000 and state["snapshot"]["verdict"]["id"] == "healthy"


def test_a_stream_of_nan_is_an_alarm_and_makes_no_estimate_newer(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.serve("v1", 600)
    for _ in range(15):
        scene.now += 1.0
        scene.watch.eat([Record("grid", "v1", "server_seed", 1, 0, np.full((50, 2), np.nan, np.float32), scene.now)], scene.now)
    view = scene.watch.publish(scene.now)
    shown = view.models["grid"]
    assert shown.snapshot["rejected"]["nan"] == view.rejected["grid", "nan"] == 750
    assert not shown.stale and shown.last_sample_at == START and shown.snapshot["monitored"] == 600 and shown.snapshot["verdict"]["id"] == "off_manifold"


def test_constant_samples_are_a_latent_fault(scene: Scene) -> None:
    scene.alias("production", "v1")
    sample = scene.draw(scene.bundles["v1"], 1, seed=1)
    scene.watch.eat([Record("grid", "v1", "server_seed", 1, 0, np.repeat(sample, 3000, axis=0), scene.now)], scene.now)
    assert verdict(scene.state()) == "latent_fault"


def test_a_burst_is_judged_whole(scene: Scene) -> None:
    scene.alias("production", "v1")
    records = [Record("grid", "v1", "server_seed", s, 0, scene.draw(scene.bundles["v1"], 20_000, seed=s), scene.now) for s in (1, 2)]
    scene.watch.eat(records, scene.now)
    snapshot = scene.watch.publish(scene.now).models["grid"].snapshot
    assert snapshot["monitored"] == 40_000 and snapshot["verdict"]["id"] == "healthy"


def test_samples_that_clients_chose_do_not_make_it_fresh(scene: Scene) -> None:
    """Without independent draws nothing can be found, and silence must not look like health."""
    scene.alias("production", "v1")
    scene.serve("v1", 1000)
    assert not scene.state()["models"]["grid"]["stale"]
    scene.now += STALE_AFTER + 1
    scene.serve("v1", 1000, origin="client_seed")
    model = scene.state()["models"]["grid"]
    assert model["stale"] and model["last_sample_at"] > model["last_fresh_at"] + STALE_AFTER


def test_an_alarm_outlives_another_part_of_the_budget(scene: Scene) -> None:
    scene.alias("production", "v2")
    scene.serve("v2", 3000)
    before = scene.state()["models"]["grid"]["snapshot"]
    scene.alias("canary", "v2")
    scene.alias("production", "v1")
    (other,) = scene.state()["models"]["grid"]["other_versions"]
    assert (other["alias"], other["verdict"]["id"], other["monitored"]) == ("canary", "mode_dropping", before["monitored"])
    assert scene.incidents.newest()[0]["closed_at"] is None and len(scene.incidents.newest()) == 1


def test_a_copied_version_is_not_watched_as_the_one_it_was(scene: Scene) -> None:
    shutil.copytree(scene.registry.root / "grid" / "v1", scene.registry.root / "grid" / "v7")
    with pytest.raises(BundleError, match="its card says grid v1"):
        scene.alias("production", "v7")


def pair(scene: Scene, seed: int, count: int = 600, origins: tuple[str, str] = ("server_seed", "server_seed")) -> None:
    """What v1 and v2 make of the same latents, as the tap tells it, 50 rows an answer."""
    rows = {v: scene.draw(scene.bundles[v], count, seed=abs(seed)) for v in ("v1", "v2")}
    for offset in range(0, count, 50):
        records = [Record("grid", v, origin, seed, offset, rows[v][offset : offset + 50], scene.now) for v, origin in zip(rows, origins, strict=True)]
        scene.watch.eat(records, scene.now)


def compared(scene: Scene) -> dict:
    return scene.state()["models"]["grid"]["other_versions"][0]["comparison"]


def test_a_shadow_is_compared_with_production_on_the_same_latents(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.alias("shadow", "v2")
    assert compared(scene)["pairs"] == 0 and "No latent" in compared(scene)["words"]
    pair(scene, seed=11)
    found = compared(scene)
    assert found["pairs"] == 600 and found["differs"] and "v2 is not the model that v1 is: less 8 (0.0% instead of" in found["words"] and ", less 3 (" in found["words"]
    scene.alias("canary", "v2")  # the same version by another name: what is known of it stays
    assert compared(scene)["pairs"] == 600
    scene.alias("shadow", None)
    scene.alias("canary", None)
    scene.alias("canary", "v2")
    assert compared(scene)["pairs"] == 0  # another candidacy


def test_only_latents_that_nobody_chose_make_pairs(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.alias("canary", "v2")
    pair(scene, seed=11, origins=("client_seed", "client_seed"))
    pair(scene, seed=12, origins=("client_seed", "server_seed"))  # a client may have asked for what it had seen
    pair(scene, seed=13, origins=("client_z", "probe"))
    assert compared(scene)["pairs"] == 0
    pair(scene, seed=14, origins=("client_seed", "probe"))  # the prober asked production for the rows of its own probe
    assert compared(scene)["pairs"] == 600 and compared(scene)["dropped"] == {"rejected": 0, "unpaired": 0}
    waiting, zeros = scene.watch._models["grid"].unpaired, np.zeros((1, 2), np.float32)
    before = len(waiting)
    for origin, kept in (("server_seed", before), ("client_seed", UNPAIRED)):  # a canary is given no latents of production's
        for seed in range(1000):
            scene.watch.eat([Record("grid", "v1", origin, 10**6 + seed, 0, zeros, scene.now)], scene.now)
        assert len(waiting) == kept
    assert compared(scene)["dropped"] == {"rejected": 0, "unpaired": 600}  # probes of seed 13


def test_what_waits_for_its_partner_is_bounded_in_bytes_and_holds_what_can_be_paired(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.alias("shadow", "v2")
    large = np.zeros((100, 64, 64, 3), np.uint8)
    for seed in range(100):
        scene.watch.eat([Record("grid", "v1", "server_seed", seed, 0, large, scene.now)], scene.now)
        waiting = [record.samples for record in scene.watch._models["grid"].unpaired.values()]
        assert sum(samples.nbytes for samples in waiting) <= UNPAIRED_BYTES
        assert all(samples.base is None and len(samples) == SHADOW_ROWS for samples in waiting)  # no view of what is larger
    assert len(waiting) == UNPAIRED_BYTES // large[:SHADOW_ROWS].nbytes


def test_latents_that_could_not_be_compared_are_counted(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.alias("shadow", "v2")
    rows = {v: scene.draw(scene.bundles[v], 50, seed=11) for v in ("v1", "v2")}
    rows["v2"][7] = np.nan
    scene.watch.eat([Record("grid", v, "server_seed", 11, 0, rows[v], scene.now) for v in rows], scene.now)
    assert compared(scene)["pairs"] == 0 and compared(scene)["dropped"] == {"rejected": 50, "unpaired": 0}


def test_no_record_is_paired_twice_and_none_of_unknown_latents(scene: Scene) -> None:
    """What is known of one side already would be no bet on the future: healthy versions would be said to differ."""
    scene.alias("production", "v1")
    scene.alias("shadow", "v2")
    pair(scene, seed=11, count=50)
    assert compared(scene)["pairs"] == 50 and not scene.watch._models["grid"].unpaired
    for seed in range(3):
        scene.watch.eat([Record("grid", "v2", "server_seed", 11, 0, scene.draw(scene.bundles["v2"], 50, seed=seed), scene.now)], scene.now)
    assert compared(scene)["pairs"] == 50
    pair(scene, seed=NO_SEED, count=50)
    assert compared(scene)["pairs"] == 50


def test_each_version_says_how_much_clients_draw_of_it(scene: Scene) -> None:
    scene.alias("production", "v1")
    scene.alias("canary", "v2")
    scene.serve("v2", 100)
    scene.serve("v2", 500, origin="probe")
    rates = {live.version: live.fresh_rate for live in scene.watch.publish(scene.now).models["grid"].live}
    assert rates == {"v1": 0, "v2": 50}


@pytest.mark.slow
@pytest.mark.parametrize("moved", [True, False])
def test_a_version_that_passed_by_another_reference_is_not_called_bad(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray], moved: bool) -> None:
    """v1 passed the gate; v2 is the same generator, certified against data of which a part has moved to where it gives nothing.
    Where it is the other way round, what is forced has passed by nothing before it."""
    registry, rng, made = Registry(tmp_path / "registry"), np.random.default_rng(0), make_bundle(lost=(3, 8), honest=True)
    for version, gone in (("v1", (3, 8) if moved else ()), ("v2", () if moved else (3, 8))):
        modes = np.delete(CENTRES, gone, axis=0)
        np.save(tmp_path / f"{version}.npy", (modes[rng.integers(len(modes), size=4000)] + SD * rng.standard_normal((4000, 2))).astype(np.float32))
        recertify(made, str(tmp_path / f"{version}.npy"), tmp_path / version, tmp_path / "references", certify_samples=50_000)
        made = publish(tmp_path / version, registry, force=not gone)
    good, bad = (registry.open("grid", version) for version in (("v1", "v2") if moved else ("v2", "v1")))
    assert good.card.forced is None and bad.card.forced and bad.card.files["model.onnx"] == good.card.files["model.onnx"]
    registry.set_alias("grid", "production", bad.card.version, reason="test")
    watch = Watch(registry, Incidents(tmp_path / "incidents.db"), arl=2.6e9)
    watch.follow(START)
    watch.eat([Record("grid", bad.card.version, "server_seed", 1, 0, draw(bad, 3000, seed=1), START)], START)
    verdict = watch.publish(START).models["grid"].snapshot["verdict"]
    if not moved:
        assert verdict["null"] == "B" and verdict["id"] != "world_moved"
        return
    assert verdict["id"] == "world_moved" and "passed as v1" in verdict["words"] and verdict["null"] == "B"
    assert "ganwatch certify v1 --reference DATA" in verdict["advice"]


def test_a_promotion_by_force_is_told_with_what_spoke_against_it(scene: Scene, make_bundle: Callable[..., Bundle]) -> None:
    make_bundle(root=scene.registry.root, version="v3", lost=(3, 8), honest=True)  # its certificate says so, too
    scene.now = time.time()  # as the registry's clock
    scene.alias("production", "v1")
    assert scene.state()["models"]["grid"]["forced_promotion"] is None
    with pytest.raises(QualityRefused):
        promote(scene.registry, "grid", "v3")
    change = promote(scene.registry, "grid", "v3", force=True)
    scene.watch.follow(scene.now)
    model = scene.state()["models"]["grid"]
    (mark,) = [mark for mark in model["marks"] if mark["kind"] == "forced"]
    assert model["forced_promotion"] == mark["why"] == change.forced and "worst-served mode" in change.forced
    assert mark["text"] == "production: v3 (forced)" and len(model["marks"]) == 2
    scene.alias("production", "v1")
    model = scene.state()["models"]["grid"]
    assert model["forced_promotion"] is None and [mark["kind"] for mark in model["marks"]] == ["version", "forced", "version"]
