"""Layers that several backbones share.

Shapes: B batch, C channels of the VAE latents, H × W their size, p patch size, N = (H/p)·(W/p) tokens, D width.
"""

import math
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import precision

Module = TypeVar("Module", bound=nn.Module)


def sincos_position_embedding(dim: int, grid_size: tuple[int, int], scale: float = 1.0) -> Tensor:
    """Fixed 2-D sine–cosine table (N, D) in row-major order, computed in float64 (He et al. 2022, MAE).

    The first D/2 channels encode the column, the last D/2 the row; each half is [sin, cos]. Positions are divided by `scale`.
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) / scale for n in grid_size)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def embed(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([embed(column), embed(row)], dim=1).float()


# cuDNN's attention has faults at one query with a gradient, and plans anew for every number of latents.
PORTABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, fused: bool, portable: bool = False) -> Tensor:
    """Scaled dot-product attention on (B, heads, N, D/heads); plain matrix products where `fused` is off.

    On CUDA by the kernels that `common.precision.set_attention` allows; with `portable` never by cuDNN.
    """
    if fused and portable and q.is_cuda:
        with sdpa_kernel(PORTABLE):
            return F.scaled_dot_product_attention(q, k, v)
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


# Cosines and sines (n, d/2) each: of one tensor, the 2 would be taken for a batch of 2 by torch.compile.
Rotation = tuple[Tensor, Tensor]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Channel pairs (2i, 2i + 1) of x (B, heads, n, d) turned by angles whose cosines and sines are `rotation`, in their dtype."""
    cos, sin = rotation
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift; x (B, N, D), shift and scale (B, 1, D)."""
    # Norms are wider than the condition under autocast; the matrix product that follows narrows them in any case.
    return torch.addcmul(shift, x.to(shift.dtype), 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """X + gate·branch; x and branch (B, N, D), gate (B, 1, D)."""
    if x.dtype == branch.dtype == gate.dtype:
        return torch.addcmul(x, gate, branch)
    # CUDA's autocast would first widen what it gives to addcmul, in memory, and narrow the gradients of that again.
    return x + gate * branch


class PatchEmbed(nn.Module):
    """(B, C, H, W) → tokens (B, N, D) in row-major order: a convolution with kernel and stride p.

    In the type of its weights under autocast too: what half precision loses here, no later layer brings back.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        with precision.full_precision(x.device):
            return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2).contiguous()


def timestep_features(t: Tensor, num_features: int) -> Tensor:
    """Times t (B,) → (B, num_features): [cos, sin] of t·10000^(−i/half), i = 0 … half−1, half = num_features / 2; in float32."""
    half = num_features // 2
    # Made at every call: as a buffer the frequencies would be cast to the model's dtype.
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
    angle = t.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] → (B, D): 256 sinusoidal features of t itself (not of 1000·t), then a two-layer MLP."""

    def __init__(self, dim: int, num_features: int = 256):
        super().__init__()
        layers = nn.Linear(num_features, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(layers[0], nn.SiLU(), layers[1])
        self.num_features = num_features
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """See the class."""
        return self.mlp(timestep_features(t, self.num_features).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class ids (B,) → (B, D). Row `num_classes` is the null label; labels arrive already dropped."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """See the class."""
        return self.embedding_table(y)


class RMSNorm(nn.Module):
    """scale · x / √(mean(x²) + 1e-6) over the last axis, in float32; ELIT's own (`FullWidthRMSNorm`) has its eps outside the root."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D), in the dtype of x."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps) * self.scale).to(x.dtype)


QKNorm = Literal["rms"] | bool


def head_norm(kind: QKNorm, head_width: int) -> nn.Module:
    """The norm of q or k over the width of a head: none, `True` LayerNorm (eps 1e-5), "rms" `RMSNorm`."""
    if kind == "rms":
        return RMSNorm(head_width)
    return nn.LayerNorm(head_width, eps=1e-5) if kind else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention with a fused QKV projection; x (B, N, D) and, to turn q and k, a rotation → (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: QKNorm = False, fused: bool = True, qkv_bias: bool = True):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = head_norm(qk_norm, dim // num_heads)
        self.k_norm = head_norm(qk_norm, dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """See the class."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = (a.transpose(1, 2) for a in qkv.unbind(2))  # (B, heads, N, D/heads) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = attend(q, k, v, self.fused)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU (tanh-approximated; exact with `approximate="none"`), Linear."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True, approximate: Literal["none", "tanh"] = "tanh"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


def modulation(cond_dim: int, out_dim: int) -> nn.Sequential:
    """SiLU and a zero-initialised Linear: the condition's shifts, scales and gates (adaLN-Zero)."""
    linear = nn.Linear(cond_dim, out_dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def xavier(module: Module) -> Module:
    """Xavier-uniform weights and zero biases for every Linear inside `module`, and for convolutions as if they were Linears."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


class FinalLayer(nn.Module):
    """Tokens (B, N, D) → patches (B, N, p·p·C), the last axis laid out (p, p, C); like `PatchEmbed` in the type of its weights."""

    def __init__(self, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = modulation(dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """See the class."""
        with precision.full_precision(x.device):
            x, c = (a.to(self.linear.weight.dtype) for a in (x, c))
            shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
            return self.linear(modulate(self.norm_final(x), shift, scale))


def narrow_linears(model: Module, dtype: torch.dtype | None) -> Module:
    """Hold the weights of a frozen model's Linears in autocast's type, in place: autocast would convert them in every forward.

    `dtype`: that type; None where there is no autocast. What autocast leaves in float32 (norms, tables, `PatchEmbed`, `FinalLayer`) stays; results under autocast are the same bits.
    """
    wide = {layer for module in model.modules() if isinstance(module, FinalLayer) for layer in module.modules()}
    for layer in model.modules():
        if dtype is not None and isinstance(layer, nn.Linear) and layer not in wide:
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return model


def unpatchify(x: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """Patches (B, N, p·p·C), the last axis laid out (p, p, C), of a grid of (rows, columns) → (B, C, H, W)."""
    x = x.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid_size)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def merge_cells(x: Tensor, grid_size: tuple[int, int], p: int = 2) -> Tensor:
    """Row-major cells (B, n, D) of a grid → (B, n/p², p·p·D): p×p cells in one, laid out (row, column, channel)."""
    x = x.unflatten(1, (grid_size[0] // p, p, grid_size[1] // p, p))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def split_cells(x: Tensor, grid_size: tuple[int, int], p: int = 2) -> Tensor:
    """The inverse of `merge_cells`: (B, n/p², p·p·D) → (B, n, D); `grid_size` is that of the n cells."""
    x = x.unflatten(2, (p, p, -1)).unflatten(1, (grid_size[0] // p, grid_size[1] // p))
    return x.transpose(2, 3).flatten(1, 4)


class ConvProjector(nn.Conv2d):
    """iREPA's map from tokens to one target encoder's features: a 3×3 convolution over their grid (arXiv 2512.10794)."""

    def __init__(self, dim: int, z_dim: int, grid_size: tuple[int, int]):
        super().__init__(dim, z_dim, kernel_size=3, padding=1)
        self.grid_size = grid_size

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D), row-major → (B, N, z)."""
        return super().forward(x.transpose(1, 2).unflatten(2, self.grid_size)).flatten(2).transpose(1, 2)


def projector(dim: int, z_dim: int, hidden_dim: int = 2048) -> nn.Sequential:
    """REPA's map from tokens to one target encoder's features (Yu et al. 2024, arXiv 2410.06940, §3)."""
    return xavier(
        nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, z_dim)
        )
    )
