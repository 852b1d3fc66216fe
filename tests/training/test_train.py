import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from training.bundle import open_bundle
from training.config import Config, InputError, check
from training.data import DATASETS, DataError
from training.networks import FAMILIES
from training.recipes import RECIPES, latent_law
from training.registry import Registry, RegistryError
from training.train import JOB, TrainingStopped, adversarial_training, build, check_networks, chosen_device, decayed, open_data, python_path

ROOT = Path(__file__).resolve().parents[2]
MNIST = ROOT.parent / "shared" / "data" / "mnist.npz"


def train(home, *flags, **environment):
    env = {**os.environ, "GANWATCH_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "training/train.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_rates_fall_exponentially_between_their_ends():
    assert decayed((1.0, 1e-4), 0.0) == 1.0
    assert decayed((1.0, 1e-4), 0.5) == pytest.approx(1e-2)
    assert decayed((1.0, 1e-4), 1.0) == pytest.approx(1e-4)
    assert decayed((1.0, 1e-4), 0.3, hold=0.4) == 1.0 and decayed((1.0, 1e-4), 0.7, hold=0.4) == pytest.approx(1e-2)
    assert decayed((1.0, 1e-4), 1.0, hold=0.4) == pytest.approx(1e-4)


def test_recipe_keeps_its_ratio_under_other_first_values():
    recipe = Config(dataset="digits", gamma=5.0, learning_rate=1e-3, steps=7).recipe
    assert recipe.gamma == (5.0, 0.5) and recipe.learning_rate == pytest.approx((1e-3, 1e-5)) and recipe.steps == 7


def test_the_same_seed_trains_the_same_generator():
    dataset = DATASETS["digits"]()
    first, again, other = (adversarial_training(Config(steps=20, seed=s), dataset)[0].head.weight for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_is_served_is_the_running_mean_of_the_generators_weights():
    """Half of what was, half of what is, in steps so few."""
    dataset, how = DATASETS["ring"](), {"dataset": "ring", "learning_rate": 0.1}

    def run(steps):
        states = []
        served, _ = adversarial_training(Config(steps=steps, **how), dataset, save=lambda state, *_: states.append(state))
        return served, states[-1].generator

    weights = build(Config(**how), dataset)[1], run(1)[1], *reversed(run(2))
    for at_first, after_one, after_two, served in zip(*(network.parameters() for network in weights), strict=True):
        torch.testing.assert_close(served, (at_first + after_one) / 4 + after_two / 2)
        assert (served - after_two).abs().max() > 0.01


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_network_may_have_statistics_of_batches_and_weights_that_do_not_learn(accumulate):
    states = []
    config = Config(dataset="ring", steps=60, width=16, accumulate=accumulate, network="tests.training.normed:FAMILY")
    served, _ = adversarial_training(config, DATASETS["ring"](), save=lambda state, *_: states.append(state))
    learned = states[-1].generator
    assert served.norm.num_batches_tracked == 60 * accumulate and (served.norm.running_mean - 3).abs().max() < 2
    assert all(torch.equal(kept, now) for kept, now in zip(served.buffers(), learned.buffers(), strict=True))
    assert torch.equal(served.frozen, torch.full((2,), 0.5)) and torch.equal(served.unused, torch.ones(2))


@pytest.mark.parametrize(("wish", "turns"), [({"objective": "wasserstein", "clip": 0.05, "penalty": "none"}, 5), ({"critic_steps": 3}, 3)])
def test_the_critic_may_move_several_times_for_each_step_of_the_generator(wish, turns):
    dataset = DATASETS["ring"]()
    first = build(Config(dataset="ring", **wish), dataset)[1].head.weight
    waits, moves = (adversarial_training(Config(dataset="ring", steps=n, **wish), dataset)[0].head.weight for n in (turns - 1, turns))
    assert torch.equal(waits, first) and not torch.equal(moves, first)


@pytest.mark.parametrize("objective", ["minimax", "f_kl", "f_reverse_kl", "f_pearson", "f_neyman"])
def test_noise_goes_while_the_critic_knows_nothing_and_stays_while_it_knows_all(objective):
    first = {}
    for learns, rate in ((False, 1e-12), (True, 1e-2)):
        sigma = []
        wish = {"objective": objective, "noise": 0.05, "noise_schedule": "controlled", "learning_rate": rate}
        adversarial_training(Config(dataset="ring", steps=50, **wish), DATASETS["ring"](), save=lambda state, *_, seen=sigma: seen.append(state.noise.sigma))
        first[learns] = sigma[0]
    assert first[False] < 0.05 and first[True] > first[False]


def test_numbers_that_blow_up_stop_the_training():
    with pytest.raises(TrainingStopped, match="no longer finite at step .*--learning-rate"):
        adversarial_training(Config(dataset="ring", steps=200, learning_rate=1e30), DATASETS["ring"]())


@pytest.mark.slow
def test_half_a_training_covers_every_mode(ring):
    figures = open_bundle(ring).card.certified
    assert figures["mixture_modes"] == 8 and figures["mode_coverage"] == 1.0
    assert figures["mixture_reverse_kl"] < 0.05 and figures["off_manifold"] < 0.5


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="mnist.npz is not there")
def test_the_recipe_of_stacked_mnist_learns_even_when_it_is_small(monkeypatch):
    """What a GPU is to run for hours, at a hundredth of its width and batch: the critic's edge must shrink, nothing may blow up."""
    monkeypatch.setitem(RECIPES, "stacked-mnist", replace(RECIPES["stacked-mnist"], batch=16, width=32))
    config, said = Config(dataset="stacked-mnist", data=str(MNIST), steps=100), []
    dataset = open_data(config, MNIST.parent)
    assert dataset.shape == (28, 28, 3) and len(dataset.classes) == 1000
    generator, _ = adversarial_training(config, dataset, say=lambda **figures: said.append(figures))
    x = generator(torch.from_numpy(build(config, dataset)[0].sample(seed=0, count=64)))
    assert x.shape == (64, 2352) and x.abs().max() <= 1 and x.std(dim=0).mean() > 0
    assert said[-1]["step"] == 100 and 0 < said[-1]["critic_loss"] < 0.7  # log 2 is chance: the critic has begun to tell them apart


@pytest.mark.slow
def test_two_workers_train_what_one_does_and_force_publishes_it(tmp_path):
    done = train(tmp_path / "home", "--dataset", "ring", "--registry", str(tmp_path / "registry"), "--model", "small", "--workers", "2",
                 "--steps", "5", "--certify-samples", "2000", "--no-reference-points", "--force")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = Registry(tmp_path / "registry").open("small", "v1")
    assert bundle.card.forced and bundle.card.training["config"]["workers"] == 2
    assert bundle.reference.held_out_points.shape == (0, 2)
    assert "published small v1 at" in done.stdout
    assert "\ndevice   cpu\n" in done.stdout or torch.cuda.device_count() >= 2

    (run,) = (tmp_path / "home" / "runs").iterdir()
    (checkpoint,) = run.glob("ray/step-*/state.pt")
    assert {p.name for p in checkpoint.parent.glob("random-*")} == {"random-cpu-0-of-2.pt", "random-cpu-1-of-2.pt"}
    weights = torch.load(checkpoint, weights_only=True)["average"]
    alone, _ = adversarial_training(Config(dataset="ring", steps=5), DATASETS["ring"]())
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)
    stages = [json.loads(line)["stage"] for line in (run / "status.jsonl").read_text().splitlines()]
    assert [s for s in ("ray", "train", "certify", "publish") if s not in stages] == []
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (run / "samples").iterdir()] == ["step-0000005.png"]  # while it trained: one for each tenth


THEIRS = """
from dataclasses import replace
from training.networks import FAMILIES, Generator

class Branches(Generator):
    def forward(self, z, y=None):
        x = super().forward(z, y)
        return x if x.mean() > 0 else -x

def of(kind):
    return replace(FAMILIES["perceptron"], generator=lambda latent, shape, **how: kind(latent, shape[0], **how))

PLAIN, BRANCHES = of(Generator), of(Branches)
"""


@pytest.mark.slow
def test_networks_that_only_pythonpath_names_reach_the_workers(tmp_path):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "their_nets.py").write_text(THEIRS)
    how = ("--dataset", "ring", "--steps", "5", "--certify-samples", "1000", "--no-reference-points", "--force")
    done = train(tmp_path, *how, "--network", "their_nets:PLAIN", PYTHONPATH=os.path.relpath(tmp_path / "nets", ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert Registry(tmp_path / "registry").open("ring", "v1").card.training["config"]["network"] == "their_nets:PLAIN"


@pytest.mark.slow
def test_networks_that_could_not_be_served_are_refused_before_the_first_step(tmp_path):
    (tmp_path / "their_nets.py").write_text(THEIRS)
    done = train(tmp_path / "home", "--dataset", "ring", "--network", "their_nets:BRANCHES", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("not published: --network their_nets:BRANCHES could not be served: model.onnx cannot be made: Could not guard on")
    assert f"(at {tmp_path / 'their_nets.py'}:8); forward must " in done.stderr and "torch.where in place of an `if`" in done.stderr
    (status,) = (tmp_path / "home").glob("runs/*/status.jsonl")
    assert [json.loads(line)["stage"] for line in status.read_text().splitlines()] == ["begin", "ray", "latent", "failed"]


class Pairs(nn.Linear):
    def forward(self, x, y=None):
        return super().forward(x)


def broken(latent, shape, **how):
    raise RuntimeError(f"no generator for {shape}")


PAIRS = replace(FAMILIES["perceptron"], critic=lambda shape, **how: Pairs(shape[0], 2))
BROKEN = replace(FAMILIES["perceptron"], generator=broken)


@pytest.mark.parametrize(
    ("network", "words"),
    [("PAIRS", r"samples of 2: ValueError: the critic makes \[2, 2\] of 2 rows; a logit for each is expected, \[2\]"), ("BROKEN", r"samples of 2: RuntimeError: no generator for \(2,\)")],
)
def test_networks_that_do_not_fit_the_data_are_refused_in_words(network, words):
    config, ring = Config(dataset="ring", network=f"tests.training.test_train:{network}"), DATASETS["ring"]()
    with pytest.raises(InputError, match=f"--network tests.training.test_train:{network} does not work for {words}"):
        check_networks(config, ring, latent_law(config.recipe, ring.clusters, ring.dim))


def test_the_device_is_chosen_by_what_ray_has_and_told_where_gpus_are_left():
    assert chosen_device(Config(), {"CPU": 2.0}) == ("cpu", "")
    assert chosen_device(Config(device="cpu"), {"CPU": 2.0, "GPU": 2.0}) == ("cpu", "")
    assert chosen_device(Config(workers=2), {"CPU": 2.0, "GPU": 2.0}) == ("cuda", "")
    assert chosen_device(Config(workers=2), {"CPU": 2.0, "GPU": 1.0}) == ("cpu", ", since --workers is 2 and Ray has 1 GPU")
    assert chosen_device(Config(workers=2, min_workers=1), {"CPU": 2.0, "GPU": 1.0}) == ("cuda", "")
    with pytest.raises(InputError, match="--device is cuda with --workers 2, but Ray has 1 GPUs; use --device cpu"):
        chosen_device(Config(workers=2, device="cuda"), {"CPU": 2.0, "GPU": 1.0})
    with pytest.raises(InputError, match="--min-workers is 3, but the Ray cluster has 2 CPUs; use fewer workers"):
        chosen_device(Config(workers=4, min_workers=3), {"CPU": 2.0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("wish", [{"dataset": "ring"}, {"dataset": "digits", "network": "dcgan"}, {"dataset": "digits", "network": "dcgan", "conditional": True}])
def test_a_gpu_learns_what_a_cpu_does(wish):
    dataset = DATASETS[wish["dataset"]]()
    for precision, near in (("float32", 0.01), ("auto", 0.1)):  # auto: bf16 for images, where the GPU has it
        config = Config(steps=5, precision=precision, **wish)
        generator, figures = adversarial_training(config, dataset, device="cuda")
        alone, expected = adversarial_training(config, dataset)
        assert {p.device.type for p in generator.parameters()} == {"cpu"}
        assert not torch.equal(generator.head.weight, build(config, dataset)[1].head.weight)
        for loss in ("critic_loss", "generator_loss"):
            assert figures[loss] == pytest.approx(expected[loss], abs=near)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("network", ["perceptron", "dcgan"])
def test_a_run_on_a_gpu_says_so_and_publishes(tmp_path, network):
    done = train(tmp_path, "--device", "cuda", "--network", network, "--steps", "5", "--certify-samples", "2000", "--no-reference-points", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\ndevice   cuda\n" in done.stdout
    assert Registry(tmp_path / "registry").open("digits", "v1").card.training["metrics"]["device"] == "cuda:0"


def test_ray_gives_the_workers_what_pythonpath_names_here(monkeypatch):
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert python_path() == {"PYTHONPATH": str(ROOT)}
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/theirs", "near"]))
    both = {"PYTHONPATH": os.pathsep.join([str(ROOT), "/theirs", os.path.abspath("near")])}
    assert python_path() == both
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}))
    assert python_path() == both
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": "/theirs"}}}))
    assert python_path() == {}  # Ray refuses a second value


@pytest.mark.slow
def test_smooth_vectors_get_last_steps_that_bring_them_nearer_and_are_told_about(tmp_path):
    done = train(tmp_path, "--dataset", "moons", "--steps", "300", "--certify-samples", "2000", "--no-reference-points", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "status.jsonl").read_text().splitlines()]
    *steps, ended = (line for line in lines if line["stage"] == "finish")
    assert all(0 < line["done"] <= line["most"] == 300 for line in steps)
    assert 0 < ended["after"] < ended["before"] and ended["seconds"] > 0
    assert f"{ended['after']:.4f} from held-out data by sliced Wasserstein distance, {ended['before']:.4f} before\n" in done.stdout
    figures = {name: ended[name] for name in ("before", "after", "kept")}
    assert Registry(tmp_path / "registry").open("moons", "v1").card.training["finish"] == figures and figures["kept"]


@pytest.mark.slow
def test_a_collapse_is_refused_with_the_command_that_would_publish_it(tmp_path):
    done = train(tmp_path, "--penalty", "none", "--learning-rate", "0.02", "--steps", "200", "--certify-samples", "2000")
    assert done.returncode == 1
    assert "not published" in done.stderr and "is dropped" in done.stderr and "Traceback" not in done.stderr
    bundle = open_bundle(re.search(r"ganwatch publish (\S+) --force", done.stderr)[1])
    assert bundle.card.model == "digits"
    assert Registry(tmp_path / "registry").models() == []


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"workers": 0}, "--workers is 0; it must be at least 1"),
        ({"workers": 3}, "--batch is 128, which --workers 3 do not divide; the nearest that will do: 126 and 129"),
        ({"workers": 4, "min_workers": 2}, "--batch is 128, which 2 to 4 workers do not divide; the nearest that will do: 120 and 132"),
        ({"workers": 2, "batch": 1}, "--batch is 1, which --workers 2 do not divide; the nearest that will do: 2$"),
        ({"workers": 2, "packing": 4, "batch": 20}, "--batch is 20, which --workers 2 and --packing 4 do not divide; .* 16 and 24"),
        ({"accumulate": 0}, "--accumulate is 0; it must be at least 1"),
        ({"min_workers": 2}, "--min-workers is 2; it must not exceed --workers, 1"),
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"gamma": -1.0}, "--gamma is -1.0; it must be positive"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan; it must be positive"),
        ({"registry": "/dev/null/registry"}, "--registry is /dev/null/registry, which cannot be written"),
        ({"dataset": "rong"}, "--dataset is rong, neither a path that exists nor built in; did you mean ring"),
        ({"dataset": str(Path(__file__).parent)}, "where no file ends in .npz, .npy"),
        ({"dataset": "mnist", "data": "/nowhere"}, "there is nothing at /nowhere"),
        ({"data": "/nowhere"}, "--data is for mnist, stacked-mnist, fashion-mnist"),
        ({"like": "rong"}, "--like is rong; recipes are those of ring, grid"),
        pytest.param({"device": "cuda"}, "--device is cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")),
    ],
)
def test_wishes_that_cannot_be_granted_are_explained(tmp_path, wish, words):
    with pytest.raises((InputError, DataError), match=words):
        check(Config(**{"registry": str(tmp_path)} | wish))
    assert list(tmp_path.iterdir()) == []


def test_a_history_that_publishing_could_not_read_is_told_before_training(tmp_path):
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "aliases.json").write_text("{")
    with pytest.raises(RegistryError, match=r"aliases\.json: unreadable"):
        check(Config(dataset="ring", registry=str(tmp_path)))


def test_labels_are_needed_for_a_conditional_generator(tmp_path):
    with pytest.raises(DataError, match="--conditional needs labelled data, and ring has no labels"):
        open_data(Config(dataset="ring", conditional=True), tmp_path)


def test_checking_leaves_no_trace_in_the_registry(tmp_path):
    check(Config(registry=str(tmp_path / "new")))
    assert Registry(tmp_path / "new").models() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [("--dataset rong", "did you mean ring"), ("--stepz 5", "--steps"), ("--steps 0", "error: --steps is 0"), ("--model ../x", "error: model name")],
)
def test_bad_flags_end_with_status_2_and_no_traceback(tmp_path, flags, words):
    done = train(tmp_path, *flags.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
