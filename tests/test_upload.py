"""What `ray job submit --working-dir .` sends along: the sources, never what was installed or trained here."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 5 * 2**20  # bytes; Ray itself refuses 500 MiB


def checkout(directory: Path) -> Path:
    """A copy of what git tracks or would track, used as one is: installed, trained, tested."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, directory / name)
    for name in (
        ".git/objects/pack/pack-1.pack",
        ".venv/lib/python3.11/site-packages/torch/lib/libtorch_cpu.so",
        ".ganwatch/runs/20261125T000000-digits-0a1b2c/ray/step-0000100/state.pt",
        ".ganwatch/registry/digits/v1/model.onnx",
        "training/__pycache__/train.cpython-311.pyc",
        "samples.npz",
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(os.urandom(LIMIT))  # which no zip makes smaller
    return directory


@pytest.mark.parametrize("by_git_too", [True, False])
def test_a_used_checkout_is_a_small_upload(tmp_path, by_git_too):
    package = tmp_path / "package.zip"
    create_package(str(checkout(tmp_path / "checkout")), package, include_gitignore=by_git_too)
    assert package.stat().st_size < LIMIT
    sent = set(zipfile.ZipFile(package).namelist())
    assert {"training/train.py", "training/recipes.py", "pyproject.toml"} <= sent
    assert not [name for name in sent if name.startswith((".venv/", ".ganwatch/", ".git/", "tests/")) or "__pycache__" in name]
