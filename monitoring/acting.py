"""What an alarm may do by itself, where the operator allows it: take the canary away, roll production back. Off by default;
allowed for every alias (`--act` of the monitor) or for one, by the change that promoted its version (`promote --act`).

Never twice within the cool-down, never to a version that is alarmed itself, or was when it was last served and nobody has
acknowledged it, or that people rolled back from, or that the gate refused, be it when it was published or when it was promoted, or that
carries a deliberate fault. Nor is anything done where another version would serve no better (`Verdict.stays`). Whatever is done is an ordinary change of an alias, its reason says why; so the
cool-down outlives the process, too. It is made only where nobody has changed the alias since it was looked at. It does not judge: it reads verdicts and incidents.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from training.registry import AliasChange, BundleError, Registry, RegistryError

ACTED = "acted on an alarm: "  # how the reason of every change begins that was made here
ALIASES = ("canary", "production")  # in this order; a shadow answers nobody, so it may stay


@dataclass(frozen=True)
class Policy:
    """`cool_down`: seconds after a change made here in which no other is made to the same alias; `always`: for every alias."""

    registry: Registry
    cool_down: float = 600.0
    always: bool = True

    def allows(self, history: Sequence[AliasChange], alias: str) -> bool:
        """Whether an alarm of the version that `alias` names may change it."""
        return self.always or next((change.act for change in reversed(history) if change.alias == alias), False)

    def act(self, model: str, alias: str, version: str, *, why: str, alarmed: Collection[str], at: float | None = None) -> AliasChange:
        """Change `alias`, whose `version` is alarmed; `alarmed`: versions not to go to; `at`: Unix seconds, now by default.

        Raises RegistryError in words where nothing can or may be done, be it that people or another monitor have changed the alias.
        """
        history = [change for change in self.registry.history(model) if change.alias == alias]
        if not history or history[-1].version != version:
            raise RegistryError(f"{alias} of {model} stays as it is: it no longer names {version}, which is alarmed")
        at = time.time() if at is None else at
        for change in history:
            passed = at - datetime.fromisoformat(change.at).timestamp()
            if change.reason.startswith(ACTED) and passed < self.cool_down:
                raise RegistryError(f"{alias} of {model} is alarmed and stays as it is: it was changed for an alarm {passed:.0f} s ago, and {self.cool_down:g} s must pass")
        if alias != "production":
            return self.registry.set_alias(model, alias, None, reason=ACTED + why, after=history[-1])
        forced = {change.version for change in history if change.forced is not None}
        unsound = {None, version, *alarmed, *forced, *self.registry.withdrawn(model)}
        earlier = dict.fromkeys(change.version for change in reversed(history) if change.version not in unsound)
        sound = next((each for each in earlier if self._is_sound(model, each)), None)
        if sound is not None:
            return self.registry.set_alias(model, alias, sound, reason=ACTED + why, after=history[-1])
        raise RegistryError(f"{alias} of {model} is alarmed and stays as it is: none of its earlier versions is sound; promote or train one")

    def _is_sound(self, model: str, version: str) -> bool:
        """Whether it is there, whole, and neither forced nor faulty."""
        try:
            card = self.registry.card(model, version)
            if card.forced is not None or card.fault is not None:
                return False
            self.registry.open(model, version)
        except (RegistryError, BundleError):
            return False  # deleted or damaged since; there may be an older one
        return True
