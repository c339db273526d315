"""What a forward costs, in FLOPs: 2 per multiply–add of matrix products, convolutions and attention."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module, inference_budget: float | None = None, batch_size: int = 1) -> int:
    """FLOPs of one forward: 2 per multiply–add of matrix products, convolutions and attention.

    Runs on the meta device, where no memory is used and attention is counted too.
    """
    model = getattr(model, "module", model)
    model = getattr(model, "_orig_mod", model)
    memo = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    shadow = copy.deepcopy(model, memo)  # the memo puts meta tensors in place of the weights
    inputs = shadow.example_inputs(batch_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(*inputs, **({} if inference_budget is None else {"inference_budget": inference_budget}))
    return counter.get_total_flops() - shadow.uncounted_flops(batch_size)
