"""HDiT: hourglass diffusion transformer (Crowson et al. 2024, arXiv 2401.11605).

Outer levels work on fine grids with local attention; each level inwards merges 2×2 cells into one of (about) twice the width; the
inner level attends globally. Shapes: B batch, n tokens and W width of a level, M width of the condition, d head width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from models.backbone import Backbone, Stream
from models.conditioning import check_labels
from models.layers import RMSNorm, merge_cells, split_cells, unpatchify
from models.local_attention import Grid, Kind, Mask, attend, attended_pairs, attention_mask, check_kind


def hourglass(grid: Grid, *, inner_depth: int, inner_width: int, outer_depth: int, levels: int | None = None) -> dict[str, Any]:
    """The levels of a registered size, as arguments of `HDiT`: as many as bring the grid down to 16×16, or `levels` of them."""
    levels = max(1, (min(grid) // 16).bit_length()) if levels is None else levels
    if levels < 1:
        raise UserError(f"levels {levels}: HDiT has at least one")
    return {
        "depths": [outer_depth] * (levels - 1) + [inner_depth],
        "widths": [inner_width // 2 ** (levels - 1 - i) for i in range(levels)],
        "attentions": [("neighborhood", 7)] * (levels - 1) + [("global",)],
    }


# ---------------------------------------------------------------------------------------------------------- positions


def positions(grid: Grid, x: Tensor) -> Tensor:
    """Centres (y, x) of the cells, (n, 2), with the longer side on [−1, 1], on the device of x and in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    axes = ((2 * torch.arange(n, device=x.device, dtype=dtype) + (1 - n)) / max(grid) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def rotation(row: Tensor, column: Tensor, num_heads: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (heads, n, d/4) of the angles of positions (n,), (n,): d/8 frequencies each, dealt out over the heads."""
    steps = torch.arange(num_heads * head_width // 8, device=row.device, dtype=row.dtype)
    frequencies = torch.exp(math.log(math.pi) + math.log(10) / len(steps) * steps).view(-1, num_heads).T[:, None]
    angle = torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)
    return angle.cos(), angle.sin()


# --------------------------------------------------------------------------------------------------------------- layers


class AdaRMSNorm(nn.Module):
    """(1 + A·c) · x / √(mean(x²) + eps), in float32 or better; A starts at zero."""

    def __init__(self, dim: int, cond_dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.linear = zero(nn.Linear(cond_dim, dim, bias=False))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, n, W) and condition c (B, M) → (B, n, W)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (F.rms_norm(wide, wide.shape[-1:], eps=self.eps) * (1 + self.linear(c).unsqueeze(1))).to(x.dtype)


def zero(linear: nn.Linear) -> nn.Linear:
    """The layer, with its weight set to zero."""
    nn.init.zeros_(linear.weight)
    return linear


class FeedForward(nn.Module):
    """x + down(a·GELU(g)) with (a, g) = up(norm(x)), hidden width 3·dim, exact GELU."""

    def __init__(self, dim: int, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.up_proj = nn.Linear(dim, 6 * dim, bias=False)
        self.down_proj = zero(nn.Linear(3 * dim, dim, bias=False))

    def forward(self, x: Tensor, *c: Tensor) -> Tensor:
        """Tokens (B, n, W), or a condition (B, M), and what the norm takes beside it → the same shape."""
        a, g = self.up_proj(self.norm(x, *c)).chunk(2, dim=-1)
        return x + self.down_proj(a * F.gelu(g))


class SelfAttention(nn.Module):
    """x + cosine attention of norm(x), with a learned temperature per head and axial rotation."""

    def __init__(self, dim: int, norm: nn.Module, head_width: int, fused: bool = True, eps: float = 1e-6):
        super().__init__()
        self.norm = norm
        self.num_heads, self.fused, self.eps = dim // head_width, fused, eps
        self.scale = nn.Parameter(torch.full((self.num_heads,), 10.0))
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = zero(nn.Linear(dim, dim, bias=False))

    def forward(self, x: Tensor, c: Tensor, row: Tensor, column: Tensor, mask: Mask = None) -> Tensor:
        """Tokens x (B, n, W), condition c (B, M), positions row and column (n,) → (B, n, W)."""
        qkv = self.qkv_proj(self.norm(x, c)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (a.transpose(1, 2) for a in qkv.unbind(2))  # (B, heads, n, d) each
        angles = rotation(row, column, self.num_heads, q.shape[-1])
        q, k = (self.prepare(a, *angles).to(v.dtype) for a in (q, k))
        return x + self.out_proj(attend(q, k, v, mask, self.fused).transpose(1, 2).flatten(2))

    def prepare(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q·√scale/√(Σq² + eps), the lower half of its channels rotated by (heads, n, d/4); in float32 or better."""
        q = q.to(cos.dtype)
        q = q * (self.scale.to(q.dtype).sqrt()[:, None, None] * torch.rsqrt(q.square().sum(dim=-1, keepdim=True) + self.eps))
        quarter = q.shape[-1] // 4
        a, b, still = q.split([quarter, quarter, q.shape[-1] - 2 * quarter], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, still], dim=-1)


class Layer(nn.Module):
    """Attention and feed-forward, each under an AdaRMSNorm; x (B, n, W), c (B, M), positions row and column (n,) → (B, n, W)."""

    def __init__(self, dim: int, cond_dim: int, head_width: int, fused: bool = True):
        super().__init__()
        self.self_attn = SelfAttention(dim, AdaRMSNorm(dim, cond_dim), head_width, fused)
        self.ff = FeedForward(dim, AdaRMSNorm(dim, cond_dim))

    def forward(self, x: Tensor, c: Tensor, row: Tensor, column: Tensor, mask: Mask = None) -> Tensor:
        """See the class."""
        return self.ff(self.self_attn(x, c, row, column, mask), c)


class FourierFeatures(nn.Module):
    """u (B,) → [cos, sin] (B, M) of 2π·u·w, w ~ N(0, 1): drawn once, stored, not trained."""

    weight: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(dim // 2, 1))

    def forward(self, u: Tensor) -> Tensor:
        """Times u (B,) → features (B, M)."""
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        angle = 2 * math.pi * u.to(w.dtype)[:, None] * w[:, 0]
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class MappingNetwork(nn.Module):
    """The network that makes the condition; (B, M) → (B, M)."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        self.in_norm, self.out_norm = RMSNorm(dim), RMSNorm(dim)
        self.blocks = nn.ModuleList(FeedForward(dim, RMSNorm(dim)) for _ in range(depth))

    def forward(self, c: Tensor) -> Tensor:
        """(B, M) → (B, M)."""
        c = self.in_norm(c)
        for block in self.blocks:
            c = block(c)
        return self.out_norm(c)


class Merge(nn.Module):
    """2×2 cells of a level → one of the next level inwards, or p×p pixels → one cell; (B, n, W) → (B, n/p², W')."""

    def __init__(self, dim: int, inner_dim: int, p: int = 2):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(p * p * dim, inner_dim, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, n, W) on the grid → (B, n/p², W′)."""
        # What layers add to stays as wide as x, also where autocast makes matrix products narrower.
        return self.proj(merge_cells(x, grid, self.p)).to(x.dtype)


class Split(nn.Module):
    """One cell of the inner level → 2×2 of the outer: skip + fac·(u − skip), fac one learned number."""

    def __init__(self, dim: int, outer_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 4 * outer_dim, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor, grid: Grid) -> Tensor:
        """Inner tokens x (B, n/4, W′) and outer ones skip (B, n, W), on the outer grid → (B, n, W)."""
        return torch.lerp(skip, split_cells(self.proj(x), grid).to(skip.dtype), self.fac.to(skip.dtype))


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its level, the shift of its windows, and whether it begins the level going out or ends it going in."""

    level: int
    shift: int
    splits: bool
    merges: bool


def places(depths: Sequence[int], attentions: Sequence[Kind]) -> list[Place]:
    """The place of each layer, in forward order: through the outer levels, the inner level, and out again."""
    inner = len(depths) - 1
    visits = [(level, 0) for level in range(len(depths))] + [(level, depths[level]) for level in reversed(range(inner))]
    layers = []
    for level, first in visits:
        kind, depth = attentions[level], depths[level]
        for i in range(first, first + depth):  # layers of a level are counted on through both sides
            shift = kind.size // 2 if kind.name == "shifted-window" and i % 2 else 0
            layers.append(Place(level, shift, splits=i == first > 0, merges=i == depth - 1 and level < inner))
    return layers


def level_grids(grid: Grid, widths: Sequence[int], attentions: Sequence[Kind], head_width: int) -> list[Grid]:
    """The grid of each level, level 0 the finest.

    Raises:
        UserError: a grid that cannot be halved exactly, a width that the heads do not divide, windows that do not fit the grid.
    """
    grids = []
    for level, (width, kind) in enumerate(zip(widths, attentions, strict=True)):
        if level:
            if grid[0] % 2 or grid[1] % 2:
                raise UserError(
                    f"HDiT level {level - 1}: its grid of {grid[0]}×{grid[1]} cannot be halved exactly for level {level}; "
                    f"choose at most {level} level{'s' * (level > 1)}, or a size divisible by patch_size × {2 ** (len(widths) - 1)}"
                )
            grid = (grid[0] // 2, grid[1] // 2)
        if head_width % 8 or width % head_width:
            raise UserError(f"HDiT level {level}: head_width {head_width} must be divisible by 8 and divide the width {width}")
        check_kind(kind, grid, level)
        grids.append(grid)
    return grids


class HDiT(Backbone):
    """Velocity model v(x, t, y) of pixels or VAE latents; `Backbone` has the arguments that are not here.

    Args:
        depths, widths, attentions: per level, level 0 the finest. An outer level has `depths` layers on each side. An attention is
            ("global",), ("neighborhood", kernel) or ("shifted-window", window).
        head_width: width d of an attention head, in all levels.
        mapping_depth, mapping_width: of the network that makes the condition (B, M).
        num_classes: `None` for a model without labels.
        encoder_depth: as in `Backbone`; REPA reads the tokens of the inner level, a grid of `feature_grid`.

    Raises:
        UserError: sizes that do not fit each other.
    """

    mirrored = True

    def __init__(
        self,
        *,
        input_size: int | Grid,
        patch_size: int,
        in_channels: int = 4,
        depths: Sequence[int],
        widths: Sequence[int],
        attentions: Sequence[tuple],
        head_width: int = 64,
        mapping_depth: int,
        mapping_width: int,
        num_classes: int | None = 1000,
        fused_attn: bool = True,
        encoder_depth: int = 8,
        z_dims: tuple[int, ...] = (),
    ):
        super().__init__(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes, encoder_depth=encoder_depth
        )  # fmt: skip
        if not len(depths) == len(widths) == len(attentions) or min(depths, default=0) < 1:
            raise UserError(
                f"HDiT needs one depth, width and attention a level: depths {depths}, widths {widths}, attentions {attentions}"
            )
        self.attentions, self.head_width, self.fused = [Kind(*kind) for kind in attentions], head_width, fused_attn
        self.flex = fused_attn and head_width >= 16  # what its kernels can do
        self.grids = level_grids(self.grid_size, widths, self.attentions, head_width)
        self.places, self.widths = places(depths, self.attentions), list(widths)
        self.outer_depth, self.cond_dim, self.hidden_size = sum(depths[:-1]), mapping_width, widths[-1]

        self.patch_in = Merge(in_channels, widths[0], patch_size)
        self.time_emb = FourierFeatures(mapping_width)
        self.time_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        self.cond_bias = nn.Parameter(torch.zeros(mapping_width))
        self.class_emb = None if num_classes is None else nn.Embedding(num_classes + 1, mapping_width)
        self.mapping = MappingNetwork(mapping_width, mapping_depth)
        self.blocks = nn.ModuleList(Layer(widths[p.level], mapping_width, head_width, fused_attn) for p in self.places)
        pairs = list(pairwise(widths))
        self.merges = nn.ModuleList(Merge(outer, inner) for outer, inner in pairs)
        self.splits = nn.ModuleList(Split(inner, outer) for outer, inner in pairs)
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = nn.ModuleDict({"proj": zero(nn.Linear(widths[0], patch_size**2 * in_channels, bias=False))})
        first, last = max(1, self.outer_depth), self.outer_depth + depths[-1]
        if z_dims and not first <= max(1, self.repa_depth) <= last:
            raise UserError(f"--encoder-depth {encoder_depth}: REPA reads HDiT's inner level, after block {first} to {last}")
        self.add_projectors(self.hidden_size, z_dims)

    @classmethod
    def size_arguments(
        cls,
        input_size: int | Grid,
        *,
        patch_size: int,
        inner_depth: int,
        inner_width: int,
        outer_depth: int,
        inner_ends: int | None = None,
        levels: int | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The constructor's arguments of a registered size: its `hourglass`, and of ELIT the head and tail, which count all layers.

        `inner_ends` are the layers of the inner level in ELIT's head, and as many in its tail; `others` are arguments as they are,
        which go before those made here.
        """
        rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
        grid = (rows // patch_size, columns // patch_size)
        shape = {"inner_depth": inner_depth, "inner_width": inner_width, "outer_depth": outer_depth, "levels": levels}
        arguments = {"patch_size": patch_size, **hourglass(grid, **shape), **others}
        if inner_ends is None:
            return arguments
        ends = sum(arguments["depths"][:-1]) + inner_ends
        return {"head_depth": ends, "tail_depth": ends, **arguments}

    def embed(self, x: Tensor, t: Tensor, y: Tensor | None) -> Stream:
        """Tokens (B, N, W) of the finest level with their positions, and the condition (B, M)."""
        tokens = self.patch_in(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))
        c = self.time_embedding(t) + self.cond_bias
        if self.class_emb is not None:
            c = c + self.class_emb(check_labels(y, "HDiT"))
        return Stream(tokens, self.mapping(c), pos=positions(self.grid_size, x), grid=self.grid_size)

    def time_embedding(self, t: Tensor) -> Tensor:
        """(B,) → (B, M)."""
        return self.time_in_proj(self.time_emb(t).to(self.time_in_proj.weight.dtype))

    @property
    def default_head(self) -> int:
        """The layers of the outer levels."""
        return max(1, self.outer_depth)

    def step(self, i: int, s: Stream) -> None:
        """Layer i, after the split that begins a level on the way out, before the merge that ends one on the way in."""
        place, level = self.places[i], self.places[i].level
        if place.splits:
            s.grid = self.grids[level]
            s.x, s.pos = self.splits[level](s.x, s.skips.pop(), s.grid), positions(s.grid, s.x)
        mask = attention_mask(self.attentions[level], s.grid, place.shift, s.x, self.flex)
        # Apart: the 2 of one tensor would be taken for a batch of 2 by torch.compile.
        assert s.pos is not None
        row, column = (p.contiguous() for p in s.pos.unbind(1))
        s.x = self.blocks[i](s.x, s.c, row, column, *([] if mask is None else [mask]))
        if place.merges:
            s.skips.append(s.x)
            s.x, s.grid = self.merges[level](s.x, self.grids[level]), self.grids[level + 1]
            s.pos = positions(s.grid, s.x)  # exactly the means of the four

    def output(self, s: Stream) -> Tensor:
        """Tokens (B, N, W) of the finest level → velocity (B, C, H, W)."""
        return unpatchify(self.patch_out["proj"](self.out_norm(s.x)), self.grid_size, self.patch_size)

    @property
    def feature_grid(self) -> Grid:
        """(rows, columns) of the tokens that REPA reads: the inner level's."""
        return self.grids[-1]

    def interface_arguments(self) -> dict[str, Any]:
        """The interface stands in the inner level."""
        heads = self.hidden_size // self.head_width
        return {"dim": self.hidden_size, "num_heads": heads, "grid_size": self.grids[-1], "cond_dim": self.cond_dim, "fused_attn": self.fused}  # fmt: skip

    def check_split(self, head_depth: int, tail_depth: int) -> None:
        """Raises UserError where the core leaves the inner level, or latents, which have no grid, would need local attention."""
        if min(head_depth, tail_depth) < self.outer_depth:
            raise UserError(
                f"head_depth {head_depth} and tail_depth {tail_depth}: the core must lie in HDiT's inner level, "
                f"so both must be at least {self.outer_depth}, the layers of the outer levels on a side"
            )
        if self.attentions[-1].local:
            raise UserError(
                f"ELIT-HDiT: the inner level's attention must be global, not {self.attentions[-1].name}: latents have no grid"
            )

    def uncounted_flops(self, batch_size: int) -> int:
        """FLOPs of the pairs of cells that local attention leaves out, which a count of dense attention has too many."""
        left_out = 0
        for place in self.places:
            kind, grid = self.attentions[place.level], self.grids[place.level]
            if kind.local:
                pairs = (grid[0] * grid[1]) ** 2 - attended_pairs(kind, grid, place.shift)
                left_out += 4 * pairs * self.widths[place.level]
        return left_out * batch_size
