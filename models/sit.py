"""SiT: scalable interpolant transformer (Ma et al. 2024, arXiv 2401.08740) on DiT blocks (Peebles & Xie 2023, 2212.09748).

Also in the two layouts that the ELIT paper (2603.12245) calls U-ViT and HDiT: SiT's blocks with long skip connections ("unet"), or
with the inner blocks on a grid of half the side ("hourglass"). Shapes: N tokens, D width, n tokens or latents, d head width.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from models.backbone import Backbone, Stream
from models.conditioning import Condition, check_labels
from models.layers import (
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    QKNorm,
    Rotation,
    TimestepEmbedder,
    gated,
    merge_cells,
    modulate,
    modulation,
    sincos_position_embedding,
    split_cells,
    unpatchify,
    xavier,
)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning.

    Args:
        cond_dim: width of the condition; default `dim`.
        skip: whether the tokens are first joined with those of an earlier block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: QKNorm = False,
        fused: bool = True,
        cond_dim: int | None = None,
        skip: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm, fused)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        xavier(self)
        self.adaLN_modulation = modulation(cond_dim or dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor, rotation: Rotation | None = None, skip: Tensor | None = None) -> Tensor:
        """Tokens x and skip (B, n, D), condition c (B, cond_dim) → (B, n, D)."""
        if self.skip_linear is not None and skip is not None:
            # What layers add to stays as wide as x, also where autocast makes matrix products narrower.
            x = self.skip_linear(torch.cat([x, skip], dim=-1)).to(x.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = gated(x, gate_a, self.attn(modulate(self.norm1(x), shift_a, scale_a), rotation))
        return gated(x, gate_m, self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


def positions(grid: tuple[int, int], x: Tensor) -> Tensor:
    """(row, column) of each token, (N, 2), on the device of x and in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    axes = (torch.arange(n, device=x.device, dtype=dtype) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def rotation(pos: Tensor, head_width: int) -> Rotation:
    """Cosines and sines of axial rotary angles of positions (n, 2).

    d/4 pairs of channels turn with the row, the others with the column, pair i of each by position·10000^(−2i/(d/2)).
    """
    quarter = head_width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, device=pos.device, dtype=pos.dtype) / quarter)
    angle = (pos[:, :, None] * frequencies).flatten(1)
    return angle.cos(), angle.sin()


@dataclass
class SiTStream(Stream):
    """A `Stream` that keeps the rotations of its positions for the blocks that share them."""

    rotations: dict[int, tuple[Tensor, Rotation]] = field(default_factory=dict)  # by head width: positions, cosines and sines

    def rotation(self, head_width: int) -> Rotation | None:
        """Cosines and sines of the positions, None where there are none."""
        if self.pos is None:
            return None
        pos, made = self.rotations.get(head_width, (None, None))
        if made is None or pos is not self.pos:
            made = rotation(self.pos, head_width)
            self.rotations = {**self.rotations, head_width: (self.pos, made)}
        return made


class Hourglass(nn.Module):
    """Four neighbours in one of twice the width for the inner blocks: 2×2 cells of the grid, or four latents of a group in their order.

    Where a group's latents are no multiple of four, zeros stand for the missing ones.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.merge = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.split = nn.Linear(2 * dim, 4 * dim, bias=False)
        self.mix = nn.Parameter(torch.full((1,), 0.5))  # of what comes back with what went in

    def enter(self, s: Stream) -> None:
        """(B, n, D) → (B, m, 2D), each at the mean position of those it is made of."""
        s.skips.append((s.x, s.pos, s.grid))
        x = fours(s.x, s.grid, s.groups)  # (B, m, 4, D)
        if s.pos is not None:
            present = fours(torch.ones_like(s.pos)[None], s.grid, s.groups)[0].sum(dim=1)
            s.pos = fours(s.pos[None], s.grid, s.groups)[0].sum(dim=1) / present
        s.x = self.merge(x.flatten(2)).to(x.dtype)
        s.grid = None if s.grid is None else (s.grid[0] // 2, s.grid[1] // 2)

    def leave(self, s: Stream) -> None:
        """(B, m, 2D) → (B, n, D)."""
        x, s.pos, s.grid = s.skips.pop()
        u = unfours(self.split(s.x).unflatten(2, (4, -1)), s.grid, s.groups, x.shape[1])
        s.x = torch.lerp(x, u.to(x.dtype), self.mix.to(x.dtype))


def fours(x: Tensor, grid: tuple[int, int] | None, groups: int) -> Tensor:
    """(B, n, D) → (B, m, 4, D): the 2×2 cells of a grid, or the latents of each group by four, zeros after the last."""
    if grid is not None:
        return merge_cells(x, grid).unflatten(2, (4, -1))
    x = x.unflatten(1, (groups, -1))  # (B, G, k, D)
    return F.pad(x, (0, 0, 0, -x.shape[2] % 4)).unflatten(2, (-1, 4)).flatten(1, 2)


def unfours(x: Tensor, grid: tuple[int, int] | None, groups: int, n: int) -> Tensor:
    """The inverse of `fours`: (B, m, 4, D) → (B, n, D); `grid` is that of the n cells."""
    if grid is not None:
        return split_cells(x.flatten(2), grid)
    return x.flatten(1, 2).unflatten(1, (groups, -1))[:, :, : n // groups].flatten(1, 2)


class SiT(Backbone):
    """Transformer blocks with adaLN-Zero on patch tokens.

    Args (beside Backbone's):
        qk_norm: of queries and keys over the head width: `True` LayerNorm, "rms" RMS norm.
        rotary: rotary positions in place of the fixed sine–cosine table.
        layout: "unet": blocks of the second half join with those of the first that they mirror, but for the innermost pair.
            "hourglass": blocks from ⌊2·depth/7⌋ to as many from the end work on 2×2 cells in one of twice the width.
        z_dims: feature widths of the REPA target encoders.

    Raises:
        UserError: sizes that do not divide, or REPA on an inner block of the hourglass.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        qk_norm: QKNorm = False,
        rotary: bool = False,
        layout: Literal["unet", "hourglass"] | None = None,
        fused_attn: bool = True,
        encoder_depth: int = 8,
        z_dims: tuple[int, ...] = (),
    ):
        super().__init__(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            encoder_depth=encoder_depth,
        )
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be divisible by 4 and by num_heads {num_heads}")
        if layout not in (None, "unet", "hourglass"):
            raise UserError(f"layout {layout!r} is not valid; choose unet or hourglass")
        if rotary and hidden_size // num_heads % 4:
            raise UserError(f"rotary: the head width {hidden_size // num_heads} must be divisible by 4")
        self.hidden_size, self.num_heads, self.fused_attn = hidden_size, num_heads, fused_attn
        self.rotary, self.layout, self.mirrored = rotary, layout, layout is not None
        outer = 2 * depth // 7 if layout == "hourglass" else depth
        self.inner = range(outer, depth - outer)  # the blocks on merged tokens

        self.x_embedder = xavier(PatchEmbed(patch_size, in_channels, hidden_size))
        if not rotary:
            self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.grid_size)[None])
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        widths = (hidden_size * (2 if i in self.inner else 1) for i in range(depth))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qk_norm, fused_attn, hidden_size, self._joins(i, depth))
            for i, width in enumerate(widths)
        )
        if layout == "hourglass":
            self._check_hourglass(bool(z_dims))
            self.hourglass = xavier(Hourglass(hidden_size))
            self.merged_latents = 4
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.add_projectors(hidden_size, z_dims)

    def _joins(self, i: int, depth: int) -> bool:
        """Whether block i joins with block depth − 1 − i; the innermost pair of an even depth would join x with itself."""
        return self.layout == "unet" and 2 * i > depth

    def _check_hourglass(self, repa: bool) -> None:
        rows, columns = self.grid_size
        if rows % 2 or columns % 2:
            raise UserError(f"layout hourglass: the token grid of {rows}×{columns} cannot be halved")
        if repa and self.inner.start < self.repa_depth < self.inner.stop:
            raise UserError(
                f"--encoder-depth {self.encoder_depth}: REPA reads whole tokens, but blocks {self.inner.start + 1} to "
                f"{self.inner.stop} work on merged ones; choose at most {self.inner.start}, or at least {self.inner.stop}"
            )

    def interface_arguments(self) -> dict[str, Any]:
        """The interface's tokens are the image's; rotary models need no learned positions of latents."""
        return {
            "dim": self.hidden_size,
            "num_heads": self.num_heads,
            "grid_size": self.grid_size,
            "latent_pos": not self.rotary,
            "fused_attn": self.fused_attn,
        }

    def check_split(self, head_depth: int, tail_depth: int) -> None:
        """Raises UserError where skips would join tokens with latents, or the core does not hold the merged blocks."""
        if self.layout == "unet" and head_depth != tail_depth:
            raise UserError(
                f"head_depth {head_depth} and tail_depth {tail_depth}: must be equal in SiT's unet layout, "
                "whose blocks join with those that they mirror, tokens with tokens and latents with latents"
            )
        if self.layout == "hourglass" and max(head_depth, tail_depth) > self.inner.start:
            raise UserError(
                f"head_depth {head_depth} and tail_depth {tail_depth}: must be at most {self.inner.start}, "
                "since the core holds all blocks of the hourglass that work on merged tokens"
            )

    def embed(self, x: Any, t: Tensor, y: Condition) -> Stream:
        """Tokens (B, N, D) with their positions, and the condition (B, D)."""
        tokens, c = self.x_embedder(x), self.time_embedding(t) + self.y_embedder(check_labels(y, "SiT"))
        if not self.rotary:
            return SiTStream(tokens + self.pos_embed, c, grid=self.grid_size)
        # As wide as the input, where autocast makes convolutions narrower.
        return SiTStream(tokens.to(x.dtype), c, pos=positions(self.grid_size, x), grid=self.grid_size)

    def time_embedding(self, t: Tensor) -> Tensor:
        """(B,) → (B, D)."""
        return self.t_embedder(t)

    def step(self, i: int, s: Stream) -> None:
        """Block i, with the merge before and the split after the hourglass's inner blocks, and the skips of the unet."""
        assert isinstance(s, SiTStream)
        depth = len(self.blocks)
        if self.inner and i == self.inner.start:
            self.hourglass.enter(s)
        joined = [s.skips.pop()] if self._joins(i, depth) else []
        rotation = s.rotation(s.x.shape[-1] // self.num_heads)
        s.x = self.blocks[i](s.x, s.c, *([rotation, *joined] if self.rotary or joined else []))
        if self._joins(depth - 1 - i, depth):
            s.skips.append(s.x)
        if self.inner and i == self.inner.stop - 1:
            self.hourglass.leave(s)

    def output(self, s: Stream) -> Tensor:
        """Tokens (B, N, D) → velocity (B, C, H, W)."""
        return unpatchify(self.final_layer(s.x, s.c), self.grid_size, self.patch_size)
