"""torchvision can be imported here, by our programs and by those of others; a broken environment is repaired once."""

import os
import subprocess
import sys

import pytest
from numerics import ROOT

from common import torchvision_shim

FAKE = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets

@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold):
    return dets
"""


def run(code, *folders):
    """A new interpreter without site-packages' .pth files, but those of `folders`."""
    setup = "import site, sys; [site.addsitedir(f) for f in sys.argv[1:]];"
    return subprocess.run(
        [sys.executable, "-c", setup + code, *map(str, folders)], capture_output=True, text=True, env=dict(os.environ)
    )


@pytest.fixture
def broken(tmp_path):
    """A folder whose torchvision describes operators that are not there, as PyPI's does beside a CPU-only PyTorch."""
    package = tmp_path / "packages" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    metadata = tmp_path / "packages" / "torchvision-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n")
    return tmp_path / "packages"


FIRST = "import sys; sys.path.insert(0, {!r}); sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'Finder'];"


def test_our_import_works_where_the_plain_one_fails(broken):
    first = FIRST.format(str(broken))
    failed = run(first + "import torchvision")
    assert failed.returncode and "operator torchvision::nms does not exist" in failed.stderr
    ours = run(
        first + f"sys.path.append({str(ROOT)!r}); from common import torchvision_shim as shim; shim.import_torchvision()"
    )
    assert ours.returncode == 0, ours.stderr


def test_a_repaired_environment_needs_no_help(broken, tmp_path):
    first = FIRST.format(str(broken))
    site = tmp_path / "site"
    site.mkdir()
    ours = f"sys.path.append({str(ROOT)!r}); from common import torchvision_shim as shim; from pathlib import Path;"
    repaired = run(first + ours + f"print(shim.repair(Path({str(site)!r})))")
    assert repaired.stdout.strip() == "True", repaired.stderr
    plain = run(f"sys.path.insert(0, {str(broken)!r}); import torch; torch.version.cuda = None; import torchvision", site)
    assert plain.returncode == 0, plain.stderr


def test_an_environment_that_works_is_left_alone(tmp_path):
    torchvision_shim.import_torchvision()
    assert torchvision_shim.repair(tmp_path) is False and not list(tmp_path.iterdir())
