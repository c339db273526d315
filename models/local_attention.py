"""Attention of the cells of a grid to cells nearby: neighborhoods (Hassani et al. 2023, 2204.07143) and shifted windows (Swin).

On CUDA `flex_attention` skips the blocks of cells that do not see each other; elsewhere the mask is dense.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from common.errors import UserError

Grid = tuple[int, int]  # rows, columns
Mask = Tensor | BlockMask | None


class Kind(NamedTuple):
    """("global",), ("neighborhood", kernel) or ("shifted-window", window)."""

    name: str
    size: int = 0

    @property
    def local(self) -> bool:
        """Whether cells see only cells nearby."""
        return self.name != "global"


def check_kind(kind: Kind, grid: Grid, level: int) -> None:
    """Raises UserError where there is no such attention, or its windows do not divide the grid of the level."""
    rows, columns = grid
    if kind.name not in ("global", "neighborhood", "shifted-window") or kind.local != (kind.size > 0):
        raise UserError(
            f"level {level}: attention {tuple(kind)} must be (global,), (neighborhood, kernel) or (shifted-window, window)"
        )
    if kind.name == "neighborhood" and kind.size % 2 == 0:
        raise UserError(f"level {level}: neighborhood kernel {kind.size} must be odd")
    if kind.name == "shifted-window" and (rows % kind.size or columns % kind.size):
        raise UserError(f"level {level}: windows of {kind.size} do not divide its grid of {rows}×{columns}")


def sees(kind: Kind, grid: Grid, shift: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether cell q sees cell k (row-major indices, which broadcast) in local attention."""
    rows, columns = grid
    size = kernel_size(kind, grid)

    def neighborhood(q: Tensor, k: Tensor) -> Tensor:
        row = k // columns - (q // columns - size // 2).clamp(0, rows - size)
        column = k % columns - (q % columns - size // 2).clamp(0, columns - size)
        return (row >= 0) & (row < size) & (column >= 0) & (column < size)

    def window(q: Tensor, k: Tensor) -> Tensor:
        row = (q // columns + shift) // size == (k // columns + shift) // size
        return row & ((q % columns + shift) // size == (k % columns + shift) // size)

    return neighborhood if kind.name == "neighborhood" else window


def kernel_size(kind: Kind, grid: Grid) -> int:
    """Side of a window, or of a neighborhood: the largest odd number that fits where the grid is smaller."""
    side = min(kind.size, *grid)
    return side if kind.name != "neighborhood" or side % 2 else side - 1


def attended_pairs(kind: Kind, grid: Grid, shift: int) -> int:
    """Pairs of cells that see each other in local attention."""
    size = kernel_size(kind, grid)
    if kind.name == "neighborhood":
        return grid[0] * grid[1] * size * size
    # Along an axis of n cells, a shift cuts the first window to size − shift and leaves shift cells for a last one.
    sides = ((n // size) * size * size - (2 * shift * (size - shift) if shift else 0) for n in grid)
    return math.prod(sides)


def _build_mask(kind: Kind, grid: Grid, shift: int, device: torch.device, flex: bool) -> Tensor | BlockMask:
    see, n = sees(kind, grid, shift), grid[0] * grid[1]
    with torch.inference_mode(False):  # a mask outlives the mode it is first needed in
        if flex:
            return create_block_mask(lambda b, h, q, k: see(q, k), None, None, n, n, device=device)
        cells = torch.arange(n, device=device)
        return see(cells[:, None], cells)


_cached_mask = functools.lru_cache(maxsize=16)(_build_mask)


def attention_mask(kind: Kind, grid: Grid | None, shift: int, x: Tensor, flex: bool) -> Mask:
    """The mask of one layer, on the device of x; `None` for global attention, and for latents, which have no grid.

    With `flex`, on CUDA, the blocks of `flex_attention`; else (n, n) booleans.
    """
    if grid is None or not kind.local:
        return None
    build = _build_mask if isinstance(x, FakeTensor) else _cached_mask  # a fake tensor belongs to the mode that made it
    return build(kind, grid, shift, x.device, flex and x.is_cuda and x.dtype != torch.float64)


@functools.cache
def _compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention)  # uncompiled it is not fused


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, fused: bool) -> Tensor:
    """Attention with logits q·k, unscaled, on (B, heads, n, d)."""
    if isinstance(mask, BlockMask):
        return _compiled_flex_attention()(q, k, v, block_mask=mask, scale=1.0)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    logits = q @ k.transpose(-2, -1)
    return (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(dim=-1) @ v
