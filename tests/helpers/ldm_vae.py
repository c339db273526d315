"""The VAE of latent diffusion (Rombach et al. 2022), plainly: its names, its computation."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions with norms before, and a 1 × 1 shortcut where the width changes."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, before, eps=1e-6), nn.GroupNorm(32, after, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all positions, of 1 × 1 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # (B, C, N)
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view(x.shape))


def middle(width: int) -> nn.Module:
    part = nn.Module()
    part.block_1, part.attn_1, part.block_2 = Block(width, width), Attention(width), Block(width, width)
    return part


def run_middle(part: nn.Module, h: Tensor) -> Tensor:
    return part.block_2(part.attn_1(part.block_1(h)))


def level(widths: list[int], attention: bool) -> nn.Module:
    part = nn.Module()
    part.block = nn.ModuleList(Block(a, b) for a, b in itertools.pairwise(widths))
    part.attn = nn.ModuleList(Attention(b) for b in widths[1:] if attention)
    return part


def run_level(part: nn.Module, h: Tensor) -> Tensor:
    for i, block in enumerate(part.block):
        h = block(h)
        h = part.attn[i](h) if len(part.attn) else h
    return h


class LDMVAE(nn.Module):
    """width · multiples: channels of the levels; blocks: of each level, and one more in the decoder; attention: levels with it."""

    def __init__(self, width: int, multiples: tuple[int, ...], blocks: int, channels: int, attention: tuple[int, ...]):
        super().__init__()
        widths = [width * m for m in multiples]
        e = self.encoder = nn.Module()
        e.conv_in = nn.Conv2d(3, width, 3, padding=1)
        e.down = nn.ModuleList()
        for i, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            e.down.append(level([before, *[after] * blocks], i in attention))
            if i + 1 < len(widths):
                e.down[i].downsample = nn.Module()
                e.down[i].downsample.conv = nn.Conv2d(after, after, 3, stride=2)
        e.mid, e.norm_out = middle(widths[-1]), nn.GroupNorm(32, widths[-1], eps=1e-6)
        e.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)
        d = self.decoder = nn.Module()
        d.conv_in, d.mid = nn.Conv2d(channels, widths[-1], 3, padding=1), middle(widths[-1])
        ups = []
        before = widths[-1]
        for i in reversed(range(len(widths))):
            part = level([before, *[widths[i]] * (blocks + 1)], i in attention)
            if i:
                part.upsample = nn.Module()
                part.upsample.conv = nn.Conv2d(widths[i], widths[i], 3, padding=1)
            ups.insert(0, part)
            before = widths[i]
        d.up = nn.ModuleList(ups)  # the first is the finest, which runs last
        d.norm_out, d.conv_out = nn.GroupNorm(32, widths[0], eps=1e-6), nn.Conv2d(widths[0], 3, 3, padding=1)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1), nn.Conv2d(channels, channels, 1)

    def moments(self, x: Tensor) -> Tensor:
        e = self.encoder
        h = e.conv_in(x)
        for part in e.down:
            h = run_level(part, h)
            if hasattr(part, "downsample"):
                h = part.downsample.conv(F.pad(h, (0, 1, 0, 1)))
        return self.quant_conv(e.conv_out(F.silu(e.norm_out(run_middle(e.mid, h)))))

    def decode(self, z: Tensor) -> Tensor:
        d = self.decoder
        h = run_middle(d.mid, d.conv_in(self.post_quant_conv(z)))
        for part in reversed(d.up):
            h = run_level(part, h)
            if hasattr(part, "upsample"):
                h = part.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return d.conv_out(F.silu(d.norm_out(h)))
