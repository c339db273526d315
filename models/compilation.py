"""`torch.compile` of a model's parts, and whether this machine can do it."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.fx.experimental import _config as symbols

from common.logging import warn
from models.backbone import Backbone

# Every module's compiled form is kept under one and the same function of PyTorch, with the form of each kind of block and each way
# of calling it (with a gradient, without, at one latent per group): more than its default of 8.
GRAPHS = 64


def compile_model(model: nn.Module, backend: str | Callable = "inductor") -> nn.Module:
    """`torch.compile` the blocks and the parts around them, in place; without a compiler the model stays as it is, with a warning.

    One graph for all blocks of a kind and each other part, for every budget (but one: a single latent per group has a graph of its
    own) and batch size.
    """
    device = next(model.parameters()).device
    if backend == "inductor" and (problem := compiler_problem(device)):
        warn(f"--compile: {problem}; running without torch.compile")
        return model
    symbols.use_duck_shape = False  # a batch as large as the number of tokens is no square
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for part in cast(Backbone, model).compiled_parts():
        part.compile(dynamic=True, fullgraph=True, backend=backend)
    return model


def compiler_problem(device: torch.device) -> str | None:
    """What `torch.compile` lacks to make code for the device; None where nothing is known to."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "clang", "gcc"]
    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
    if not any(map(shutil.which, names)):
        return f"no compiler ({', '.join(names)}) on the PATH"
    return None
