"""`grafana apply` against a small Grafana that enforces the documented schemas and status codes, and the committed files.

What the fake does not know: what a real Grafana draws, and whether it takes more or less than its documentation says.
"""

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deploy import grafana
from deploy.grafana import Apply, GrafanaError, apply
from deploy.observability import RULES

ADMIN, VIEWER = "glsa_admin_0123456789", "glsa_viewer_0123456789"
CHANGES = 4 + len(yaml.safe_load(RULES.read_text())["groups"][0]["rules"])  # folder, datasource, dashboard, interval, and the rules
ORGANISATION = 7
JSON = Any


def _schema(required: str, **properties: JSON) -> JSON:
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


TEXT, FLAG, OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
UID = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,40}$"}
QUERY = _schema(
    "refId datasourceUid relativeTimeRange model",
    refId=TEXT,
    queryType=TEXT,
    datasourceUid=TEXT,
    relativeTimeRange=_schema("from to", **{"from": {"type": "integer"}, "to": {"type": "integer"}}),
    model={"type": "object", "required": ["refId"]},
)
RULE = _schema(
    "orgID folderUID ruleGroup title condition data noDataState execErrState for",
    id={"type": "integer"},
    uid=UID,
    orgID={"type": "integer"},
    folderUID=UID,
    ruleGroup={"type": "string", "minLength": 1, "maxLength": 190},
    title={"type": "string", "minLength": 1, "maxLength": 190},
    condition=TEXT,
    data={"type": "array", "minItems": 1, "items": QUERY},
    updated=TEXT,
    noDataState={"enum": ["Alerting", "NoData", "OK"]},
    execErrState={"enum": ["Alerting", "Error", "OK"]},
    **{"for": {"type": "string", "pattern": r"^(\d+(ms|s|m|h|d|w|y))+$"}},
    annotations=TEXTS,
    labels=TEXTS,
    provenance=TEXT,
    isPaused=FLAG,
    notification_settings=OBJECT,
)
GROUP = _schema(
    "title folderUid interval rules",
    title=TEXT,
    folderUid=UID,
    interval={"type": "integer", "multipleOf": 10, "minimum": 10},
    rules={"type": "array", "items": RULE},
)
FOLDER = _schema("title", uid=UID, title={"type": "string", "minLength": 1})
FOLDER_CHANGE = _schema("title", title={"type": "string", "minLength": 1}, version={"type": "integer"}, overwrite=FLAG)
DATASOURCE = _schema(
    "name type access",
    **{key: TEXT for key in ("name", "type", "url", "user", "database")},
    uid=UID,
    access={"enum": ["proxy", "direct"]},
    **{key: {"type": "integer"} for key in ("id", "orgId", "version")},
    **{key: FLAG for key in ("basicAuth", "isDefault", "withCredentials", "readOnly")},
    **{key: OBJECT for key in ("jsonData", "secureJsonData", "secureJsonFields")},
)
DASHBOARD = _schema(
    "dashboard",
    dashboard={
        "type": "object",
        "required": ["title", "uid", "panels"],
        "properties": {"id": {"type": ["integer", "null"]}, "uid": UID, "__inputs": False},
    },
    folderUid=TEXT,
    overwrite=FLAG,
    message=TEXT,
)


class Refused(Exception):
    """A status and what Grafana says with it."""


class FakeGrafana:
    """The endpoints that are used, with their schemas, their codes, and what Grafana adds to what it is given."""

    def __init__(self) -> None:
        self.folders: dict[str, JSON] = {}
        self.datasources: dict[str, JSON] = {}
        self.dashboards: dict[str, JSON] = {}
        self.rules: dict[str, JSON] = {}
        self.intervals: dict[str, int] = {}
        self.database = iter(())  # what /health says before it says ok
        self.alerting = True
        self.calls: list[tuple[str, str]] = []

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [call for call in self.calls if call[0] != "GET"]

    def answer(self, method: str, path: str, token: str, body: JSON, provenance: str) -> tuple[int, JSON]:
        self.calls.append((method, path))
        if path == "/api/health":
            return 200, {"database": next(self.database, "ok"), "version": "12.3.2", "commit": "0" * 40}
        if token not in (ADMIN, VIEWER):
            raise Refused(401, "Invalid API key")
        if method != "GET" and token == VIEWER:
            raise Refused(403, "You'll need additional permissions to perform this action")
        for pattern, handler in self.routes().items():
            verb, route = pattern.split()
            if verb == method and (found := re.fullmatch(route, path)):
                return handler(body, *found.groups(), *([provenance] if "alert-rules" in route and method != "GET" else []))
        raise Refused(404, "Not found")

    def routes(self) -> dict[str, Callable[..., tuple[int, JSON]]]:
        alerting = {
            r"GET /api/v1/provisioning/alert-rules/([\w-]+)": lambda _, uid: (200, _found(self.rules, uid, "rule")),
            r"POST /api/v1/provisioning/alert-rules": self.create_rule,
            r"PUT /api/v1/provisioning/alert-rules/([\w-]+)": self.update_rule,
            r"GET /api/v1/provisioning/folder/([\w-]+)/rule-groups/([\w-]+)": self.read_group,
            r"PUT /api/v1/provisioning/folder/([\w-]+)/rule-groups/([\w-]+)": self.write_group,
        }
        return {
            r"GET /api/folders/([\w-]+)": lambda _, uid: (200, _found(self.folders, uid, "folder")),
            r"POST /api/folders": self.create_folder,
            r"PUT /api/folders/([\w-]+)": self.update_folder,
            r"GET /api/datasources/uid/([\w-]+)": lambda _, uid: (200, _found(self.datasources, uid, "Data source")),
            r"POST /api/datasources": self.create_datasource,
            r"PUT /api/datasources/uid/([\w-]+)": self.update_datasource,
            r"GET /api/dashboards/uid/([\w-]+)": lambda _, uid: (200, _found(self.dashboards, uid, "Dashboard")),
            r"POST /api/dashboards/db": self.write_dashboard,
            **(alerting if self.alerting else {}),
        }

    def create_folder(self, body: JSON) -> tuple[int, JSON]:
        _check(FOLDER, body)
        if body["uid"] in self.folders:
            raise Refused(409, "a folder with that UID already exists")
        self.folders[body["uid"]] = {**body, "id": 1, "version": 1, "canEdit": True}
        return 200, self.folders[body["uid"]]

    def update_folder(self, body: JSON, uid: str) -> tuple[int, JSON]:
        _check(FOLDER_CHANGE, body)
        folder = _found(self.folders, uid, "folder")
        if not body.get("overwrite") and body.get("version") != folder["version"]:
            raise Refused(412, "the folder has been changed by someone else")
        folder |= {"title": body["title"], "version": folder["version"] + 1}
        return 200, folder

    def create_datasource(self, body: JSON) -> tuple[int, JSON]:
        _check(DATASOURCE, body)
        if body["uid"] in self.datasources or body["name"] in {d["name"] for d in self.datasources.values()}:
            raise Refused(409, "data source with the same name already exists")
        own = {"id": 1, "orgId": ORGANISATION, "version": 1, "readOnly": False, "basicAuth": False, "user": "", "database": ""}
        self.datasources[body["uid"]] = {**own, **body}
        return 200, {"datasource": self.datasources[body["uid"]], "id": 1, "message": "Datasource added", "name": body["name"]}

    def update_datasource(self, body: JSON, uid: str) -> tuple[int, JSON]:
        _check(DATASOURCE, body)
        there = _found(self.datasources, uid, "Data source")
        if there["readOnly"]:
            raise Refused(403, "Cannot update read-only data source")
        self.datasources[uid] = {**{k: there[k] for k in ("id", "orgId", "readOnly")}, **body, "version": there["version"] + 1}
        return 200, {"datasource": self.datasources[uid], "id": 1, "message": "Datasource updated", "name": body["name"]}

    def write_dashboard(self, body: JSON) -> tuple[int, JSON]:
        _check(DASHBOARD, body)
        if body.get("folderUid") and body["folderUid"] not in self.folders:
            raise Refused(400, "folder not found")
        uid, there = body["dashboard"]["uid"], self.dashboards.get(body["dashboard"]["uid"])
        if there and there["meta"]["provisioned"]:
            raise Refused(400, "Cannot save provisioned dashboard")
        if there and not body.get("overwrite"):
            raise Refused(412, "The dashboard has been changed by someone else")
        version = there["meta"]["version"] + 1 if there else 1
        meta = {"folderUid": body.get("folderUid", ""), "version": version, "provisioned": False, "slug": "ganwatch"}
        self.dashboards[uid] = {"meta": meta, "dashboard": {**body["dashboard"], "id": 5, "version": version}}
        return 200, {"id": 5, "uid": uid, "status": "success", "version": version, "url": f"/d/{uid}/ganwatch"}

    def _stored_rule(self, body: JSON, provenance: str) -> JSON:
        _check(RULE, body)
        if body["folderUID"] not in self.folders:
            raise Refused(400, "folder does not exist")
        if body["condition"] not in {query["refId"] for query in body["data"]}:
            raise Refused(400, f"condition {body['condition']} does not exist")
        if any(rule["title"] == body["title"] and rule["uid"] != body["uid"] for rule in self.rules.values()):
            raise Refused(409, "rule title under the same organisation and folder should be unique")
        stored = {"id": 1, "isPaused": False, "annotations": {}, "labels": {}, **copy.deepcopy(body)}
        for query in stored["data"]:
            query.setdefault("queryType", "")
            query["model"] = {"intervalMs": 1000, "maxDataPoints": 43200, **query["model"]}
        return stored | {"orgID": ORGANISATION, "updated": "2026-01-01T00:00:00Z", "provenance": provenance}

    def create_rule(self, body: JSON, provenance: str) -> tuple[int, JSON]:
        if body.get("uid") in self.rules:
            raise Refused(409, "conflicting alert rule found: uid should be unique")
        self.rules[body["uid"]] = self._stored_rule(body, provenance)
        self.intervals.setdefault(body["ruleGroup"], 60)
        return 201, self.rules[body["uid"]]

    def update_rule(self, body: JSON, uid: str, provenance: str) -> tuple[int, JSON]:
        there = _found(self.rules, uid, "rule")
        if there["provenance"] not in ("", provenance):
            raise Refused(409, f"cannot change provenance from '{there['provenance']}' to '{provenance}'")
        self.rules[uid] = self._stored_rule(body, provenance)
        return 200, self.rules[uid]

    def read_group(self, _: JSON, folder: str, name: str) -> tuple[int, JSON]:
        rules = [rule for rule in self.rules.values() if (rule["folderUID"], rule["ruleGroup"]) == (folder, name)]
        if not rules:
            raise Refused(404, "rule group does not exist")
        return 200, {"title": name, "folderUid": folder, "interval": self.intervals[name], "rules": rules}

    def write_group(self, body: JSON, folder: str, name: str) -> tuple[int, JSON]:
        _check(GROUP, body)
        if missing := {rule["uid"] for rule in body["rules"]} - set(self.rules):
            raise Refused(500, f"Internal Server Error: {missing}")  # as before 11.5.2
        self.intervals[name] = body["interval"]
        kept = {rule["uid"] for rule in body["rules"]}
        self.rules = {uid: rule for uid, rule in self.rules.items() if uid in kept or rule["ruleGroup"] != name}
        return 200, body


def _found(there: dict[str, JSON], uid: str, what: str) -> JSON:
    if uid not in there:
        raise Refused(404, f"{what} not found")
    return there[uid]


def _check(schema: JSON, body: JSON) -> None:
    if errors := sorted(jsonschema.Draft202012Validator(schema).iter_errors(body), key=str):
        raise Refused(400, f"bad request data: {errors[0].message} at {list(errors[0].absolute_path)}")


@contextmanager
def listening(answer: Callable[[BaseHTTPRequestHandler, bytes], tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A server whose every answer is (status, headers, body); its URL."""

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            status, headers, body = answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def running(fake: FakeGrafana, prefix: str = "") -> Iterator[str]:
    def answer(request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        provenance = "" if request.headers.get("X-Disable-Provenance") == "true" else "api"
        try:
            if not request.path.startswith(prefix):
                raise Refused(404, "Not found")
            path = request.path.removeprefix(prefix)
            status, said = fake.answer(request.command, path, token, json.loads(body or b"null"), provenance)
        except Refused as refused:
            status, said = refused.args[0], {"message": refused.args[1]}
        return status, {"Content-Type": "application/json"}, json.dumps(said).encode()

    with listening(answer) as url:
        yield url + prefix


@pytest.fixture
def fake() -> FakeGrafana:
    return FakeGrafana()


@pytest.fixture
def url(fake: FakeGrafana) -> Iterator[str]:
    with running(fake) as address:
        yield address


def test_the_first_run_creates_everything(fake: FakeGrafana, url: str) -> None:
    lines = apply(url, ADMIN, prometheus_url="http://127.0.0.1:19090")
    rules = [rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]
    assert lines == [
        "created: folder ganwatch",
        "created: datasource ganwatch-prometheus",
        "created: dashboard ganwatch",
        *(f"created: alert rule {name}" for name in rules),
        "updated: interval of the alert rules, 10 s (interval)",
        f"{CHANGES} changes; contact points and notification policies are untouched",
    ]
    assert fake.datasources["ganwatch-prom"]["url"] == "http://127.0.0.1:19090"
    assert fake.dashboards["ganwatch"]["meta"]["folderUid"] == "ganwatch"
    assert fake.intervals == {"ganwatch": 10}
    assert {rule["provenance"] for rule in fake.rules.values()} == {""}, "editable in Grafana's pages"
    assert not any("contact-points" in path or "policies" in path for _, path in fake.calls)


def test_the_second_run_changes_nothing_and_says_so(fake: FakeGrafana, url: str) -> None:
    apply(url, ADMIN)
    before, fake.calls = copy.deepcopy(vars(fake)), []
    lines = apply(url, ADMIN)
    assert all(line.startswith("unchanged: ") for line in lines[:-1])
    assert lines[-1] == "no changes; contact points and notification policies are untouched"
    assert not fake.writes
    assert all(getattr(fake, name) == before[name] for name in ("folders", "datasources", "dashboards", "rules", "intervals"))


def test_a_dry_run_writes_nothing(fake: FakeGrafana, url: str) -> None:
    lines = apply(url, VIEWER, dry_run=True)
    assert all(line.startswith("would create: ") for line in lines[:-1])
    assert lines[-1] == f"{CHANGES} changes to make; nothing was written"
    assert not fake.writes
    apply(url, ADMIN)
    assert apply(url, VIEWER, dry_run=True)[-1] == "no changes to make; nothing was written"


def test_what_somebody_changed_is_put_right_and_what_they_added_stays(fake: FakeGrafana, url: str) -> None:
    apply(url, ADMIN)
    fake.folders["ganwatch"]["title"] = "drift"
    fake.datasources["ganwatch-prom"]["url"] = "http://elsewhere:9090"
    fake.datasources["ganwatch-prom"]["jsonData"]["tlsSkipVerify"] = True
    fake.dashboards["ganwatch"]["dashboard"]["panels"][1]["targets"][0]["expr"] = "vector(1)"
    fake.rules["gan-drift"]["data"][0]["model"]["expr"] = "vector(0)"
    fake.rules["gan-drift"]["isPaused"] = True
    fake.rules["mine"] = {**copy.deepcopy(fake.rules["gan-drift"]), "uid": "mine", "title": "mine"}
    del fake.rules["gan-mode-dropped"]
    fake.intervals["ganwatch"] = 300
    fake.calls = []
    changed = [line for line in apply(url, ADMIN) if not line.startswith("unchanged")]
    assert changed == [
        "updated: folder ganwatch (title)",
        "updated: datasource ganwatch-prometheus (url)",
        "updated: dashboard ganwatch (dashboard.panels[1].targets[0].expr)",
        "created: alert rule GanModeDropped",
        "updated: alert rule GanDrift (data[0].model.expr)",
        "updated: interval of the alert rules, 10 s (interval)",
        "6 changes; contact points and notification policies are untouched",
    ]
    assert len(fake.writes) == 6
    assert fake.datasources["ganwatch-prom"]["jsonData"]["tlsSkipVerify"]
    assert fake.rules["gan-drift"]["isPaused"]
    assert "mine" in fake.rules, "a rule that somebody added to the group"
    assert apply(url, ADMIN)[-1].startswith("no changes")


def test_a_panel_that_somebody_added_is_taken_away(fake: FakeGrafana, url: str) -> None:
    apply(url, ADMIN)
    fake.dashboards["ganwatch"]["dashboard"]["panels"].append({"id": 99, "type": "text"})
    assert "updated: dashboard ganwatch (dashboard.panels)" in apply(url, ADMIN)
    assert len(fake.dashboards["ganwatch"]["dashboard"]["panels"]) == len(grafana.dashboard()["panels"])


def test_a_grafana_under_a_sub_path(fake: FakeGrafana) -> None:
    with running(fake, "/monitoring/grafana") as address:
        assert apply(address + "/", ADMIN)[-1].startswith(f"{CHANGES} changes")


def test_a_grafana_that_is_still_starting_is_waited_for(fake: FakeGrafana, url: str) -> None:
    fake.database = iter(["failing", "failing"])
    assert apply(url, ADMIN)[-1].startswith(f"{CHANGES} changes")
    fake.database = iter(["failing"] * 1000)
    with pytest.raises(GrafanaError, match="no working database: 'failing'"):
        apply(url, ADMIN, wait=0)


def test_a_refused_token(fake: FakeGrafana, url: str) -> None:
    refused = r"could not read the dashboard at .*: the token was refused \(401\) \(Invalid API key\)"
    with pytest.raises(GrafanaError, match=refused) as caught:
        apply(url, "glsa_wrong")
    assert "glsa_wrong" not in str(caught.value)
    assert not fake.writes


def test_a_token_that_may_only_read(fake: FakeGrafana, url: str) -> None:
    with pytest.raises(GrafanaError, match=r"could not write folder ganwatch at .*\(403\).*needs the role Admin"):
        apply(url, VIEWER)


@pytest.mark.parametrize("token", ["glsa_1\n2", "glsa 12", "glsä12", ""])
def test_a_token_that_cannot_be_one_is_never_quoted(token: str) -> None:
    with pytest.raises(GrafanaError, match="copy it again") as caught:
        apply("http://127.0.0.1:1", token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:3000", "ftp://127.0.0.1", "http://", "http://admin:secret@127.0.0.1:3000", "http://127.0.0.1/?orgId=1"]
)
def test_an_url_that_cannot_be_one(address: str) -> None:
    with pytest.raises(GrafanaError, match="must look like http://127.0.0.1:3000") as caught:
        apply(address, ADMIN)
    assert "secret" not in str(caught.value)


def test_nothing_there(free_ports: Callable[[int], list[int]]) -> None:
    with pytest.raises(GrafanaError, match="nothing answers there; start Grafana or give its address with --url"):
        apply(f"http://127.0.0.1:{free_ports(1)[0]}", ADMIN, wait=0)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"<html>hello</html>", "not JSON"),
        (404, b"<html>no such message</html>", "an error page came back"),
        (404, b"404 page not found", r"not found \(404\)"),
        (200, b'{"status": "ok"}', "not as a Grafana does"),
        (200, b"[]", "not as a Grafana does"),
        (500, b"oops", r"Grafana failed \(500\)"),
        (503, b"upstream", r"Grafana is not ready \(503\)"),
        (418, b"{}", r"refused \(418\)"),
    ],
)
def test_something_else_is_there(status: int, body: bytes, words: str) -> None:
    with listening(lambda *_: (status, {}, body)) as address, pytest.raises(GrafanaError, match=words):
        apply(address, ADMIN, wait=0)


def test_a_redirect_is_not_followed(url: str) -> None:
    with listening(lambda request, _: (301, {"Location": url + request.path}, b"")) as address:
        with pytest.raises(GrafanaError, match=f"redirects to {url}"):
            apply(address, ADMIN)


def test_alerting_that_is_switched_off(fake: FakeGrafana, url: str) -> None:
    fake.alerting = False
    with pytest.raises(GrafanaError, match=r"could not write alert rule GanModeDropped .*\(404\).*with alerting"):
        apply(url, ADMIN)


def test_a_name_that_is_taken(fake: FakeGrafana, url: str) -> None:
    fake.create_datasource({"name": "ganwatch-prometheus", "uid": "other", "type": "prometheus", "access": "proxy"})
    with pytest.raises(GrafanaError, match=r"datasource ganwatch-prometheus .*clashes .*\(data source with the same name already"):
        apply(url, ADMIN)


def test_what_files_provisioned_is_left_to_the_files(fake: FakeGrafana, url: str) -> None:
    apply(url, ADMIN)
    fake.datasources["ganwatch-prom"]["readOnly"] = True
    for rule in fake.rules.values():
        rule["provenance"] = "file"
    assert apply(url, ADMIN)[-1].startswith("no changes")
    fake.rules["gan-drift"]["for"] = "5m"
    with pytest.raises(GrafanaError, match=r"alert rule GanDrift \(for\) differs, .* from a provisioning file; edit that file"):
        apply(url, ADMIN)


def test_a_grafana_that_is_provisioned_from_files_is_left_alone(fake: FakeGrafana, url: str) -> None:
    fake.dashboards["ganwatch"] = {"dashboard": grafana.dashboard(), "meta": {"provisioned": True, "folderUid": "cf1x", "version": 1}}
    with pytest.raises(GrafanaError, match="has ganwatch's dashboard from a provisioning file"):
        apply(url, ADMIN)
    assert not fake.writes


def test_both_kinds_of_provisioning_file_name_one_folder() -> None:
    (provider,) = yaml.safe_load((grafana.HERE / "provisioning" / "dashboards" / "ganwatch.yaml").read_text())["providers"]
    (group,) = yaml.safe_load((grafana.HERE / "provisioning" / "alerting" / "ganwatch.yaml").read_text())["groups"]
    assert provider["folder"] == group["folder"] and "folderUid" not in provider


def test_the_token_comes_from_the_environment(fake: FakeGrafana, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", ADMIN + "\n")
    lines = Apply(url=url, token_env="MY_TOKEN", prometheus_url="http://prometheus:9090")()
    assert lines[-1].startswith(f"{CHANGES} changes")
    assert not any(ADMIN in line for line in lines)
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(GrafanaError, match="environment variable MY_TOKEN is not set"):
        Apply(url=url, token_env="MY_TOKEN")()


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda trees: st.lists(trees, max_size=3) | st.dictionaries(st.text(max_size=3), trees, max_size=3),
)


@given(TREES, st.dictionaries(st.text(min_size=4, max_size=5), TREES, max_size=2))
def test_only_what_is_wanted_is_compared(tree: JSON, added: dict[str, JSON]) -> None:
    assert not list(grafana._differences(tree, tree))
    assert not list(grafana._differences({**added, "wanted": tree}, {"wanted": tree}))
    assert list(grafana._differences({**added, "wanted": [tree]}, {"wanted": [tree, tree]})) == ["wanted"]


# The committed files.


def test_the_module_is_not_shadowed_by_the_folder() -> None:
    assert grafana.__file__ is not None and Path(grafana.__file__).name == "grafana.py"
    assert grafana.HERE.is_dir() and not (grafana.HERE / "__init__.py").exists()


def test_the_provisioning_file_holds_the_rules_of_prometheus() -> None:
    path = grafana.HERE / "provisioning" / "alerting" / "ganwatch.yaml"
    assert path.read_text() == grafana.provisioning_file(), f"run `python -m deploy.grafana > {path}`"


def test_grafana_can_expand_every_template() -> None:
    """Grafana fills labels with its own environment and has no queries in templates; a label that a series lacks fails there."""
    panels = {panel["id"] for panel in grafana.dashboard()["panels"]}
    for rule in grafana.alert_rules():
        assert not any("$" in text for text in [*rule["labels"].values(), rule["data"][0]["model"]["expr"]])
        used = {name for text in rule["annotations"].values() for name in re.findall(r"\{\{(.*?)\}\}", text)}
        about = rule["labels"]["about"]
        of = {"samples": ("model", "version", "role"), "versions": ("model", "version", "role", "against"), "training": ("model", "run", "alarm")}
        known = of.get(about, ("model",))
        assert used <= {f" $labels.{name} " for name in known}, rule["title"]
        if used:
            assert rule["title"] not in ("GanMonitorAbsent", "GanSamplesDropped"), "these come without a model"
        assert rule["annotations"]["__dashboardUid__"] == "ganwatch" and int(rule["annotations"]["__panelId__"]) in panels
        assert {"summary", "description", "runbook"} <= set(rule["annotations"])


def test_nothing_but_alert_rules_is_provisioned_for_alerting() -> None:
    for path in (grafana.HERE / "provisioning" / "alerting").iterdir():
        assert set(yaml.safe_load(path.read_text())) == {"apiVersion", "groups"}, "policies would replace the whole tree"


def test_the_dashboard_can_be_provisioned_as_it_is() -> None:
    committed = json.loads((grafana.HERE / "dashboards" / "ganwatch.json").read_text())
    assert committed["id"] is None and committed["uid"] == "ganwatch" and "__inputs" not in committed
    variables = {variable["name"]: variable for variable in committed["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "role", "population", "estimator"}
    assert variables["datasource"]["current"]["value"] == grafana.datasource()["uid"]
    known = {*variables, "__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(committed))) <= known
    rows = [panel["title"] for panel in committed["panels"] if panel["type"] == "row"]
    assert rows == ["Verdict", "Drift", "Modes", "Traffic", "Health of the monitor", "Training"]
    marks = [annotation["expr"] for annotation in committed["annotations"]["list"] if "expr" in annotation]
    assert marks[0].startswith("ganwatch_model_loaded_timestamp_seconds") and marks[0].endswith("* 1000"), "Grafana wants milliseconds"


def test_every_panel_says_what_it_means_and_has_a_place_of_its_own() -> None:
    panels = grafana.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x, y in product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])):
            assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
            taken[x, y] = panel["title"]
        if panel["type"] != "row":
            assert len(panel["description"]) > 60, panel["title"]
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]
