"""The registry: names → models, and what a forward costs."""

import copy
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from errors import UserError, nearest
from models.dfm import DFMELITSiT, DFMSiT
from models.elit import ELITSiT
from models.sit import SiT


@dataclass(frozen=True)
class ModelSpec:
    """One registered model: its class and its size."""

    family: str
    constructor: type[nn.Module]
    sizes: dict[str, int]

    @property
    def elastic(self) -> bool:
        """Whether it has a compute budget."""
        return issubclass(self.constructor, ELITSiT)

    @property
    def staged(self) -> bool:
        """Whether it works on a pyramid."""
        return issubclass(self.constructor, DFMSiT)


_SIZES = {  # depth, width, heads, head / tail depth of ELIT
    "Ti": (8, 192, 3, 1),
    "S": (12, 384, 6, 2),
    "B": (12, 768, 12, 2),
    "L": (24, 1024, 16, 4),
    "XL": (28, 1152, 16, 4),
}
_FAMILIES = {"SiT": SiT, "ELIT-SiT": ELITSiT, "DFM-SiT": DFMSiT, "DFM-ELIT-SiT": DFMELITSiT}


def _specs() -> dict[str, ModelSpec]:
    specs = {}
    for size, (depth, hidden_size, num_heads, ends) in _SIZES.items():
        for patch_size in (2, 4, 8):
            sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": patch_size}
            elit = sizes | {"head_depth": ends, "tail_depth": ends}
            for family, constructor in _FAMILIES.items():
                arguments = elit if issubclass(constructor, ELITSiT) else sizes
                specs[f"{family}-{size}/{patch_size}"] = ModelSpec(family, constructor, arguments)
    return specs


MODELS: dict[str, ModelSpec] = _specs()


def model_spec(name: str) -> ModelSpec:
    """The registered spec of `name`. Raises UserError with the nearest name where there is none."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}{nearest(name, MODELS)}; known: {', '.join(MODELS)}")
    return MODELS[name]


def create_model(
    name: str, *, input_size: int | tuple[int, int], in_channels: int = 4, num_classes: int = 1000, z_dims=(), **overrides: Any
) -> nn.Module:
    """A freshly initialised model.

    Args:
        name: a key of `MODELS`, e.g. "ELIT-SiT-XL/2".
        input_size: side of the VAE latents, or (rows, columns).
        z_dims: feature widths of the REPA target encoders; empty without REPA.
        overrides: any other constructor argument, e.g. `head_depth=8`, `elit_tail="skip"`; `None` keeps the default.
    Raises:
        UserError: unknown name or argument, or sizes that do not fit.
    """
    spec = model_spec(name)
    known = {p for cls in spec.constructor.__mro__[:-1] for p in inspect.signature(cls.__init__).parameters} - {"self", "sit"}
    for key in overrides:
        if key not in known:
            raise UserError(f"{name} has no option {key!r}{nearest(key, known)}")
    arguments = spec.sizes | {k: v for k, v in overrides.items() if v is not None}
    return spec.constructor(
        input_size=input_size, in_channels=in_channels, num_classes=num_classes, z_dims=tuple(z_dims), **arguments
    )


def compile_model(model: nn.Module, backend: str | Callable = "inductor") -> nn.Module:
    """`torch.compile` the transformer blocks, in place: one graph that all of them share, for every budget and batch size."""
    for block in model.blocks:
        block.compile(dynamic=True, backend=backend)
    return model


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Gradient checkpointing, in place: each block keeps its input alone and is computed again in the backward pass."""
    for block in model.blocks:
        block.forward = types.MethodType(_twice, block)
    return model


def _twice(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    # Nothing in a model is random, so no state of a generator has to be kept (and read from the device).
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)


def count_flops(model: nn.Module, inference_budget: float | None = None, batch_size: int = 1) -> int:
    """FLOPs of one forward: 2 per multiply–add of matrix products, convolutions and attention.

    Runs on the meta device, where no memory is used and attention is counted too.
    """
    model = getattr(model, "module", model)
    model = getattr(model, "_orig_mod", model)
    memo = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    shadow = copy.deepcopy(model, memo)  # the memo puts meta tensors in place of the weights
    dtype = next(model.parameters()).dtype
    if hasattr(model, "stage_shapes"):  # DFM, all stages active
        x = [torch.empty(batch_size, *shape, device="meta", dtype=dtype) for shape in model.stage_shapes]
        t = torch.empty(batch_size, len(x), device="meta")
    else:
        rows, columns = (p * model.patch_size for p in model.grid_size)
        x = torch.empty(batch_size, model.in_channels, rows, columns, device="meta", dtype=dtype)
        t = torch.empty(batch_size, device="meta")
    y = torch.empty(batch_size, device="meta", dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(x, t, y, **({} if inference_budget is None else {"inference_budget": inference_budget}))
    return counter.get_total_flops()
