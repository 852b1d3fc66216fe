"""A full or read-only file system, a real one: a clear error, nothing half-written, what was good is kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.checkpoints import read_state

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def mounted(tmp_path):
    """mounted(options) -> the root of a fresh file system in memory."""
    mounts = []

    def mount(options):
        place = tmp_path / f"mount-{len(mounts)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounts.append(place)
        return place

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    yield mount
    for place in mounts:
        subprocess.run(["umount", str(place)], check=True)


def command(home, *flags):
    env = {**os.environ, "GANWATCH_HOME": str(home), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    return {"args": [sys.executable, "training/train.py", "--dataset", "ring", *map(str, flags)], "cwd": ROOT, "env": env, "text": True}


def train(home, *flags):
    return subprocess.run(**command(home, *flags), capture_output=True, timeout=240)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, mounted, workers):
    home = mounted("size=2m")  # room for three checkpoints of some 600 kB, and no more than two of them complete
    how = ("--registry", tmp_path / "registry", "--steps", 5000, "--checkpoint-seconds", 0.01, "--width", 160)
    done = train(home, *how, "--workers", workers)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "not published: there is no room in " in done.stderr and "--resume" in done.stderr
    (run,) = (home / "runs").iterdir()
    kept = sorted(path.parent for path in run.glob("ray/step-*/state.pt"))
    assert kept
    for checkpoint in kept:
        assert read_state(checkpoint)["step"] == int(checkpoint.name.split("-")[1])
        assert len(list(checkpoint.glob("random-*.pt"))) == workers
    assert '"stage": "failed", "reason": "there is no room in' in (run / "status.jsonl").read_text().splitlines()[-1]


def test_a_disk_that_others_fill_to_the_last_byte_ends_the_run_once_and_in_words(tmp_path, mounted):
    home = mounted("size=4m")
    how = ("--registry", tmp_path / "registry", "--steps", 100_000, "--checkpoint-seconds", 30)  # by then the page in which its journal was has been filled, too
    with subprocess.Popen(**command(home, *how), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        try:
            said = [next(line for line in run.stdout if line.startswith("step "))]
            with pytest.raises(OSError), open(home / "of-others", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            rest, errors = run.communicate(timeout=240)
        finally:
            run.kill()
    assert run.returncode == 1 and "Traceback" not in errors, errors
    assert errors.startswith("not published: there is no room in ") and "--resume" in errors, errors
    assert "step " in rest and "goes on from" not in rest, said + [rest]  # no worker died of it


def test_a_registry_that_cannot_be_written_is_named(tmp_path, mounted):
    done = train(tmp_path, "--registry", mounted("ro,size=1m") / "registry")
    assert done.returncode == 2 and "which cannot be written (Read-only file system); choose a writable directory" in done.stderr
