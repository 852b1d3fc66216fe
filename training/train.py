"""Trains a GAN with Ray Train, certifies what it learned and publishes it as the next version of a model.

    python training/train.py --dataset digits                                                   # starts Ray by itself
    ray job submit --working-dir . -- python training/train.py --dataset digits                 # on a running cluster
    python training/train.py --dataset digits --steps 1000 --penalty none --learning-rate 0.02  # a collapse, which is refused

Reads top to bottom: the loop of one worker, the run. What may be asked for is in config.py, what was found to work in
recipes.py; data, networks, objectives and penalties are registries in the files beside them. It knows nothing of serving or
monitoring: its product is a bundle (bundle.py).
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, sys.path[0] is training/
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line of a worker twice
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nothing here can be preempted, and it logs an error

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set where `ray job submit` runs the script
if __name__ == "__main__" and not {"RAY_ADDRESS", JOB} & set(os.environ):
    # A Ray of our own: it takes 127.0.0.1 only where it believes that no cluster is possible, and answers only who has the token.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import tyro
from jaxtyping import Float
from PIL import Image
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from training.arithmetic import Bf16, Unsupported, check_compiler, takes_bf16, wide_products
from training.bundle import Bundle, BundleError, SignGaussian
from training.checkpoints import CheckpointError, State, newest_readable, read_state, refuse_other
from training.clusters import Clusters
from training.config import MAY_CHANGE, Config, InputError, check, check_shape
from training.data import DATASETS, DataError, Dataset
from training.diagnostics import ALARMS, Diagnosis, Look
from training.export import ExportError, Served, export_generator, open_source, write_bundle
from training.features import fit_eye
from training.finish import finished, is_smooth
from training.gate import QualityRefused, publish
from training.journal import Journal
from training.networks import FAMILIES, family
from training.objectives import OBJECTIVES
from training.penalties import PENALTIES, clip_weights, gradients_for, normalise_spectrally, unrolled_pull
from training.recipes import frequency, latent_law, nearest_recipe
from training.registry import Registry, RegistryError, ganwatch_home
from training.sources import label, open_dataset
from training.views import InstanceNoise, augment, pack

# The loop of one worker -------------------------------------------------------------------------------------------------------


HALF_LIFE = 0.05  # of the served weights' running mean, as a share of the run so far
SAID = ("critic_loss", "generator_loss", "penalty", "divergence", "accuracy", "mode_coverage")  # on the terminal


STOPPED = "stopped"  # the file of a run in which a worker says why it ended early


class TrainingStopped(RuntimeError):
    """Training ended without a usable generator. The text says why."""


def open_data(config: Config, run: Path) -> Dataset:
    """The data to train on; the user's own are read into the run's directory once. Raises DataError."""
    dataset = open_dataset(config.dataset, data=config.data, cache=run / "data", skip_bad_files=config.skip_bad_files)
    if config.conditional and dataset.labels is None:
        raise DataError(f"--conditional needs labelled data, and {config.dataset} has no labels")
    return dataset


def decayed(ends: tuple[float, float], progress: float, hold: float = 0.0) -> float:
    """From the first to the second value, exponentially, as progress goes from `hold` to 1."""
    return ends[0] * (ends[1] / ends[0]) ** max(0.0, (progress - hold) / (1 - hold))


def mean_over_parts(networks: Sequence[nn.Module], losses: Float[Tensor, "k"], *, parts: int, world: int) -> Float[Tensor, "k"]:
    """Turn gradients and losses, which were summed over `parts` batches in each of `world` workers, into means, in all alike.

    Workers begin with the same weights and therefore keep the same weights. By hand, because the hooks of
    DistributedDataParallel see neither the penalty's second differentiation nor gradients that were written by formula.
    """
    if world == parts == 1:
        return losses
    weights = [p for network in networks for p in network.parameters() if p.requires_grad]
    for p in weights:
        if p.grad is None:  # it was not used
            p.grad = torch.zeros_like(p)
    sums = [p.grad for p in weights] + [losses]
    flat = torch.cat([s.flatten() for s in sums])
    if world > 1:
        torch.distributed.all_reduce(flat)
    for total, part in zip(sums, (flat / (world * parts)).split([s.numel() for s in sums]), strict=True):
        total.copy_(part.view_as(total))
    return losses


def build(config: Config, dataset: Dataset) -> tuple[SignGaussian, nn.Module, nn.Module]:
    """The latent law, the generator and the critic; the same weights for the same seed in every process."""
    recipe, classes = config.recipe, len(dataset.classes) if config.conditional else 0
    torch.manual_seed(config.seed)
    latent = latent_law(recipe, dataset.clusters, dataset.dim)
    how, nets = {"width": recipe.width, "classes": classes}, family(recipe.network)
    generator = nets.generator(latent.dim, dataset.shape, bounded=dataset.is_image, **how)
    sees = {"fourier": recipe.fourier, "frequency": frequency(recipe, dataset.clusters)}
    critic = nets.critic(dataset.shape, packing=config.packing, **sees, **how)
    if config.spectral_norm:
        normalise_spectrally(critic)
    return latent, generator, critic


def adversarial_training(
    config: Config,
    dataset: Dataset,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    say: Callable[..., None] = lambda **_: None,
    save: Callable[[State, int, dict[str, Any]], None] = lambda *_: None,
    resume: Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train worker `rank` of `world` to the end. Returns the averaged generator, and the last losses and figures of diagnostics
    with the reasons not to publish (`failing`); `say` hears of progress.

    `save` gets the state, the step and what would be returned a hundred times a run, for it to keep where that is due, in a
    directory from which `resume` goes on.
    Where world > 1 a process group must exist. Raises TrainingStopped, in every worker alike, where the numbers blow up,
    or with stop_on_alarm where an alarm says why this cannot end well.
    """
    recipe = config.recipe
    latent, generator, critic = build(config, dataset)
    generator, critic = generator.to(device), critic.to(device)
    average = copy.deepcopy(generator)
    labels = torch.from_numpy(dataset.labels).to(device) if config.conditional else None
    optimisers = [torch.optim.Adam([p for p in n.parameters() if p.requires_grad], fused=True) for n in (generator, critic)]
    objective, penalty = OBJECTIVES[config.objective], PENALTIES[config.penalty]
    generate, judge = generator, critic
    if takes_bf16(config.precision, torch.device(device), images=dataset.is_image):
        generate, judge = Bf16(generator), Bf16(critic)
    gradients_of = gradients_for(judge, compiled=config.compile)
    if config.compile:
        check_compiler()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in critic.modules()):
            raise Unsupported("--compile with a critic that keeps statistics of batches: they cannot be moved where it is differentiated; leave --compile out")
        generate = torch.compile(generate)
    noise = InstanceNoise(recipe.noise, config.noise_schedule)
    look = Look(dataset, latent, objective, conditional=config.conditional, packing=config.packing, seed=config.seed)
    diagnosis, every = Diagnosis(), max(50, recipe.steps // 100)
    turns = config.critic_steps or objective.critic_steps
    rng = torch.Generator(device).manual_seed(config.seed * world + rank)
    state = State(recipe, generator, critic, average, optimisers, noise, diagnosis, rng)
    done, last = state.load(resume, rank=rank, world=world) if resume else (0, {})

    def view(x: Tensor) -> Tensor:
        return pack(noise(augment(x, dataset.shape, rng) if config.augment else x, rng), config.packing)

    for step in range(done, recipe.steps):
        progress = step / recipe.steps
        batch = recipe.batch << int(progress * (recipe.doublings + 1))
        local, drawn = batch // world, step * config.accumulate * (recipe.batch << recipe.doublings)
        rows = np.random.default_rng((config.seed, step)).integers(dataset.trained, size=batch * config.accumulate)
        moved = (generator, critic) if (step + 1) % turns == 0 else (critic,)  # the generator comes last of its turns
        for network in moved:
            network.zero_grad(set_to_none=True)
        losses = torch.zeros(4, device=device)
        for part in range(config.accumulate):
            # Each worker takes its part of one global batch, so that without noise the number of workers changes only rounding.
            first = part * batch + rank * local
            pick = rows[first : first + local]
            z = torch.from_numpy(latent.sample(seed=config.seed, offset=drawn + first, count=local)).to(device)
            real, y = torch.from_numpy(dataset.normalised(pick)).to(device), None if labels is None else labels[pick]
            with torch.set_grad_enabled(generator in moved):
                real, shown = view(real), view(generate(z, y))
            between = penalty.points_between(real, shown.detach(), rng)
            before = [p.grad for p in critic.parameters()]
            seen = gradients_of(judge, objective, penalty, real, shown.detach(), between, y, decayed(recipe.gamma, progress))
            for p, summed in zip(critic.parameters(), before, strict=True):
                if summed is not None:
                    p.grad += summed
            if generator in moved:
                pull = seen.by_fake
                if config.unroll:
                    pull = unrolled_pull(critic, objective, real, shown, y, steps=config.unroll)
                shown.backward(pull)
            losses += torch.stack([seen.critic_loss, seen.generator_loss, seen.penalty, seen.doubt])
        losses = mean_over_parts(moved, losses, parts=config.accumulate, world=world)
        for optimiser in optimisers[-len(moved) :]:
            group = optimiser.param_groups[0]
            group["lr"] = decayed(recipe.learning_rate, progress, recipe.hold)
            group["betas"] = (0.0, 0.9 + 0.09 * min(1.0, progress / 0.2))
            optimiser.step()
        if config.clip:
            clip_weights(critic, config.clip)
        if config.noise_schedule != "constant":
            noise.update(progress, objective.share(float(losses[0]), float(losses[3])))

        due = (step + 1) % every == 0 or step + 1 == recipe.steps
        if due and world > 1:  # statistics are of each worker's part of the batches, and all shall see and keep the same
            for buffer in (*generator.buffers(), *critic.buffers()):
                if buffer.numel():
                    torch.distributed.broadcast(buffer, 0)

        # The served weights are a running mean whose half-life is a share of the run so far (Karras et al. 2024); buffers are the last.
        keep = 0.5 ** (1 / max(1.0, HALF_LIFE * step))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), generator.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
            for last_one, now in zip(average.buffers(), generator.buffers(), strict=True):
                last_one.copy_(now)

        if due:
            # Gradients are averaged, so a number that is not finite reaches every worker in the same step.
            if not all(bool(p.isfinite().all()) for n in (generator, critic) for p in n.parameters()):
                rate = f"lower --learning-rate (now {recipe.learning_rate[0]:g})"
                raise TrainingStopped(f"the weights are no longer finite at step {step + 1} of {recipe.steps}; {rate}")
            said = dict(zip(("critic_loss", "generator_loss", "penalty"), losses[:3].tolist(), strict=True))
            figures = look(generator, critic)  # the same in every worker
            diagnosis.update(figures, progress=progress)
            fatal = [name for name in diagnosis.words if ALARMS[name].fatal]
            say(step=step + 1, steps=recipe.steps, alarms=dict(diagnosis.words), failing=fatal, **said, **figures)
            if config.stop_on_alarm and diagnosis.failing:
                raise TrainingStopped(f"stopped at step {step + 1} of {recipe.steps}: {'; '.join(diagnosis.failing)}")
            last = {name: value if math.isfinite(value) else None for name, value in (said | figures).items()}
            last["failing"] = diagnosis.failing
            save(state, step + 1, last)
    return average.cpu(), last


@contextmanager
def one_group(run: Path, device: torch.device) -> Iterator[None]:
    """The workers as one process group of torch, gloo or NCCL.

    They meet in a file of the run directory, which workers on several machines share, too: torch's usual meeting place is a
    server on every interface of the machine that answers anybody.
    """
    context = ray.train.get_context()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (world := context.get_world_size()) == 1:
        yield
        return
    meeting = run / f"meeting-{broadcast_from_rank_zero(uuid.uuid4().hex)}"
    if ray.util.get_node_ip_address().startswith("127."):
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=meeting.as_uri(), rank=context.get_world_rank(), world_size=world)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def train_worker(job: dict[str, Any]) -> None:
    """What Ray Train runs in every worker. Rank 0 reports the generator; all report the reason where there is none."""
    context = ray.train.get_context()
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    torch.set_num_threads(1)
    config, journal = Config(**job["config"]), Journal(Path(job["run"]))
    world = context.get_world_size()
    logging.getLogger().setLevel(logging.WARNING)  # Ray announces each report under the name of a file, not of ray.train
    begin = said = kept = time.monotonic()
    first, drawn = 0, 0  # step at which progress was first heard of, and tenths of the run that have a picture
    up: dict[str, str] = {}

    def say(step: int, steps: int, alarms: dict[str, str], failing: list[str], **figures: float) -> None:
        nonlocal begin, first, said, up
        now = time.monotonic()
        if not first:
            begin, first = now, step
        if rank == 0 and (now - said > 2.0 or step == steps or alarms.keys() != up.keys()):
            said, left = now, (now - begin) / (step - first) * (steps - step) if step > first else None
            finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            with suppress(OSError):  # a full disk is the checkpoint's to report
                journal.write("train", step=step, steps=steps, seconds_left=left, alarms=alarms, failing=failing, **finite)
            words = "  ".join(f"{name} {figures[name]:.4f}" for name in SAID)
            print(f"step {step:>6}/{steps}  {words}" + (f"  {left:4.0f} s left" if left is not None else ""), flush=True)
            for name in alarms.keys() - up.keys():
                print(f"alarm {name}: {alarms[name]}", flush=True)
            for name in up.keys() - alarms.keys():
                print(f"over  {name}", flush=True)
            up = alarms

    def save(state: State, step: int, metrics: dict[str, Any]) -> None:
        nonlocal kept, drawn
        if rank == 0 and (tenth := 10 * step // config.recipe.steps) > drawn:
            drawn = tenth
            with suppress(OSError):  # as above
                pictures.mkdir(exist_ok=True)
                shown(state.average, config, dataset).save(pictures / f"step-{step:07}.png")
        due = torch.tensor(step == config.recipe.steps or time.monotonic() - kept > config.checkpoint_seconds, device=device)
        if world > 1:
            torch.distributed.broadcast(due, 0)  # reporting is a barrier: all do it, or none
        if due:
            with tempfile.TemporaryDirectory() as directory:
                state.save(Path(directory), step, metrics, rank=rank, world=world)
                room = shutil.disk_usage(job["run"]).free - sum(file.stat().st_size for file in Path(directory).iterdir())
                crowded = torch.tensor(float(room < 0), device=device)
                if world > 1:
                    torch.distributed.all_reduce(crowded)  # one worker that stops alone would leave the others waiting
                if crowded:
                    raise TrainingStopped(f"there is no room in {job['run']} for the checkpoint of step {step}; free some, then --resume it")
                saved, clock = Checkpoint.from_directory(directory), {"loop_seconds": time.monotonic() - begin, "device": str(device)}
                ray.train.report(metrics | clock, checkpoint=saved, checkpoint_dir_name=f"step-{step:07}")
            kept = time.monotonic()

    found, pictures = ray.train.get_checkpoint(), Path(job["run"]) / "samples"
    try:
        dataset = replace(open_data(config, Path(job["run"])), counted=job["clusters"])
        with one_group(Path(job["run"]), device), found.as_directory() if found else nullcontext() as directory:
            resume, damaged = newest_readable(Path(directory)) if directory else (None, [])
            if resume and rank == 0:
                for words in damaged:
                    print(words, flush=True)
                print(f"goes on from {resume.name} with {world} worker{'s' * (world > 1)}", flush=True)
            with wide_products(config.recipe.width):
                adversarial_training(config, dataset, rank=rank, world=world, device=device, say=say, save=save, resume=resume)
    except (TrainingStopped, Unsupported, CheckpointError, DataError) as stopped:  # to try again would end alike
        if world > 1 and isinstance(stopped, CheckpointError | DataError):
            raise  # perhaps of this worker's disk alone, and the others would wait for it
        with suppress(OSError):  # a report would not do: Ray keeps the metrics of the last one that came with a checkpoint
            (Path(job["run"]) / STOPPED).write_text(str(stopped))


# The run ----------------------------------------------------------------------------------------------------------------------


def python_path() -> dict[str, str]:
    """Where the workers find these sources and the user's own: Ray replaces the variable, so what it holds here is kept.

    Nothing where a Ray job names it in its runtime environment: Ray gives that to the workers, and refuses a second one.
    """
    if "PYTHONPATH" in json.loads(os.environ.get(JOB, "{}")).get("runtime_env", {}).get("env_vars", {}):
        return {}
    own = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *(map(os.path.abspath, own.split(os.pathsep)) if own else ())])}


def start_ray(config: Config) -> None:
    """Join the cluster of a Ray job or of RAY_ADDRESS, else start one on this machine.

    Raises ConnectionError where there is no Ray then.
    """
    # Ray Train's helper actors look for a Ray of this machine, and give up where there are several, unless told which.
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        where = f"the Ray cluster at RAY_ADDRESS, {address}, cannot be joined"
        how: dict[str, Any] = {"runtime_env": {"env_vars": {"RAY_ADDRESS": address} | python_path()}}
    else:
        where = "Ray cannot be started on this machine"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ["RAY_GCS_SERVER_PORT"] = port
        how = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, config.workers),
            "include_dashboard": False,
            "runtime_env": {"env_vars": {"RAY_ADDRESS": f"127.0.0.1:{port}"} | python_path()},
            "logging_config": ray.LoggingConfig(log_level="ERROR"),  # Ray Train would miss the dashboard twice a second
            "_node_ip_address": "127.0.0.1",
        }
    try:
        if address and (gcs := re.fullmatch(r"([^/]+):(\d+)", address)):  # Ray itself tries for a quarter of an hour
            socket.create_connection((gcs[1], int(gcs[2])), timeout=10).close()
        ray.init(logging_level="error", **how)
    except Exception as error:  # Ray raises bare Exceptions where a process of its own does not come up in time
        raise ConnectionError(f"{where} ({(str(error).strip() or repr(error)).splitlines()[0]})") from error


def chosen_device(config: Config, have: dict[str, float]) -> tuple[str, str]:
    """Where to train with what Ray has of "CPU" and "GPU": cuda or cpu, and why the latter where there are GPUs.

    Raises InputError where there are fewer processors than are asked for.
    """
    fewest, asked = config.min_workers or config.workers, "--min-workers" if config.min_workers else "--workers"
    gpus, cpus = have.get("GPU", 0), have.get("CPU", 0)
    if config.device == "cuda" and gpus < fewest:
        raise InputError(f"--device is cuda with {asked} {fewest}, but Ray has {gpus:.0f} GPUs; use --device cpu")
    if cpus < fewest:
        raise InputError(f"{asked} is {fewest}, but the Ray cluster has {cpus:.0f} CPUs; use fewer workers")
    if config.device != "cpu" and gpus >= fewest:
        return "cuda", ""
    left = config.device == "auto" and gpus > 0
    return "cpu", f", since {asked} is {fewest} and Ray has {gpus:.0f} GPU{'s' * (gpus != 1)}" if left else ""


@contextmanager
def interrupts_heard() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed within. Ray Train handles it by itself, and ends as it does where its controller died."""
    heard, told = socket.socketpair()
    heard.setblocking(False)
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)

    def pressed() -> bool:
        with suppress(BlockingIOError):
            return signal.SIGINT in heard.recv(4096)
        return False

    try:
        yield pressed
    finally:
        signal.set_wakeup_fd(before)
        heard.close()
        told.close()


def train(config: Config, run: Path, use_gpu: bool, *, clusters: Clusters) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged generator's weights and the last metrics, from the last checkpoint of this run on where there is one.

    Raises TrainingStopped where the loop did or the workers died too often, KeyboardInterrupt on Ctrl-C.
    """
    (run / STOPPED).unlink(missing_ok=True)  # of the part before, where this one resumes it
    workers = config.workers if config.min_workers is None else (config.min_workers, config.workers)
    trainer = DataParallelTrainer(
        train_worker,
        train_loop_config={"config": asdict(config), "run": str(run), "clusters": clusters},
        # A worker a GPU, of which it leaves a tenth to the replicas that serve beside it.
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, "GPU": 0.9} if use_gpu else None),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with interrupts_heard() as pressed:
            try:
                result = trainer.fit()
            except (SystemExit, RayActorError) as error:
                if pressed():
                    raise KeyboardInterrupt from None
                words = (str(error).strip() or repr(error)).splitlines()
                raise TrainingStopped(f"Ray Train's controller died: {words[0]} .. {words[-1]}") from None
    except TrainingFailedError as error:
        died = getattr(error, "worker_failures", {}) or {0: error}
        words = "; ".join(f"worker {rank}: {(str(why).strip() or repr(why)).splitlines()[-1]}" for rank, why in died.items())
        raise TrainingStopped(f"workers died more than {config.max_failures} times, the last time {words}") from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if (run / STOPPED).exists():
        raise TrainingStopped((run / STOPPED).read_text() or f"there is no room in {run}, not even to say why; free some, then --resume it")
    if result.checkpoint is None:
        raise TrainingStopped("it ended before its first checkpoint")
    with result.checkpoint.as_directory() as directory:
        state = read_state(Path(directory))
    if state["step"] < config.recipe.steps:
        raise TrainingStopped(f"it ended after step {state['step']} of {config.recipe.steps}")
    return state["average"], result.metrics


def picture(samples: np.ndarray) -> Image.Image:
    """128 images in a grid, or the density of points in the plane."""
    if samples.shape[1:] == (1,):  # a density in one dimension: spread at random over another
        far = np.abs(samples).max()
        samples = np.concatenate([samples, np.random.default_rng(0).uniform(-far, far, samples.shape)], axis=1)
    if samples.dtype == np.uint8:
        samples = np.pad(samples, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=96)
        h, w, c = samples.shape[1:]
        tiles = samples.reshape(8, 16, h, w, c).transpose(0, 2, 1, 3, 4).reshape(8 * h, 16 * w, c)
        image = Image.fromarray(tiles[..., 0] if c == 1 else tiles)
        larger = 4 if max(h, w) <= 32 else 1
        return image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)
    reach = 1.1 * float(np.abs(samples).max())
    density, _, _ = np.histogram2d(-samples[:, 1], samples[:, 0], bins=256, range=[[-reach, reach]] * 2)
    return Image.fromarray((255 * np.sqrt(density / density.max())).astype(np.uint8)).resize((512, 512), Image.Resampling.NEAREST)


def pictured(dataset: Dataset) -> int:
    """How many samples a picture of such data is of."""
    return 128 if dataset.is_image else 20_000


def shown(generator: nn.Module, config: Config, dataset: Dataset) -> Image.Image:
    """The picture of a generator in training, always of the same latents, and of all classes in turn.

    It is drawn by a copy, in batches no larger than those of training; what is not finite is drawn as nothing.
    """
    count, device = pictured(dataset), next(generator.parameters()).device
    latent, served = latent_law(config.recipe, dataset.clusters, dataset.dim), Served(copy.deepcopy(generator), dataset).eval().to(device)
    z = torch.from_numpy(latent.sample(seed=0, count=count)).to(device)
    y = torch.arange(count, device=device) % len(dataset.classes) if config.conditional else None
    size, drawn = config.recipe.batch, []
    with torch.no_grad():
        for i in range(0, count, size):
            drawn.append(served(z[i : i + size], None if y is None else y[i : i + size]).nan_to_num(0, 0, 0).cpu().numpy())
    return picture(np.concatenate(drawn))


def telling(journal: Journal, stage: str, words: str) -> Callable[[int, int], None]:
    """The progress of a stage, for the journal and in `words` for the terminal: every two seconds, and its end."""
    said = 0.0

    def progress(done: int, most: int) -> None:
        nonlocal said
        if time.monotonic() - said > 2.0 or done == most:
            said = time.monotonic()
            journal.write(stage, done=done, most=most)
            print(f"{stage:<8} {words.format(done=done, most=most)}", flush=True)

    return progress


def check_networks(config: Config, dataset: Dataset, latent: SignGaussian) -> None:
    """Raise InputError where networks of the user's own cannot be built, judge no samples or could not be served: seconds now, in
    place of hours until they are trained, or of workers that die by them again and again."""
    shape, n = "x".join(map(str, dataset.shape)), 2 * config.packing
    try:
        _, generator, critic = build(config, dataset)
        y = torch.from_numpy(dataset.labels[:n]) if config.conditional else None
        logits = critic(pack(torch.from_numpy(dataset.normalised(slice(n))), config.packing), y)
        if logits.shape != (2,):
            raise ValueError(f"the critic makes {list(logits.shape)} of 2 rows; a logit for each is expected, [2]")
    except Exception as error:  # whatever their own code raises
        raise InputError(f"--network {config.recipe.network} does not work for samples of {shape}: {type(error).__name__}: {error}") from None
    with tempfile.TemporaryDirectory() as directory:
        try:
            export_generator(Path(directory) / "model.onnx", generator, dataset, latent)
        except ExportError as error:
            words = (
                "forward must take any number of rows, treat each by itself and all alike, draw nothing and use what ONNX has: "
                "torch.where in place of an `if` on values, x.flatten(1) in place of a fixed x.view(64, -1)"
            )
            raise InputError(f"--network {config.recipe.network} could not be served: {error}; {words}") from None


def execute(config: Config, run: Path, journal: Journal) -> Bundle:
    """Train, certify, publish. Raises TrainingStopped, ExportError, QualityRefused; the last leaves `<run>/bundle` complete."""
    built_in = open_data(config, run) if config.dataset in DATASETS else None  # at once; the user's own are read through Ray
    if built_in is not None:
        check_shape(config, built_in)
    start_ray(config)
    journal.done("ray")
    device, why = chosen_device(config, ray.cluster_resources())
    print(f"device   {device}{why}", flush=True)

    torch.set_num_threads(1)
    dataset = open_data(config, run) if built_in is None else built_in
    if built_in is None:
        config = replace(config, like=config.like or nearest_recipe(dataset.shape))
        check_shape(config, dataset)
    if device == "cpu":
        takes_bf16(config.precision, torch.device("cpu"), images=dataset.is_image)
    latent = latent_law(config.recipe, dataset.clusters, dataset.dim)
    count, hollow, _ = dataset.clusters
    found = "one cluster" if count == 1 else f"{count} separate {'curves or sheets' if hollow else 'clusters'}"
    why = f"as --latent says; the data are {found}" if config.latent else f"for the data are {found}"
    chosen = f"{latent.signs} signs and {latent.normals} normals as latents, {why}"
    print(f"latent   {chosen}", flush=True)
    print(f"pictures {run / 'samples'}, one for each tenth of the run", flush=True)
    journal.write("latent", signs=latent.signs, normals=latent.normals, clusters=count)
    if config.recipe.network not in FAMILIES:
        check_networks(config, dataset, latent)
    with ThreadPoolExecutor(1) as beside:  # this process only waits while the workers train
        eye = beside.submit(fit_eye, dataset, seed=config.seed, remember=config.reference_points)
        weights, metrics = train(config, run, device == "cuda", clusters=dataset.clusters)
        sight = eye.result()
    journal.done("train", **metrics)

    generator = build(config, dataset)[1]
    generator.load_state_dict(weights)
    ending = None
    if is_smooth(dataset):
        progress = telling(journal, "finish", "step {done} of {most} of the last ones, without a critic")
        with wide_products(config.recipe.width):
            generator, ending = finished(generator, dataset, latent, seed=config.seed, steps=config.recipe.steps, progress=progress)
        words = "{after:.4f} from held-out data by sliced Wasserstein distance, {before:.4f} before".format(**ending)
        print(f"finish   {words}{'' if ending['kept'] else ': left as it was before'}", flush=True)
        journal.done("finish", **ending)
    card = write_bundle(
        run / "bundle",
        model=config.model or label(config.dataset),
        dataset=dataset,
        generator=generator,
        latent=latent,
        sight=sight,
        training={
            "config": asdict(config),
            "recipe": asdict(config.recipe),
            "latent": chosen,
            "finish": ending,
            "metrics": metrics,
            "failing": metrics["failing"],
        },
        certify_samples=config.certify_samples,
        certify_seconds=config.certify_seconds,
        keep_points=config.reference_points,
        progress=telling(journal, "certify", "{done:>9,} of at most {most:,} samples drawn, a fifth of them to set thresholds"),
    )
    samples = open_source(run / "bundle", card).samples(seed=0, count=pictured(dataset))
    picture(samples).save(run / "samples.png")
    journal.done("certify")
    table = Table("figure", "value", title=f"{card.model}, on {card.certified['samples']:,} certified samples")
    for name, value in card.certified.items():
        if isinstance(value, float | int):
            table.add_row(name, f"{value:.4g}")
    table.add_section()
    for name, value in metrics.items():
        if isinstance(value, float | int):
            table.add_row(f"at the last step: {name}", f"{value:.4g}")
    for reason in metrics["failing"]:
        table.add_row("alarm", reason)
    Console().print(table)

    bundle = publish(run / "bundle", Registry(config.registry), force=config.force)
    journal.done("publish", version=bundle.card.version, forced=bundle.card.forced)
    return bundle


def begin_run(config: Config) -> tuple[Config, Path]:
    """The directory of a new run, or of the one to resume, in whose settings the flags of the command line are read again.

    Raises what `check` does, and CheckpointError where flags contradict the run.
    """
    if config.resume is None:
        check(config)
        model = config.model or label(config.dataset)
        run = ganwatch_home() / "runs" / f"{time.strftime('%Y%m%dT%H%M%S')}-{model}-{uuid.uuid4().hex[:6]}"
        try:
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps(asdict(config)))
        except OSError as error:
            shutil.rmtree(run, ignore_errors=True)
            raise InputError(f"{run} cannot be written ({error.strerror}); name a directory that can be in GANWATCH_HOME") from None
        return config, run
    run = Path(config.resume).resolve()
    try:
        saved = Config(**json.loads((run / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"--resume is {config.resume}, which holds no run ({error}); runs are in {ganwatch_home() / 'runs'}") from None
    config = tyro.cli(Config, description=__doc__, default=saved)
    refuse_other(asdict(saved), asdict(config), free=MAY_CHANGE)
    check(config)
    return config, run


def taken(run: Path) -> TextIO:
    """The run's lock, held until this process ends. Raises CheckpointError where another one trains it, InputError where it cannot be written."""
    try:
        lock = open(run / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"--resume is {run}, which another process is training now; wait for it, or stop it first") from None
    except OSError as error:
        raise InputError(f"{run} cannot be written ({error.strerror})") from None
    return lock


def main() -> None:
    config, begin = tyro.cli(Config, description=__doc__), time.monotonic()
    try:
        config, run = begin_run(config)
        _lock = taken(run)
    except (InputError, DataError, RegistryError, CheckpointError) as error:
        _end(f"error: {error}", status=2)
    root, model = Registry(config.registry).root, config.model or label(config.dataset)
    print(f"run      {run}", flush=True)
    if JOB in os.environ and not Path(config.registry or os.environ.get("GANWATCH_HOME", "")).is_absolute():
        instead = "name one that stays with --registry /its/path, or in GANWATCH_HOME"
        print(f"note: a Ray job runs in a copy of its working directory, so this relative registry is {root.resolve()}; {instead}")

    journal, again = Journal(run), f"go on with: python training/train.py --resume {run}"

    def end(words: str, *, status: int, stage: str = "failed", **values: str) -> NoReturn:
        with suppress(OSError):  # the disk may be what failed
            journal.write(stage, **values)
        _end(words, status=status)

    try:
        journal.write("begin", model=model, dataset=config.dataset, steps=config.recipe.steps)
        shutil.rmtree(run / "bundle", ignore_errors=True)
        (run / "bundle").mkdir()
        bundle = execute(config, run, journal)
    except (InputError, DataError, Unsupported) as failure:
        end(f"not published: {failure}", status=2, reason=str(failure))
    except QualityRefused as failure:
        words = f"not published, the quality gate objects:\n{failure}\nto publish it all the same: {failure.remedy}"
        end(words, status=1, reason=str(failure))
    except (TrainingStopped, RegistryError, BundleError) as failure:
        end(f"not published: {failure}", status=1, reason=str(failure))
    except (OSError, CheckpointError) as error:  # of the last checkpoint, before which there is another
        end(f"not published: {error}; {again}", status=1, reason=str(error))
    except KeyboardInterrupt:
        end(f"interrupted; {again}", status=130, stage="interrupted")
    except Exception as error:  # nobody foresaw it: told as it is, and the page does not wait for more
        with suppress(OSError):
            journal.write("failed", reason=f"{type(error).__name__}: {error}")
        raise
    print(f"published {model} {bundle.card.version} at {bundle.path.resolve()} after {time.monotonic() - begin:.0f} s")


def _end(words: str, *, status: int) -> NoReturn:
    print(words, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    # By its full name, so that Ray's workers import the loop in place of unpickling the globals of a script.
    from training.train import main

    main()
