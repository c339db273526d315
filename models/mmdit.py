"""MM-DiT: two streams, text and image, that attend jointly (Esser et al. 2024, arXiv 2403.03206).

One class is Stable Diffusion 3's and 3.5's model and REPA's text-to-image model (Yu et al. 2024, 2410.06940), by option.
Shapes: B batch, N image tokens, L text tokens, D width, d head width, E and P widths of text features and pooled text.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.backbone import Backbone, Stream
from models.conditioning import Condition, NullText, Text, check_text
from models.layers import (
    Attention,
    FinalLayer,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    attend,
    gated,
    modulate,
    modulation,
    sincos_position_embedding,
    unpatchify,
    xavier,
)

QKNorm = Literal["rms"] | None


class JointAttention(Attention):
    """One stream's part of an attention: its queries, keys and values, and its output projection (none with `last`)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: QKNorm, last: bool):
        super().__init__(dim, num_heads, qk_norm or False)
        if last:
            del self.proj

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, D) → queries, keys and values (B, heads, n, d)."""
        q, k, v = (a.transpose(1, 2) for a in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        return self.q_norm(q), self.k_norm(k), v

    def out(self, x: Tensor) -> Tensor:
        """What the heads attended to, (B, heads, n, d) → (B, n, D)."""
        return self.proj(x.transpose(1, 2).flatten(2))


class Side(nn.Module):
    """One stream's side of a block, called in two halves around the joint attention.

    Args:
        last: the text side of the last block, whose text ends there: keys and values for the image, and no more.
        dual: a second attention among this stream's own tokens (SD3.5-medium).
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: QKNorm, fused: bool, last: bool = False, dual: bool = False):
        super().__init__()
        self.parts = 2 if last else 9 if dual else 6
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = JointAttention(dim, num_heads, qk_norm, last)
        if dual:
            self.attn2 = Attention(dim, num_heads, qk_norm or False, fused)
        if not last:
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(dim, 4 * dim)
        xavier(self)
        self.adaLN_modulation = modulation(dim, self.parts * dim)

    def modulations(self, c: Tensor) -> tuple[Tensor, ...]:
        """(B, D) → shift, scale and gate (B, 1, D) of the attention, then of the MLP, then of the second attention."""
        return self.adaLN_modulation(c).unsqueeze(1).chunk(self.parts, dim=-1)

    def heads(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, n, d) of this stream in the joint attention."""
        return self.attn.heads(modulate(self.norm1(x), parts[0], parts[1]))

    def update(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The stream x (B, n, D) after what it attended to (B, heads, n, d), and its MLP."""
        _, _, gate_a, shift_m, scale_m, gate_m, *second = parts
        h = gated(x, gate_a, self.attn.out(attended))
        if second:
            shift, scale, gate = second
            h = gated(h, gate, self.attn2(modulate(self.norm1(x), shift, scale)))
        return gated(h, gate_m, self.mlp(modulate(self.norm2(h), shift_m, scale_m)))


class JointBlock(nn.Module):
    """Image x (B, N, D) and text (B, L, D) attend to both, each with its own weights, under the condition c (B, D)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: QKNorm, fused: bool, last: bool, dual: bool):
        super().__init__()
        self.fused, self.last = fused, last
        self.text = Side(dim, num_heads, qk_norm, fused, last=last)
        self.image = Side(dim, num_heads, qk_norm, fused, dual=dual)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; returns image and text."""
        L = text.shape[1]
        text_parts, image_parts = self.text.modulations(c), self.image.modulations(c)
        both = zip(self.text.heads(text, text_parts), self.image.heads(x, image_parts), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in both)
        # The last text queries are made too, though nothing reads their output: every parameter has a gradient.
        attended = attend(q, k, v, self.fused)  # (B, heads, L + N, d)
        if not self.last:
            text = self.text.update(text, attended[:, :, :L], text_parts)
        return self.image.update(x, attended[:, :, L:], image_parts), text


class MMDiT(NullText, Backbone):
    """Velocity model v(x, t, text) on VAE latents; `Backbone` has the arguments that are not here.

    Args:
        text_width, text_length: of the text features (B, L, E); any length where `text_length` is `None`.
        pooled_width: P of the pooled text, `None` where the model takes none.
        qk_norm: "rms" for RMS-normalised queries and keys.
        dual_attention: the blocks (from 0) whose image side has a second attention of its own.
        pos_grid, pos_scale: the position table is that of a (rows, columns) grid with positions divided by `pos_scale`, and the
            tokens take its centre; `None` for the table of the token grid itself.
        time_scale: what t in [0, 1] is multiplied by (SD3: 1000).
        projector_dim: hidden width of REPA's projectors.

    Raises:
        UserError: sizes that do not fit each other.
    """

    takes_labels, takes_text = False, True
    pos_embed: Tensor

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        text_width: int,
        text_length: int | None = None,
        pooled_width: int | None = None,
        qk_norm: QKNorm = None,
        dual_attention: tuple[int, ...] = (),
        pos_grid: tuple[int, int] | None = None,
        pos_scale: float = 1.0,
        time_scale: float = 1.0,
        encoder_depth: int = 8,
        z_dims: tuple[int, ...] = (),
        projector_dim: int = 2048,
        fused_attn: bool = True,
    ):
        super().__init__(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels, num_classes=None, encoder_depth=encoder_depth
        )
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be divisible by 4 and by num_heads {num_heads}")
        self.pos_grid = self.grid_size if pos_grid is None else (pos_grid[0], pos_grid[1])
        if self.pos_grid[0] < self.grid_size[0] or self.pos_grid[1] < self.grid_size[1]:
            given = "×".join(map(str, self.pos_grid))
            raise UserError(
                f"pos_grid {given} of MMDiT is smaller than the token grid of {self.grid_size[0]}×{self.grid_size[1]}"
            )
        if qk_norm not in (None, "rms"):
            raise UserError(f"qk_norm {qk_norm!r}: MMDiT has rms, or none")
        if not set(dual_attention) <= set(range(depth)):
            raise UserError(f"dual_attention {list(dual_attention)}: blocks are numbered from 0 to {depth - 1}")
        self.hidden_size, self.num_heads, self.fused, self.time_scale = hidden_size, num_heads, fused_attn, time_scale
        self.text_width, self.text_length, self.pooled_width = text_width, text_length, pooled_width

        self.x_embedder = xavier(PatchEmbed(patch_size, in_channels, hidden_size))
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.pos_grid, pos_scale)[None])
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = None if pooled_width is None else TimestepEmbedder(hidden_size, pooled_width).mlp
        self.context_embedder = xavier(nn.Linear(text_width, hidden_size))
        self.blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, qk_norm, fused_attn, last=i == depth - 1, dual=i in dual_attention)
            for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.add_projectors(hidden_size, z_dims, projector_dim)

    @classmethod
    def text_arguments(cls, length: int, width: int, pooled: int) -> dict[str, Any]:
        """See `Backbone.text_arguments`."""
        return {"text_width": width, "text_length": length, "pooled_width": pooled or None}

    def positions(self) -> Tensor:
        """The centre of the position table, (1, N, D)."""
        top, left = ((p - n) // 2 for p, n in zip(self.pos_grid, self.grid_size, strict=True))
        table = self.pos_embed.unflatten(1, self.pos_grid)
        return table[:, top : top + self.grid_size[0], left : left + self.grid_size[1]].flatten(1, 2)

    def embed(self, x: Tensor, t: Tensor, y: Condition) -> Stream:
        """Image tokens (B, N, D), text tokens (B, L, D) and the condition (B, D)."""
        y = check_text(y, "MMDiT", width=self.text_width, length=self.text_length, pooled_width=self.pooled_width)
        c = self.time_embedding(t)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y.pooled)
        text = self.context_embedder(y.features).clone()  # as what blocks return, no view: one graph of torch.compile less
        return Stream(self.x_embedder(x) + self.positions(), c, text=text)

    def time_embedding(self, t: Tensor) -> Tensor:
        """(B,) → (B, D)."""
        return self.t_embedder(t * self.time_scale)

    def step(self, i: int, s: Stream) -> None:
        """Block i: image tokens, or latents, and text attend to both."""
        s.x, s.text = self.blocks[i](s.x, s.text, s.c)

    def output(self, s: Stream) -> Tensor:
        """Image tokens (B, N, D) → velocity (B, C, H, W)."""
        return unpatchify(self.final_layer(s.x, s.c), self.grid_size, self.patch_size)

    def interface_arguments(self) -> dict[str, Any]:
        """The interface stands in the image stream; the text stays as long as it is."""
        return {"dim": self.hidden_size, "num_heads": self.num_heads, "grid_size": self.grid_size, "fused_attn": self.fused}

    def example_condition(self, batch_size: int) -> Text:
        """Zeros for text, of the length of the model, of its null text, or else of CLIP's 77 tokens."""
        length = self.text_length or (77 if self.null_text is None else len(self.null_text))
        make = self.context_embedder.weight.new_zeros
        pooled = None if self.pooled_width is None else make(batch_size, self.pooled_width)
        return Text(make(batch_size, length, self.text_width), pooled)
