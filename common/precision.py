"""The precision of matrix products and convolutions, and of automatic mixed precision."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.deterministic

from common.logging import warn

AMP_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def set_tf32(enabled: bool) -> None:
    """Float32 matrix products and convolutions in TF32 (on Ampere and newer GPUs), or in full float32."""
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """`set_tf32` for a while."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_tf32(enabled)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def set_deterministic() -> None:
    """Only kernels that give the same bits in every run; PyTorch raises an error where it has none. Before the first product on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS adds in an order that changes
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # a check that costs time


def set_attention(cudnn: bool) -> None:
    """Whether PyTorch may choose cuDNN's attention on CUDA; it plans anew, for up to a second, for every number of tokens."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def supported_precision(mixed_precision: str, on_cpu: bool) -> str:
    """`mixed_precision` where the device can do it: `no`, with a warning, for fp16 on a CPU."""
    if on_cpu and mixed_precision == "fp16":
        warn("--mixed-precision fp16 needs a GPU; running as no")
        return "no"
    return mixed_precision


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a model's forward passes: automatic mixed precision of that type, or nothing for `no`."""
    dtype = AMP_TYPES[mixed_precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager:
    """The context of what computes in its weights' own type, whatever automatic mixed precision is around it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
