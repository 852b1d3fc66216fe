"""Which versions a replica serves now. It follows the registry's aliases; what cannot be loaded never replaces what serves.

Readers take one look at `ModelTable.models`, an immutable snapshot, and keep the sampler they found for as long as they need it:
a swap is the exchange of one pointer. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from serving.sampler import Sampler
from serving.session import Device, check_device
from training.registry import Registry, RegistryError

_POLL_S = 0.25
_RETRY_S = 5.0  # between two attempts at a version that was refused
_LIVE_SESSIONS = 8  # kept for versions that no alias names, or no longer

_Key = tuple[str, str, int, int]  # model, version, stamp of its card

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One model as this replica sees it."""

    aliases: Mapping[str, str] = field(default_factory=dict)  # alias -> the version that the registry wants
    serving: Mapping[str, Sampler] = field(
        default_factory=dict
    )  # alias -> what answers: the version before, where the wanted one was refused
    errors: Mapping[str, str] = field(default_factory=dict)  # alias -> why its version is not served
    share: float = 0.0  # of the requests that name neither seed nor version: what the canary answers
    withdrawn: frozenset[str] = frozenset()  # versions that were rolled back: whoever does not name them must not get them
    stamp: tuple[int, ...] = ()  # of aliases.json when it was read
    attempted: float = 0.0  # time.monotonic() of that

    def find(self, reference: str) -> Sampler | None:
        """What answers for an alias or a version, among those that an alias names."""
        return self.serving.get(reference) or next((s for s in self.serving.values() if s.card.version == reference), None)

    def answering(self) -> list[Sampler]:
        """What answers requests that name no version."""
        aliases = ("production", "canary") if self.share else ("production",)
        return [self.serving[alias] for alias in aliases if alias in self.serving]

    @property
    def is_ready(self) -> bool:
        return "production" not in self.aliases or "production" in self.serving


class ModelTable:
    """The samplers of every model of `registry`. `refresh` once before serving, then `start` to follow the aliases."""

    def __init__(
        self, registry: Registry, device: Device = "auto", threads: int = 1, deterministic: bool = False, tensorrt: str | None = None
    ) -> None:
        check_device(device)
        self.tensorrt = tensorrt
        self.registry, self.device, self.threads, self.deterministic = registry, device, threads, deterministic
        self.models: Mapping[str, Model] = {}
        self.changed: Callable[[], None] = lambda: None  # called after each swap, by the thread that made it
        self.load_failures: Counter[str] = Counter()  # model -> versions refused, each attempt counted
        self._recent: OrderedDict[_Key, Sampler] = OrderedDict()
        self._loading: dict[_Key, threading.Lock] = {}
        self._lock = threading.Lock()  # of the two above; never held while a model loads
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def refresh(self) -> None:
        """Load what the aliases name now and were not known to name; publish the new snapshot when all of it is warm.

        By one thread at a time. Raises FileNotFoundError where the registry has gone: whatever serves goes on serving.
        """
        if self.models and not self.registry.root.is_dir():
            raise FileNotFoundError(f"no directory {self.registry.root}")
        models = {name: self._refreshed(name, self.models.get(name, Model())) for name in self.registry.models()}
        if models != self.models:
            self.models = models
            self.changed()
        self._forget()

    def loaded(self, model: str, version: str) -> Sampler | None:
        """That version, which no alias may name, if it is there already."""
        try:
            key = self._key(model, version)
        except FileNotFoundError:
            return None
        with self._lock:
            return self._recent.get(key)

    def load(self, model: str, version: str) -> Sampler:
        """That version, which no alias may name. Blocks while it loads, and nobody else.

        Raises FileNotFoundError where there is none, and whatever is wrong with its bundle.
        """
        try:
            return self._load(model, version)
        finally:
            self._forget()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._follow, name="registry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self.refresh()
            except Exception as error:  # whatever it is, the aliases must be followed again when it is mended
                logger.warning("the registry at %s cannot be read: %s", self.registry.root, error)

    def _refreshed(self, name: str, before: Model) -> Model:
        stamp = self._stamp(name)
        if stamp == before.stamp and not (before.errors and time.monotonic() - before.attempted > _RETRY_S):
            return before
        now = time.monotonic()
        try:
            aliases, share, withdrawn = self.registry.aliases(name), self.registry.canary_share(name), self.registry.withdrawn(name)
        except RegistryError as error:
            return replace(before, errors={"aliases.json": str(error)}, stamp=stamp, attempted=now)
        serving, errors = {}, {}
        for alias, version in aliases.items():
            try:
                serving[alias] = self._load(name, version)
            except Exception as error:  # whatever is wrong with a new version, the one that serves stays
                errors[alias] = f"{version}: {error}"
                logger.warning("%s of model %s is not served: %s", alias, name, errors[alias])
                if alias in before.serving:
                    serving[alias] = before.serving[alias]
        return Model(aliases, serving, errors, share, withdrawn, stamp, now)

    def _load(self, model: str, version: str) -> Sampler:
        try:
            key = self._key(model, version)
            with self._lock:
                alone = self._loading.setdefault(key, threading.Lock())
            with alone:  # whoever wants the same version waits for it
                sampler = self._recent.get(key)
                if sampler is None:
                    cache = self.tensorrt and Path(self.tensorrt) / model / version
                    sampler = Sampler(self.registry.open(model, version), self.device, self.threads, self.deterministic, cache or None)
                with self._lock:
                    self._recent[key] = sampler
                    self._recent.move_to_end(key)
                    self._loading.pop(key, None)
        except Exception:
            self.load_failures[model] += 1
            raise
        return sampler

    def _key(self, model: str, version: str) -> _Key:
        """The stamp tells a version that was deleted and published again under the same name."""
        card = (self.registry.root / model / version / "card.json").stat()
        return model, version, card.st_mtime_ns, card.st_ino

    def _forget(self) -> None:
        """All but the newest of the versions that no alias names."""
        named = {id(sampler) for model in self.models.values() for sampler in model.serving.values()}
        with self._lock:
            for key in [key for key, sampler in self._recent.items() if id(sampler) not in named][:-_LIVE_SESSIONS]:
                del self._recent[key]

    def _stamp(self, name: str) -> tuple[int, ...]:
        try:
            found = (self.registry.root / name / "aliases.json").stat()
        except FileNotFoundError:
            return (0,)
        return (found.st_mtime_ns, found.st_ino, found.st_size)
