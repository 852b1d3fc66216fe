"""What tests of more than one package share."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes must not fight over the cores
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell does that to what it runs in the background, and all that starts there inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

_BROKE: list[str] = []


def pytest_internalerror(excrepr: object) -> None:
    _BROKE.append(str(excrepr))


def pytest_unconfigure(config: pytest.Config) -> None:
    """What broke a test process is said once more at the very end: all that xdist says there is which test it was at."""
    if _BROKE and not hasattr(config, "workerinput"):
        print("\nwhat broke the run, in the process where it happened first:\n" + "\n".join(_BROKE[0].splitlines()[-25:]))


settings.register_profile("ganwatch", deadline=None)  # a loaded machine is no failure
settings.load_profile("ganwatch")


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """n free ports, all different, below those that the system gives away: they stay free until they are used."""

    def find(n: int) -> list[int]:
        found: list[int] = []
        while len(found) < n:
            port = random.randrange(20_000, 29_000)
            with socket.socket() as probe:
                if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                    found.append(port)
        return found

    return find
