"""CUDA's rules of automatic mixed precision on tensors of another device, e.g. meta, so that a GPU's work can be traced without one."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_TENSOR = torch.Tensor
HALF = {F.linear, F.conv2d, torch.conv2d, torch.matmul, _TENSOR.matmul, _TENSOR.__matmul__, torch.bmm, _TENSOR.bmm, torch.mm}
SINGLE = {
    F.layer_norm, F.softmax, torch.softmax, _TENSOR.softmax, torch.sum, _TENSOR.sum, torch.exp, _TENSOR.exp, torch.rsqrt,
    _TENSOR.rsqrt, torch.pow, _TENSOR.pow, _TENSOR.__pow__, F.mse_loss, F.cosine_similarity, F.group_norm, F.rms_norm, torch.cumsum,
    torch.square, _TENSOR.square,
}  # fmt: skip
WIDEST = {torch.addcmul, _TENSOR.addcmul, torch.addcdiv}


class CudaAutocast(TorchFunctionMode):
    """Autocast's rules for CUDA on tensors of another device, e.g. meta; and flash attention where CUDA would take it.

    Attributes:
        dtype: that of matrix products; None: float32 as it is.
    """

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype
        self.enabled = True
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}  # of leaves that require a gradient, as autocast caches them

    @contextlib.contextmanager
    def off(self, off: bool = True) -> Iterator[None]:
        """Inside, operations keep the types of their inputs (or, with `off=False`, they do not)."""
        before, self.enabled = self.enabled, not off
        yield
        self.enabled = before

    def cast(self, dtype: torch.dtype, tree: Any) -> Any:
        """The tensors of `tree` in this type, as autocast converts them."""

        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
                return x
            if not (x.is_leaf and x.requires_grad and dtype == self.dtype and x.dtype == torch.float32):
                return x.to(dtype)
            if id(x) not in self.copies:
                self.copies[id(x)] = x, x.to(dtype)
            return self.copies[id(x)][1]

        return tree_map(convert, tree)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = self.dtype if self.enabled else None
        if func is F.scaled_dot_product_attention:
            q, k, v = self.cast(dtype, args[:3]) if dtype else args[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if dtype and func in HALF:
            args, kwargs = self.cast(dtype, (args, kwargs))
        elif dtype and func in SINGLE:
            args, kwargs = self.cast(torch.float32, (args, kwargs))
        elif dtype and func in WIDEST:
            floats = [x.dtype for x in args if isinstance(x, Tensor)]
            args = self.cast(functools.reduce(torch.promote_types, floats), args)
        return func(*args, **kwargs)
