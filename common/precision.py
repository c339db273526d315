"""The precision of matrix products and convolutions, and of automatic mixed precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

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
