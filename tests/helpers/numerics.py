"""Random weights and inputs for comparing models with references."""

from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


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
