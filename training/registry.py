"""CONTRACT. A registry is a directory of bundles: `<root>/<model>/<version>/`, with `<root>/<model>/aliases.json`.

Versions are immutable; `production`, `canary` and `shadow` are names that point at one. A rollback is an edit of that
file. It knows nothing of what a bundle contains beyond its card.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from training.bundle import Bundle, BundleError, Card, load_card, open_bundle, write_card

ALIASES = ("production", "canary", "shadow")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class RegistryError(ValueError):
    """A name that the registry does not hold, or cannot take. The text lists what there is."""


@dataclass(frozen=True)
class AliasChange:
    alias: str
    version: str | None  # None: the alias was removed
    at: str  # ISO 8601, UTC
    reason: str
    share: float = 0.0  # of a canary: how many of the requests that name neither seed nor version it answers
    act: bool = False  # whether the monitor may take this change back by itself when the version is alarmed
    forced: str | None = None  # what the gate objected to a version that was promoted all the same


def ganwatch_home() -> Path:
    """Where ganwatch keeps what it makes: GANWATCH_HOME, or .ganwatch under the working directory."""
    return Path(os.environ.get("GANWATCH_HOME", ".ganwatch")).resolve()


class Registry:
    """The bundles under `root` (default: `<ganwatch home>/registry`)."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root) if root is not None else ganwatch_home() / "registry"
        if "://" in str(root):
            raise RegistryError(f"registry root is {root!r}; this version reads local directories only")

    def models(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name))

    def versions(self, model: str) -> list[str]:
        """Complete versions, oldest first."""
        directory = self.root / checked_name(model, "model")
        found = [e.name for e in directory.iterdir() if _NAME.fullmatch(e.name) and (e / "card.json").is_file()] if directory.is_dir() else []
        return sorted(found, key=lambda v: (len(v), v))

    def aliases(self, model: str) -> dict[str, str]:
        """alias -> version, as it stands now."""
        current: dict[str, str] = {}
        for change in self.history(model):
            if change.version is None:
                current.pop(change.alias, None)
            else:
                current[change.alias] = change.version
        return current

    def canary_share(self, model: str) -> float:
        """The share of the requests that the canary answers now; 0 where there is none."""
        return next((change.share for change in reversed(self.history(model)) if change.alias == "canary"), 0.0)

    def forced(self, model: str, alias: str = "production") -> str | None:
        """What the gate objected to the version that `alias` names now, where it was promoted all the same."""
        return next((change.forced for change in reversed(self.history(model)) if change.alias == alias), None)

    def withdrawn(self, model: str) -> frozenset[str]:
        """Versions from which an alias went back, by a rollback or to an earlier version, and that none has named since."""
        ways: dict[str, list[str]] = {}
        found: set[str] = set()
        for change in self.history(model):
            way = ways.setdefault(change.alias, [])
            if change.version is None:
                left, ways[change.alias] = way, []
            else:
                left = _go(way, change.version)
            found |= set(left) - {way[-1] for way in ways.values() if way}
            found -= {change.version}
        return frozenset(found)

    def history(self, model: str) -> list[AliasChange]:
        """Every change of an alias, oldest first."""
        path = self.root / checked_name(model, "model") / "aliases.json"
        try:
            return [AliasChange(**change) for change in json.loads(path.read_text())["history"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:  # not UTF-8, not JSON, or not ours
            raise RegistryError(f"{path}: unreadable ({error}); restore it or delete it and promote a version again") from None

    def resolve(self, model: str, reference: str = "production") -> str:
        """The version that `reference`, an alias or a version, names now. Raises RegistryError listing what there is."""
        if model not in self.models():
            raise RegistryError(f"unknown model {model!r}; the registry at {self.root} holds {self.models() or 'none'}")
        versions, aliases = self.versions(model), self.aliases(model)
        version = aliases.get(reference, reference)
        if version not in versions:
            raise RegistryError(f"unknown version {reference!r} of model {model!r}; versions: {versions or 'none'}, aliases: {aliases or 'none'}")
        return version

    def path(self, model: str, reference: str = "production") -> Path:
        return self.root / model / self.resolve(model, reference)

    def card(self, model: str, reference: str = "production") -> Card:
        return load_card(self.path(model, reference))

    def open(self, model: str, reference: str = "production") -> Bundle:
        """The verified bundle, whose card must name the place where it lies. Raises RegistryError or BundleError."""
        version = self.resolve(model, reference)
        bundle = open_bundle(self.root / model / version)
        if (bundle.card.model, bundle.card.version) != (model, version):
            raise BundleError(f"{bundle.path}: its card says {bundle.card.model} {bundle.card.version}; a copied version must be published, not moved")
        return bundle

    @contextmanager
    def staging(self, model: str) -> Iterator[Path]:
        """An empty directory on the registry's own file system, removed again unless it is published."""
        directory = self.root / checked_name(model, "model") / f".staging-{uuid.uuid4().hex[:12]}"
        directory.mkdir(parents=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def publish(self, staged: Path, card: Card) -> Bundle:
        """Make the staged files the next version of `card.model`: hashes, card, then one rename."""
        with self._locked(card.model):
            # Neither an incomplete version nor one that was deleted gives its name away: monitors and clients may remember it.
            names = {entry.name for entry in (self.root / card.model).iterdir()} | {c.version for c in self.history(card.model) if c.version}
            taken = [int(name[1:]) for name in names if re.fullmatch(r"v\d+", name)]
            version = f"v{max(taken, default=0) + 1}"
            values = {**card.__dict__, "model": card.model, "version": version}
            write_card(staged, Card(**values))
            target = self.root / card.model / version
            os.rename(staged, target)
        return open_bundle(target)

    def set_alias(
        self,
        model: str,
        alias: str,
        reference: str | None,
        *,
        reason: str,
        share: float = 0.0,
        act: bool = False,
        forced: str | None = None,
        after: AliasChange | None = None,
    ) -> AliasChange:
        """Point `alias` at a version (None removes it), in one step, with the reason kept for ever.

        `share`: of a canary, the part of the requests that name neither seed nor version which it answers. `act`: the monitor may
        take the change back by itself when the version is alarmed. `forced`: what the quality gate said against it, which is kept, too.
        `after`: the alias' newest change, of whoever decided by it; raises RegistryError where there has been another since.
        """
        if alias not in ALIASES:
            raise RegistryError(f"alias is {alias!r}; it must be one of {', '.join(ALIASES)}")
        if not 0.0 <= share <= 1.0 or (share and (alias != "canary" or reference is None)):
            raise RegistryError(f"share is {share!r} for {alias}; it must lie in [0, 1], and only a canary has one")
        version = None if reference is None else self.resolve(model, reference)
        if version is not None:
            self.open(model, version)
        with self._locked(model):
            history = self.history(model)
            if after is not None and next((c for c in reversed(history) if c.alias == alias), None) != after:
                raise RegistryError(f"{alias} of {model} stays as it is: it was changed meanwhile and names {self.aliases(model).get(alias, 'none')} now")
            change = AliasChange(alias, version, datetime.now(UTC).isoformat(timespec="milliseconds"), reason, share, act, forced)
            history.append(change)
            target = self.root / model / "aliases.json"
            partial = target.with_suffix(".json.partial")
            with open(partial, "w") as file:
                json.dump({"schema": 1, "history": [c.__dict__ for c in history]}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        return change

    def rollback(self, model: str, alias: str = "production", *, reason: str = "rollback") -> AliasChange:
        """Point `alias` back at the version it named before the present one. Raises RegistryError where there is none.

        Rolling back twice goes back twice: versions that were left by a rollback are not returned to, and neither are versions
        that are damaged or carry a deliberate fault. A canary or shadow that was none before is none again.
        """
        way: list[str] = []
        named = [change for change in self.history(model) if change.alias == alias and change.version is not None]
        for change in named:
            _go(way, change.version)
        earlier = next((version for version in reversed(way[:-1]) if self._can_serve(model, version)), None)
        if earlier is None and alias != "production" and way:
            return self.set_alias(model, alias, None, reason=reason)
        if earlier is None:
            raise RegistryError(f"{alias} of model {model!r} has no earlier version to roll back to; versions: {self.versions(model)}")
        forced = next(change.forced for change in reversed(named) if change.version == earlier)
        return self.set_alias(model, alias, earlier, reason=reason, forced=forced)

    def _can_serve(self, model: str, version: str) -> bool:
        """Whether it is there, whole, and no fault was put into it."""
        try:
            return self.open(model, version).card.fault is None
        except (RegistryError, BundleError):
            return False

    @contextmanager
    def _locked(self, model: str) -> Iterator[None]:
        directory = self.root / checked_name(model, "model")
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _go(way: list[str], version: str) -> list[str]:
    """Move `way`, the versions that led to the one an alias names, on to `version`; those that it left by going back."""
    if version not in way:
        way.append(version)
        return []
    kept = way.index(version) + 1
    left, way[kept:] = way[kept:], []
    return left


def checked_name(name: str, what: str) -> str:
    """`name`, which becomes part of paths and of metrics. Raises RegistryError where it cannot."""
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{what} name is {name!r}; use letters, digits, '-' and '_', at most 64, starting with a letter or digit")
    return name


__all__ = ["ALIASES", "AliasChange", "BundleError", "Registry", "RegistryError", "checked_name", "ganwatch_home"]
