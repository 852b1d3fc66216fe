"""Puts ganwatch's folder, datasource, dashboard and alert rules into a running Grafana, over HTTP.

    GRAFANA_TOKEN=glsa_... ganwatch grafana apply --url http://127.0.0.1:3000 --dry-run
    python -m deploy.grafana > deploy/grafana/provisioning/alerting/ganwatch.yaml    # after an edit of prometheus/rules.yml

What is put there is read from deploy/grafana and deploy/prometheus/rules.yml; a second run changes nothing. Contact points and
notification policies belong to the Grafana's owner: they are neither read nor written. Where no token is to be had, the
provisioning files do the same (deploy/compose.yaml uses them).
The transport is grafana-api, which is older than Grafana's present alerting: endpoints that it has no method for go through its
bare verbs. No Grafana has run here: what is known of its answers is its documentation.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml
from grafana_api.grafana_api import GrafanaException
from grafana_api.grafana_face import GrafanaFace

from deploy.observability import RULES

HERE = Path(__file__).resolve().parent / "grafana"
FOLDER = {"uid": "ganwatch", "title": "ganwatch"}
ABOVE_ZERO = {"evaluator": {"type": "gt", "params": [0]}}
VERDICT_PANEL = 1  # the panel that every alert links to
EVERY_S = 10  # seconds between evaluations: the shortest that Grafana takes
OWN_ADDRESS = "give Grafana's own address, with its sub-path if it has one"
EDITABLE = {"X-Disable-Provenance": "true"}  # leaves the rules editable in Grafana's pages


class GrafanaError(RuntimeError):
    """Grafana could not be reached or said no. The text says what was tried, what came back, and what to do."""


@dataclass(frozen=True)
class Apply:
    """Put the datasource, folder, dashboard and alert rules into a running Grafana."""

    url: str = "http://127.0.0.1:3000"
    """Grafana's root, with its sub-path if it has one."""
    token_env: str = "GRAFANA_TOKEN"
    """Name of the environment variable that holds a service account token (role Admin: datasources need it)."""
    prometheus_url: str = "http://127.0.0.1:9090"
    """Prometheus as Grafana reaches it."""
    dry_run: bool = False
    """Read only, and print what would be done."""
    wait: float = 30.0
    """Seconds to wait for a Grafana that is still starting."""

    def __call__(self) -> list[str]:
        """One line for each thing looked at. Raises GrafanaError."""
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise GrafanaError(
                f"environment variable {self.token_env} is not set; put a service account token of Grafana there, "
                "or name another variable with --token-env"
            )
        return apply(self.url, token, prometheus_url=self.prometheus_url, dry_run=self.dry_run, wait=self.wait)


def apply(
    url: str, token: str, *, prometheus_url: str = "http://127.0.0.1:9090", dry_run: bool = False, wait: float = 30.0
) -> list[str]:
    """Make the Grafana at `url` hold what is committed here; see Apply. Raises GrafanaError, which never quotes the token."""
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise GrafanaError("the token holds a space, a line break or a character that is not ASCII; copy it again")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise GrafanaError("the URL must look like http://127.0.0.1:3000 or https://host/grafana, without credentials or query")
    path = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
    grafana = GrafanaFace(token, host=parts.netloc, url_path_prefix=path, protocol=parts.scheme, timeout=10.0)
    grafana.api.s.max_redirects = 0  # followed, a redirected POST becomes a GET, and nothing is written
    with closing(grafana.api.s):
        session = _Session(grafana, url, dry_run)
        session.wait_until_healthy(wait)
        session.refuse_provisioned()
        lines = [session.folder(), session.datasource(prometheus_url), session.dashboard()]
        lines += [*map(session.rule, alert_rules()), session.group()]
    changes = sum(not line.startswith("unchanged") for line in lines)
    done = "nothing was written" if dry_run else "contact points and notification policies are untouched"
    return [*lines, f"{changes or 'no'} change{'' if changes == 1 else 's'}{' to make' if dry_run else ''}; {done}"]


class _Session:
    """One run against one Grafana: reads what is there, writes only what differs."""

    def __init__(self, grafana: GrafanaFace, url: str, dry_run: bool) -> None:
        self.grafana, self.url, self.dry_run = grafana, url, dry_run

    def wait_until_healthy(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                health = self._ask("read its health", self.grafana.api.GET, "/health")
                if not isinstance(health, dict) or "database" not in health:
                    raise GrafanaError(f"{self.url} answers, but not as a Grafana does; {OWN_ADDRESS}")
                if health["database"] == "ok":
                    return
                trouble = GrafanaError(f"Grafana at {self.url} has no working database: {health['database']!r}; see its log")
            except _NotYet as error:
                trouble = error
            if time.monotonic() > deadline:
                raise GrafanaError(str(trouble)) from None
            time.sleep(0.2)

    def refuse_provisioned(self) -> None:
        """A Grafana that has the dashboard from a file has it in a folder of that file's: ours would be a second one."""
        there = self._find("read the dashboard", self.grafana.dashboard.get_dashboard, dashboard()["uid"])
        if there and there["meta"].get("provisioned"):
            raise GrafanaError(
                f"Grafana at {self.url} has ganwatch's dashboard from a provisioning file, which cannot be changed over HTTP; "
                "edit its provisioning files, or take them away and run this again"
            )

    def folder(self) -> str:
        there = self._find("read the folder", self.grafana.folder.get_folder, FOLDER["uid"])
        return self._settle(
            f"folder {FOLDER['title']}",
            there,
            FOLDER,
            create=lambda wanted: self.grafana.folder.create_folder(**wanted),
            update=lambda wanted: self.grafana.folder.update_folder(wanted["uid"], wanted["title"], overwrite=True),
        )

    def datasource(self, prometheus_url: str) -> str:
        wanted = {**datasource(), "url": prometheus_url}
        path = f"/datasources/uid/{wanted['uid']}"
        there = self._find("read the datasource", self.grafana.api.GET, path)
        # What somebody added there, such as a password, stays.
        merged = {**there, **wanted, "jsonData": {**(there.get("jsonData") or {}), **wanted["jsonData"]}} if there else wanted
        return self._settle(
            f"datasource {wanted['name']}",
            there,
            wanted,
            create=self.grafana.datasource.create_datasource,
            update=lambda _: self.grafana.api.PUT(path, json=merged),
            owned_by_file=bool(there and there.get("readOnly")),
        )

    def dashboard(self) -> str:
        wanted = {"dashboard": dashboard(), "meta": {"folderUid": FOLDER["uid"]}}
        there = self._find("read the dashboard", self.grafana.dashboard.get_dashboard, wanted["dashboard"]["uid"])
        body = {"dashboard": {**wanted["dashboard"], "id": None}, "folderUid": FOLDER["uid"]}
        body |= {"overwrite": True, "message": "ganwatch grafana apply"}
        return self._settle(
            f"dashboard {wanted['dashboard']['title']}",
            there,
            wanted,
            create=lambda _: self.grafana.dashboard.update_dashboard(body),
            update=lambda _: self.grafana.dashboard.update_dashboard(body),
        )

    def rule(self, wanted: dict[str, Any]) -> str:
        """Rules go one by one: before 11.5.2 Grafana refuses a group that names new uids."""
        path = "/v1/provisioning/alert-rules"
        there = self._find("read the alert rule", self.grafana.api.GET, f"{path}/{wanted['uid']}")
        return self._settle(
            f"alert rule {wanted['title']}",
            there,
            {key: value for key, value in wanted.items() if key != "orgID"},  # it is the token's organisation, whatever is sent
            create=lambda _: self.grafana.api.POST(path, json=wanted, headers=EDITABLE),
            # What somebody set there besides, such as a pause or a receiver, stays.
            update=lambda own: self.grafana.api.PUT(f"{path}/{wanted['uid']}", json={**(there or {}), **own}, headers=EDITABLE),
            owned_by_file=bool(there and there.get("provenance") == "file"),
        )

    def group(self) -> str:
        """The interval belongs to the group, and a group to its rules: it is read back whole and written whole."""
        name = alert_rules()[0]["ruleGroup"]
        path = f"/v1/provisioning/folder/{FOLDER['uid']}/rule-groups/{name}"
        there = self._find("read the group of alert rules", self.grafana.api.GET, path)
        if there is None and not self.dry_run:
            raise GrafanaError(f"Grafana at {self.url} took the alert rules but shows no group {name!r} of them; run this again")
        return self._settle(
            f"interval of the alert rules, {EVERY_S} s",
            there,
            {"interval": EVERY_S},
            create=lambda _: None,
            update=lambda wanted: self.grafana.api.PUT(path, json={**(there or {}), **wanted}, headers=EDITABLE),
        )

    def _settle(
        self,
        what: str,
        there: dict[str, Any] | None,
        wanted: dict[str, Any],
        *,
        create: Callable[[dict[str, Any]], Any],
        update: Callable[[dict[str, Any]], Any],
        owned_by_file: bool = False,
    ) -> str:
        """Create, update or leave alone, in that order of need; returns the line that says so."""
        different = [] if there is None else list(_differences(there, wanted))
        if there is not None and not different:
            return f"unchanged: {what}"
        shown = f"{what} ({', '.join(different[:4])}{', ...' if len(different) > 4 else ''})" if different else what
        if owned_by_file:
            raise GrafanaError(f"{shown} differs, but Grafana at {self.url} has it from a provisioning file; edit that file")
        if self.dry_run:
            return f"would {'create' if there is None else 'update'}: {shown}"
        self._ask(f"write {what}", create if there is None else update, wanted)
        return f"{'created' if there is None else 'updated'}: {shown}"

    def _find(self, what: str, call: Callable[..., Any], *arguments: Any) -> dict[str, Any] | None:
        """What is there, None where nothing is."""
        try:
            return self._ask(what, call, *arguments)
        except _NotFound:
            return None

    def _ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of one request; every way in which it fails, in words."""
        failed = f"could not {what} at {self.url}"
        try:
            return call(*arguments)
        except requests.exceptions.JSONDecodeError:
            raise GrafanaError(f"{failed}: the answer is not JSON; {OWN_ADDRESS}") from None
        except requests.exceptions.SSLError as error:
            raise GrafanaError(f"{failed}: TLS failed ({error})") from None
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout):
            raise _NotYet(f"{failed}: nothing answers there; start Grafana or give its address with --url") from None
        except requests.exceptions.TooManyRedirects as error:
            raise GrafanaError(f"{failed}: it redirects to {error.response.headers.get('location')}; give that address") from None
        except requests.exceptions.RequestException as error:
            raise GrafanaError(f"{failed}: {type(error).__name__}") from None
        except GrafanaException as error:
            raise _refusal(failed, error) from None
        except TypeError:
            # grafana-api looks for error["message"] in whatever came back, text too.
            raise GrafanaError(f"{failed}: an error page came back instead of JSON; {OWN_ADDRESS}") from None


class _NotYet(GrafanaError):
    """It may work a little later."""


class _NotFound(GrafanaError):
    """404."""


def _refusal(failed: str, error: GrafanaException) -> GrafanaError:
    """An HTTP error in words."""
    said = error.response.get("message") if isinstance(error.response, dict) else None
    said = f" ({said})" if said else ""
    match error.status_code:
        case 401:
            return GrafanaError(f"{failed}: the token was refused (401){said}; make a new one for a service account")
        case 403:
            return GrafanaError(f"{failed}: the token may not do that (403){said}; its service account needs the role Admin")
        case 404:
            return _NotFound(f"{failed}: not found (404){said}; this needs Grafana 9.4 or later with alerting; {OWN_ADDRESS}")
        case 409 | 412:
            return GrafanaError(f"{failed}: it clashes with something there ({error.status_code}){said}; rename or delete that")
        case 500 | 501:
            return GrafanaError(f"{failed}: Grafana failed ({error.status_code}){said}; see its log")
        case status if status > 501:
            return _NotYet(f"{failed}: Grafana is not ready ({status}){said}")
        case status:
            return GrafanaError(f"{failed}: refused ({status}){said}")


def _differences(there: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Paths at which `there` lacks what is wanted. What Grafana adds, as ids, versions and defaults, is no difference."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        for key, value in wanted.items():
            yield from _differences(there.get(key), value, f"{path}.{key}" if path else key)
    elif isinstance(wanted, list) and isinstance(there, list) and len(wanted) == len(there):
        for index, (left, right) in enumerate(zip(there, wanted, strict=True)):
            yield from _differences(left, right, f"{path}[{index}]")
    elif there != wanted:
        yield path


def datasource() -> dict[str, Any]:
    """The committed datasource in the form of the HTTP API; its URL is the provisioning file's variable."""
    committed = yaml.safe_load((HERE / "provisioning" / "datasources" / "ganwatch.yaml").read_text())["datasources"][0]
    return {key: value for key, value in committed.items() if key != "orgId"}


def dashboard() -> dict[str, Any]:
    """The committed dashboard, without the id and version that each Grafana gives it."""
    committed = json.loads((HERE / "dashboards" / "ganwatch.json").read_text())
    return {key: value for key, value in committed.items() if key not in ("id", "version")}


def alert_rules() -> list[dict[str, Any]]:
    """The alerts of prometheus/rules.yml as Grafana-managed rules, in the form of the HTTP API.

    An expression gives a series for each alert and none otherwise, so no data is health and anything above 0 is an alert.
    Annotations that query are left out: Grafana's templates cannot.
    """
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    links = {"__dashboardUid__": dashboard()["uid"], "__panelId__": str(VERDICT_PANEL)}
    return [
        {
            "uid": re.sub(r"(?<!^)(?=[A-Z])", "-", alert["alert"]).lower(),
            "orgID": 1,
            "folderUID": FOLDER["uid"],
            "ruleGroup": group["name"],
            "title": alert["alert"],
            "condition": "B",
            "for": alert.get("for", "0s"),
            "noDataState": "OK",
            "execErrState": "Error",
            "labels": alert["labels"],
            "annotations": {name: text for name, text in alert["annotations"].items() if "query" not in text} | links,
            "data": [
                _query("A", datasource()["uid"], {"expr": alert["expr"], "instant": True, "range": False}),
                _query("B", "__expr__", {"type": "threshold", "expression": "A", "conditions": [ABOVE_ZERO]}),
            ],
        }
        for alert in group["rules"]
    ]


def _query(ref: str, source: str, model: dict[str, Any]) -> dict[str, Any]:
    window = {"from": 600, "to": 0}  # seconds before now
    return {"refId": ref, "relativeTimeRange": window, "datasourceUid": source, "model": {"refId": ref, **model}}


def provisioning_file() -> str:
    """The same rules in the form that Grafana reads from files: deploy/grafana/provisioning/alerting/ganwatch.yaml."""
    of_group = ("orgID", "folderUID", "ruleGroup")
    link = {"dashboardUid": dashboard()["uid"], "panelId": VERDICT_PANEL}
    rules = [{key: value for key, value in rule.items() if key not in of_group} | link for rule in alert_rules()]
    name = alert_rules()[0]["ruleGroup"]
    group = {"orgId": 1, "name": name, "folder": FOLDER["title"], "interval": f"{EVERY_S}s", "rules": rules}
    text = yaml.dump({"apiVersion": 1, "groups": [group]}, Dumper=_NoAliases, sort_keys=False, width=120, allow_unicode=True)
    return "# Written by `python -m deploy.grafana` from deploy/prometheus/rules.yml: edit that one, then write this.\n" + text


class _NoAliases(yaml.SafeDumper):
    """Repeats what is repeated: a reader should not have to follow anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


if __name__ == "__main__":
    sys.stdout.write(provisioning_file())
