"""SiT: scalable interpolant transformer (Ma et al. 2024, arXiv 2401.08740) on DiT blocks (Peebles & Xie 2023, 2212.09748).

Shapes: B batch, C channels of the VAE latents, H × W their size, p patch size, N = (H/p)·(W/p) tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from errors import UserError


def sincos_position_embedding(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine–cosine table (N, D) in row-major order, computed in float64 (He et al. 2022, MAE).

    The first D/2 channels encode the column, the last D/2 the row; each half is [sin, cos].
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def embed(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([embed(column), embed(row)], dim=1).float()


def attend(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    """Scaled dot-product attention on (B, heads, N, D/heads); plain matrix products where `fused` is off."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift; x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class PatchEmbed(nn.Module):
    """(B, C, H, W) → tokens (B, N, D) in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))  # as if it were a Linear
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] → (B, D): 256 sinusoidal features of t itself (not of 1000·t), then a two-layer MLP."""

    def __init__(self, dim: int, num_features: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.half = num_features // 2
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        # In float32 whatever the model's dtype: made here, since a buffer would be cast with the model.
        frequencies = torch.exp(torch.arange(self.half, device=t.device) * (-math.log(10000) / self.half))
        angle = t.float()[:, None] * frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class ids (B,) → (B, D). Row `num_classes` is the null label; labels arrive already dropped."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention with a fused QKV projection; (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, fused: bool = True):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D/heads) each
        x = attend(self.q_norm(q), self.k_norm(k), v, self.fused)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(cond_dim: int, out_dim: int) -> nn.Sequential:
    """SiLU and a zero-initialised Linear: the condition's shifts, scales and gates (adaLN-Zero)."""
    layers = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, out_dim))
    nn.init.zeros_(layers[1].weight)
    nn.init.zeros_(layers[1].bias)
    return layers


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear inside `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning; x (B, N, D), c (B, D) → (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False, fused: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm, fused)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        xavier_linears(self)
        self.adaLN_modulation = modulation(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, self.attn(modulate(self.norm1(x), shift_a, scale_a)))
        return torch.addcmul(x, gate_m, self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) → patches (B, N, p·p·C), the last axis laid out (p, p, C)."""

    def __init__(self, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = modulation(dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """Patches (B, N, p·p·C), the last axis laid out (p, p, C), of a grid of (rows, columns) → (B, C, H, W)."""
    x = x.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid_size)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def projector(dim: int, z_dim: int, hidden_dim: int = 2048) -> nn.Sequential:
    """REPA's map from tokens to one target encoder's features (Yu et al. 2024, arXiv 2410.06940, §3)."""
    layers = nn.Sequential(
        nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, z_dim)
    )
    xavier_linears(layers)
    return layers


class SiT(nn.Module, PyTorchModelHubMixin, library_name="elit", license="mit", tags=["diffusion", "class-conditional"]):
    """Velocity model v(x, t, y) on VAE latents. `save_pretrained`, `from_pretrained` and `push_to_hub` are the hub mixin's.

    Args:
        input_size: side of the VAE latents, or (rows, columns).
        encoder_depth: block after which the tokens go to REPA's projectors (1-based); used only where `z_dims` is not empty.
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
        qk_norm: bool = False,
        fused_attn: bool = True,
        encoder_depth: int = 8,
        z_dims: tuple[int, ...] = (),
    ):
        super().__init__()
        rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
        if rows % patch_size or columns % patch_size or min(rows, columns) < patch_size:
            raise UserError(
                f"VAE latents of {rows}×{columns} cannot be cut into patches of {patch_size}: choose a resolution divisible by the VAE's factor × {patch_size}"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be divisible by 4 and by num_heads {num_heads}")
        if z_dims and not 1 <= encoder_depth <= depth:
            raise UserError(f"--encoder-depth {encoder_depth}: must lie between 1 and the model's depth, {depth}")
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.grid_size = (rows // patch_size, columns // patch_size)
        self.encoder_depth = encoder_depth

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.grid_size)[None])
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm, fused_attn) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        if z_dims:
            self.projectors = nn.ModuleList(projector(hidden_size, z) for z in z_dims)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) with their positions, and the condition (B, D)."""
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def project(self, x: Tensor) -> list[Tensor]:
        """Tokens (B, N, D) → REPA projections (B, N, z), one per target encoder."""
        return [p(x) for p in self.projectors] if hasattr(self, "projectors") else []

    def transform(
        self, x: Tensor, c: Tensor, inference_budget: float | None = None, return_features: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The blocks: tokens (B, N, D) under the condition c (B, D) → tokens (B, N, D), and REPA's projections where asked for."""
        if inference_budget is not None:
            raise UserError(f"inference budget {inference_budget}: a SiT model has no budget; only ELIT models do")
        features: list[Tensor] = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if return_features and i == self.encoder_depth:
                features = self.project(x)
        return x, features

    def output(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D) → velocity (B, C, H, W)."""
        return unpatchify(self.final_layer(x, c), self.grid_size, self.patch_size)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, inference_budget: float | None = None, return_features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Velocity (B, C, H, W) for x (B, C, H, W), t (B,) in [0, 1] (1 = noise), y (B,) int64 (`num_classes` = null label).

        With `return_features` also the REPA projections. Raises UserError for a budget that the model does not have.
        """
        tokens, c = self.embed(x, t, y)  # (B, N, D), (B, D)
        tokens, features = self.transform(tokens, c, inference_budget, return_features)
        velocity = self.output(tokens, c)
        return (velocity, features) if return_features else velocity
