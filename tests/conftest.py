"""Fixtures that several test files share."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_runs import random_vit
from numerics import GOLDEN
from runs import reset_accelerate, tiny_vae

from common.logging import log
from models import costs

torch.set_num_threads(1)  # for models this small, more threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests, and the processes that they start, have a cache folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_log():
    """No test writes into the log file of a run of another."""
    yield
    log.handlers.clear()


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory):
    """golden_checkpoint(tag) → path of the published checkpoint that belongs to golden.npz, made once."""
    folder = tmp_path_factory.mktemp("golden")

    def make(tag: str) -> Path:
        path = folder / f"{tag}.pt"
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["weights.py", tag, str(path)])
                runpy.run_path(str(GOLDEN / "weights.py"), run_name="__main__")
        return path

    return make


@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the published models, and their options by tag."""
    with np.load(GOLDEN / "golden.npz") as arrays:
        found = {k: torch.from_numpy(arrays[k]) for k in arrays}
    args = {tag: case["args"] for tag, case in json.loads((GOLDEN / "shapes.json").read_text()).items()}
    return found, args


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """A small untrained VAE of factor 2."""
    return tiny_vae(tmp_path_factory.mktemp("vae"), 2, latent_channels=3, scaling_factor=0.5)


def pytest_collection_modifyitems(items):
    """What lies in e2e/ has that mark."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)


COUNTED: dict[tuple, int] = {}  # FLOPs of forwards, by model and options


@pytest.fixture(scope="module", autouse=True)
def count_once(request):
    """Each run counts the FLOPs of its forwards. Those of equal models are kept, except in the tests of the counts."""
    if request.path.parent.name not in ("checkpoint", "data", "e2e", "sampling", "training"):
        yield
        return

    def kept(shadow, batch_size, count=costs._forward_flops, **options):
        shapes = tuple((name, tuple(p.shape)) for name, p in shadow.named_parameters())
        key = (type(shadow), json.dumps(shadow._hub_mixin_config, sort_keys=True), shapes, batch_size, *sorted(options.items()))
        if key not in COUNTED:
            COUNTED[key] = count(shadow, batch_size, **options)
        return COUNTED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "_forward_flops", kept)
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps process-wide state; each run in this process starts anew."""
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "tiny.pt"
    torch.save(random_vit("vit_tiny_patch16_224").state_dict(), path)
    return path
