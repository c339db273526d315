"""Helpers that several test files share."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.torchvision_shim import import_torchvision

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # for models this small, more threads only wait for each other


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights in every parameter (in place), so that no term of a forward vanishes; returns the model."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.standard_normal(tuple(parameter.shape))
            if name.endswith("scale") or "_norm.weight" in name:
                values = 1 + 0.3 * values
            elif parameter.dim() >= 2 and "pos" not in name and "query" not in name:
                values = values / np.sqrt(np.prod(parameter.shape[1:]))
            else:
                values = 0.5 * values
            parameter.copy_(torch.from_numpy(values))
    return model


def numpy_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The parameters by name. Buffers stay behind: they are for a reference to make itself."""
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def inputs(model: torch.nn.Module, times: list[float], *, dtype=torch.float64, seed: int = 1):
    """Random (x, t, y) of a model; one label is the null label."""
    rng = np.random.default_rng(seed)
    size = model.input_size
    shape = (len(times), model.in_channels, *((size, size) if isinstance(size, int) else size))
    y = [model.num_classes, *rng.integers(model.num_classes, size=len(times) - 1)]
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype), torch.tensor(times, dtype=dtype), torch.tensor(y)


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
    import_torchvision()  # which diffusers imports
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        latent_channels=3, norm_num_groups=4, scaling_factor=0.5,
    ).save_pretrained(path)  # fmt: skip
    return path
