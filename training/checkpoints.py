"""What a run needs to go on as though it had never stopped: every number that changes from one step to the next.

Batches, latents and schedules are functions of (seed, step), so the step is the cursor of all of them. It knows no Ray.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.diagnostics import Diagnosis
from training.recipes import Recipe
from training.views import InstanceNoise


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another run. The text says which, the differences and what to do."""


@dataclass(frozen=True)
class State:
    """What a training loop changes, and the recipe by which. Saved as `state.pt`, with a file of random state for each worker beside it."""

    recipe: Recipe
    generator: nn.Module
    critic: nn.Module
    average: nn.Module
    optimisers: list[torch.optim.Optimizer]
    noise: InstanceNoise
    diagnosis: Diagnosis
    rng: torch.Generator  # of this worker

    def save(self, directory: Path, step: int, metrics: dict[str, Any], *, rank: int, world: int) -> None:
        """Write what worker `rank` contributes after `step` steps: rank 0 the state, everyone its random numbers."""
        torch.save(self.rng.get_state(), directory / self._random(rank, world))
        if rank == 0:
            networks = {name: getattr(self, name).state_dict() for name in ("generator", "critic", "average")}
            optimisers = [optimiser.state_dict() for optimiser in self.optimisers]
            state = {**networks, "optimisers": optimisers, "noise": self.noise.sigma, "diagnosis": vars(self.diagnosis)}
            torch.save(state | {"recipe": asdict(self.recipe), "step": step, "metrics": metrics}, directory / "state.pt")

    def load(self, directory: Path, *, rank: int, world: int) -> tuple[int, dict[str, Any]]:
        """Go back to what was saved; returns the steps that were done, and what was last measured.

        Raises CheckpointError where it cannot be read, or was learned by another recipe or other networks than this version has. Where
        the number of workers or their kind of device changed, random numbers begin anew, from the seed of each and the step.
        """
        state, now = read_state(directory), asdict(self.recipe)
        instead = "go on with the version that began it, or start a run of its own"
        refuse_other(state.get("recipe", now), now, words=f"this run was begun by another recipe; {instead}", dash="")  # earlier versions kept none
        try:
            for name in ("generator", "critic", "average"):
                getattr(self, name).load_state_dict(state[name])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
        except torch.cuda.OutOfMemoryError:
            raise  # the device's, not the checkpoint's: there may be room at the next try
        except (RuntimeError, ValueError) as error:  # names each weight that is missing, left over or of another shape
            raise CheckpointError(f"this run was begun with other networks than --network {self.recipe.network} is now; {instead}:\n{error}") from None
        self.noise.sigma = state["noise"]
        vars(self.diagnosis).update(state["diagnosis"])
        own = directory / self._random(rank, world)
        if own.exists():
            self.rng.set_state(torch.load(own, weights_only=True))
        else:
            self.rng.manual_seed(self.rng.initial_seed() + (state["step"] << 32))
        return state["step"], state["metrics"]

    def _random(self, rank: int, world: int) -> str:
        """The file of a worker's random state, which another kind of device cannot read."""
        return f"random-{self.rng.device.type}-{rank}-of-{world}.pt"


def read_state(directory: Path) -> dict[str, Any]:
    """The state that rank 0 saved, on the CPU. Raises CheckpointError."""
    try:
        return torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a cut-off file raises whatever the unpickler met
        raise CheckpointError(f"{directory / 'state.pt'} cannot be read ({(str(error).strip() or repr(error)).splitlines()[0]})") from None


def newest_readable(directory: Path) -> tuple[Path, list[str]]:
    """The checkpoint at `directory` or, where that is damaged, the newest one before it; and what is wrong with those passed over.

    Raises CheckpointError where none can be read.
    """
    damaged: list[str] = []
    for candidate in sorted((found for found in directory.parent.glob("step-*") if found.name <= directory.name), reverse=True):
        try:
            read_state(candidate)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return candidate, damaged
    words = "; ".join(damaged) or f"there is no checkpoint at {directory}"
    raise CheckpointError(f"{words}; nor is there one before that could be, so start a run of its own")


OTHER_FLAGS = "this run was started with other settings; leave these out, or start a run of its own"


def refuse_other(saved: dict[str, Any], wanted: dict[str, Any], *, free: tuple[str, ...] = (), words: str = OTHER_FLAGS, dash: str = "--") -> None:
    """Raise CheckpointError listing each setting of a run in which another differs, but for those that are `free` to change."""
    names = [name for name in saved | wanted if name not in free and saved.get(name) != wanted.get(name)]
    if names:
        listed = "".join(f"\n  {dash}{name.replace('_', '-')} is {wanted.get(name)}, the run has {saved.get(name)}" for name in names)
        raise CheckpointError(f"{words}:{listed}")
