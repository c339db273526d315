"""`pip install .`: every module is in the wheel, and it works where the repository is not."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

USE = """
import sys

import torch

import generate
import models
import samplers
import train
from models.elit import LatentInterface

assert all(sys.argv[1] in module.__file__ for module in (models, generate, samplers, train)), models.__file__
interface = LatentInterface(dim=32, num_heads=2, grid_size=(4, 4), group_size=2)
x, c = torch.randn(3, 16, 32), torch.randn(3, 32)
tokens, kept, tail = interface.read(x, c, budget=0.5)
assert kept.shape == (3, 8, 32) and tail is None
assert torch.equal(interface.ungroup(interface.group(x)), x)
y = interface.write(tokens, kept, tail)
assert y.shape == x.shape and y.isfinite().all()
"""


def test_every_package_and_module_is_listed():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= {*SETTINGS["packages"], "tests", "benchmarks"}
    assert {path.stem for path in ROOT.glob("*.py")} <= set(SETTINGS["py-modules"])
    inner = [path for path in ROOT.glob("[!.]*/*/__init__.py") if path.parent.parent.name not in ("tests", "benchmarks")]
    assert not inner, "packages in packages are not listed"


@pytest.mark.slow
def test_wheel(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if not name.startswith(("tests/", "docs/", "experiments_updated/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-c", USE, str(site)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
