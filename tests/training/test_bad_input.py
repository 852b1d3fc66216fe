"""What a person may get wrong, typed at the real command line: the answer says what, with which value, and what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training.checkpoints import read_state

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def train(home, *flags, **environment):
    ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env = {**ours, "GANWATCH_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "training/train.py", *map(str, flags)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def refused(done, status):
    """What was said, after a refusal in good order."""
    assert done.returncode == status and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset digist", "did you mean digits"),
        ("--objective relativstic", "f_total_variation; did you mean relativistic?"),
        ("--penalty r1r3", "did you mean r1r2?"),
        ("--noise-schedule falling", "falling is none of constant, linear, controlled "),
        ("--network dcgen", "there are no networks dcgen; did you mean dcgan"),
        ("--unrol 5", "--unroll"),
        ("--latent signs:16+norml:4", "--latent is 'signs:16+norml:4'; normal:128, normal:64x0.5 (a standard deviation above 0), signs:16 or"),
        ("--objective wasserstein --penalty none --clip 0.01 --unroll 5", "--unroll with --objective wasserstein: the steps that the generator looks ahead"),
        ("--workers 3", "--batch is 128, which --workers 3 do not divide; the nearest that will do: 126 and 129"),
        ("--precision fp16", "did you mean bf16?"),
    ],
)
def test_wishes_that_cannot_be_granted(tmp_path, flags, words):
    assert words in refused(train(tmp_path, *flags.split()), status=2)
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_is_not_there(tmp_path):
    words = refused(train(tmp_path, "--dataset", "ring", RAY_ADDRESS="127.0.0.1:1"), status=1)
    assert "the Ray cluster at RAY_ADDRESS, 127.0.0.1:1, cannot be joined ([Errno 111] Connection refused)" in words
    assert "go on with: python training/train.py --resume" in words


PIXELS = np.random.default_rng(0).integers(256, size=(120, 6, 6), dtype=np.uint8)
LABELS = np.arange(120) % 3
DATA = {
    "one.npz": ({"x": PIXELS[:1]}, "holds 1 sample; at least 100 are needed"),
    "nan.npz": ({"x": np.where(PIXELS > 250, np.nan, PIXELS / 255)}, f"hold NaN or infinity, the first in row {(PIXELS > 250).any(axis=(1, 2)).argmax()}"),
    "shape.npz": ({"x": np.zeros((120, 3, 6, 6), np.uint8)}, "channels come last"),
    "range.npz": ({"x": PIXELS.astype(np.int64) * 4}, "uint8 from 0 to 255 is expected"),
    "labels.npz": ({"y": LABELS}, "it holds labels and no samples; samples are looked for under x, samples"),
    "equal.npz": ({"x": np.full((120, 2), 0.5)}, "in which all 120 samples are equal"),
    "orphans.npz": ({"x": PIXELS[:110], "y": LABELS}, "y holds 120 labels and x 110 samples"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_trained_on(tmp_path, name):
    arrays, words = DATA[name]
    np.savez(tmp_path / name, **arrays)
    said = refused(train(tmp_path / "home", "--dataset", tmp_path / name), status=2)
    assert words in said and name in said
    assert not list((tmp_path / "home").rglob("card.json"))
    (status,) = (tmp_path / "home").glob("runs/*/status.jsonl")
    last = json.loads(status.read_text().splitlines()[-1])
    assert last["stage"] == "failed" and name in last["reason"]


def test_classes_without_labels(tmp_path):
    """Said before any process of Ray's starts."""
    assert "--conditional needs labelled data, and ring has no labels" in refused(train(tmp_path, "--dataset", "ring", "--conditional"), status=2)
    (status,) = tmp_path.glob("runs/*/status.jsonl")
    assert [json.loads(line)["stage"] for line in status.read_text().splitlines()] == ["begin", "failed"]


def test_numbers_that_blow_up_end_the_run_and_leave_the_last_good_checkpoint(tmp_path):
    how = ("--dataset", "ring", "--network", "tests.training.blows_up:FAMILY", "--steps", 5000, "--checkpoint-seconds", 0.001)
    done = train(tmp_path, *how, PYTHONPATH=str(ROOT))
    said = refused(done, status=1)
    assert "not published: the weights are no longer finite at step 150 of 5000; " in said
    (run,) = (tmp_path / "runs").iterdir()
    last = json.loads((run / "status.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "failed" and "no longer finite at step 150" in last["reason"]
    assert sorted(p.parent.name for p in run.glob("ray/step-*/state.pt")) == ["step-0000050", "step-0000100"]
    state = read_state(run / "ray" / "step-0000100")
    assert state["step"] == 100 and all(value.isfinite().all() for name in ("generator", "critic", "average") for value in state[name].values())
    assert not list(tmp_path.rglob("card.json"))
