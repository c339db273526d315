"""Attention's kernels at the shapes of ELIT-SiT-XL/2: which refuse, how exact and how quick they are."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.machine import seconds_of
from benchmarks.gpu.record import Run
from common.errors import first_line
from common.precision import set_attention
from models.layers import attend

ERROR = 2e-2
KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def shapes(images: int, groups: int, J: int, k: int) -> dict[str, tuple[int, int, int]]:
    """Name → (batch, queries, keys) of core, Read and Write with k latents for each of the groups of J tokens."""
    return {"core": (images, groups * k, groups * k), "Read": (images * groups, k, J), "Write": (images * groups, J, k)}


def calls(portable: bool, risky: bool) -> dict[str, Call]:
    """The model's own attention and each kernel alone; `risky`: cuDNN's, and PyTorch's choice, which may be that."""

    def only(backend: SDPBackend, *qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv)

    def default(*qkv: Tensor) -> Tensor:
        set_attention(True)
        try:
            return F.scaled_dot_product_attention(*qkv)
        finally:
            set_attention(False)

    alone = {name: partial(only, backend) for name, backend in KERNELS.items() if (name == "cuDNN") == risky}
    return {"default": default, **alone} if risky else {"model's": partial(attend, fused=True, portable=portable), **alone}


def forward_backward(call: Call, leaves: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients of queries, keys and values, (batch, n, heads, d) each as the model lays them out."""
    out = call(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def error_of(found: Sequence[Tensor], exact: Sequence[Tensor], gradient: Tensor) -> float:
    """The largest of ‖found − exact‖ / ‖exact‖; where exact is zero (one key: no gradient of queries and keys), over the gradient's."""
    scales = [e.norm() if e.norm() > 0 else gradient.double().norm() for e in exact]
    return max(((f.double() - e).norm() / scale).item() for f, e, scale in zip(found, exact, scales, strict=True))


def attention(run: Run) -> None:
    """Every kernel forward and backward at every shape, in bf16, against plain products in float64.

    cuDNN's comes last: after an access beyond its memory nothing else runs in the process.
    """
    images, side, J, heads, width = run.size((32, 4, 16, 16, 72), (2, 2, 4, 2, 8))
    set_attention(False)  # as --no-cudnn-attn, the default
    for risky in (False, True):
        for k in run.size((1, 2, 4, 16), (1, 4)):
            for name, (batch, queries, keys) in shapes(images, side * side, J, k).items():
                torch.manual_seed(k)
                sizes = [(batch, n, heads, width) for n in (queries, keys, keys)]
                leaves = [torch.randn(s, device=run.device, dtype=torch.bfloat16).requires_grad_() for s in sizes]
                gradient = torch.randn(sizes[0], device=run.device, dtype=torch.bfloat16)
                wide = [x.detach().double().requires_grad_() for x in leaves]
                exact = forward_backward(partial(attend, fused=False), wide, gradient.double())
                found = {
                    kernel: try_kernel(run, partial(forward_backward, call, leaves, gradient), exact, gradient)
                    for kernel, call in calls(portable=name != "core", risky=risky).items()
                }
                report(run, f"{name}, k = {k}", found)


def try_kernel(run: Run, job: Callable[[], list[Tensor]], exact: Sequence[Tensor], gradient: Tensor) -> dict[str, Any]:
    """The error of a kernel and its times: of the first call, waiting, and of later ones."""
    try:
        begin = time.perf_counter()
        result = job()
        if run.cuda:
            torch.cuda.synchronize()
        first = time.perf_counter() - begin
        error = error_of(result, exact, gradient)
        return {"ms": 1000 * seconds_of(run.device, job, repeats=run.size(10, 1)), "first ms": 1000 * first, "error": error}
    except Exception as refusal:  # no kernel for this shape
        return {"refused": first_line(refusal)}


def report(run: Run, name: str, found: dict[str, dict[str, Any]]) -> None:
    """One line of times, and the check of the model's own."""
    good = {kernel: f["ms"] for kernel, f in found.items() if kernel in KERNELS and f.get("error", ERROR) < ERROR}
    best = min(good, key=lambda kernel: good[kernel]) if good else "none"
    cells = [
        f"{kernel} {'refuses' if 'refused' in f else '{ms:.3g} ms (first {first ms:.3g}, error {error:.1e})'.format(**f)}"
        for kernel, f in found.items()
    ]
    own = found.get("model's")
    run.note(name, {"best": best, **found}, (f"best {best}: " if own else "") + ", ".join(cells))
    if own:
        run.check(f"{name}: error of the model's", own.get("error", float("inf")), ERROR, why=own.get("refused", ""))
