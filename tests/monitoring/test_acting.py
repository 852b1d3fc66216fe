"""What an alarm changes by itself, over a real registry with real bundles and real alarms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray

from monitoring.acting import ACTED, Policy
from monitoring.audit import Compared
from monitoring.incidents import Incidents
from monitoring.reruns import Rerun
from monitoring.view import View
from monitoring.watch import Watch
from serving.records import Record
from training.bundle import Bundle, load_card, write_arrays, write_card
from training.registry import Registry, RegistryError

FAULTS = {"v1": {}, "v2": {}, "v3": {"lost": (3, 8)}, "v4": {"fakes": 0.1}}


class Scene:
    """Healthy v1 and v2, v3 without modes 3 and 8, v4 with fakes; `promote` and `serve` as people and clients do."""

    def __init__(self, root: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray], *, acts: bool = True, cool_down: float = 0.0) -> None:
        self.bundles = {version: make_bundle(root=root / "registry", version=version, **fault) for version, fault in FAULTS.items()}
        self.registry, self.draw = Registry(root / "registry"), draw
        policy = Policy(self.registry, cool_down) if acts else None
        self.watch = Watch(self.registry, Incidents(root / "incidents.db"), arl=2.6e9, policy=policy)
        self.now = datetime.now().timestamp()

    def promote(self, version: str, alias: str = "production") -> None:
        self.registry.set_alias("grid", alias, version, reason="promote")
        self.watch.follow(self.now)

    def serve(self, version: str) -> View:
        self.now += 1
        self.watch.eat([Record("grid", version, "server_seed", 1, 0, self.draw(self.bundles[version], 3000, seed=1), self.now)], self.now)
        self.watch.act(self.now)
        self.watch.follow(self.now)
        self.watch.act(self.now)
        return self.watch.publish(self.now)


@pytest.fixture
def scene(tmp_path: Path, make_bundle: Callable[..., Bundle], draw: Callable[..., ndarray]) -> Callable[..., Scene]:
    return lambda **options: Scene(tmp_path, make_bundle, draw, **options)


def test_an_alarmed_canary_is_taken_away_and_production_stays(scene):
    scene = scene()
    scene.promote("v1")
    scene.promote("v3", "canary")
    view = scene.serve("v3")
    assert scene.registry.aliases("grid") == {"production": "v1"}
    change = scene.registry.history("grid")[-1]
    assert (change.alias, change.version, change.reason) == ("canary", None, ACTED + "v3 is mode_dropping 3 8")
    (incident,) = scene.watch.incidents.newest()
    assert incident["evidence"]["action"] == "canary -> none" and incident["closed_by"] == "version change" and incident["evidence"]["evidence"]["modes"] > 9
    assert view.actions == {("grid", "canary"): 1, ("grid", "production"): 0} and view.errors == ()


def test_an_alarmed_production_goes_back_to_the_last_sound_version(scene):
    scene = scene()
    for version in ("v1", "v2", "v4", "v3"):
        scene.promote(version)
        if version == "v4":  # alarmed while nobody had allowed anything; never acknowledged
            policy, scene.watch.policy = scene.watch.policy, None
            scene.serve(version)
            scene.watch.policy = policy
    view = scene.serve("v3")
    assert scene.registry.aliases("grid") == {"production": "v2"} and view.models["grid"].version == "v2"
    assert view.models["grid"].snapshot["verdict"]["id"] == "warming_up" and view.actions["grid", "production"] == 1
    assert scene.watch.incidents.newest()[0]["evidence"]["action"] == "production -> v2"
    assert "acted on an alarm" in view.models["grid"].marks[-1]["text"] or any(ACTED in m["text"] for m in view.models["grid"].marks)


def test_it_does_not_go_back_to_what_people_rolled_back_from(scene):
    scene = scene()
    scene.promote("v1")
    scene.promote("v2")
    scene.registry.rollback("grid")
    scene.promote("v3")
    (scene.registry.root / "grid" / "v1" / "model.onnx").write_bytes(b"")  # else it would be the nearest anyway
    view = scene.serve("v3")
    assert view.models["grid"].version == "v3" and "none of its earlier versions is sound" in view.errors[0]


def test_nothing_is_done_by_default(scene):
    scene = scene(acts=False)
    scene.promote("v1")
    scene.promote("v3")
    view = scene.serve("v3")
    assert scene.registry.aliases("grid") == {"production": "v3"} and view.models["grid"].snapshot["verdict"]["id"] == "mode_dropping"
    assert view.errors == () and view.actions["grid", "production"] == 0


def test_the_cool_down_holds_and_is_said(scene):
    scene = scene(cool_down=600.0)
    for version in ("v1", "v2", "v3"):
        scene.promote(version)
    assert scene.serve("v3").models["grid"].version == "v2"
    scene.promote("v4")
    view = scene.serve("v4")
    assert view.models["grid"].version == "v4" and "600 s must pass" in view.errors[0]
    scene.now += 700
    scene.watch.act(scene.now)
    scene.watch.follow(scene.now)
    view = scene.watch.publish(scene.now)
    assert view.models["grid"].version == "v2" and view.errors == () and view.actions["grid", "production"] == 2


@pytest.mark.parametrize("why", ["first", "alarmed", "forced", "damaged"])
def test_where_there_is_nothing_sound_to_go_to_it_says_so(scene, why):
    scene = scene()
    if why != "first":
        scene.promote("v4" if why == "alarmed" else "v1")
    if why == "alarmed":
        scene.serve("v4")
    path = scene.registry.root / "grid" / "v1"
    if why == "forced":
        write_card(path, replace(load_card(path), forced="mode 3 is dropped"))
    if why == "damaged":
        (path / "model.onnx").write_bytes(b"")
    scene.promote("v3")
    view = scene.serve("v3")
    assert scene.registry.aliases("grid") == {"production": "v3"}
    assert "none of its earlier versions is sound" in view.errors[0]


@pytest.mark.parametrize("why", ["acknowledged", "deliberate", "forced"])
def test_an_acknowledged_version_counts_as_sound_again_but_for_one_that_never_was(scene, why):
    """Neither a version with a deliberate fault nor one that was promoted against the gate's word is gone back to."""
    scene = scene()
    path = scene.registry.root / "grid" / "v4"
    if why != "deliberate":
        write_card(path, replace(load_card(path), fault=None))
    scene.registry.set_alias("grid", "production", "v4", reason="promote", forced="too many fakes" if why == "forced" else None)
    scene.watch.follow(scene.now)
    scene.serve("v4")
    scene.watch.acknowledge("grid", scene.now)
    scene.promote("v3")
    assert scene.serve("v3").models["grid"].version == ("v4" if why == "acknowledged" else "v3")


def test_where_the_data_have_moved_the_version_by_the_old_data_is_not_gone_back_to(scene, make_bundle):
    scene = scene()
    old, new = (make_bundle(root=scene.registry.root, version=v, lost=(3, 8), honest=True) for v in ("v5", "v6"))
    share = np.where(np.isin(np.arange(11), (3, 8)), 1e-6, old.reference.cell_share)  # when v5 passed, hardly any data lay there
    write_arrays(old.path / "reference.npz", replace(old.reference, cell_share=share / share.sum()))
    write_card(old.path, old.card)
    scene.bundles["v6"] = new
    for version in ("v5", "v6"):
        scene.promote(version)
    view = scene.serve("v6")
    assert view.models["grid"].version == "v6" and view.actions["grid", "production"] == 0
    assert view.errors == ("production of grid is alarmed, v6 is world_moved, and stays as it is: an earlier version would only be judged by data that are no more",)


@pytest.mark.parametrize("repeats", [False, True])
def test_the_latents_of_a_replica_are_no_better_for_another_version(scene, make_bundle, repeats):
    """But samples that repeat may do so because of their model.onnx."""
    scene = scene()
    if repeats:
        scene.bundles["v5"] = make_bundle(root=scene.registry.root, version="v5", grain=1.0)
    version = "v5" if repeats else "v2"
    for each in ("v1", version):
        scene.promote(each)
    if not repeats:
        scene.watch.reran(Rerun(scene.bundles["v2"], Compared(8), 8, 3), scene.now)
    view = scene.serve(version)
    assert {incident["verdict"] for incident in scene.watch.incidents.newest()} == {"latent_fault"}
    assert view.models["grid"].version == ("v1" if repeats else "v2")
    assert ("draw those of an earlier version no better" in "".join(view.errors)) != repeats


def test_one_alias_may_be_allowed_and_the_others_not(scene):
    scene = scene()
    scene.watch.policy = Policy(scene.registry, 0.0, always=False)
    scene.promote("v1")
    scene.promote("v3")
    assert scene.serve("v3").actions["grid", "production"] == 0
    scene.promote("v1")
    scene.registry.set_alias("grid", "production", "v3", reason="inject", act=True)
    scene.watch.follow(scene.now)
    assert scene.serve("v3").actions["grid", "production"] == 1 and scene.registry.aliases("grid") == {"production": "v1"}
    assert not scene.registry.history("grid")[-1].act  # what was done is not undone by itself


@pytest.mark.parametrize(
    ("alias", "meanwhile", "stands"),
    [("production", "another monitor", "v2"), ("production", "people", "v1"), ("canary", "another monitor", None), ("canary", "people", "v1")],
)
def test_what_changes_between_the_look_and_the_change_stays(scene, monkeypatch, alias, meanwhile, stands):
    """Two monitors over one registry go back once, and what people promote is not overwritten: the last moment is just before the lock."""
    scene = scene()
    for version in ("v1", "v2", "v3"):
        scene.promote(version, alias)
    others, locked = Registry(scene.registry.root), scene.registry._locked

    def interrupted(model: str) -> AbstractContextManager[None]:
        monkeypatch.undo()
        if meanwhile == "people":
            others.set_alias("grid", alias, "v1", reason="promote")
        else:
            Policy(others, 0.0).act("grid", alias, "v3", why="v3 is drift", alarmed={"v3"})
        return locked(model)

    monkeypatch.setattr(scene.registry, "_locked", interrupted)
    scene.now += 1
    scene.watch.eat([Record("grid", "v3", "server_seed", 1, 0, scene.draw(scene.bundles["v3"], 3000, seed=1), scene.now)], scene.now)
    scene.watch.act(scene.now)
    assert scene.registry.aliases("grid").get(alias) == stands and len(scene.registry.history("grid")) == 4
    view = scene.watch.publish(scene.now)
    assert view.errors == (f"{alias} of grid stays as it is: it was changed meanwhile and names {stands or 'none'} now",)
    assert view.actions["grid", alias] == 0 and "action" not in scene.watch.incidents.newest()[0]["evidence"]
    with pytest.raises(RegistryError, match="no longer names v3"):
        Policy(scene.registry, 0.0).act("grid", alias, "v3", why="v3 is drift", alarmed={"v3"})
