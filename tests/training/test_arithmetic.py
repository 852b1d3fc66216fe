import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.arithmetic import WIDE, Bf16, Unsupported, check_compiler, has_bf16, takes_bf16, wide_products
from training.config import Config
from training.data import DATASETS
from training.networks import FAMILIES
from training.objectives import OBJECTIVES
from training.penalties import PENALTIES, autograd
from training.train import adversarial_training

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not has_bf16(CPU), reason="this CPU has no bf16")


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return FAMILIES["dcgan"].critic((8, 8, 1), width=16, classes=0, packing=1, fourier=0, frequency=(6.0,))


def test_the_cpu_has_bf16_where_the_kernel_says_so():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert has_bf16(CPU) == bool(flags & {"avx512_bf16", "amx_bf16"})


def test_auto_keeps_float32_on_a_cpu():
    assert not takes_bf16("auto", CPU, images=True) and not takes_bf16("float32", CPU, images=True)


def test_what_is_not_there_is_refused():
    if has_bf16(CPU):
        assert takes_bf16("bf16", CPU, images=False)
        return
    with pytest.raises(Unsupported, match="--precision is bf16, which takes a CPU with AVX512-BF16 or AMX, and this cpu is none; use --precision float32"):
        takes_bf16("bf16", CPU, images=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_auto_takes_bf16_for_images_on_a_gpu():
    cuda = torch.device("cuda")
    assert takes_bf16("auto", cuda, images=True) == has_bf16(cuda) and not takes_bf16("auto", cuda, images=False)


def test_penalties_and_losses_stay_float32(critic):
    real, fake = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(1))
    exact, half = (autograd(c, OBJECTIVES["relativistic"], PENALTIES["r1r2"], real, fake, real[:0], None, 1.0) for c in (critic, Bf16(critic)))
    # bf16 has three digits, and now and then it puts an activation on the other side of a kink
    for name, bound in {"critic_loss": 0.02, "generator_loss": 0.02, "penalty": 0.02, "by_fake": 0.15}.items():
        found, expected = getattr(half, name), getattr(exact, name)
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        assert float((found - expected).norm() / expected.norm()) < bound, name
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in critic.parameters())


@needs_bf16
@pytest.mark.parametrize("network", ["perceptron", "dcgan", "resnet"])
def test_a_step_in_bf16_is_nearly_the_step_in_float32(network):
    runs = [adversarial_training(Config(steps=1, width=16, network=network, precision=p), DATASETS["digits"]()) for p in ("float32", "bf16")]
    (_, exact), (generator, half) = runs
    assert all(p.dtype == torch.float32 for p in generator.parameters())
    assert half["critic_loss"] != exact["critic_loss"] and half["critic_loss"] == pytest.approx(exact["critic_loss"], rel=0.05)


@pytest.mark.parametrize("shape", [(256, 784, 512), (128, 512, 512), (7, 65, 300)])
def test_wide_products_are_float32_and_end_with_their_block(shape):
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    outside = a @ b
    with pytest.raises(KeyError), wide_products(WIDE):
        assert float((a @ b - a.double() @ b.double()).norm() / outside.norm()) < 1e-6
        raise KeyError
    assert torch.equal(a @ b, outside)


def test_compilation_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unsupported, match="--compile takes a C\\+\\+ compiler, and there is no no-such-compiler"):
        check_compiler()
    with pytest.raises(Unsupported):
        adversarial_training(Config(steps=1, compile=True), DATASETS["digits"]())


LEARN = """
import sys, torch
from training.config import Config
from training.data import DATASETS
from training.train import adversarial_training

torch.set_num_threads(1)
found = []
for compiled in (False, True):
    def save(state, step, metrics):
        # Adam, without momentum, remembers the last gradient
        found.append(torch.cat([o.state[p]["exp_avg"].flatten() for o in state.optimisers for p in o.param_groups[0]["params"]]))

    config = Config(steps=1, width=16, network="dcgan", noise=0.0, compile=compiled, precision=sys.argv[1])
    adversarial_training(config, DATASETS["digits"](), save=save)
print(float((found[0] - found[1]).norm() / found[0].norm()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=needs_bf16)])
def test_compiled_networks_have_the_same_gradients(precision):
    # In a process of its own: here every function is wrapped in checks of its types, which torch does not compile.
    done = subprocess.run([sys.executable, "-c", LEARN, precision], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < (1e-5 if precision == "float32" else 0.05)
