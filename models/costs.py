"""What models cost, in FLOPs: 2 per multiply–add of matrix products, convolutions and attention; norms and element-wise work not.

Counted on the meta device, where no memory is used and attention is counted too.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import Backbone
from models.latent_interface import LatentInterface, budget_to_k


def count_flops(model: nn.Module, inference_budget: float | None = None, batch_size: int = 1) -> int:
    """FLOPs of one forward of `batch_size` images; where attention is masked, of what is attended."""
    shadow = _on_meta(model)
    options = {} if inference_budget is None else {"inference_budget": inference_budget}
    return _forward_flops(shadow, batch_size, **options) - shadow.uncounted_flops(batch_size)


def count_reused_flops(model: nn.Module, cache_after: int | None = None) -> int:
    """FLOPs of one image's forward in which the core is reused; see `Backbone.core_blocks`."""
    shadow = _on_meta(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow.forward_around(lambda s: s, shadow.core_blocks(cache_after), *shadow.example_inputs())
    return counter.get_total_flops() - shadow.uncounted_flops(1)


def projector_flops(model: nn.Module) -> int:
    """FLOPs of one image's REPA projections; 0 where there are none."""
    shadow = _on_meta(model)
    if not hasattr(shadow, "projectors"):
        return 0
    return _forward_flops(shadow, 1, return_features=True) - _forward_flops(shadow, 1)


def mean_forward_flops(model: Backbone, budgets: Sequence[float | None], shares: Sequence[float] | None = None) -> float:
    """FLOPs of one image's forward, the mean over the budgets; `shares`: how often each occurs (default: all evenly)."""
    return float(np.average(forward_flops(model, budgets), weights=shares))


def forward_flops(model: Backbone, budgets: Sequence[float | None]) -> list[int]:
    """FLOPs of one image's forward at each of the budgets.

    In the latents per group k, Linears are linear and attention is quadratic, and so they are in ⌈k/m⌉ where blocks merge m
    latents: three or five counts tell all others.
    """
    if len(budgets) <= 3:
        return [count_flops(model, b) for b in budgets]
    interface = model.interface
    assert isinstance(interface, LatentInterface)
    J = interface.latents_per_group
    k = np.array([budget_to_k(b, J) for b in budgets])
    counts_of = [k] if model.merged_latents == 1 else [k, -(-k // model.merged_latents)]
    terms = np.stack([(n / J) ** power for n in counts_of for power in range(3)], axis=1)  # (budgets, 3 or 6)
    known: list[int] = []
    for i in sorted(range(len(k)), key=lambda i: abs(len(k) // 2 - i), reverse=True):  # both ends first
        if np.linalg.matrix_rank(terms[[*known, i]]) > len(known):
            known.append(i)
    counts = np.array([count_flops(model, budgets[i]) for i in known], dtype=np.float64)
    return np.rint(terms @ np.linalg.lstsq(terms[known], counts, rcond=None)[0]).astype(np.int64).tolist()


def _on_meta(model: nn.Module) -> Backbone:
    """A copy of the model, freed of DDP and `torch.compile`, with float32 meta tensors in place of its weights."""
    model = getattr(model, "module", model)
    model = getattr(model, "_orig_mod", model)
    memo: dict[int, Any] = {id(b): _empty(b) for b in model.buffers()}
    memo |= {id(p): nn.Parameter(_empty(p), requires_grad=False) for p in model.parameters()}
    return cast(Backbone, copy.deepcopy(model, memo))


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _forward_flops(shadow: Backbone, batch_size: int, **options: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(*shadow.example_inputs(batch_size), **options)
    return counter.get_total_flops()
