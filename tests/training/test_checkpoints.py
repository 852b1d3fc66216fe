import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from training.checkpoints import CheckpointError, newest_readable, read_state, refuse_other
from training.config import Config
from training.data import DATASETS
from training.networks import FAMILIES, family
from training.recipes import RECIPES
from training.train import adversarial_training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits():
    return DATASETS["digits"]()


@pytest.mark.parametrize("options", [{"dataset": "digits"}, {"dataset": "digits", "noise": 0.1, "noise_schedule": "controlled", "conditional": True}])
def test_a_resumed_run_is_the_same_run_bit_by_bit(tmp_path, digits, options):
    def save(state, step, losses):
        if step == 50:
            state.save(tmp_path, step, losses, rank=0, world=1)

    config = Config(steps=120, **options)
    whole, losses = adversarial_training(config, digits, save=save)
    assert read_state(tmp_path)["step"] == 50
    resumed, again = adversarial_training(config, digits, resume=tmp_path)
    assert losses == again
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_finished_run_resumes_at_its_end(tmp_path, digits):
    config = Config(steps=50)
    whole, losses = adversarial_training(config, digits, save=lambda state, *so_far: state.save(tmp_path, *so_far, rank=0, world=1))
    again, same = adversarial_training(config, digits, resume=tmp_path)
    assert losses == same and all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_another_number_of_workers_or_kind_of_device_goes_on_with_other_noise(tmp_path, digits):
    config = Config(steps=60)
    adversarial_training(config, digits, save=lambda state, step, losses: step == 50 and state.save(tmp_path, step, losses, rank=0, world=1))
    own = tmp_path / "random-cpu-0-of-1.pt"
    torch.save(torch.zeros(16, dtype=torch.uint8), tmp_path / "random-cuda-0-of-1.pt")  # of the size that a GPU's has
    own.unlink()
    adversarial_training(config, digits, resume=tmp_path)


def test_damaged_checkpoints_are_named(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        read_state(tmp_path)


def test_the_newest_checkpoint_that_can_be_read_is_gone_on_from(tmp_path):
    for step in (50, 100, 150):
        (tmp_path / f"step-{step:07}").mkdir()
        torch.save({"step": step}, tmp_path / f"step-{step:07}" / "state.pt")
    newest = tmp_path / "step-0000150"
    assert newest_readable(newest) == (newest, [])
    (newest / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    found, (words,) = newest_readable(newest)
    assert found == tmp_path / "step-0000100" and re.fullmatch(r".*/step-0000150/state\.pt cannot be read \(.+\)", words)
    assert newest_readable(tmp_path / "step-0000050") == (tmp_path / "step-0000050", [])  # later ones are not its business
    for step in (50, 100):
        (tmp_path / f"step-{step:07}" / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"step-0000150/state\.pt cannot be read .*; nor is there one before"):
        newest_readable(newest)


def test_other_settings_are_refused_with_the_differences():
    saved = {"dataset": "ring", "steps": 5, "workers": 1, "learning_rate": None}
    with pytest.raises(CheckpointError) as refusal:
        refuse_other(saved, saved | {"learning_rate": 0.1, "steps": 6, "workers": 2}, free=("workers",))
    assert re.findall(r"--\S+ is .*", str(refusal.value)) == ["--steps is 6, the run has 5", "--learning-rate is 0.1, the run has None"]


def test_another_recipe_or_other_networks_than_a_run_was_begun_with_are_refused(tmp_path, monkeypatch):
    ring, config = DATASETS["ring"](), Config(dataset="ring", steps=50, width=16)
    adversarial_training(config, ring, save=lambda state, *so_far: state.save(tmp_path, *so_far, rank=0, world=1))
    kept = read_state(tmp_path)
    with monkeypatch.context() as upgraded, pytest.raises(CheckpointError) as refusal:
        upgraded.setitem(RECIPES, "ring", replace(RECIPES["ring"], hold=0.5, learning_rate=(1e-3, 1e-5)))
        adversarial_training(config, ring, resume=tmp_path)
    assert str(refusal.value).splitlines()[1:] == ["  learning-rate is (0.001, 1e-05), the run has (0.004, 1.2e-05)", "  hold is 0.5, the run has 0.0"]
    with monkeypatch.context() as upgraded, pytest.raises(CheckpointError, match=r"other networks than --network perceptron is now;(.|\n)*norm\.weight"):
        upgraded.setitem(FAMILIES, "perceptron", family("tests.training.normed:FAMILY"))
        adversarial_training(config, ring, resume=tmp_path)
    del kept["recipe"]
    torch.save(kept, tmp_path / "state.pt")  # as earlier versions wrote it
    adversarial_training(config, ring, resume=tmp_path)


SCRIPT = [sys.executable, "training/train.py"]
LONG = [*SCRIPT, "--dataset", "ring", "--steps", "20000", "--checkpoint-seconds", "0.5", "--certify-samples", "2000"]
AT_MOST = 120.0  # seconds from a worker's death to the next progress: 23 and 39 with five processes to a core


@pytest.fixture
def started(tmp_path):
    """started(*flags) -> a run of its own Ray, its environment, and `until(words)`, which returns the line of it that holds them."""
    env = {**os.environ, "GANWATCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env.pop("RAY_ADDRESS", None)
    with ExitStack() as ends:

        def start(*flags):
            run = subprocess.Popen([*LONG, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            ends.callback(run.communicate)
            ends.callback(run.kill)
            said = []

            def until(words):
                for line in run.stdout:
                    said.append(line)
                    if words in line:
                        return line
                raise AssertionError("".join(said))

            return run, env, until

        yield start


def workers(run):
    return [p for p in psutil.Process(run.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_a_killed_worker_costs_seconds_and_an_interrupted_run_goes_on(started):
    run, env, until = started()
    directory = until("run   ").split()[1]
    until("step ")
    (worker,) = workers(run)
    second = subprocess.run([*SCRIPT, "--resume", directory], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert second.returncode == 2 and "another process is training" in second.stderr, second.stderr
    until("step ")
    worker.kill()
    killed = time.monotonic()
    kept = int(until("goes on from step-").split("step-")[1].split()[0])
    until("step ")
    assert (cost := time.monotonic() - killed) < AT_MOST, f"{cost:.1f} s from the worker's death to the next progress"
    until("step ")
    until("step ")
    run.send_signal(signal.SIGINT)
    errors, _ = run.communicate(timeout=300)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors, errors
    assert re.search(r"interrupted; go on with: python training/train.py --resume (\S+)", errors)[1] == directory

    other = subprocess.run([*SCRIPT, "--resume", directory, "--steps", "7"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert other.returncode == 2 and "--steps is 7, the run has 20000" in other.stderr
    told = json.loads((Path(directory) / "ray" / "checkpoint_manager_snapshot.json").read_text())
    registered = told["latest_checkpoint_result"]["checkpoint_dir_name"]  # later ones may lie there, of which Ray was not told any more
    newest = Path(directory) / "ray" / registered / "state.pt"
    before = max(path.parent.name for path in Path(directory).glob("ray/step-*/state.pt") if path.parent.name < registered)
    newest.write_bytes(b"PK\x03\x04 cut off")
    resumed = subprocess.Popen([*SCRIPT, "--resume", directory], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert f"{newest} cannot be read (" in next(line for line in resumed.stdout if "state.pt" in line)
        line = next(line for line in resumed.stdout if "goes on from" in line)
        assert before in line and kept > 0
    finally:
        resumed.terminate()
        resumed.communicate(timeout=300)


@pytest.mark.slow
def test_where_one_of_two_workers_is_killed_the_run_goes_on(started):
    run, _, until = started("--workers", "2", "--min-workers", "1")
    until("step ")
    first, _ = workers(run)
    until("step ")
    first.kill()
    killed = time.monotonic()
    assert re.search(r"goes on from step-\d+ with (1 worker|2 workers)$", until("goes on from step-"))
    until("step ")
    assert (cost := time.monotonic() - killed) < AT_MOST, f"{cost:.1f} s from the worker's death to the next progress"
