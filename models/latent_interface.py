"""The elastic latent interface (ELIT, arXiv 2603.12245) and its budgets; it depends on the shared layers alone.

Read pulls the tokens of each group into latents, standard blocks work on the latents that the budget keeps, Write puts the
result back. Shapes: B batch, N tokens, D width, J tokens and latents per group (g² for g × g groups), G = N/J groups, k ≤ J
latents kept per group.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from models.layers import Mlp, attend, gated, modulate, modulation

INIT_STD, SPREAD_STD = 0.02, 0.3  # of the interface's fresh queries and positions, as published and spread
EPS = 1e-6  # how far a decimal may be from a multiple of 1/J


def budget_to_k(budget: float | None, J: int) -> int:
    """Latents kept per group, k = ⌊budget·J + 1e-6⌋; `None` is the full budget.

    Raises:
        UserError: budget outside [1/J, 1].
    """
    if budget is None:
        return J
    k = math.floor(budget * J + EPS) if math.isfinite(budget) else 0
    if k < 1 or budget > 1:
        raise UserError(f"inference budget {budget:g} is out of range: it must lie in [1/{J}, 1] = [{1 / J:g}, 1]")
    return k


def mask_levels(J: int, min_mask_prob: float | None, max_mask_prob: float | None) -> list[float]:
    """Mask levels of training, ascending: the multiples of 1/J in [min_mask_prob, max_mask_prob] (ELIT, tail dropping).

    Neither given: [0]. Only the maximum: that one level. Only the minimum: the maximum is 1 − 1/J.

    Raises:
        UserError: limits crossed, out of [0, 1 − 1/J], or with no level between them.
    """
    top = 1 - 1 / J
    if min_mask_prob is None:
        if max_mask_prob is None:
            return [0.0]
        low, high, said = max_mask_prob, max_mask_prob, f"elit_max_mask_prob {max_mask_prob:g}"
    elif max_mask_prob is None:
        low, high, said = min_mask_prob, top, f"elit_min_mask_prob {min_mask_prob:g}"
    else:
        low, high = min_mask_prob, max_mask_prob
        said = f"elit_min_mask_prob {low:g} and elit_max_mask_prob {high:g}"
    clamped = [min(max(v, 0.0), top) if math.isfinite(v) else top for v in (low, high)]
    below, above = math.floor(clamped[0] * J + EPS), math.ceil(clamped[1] * J - EPS)
    near = sorted({min(max(n, 0), J - 1) / J for n in (below, below + 1, above - 1, above)})
    hint = f"valid levels are multiples of 1/{J} from 0 to {top:g}; the nearest: {', '.join(f'{n:g}' for n in near)}"
    if not (-EPS <= low <= top + EPS and -EPS <= high <= top + EPS):
        raise UserError(f"{said}: out of range [0, {top:g}]; {hint}")
    if low > high:
        raise UserError(f"{said}: the minimum is above the maximum; {hint}")
    levels = [n / J for n in range(math.ceil(low * J - EPS), math.floor(high * J + EPS) + 1)]
    if not levels:
        raise UserError(f"{said}: no mask level lies there; {hint}")
    return levels


def mask_to_budget(mask: float, J: int) -> float:
    """The budget that a mask level leaves: (J − round(mask·J)) / J."""
    return (J - round(mask * J)) / J


class FullWidthRMSNorm(nn.Module):
    """scale · x / (√mean(x²) + 1e-5) over the full width, in float32; unlike `torch.nn.RMSNorm` the eps is outside the root."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D), in the dtype of x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) / math.sqrt(x.shape[-1])
        return (x * (1 / (rms + 1e-5)) * self.scale).to(x.dtype)


class CrossAttention(nn.Module):
    """Queries (B, G, Q, D) on keys and values (B, G, K, D), inside each group."""

    def __init__(self, dim: int, num_heads: int, fused: bool = True):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.q_norm = FullWidthRMSNorm(dim)
        self.k_norm = FullWidthRMSNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Queries (B or 1, G or 1, Q, D) and context (B, G, K, D) → (B, G, Q, D)."""
        q, k, v = self.heads(queries, context)
        x = attend(q, k, v, self.fused, portable=True)  # (B·G, heads, Q, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2)).unflatten(0, context.shape[:2])

    def heads(self, queries: Tensor, context: Tensor) -> list[Tensor]:
        """Queries, keys and values by head: (B·G, heads, Q, D/heads), and twice (B·G, heads, K, D/heads)."""
        B, G = context.shape[:2]
        q = self.q_norm(self.q_proj(queries)).expand(B, G, -1, -1)  # queries that all groups share are projected once
        k, v = self.kv_proj(context).chunk(2, dim=-1)
        q = q.contiguous()  # not all kernels take one row for all groups
        return [a.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for a in (q, self.k_norm(k), v)]

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """The attention weights of a forward, (B, G, heads, Q, K), in float32 or better; each row sums to 1."""
        q, k, _ = self.heads(queries, context)
        q, k = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (q, k))
        with torch.autocast(q.device.type, enabled=False):
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return weights.unflatten(0, context.shape[:2])


class Read(nn.Module):
    """Latents z pull from the tokens x of their group: cross-attention + MLP pairs under one shared modulation."""

    def __init__(self, dim: int, num_heads: int, cond_dim: int, depth: int, hidden_dim: int, fused: bool = True):
        super().__init__()
        self.attn = nn.ModuleList(CrossAttention(dim, num_heads, fused) for _ in range(depth))
        self.mlp = nn.ModuleList(Mlp(dim, hidden_dim, bias=False) for _ in range(depth))
        self.adaLN_modulation = modulation(cond_dim, 6 * dim)

    def forward(self, z: Tensor, x: Tensor, c: Tensor) -> Tensor:
        """Latents z (1, 1, k, D) or (B, G, k, D), tokens x (B, G, J, D), c (B, cond_dim) → (B, G, k, D)."""
        D = x.shape[-1:]
        shift_p, scale_p, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None, None].chunk(6, dim=-1)
        x = modulate(F.layer_norm(x, D, eps=1e-6), shift_p, scale_p)
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            z = gated(z, gate_a, attn(z, x))
            z = gated(z, gate_m, mlp(modulate(F.layer_norm(z, D, eps=1e-6), shift_m, scale_m)))
        return z


class Write(nn.Module):
    """Tokens x take from the latents z of their group: cross-attention + MLP pairs without modulation.

    The last Linears start at zero, so that an untrained interface leaves the tokens as they were. `pre_norm`: LayerNorm without
    affine in front of both layers, for tokens and latents alike (the paper's Write, "fully symmetric" to Read).
    """

    def __init__(self, dim: int, num_heads: int, depth: int, hidden_dim: int, pre_norm: bool = False, fused: bool = True):
        super().__init__()
        attns = [CrossAttention(dim, num_heads, fused) for _ in range(depth)]
        mlps = [Mlp(dim, hidden_dim, bias=False) for _ in range(depth)]
        self.attn, self.mlp, self.pre_norm = nn.ModuleList(attns), nn.ModuleList(mlps), pre_norm
        for module in (*(a.proj for a in attns), *(m.fc2 for m in mlps)):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Tokens x (B, G, J, D), latents z (B, G, k, D) → (B, G, J, D)."""
        z = self._norm(z)
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            x = x + attn(self._norm(x), z)
            x = x + mlp(self._norm(x))
        return x

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.pre_norm else x


class LatentInterface(nn.Module):
    """Read and Write around any stack of blocks that maps (B, n, D) → (B, n, D).

    Args:
        dim, num_heads: width D and heads of the cross-attention.
        grid_size: the token grid, e.g. (rows, columns) or (frames, rows, columns), row-major (the last axis runs fastest).
        group_size: tokens of a group along each axis; an int is the same on all axes.
        cond_dim: width of the condition c; default D.
        tail: what becomes of the latents beyond the budget. "drop": they do not exist (the paper's reading). "skip": they go
            from Read to Write unprocessed (what published checkpoints need).
        write: "published": no norms in Write, as the published code has it. "paper": pre-norms in front of both of its layers.
        mlp_ratio: hidden width of the MLPs of Read and Write, as a multiple of D.
        latent_pos: whether every latent has a learned position of its own, added after Read.

    Raises:
        UserError: the grid cannot be cut into groups, or an option is not valid; the message begins with the argument's name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Sequence[int],
        group_size: int | Sequence[int],
        *,
        cond_dim: int | None = None,
        read_depth: int = 1,
        write_depth: int = 1,
        tail: Literal["drop", "skip"] = "drop",
        write: Literal["published", "paper"] = "published",
        mlp_ratio: float = 1.0,
        latent_pos: bool = True,
        fused_attn: bool = True,
    ):
        super().__init__()
        grid = tuple(grid_size)
        shape = (group_size,) * len(grid) if isinstance(group_size, int) else tuple(group_size)
        _check_groups(grid, shape, group_size)
        if tail not in ("drop", "skip"):
            raise UserError(f"tail {tail!r} is not valid; choose drop or skip")
        if write not in ("published", "paper"):
            raise UserError(f"write {write!r} is not valid; choose published or paper")
        hidden_dim = round(dim * mlp_ratio) if 0 < mlp_ratio <= 64 else 0
        if hidden_dim < 1 or not math.isclose(hidden_dim, dim * mlp_ratio):
            raise UserError(f"mlp_ratio {mlp_ratio:g}: must make a whole number of the width {dim}, and be at most 64")
        for name, depth in (("read_depth", read_depth), ("write_depth", write_depth)):
            if depth < 1:
                raise UserError(f"{name} {depth}: must be at least 1")
        self.grid_size, self.group_size, self.group_shape, self.tail = grid, group_size, shape, tail
        self.latents_per_group = J = math.prod(shape)
        self.num_groups = math.prod(grid) // J
        self.query = nn.Parameter(torch.empty(J, dim))
        self.read_pos = nn.Parameter(torch.empty(J, dim))
        self.write_pos = nn.Parameter(torch.empty(J, dim))
        # In group order.
        self.latent_pos = nn.Parameter(torch.empty(self.num_groups, J, dim)) if latent_pos else None
        for parameter in self._positions():
            nn.init.normal_(parameter, std=INIT_STD)
        self.reader = Read(dim, num_heads, cond_dim or dim, read_depth, hidden_dim, fused_attn)
        self.writer = Write(dim, num_heads, write_depth, hidden_dim, write == "paper", fused_attn)

    def _positions(self) -> list[nn.Parameter]:
        return [p for p in (self.query, self.read_pos, self.write_pos, self.latent_pos) if p is not None]

    @torch.no_grad()
    def spread(self) -> None:
        """Let a fresh interface start with queries and positions from N(0, 0.3²) in place of N(0, 0.02²), and Read's gates at 1.

        By these Read and Write tell the tokens of a group apart. Adam moves a weight by at most its learning rate a step, so
        from the published start a run of a few thousand steps ends before they do, and all latents of a group say the same.
        """
        for parameter in self._positions():
            parameter.mul_(SPREAD_STD / INIT_STD)
        bias = self.reader.get_parameter("adaLN_modulation.1.bias")
        for gate in bias.chunk(6)[2::3]:  # of the attention, and of the MLP
            gate.fill_(1.0)

    def on_grid(self, grid_size: Sequence[int]) -> "LatentInterface":
        """This interface on another token grid, its parameters shared; it must be one without positions of latents.

        Raises:
            UserError: the grid cannot be cut into groups.
        """
        assert self.latent_pos is None, "positions of latents belong to one grid"
        other = copy.copy(self)
        other.grid_size = tuple(grid_size)
        _check_groups(other.grid_size, self.group_shape, self.group_size)
        other.num_groups = math.prod(grid_size) // self.latents_per_group
        return other

    def group(self, x: Tensor) -> Tensor:
        """Row-major tokens (B, N, D) → (B, G, J, D): windows in row-major order, and row-major inside each."""
        axes = len(self.grid_size)
        windows = [length for n, g in zip(self.grid_size, self.group_shape, strict=True) for length in (n // g, g)]
        x = x.unflatten(1, windows)  # of a plane: (B, R, g, C, g, D)
        x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), -1)  # (B, R, C, g, g, D)
        return x.flatten(1 + axes, 2 * axes).flatten(1, axes)

    def ungroup(self, x: Tensor) -> Tensor:
        """(B, G, J, D) → row-major tokens (B, N, D)."""
        axes = len(self.grid_size)
        counts = [n // g for n, g in zip(self.grid_size, self.group_shape, strict=True)]
        x = x.unflatten(2, self.group_shape).unflatten(1, counts)  # of a plane: (B, R, C, g, g, D)
        x = x.permute(0, *(i for a in range(1, axes + 1) for i in (a, axes + a)), -1)  # (B, R, g, C, g, D)
        return x.flatten(1, 2 * axes)

    def gather(self, table: Tensor, k: int) -> Tensor:
        """Of a table (N, …) with a row for each token, the rows of the first k tokens of each group in group order, (G·k, …)."""
        return self.group(table.reshape(1, len(table), -1))[0, :, :k].reshape(-1, *table.shape[1:])

    def read(self, x: Tensor, c: Tensor, budget: float | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, N, D) and condition (B, cond_dim) → tokens in group order, kept latents, tail latents.

        Returns:
            The tokens (B, G, J, D), to be handed to `write`; the kept latents (B, G·k, D) for the core; and the tail latents
            (B, G, J−k, D), `None` where they do not exist.
        """
        J = self.latents_per_group
        k = budget_to_k(budget, J)
        made = k if self.tail == "drop" else J  # latents that Read computes
        tokens = self.group(x) + self.read_pos
        z = self.reader(self.query[:made], tokens, c)  # (B, G, made, D)
        if self.latent_pos is not None:
            z = z + self.latent_pos[:, :made]
        return tokens, z[:, :, :k].flatten(1, 2), z[:, :, k:] if made > k else None

    def read_attention(self, x: Tensor, c: Tensor) -> Tensor:
        """How much each latent reads from each token of its group, in the last layer of Read at the full budget.

        Tokens (B, N, D) and condition (B, cond_dim) → attention weights (B, G, heads, J latents, J tokens).
        """
        layer = self.reader.attn[-1]
        assert isinstance(layer, CrossAttention)
        inputs: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
        try:
            self.read(x, c)
        finally:
            hook.remove()
        return layer.weights(*inputs[0])

    def write(self, tokens: Tensor, kept: Tensor, tail: Tensor | None = None) -> Tensor:
        """Tokens and tail as `read` gave them, and the kept latents (B, G·k, D) after the core → row-major tokens (B, N, D)."""
        z = kept.unflatten(1, (self.num_groups, -1))  # (B, G, k, D)
        if tail is not None:
            z = torch.cat([z, tail], dim=2)
        return self.ungroup(self.writer(tokens + self.write_pos, z))


def _check_groups(grid: tuple[int, ...], shape: tuple[int, ...], given: int | Sequence[int]) -> None:
    if len(shape) == len(grid) and all(g >= 1 and n % g == 0 for n, g in zip(grid, shape, strict=True)):
        return
    if len(shape) != len(grid):
        valid = f"give one number for each of its {len(grid)} axes, or one for all"
    elif isinstance(given, int):
        common = math.gcd(*grid)
        sizes = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        valid = f"choose a common divisor of {' and '.join(map(str, grid))}: {sizes}"
    else:
        valid = f"choose a divisor of {', of '.join(map(str, grid))}"
    size = given if isinstance(given, int) else "×".join(map(str, given))
    raise UserError(f"group_size {size}: the token grid of {'×'.join(map(str, grid))} cannot be cut into such groups; {valid}")
