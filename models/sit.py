"""SiT: scalable interpolant transformer (Ma et al. 2024, arXiv 2401.08740) on DiT blocks (Peebles & Xie 2023, 2212.09748)."""

from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.backbone import Backbone, Stream
from models.layers import (
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    QKNorm,
    TimestepEmbedder,
    modulate,
    modulation,
    sincos_position_embedding,
    unpatchify,
    xavier,
)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning; x (B, N, D), c (B, D) → (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qk_norm: QKNorm = False, fused: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm, fused)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        xavier(self)
        self.adaLN_modulation = modulation(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, self.attn(modulate(self.norm1(x), shift_a, scale_a)))
        return torch.addcmul(x, gate_m, self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class SiT(Backbone):
    """Transformer blocks with adaLN-Zero on patch tokens.

    Args (beside Backbone's):
        z_dims: feature widths of the REPA target encoders.
    Raises:
        UserError: sizes that do not divide.
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
        self.hidden_size, self.num_heads, self.fused_attn = hidden_size, num_heads, fused_attn
        self.x_embedder = xavier(PatchEmbed(patch_size, in_channels, hidden_size))
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.grid_size)[None])
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm, fused_attn) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.add_projectors(hidden_size, z_dims)

    def interface_arguments(self) -> dict[str, Any]:
        return {
            "dim": self.hidden_size,
            "num_heads": self.num_heads,
            "grid_size": self.grid_size,
            "fused_attn": self.fused_attn,
        }

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> Stream:
        """Tokens (B, N, D) with their positions, and the condition (B, D)."""
        return Stream(self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y), grid=self.grid_size)

    def step(self, i: int, s: Stream) -> None:
        s.x = self.blocks[i](s.x, s.c)

    def output(self, s: Stream) -> Tensor:
        """Tokens (B, N, D) → velocity (B, C, H, W)."""
        return unpatchify(self.final_layer(s.x, s.c), self.grid_size, self.patch_size)
